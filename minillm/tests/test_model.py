"""The model: more shapes against transformers, loading in every way, and wrong input."""
import copy
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minillm.model import (Llama, LlamaConfig, count_by_part, count_parameters, flops_per_token,
                           memory_bytes)

SMALL = LlamaConfig(vocab_size=97, dim=48, n_layers=2, n_heads=6, n_kv_heads=2, hidden_dim=60,
                    max_seq_len=512)
TIED = replace(SMALL, tie_embeddings=True)
IDS = torch.arange(200).view(2, 100) * 31 % SMALL.vocab_size


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def strong(config):
    """A model whose weights are large enough for attention to look at something."""
    model = Llama(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3) if p.ndim == 2 else p.uniform_(0.5, 2)
    return model


def same(a, b, atol=1e-4):
    return torch.allclose(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("changes", [
    {}, {"n_kv_heads": 6}, {"n_kv_heads": 1, "tie_embeddings": True},
    {"n_kv_heads": 3, "rope_theta": 5e5}, {"norm_eps": 1e-2, "vocab_size": 8},
    {"dim": 12, "hidden_dim": 1}, {"n_layers": 1}])
def test_logits_are_those_of_transformers(changes):
    from transformers import LlamaConfig as Config, LlamaForCausalLM

    c = replace(SMALL, **changes)
    hf = LlamaForCausalLM(Config(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.hidden_dim,
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, max_position_embeddings=c.max_seq_len,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tie_embeddings,
        initializer_range=0.2)).eval()
    ours = Llama(c)
    ours.load_state_dict(hf.state_dict())
    our_shapes, their_shapes = ({name: z.shape for name, z in model.state_dict().items()}
                                for model in (ours, hf))
    assert our_shapes == their_shapes
    ids = torch.randint(0, c.vocab_size, (2, 512))
    with torch.no_grad():
        logits = hf(ids).logits
        assert same(ours(ids), logits)
        assert ours(ids[:, :1]).shape == (2, 1, c.vocab_size)
        assert same(ours(ids.int()), logits)
    hf.load_state_dict(ours.state_dict())    # and the way back


def test_no_token_sees_a_later_one_or_another_row():
    model, changed = strong(SMALL), IDS.clone()
    changed[0, 60] += 1
    with torch.no_grad():
        moved = (model(changed) - model(IDS)).abs().amax(-1)
    assert moved[0, :60].max() == 0 and moved[1].max() == 0 and moved[0, 60:].min() > 0


def test_pieces_with_a_cache_are_the_whole():
    class Cache:
        kv = ()

        def append(self, *kv):
            self.kv = [torch.cat(pair, dim=2) for pair in zip(self.kv, kv)] if self.kv else kv
            return self.kv

    model, caches = strong(SMALL), [Cache() for _ in range(SMALL.n_layers)]
    with torch.no_grad():
        cuts = [0, 1, 2, 40, 41, 100]
        pieces = [model(IDS[:, a:b], caches, start=a) for a, b in zip(cuts, cuts[1:])]
        assert same(torch.cat(pieces, dim=1), model(IDS), 1e-3)


# ---- loading, copying, moving

@pytest.mark.parametrize("config", [SMALL, TIED])
@pytest.mark.parametrize("way", ["assign", "to_empty"])
def test_built_without_memory_and_filled_later(config, way):
    source = strong(config)
    with torch.device("meta"):
        model = Llama(config)
    assert all(p.is_meta for p in model.parameters())
    if way == "to_empty":
        model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict(), assign=way == "assign")
    assert torch.equal(model(IDS), source(IDS))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == config.tie_embeddings
    assert len(list(model.parameters())) == len(list(source.parameters()))


def test_tied_weights_load_from_files_that_hold_them_once():
    source, model = strong(TIED), Llama(TIED)
    state = {name: z for name, z in source.state_dict().items() if name != "lm_head.weight"}
    model.load_state_dict(state)
    assert torch.equal(model(IDS), source(IDS)) and "lm_head.weight" not in state
    with pytest.raises(RuntimeError, match="lm_head.weight"):
        Llama(SMALL).load_state_dict(state)


