"""Decides how a stage trains on this machine (fast blocks, compiling, processes), and runs train().

The loop is that of chapter 07; the fast pieces come from chapter 23, several processes from
chapter 10.
"""
import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.data import IGNORE
from minillm.data_parallel import Processes, sharded
from minillm.fast_train import (by_hand, can_compile, chunked_loss, compiled, fused_loss,
                                keep_memory)
from minillm.train import Batches, TrainConfig, count_targets, token_loss, train


LENGTHS = 64      # on a GPU, batches are padded to a multiple of this many tokens


class Padded:
    """The batches of a source, inputs and targets (b, t), padded to the next multiple of LENGTHS,
    at most to `longest`, with targets that do not count.

    On a GPU each new length costs time, because kernels are planned for it, and batches of
    dialogues have hundreds of lengths. Tuning the chat model ran at 5 steps per second with all of
    them (H100), and at 17 with few lengths and without cuDNN's attention (H200; see fit).
    """

    def __init__(self, batches: Batches, longest: int):
        self.batches, self.longest = batches, longest

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.batches[i]
        t = inputs.shape[1]
        more = (0, max(0, min(math.ceil(t / LENGTHS) * LENGTHS, self.longest) - t))
        return F.pad(inputs, more), F.pad(targets, more, value=IGNORE)


def faster(model: nn.Module, loss: Callable = token_loss, compiling: bool = False,
           any_length: bool = False) -> tuple[nn.Module, Callable]:
    """A model and a loss that are, up to rounding, the same functions of the same weights, and
    faster on this device.

    compiling: with torch.compile, where it works, which takes some seconds at first; any_length:
    for batches whose length varies (see compiled).
    """
    on_gpu = next(model.parameters()).is_cuda
    compiling = compiling and can_compile("cuda" if on_gpu else "cpu")
    if loss is token_loss:
        loss = fused_loss if compiling and on_gpu else chunked_loss
    return compiled(model, any_length) if compiling else by_hand(model), loss


def fit(model: nn.Module, batches: Batches, config: TrainConfig, loss: Callable = token_loss,
        count: Callable = count_targets, compiling: bool = False,
        shard: bool = False) -> list[dict[str, float]]:
    """Like train(): the same arguments, result and exceptions, and the same steps up to rounding.

    compiling: see faster. shard: with torchrun, split weights, gradients and optimizer state over
    the processes, for a model that does not fit on one device.
    """
    device = next(model.parameters()).device
    if device.type == "cpu":
        keep_memory()
    else:
        # cuDNN's attention makes a plan for each new length; the other kernels need none.
        torch.backends.cuda.enable_cudnn_sdp(False)
        if loss is token_loss:
            batches = Padded(batches, model.config.max_seq_len)
    with sharded(model) if shard else nullcontext(model) as held:
        forward, loss = faster(held, loss, compiling, any_length=True)
        history = train(forward, batches, config, loss, count, Processes(device))
    model.train()
    return history
