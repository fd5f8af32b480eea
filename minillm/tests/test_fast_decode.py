"""The lean step of generation: taken only by a model that is known, and equal there."""
from functools import partial

import pytest
import torch
from torch import nn

from minillm.generate import generate, make_caches, steps
from minillm.fast_decode import is_plain, runner, side_by_side
from minillm.layers import RMSNorm
from minillm.model import Llama
from minillm.quantize import Int4Linear, Int8Linear, quantize_model
from minillm.tests.test_generate import IDS, build, uncached


class Odd(nn.Linear):
    pass


def test_only_a_model_of_known_parts_takes_the_lean_step():
    assert is_plain(build())
    assert not is_plain(build().bfloat16()) and not is_plain(build().double())
    changes = {"subclass": lambda m: setattr(m.model.layers[1].mlp, "up_proj", Odd(32, 48, bias=False)),
               "bias": lambda m: setattr(m.model.layers[1].mlp, "up_proj", nn.Linear(32, 48)),
               "patched": lambda m: setattr(m.model.layers[0].self_attn, "forward", lambda x, *a: x),
               "hook": lambda m: m.model.layers[0].register_forward_hook(lambda *a: None),
               "pre-hook": lambda m: m.lm_head.register_forward_pre_hook(lambda *a: None),
               "other class": lambda m: setattr(m, "__class__", type("Mine", (Llama,), {}))}
    for name, change in changes.items():
        model = build()
        change(model)
        assert not is_plain(model), name
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_plain(build())
    assert not is_plain(build().model.layers[0])


def test_a_changed_layer_is_heeded():
    model = build()
    layer = model.model.layers[1].mlp.up_proj = Odd(32, 48, bias=False)
    nn.init.normal_(layer.weight, std=1)
    assert torch.equal(generate(model, IDS, 30, temperature=0), uncached(model, IDS, 30))
    hooked = build()
    hooked.model.layers[0].mlp.register_forward_hook(lambda module, args, out: 0 * out)
    assert torch.equal(generate(hooked, IDS, 30, temperature=0), uncached(hooked, IDS, 30))
    assert not torch.equal(generate(hooked, IDS, 30, temperature=0), generate(build(), IDS, 30, temperature=0))


@pytest.mark.parametrize("shape", [dict(g=1), dict(g=2), dict(g=4), dict(tie_embeddings=True), dict(hidden_dim=2050), dict(hidden_dim=2052),
                                   dict(rope_theta=500.0, norm_eps=1e-2), dict(dim=64, n_heads=2, n_layers=3)])
@pytest.mark.parametrize("rows", [1, 3, 4, 5])
def test_the_lean_step_equals_the_model(shape, rows):
    model = build(**shape)
    for m in model.modules():
        if isinstance(m, RMSNorm):
            nn.init.uniform_(m.weight, 0.5, 1.5)
    ids = torch.randint(300, (rows, 12))
    for padding in (None, torch.arange(rows)):
        plain, lean = (make_caches(model, rows, 12, padding) for _ in range(2))
        run = runner(model)
        with torch.no_grad():
            wanted = torch.cat([model(part, plain, plain[0].length) for part in ids.split([6, 1, 1, 1, 1, 1, 1], dim=1)], dim=1)
        out = torch.cat([run(part, lean) for part in ids.split([6, 1, 1, 1, 1, 1, 1], dim=1)], dim=1)
        assert not out.requires_grad
        torch.testing.assert_close(out, wanted, atol=1e-4, rtol=0)
        for a, b in zip(plain, lean):
            torch.testing.assert_close(a.k, b.k, atol=1e-4, rtol=0)


LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


@pytest.mark.parametrize("targets", [LAYERS, LAYERS[:-1], ("k_proj", "gate_proj"), ("q_proj", "k_proj", "v_proj")])
@pytest.mark.parametrize("settings", [dict(), dict(digits=1), dict(digits=2, dim=None), dict(digits=1, outliers=1.0)])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_the_lean_step_of_a_model_in_int8_equals_the_model(targets, settings, rows):
    model = quantize_model(build(g=2), partial(Int8Linear, **settings), targets)
    assert is_plain(model)
    ids, (plain, lean) = torch.randint(300, (rows, 4)), (make_caches(model, rows, 4) for _ in range(2))
    run = runner(model)
    with torch.no_grad():
        wanted = torch.cat([model(part, plain, plain[0].length) for part in ids.split([2, 1, 1], dim=1)], dim=1)
    out = torch.cat([run(part, lean) for part in ids.split([2, 1, 1], dim=1)], dim=1)
    # An input on the border between two digits may be rounded to either: one step of the last digit.
    torch.testing.assert_close(out, wanted, atol={1: 0.05, 2: 1e-3, 3: 1e-4}[settings.get("digits", 3)], rtol=0)


def test_layers_in_int8_of_different_settings_are_not_joined_and_those_in_int4_not_known():
    model = quantize_model(build(), partial(Int8Linear, digits=1), ("q_proj", "up_proj"))
    quantize_model(model, partial(Int8Linear, dim=None), ("k_proj", "v_proj", "gate_proj"))
    assert is_plain(model)
    assert torch.equal(generate(model, IDS, 30, temperature=0), uncached(model, IDS, 30))
    assert not is_plain(quantize_model(build(), partial(Int4Linear, group=8), ("v_proj",)))


@pytest.mark.parametrize("sizes", [((8, 16),), ((8, 16), (4, 16)), ((7, 16),), ((300, 400), (100, 400)), ((401, 400),), ((700, 1024), (401, 1024))])
@pytest.mark.parametrize("b", [1, 2, 4, 5, 8, 9, 16, 32])
def test_layers_side_by_side_are_one_matrix_product(sizes, b):
    layers, x = [nn.Linear(i, o, bias=False) for o, i in sizes], torch.randn(b, sizes[0][1])
    out = side_by_side(*layers)(x)
    assert not out.requires_grad and out.shape == (b, sum(o for o, _ in sizes))
    torch.testing.assert_close(out, torch.cat([layer(x) for layer in layers], dim=1).detach(), atol=1e-5, rtol=0)


def test_the_model_is_left_as_it_was_also_by_a_stream_that_is_left():
    model = build(hidden_dim=2048)
    before = {id(m): dict(vars(m)) for m in model.modules()}
    running = steps(model, IDS[:1], 10, temperature=0)
    next(running), next(running)
    assert torch.is_grad_enabled()
    running.close()
    assert all(vars(m) == before[id(m)] for m in model.modules())
    with torch.no_grad():
        model.lm_head.weight.neg_()                              # new weights are seen by the next call
    assert torch.equal(generate(model, IDS[:1], 20, temperature=0), uncached(model, IDS[:1], 20))
