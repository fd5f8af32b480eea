"""GPTQ and AWQ: against what they are derived from, and at the edges."""
import copy
import itertools
from functools import partial

import pytest
import torch

from minillm.gptq_awq import (best_factor, compensation, gptq, input_squares, quantize_awq,
                              quantize_gptq, scale_awq)
from minillm.integer_formats import dequantize_groups, quantize_groups
from minillm.tests.test_quantize import BATCHES, IDS, build, random


def test_gptq_on_uncorrelated_inputs_is_rounding():
    w = random(5, 12)
    for group in (4, 5, 64):
        ours = gptq(torch.eye(12).double() * 3, w, group, 3)
        for a, b in zip(ours, quantize_groups(w, group, 3)):
            assert torch.equal(a, b)


def test_gptq_is_the_inverse_taken_anew_for_each_column():
    x = random(40, 6).double() @ random(6, 6, seed=1).double()
    w = random(3, 6, seed=2)
    square = x.T @ x / 40
    codes, scale, zero = gptq(square, w, 6, 3)
    damped = square + (0.01 * square.diag().mean() + 1e-12) * torch.eye(6).double()
    moved = w.double().clone()
    for j in range(6):
        inverse = torch.linalg.inv(damped[j:, j:])
        c = (moved[:, j] / scale[:, 0] + zero[:, 0]).round().clamp(0, 7)
        assert torch.equal(c, codes[:, j].double())
        error = moved[:, j] - (c - zero[:, 0]) * scale[:, 0]
        moved[:, j:] -= torch.outer(error, inverse[0] / inverse[0, 0])


def test_gptq_comes_nearer_to_the_best_choice_and_lowers_the_error_of_every_layer():
    errors = []
    every = torch.tensor(list(itertools.product(range(8), repeat=4)), dtype=torch.uint8)
    for seed in range(60):
        x = random(20, 4, seed=seed) @ random(4, 4, seed=seed + 100)
        w = random(1, 4, seed=seed + 200)
        square = (x.T @ x / 20).double()
        nearest = quantize_groups(w, 4, 3)
        scale, zero = (z.expand(len(every), 1) for z in nearest[1:])
        found = [nearest, gptq(square, w, 4, 3, damp=1e-6), (every, scale, zero)]
        moved = [dequantize_groups(*q, 4).double() - w for q in found]
        errors.append([((m @ square) * m).sum(1).min().item() for m in moved])
    rounding, ours, best = torch.tensor(errors).T
    assert (best <= ours + 1e-9).all()
    assert ours.mean() < 0.9 * rounding.mean() and ours.mean() < 2 * best.mean()
    for seed in range(10):
        x = random(200, 48, seed=seed) @ random(48, 48, seed=seed + 100)
        w = random(20, 48, seed=seed + 200)
        square = (x.T @ x / 200).double()
        both = (quantize_groups(w, 16, 3), gptq(square, w, 16, 3))
        found = [dequantize_groups(*q, 16).double() - w for q in both]
        rounding, ours = (((m @ square) * m).sum() for m in found)
        assert ours < 0.6 * rounding


def test_inputs_that_never_occur_do_not_stop_gptq_or_awq():
    one_input, w = torch.zeros(6, 6).double(), random(4, 6)
    one_input[0, 0] = 1
    for square in (one_input, 0 * one_input):
        assert compensation(square).isfinite().all()
        assert dequantize_groups(*gptq(square, w)).isfinite().all()
        assert best_factor([w], square, 4, 3).isfinite().all()


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@torch.no_grad()
def test_awq_scales_without_changing_the_function(heads):
    model = build(n_heads=heads[0], n_kv_heads=heads[1])
    model.model.layers[0].input_layernorm.weight[3] = 20.0
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight[1] *= 20
        layer.mlp.up_proj.weight[2] *= 20
    scaled = scale_awq(copy.deepcopy(model), BATCHES, group=8, bits=3)
    assert torch.allclose(scaled(IDS), model(IDS), atol=2e-3)
    for name in ("input_layernorm", "self_attn.o_proj", "post_attention_layernorm",
                 "mlp.down_proj"):
        before, after = (m.model.layers[0].get_submodule(name).weight for m in (model, scaled))
        assert not torch.equal(before, after), name


@torch.no_grad()
def test_input_squares_count_every_token():
    model, name, seen = build(), "model.layers.1.mlp.down_proj", []
    layer = model.get_submodule(name)
    layer.register_forward_pre_hook(lambda m, a: seen.append(a[0].flatten(0, 1)))
    square = input_squares(model, [name], BATCHES)[name]
    x = torch.cat(seen).double()
    assert len(x) == 160 and torch.allclose(square, x.T @ x / 160)


@torch.no_grad()
def test_gptq_collects_the_inputs_behind_layers_that_are_quantized_already():
    model, name = build(), "model.layers.1.mlp.up_proj"
    small = quantize_gptq(copy.deepcopy(model), BATCHES, group=8, bits=3)
    front = copy.deepcopy(model)
    front.model.layers[0] = small.model.layers[0]
    weight, wanted = (m.get_submodule(name).weight for m in (model, small))
    for source, equal in ((front, True), (model, False)):
        square = input_squares(source, [name], BATCHES)[name]
        found = dequantize_groups(*gptq(square, weight, 8, 3), 8)
        assert torch.equal(found, wanted) == equal


def test_the_same_twice():
    for f in (partial(quantize_gptq, bits=3, group=8), partial(quantize_awq, bits=3, group=8)):
        a, b = (f(build(), BATCHES).state_dict() for _ in range(2))
        assert all(torch.equal(a[n], b[n]) for n in a)
