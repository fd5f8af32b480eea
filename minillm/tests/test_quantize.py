"""Quantization: bad input, damaged files, odd sizes, and torch's own functions as the reference."""
import copy
import json
from functools import partial

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from minillm import quantize
from minillm.generate import generate
from minillm.gptq_awq import quantize_awq, quantize_gptq
from minillm.integer_formats import dequantize_groups, quantize_absmax, quantize_groups
from minillm.lora import add_lora, merge_lora
from minillm.model import Llama, LlamaConfig
from minillm.quantize import (Int4Linear, Int8Linear, int8_product, load_model, quantize_model,
                              save_model, size_bytes, to_digits)
from minillm.storage.files import seal

ONE_BYTE = partial(Int8Linear, digits=1)
# Without VNNI, torch._int_mm may add products of bytes in 16 bits and cut the sums off.
FAST = [False] + [True] * quantize.has_byte_products(torch.ones(1))
KINDS = [Int8Linear, partial(Int8Linear, dim=None), ONE_BYTE,
         partial(Int8Linear, digits=1, outliers=2.0),
         Int4Linear, partial(Int4Linear, bits=3, group=5), partial(Int4Linear, bits=8, group=3)]


def build(seed=0, **shape):
    torch.manual_seed(seed)
    small = dict(vocab_size=61, dim=16, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=20,
                 max_seq_len=32)
    model = Llama(LlamaConfig(**small | shape)).eval()
    for p in model.parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=0.5)
        else:
            nn.init.uniform_(p, 0.5, 1.5)
    return model


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


IDS = torch.arange(24).view(2, 12)
BATCHES = [torch.randint(61, (1, 20), generator=torch.Generator().manual_seed(i)) for i in range(8)]


@pytest.mark.parametrize("b, i, o", [(1, 1, 1), (1, 8, 3), (5, 33, 17), (70, 344, 128)])
@pytest.mark.parametrize("fast", FAST)
def test_three_bytes_are_exact_and_one_byte_is_int8_x_int8(b, i, o, fast, monkeypatch):
    monkeypatch.setattr(quantize, "has_byte_products", lambda x: fast)
    x, (q, s) = 3 * random(b, i), quantize_absmax(random(o, i, seed=1))
    truth = x.double() @ (q.double() * s.double()).T
    size = (x.double().abs() @ (q.double() * s.double()).abs().T).max()
    assert (int8_product(x, q, s, 3) - truth).abs().max() < 1e-6 * size
    p, a = quantize_absmax(x, 1)
    wanted = (p.long() @ q.long().T) * a.double() * s.double().T
    found = int8_product(x, q, s, 1).double()
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6 * size.item())


def test_the_example_in_the_docstrings():
    x, q = torch.tensor([[1, 0.3]]), torch.tensor([[10, 20]], dtype=torch.int8)
    digits, unit = to_digits(x, 3)
    assert digits.tolist() == [[127, 38], [0, 25], [0, 102]]
    assert unit.item() == pytest.approx(1 / 127)
    found = int8_product(x, q, torch.tensor([[0.01]]), 2).item()
    assert found == pytest.approx((2030 + 500 / 254) / 127 * 0.01) and round(found, 6) == 0.159998


@pytest.mark.parametrize("fast", FAST)
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
        assert torch.allclose(layer.unpacked()(x), wanted, atol=1e-5)
        assert torch.allclose(wanted, linear(x), atol=0.05)
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


@pytest.mark.parametrize("makes", [
    (Int8Linear,) * 3, (partial(Int8Linear, dim=None),) * 2, (ONE_BYTE,) * 2,
    (Int8Linear, ONE_BYTE), (partial(Int8Linear, digits=1, outliers=1.0),) * 2])
