"""Adapters: what a notebook cannot show well.

Every bad input, nothing half-applied, files of peft, resuming, memory.
"""
import json
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from minillm.data import Rows
from minillm.lora import (TARGETS, LoraLinear, add_lora, load_adapter, lora_shapes, lora_state_dict,
                          merge_lora, remove_lora, save_adapter)
from minillm.model import Llama, LlamaConfig
from minillm.nf4 import to_nf4
from minillm.train import TrainConfig, train

CONFIG = LlamaConfig(vocab_size=300, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48)


def model(config=CONFIG):
    torch.manual_seed(0)
    return Llama(config)


def adapted(rank=4, alpha=12, targets=TARGETS):
    """A model with an adapter that does something."""
    m = add_lora(model(), rank, alpha, targets)
    for n, p in m.named_parameters():
        if "lora_B" in n:
            nn.init.normal_(p, std=0.1)
    return m


def ids(b=2, t=30):
    return torch.randint(0, 300, (b, t), generator=torch.Generator().manual_seed(1))


def snapshot(m):
    return {n: (p.clone(), p.requires_grad) for n, p in m.named_parameters()}


def same(before, m):
    after = snapshot(m)
    return before.keys() == after.keys() and all(
        torch.equal(p, after[n][0]) and trainable == after[n][1]
        for n, (p, trainable) in before.items())


@torch.no_grad()
def test_step_0_is_the_base_and_all_seven_layers_are_reached():
    base, m = model(), add_lora(model(), 4, 8)
    assert torch.equal(m(ids()), base(ids()))
    wrapped = [n for n, x in m.named_modules() if isinstance(x, LoraLinear)]
    assert len(wrapped) == 7 * CONFIG.n_layers
    assert {n.rpartition(".")[2] for n in wrapped} == set(TARGETS)
    for n, p in m.named_parameters():
        assert p.requires_grad == (".lora_" in n), n
    for n, p in m.named_parameters():
        assert "lora_A" not in n or p.abs().min() > 0, n
        assert "lora_B" not in n or p.abs().max() == 0, n


@torch.no_grad()
@pytest.mark.parametrize("layer", TARGETS)
def test_each_adapter_changes_the_output(layer):
    m = add_lora(model(), 4, 8, [layer])
    for x in lora_state_dict(m):
        assert f".{layer}." in x
    before = m(ids())
    for n, p in m.named_parameters():
        if "lora_B" in n:
            nn.init.normal_(p, std=0.1)
    assert (m(ids()) - before).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("rank, alpha", [(1, 3), (4, 8), (40, 7.5)])
def test_update_is_scaled_by_alpha_over_rank(rank, alpha):
    linear = nn.Linear(6, 10, bias=True)
    lora = LoraLinear(linear, rank, alpha)
    nn.init.normal_(lora.lora_B.weight)
    x = torch.randn(5, 6)
    expected = linear(x) + alpha / rank * x @ lora.lora_A.weight.T @ lora.lora_B.weight.T
    assert torch.allclose(lora(x), expected, atol=1e-5)


@torch.no_grad()
def test_merged_is_unmerged_and_a_plain_model_again():
    m, plain = adapted(), model()
    before = m(ids())
    assert (before - plain(ids())).abs().max() > 0.01
    assert merge_lora(m) is m
    assert (m(ids()) - before).abs().max() < 1e-4
    assert m.state_dict().keys() == plain.state_dict().keys()
    assert all(p.requires_grad for p in m.parameters())
    assert not any(isinstance(x, LoraLinear) for x in m.modules())
    with pytest.raises(ValueError, match="no LoRA"):
        merge_lora(m)
    assert (m(ids()) - before).abs().max() < 1e-4


@torch.no_grad()
def test_a_bias_survives_merging():
    m = nn.Sequential()
    m.add_module("q_proj", nn.Linear(6, 10))
    lora = add_lora(m, 2, 4, ["q_proj"]).q_proj
    nn.init.normal_(lora.lora_B.weight)
    x = torch.randn(3, 6)
    before = m(x)
    assert torch.allclose(merge_lora(m)(x), before, atol=1e-5)


def test_removed_is_the_base_bit_for_bit():
    before, m = snapshot(model()), remove_lora(adapted())
    assert same(before, m)