def test_tied_gradient_is_that_of_both_ends():
    tied, loose = strong(TIED), Llama(SMALL)
    loose.load_state_dict(tied.state_dict())
    for model in (tied, loose):
        F.cross_entropy(model(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten()).backward()
    both = loose.lm_head.weight.grad + loose.model.embed_tokens.weight.grad
    assert same(tied.lm_head.weight.grad, both, 1e-5)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("config", [SMALL, TIED])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_copies(config, duplicate):
    model = strong(config)
    twin = duplicate(model)
    assert torch.equal(twin(IDS), model(IDS))
    assert (twin.lm_head.weight is twin.model.embed_tokens.weight) == config.tie_embeddings
    with torch.no_grad():
        twin.model.norm.weight.zero_()
    assert model(IDS).abs().max() > 0


def test_angles_stay_in_float32():
    """Rounded to bfloat16, the angles of far positions would be wrong."""
    model = strong(SMALL)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half(IDS).dtype == torch.bfloat16
    for back in (half.to(torch.float32), copy.deepcopy(model).half().float()):
        for a, b in zip(back.rope, model.rope):
            assert torch.equal(a, b) and a.dtype == torch.float32


def test_angles_follow_the_ids_to_another_device():
    model = Llama(SMALL).to("meta")
    assert model(IDS.to("meta")).shape == (2, 100, 97) and model.rope[0].is_meta


def test_the_seed_decides_the_start():
    def start():
        torch.manual_seed(7)
        return Llama(SMALL).state_dict()
    assert all(torch.equal(a, b) for a, b in zip(start().values(), start().values()))


# ---- wrong input

@pytest.mark.parametrize("changes, message", [
    ({"vocab_size": 0}, "vocab_size must be at least 1: got 0"),
    ({"n_layers": -1}, "n_layers must be at least 1"),
    ({"n_kv_heads": 0}, "n_kv_heads must be at least 1: got 0"),
    ({"rope_theta": 0.0}, "rope_theta"),
    ({"dim": 50}, "got dim=50, n_heads=6"),
    ({"dim": 18, "n_heads": 6}, "RoPE turns pairs: got dim=18"),
    ({"n_kv_heads": 4}, "got n_heads=6, n_kv_heads=4"), ({"n_kv_heads": 12}, "n_kv_heads=12")])
def test_shapes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


@pytest.mark.parametrize("ids, error, message", [
    (IDS.float(), TypeError, "int64 or int32 token ids: got torch.float32"),
    ([[1, 2]], TypeError, "token ids: got list"), ({"input_ids": IDS}, TypeError, "got dict"),
    (IDS > 3, TypeError, "torch.bool"),
    (IDS[0], ValueError, r"got shape \(100,\)"),
    (IDS[None], ValueError, r"ids\[None\]: got shape \(1, 2, 100\)"),
    (IDS + 1, ValueError, "ids must be 0 to 96: got 1 to 97"),
    (IDS - 1, ValueError, "got -1 to 95"),
    (IDS.repeat(1, 6), ValueError, "600 tokens are more than max_seq_len=512")])
def test_ids_that_are_none(ids, error, message):
    with pytest.raises(error, match=message):
        Llama(SMALL)(ids)


def test_the_last_position_and_the_first_too_many():
    model = Llama(SMALL)
    model(IDS[:, :1], start=511)
    with pytest.raises(ValueError, match="513 tokens"):
        model(IDS[:, :1], start=512)


def test_n_kv_heads_defaults_to_n_heads():
    config = LlamaConfig(n_heads=8, dim=64)
    assert config.n_kv_heads == 8 and config.head_dim == 8


# ---- accounting

@pytest.mark.parametrize("config", [SMALL, TIED, LlamaConfig(),
                                    LlamaConfig(n_layers=1, n_kv_heads=1)])
def test_counts_are_those_of_the_model(config):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = Llama(config)
    counted = sum(p.numel() for p in model.parameters())
    assert count_parameters(config) == counted == sum(count_by_part(config).values())
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(3, 40, dtype=torch.int64)).sum().backward()
    assert counter.get_total_flops() == 120 * flops_per_token(config, 40)


def test_memory():
    n = count_parameters(SMALL)
    assert memory_bytes(SMALL) == {"weights": 4 * n, "gradients": 0, "AdamW": 0, "KV cache": 0}
    assert memory_bytes(SMALL, training=True) == {"weights": 4 * n, "gradients": 4 * n,
                                                  "AdamW": 8 * n, "KV cache": 0}
    half = memory_bytes(SMALL, torch.bfloat16, cached_tokens=10)
    assert half["KV cache"] == 2 * 10 * 2 * 2 * 8 * 2
