"""The fused step of decoding: taken only by a model that is known, and equal to it there."""
from functools import partial

import pytest
import torch
from torch import nn

from minillm.fast_decode import FastDecoder, fused, is_plain
from minillm.generate import generate, make_caches, steps, stream
from minillm.layers import RMSNorm
from minillm.model import Llama
from minillm.quantize import Int4Linear, Int8Linear, quantize_model
from minillm.speculative import speculate
from minillm.tests.test_generate import IDS, MODEL, TOKENIZER, build, uncached


class Odd(nn.Linear):
    pass


def changed_models():
    """{name: a model that is not the plain one}."""
    names = "subclass", "bias", "patched", "hook", "pre-hook", "hook of the model", "other class"
    models = {name: build() for name in names}
    models["subclass"].model.layers[1].mlp.up_proj = Odd(32, 48, bias=False)
    models["bias"].model.layers[1].mlp.up_proj = nn.Linear(32, 48)
    models["patched"].model.layers[0].self_attn.forward = lambda x, *rest: x
    models["hook"].model.layers[0].register_forward_hook(lambda *args: None)
    models["pre-hook"].lm_head.register_forward_pre_hook(lambda *args: None)
    models["hook of the model"].register_forward_hook(lambda *args: None)
    models["other class"].__class__ = type("Mine", (Llama,), {})
    return models


def test_only_a_model_of_known_parts_is_plain():
    assert is_plain(build())
    assert not is_plain(build().bfloat16()) and not is_plain(build().double())
    for name, model in changed_models().items():
        assert not is_plain(model), name
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_plain(build())
    assert not is_plain(build().model.layers[0])
    assert not is_plain(FastDecoder(build()))


@pytest.mark.parametrize("name", changed_models())
def test_a_model_that_is_not_plain_does_all_the_work_itself(name):
    model = changed_models()[name]
    decoder = FastDecoder(model)
    wanted = generate(model, IDS, 30, temperature=0)
    assert torch.equal(generate(decoder, IDS, 30, temperature=0), wanted)
    assert decoder.step is None


def test_a_changed_layer_is_heeded():
    model = build()
    layer = model.model.layers[1].mlp.up_proj = Odd(32, 48, bias=False)
    nn.init.normal_(layer.weight, std=1)
    out = generate(FastDecoder(model), IDS, 30, temperature=0)
    assert torch.equal(out, uncached(model, IDS, 30))
    hooked = build()
    hooked.model.layers[0].mlp.register_forward_hook(lambda module, args, out: 0 * out)
    out = generate(FastDecoder(hooked), IDS, 30, temperature=0)
    assert torch.equal(out, uncached(hooked, IDS, 30))
    assert not torch.equal(out, generate(FastDecoder(build()), IDS, 30, temperature=0))


def by_parts(model, ids, lengths, padding=None):
    """The logits of a model that reads ids in parts of these lengths, and its caches."""
    caches, parts = make_caches(model, *ids.shape, padding), []
    for part in ids.split(lengths, dim=1):
        parts.append(model(part, caches, caches[0].length))
    return torch.cat(parts, dim=1), caches


SHAPES = [dict(g=1), dict(g=2), dict(g=4), dict(tie_embeddings=True), dict(hidden_dim=2050),
          dict(hidden_dim=2052), dict(rope_theta=500.0, norm_eps=1e-2),
          dict(dim=64, n_heads=2, n_layers=3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 4, 5])
@pytest.mark.parametrize("prompt", [6, 1])
def test_the_fused_step_equals_the_model(shape, rows, prompt):
    model = build(**shape)
    for m in model.modules():
        if isinstance(m, RMSNorm):
            nn.init.uniform_(m.weight, 0.5, 1.5)
    ids, lengths = torch.randint(300, (rows, prompt + 6)), [prompt] + [1] * 6
    decoder = FastDecoder(model)
    for padding in (None, torch.arange(rows).clamp(max=prompt - 1)):
        with torch.no_grad():
            wanted, plain = by_parts(model, ids, lengths, padding)
        out, filled = by_parts(decoder, ids, lengths, padding)
        assert decoder.step is not None and not out.requires_grad
        # two orders of the same sums, in float32
        torch.testing.assert_close(out, wanted, atol=1e-4, rtol=0)
        for a, b in zip(plain, filled):
            torch.testing.assert_close(a.k, b.k, atol=1e-4, rtol=0)
            torch.testing.assert_close(a.v, b.v, atol=1e-4, rtol=0)


