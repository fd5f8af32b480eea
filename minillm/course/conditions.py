"""Conditions under which a check calls an answer: on copies of the arguments, or without autograd.

A check that calls `answer(x)` itself goes wrong if the answer changes x, and lets
`torch.autograd.grad` answer what should be derived. So it calls `on_copies(answer, x)` or
`on_paper(answer, x)`.
"""
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def on_copies(function: Callable, *args: Any) -> Any:
    """function(*args), on copies of the tensors, lists and tuples among the arguments.

    Raises AssertionError if the function changes one of them in place.
    """
    copies = [copy.deepcopy(a) if isinstance(a, (Tensor, list, tuple)) else a for a in args]
    result = function(*copies)
    assert _are_equal(args, copies), \
        "an argument was changed in place: the caller still needs it, so work on a copy"
    return result


def _are_equal(a, b):
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_are_equal, a, b))
    return a is b or a == b


def on_paper(function: Callable, *args: Any) -> Any:
    """on_copies(function, *args), for a derivative that is to be derived by hand.

    Raises AssertionError if the function uses torch.autograd, torch.func or one of PyTorch's own
    backward functions.
    """
    try:
        with torch.inference_mode(), _OnPaper():
            return on_copies(function, *args)
    except RuntimeError as error:
        assert "require grad" not in str(error), SWITCHED_OFF
        raise


SWITCHED_OFF = "derive it on paper: autograd is switched off here"


class _OnPaper(TorchDispatchMode):
    """Refuses any operation while autograd is on, and those that are PyTorch's own derivatives."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        # torch.func leaves inference mode, and so does an answer that switches autograd on again
        assert torch.is_inference_mode_enabled(), SWITCHED_OFF
        assert "backward" not in operation.name(), \
            f"{operation.name()} is PyTorch's derivative: derive your own on paper"
        return operation(*args, **kwargs or {})
