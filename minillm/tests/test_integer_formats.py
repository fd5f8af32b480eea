"""Whole numbers with scales: against torch, odd shapes, zeros, and bad input."""
import pytest
import torch

from minillm.gptq_awq import gptq
from minillm.integer_formats import (
    dequantize_groups, from_codes, in_groups, pack, quantize_absmax, quantize_groups,
    quantize_zeropoint, unpack)
from minillm.tests.test_quantize import random


@pytest.mark.parametrize("dim", [None, 0, 1, -1])
@pytest.mark.parametrize("shape", [(8, 12), (1, 1), (3, 1), (5, 7)])
def test_absmax_is_what_torch_computes(dim, shape):
    w = random(*shape)
    codes, scale = quantize_absmax(w, dim)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32 and codes.min() >= -127
    if dim is None:
        theirs = torch.fake_quantize_per_tensor_affine(w, scale.item(), 0, -127, 127)
    else:
        zero, axis = torch.zeros(scale.numel(), dtype=torch.int32), (1 - dim) % 2
        theirs = torch.fake_quantize_per_channel_affine(w, scale.flatten(), zero, axis, -127, 127)
    assert ((codes * scale - theirs).abs() < scale * 1e-3).float().mean() > 0.98
    assert ((codes * scale - w).abs() <= 0.501 * scale).all()
    assert (codes.abs().amax() if dim is None else codes.abs().amax(dim)).min() == 127


@pytest.mark.parametrize("bits", range(2, 9))
def test_zeropoint_is_what_torch_computes(bits):
    w = random(6, 50) + torch.linspace(-3, 3, 6)[:, None]
    codes, scale, zero = quantize_zeropoint(w, 1, bits)
    limit = 2**bits - 1
    assert codes.dtype == zero.dtype == torch.uint8 and codes.max() <= limit and zero.max() <= limit
    zeros = zero.flatten().int()
    theirs = torch.fake_quantize_per_channel_affine(w, scale.flatten(), zeros, 0, 0, limit)
    back = from_codes(codes, scale, zero)
    assert ((back - theirs).abs() < scale * 1e-3).float().mean() > 0.98
    assert ((back - w).abs() <= 1.01 * scale).all()
    assert (from_codes(zero, scale, zero) == 0).all()


def test_rows_of_zeros_of_one_value_tiny_and_huge():
    w = torch.zeros(7, 6)
    w[1], w[2], w[3], w[4, 2], w[5] = 0.7, -0.7, 1e-41, 5.0, 3e38
    w[6] = torch.tensor([3e38, -3e38, 0, 1, 2, 3])
    for dim in (None, 1):
        codes, scale = quantize_absmax(w, dim)
        assert (codes * scale).isfinite().all() and (codes[0] == 0).all() and (scale > 0).all()
    back = torch.mul(*quantize_absmax(w, 1))
    assert torch.allclose(back[[1, 2, 4, 5]], w[[1, 2, 4, 5]], rtol=1e-6)
    for bits in (4, 8):
        back = from_codes(*quantize_zeropoint(w, 1, bits))
        assert back.isfinite().all() and (back[0] == 0).all()
        assert torch.allclose(back[[1, 2, 4, 5]], w[[1, 2, 4, 5]], rtol=1e-5)
    assert torch.allclose(quantize_absmax(w.double(), 1)[1], quantize_absmax(w, 1)[1])
    assert quantize_absmax(random(4, 4).bfloat16(), 1)[1].dtype == torch.float32


@pytest.mark.parametrize("group", [1, 3, 5, 7, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_groups_are_slices_quantized_alone(group, bits):
    w = random(4, 7)
    codes, scale, zero = quantize_groups(w, group, bits)
    n = -(-7 // group)
    assert codes.shape == (4, 7) and scale.shape == zero.shape == (4, n)
    assert in_groups(w, group).shape == (4, n, group)
    back = dequantize_groups(codes, scale, zero, group)
    for g in range(n):
        alone = from_codes(*quantize_zeropoint(w[:, g * group:(g + 1) * group], 1, bits))
        assert torch.equal(back[:, g * group:(g + 1) * group], alone)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_is_undone_and_takes_no_byte_too_many(bits):
    for n in (0, 1, 2, 3, 5, 8, 9, 17, 63, 64, 65, 1000):
        rng = torch.Generator().manual_seed(n)
        codes = torch.randint(2**bits, (n,), dtype=torch.uint8, generator=rng)
        packed = pack(codes, bits)
        assert packed.dtype == torch.uint8 and packed.shape == (-(-n * bits // 8),)
        assert torch.equal(unpack(packed, bits, n), codes)
        # the same line of bits as one large number
        whole = sum(c << bits * i for i, c in enumerate(codes.tolist()))
        assert bytes(packed.tolist()) == whole.to_bytes(len(packed), "little")
    if bits < 8:
        with pytest.raises(ValueError, match=f"below {2**bits}: got {2**bits}"):
            pack(torch.tensor([0, 2**bits], dtype=torch.uint8), bits)


@pytest.mark.parametrize("value, error, message", [
    (torch.ones(2, 2, dtype=torch.int8), TypeError, "int8"),
    ([1.0], TypeError, "list"),
    (torch.ones(0, 3), ValueError, r"\(0, 3\)"),
    (torch.tensor([[1.0, float("nan")]]), ValueError, r"nan at \(0, 1\)"),
    (torch.tensor([[float("inf")]]), ValueError, "inf")])
def test_weights_that_cannot_be_rounded(value, error, message):
    for f in (quantize_absmax, quantize_zeropoint, quantize_groups):
        with pytest.raises(error, match=message):
            f(value)


@pytest.mark.parametrize("f, message", [
    (lambda w: quantize_absmax(w, 2), "dim .* got 2"),
    (lambda w: quantize_zeropoint(w, -3), "got -3"),
    (lambda w: quantize_absmax(w, 1, 9), "got 9"),
    (lambda w: quantize_absmax(w, 1, 1), "got 1"),
    (lambda w: quantize_groups(w, 0), "got 0"),
    (lambda w: quantize_groups(w, 2.5), "got 2.5"),
    (lambda w: quantize_groups(w, 4, 0), "got 0"),
    (lambda w: quantize_groups(w[0]), r"matrix .* \(6,\)"),
    (lambda w: gptq(torch.eye(5), w), r"\(6, 6\).*\(5, 5\)")])
def test_settings_out_of_range(f, message):
    with pytest.raises(ValueError, match=message):
        f(random(4, 6))