@pytest.mark.parametrize("fast", FAST)
@torch.no_grad()
def test_joined_layers_give_their_outputs_side_by_side(makes, fast, monkeypatch):
    monkeypatch.setattr(quantize, "has_byte_products", lambda x: fast)
    layers = [make(nn.Linear(24, 5 + k, bias=False)) for k, make in enumerate(makes)]
    x = random(3, 24)
    apart = torch.cat([layer(x) for layer in layers], -1)
    assert torch.allclose(Int8Linear.joined(layers)(x), apart, atol=1e-5)


@pytest.mark.parametrize("i, o, group, bits", [
    (7, 3, 4, 3), (64, 8, 64, 4), (130, 5, 64, 4), (1, 1, 1, 2), (9, 2, 100, 5)])
def test_int4_layer_of_odd_sizes(i, o, group, bits):
    linear = nn.Linear(i, o, bias=False)
    layer = Int4Linear(linear, group, bits)
    wanted = dequantize_groups(*quantize_groups(linear.weight, group, bits), group)
    assert torch.equal(layer.weight, wanted)
    n = o * -(-i // group)
    assert size_bytes(layer) == -(-o * i * bits // 8) + 4 * n + -(-n * bits // 8)
    assert torch.allclose(layer(random(2, i)), F.linear(random(2, i), layer.weight))


@pytest.mark.parametrize("make, message", [
    (partial(Int8Linear, dim=0), "dim .* got 0"),
    (partial(Int8Linear, digits=4), "digits .* got 4"),
    (partial(Int8Linear, outliers=0), "outliers .* got 0"),
    (partial(Int8Linear, outliers=float("nan")), "nan"),
    (partial(Int4Linear, bits=1), "bits .* got 1"),
    (partial(Int4Linear, bits=9), "got 9"),
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
    once, twice = (generate(small, IDS, 8, temperature=0) for _ in range(2))
    assert torch.equal(once, twice)
    with torch.enable_grad():
        adapted = add_lora(small, 2, 4)
        adapted(IDS).logsumexp(-1).sum().backward()
        assert all(p.grad is not None for n, p in adapted.named_parameters() if "lora_B" in n)
    merged = merge_lora(adapted)
    assert all(type(m) is nn.Linear for n, m in merged.named_modules() if n.endswith("proj"))


def test_models_that_cannot_be_quantized_stay_as_they_are():
    broken = build()
    broken.model.layers[1].mlp.down_proj.weight.data[3, 4] = float("nan")
    before = {n: type(m) for n, m in broken.named_modules()}
    message = r"model.layers.1.mlp.down_proj.*nan|inputs of .* not finite"
    for f in (quantize_model, partial(quantize_model, make=Int4Linear),
              partial(quantize_gptq, batches=BATCHES), partial(quantize_awq, batches=BATCHES)):
        with pytest.raises(ValueError, match=message):
            f(broken)
        assert {n: type(m) for n, m in broken.named_modules()} == before
    tied, model = build(tie_embeddings=True), build()
    cases = [(lambda: quantize_model(tied, targets=("lm_head",)), "lm_head shares its weight"),
             (lambda: quantize_model(model, targets=("q",)), "no layer 'q'"),
             (lambda: quantize_model(model, targets="q_proj"), "list of names"),
             (lambda: quantize_model(model, targets=()), "list of names"),
             (lambda: quantize_model(model, targets=("norm",)), "norm.*RMSNorm"),
             (lambda: quantize_model(add_lora(build(), 2, 4)), "LoRA"),
             (lambda: quantize_model(quantize_model(build())), "q_proj: .*Int8Linear"),
             (lambda: quantize_gptq(model, []), "at least one batch"),
             (lambda: quantize_gptq(model, BATCHES, bits=9), "q_proj: bits .* 9"),
             (lambda: quantize_awq(model, BATCHES, group=0), "group"),
             (lambda: quantize_awq(quantize_model(build()), BATCHES), "q_proj: .*Int8Linear"),
             (lambda: quantize_awq(model, []), "at least one batch"),
             (lambda: quantize_awq(model, BATCHES, bits=1), "bits .* 1")]
    for f, message in cases:
        with pytest.raises(ValueError, match=message):
            f()
    before, after = list(build().parameters()), list(model.parameters())
    assert len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after))
    assert all(not m._forward_pre_hooks for m in model.modules())
    quantize_model(model, targets=("lm_head", "q_proj"))


def assert_same(again, model):
    """The same tensors, to the bit, and the same logits, up to rounding: the sums of a product may
    come in another order where memory is aligned otherwise."""
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    logits, wanted = again(IDS), model(IDS)
    step = torch.finfo(wanted.dtype).eps * wanted.abs().max()
    assert logits.dtype == wanted.dtype and (logits - wanted).abs().max() <= 16 * step


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("make", [None, *KINDS])
@torch.no_grad()
def test_a_model_comes_back_from_its_file(make, tied, tmp_path):
    model = build(tie_embeddings=tied)
    if make:
        quantize_model(model, make)
    path = tmp_path / "m.safetensors"
    save_model(model, path)
    again = load_model(path)
    assert again.config == model.config and not again.training
    assert_same(again, model)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == header + size_bytes(model)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


@torch.no_grad()
def test_gptq_bfloat16_and_lm_head_come_back(tmp_path):
    models = [quantize_gptq(build(), BATCHES, 8, 3), build().bfloat16(),
              quantize_model(build(), targets=("lm_head",))]
    for model in models:
        save_model(model, tmp_path / "m")
        again = load_model(tmp_path / "m")
        assert size_bytes(again) == size_bytes(model)
        assert_same(again, model)
    with pytest.raises(ValueError, match="LoRA"):
        save_model(add_lora(build(), 2, 4), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_damaged_and_foreign_files_are_refused_by_name(tmp_path):
    path = tmp_path / "small.safetensors"
    save_model(quantize_model(build()), path)
    whole, tensors = path.read_bytes(), safetensors.torch.load_file(path)
    meta = json.loads(whole[8:8 + int.from_bytes(whole[:8], "little")])["__metadata__"]
    meta.pop("sha256")
    scale = "model.layers.0.mlp.up_proj.scale"
    flipped = [whole[:k] + bytes([whole[k] ^ 1]) + whole[k + 1:] for k in range(0, len(whole), 997)]
    config = json.loads(meta["config"])
    other_width, unknown = json.dumps(config | {"dim": 18}), json.dumps(config | {"colour": 1})
    other_meta = [{"minillm": "checkpoint"}, {"config": "{}"}, {"config": other_width},
                  {"config": unknown}, {"config": "no json"}, {"layers": "{}"},
                  {"layers": json.dumps({"model.layers.9.mlp": ["Int8Linear", {}]})},
                  {"layers": json.dumps({"lm_head": ["Pickle", {}]})}]
    other_tensors = [tensors | {scale: tensors[scale][:3]},
                     tensors | {scale: tensors[scale].to(torch.int8)},
                     tensors | {"extra": tensors[scale].clone()},
                     {n: t for n, t in tensors.items() if n != scale}]
    bad = [b"", b"x", whole[:7], whole[:-1], whole[:len(whole) // 2], b"\xff" * 8 + whole[8:],
           whole + b"\0", *flipped, seal(tensors, {}),
           *[seal(tensors, meta | changed) for changed in other_meta],
           *[seal(changed, meta) for changed in other_tensors]]
    for data in bad:
        path.write_bytes(data)
        with pytest.raises(ValueError, match="small.safetensors cannot be loaded: "):
            load_model(path)
    messages = ("up_proj.scale should be", "up_proj.scale should be .* is .*int8",
                "extra should be missing", "up_proj.scale .* is missing")
    for data, message in zip(bad[-4:], messages):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            load_model(path)
    path.write_bytes(seal(tensors, meta))
    load_model(path)
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / "none")
