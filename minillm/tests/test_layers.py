"""RMSNorm and SwiGLU: bad input, dtypes, extreme values, and the backward pass in bf16."""
import pytest
import torch
import torch.nn.functional as F

from minillm.layers import RMSNorm, SwiGLU, hidden_width

LAYERS = [RMSNorm(8), SwiGLU(8, 16)]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 3, 1), (8, 3), (2, 8, 0), ()])
def test_wrong_width_names_both(layer, shape):
    with pytest.raises(ValueError, match="last dimension of x must be 8") as error:
        layer(torch.zeros(shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_not_floating_point(layer, dtype):
    with pytest.raises(TypeError, match=str(dtype)):
        layer(torch.ones(2, 8, dtype=dtype))


@pytest.mark.parametrize("make", [
    lambda: RMSNorm(0), lambda: RMSNorm(8, eps=0.0), lambda: RMSNorm(8, eps=-1e-5),
    lambda: RMSNorm(8, eps=float("nan")), lambda: SwiGLU(0, 8), lambda: SwiGLU(8, -1),
    lambda: hidden_width(0), lambda: hidden_width(64, 0)])
def test_bad_sizes(make):
    with pytest.raises(ValueError, match="got"):
        make()


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("shape", [(8,), (0, 8), (2, 0, 8), (2, 3, 4, 8)])
def test_any_leading_dimensions(layer, shape):
    assert layer(torch.ones(shape)).shape == shape


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_norm_keeps_the_dtype_of_the_stream(stream, weight):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).to(stream).requires_grad_()
    norm = RMSNorm(8).to(weight)
    y = norm(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == stream and norm.weight.grad.dtype == weight


def test_norm_of_extreme_rows():
    norm = RMSNorm(4)
    rows = [[0.0, 0, 0, 0], [1e18, 1e18, 1e18, 1e18], [1e-30, 0, 0, 0]]
    x = torch.tensor(rows, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    assert torch.equal(y[0], torch.zeros(4)) and torch.allclose(y[1], torch.ones(4))
    assert y.isfinite().all() and x.grad.isfinite().all()


def test_norm_passes_on_what_is_not_a_number():
    """A nan must stay visible, in its own token only."""
    x = torch.ones(2, 4)
    x[0, 1] = float("nan")
    y = RMSNorm(4)(x)
    assert y[0].isnan().all() and y[1].isfinite().all()


def test_gradients_in_bf16_are_those_of_float32_rounded():
    torch.manual_seed(0)
    x, grad = torch.randn(16, 512).bfloat16(), torch.randn(16, 512).bfloat16()
    norm = RMSNorm(512).bfloat16()
    low, high = x.clone().requires_grad_(), x.float().requires_grad_()
    norm(low).backward(grad)
    F.rms_norm(high, (512,), eps=norm.eps).backward(grad.float())
    assert (low.grad.float() - high.grad).norm() / high.grad.norm() < 0.005
    of_weight = (grad.float() * norm(x).float()).sum(0)
    assert torch.allclose(norm.weight.grad.float(), of_weight, atol=0.1, rtol=0.02)


def test_autocast_in_bf16():
    """Under autocast the norm keeps the float32 of the stream; the matrix products give bf16."""
    x = torch.randn(2, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert RMSNorm(8)(x).dtype == torch.float32
        assert SwiGLU(8, 16)(x).dtype == torch.bfloat16


def test_names_and_shapes_are_those_of_hugging_face():
    shapes = {name: tuple(p.shape) for name, p in SwiGLU(8, 24).named_parameters()}
    assert shapes == {"gate_proj.weight": (24, 8), "up_proj.weight": (24, 8),
                      "down_proj.weight": (8, 24)}
    assert {name: tuple(p.shape) for name, p in RMSNorm(8).named_parameters()} == {"weight": (8,)}


def test_token_by_token():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    for layer in LAYERS:
        rows = torch.stack([layer(token) for token in x.flatten(0, 1)]).view(2, 5, 8)
        torch.testing.assert_close(layer(x), rows, atol=1e-5, rtol=1e-5)


def test_hidden_width_is_the_least_multiple_that_is_wide_enough():
    for dim in range(1, 400):
        for multiple_of in (1, 8, 64, 256):
            width = hidden_width(dim, multiple_of)
            assert width % multiple_of == 0 and width - multiple_of < 8 * dim // 3 <= width