LAYERS = "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"
TARGETS = [LAYERS, LAYERS[:-1], ("k_proj", "gate_proj"), ("q_proj", "k_proj", "v_proj")]
INT8 = [dict(), dict(digits=1), dict(digits=2, dim=None), dict(digits=1, outliers=1.0)]
# An input on the border between two digits may be rounded to either: one step of the last digit.
ONE_STEP = {1: 0.05, 2: 1e-3, 3: 1e-4}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("settings", INT8)
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_the_fused_step_of_a_model_in_int8_equals_the_model(targets, settings, rows):
    model = quantize_model(build(g=2), partial(Int8Linear, **settings), targets)
    decoder, ids = FastDecoder(model), torch.randint(300, (rows, 4))
    with torch.no_grad():
        wanted, _ = by_parts(model, ids, [2, 1, 1])
    out, _ = by_parts(decoder, ids, [2, 1, 1])
    assert decoder.step is not None
    torch.testing.assert_close(out, wanted, atol=ONE_STEP[settings.get("digits", 3)], rtol=0)


def test_layers_in_int8_of_different_settings_are_not_fused_and_those_in_int4_not_known():
    model = quantize_model(build(), partial(Int8Linear, digits=1), ("q_proj", "up_proj"))
    quantize_model(model, partial(Int8Linear, dim=None), ("k_proj", "v_proj", "gate_proj"))
    assert is_plain(model)
    out = generate(FastDecoder(model), IDS, 30, temperature=0)
    assert torch.equal(out, uncached(model, IDS, 30))
    assert not is_plain(quantize_model(build(), partial(Int4Linear, group=8), ("v_proj",)))


SIZES = [((8, 16),), ((8, 16), (4, 16)), ((7, 16),), ((300, 400), (100, 400)), ((401, 400),),
         ((700, 1024), (401, 1024))]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("b", [1, 2, 4, 5, 8, 9, 16, 32])
def test_fused_layers_are_one_matrix_product(sizes, b):
    layers, x = [nn.Linear(i, o, bias=False) for o, i in sizes], torch.randn(b, sizes[0][1])
    with torch.no_grad():
        out, wanted = fused(*layers)(x), torch.cat([layer(x) for layer in layers], dim=1)
    assert out.shape == (b, sum(o for o, _ in sizes))
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=0)


def test_a_decoder_passes_for_its_model():
    decoder = FastDecoder(MODEL)
    assert decoder.config is MODEL.config
    assert [id(p) for p in decoder.parameters()] == [id(p) for p in MODEL.parameters()]
    with torch.no_grad():
        assert torch.equal(decoder(IDS), MODEL(IDS))            # no caches: nothing to decode
    for settings in (dict(temperature=0), dict(seed=3), dict(seed=4, top_p=0.9)):
        wanted = generate(MODEL, IDS, 30, **settings)
        assert torch.equal(generate(decoder, IDS, 30, **settings), wanted)
    ids, _ = speculate(decoder, FastDecoder(build(seed=1)), IDS, 30, temperature=0)
    assert torch.equal(ids, uncached(MODEL, IDS, 30))
    speaker, prompt = build(vocab_size=TOKENIZER.n_vocab), IDS[:1] % 256
    talkers = FastDecoder(speaker), speaker
    texts = [list(stream(m, TOKENIZER, prompt, 30, seed=1)) for m in talkers]
    assert texts[0] == texts[1] and texts[0]


def test_two_texts_at_once_do_not_disturb_each_other():
    decoder = FastDecoder(MODEL)
    first, second = (steps(decoder, ids, 20, temperature=0) for ids in (IDS[:1], IDS[1:2]))
    mixed = torch.stack([torch.cat(pair) for pair in zip(first, second)], dim=1)
    assert torch.equal(mixed, uncached(MODEL, IDS[:2], 20)[:, 8:])


def test_an_unknown_id_is_refused_as_by_the_model():
    for prompt in (IDS[:1], IDS[:1, :1]):
        with pytest.raises(ValueError, match="ids must be 0 to 299"):
            generate(FastDecoder(MODEL), prompt + 300, 2)


def test_the_model_is_left_as_it_was_also_by_a_stream_that_is_left():
    model = build(hidden_dim=2048)
    before = {id(m): dict(vars(m)) for m in model.modules()}
    running = steps(FastDecoder(model), IDS[:1], 10, temperature=0)
    next(running), next(running)
    assert torch.is_grad_enabled()
    running.close()
    assert all(vars(m) == before[id(m)] for m in model.modules())


def test_weights_that_change_between_two_texts_are_seen():
    model = build()
    decoder = FastDecoder(model)
    generate(decoder, IDS, 20, temperature=0)
    for p in model.parameters():
        with torch.no_grad():
            p.neg_()                                            # in place, as an optimizer does
        out = generate(decoder, IDS, 20, temperature=0)
        assert torch.equal(out, uncached(model, IDS, 20))
    model.load_state_dict(build(seed=5).state_dict(), assign=True)
    assert torch.equal(generate(decoder, IDS, 20, temperature=0), uncached(model, IDS, 20))
    model.model.layers[0].register_forward_hook(lambda module, args, out: -out)
    assert torch.equal(generate(decoder, IDS, 20, temperature=0), uncached(model, IDS, 20))
