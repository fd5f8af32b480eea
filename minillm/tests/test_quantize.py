"""Quantization: bad input, damaged files, odd sizes, and torch's own functions as the reference."""
import copy
import itertools
import json
from functools import partial

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from minillm import quantize
from minillm.calibrate import best_factor, compensation, gptq, input_squares, quantize_awq, quantize_gptq, scale_awq
from minillm.checkpoint import SEAL
from minillm.codes import (dequantize_groups, from_codes, in_groups, pack, quantize_absmax, quantize_groups,
                           quantize_zeropoint, unpack)
from minillm.generate import generate
from minillm.lora import add_lora, merge_lora
from minillm.model import Llama, LlamaConfig
from minillm.quantize import Int4Linear, Int8Linear, int8_product, load_model, quantize_model, save_model, size_bytes

KINDS = [Int8Linear, partial(Int8Linear, dim=None), partial(Int8Linear, digits=1), partial(Int8Linear, digits=1, outliers=2.0),
         Int4Linear, partial(Int4Linear, bits=3, group=5), partial(Int4Linear, bits=8, group=3)]


def build(seed=0, **shape):
    torch.manual_seed(seed)
    shape = dict(vocab_size=61, dim=16, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=20, max_seq_len=32) | shape
    model = Llama(LlamaConfig(**shape)).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5) if p.ndim == 2 else nn.init.uniform_(p, 0.5, 1.5)
    return model


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


IDS = torch.arange(24).view(2, 12)
BATCHES = [torch.randint(61, (1, 20), generator=torch.Generator().manual_seed(i)) for i in range(8)]


# Numbers

@pytest.mark.parametrize("dim", [None, 0, 1, -1])
@pytest.mark.parametrize("shape", [(8, 12), (1, 1), (3, 1), (5, 7)])
def test_absmax_is_what_torch_computes(dim, shape):
    w = random(*shape)
    codes, scale = quantize_absmax(w, dim)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32 and codes.min() >= -127
    if dim is None:
        theirs = torch.fake_quantize_per_tensor_affine(w, scale.item(), 0, -127, 127)
    else:
        theirs = torch.fake_quantize_per_channel_affine(w, scale.flatten(), torch.zeros(scale.numel(), dtype=torch.int32), (1 - dim) % 2, -127, 127)
    assert ((codes * scale - theirs).abs() < scale * 1e-3).float().mean() > 0.98 and ((codes * scale - w).abs() <= 0.501 * scale).all()
    assert (codes.abs().amax() if dim is None else codes.abs().amax(dim)).min() == 127


@pytest.mark.parametrize("bits", range(2, 9))
def test_zeropoint_is_what_torch_computes(bits):
    w = random(6, 50) + torch.linspace(-3, 3, 6)[:, None]
    codes, scale, zero = quantize_zeropoint(w, 1, bits)
    assert codes.dtype == zero.dtype == torch.uint8 and codes.max() <= 2**bits - 1 and zero.max() <= 2**bits - 1
    theirs = torch.fake_quantize_per_channel_affine(w, scale.flatten(), zero.flatten().int(), 0, 0, 2**bits - 1)
    back = from_codes(codes, scale, zero)
    assert ((back - theirs).abs() < scale * 1e-3).float().mean() > 0.98 and ((back - w).abs() <= 1.01 * scale).all()
    assert (from_codes(zero, scale, zero) == 0).all()


def test_rows_of_zeros_of_one_value_tiny_and_huge():
    w = torch.zeros(7, 6)
    w[1], w[2], w[3], w[4, 2], w[5], w[6] = 0.7, -0.7, 1e-41, 5.0, 3e38, torch.tensor([3e38, -3e38, 0, 1, 2, 3])
    for dim in (None, 1):
        codes, scale = quantize_absmax(w, dim)
        assert (codes * scale).isfinite().all() and (codes[0] == 0).all() and (scale > 0).all()
    back = torch.mul(*quantize_absmax(w, 1))
    assert torch.allclose(back[[1, 2, 4, 5]], w[[1, 2, 4, 5]], rtol=1e-6)
    for bits in (4, 8):
        back = from_codes(*quantize_zeropoint(w, 1, bits))
        assert back.isfinite().all() and (back[0] == 0).all() and torch.allclose(back[[1, 2, 4, 5]], w[[1, 2, 4, 5]], rtol=1e-5)
    assert torch.allclose(quantize_absmax(w.double(), 1)[1], quantize_absmax(w, 1)[1])
    assert quantize_absmax(random(4, 4).bfloat16(), 1)[1].dtype == torch.float32


