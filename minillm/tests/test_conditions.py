"""Checks notice changed arguments, and derivatives that were not derived."""
import pytest
import torch
from torch.autograd import forward_ad

from minillm.course.conditions import on_copies, on_paper


def test_on_copies_hands_over_equal_arguments_and_returns_the_result():
    x, parts, tool = torch.ones(2), [torch.zeros(2), (1, "a")], object()
    got = on_copies(lambda *args: args, x, parts, tool, 3)
    assert torch.equal(got[0], x) and got[0] is not x
    assert torch.equal(got[1][0], parts[0]) and got[1][0] is not parts[0]
    assert got[1][1] == (1, "a") and got[2] is tool and got[3] == 3


@pytest.mark.parametrize("change", [
    lambda x, parts: x.add_(1), lambda x, parts: parts[0].add_(1),
    lambda x, parts: parts.append(2), lambda x, parts: parts[1].clear()])
def test_on_copies_notices_a_change_in_place(change):
    x, parts = torch.ones(2), [torch.zeros(2), [1]]
    with pytest.raises(AssertionError, match="changed in place"):
        on_copies(change, x, parts)
    assert torch.equal(x, torch.ones(2)) and len(parts) == 2 and parts[1] == [1]


def f(x):
    return x.log_softmax(-1)[0] + (x * x).sum()


def by_hand(x):
    return torch.eye(len(x))[0] - x.softmax(-1) + 2 * x


def with_autograd(x):
    return torch.autograd.grad(f(x.requires_grad_()), x)[0]


def switched_on(x):
    with torch.inference_mode(False), torch.enable_grad():
        return with_autograd(x.clone())


def forward(x):
    with torch.inference_mode(False), forward_ad.dual_level():
        rows = [f(forward_ad.make_dual(x.clone(), row)) for row in torch.eye(len(x)).unbind()]
        return torch.stack([forward_ad.unpack_dual(z).tangent for z in rows])


def own_backward(x):
    y = torch.ops.aten._log_softmax_backward_data(torch.eye(3)[0], x.log_softmax(-1), -1, x.dtype)
    return y + 2 * x


def test_on_paper_allows_a_formula():
    x = torch.randn(3)
    assert torch.allclose(on_paper(by_hand, x), with_autograd(x.clone()), atol=1e-6)


@pytest.mark.parametrize("function", [
    with_autograd, torch.func.grad(f), torch.func.jacrev(f), torch.func.jacfwd(f), switched_on,
    forward, own_backward])
def test_on_paper_refuses_derivatives_of_pytorch(function):
    x = torch.randn(3)
    assert torch.allclose(function(x.clone()), by_hand(x), atol=1e-6)
    with pytest.raises(AssertionError, match="on paper"):
        on_paper(function, x)


def test_on_paper_notices_a_change_in_place_and_passes_other_errors_on():
    with pytest.raises(AssertionError, match="changed in place"):
        on_paper(lambda x: x.add_(1), torch.ones(2))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        on_paper(lambda x: x @ torch.ones(3, 3), torch.ones(2, 2))