@torch.no_grad()
def test_files_go_to_peft_and_come_back(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    ours, c = adapted(), CONFIG
    save_adapter(ours, tmp_path / "ours")
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads,
        intermediate_size=c.hidden_dim, max_position_embeddings=c.max_seq_len,
        rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta, tie_word_embeddings=False))
    base.load_state_dict(model().state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
        assert (theirs(ids()).logits - ours(ids())).abs().max() < 1e-4
        theirs.save_pretrained(tmp_path / "theirs")
        back = load_adapter(model(), tmp_path / "theirs")
        assert torch.equal(back(ids()), ours(ids()))
        merged = theirs.merge_and_unload()
    assert (merged(ids()).logits - merge_lora(ours)(ids())).abs().max() < 1e-4


@torch.no_grad()
def test_adapters_take_turns_on_one_base(tmp_path):
    small, large = adapted(2, 8, ["q_proj", "v_proj"]), adapted(8, 4)
    save_adapter(small, tmp_path / "small")
    save_adapter(large, tmp_path / "large")
    m = model()
    for folder, expected in (("small", small), ("large", large), ("small", small)):
        assert torch.equal(load_adapter(m, tmp_path / folder)(ids()), expected(ids()))
    assert torch.equal(remove_lora(m)(ids()), model()(ids()))


@pytest.mark.parametrize("change, message", [
    ({"use_rslora": True}, "use_rslora"),
    ({"use_dora": True}, "use_dora"),
    ({"bias": "all"}, "bias"),
    ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"peft_type": "IA3"}, "IA3"),
    ({"r": 0}, "r must be a whole number from 1"),
    ({"r": 5}, r"\(5, 32\) in the model, \(4, 32\)"),
    ({"target_modules": ["wq"]}, "target_modules has .wq., and no linear layer"),
    ({"target_modules": ["q_proj"]}, "missing in the model"),
])
def test_files_that_do_not_fit_change_nothing(tmp_path, change, message):
    save_adapter(adapted(), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for m in (model(), adapted(8, 4)):
        before = snapshot(m)
        with pytest.raises(ValueError, match=message):
            load_adapter(m, tmp_path)
        assert same(before, m)


def test_file_size_is_predicted(tmp_path):
    shapes = lora_shapes(model(), 4)
    save_adapter(adapted(), tmp_path)
    data = (tmp_path / "adapter_model.safetensors").read_bytes()
    tensors = 4 * sum(a * b for a, b in shapes.values())
    assert len(data) == 8 + int.from_bytes(data[:8], "little") + tensors
    state = lora_state_dict(adapted())
    assert shapes == {n: tuple(p.shape) for n, p in state.items()} == lora_shapes(adapted(), 4)


def batches():
    documents = torch.randint(0, 300, (16, 20), generator=torch.Generator().manual_seed(2)).tolist()
    return Rows(documents, batch_size=4)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("four_bit", [False, True])
def test_training_moves_the_adapter_only(precision, four_bit):
    m = to_nf4(model()) if four_bit else model()
    m = add_lora(m, 4, 8)
    before, buffers = snapshot(m), {n: b.clone() for n, b in m.named_buffers()}
    config = TrainConfig(steps=60, lr=1e-2, warmup=1, precision=precision, bar=False)
    losses = [entry["loss"] for entry in train(m, batches(), config)]
    # 4 batches are an epoch, so that both means are over the same 16 documents
    assert sum(losses[-4:]) / 4 < sum(losses[:4]) / 4 - 0.05
    for n, (p, trainable) in before.items():
        assert torch.equal(p, m.get_parameter(n)) != trainable, n
    assert all(torch.equal(b, m.get_buffer(n)) for n, b in buffers.items())


@pytest.mark.parametrize("four_bit", [False, True])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path, four_bit):
    def fresh():
        torch.manual_seed(3)
        return add_lora(to_nf4(model()) if four_bit else model(), 4, 8)

    class Cut(Rows):
        def __getitem__(self, i):
            if i == 13:
                raise OSError("gone")
            return super().__getitem__(i)

    c = TrainConfig(steps=20, lr=1e-2, warmup=2, precision="float32", bar=False)
    saving = replace(c, checkpoint=str(tmp_path), checkpoint_every=5)
    with pytest.raises(OSError):
        train(fresh(), Cut(batches().documents, 4), saving)
    resumed, whole = fresh(), fresh()
    train(resumed, batches(), saving)
    train(whole, batches(), c)
    assert same(snapshot(whole), resumed)
