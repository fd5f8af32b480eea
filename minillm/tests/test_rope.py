"""Bad input to the rotary embedding, and what its notebook does not show."""
import pytest
import torch

from minillm.rope import apply_rope, rope_cache, rope_frequencies

DTYPES = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize("arguments, message", [
    ((7, 4), "head_dim must be even and at least 2.*got 7"),
    ((0, 4), "got 0"),
    ((-2, 4), "got -2"),
    ((8, 0), "max_seq_len must be at least 1: got 0"),
    ((8, -1), "got -1"),
    ((8, 4, 0.0), "theta must be positive.*got 0.0"),
    ((8, 4, -1e4), "got -10000.0"),
    ((8, 4, float("nan")), "got nan"),
])
def test_rope_cache_names_the_bad_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        rope_cache(*arguments)


@pytest.mark.parametrize("x, error, message", [
    (torch.ones(1, 2, 9, 8), ValueError, "sequence of 9 tokens is longer than the 6 positions"),
    (torch.ones(6, 4), ValueError, "heads of width 4, but the rotary cache was made for 8"),
    # would broadcast silently if the cache had width 1
    (torch.ones(6, 2), ValueError, "width 2"),
    (torch.ones(6, 7), ValueError, "width 7"),
    (torch.ones(6, 8, dtype=torch.int64), TypeError, "torch.int64"),
])
def test_apply_rope_names_the_bad_value(x, error, message):
    with pytest.raises(error, match=message):
        apply_rope(x, *rope_cache(8, 6))


def test_cache_of_one_pair_does_not_broadcast():
    with pytest.raises(ValueError, match="width 8, but the rotary cache was made for 2"):
        apply_rope(torch.ones(6, 8), *rope_cache(2, 6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_keeps_shape_and_dtype_and_rounds_once(dtype):
    x, cache = torch.randn(2, 3, 6, 8).to(dtype), rope_cache(8, 10)
    y = apply_rope(x, *cache)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    assert torch.equal(y, apply_rope(x.float(), *cache).to(dtype))


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16))
def test_cache_is_float32_whatever_the_default(dtype):
    expected = rope_cache(16, 300)
    torch.set_default_dtype(dtype)
    try:
        cache = rope_cache(16, 300)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(z.dtype == torch.float32 and torch.equal(z, e) for z, e in zip(cache, expected))


@pytest.mark.parametrize("make", [
    lambda z: z[None], lambda z: z[None, None], lambda z: z[0]], ids=["batch", "heads", "one row"])
def test_angles_of_other_dimensions_are_refused_with_their_shape(make):
    """In other libraries cos has a batch dimension; here it was taken for one position."""
    cos, sin = map(make, rope_cache(8, 6))
    with pytest.raises(ValueError, match=r"\(positions, width / 2\)") as refused:
        apply_rope(torch.randn(2, 3, 5, 8), cos, sin)
    assert str(tuple(cos.shape)) in str(refused.value)
    with pytest.raises(ValueError, match=r"\(positions, width / 2\)"):
        apply_rope(torch.randn(8), *rope_cache(8, 6))


def test_longer_cache_begins_like_a_shorter_one():
    for short, long in zip(rope_cache(32, 10), rope_cache(32, 1000)):
        assert torch.equal(short, long[:10])


def test_position_0_stays_and_input_is_not_changed():
    x = torch.randn(5, 16)
    before = x.clone()
    y = apply_rope(x, *rope_cache(16, 5))
    assert torch.equal(x, before) and torch.equal(y[0], x[0])


def test_smallest_shapes():
    assert apply_rope(torch.ones(0, 2), *rope_cache(2, 1)).shape == (0, 2)
    assert torch.equal(apply_rope(torch.ones(1, 2), *rope_cache(2, 1)), torch.ones(1, 2))
    assert torch.equal(rope_frequencies(2, 5e5), torch.ones(1))


def test_views_that_are_not_contiguous():
    x = torch.randn(2, 6, 3, 8).transpose(1, 2)
    cache = rope_cache(8, 6)
    assert torch.equal(apply_rope(x, *cache), apply_rope(x.contiguous(), *cache))


def test_gradient_is_the_rotation_back():
    """A rotation is orthogonal: its transpose, which backward applies, is the turn by -angle."""
    x, upstream = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8)
    cos, sin = rope_cache(8, 6)
    apply_rope(x, cos, sin).backward(upstream)
    assert torch.allclose(x.grad, apply_rope(upstream, cos, -sin), atol=1e-6)


def test_norms_stay_at_large_positions():
    x = torch.randn(4, 64)
    cos, sin = rope_cache(64, 100_000, theta=5e5)
    assert torch.allclose(apply_rope(x, cos[-4:], sin[-4:]).norm(dim=-1), x.norm(dim=-1), rtol=1e-5)


def test_under_autocast():
    (cos, sin), x = rope_cache(8, 600), torch.randn(600, 8)
    expected = apply_rope(x, cos, sin)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(rope_cache(8, 600), (cos, sin)))
        assert torch.equal(apply_rope(x, cos, sin), expected)
