"""Generation: bad input, kinds of heads and dtypes, batches and streaming, beyond chapter 08."""
import copy
import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from minillm.generate import (KVCache, distribution, generate, make_caches, pad_left, penalize,
                              pieces, seen_tokens, stream)
from minillm.model import Llama, LlamaConfig
from minillm.speculative import speculate
from minillm.tokenizer import Tokenizer


def build(g=2, seed=0, std=0.3, **shape):
    torch.manual_seed(seed)
    usual = dict(vocab_size=300, dim=32, n_layers=2, n_heads=4, n_kv_heads=g, hidden_dim=48,
                 max_seq_len=64)
    model = Llama(LlamaConfig(**usual | shape))
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=std)
    return model


MODEL = build()
IDS = torch.randint(300, (3, 8), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def uncached(model, ids, n):
    for _ in range(n):
        ids = torch.cat((ids, model(ids)[:, -1].argmax(-1, keepdim=True)), dim=1)
    return ids


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_cached_equals_uncached(heads):
    model = build(heads)
    assert torch.equal(generate(model, IDS, 40, temperature=0), uncached(model, IDS, 40))
    with torch.no_grad():
        full = model(IDS)
        for chunks in ([8], [1] * 8, [3, 3, 2], [5, 1, 2]):
            caches, parts = make_caches(model, 3, 8), []
            for part in IDS.split(chunks, dim=1):
                parts.append(model(part, caches, caches[0].length))
            torch.testing.assert_close(torch.cat(parts, dim=1), full, atol=1e-4, rtol=0)
    assert caches[0].k.shape == (3, heads, 8, 8)


def test_bfloat16_cache_and_text():
    model = copy.deepcopy(MODEL).bfloat16()
    caches = make_caches(model, 1, 4)
    assert caches[0].k.dtype == torch.bfloat16
    out = generate(model, IDS, 20, temperature=0)
    assert out.shape == (3, 28) and torch.equal(out[:, :8], IDS)
    with torch.no_grad():
        first = model(IDS[:1], caches[:0] or make_caches(model, 1, 28))[:, -1]
    assert first.argmax() == out[0, 8]


def test_a_row_does_not_depend_on_its_batch():
    rows = [row[:n] for row, n in zip(IDS.tolist(), (8, 3, 1))]
    ids, padding = pad_left(rows, 299)
    assert ids[1].tolist() == [299] * 5 + rows[1] and padding.tolist() == [0, 5, 7]
    padded_with_7 = torch.where(ids == 299, 7, ids)
    for settings in ({}, {"repetition_penalty": 1.5}):
        greedy = partial(generate, MODEL, max_new_tokens=30, temperature=0, **settings)
        together, other = greedy(ids, padding=padding), greedy(padded_with_7, padding=padding)
        for i, row in enumerate(rows):
            alone = greedy(torch.tensor([row]))[0, len(row):]
            assert torch.equal(together[i, 8:], alone) and torch.equal(other[i, 8:], alone)


def test_stop_fills_the_row_and_ends_the_batch():
    free = generate(MODEL, IDS, 30, temperature=0)
    stop = free[0, 12].item()
    out = generate(MODEL, IDS, 30, temperature=0, stop=stop)
    ends = []
    for row, wanted in zip(out, free):
        new = wanted[8:].tolist()
        n = 8 + new.index(stop) + 1 if stop in new else len(wanted)
        ends.append(n)
        assert torch.equal(row[:n], wanted[:n][:len(row)]) and (row[n:] == stop).all()
    assert out.shape[1] == max(ends)
    one = generate(MODEL, IDS[:1], 30, temperature=0, stop=stop)
    assert one[0, -1] == stop and (one[0, 8:-1] != stop).all()


class Recorder:
    """No module: only what generate asks of a model, whose calls it writes down."""

    def __init__(self):
        self.config, self.model, self.calls = MODEL.config, MODEL.model, []

    def __call__(self, ids, caches, start):
        assert not torch.is_grad_enabled() and len(caches) == 2
        self.calls.append((ids.shape[1], start))
        return MODEL(ids, caches, start)


def test_a_model_is_asked_for_nothing_but_its_call():
    recorder = Recorder()
    out = generate(recorder, IDS, 4, temperature=0)
    assert torch.equal(out, uncached(MODEL, IDS, 4))
    assert recorder.calls == [(8, 0), (1, 8), (1, 9), (1, 10)]
    target, draft = Recorder(), Recorder()
    speculate(target, draft, IDS, 6, k=2, temperature=0)           # the two agree: 3 tokens a round
    assert target.calls[:2] == [(10, 0), (3, 10)]
    assert draft.calls[:4] == [(8, 0), (1, 8), (2, 9), (1, 11)]


def test_a_seed_reproduces_and_another_differs():
    a, b, c = (generate(MODEL, IDS, 20, seed=s) for s in (1, 1, 2))
    torch.manual_seed(5)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(a, generate(MODEL, IDS, 20, seed=1))


def test_nothing_is_left_of_generating():
    model = build()
    before = {n: p.clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    out = generate(model, IDS, 5)
    assert model.training
    for name, p in model.named_parameters():
        assert p.requires_grad and p.grad is None and torch.equal(p, before[name])
    assert torch.equal(state, torch.get_rng_state()) and not out.is_inference()
    model(out).sum().backward()


@pytest.mark.parametrize("settings, expected", [
    ({"temperature": -0.1}, "temperature .*got -0.1"),
    ({"temperature": float("nan")}, "got nan"),
    ({"temperature": 1e-39}, "got 1e-39"),
    ({"temperature": float("inf")}, "got inf"),
    ({"top_k": 0}, "top_k .*got 0"),
    ({"top_p": 0}, "top_p .*got 0"),
    ({"top_p": 1.01}, "got 1.01"),
    ({"top_p": -1}, "got -1"),
    ({"min_p": -0.5}, "min_p .*got -0.5"),
    ({"min_p": 2}, "got 2"),
    ({"repetition_penalty": 0}, "repetition_penalty .*got 0"),
    ({"max_new_tokens": -1}, "max_new_tokens .*got -1"),
    ({"max_new_tokens": 57}, "8 tokens and 57 new .*max_seq_len=64"),
    ({"ids": IDS.repeat(1, 9)}, "72 tokens .*max_seq_len=64"),
    ({"ids": IDS[:, :0]}, "prompt is empty"),
    ({"ids": IDS[:0]}, "prompt is empty"),
    ({"ids": IDS[0]}, r"\(batch, time\)"),
    ({"padding": torch.tensor([0, 8, 0])}, "0 to 7"),
    ({"padding": torch.tensor([0, -1, 0])}, "0 to 7"),
    ({"padding": torch.tensor([0, 1])}, "3 numbers"),
])
def test_bad_input_is_refused_before_any_work(settings, expected, monkeypatch):
    monkeypatch.setattr(Llama, "forward", lambda *a: pytest.fail("the model was run"))
    usual = {"model": MODEL, "ids": IDS, "max_new_tokens": 4}
    with pytest.raises(ValueError, match=expected):
        generate(**usual | settings)
    if not {"padding", "ids"} & set(settings):
        with pytest.raises(ValueError, match=expected):
            stream(**usual | {"tokenizer": None, "ids": IDS[:1]} | settings)
    if {"temperature", "max_new_tokens", "ids"} & set(settings):
        with pytest.raises(ValueError, match=expected):
            speculate(**usual | {"draft": MODEL} | settings)


@pytest.mark.parametrize("settings, expected", [
    ({"temperature": None}, "temperature must be a number: got None"),
    ({"temperature": "0.7"}, "temperature must be a number: got '0.7'"),
    ({"top_k": 5.0}, "top_k must be an int: got 5.0"),
    ({"top_p": "0.9"}, "top_p must be a number: got '0.9'"),
    ({"min_p": [0.1]}, "min_p must be a number"),
    ({"repetition_penalty": None}, "repetition_penalty must be a number: got None"),
    ({"max_new_tokens": None}, "max_new_tokens must be an int: got None"),
    ({"max_new_tokens": 4.0}, "max_new_tokens must be an int: got 4.0"),
    ({"seed": None}, "seed must be an int: got None"),
    ({"seed": 0.5}, "seed must be an int: got 0.5")])
def test_settings_of_another_type_are_named(settings, expected):
    with pytest.raises(TypeError, match=expected):
        generate(MODEL, **{"ids": IDS, "max_new_tokens": 4} | settings)
    with pytest.raises(TypeError, match=expected):
        list(stream(MODEL, None, **{"ids": IDS[:1], "max_new_tokens": 4} | settings))


def test_settings_may_be_numbers_of_numpy():
    settings = {"temperature": np.float32(0.5), "top_k": np.int64(9), "seed": np.int64(3)}
    plain = {"temperature": 0.5, "top_k": 9, "seed": 3}
    assert torch.equal(generate(MODEL, IDS, np.int64(4), **settings),
                       generate(MODEL, IDS, 4, **plain))


def test_other_bad_input():
    with pytest.raises(TypeError, match="int64"):
        generate(MODEL, IDS.float(), 4)
    for wrong in [[1, 2]], "Hello":
        with pytest.raises(TypeError, match=f"token ids: got {type(wrong).__name__}"):
            generate(MODEL, wrong, 4)
    for padding in [0, 2, 5], np.array([0, 2, 5]), 3:
        with pytest.raises(TypeError, match=r"padding must be a tensor \(b,\), as pad_left"):
            generate(MODEL, IDS, 4, padding=padding)
    for stop in "<|endoftext|>", ["<|endoftext|>"], 1.5, [None], object():
        with pytest.raises(TypeError, match="stop must be the id of a token, or several"):
            generate(MODEL, IDS, 4, stop=stop)
    with pytest.raises(ValueError, match=r"\[2, 0\] tokens"):
        pad_left([[1, 2], []], 0)
    with pytest.raises(ValueError, match=r"\[\] tokens"):
        pad_left([], 0)
    with pytest.raises(ValueError, match="one text: got 3 rows"):
        stream(MODEL, None, IDS, 4)
    with pytest.raises(ValueError, match="k=0"):
        speculate(MODEL, MODEL, IDS, 4, k=0)
    with pytest.raises(ValueError, match="50 and 300 tokens"):
        speculate(MODEL, build(vocab_size=50), IDS % 50, 4)
    with pytest.raises(ValueError, match="room for 4 tokens and holds 3: 2 more"):
        cache = KVCache(1, 1, 4, 2)
        cache.append(*torch.zeros(2, 1, 1, 3, 2))
        cache.append(*torch.zeros(2, 1, 1, 2, 2))
    with pytest.raises(ValueError, match="holds 3 tokens: it cannot keep 4"):
        cache.truncate(4)
    cache.truncate(0)
    assert cache.append(*torch.ones(2, 1, 1, 2, 2))[0].tolist() == torch.ones(1, 1, 2, 2).tolist()


def test_no_new_tokens_is_the_prompt_and_the_context_can_be_filled():
    assert torch.equal(generate(MODEL, IDS, 0), IDS)
    assert generate(MODEL, IDS, 56).shape == (3, 64) == speculate(MODEL, MODEL, IDS, 56)[0].shape


# ---- samplers

def test_cuts_keep_at_least_one_token_and_leave_the_rest_in_proportion():
    logits = 5 * torch.randn(200, 50)
    p = logits.softmax(-1)
    several = {"top_k": 7, "top_p": 0.5, "min_p": 0.2}
    for settings in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, several):
        q = distribution(logits, **settings)
        assert (q.sum(-1) - 1).abs().max() < 1e-5 and torch.equal(q.argmax(-1), p.argmax(-1))
        kept = q > 0
        wanted = p * kept / (p * kept).sum(-1, keepdim=True)
        torch.testing.assert_close(q, wanted, atol=1e-5, rtol=0)
    assert torch.equal(distribution(logits, temperature=0).argmax(-1), p.argmax(-1))


def test_nucleus_is_the_smallest_set_that_reaches_p():
    p = (3 * torch.randn(300, 40)).softmax(-1)
    kept = distribution(p.log(), top_p=0.8) > 0
    for row, mine in zip(p.tolist(), kept.tolist()):
        total, wanted = 0.0, set()
        for i in sorted(range(40), key=lambda i: -row[i]):
            if total >= 0.8:
                break
            total, wanted = total + row[i], wanted | {i}
        assert {i for i, k in enumerate(mine) if k} == wanted


def test_seen_tokens_leaves_filler_out():
    seen = seen_tokens(torch.tensor([[0, 1, 2], [0, 0, 2]]), 4, torch.tensor([0, 2]))
    assert seen.tolist() == [[True, True, True, False], [False, False, True, False]]
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalize(logits, seen, 2).tolist() == [[1, -4, 2, -2]]


# ---- streaming

TEXT = "the cat sat on the mat. Ünïcode 你好 你好 🙂🙂 naïve café "
TOKENIZER = Tokenizer.train(TEXT * 20, 290)


def random_text(rng):
    kinds = [(32, 126), (0xC0, 0x24F), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (0x300, 0x36F),
             (0, 0xD7FF)]
    return "".join(chr(rng.randint(*rng.choice(kinds))) for _ in range(rng.randint(0, 30)))


def test_streamed_pieces_are_whole_characters():
    rng = random.Random(0)
    for _ in range(300):
        text = random_text(rng)
        parts = list(pieces(TOKENIZER, TOKENIZER.encode(text, disallowed_special=())))
        assert "".join(parts) == text and all(parts)


def test_broken_bytes_stream_as_decode_shows_them():
    rng = random.Random(1)
    for _ in range(1000):
        ids = []
        for _ in range(rng.randint(0, 12)):
            ids.append(rng.choice((rng.randrange(128, 256), rng.randrange(TOKENIZER.n_vocab))))
        assert "".join(pieces(TOKENIZER, ids)) == TOKENIZER.decode(ids)


def test_stream_is_generate_as_text():
    model = build(vocab_size=290)
    prompt = torch.tensor([TOKENIZER.encode("the cat")])
    for settings in ({"temperature": 0}, {"seed": 3}, {"top_p": 0.9, "repetition_penalty": 1.2}):
        new = generate(model, prompt, 30, **settings)[0, prompt.shape[1]:].tolist()
        streamed = partial(stream, model, TOKENIZER, prompt, 30, **settings)
        assert "".join(streamed()) == TOKENIZER.decode(new)
        stop = new[7]
        assert "".join(streamed(stop=stop)) == TOKENIZER.decode(new[:new.index(stop)])


@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite_are_refused(temperature):
    broken = copy.deepcopy(MODEL)
    with torch.no_grad():
        broken.lm_head.weight[3, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        generate(broken, IDS, 3, temperature=temperature)


def test_a_token_that_only_the_model_has_is_named():
    """Published models are padded: they have more rows than their tokenizer has tokens."""
    padded = copy.deepcopy(MODEL)
    with torch.no_grad():
        padded.lm_head.weight.zero_()
        padded.lm_head.weight[299] = padded(IDS[:1], head=False)[0, -1]
    assert TOKENIZER.n_vocab == 290 and padded.config.vocab_size == 300
    assert generate(padded, IDS[:1], 1, temperature=0)[0, -1] == 299
    with pytest.raises(ValueError, match="wrote the id 299, and the tokenizer has only 290 tokens"):
        list(stream(padded, TOKENIZER, IDS[:1], 1, temperature=0))


@pytest.mark.parametrize("kind", [np.int64, torch.tensor, lambda i: [np.int64(i)],
                                  lambda i: torch.tensor([i, i]), lambda i: {i}])
def test_an_id_to_stop_at_may_be_a_number_of_any_kind(kind):
    new = generate(MODEL, IDS[:1], 9, temperature=0)[0, 8:].tolist()
    wanted = generate(MODEL, IDS[:1], 9, temperature=0, stop=new[3])
    assert torch.equal(generate(MODEL, IDS[:1], 9, temperature=0, stop=kind(new[3])), wanted)


def test_several_tokens_may_end_a_text():
    free = generate(MODEL, IDS[:1], 30, temperature=0)[0, IDS.shape[1]:].tolist()
    first = free.index(free[4])
    for stop in [free[4], 10**6], (free[4],), free[4]:
        out = generate(MODEL, IDS[:1], 30, temperature=0, stop=stop)[0, IDS.shape[1]:]
        assert out.tolist() == free[:first + 1]


def test_a_model_with_more_rows_than_the_tokenizer_has_tokens():
    tokenizer = Tokenizer.train("the cat and the hat " * 20, 260)
    with pytest.raises(ValueError, match="the id 260, and the tokenizer has only 260 tokens"):
        "".join(pieces(tokenizer, [100, 260]))
