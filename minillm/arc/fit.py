"""Decides how a stage trains on this machine (fast blocks, compiling, processes), and runs train().

The loop is that of chapter 07; the fast pieces come from chapter 23, several processes from
chapter 10.
"""
from collections.abc import Callable
from contextlib import nullcontext

from torch import nn

from minillm.data_parallel import Processes, sharded
from minillm.fast_train import (by_hand, can_compile, chunked_loss, compiled, fused_loss,
                                keep_memory)
from minillm.train import Batches, TrainConfig, count_targets, token_loss, train


def faster(model: nn.Module, loss: Callable = token_loss, compiling: bool = False,
           any_length: bool = False) -> tuple[nn.Module, Callable]:
    """A model and a loss that are, to rounding, the same functions of the same weights, and faster
    on this device.

    compiling: by torch.compile, where it works, which takes some seconds first; any_length: for
    batches whose length varies (see compiled).
    """
    on_gpu = next(model.parameters()).is_cuda
    compiling = compiling and can_compile("cuda" if on_gpu else "cpu")
    if loss is token_loss:
        loss = fused_loss if compiling and on_gpu else chunked_loss
    return compiled(model, any_length) if compiling else by_hand(model), loss


def fit(model: nn.Module, batches: Batches, config: TrainConfig, loss: Callable = token_loss,
        count: Callable = count_targets, compiling: bool = False,
        shard: bool = False) -> list[dict[str, float]]:
    """As train(): the same arguments, result and exceptions, the same steps to rounding.

    compiling: see faster. shard: with torchrun, split weights, gradients and optimizer state over
    the processes, for a model that does not fit on one device.
    """
    device = next(model.parameters()).device
    if device.type == "cpu":
        keep_memory()
    with sharded(model) if shard else nullcontext(model) as held:
        forward, loss = faster(held, loss, compiling, any_length=True)
        history = train(forward, batches, config, loss, count, Processes(device))
    model.train()
    return history
