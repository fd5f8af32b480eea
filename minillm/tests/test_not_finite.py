"""NaN and infinity: what would go on with them in silence refuses, and names where they are."""
import math

import pytest
import torch

from minillm import evaluate
from minillm.dpo import Pairs, sample_pairs
from minillm.generate import distribution, generate, stream
from minillm.hub import load_model, save_gguf, save_pretrained
from minillm.lora import add_lora, load_adapter, merge_lora, save_adapter
from minillm.model import Llama, LlamaConfig
from minillm.nf4 import to_nf4
from minillm.quantize import quantize_absmax, quantize_model, save_model
from minillm.reward import draw_comparisons
from minillm.rl import grpo_advantages, sample
from minillm.sft import finetune, replies
from minillm.speculative import speculate
from minillm.tests.server import TOKENIZER
from minillm.train import TrainConfig

ASK = [{"role": "user", "content": "Who?"}]
IDS = torch.tensor([[5, 6, 7]])
NAN, INF = math.nan, math.inf
UP, QUERY = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"


def llama(value=0.0):
    """A small model, one number of which is `value`."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=TOKENIZER.n_vocab, dim=64, n_layers=1, n_heads=2,
                         hidden_dim=64, max_seq_len=64)
    model = Llama(config)
    model.get_parameter(f"{UP}.weight").data[0, 0] = value
    return model


def adapted(value):
    model = add_lora(llama(), 2, 4)
    model.get_parameter(f"{QUERY}.lora_B.weight").data[0, 0] = value
    return model


def tune(model):
    dialogues = [[*ASK, {"role": "assistant", "content": "Ida."}]] * 2
    finetune(model, dialogues, TOKENIZER, TrainConfig(steps=1, warmup=0, bar=False), 2)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("use", [
    lambda m: generate(m, IDS, 4), lambda m: generate(m, IDS, 4, temperature=0),
    lambda m: list(stream(m, TOKENIZER, IDS, 4)), lambda m: replies(m, TOKENIZER, [ASK]),
    lambda m: speculate(m, llama(), IDS, 4), lambda m: speculate(llama(), m, IDS, 4, temperature=0),
    lambda m: sample(m, TOKENIZER, [ASK], 2), lambda m: Pairs([(ASK, "a", "b")], TOKENIZER, m, 1),
    lambda m: evaluate.choice_logprobs(m, TOKENIZER, [(ASK, ["a", "b"])]),
    lambda m: evaluate.token_logprobs(m, [([5, 6, 7], [False, True, True])])])
def test_a_model_that_gives_no_numbers(use, value):
    with pytest.raises(ValueError, match="not finite: has its training diverged"):
        use(llama(value))


def test_training_stops_before_it_changes_a_weight():
    with pytest.raises(FloatingPointError, match="loss nan.* step 0"):
        tune(llama(NAN))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("use", [
    lambda m, path: save_pretrained(m, None, path), lambda m, path: save_model(m, path / "m"),
    lambda m, path: save_gguf(m, TOKENIZER, path / "m.gguf"),
    lambda m, path: quantize_model(m), lambda m, path: to_nf4(m)])
def test_a_weight_is_named_before_anything_is_written(use, value, tmp_path):
    with pytest.raises(ValueError, match="up_proj|ffn_up"):
        use(llama(value), tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_weight_in_a_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("minillm.hub.check_finite", lambda tensors, where: None)
    save_pretrained(llama(NAN), None, tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=f"tensor {UP}.weight holds numbers that are not finite"):
        load_model(tmp_path)


def test_a_weight_that_is_too_large_for_its_new_type_is_named(tmp_path):
    save_pretrained(llama(1e6), None, tmp_path)
    assert load_model(tmp_path, torch.bfloat16)
    with pytest.raises(ValueError, match=f"tensor {UP}.weight .* not finite .in float16"):
        load_model(tmp_path, torch.float16)


@pytest.mark.parametrize("value", [NAN, INF])
def test_an_adapter_is_named_and_the_model_below_it_stays(value, tmp_path, monkeypatch):
    model = adapted(value)
    before = {name: p.clone() for name, p in model.named_parameters() if "lora" not in name}
    with pytest.raises(ValueError, match=f"tensor {QUERY} .*not finite"):
        merge_lora(model)
    assert all(torch.equal(model.get_parameter(name), p) for name, p in before.items())
    with pytest.raises(ValueError, match=f"{QUERY}.lora_B"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr("minillm.lora.check_finite", lambda tensors, where: None)
    save_adapter(model, tmp_path / "a")
    with pytest.raises(ValueError, match=f"adapter_model.safetensors: tensor .*{QUERY}.lora_B"):
        load_adapter(llama(), tmp_path / "a")


@pytest.mark.parametrize("use, message", [
    (lambda x: distribution(torch.tensor([0.0, x])), "logits must be numbers"),
    (lambda x: distribution(torch.tensor([0.0, x]), 0), "logits must be numbers"),
    (lambda x: quantize_absmax(torch.tensor([[0.0, x]])), "must be finite: got nan at .0, 1."),
    (lambda x: grpo_advantages(torch.tensor([[0.0, x]])), "reward of answer 1 to prompt 0 is nan"),
    (lambda x: draw_comparisons([["a", "b"]], torch.tensor([[0.0, x]]), 1.0), "one of them is nan"),
    (lambda x: sample_pairs(llama(), TOKENIZER, [(ASK, "it")], lambda about, answer: x),
     "the judge gives nan for the answer"),
    (lambda x: evaluate.pick([0.0, x], ["a", "b"]), "nan cannot be compared"),
    (lambda x: evaluate.auc([0.0, x], [1.0]), "nan cannot be compared"),
    (lambda x: evaluate.auc([0.0], [1.0, x]), "nan cannot be compared")])
def test_a_number_that_is_none(use, message):
    with pytest.raises(ValueError, match=message):
        use(NAN)
