"""Adapters: bad calls and states are refused, and change nothing."""
import pytest
import torch

from minillm.lora import (TARGETS, LoraLinear, add_lora, load_lora, lora_state_dict, merge_lora,
                          remove_lora, save_adapter)
from minillm.model import LlamaConfig
from minillm.nf4 import to_nf4
from minillm.tests.test_lora import adapted, model, same, snapshot


BAD = [
    (lambda m: add_lora(m, 0, 8), "rank must be at least 1: got 0"),
    (lambda m: add_lora(m, -3, 8), "got -3"),
    (lambda m: add_lora(m, 4, 0), "alpha must be a positive number: got 0"),
    (lambda m: add_lora(m, 4, float("nan")), "got nan"),
    (lambda m: add_lora(m, 4, 8, ["q_proj", "wq"]), "no layer 'wq'"),
    (lambda m: add_lora(m, 4, 8, ["q_proj", "embed_tokens"]), "embed_tokens is Embedding"),
    (lambda m: add_lora(m, 4, 8, ["norm"]), "norm is RMSNorm"),
    (lambda m: add_lora(m, 4, 8, ["mlp"]), "mlp is SwiGLU"),
    (lambda m: add_lora(m, 4, 8, "q_proj"), "'q_proj'"),
    (lambda m: add_lora(m, 4, 8, []), r"got \[\]"),
    (lambda m: to_nf4(m, ["wq"]), "no layer 'wq'"),
    (merge_lora, "no LoRA"),
    (remove_lora, "no LoRA"),
    (lora_state_dict, "no LoRA"),
    (lambda m: save_adapter(m, "nowhere"), "no LoRA"),
    (lambda m: load_lora(m, lora_state_dict(adapted())), "no LoRA"),
]


@pytest.mark.parametrize("call, message", BAD)
def test_bad_calls_on_a_plain_model_change_nothing(call, message):
    m = model()
    before = snapshot(m)
    with pytest.raises(ValueError, match=message):
        call(m)
    assert same(before, m)


@pytest.mark.parametrize("rank", [2.0, "4", True, None])
def test_a_rank_that_is_no_int(rank):
    m = model()
    before = snapshot(m)
    with pytest.raises(TypeError, match="rank must be an int"):
        add_lora(m, rank, 8)
    assert same(before, m)


@pytest.mark.parametrize("alpha", ["8", None, [8]])
def test_an_alpha_that_is_no_number(alpha):
    with pytest.raises(TypeError, match="alpha must be a number"):
        add_lora(model(), 2, alpha)


@pytest.mark.parametrize("wrap", [lambda m: [m], lambda m: m.state_dict(), lambda m: type(m)])
def test_what_is_no_model(wrap):
    with pytest.raises(TypeError, match="model must be one nn.Module"):
        add_lora(wrap(model()), 2, 8)


def without(state, part):
    return {n: p for n, p in state.items() if part not in n}


BAD_STATES = [
    (lambda s: {n: p[:2] if "lora_A" in n else p for n, p in s.items()},
     r"lora_A.*\(4, 32\).*\(2, 32\)"),
    (lambda s: lora_state_dict(adapted(rank=8)),
     r"\(4, 32\) in the model, \(8, 32\) in the adapter"),
    (lambda s: without(s, "layers.1.mlp.down_proj.lora_B"),
     "down_proj.lora_B.weight is .* in the model, missing in the adapter"),
    (lambda s: s | {"extra": torch.zeros(1)}, "extra is missing in the model"),
    (lambda s: {n.removeprefix("base_model.model."): p for n, p in s.items()},
     "missing in the adapter"),
    (lambda s: {}, "missing in the adapter"),
]


@pytest.mark.parametrize("spoil, message", BAD_STATES)
def test_an_adapter_that_does_not_fit_changes_nothing(spoil, message):
    m = adapted()
    before = snapshot(m)
    state = spoil({n: p + 1 for n, p in lora_state_dict(m).items()})
    with pytest.raises(ValueError, match=message):
        load_lora(m, state)
    assert same(before, m)


def test_twice_is_refused():
    for call in (lambda m: add_lora(m, 4, 8), lambda m: add_lora(m, 4, 8, ["lm_head"]), to_nf4):
        m = adapted()
        before = snapshot(m)
        with pytest.raises(ValueError, match="LoRA already"):
            call(m)
        assert same(before, m)


def test_tied_embeddings_are_refused_and_untied_ones_are_not():
    tied = model(LlamaConfig(vocab_size=300, dim=32, n_layers=1, n_heads=4, hidden_dim=48,
                             tie_embeddings=True))
    for target in ("lm_head", "embed_tokens"):
        with pytest.raises(ValueError, match=f"{target} shares its weight"):
            add_lora(tied, 4, 8, ["q_proj", target])
    assert not any(isinstance(x, LoraLinear) for x in tied.modules())
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    untied = add_lora(model(), 4, 8, [*TARGETS, "lm_head"])
    assert isinstance(untied.lm_head, LoraLinear)
    assert merge_lora(add_lora(tied, 4, 8)).lm_head.weight is tied.model.embed_tokens.weight