@pytest.mark.parametrize("group", [1, 3, 5, 7, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_groups_are_slices_quantized_alone(group, bits):
    w = random(4, 7)
    codes, scale, zero = quantize_groups(w, group, bits)
    n = -(-7 // group)
    assert codes.shape == (4, 7) and scale.shape == zero.shape == (4, n) and in_groups(w, group).shape == (4, n, group)
    back = dequantize_groups(codes, scale, zero, group)
    for g in range(n):
        alone = from_codes(*quantize_zeropoint(w[:, g * group:(g + 1) * group], 1, bits))
        assert torch.equal(back[:, g * group:(g + 1) * group], alone)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_is_undone_and_takes_no_byte_too_many(bits):
    for n in (0, 1, 2, 3, 5, 8, 9, 17, 63, 64, 65, 1000):
        codes = torch.randint(2**bits, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
        packed = pack(codes, bits)
        assert packed.dtype == torch.uint8 and packed.shape == (-(-n * bits // 8),)
        assert torch.equal(unpack(packed, bits, n), codes)
        whole = sum(c << bits * i for i, c in enumerate(codes.tolist()))            # the same line of bits as one large number
        assert bytes(packed.tolist()) == whole.to_bytes(len(packed), "little")
    if bits < 8:
        with pytest.raises(ValueError, match=f"below {2**bits}: got {2**bits}"):
            pack(torch.tensor([0, 2**bits], dtype=torch.uint8), bits)


@pytest.mark.parametrize("value, error, message", [
    (torch.ones(2, 2, dtype=torch.int8), TypeError, "int8"), ([1.0], TypeError, "list"), (torch.ones(0, 3), ValueError, r"\(0, 3\)"),
    (torch.tensor([[1.0, float("nan")]]), ValueError, r"nan at \(0, 1\)"), (torch.tensor([[float("inf")]]), ValueError, "inf")])
def test_weights_that_cannot_be_rounded(value, error, message):
    for f in (quantize_absmax, quantize_zeropoint, quantize_groups):
        with pytest.raises(error, match=message):
            f(value)


@pytest.mark.parametrize("f, message", [
    (lambda w: quantize_absmax(w, 2), "dim .* got 2"), (lambda w: quantize_zeropoint(w, -3), "got -3"), (lambda w: quantize_absmax(w, 1, 9), "got 9"),
    (lambda w: quantize_absmax(w, 1, 1), "got 1"), (lambda w: quantize_groups(w, 0), "got 0"), (lambda w: quantize_groups(w, 2.5), "got 2.5"),
    (lambda w: quantize_groups(w, 4, 0), "got 0"), (lambda w: quantize_groups(w[0]), r"matrix .* \(6,\)"),
    (lambda w: gptq(torch.eye(5), w), r"\(6, 6\).*\(5, 5\)")])
def test_settings_out_of_range(f, message):
    with pytest.raises(ValueError, match=message):
        f(random(4, 6))


# Products and layers

@pytest.mark.parametrize("b, i, o", [(1, 1, 1), (1, 8, 3), (5, 33, 17), (70, 344, 128)])
@pytest.mark.parametrize("fast", [True, False])
def test_three_bytes_are_exact_and_one_byte_is_int8_x_int8(b, i, o, fast, monkeypatch):
    monkeypatch.setattr(quantize, "has_byte_products", lambda x: fast)
    x, (q, s) = 3 * random(b, i), quantize_absmax(random(o, i, seed=1))
    truth = x.double() @ (q.double() * s.double()).T
    size = (x.double().abs() @ (q.double() * s.double()).abs().T).max()
    assert (int8_product(x, q, s, 3) - truth).abs().max() < 1e-6 * size
    p, a = quantize_absmax(x, 1)
    wanted = (p.long() @ q.long().T) * a.double() * s.double().T
    assert torch.allclose(int8_product(x, q, s, 1).double(), wanted, rtol=1e-5, atol=1e-6 * size.item())


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dim", [None, 1])
def test_int8_layer_is_the_unpacked_product(fast, bias, dim, monkeypatch):
    monkeypatch.setattr(quantize, "has_byte_products", lambda x: fast)
    torch.manual_seed(0)
    linear = nn.Linear(24, 10, bias=bias)
    layer, x = Int8Linear(linear, dim), random(2, 3, 24)
    wanted = F.linear(x, layer.codes * layer.scale, linear.bias)
    with torch.no_grad():
        assert layer(x).shape == (2, 3, 10) and torch.allclose(layer(x), wanted, atol=1e-5)
        assert torch.allclose(layer.unpacked()(x), wanted, atol=1e-5) and torch.allclose(wanted, linear(x), atol=0.05)
        assert torch.allclose(layer(x.expand(12, 2, 3, 24)), wanted.expand(12, 2, 3, 10), atol=1e-5)
        assert layer(x[0, 0]).shape == (10,) and layer(x[:0]).shape == (0, 3, 10)
        assert layer(x.bfloat16()).dtype == torch.bfloat16 and layer(0 * x).isfinite().all()
        assert layer(x.masked_fill(x == x.max(), float("nan"))).isnan().any()
    assert not list(layer.parameters())
    y = layer(x.requires_grad_())
    y.sum().backward()
    assert torch.allclose(x.grad, layer.weight.sum(0).expand_as(x), atol=1e-5)


def test_columns_of_outliers_are_multiplied_in_floats():
    linear, x = nn.Linear(32, 16, bias=False), random(6, 32)
    x[2, 5], x[3, 9] = 500.0, -400.0                                        # one token is enough
    layer = Int8Linear(linear, digits=1, outliers=6.0)
    with torch.no_grad():
        truth = F.linear(x, layer.weight)
        split, plain = ((z(x) - truth).abs().max() for z in (layer, Int8Linear(linear, digits=1)))
        assert split < 0.05 and plain > 5 * split
        everything = Int8Linear(linear, digits=1, outliers=1e-9)
        assert torch.allclose(everything(x), truth, atol=1e-3)
        quiet = x.clamp(-5, 5)
        assert torch.equal(layer(quiet), Int8Linear(linear, digits=1)(quiet))


@pytest.mark.parametrize("makes", [(Int8Linear,) * 3, (partial(Int8Linear, dim=None),) * 2, (partial(Int8Linear, digits=1),) * 2,
                                   (Int8Linear, partial(Int8Linear, digits=1)), (partial(Int8Linear, digits=1, outliers=1.0),) * 2])
@pytest.mark.parametrize("fast", [True, False])
@torch.no_grad()
def test_joined_layers_give_their_outputs_side_by_side(makes, fast, monkeypatch):
    monkeypatch.setattr(quantize, "has_byte_products", lambda x: fast)
    layers = [make(nn.Linear(24, 5 + k, bias=False)) for k, make in enumerate(makes)]
    x = random(3, 24)
    assert torch.allclose(Int8Linear.joined(layers)(x), torch.cat([layer(x) for layer in layers], -1), atol=1e-5)


@pytest.mark.parametrize("i, o, group, bits", [(7, 3, 4, 3), (64, 8, 64, 4), (130, 5, 64, 4), (1, 1, 1, 2), (9, 2, 100, 5)])
def test_int4_layer_of_odd_sizes(i, o, group, bits):
    linear = nn.Linear(i, o, bias=False)
    layer = Int4Linear(linear, group, bits)
    assert torch.equal(layer.weight, dequantize_groups(*quantize_groups(linear.weight, group, bits), group))
    n = o * -(-i // group)
    assert size_bytes(layer) == -(-o * i * bits // 8) + 4 * n + -(-n * bits // 8)
    assert torch.allclose(layer(random(2, i)), F.linear(random(2, i), layer.weight))


@pytest.mark.parametrize("make, message", [
    (partial(Int8Linear, dim=0), "dim .* got 0"), (partial(Int8Linear, digits=4), "digits .* got 4"), (partial(Int8Linear, outliers=0), "outliers .* got 0"),
    (partial(Int8Linear, outliers=float("nan")), "nan"), (partial(Int4Linear, bits=1), "bits .* got 1"), (partial(Int4Linear, bits=9), "got 9"),
    (partial(Int4Linear, group=0), "group .* got 0")])
def test_settings_of_layers(make, message):
    with pytest.raises(ValueError, match=message):
        make(nn.Linear(4, 4))
    model = build()
    with pytest.raises(ValueError, match=f"model.layers.0.self_attn.q_proj: .*{message}"):
        quantize_model(model, make)
    assert {type(m) for n, m in model.named_modules() if n.endswith("proj")} == {nn.Linear}
    with pytest.raises(ValueError, match="Embedding"):
        make.func(nn.Embedding(3, 4))


# Models

@pytest.mark.parametrize("make", KINDS)
@torch.no_grad()
def test_a_quantized_model_generates_and_learns_through(make):
    model = build()
    small = quantize_model(copy.deepcopy(model), make)
    assert size_bytes(small) < size_bytes(model) and isinstance(small.lm_head, nn.Linear)
    plain = copy.deepcopy(small)
    for n, m in list(plain.named_modules()):
        if isinstance(m, quantize.QuantizedLinear):
            quantize.replace_module(plain, n, m.unpacked())
    if getattr(make, "keywords", {}).get("digits") != 1:
        assert torch.allclose(small(IDS), plain(IDS), atol=1e-3)
    assert torch.equal(generate(small, IDS, 8, temperature=0), generate(small, IDS, 8, temperature=0))
    with torch.enable_grad():
        adapted = add_lora(small, 2, 4)
        adapted(IDS).logsumexp(-1).sum().backward()
        assert all(p.grad is not None for n, p in adapted.named_parameters() if "lora_B" in n)
    assert all(type(m) is nn.Linear for n, m in merge_lora(adapted).named_modules() if n.endswith("proj"))


def test_models_that_cannot_be_quantized_stay_as_they_are():
    broken = build()
    broken.model.layers[1].mlp.down_proj.weight.data[3, 4] = float("nan")
    before = {n: type(m) for n, m in broken.named_modules()}
    for f in (quantize_model, partial(quantize_model, make=Int4Linear), partial(quantize_gptq, batches=BATCHES), partial(quantize_awq, batches=BATCHES)):
        with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj.*nan|inputs of .* not finite"):
            f(broken)
        assert {n: type(m) for n, m in broken.named_modules()} == before
    tied, model = build(tie_embeddings=True), build()
    cases = [(lambda: quantize_model(tied, targets=("lm_head",)), "lm_head shares its weight"), (lambda: quantize_model(model, targets=("q",)), "no layer 'q'"),
             (lambda: quantize_model(model, targets="q_proj"), "list of names"), (lambda: quantize_model(model, targets=()), "list of names"),
             (lambda: quantize_model(model, targets=("norm",)), "norm.*RMSNorm"), (lambda: quantize_model(add_lora(build(), 2, 4)), "LoRA"),
             (lambda: quantize_model(quantize_model(build())), "q_proj: .*Int8Linear"), (lambda: quantize_gptq(model, []), "at least one batch"),
             (lambda: quantize_gptq(model, BATCHES, bits=9), "q_proj: bits .* 9"), (lambda: quantize_awq(model, BATCHES, group=0), "group"),
             (lambda: quantize_awq(quantize_model(build()), BATCHES), "q_proj: .*Int8Linear"), (lambda: quantize_awq(model, []), "at least one batch"),
             (lambda: quantize_awq(model, BATCHES, bits=1), "bits .* 1")]
    for f, message in cases:
        with pytest.raises(ValueError, match=message):
            f()
    same = build()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters())) and len(list(same.parameters())) == len(list(model.parameters()))
    assert all(not m._forward_pre_hooks for m in model.modules())
    quantize_model(model, targets=("lm_head", "q_proj"))
    assert isinstance(model.lm_head, Int8Linear) and type(model.model.layers[0].self_attn.k_proj) is nn.Linear


# GPTQ and AWQ

def test_gptq_on_uncorrelated_inputs_is_rounding():
    w = random(5, 12)
    for group in (4, 5, 64):
        for a, b in zip(gptq(torch.eye(12).double() * 3, w, group, 3), quantize_groups(w, group, 3)):
            assert torch.equal(a, b)


def test_gptq_is_the_inverse_taken_anew_for_each_column():
    x, w = random(40, 6).double() @ random(6, 6, seed=1).double(), random(3, 6, seed=2)
    square = x.T @ x / 40
    codes, scale, zero = gptq(square, w, 6, 3)
    damped, moved = square + (0.01 * square.diag().mean() + 1e-12) * torch.eye(6).double(), w.double().clone()
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
        x, w = random(20, 4, seed=seed) @ random(4, 4, seed=seed + 100), random(1, 4, seed=seed + 200)
        square = (x.T @ x / 20).double()
        nearest = quantize_groups(w, 4, 3)
        found = [nearest, gptq(square, w, 4, 3, damp=1e-6), (every, nearest[1].expand(len(every), 1), nearest[2].expand(len(every), 1))]
        moved = [dequantize_groups(*q, 4).double() - w for q in found]
        errors.append([((m @ square) * m).sum(1).min().item() for m in moved])
    rounding, ours, best = torch.tensor(errors).T
    assert (best <= ours + 1e-9).all() and ours.mean() < 0.9 * rounding.mean() and ours.mean() < 2 * best.mean()
    for seed in range(10):
        x, w = random(200, 48, seed=seed) @ random(48, 48, seed=seed + 100), random(20, 48, seed=seed + 200)
        square = (x.T @ x / 200).double()
        found = [dequantize_groups(*q, 16).double() - w for q in (quantize_groups(w, 16, 3), gptq(square, w, 16, 3))]
        rounding, ours = (((m @ square) * m).sum() for m in found)
        assert ours < 0.6 * rounding


def test_inputs_that_never_occur_do_not_stop_gptq_or_awq():
    square, w = torch.zeros(6, 6).double(), random(4, 6)
    square[0, 0] = 1
    for square in (square, 0 * square):
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
    for name in ("input_layernorm", "self_attn.o_proj", "post_attention_layernorm", "mlp.down_proj"):
        assert not torch.equal(scaled.model.layers[0].get_submodule(name).weight, model.model.layers[0].get_submodule(name).weight), name


@torch.no_grad()
def test_input_squares_count_every_token():
    model, seen = build(), []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0].flatten(0, 1)))
    square = input_squares(model, ["model.layers.1.mlp.down_proj"], BATCHES)["model.layers.1.mlp.down_proj"]
    x = torch.cat(seen).double()
    assert len(x) == 160 and torch.allclose(square, x.T @ x / 160)


@torch.no_grad()
def test_gptq_collects_the_inputs_behind_layers_that_are_quantized_already():
    model, name = build(), "model.layers.1.mlp.up_proj"
    small = quantize_gptq(copy.deepcopy(model), BATCHES, group=8, bits=3)
    front = copy.deepcopy(model)
    front.model.layers[0] = small.model.layers[0]
    for source, equal in ((front, True), (model, False)):
        found = dequantize_groups(*gptq(input_squares(source, [name], BATCHES)[name], model.get_submodule(name).weight, 8, 3), 8)
        assert torch.equal(found, small.get_submodule(name).weight) == equal


def test_the_same_twice():
    for f in (partial(quantize_gptq, bits=3, group=8), partial(quantize_awq, bits=3, group=8)):
        a, b = (f(build(), BATCHES).state_dict() for _ in range(2))
        assert all(torch.equal(a[n], b[n]) for n in a)


# Files

@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("make", [None, *KINDS])
@torch.no_grad()
def test_a_model_comes_back_from_its_file(make, tied, tmp_path):
    model = build(tie_embeddings=tied)
    if make:
        quantize_model(model, make)
    save_model(model, tmp_path / "m.safetensors")
    again = load_model(tmp_path / "m.safetensors")
    assert again.config == model.config and torch.equal(again(IDS), model(IDS)) and not again.training
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    header = 8 + int.from_bytes((tmp_path / "m.safetensors").read_bytes()[:8], "little")
    assert (tmp_path / "m.safetensors").stat().st_size == header + size_bytes(model)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


@torch.no_grad()
def test_gptq_bfloat16_and_lm_head_come_back(tmp_path):
    models = [quantize_gptq(build(), BATCHES, 8, 3), build().bfloat16(), quantize_model(build(), targets=("lm_head",))]
    for model in models:
        save_model(model, tmp_path / "m")
        again = load_model(tmp_path / "m")
        assert torch.equal(again(IDS), model(IDS)) and size_bytes(again) == size_bytes(model)
    with pytest.raises(ValueError, match="LoRA"):
        save_model(add_lora(build(), 2, 4), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def resealed(tensors, **meta):
    data = safetensors.torch.save(tensors, {"sha256": "0" * 64} | meta)
    return SEAL.sub(quantize.hashlib.sha256(data).hexdigest().encode(), data, 1)


def test_damaged_and_foreign_files_are_refused_by_name(tmp_path):
    path = tmp_path / "small.safetensors"
    save_model(quantize_model(build()), path)
    whole, tensors = path.read_bytes(), safetensors.torch.load_file(path)
    meta = json.loads(whole[8:8 + int.from_bytes(whole[:8], "little")])["__metadata__"]
    meta.pop("sha256")
    scale = "model.layers.0.mlp.up_proj.scale"
    flipped = [whole[:k] + bytes([whole[k] ^ 1]) + whole[k + 1:] for k in range(0, len(whole), 997)]
    config = json.loads(meta["config"])
    bad = [b"", b"x", whole[:7], whole[:-1], whole[:len(whole) // 2], b"\xff" * 8 + whole[8:], whole + b"\0", *flipped,
           resealed(tensors), resealed(tensors, **(meta | {"minillm": "checkpoint"})), resealed(tensors, **(meta | {"config": "{}"})),
           resealed(tensors, **(meta | {"config": json.dumps(config | {"dim": 18})})), resealed(tensors, **(meta | {"config": json.dumps(config | {"colour": 1})})),
           resealed(tensors, **(meta | {"config": "no json"})), resealed(tensors, **(meta | {"layers": "{}"})),
           resealed(tensors, **(meta | {"layers": json.dumps({"model.layers.9.mlp": ["Int8Linear", {}]})})),
           resealed(tensors, **(meta | {"layers": json.dumps({"lm_head": ["Pickle", {}]})})),
           resealed(tensors | {scale: tensors[scale][:3]}, **meta), resealed(tensors | {scale: tensors[scale].to(torch.int8)}, **meta),
           resealed(tensors | {"extra": tensors[scale].clone()}, **meta), resealed({n: t for n, t in tensors.items() if n != scale}, **meta)]
    for data in bad:
        path.write_bytes(data)
        with pytest.raises(ValueError, match="small.safetensors cannot be loaded: "):
            load_model(path)
    for data, message in zip(bad[-4:], ("up_proj.scale should be", "up_proj.scale should be .* is .*int8", "extra should be missing", "up_proj.scale .* is missing")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            load_model(path)
    path.write_bytes(resealed(tensors, **meta))
    load_model(path)
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / "none")
