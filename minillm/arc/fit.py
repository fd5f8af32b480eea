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


LENGTHS = 64      # on a GPU, a batch is as long as the next multiple of this


class Padded:
    """The batches of a source, inputs and targets (b, t), padded to a multiple of LENGTHS, or to
    `longest`, with targets that do not count.

    On a GPU a length that was not seen before costs time, for plans of its kernels, and batches of
    dialogues have hundreds of lengths. Chat was tuned at 5 steps per second with them (H100), and
    at 17 with few lengths and without cuDNN's attention (H200; see fit).
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
