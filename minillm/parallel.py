"""Data parallelism under torchrun: each process takes its rows, and gradients are summed.

The result is that of one process, to rounding (Li et al. 2020, "PyTorch Distributed"). `sharded`
also splits what the processes hold. Written by hand until chapter 10 exports it.
"""
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillm.optim import AdamW, Muon
from minillm.storage.shared import all_reduce_sum, full_tensor, is_share, rank_and_world, share_of
from minillm.train import OneProcess, TrainConfig


@contextmanager
def joined() -> Iterator[None]:
    """Within, the processes that torchrun started work together, each on a GPU of its own where
    there are any; only the first prints to stdout. Without torchrun: nothing. Raises ValueError if
    a host has GPUs, but fewer than processes."""
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > gpus:
            raise ValueError(f"{here} processes on a host with {gpus} GPUs: start torchrun with "
                             f"--nproc-per-node {gpus}")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        with (open(os.devnull, "w") as nothing,
              redirect_stdout(nothing if dist.get_rank() else sys.stdout)):
            yield
            # A barrier: a process that leaves early cuts off those that still receive.
            all_reduce_sum(0, "cuda" if on_gpu else "cpu")
    finally:
        dist.destroy_process_group()


def my_rows(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """This process's share of a batch, a tuple of tensors with as many rows each: every world-th
    row.

    Raises ValueError unless all get as many: rows that belong together, the two answers of a pair
    of preferences, would be torn apart."""
    rank, world = rank_and_world()
    if len(batch[0]) % world:
        raise ValueError(f"{world} processes cannot share a batch of {len(batch[0])} rows: make "
                         f"batch_size a multiple of {world}")
    return tuple(z[rank::world] for z in batch)


def add_gradients(params: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its sum over all processes, in one transfer. A parameter that has
    none counts as zeros. Those of sharded parameters were added up in the backward pass."""
    params = [p for p in params if not is_share(p)]
    if rank_and_world()[1] == 1 or not params:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for p, g in zip(params, flat.split([p.numel() for p in params])):
        p.grad = g.view_as(p)


def broadcast(params: Iterable[nn.Parameter]) -> None:
    """Copy the parameters of the first process to all others, in place. Sharded ones are of one
    model already."""
    if rank_and_world()[1] > 1:
        for p in params:
            if not is_share(p):
                dist.broadcast(p.data, 0)


class Processes(OneProcess):
    """The group that train() needs for a run on several processes, whether sharded or not.

    device: where the numbers are added up, that of the model.
    """

    def __init__(self, device: str | torch.device = "cpu"):
        self.device = device

    def optimizer(self, model: nn.Module, config: TrainConfig) -> AdamW:
        """As OneProcess's, with a Muon that can handle shares of matrices."""
        broadcast(model.parameters())
        return super().optimizer(model, config, ShardedMuon)

    def rows(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """See my_rows."""
        return my_rows(batch)

    def sum(self, number: int | float) -> int | float:
        """See all_reduce_sum."""
        return all_reduce_sum(number, self.device)

    def sum_gradients(self, params: Iterable[nn.Parameter]) -> None:
        """See add_gradients."""
        add_gradients(params)

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """The joint norm of gradients of which each process may hold a share."""
        return full_tensor(super().norm(gradients))


class ShardedMuon(Muon):
    """Muon for matrices of which each process holds a share: it orthogonalizes whole ones."""

    def orthogonal(self, matrices: list[Tensor]) -> list[Tensor]:
        """As Muon's; the results are shares where the matrices are."""
        whole = super().orthogonal([full_tensor(matrix) for matrix in matrices])
        return [share_of(update, matrix) for update, matrix in zip(whole, matrices)]


@contextmanager
def sharded(model: nn.Module) -> Iterator[nn.Module]:
    """Within, a model to train in place of `model`, of whose parameters, gradients and moments each
    process holds its share, a part of the rows of each tensor (Rajbhandari et al. 2020, "ZeRO",
    stage 3; Zhao et al. 2023, "PyTorch FSDP", here its second version). A block is put together for
    its own forward and backward pass only. With one process, the model itself.

    `model` is empty meanwhile, and has the weights, whole, in every process afterwards; also after
    a FloatingPointError or a Ctrl-C that ended the run in all processes at the same step. After any
    other error it stays empty: the processes cannot exchange more.
    """
    if rank_and_world()[1] == 1:
        yield model
        return
    broadcast(model.parameters())
    model.zero_grad()
    kept = {id(z): z for z in (*model.parameters(), *model.buffers())}
    twin = split(deepcopy(model, kept))                     # fully_shard cannot be undone
    for p in model.parameters():
        p.data = p.data.new_empty(0)
    try:
        yield twin
    except (FloatingPointError, KeyboardInterrupt) as stopped:
        if stopped.args:                     # a second Ctrl-C has none
            fill(model, twin)
        raise
    fill(model, twin)


def split(model: nn.Module) -> nn.Module:
    """Apply PyTorch's fully_shard to what is in lists of modules, the blocks, and to the rest, in
    place; returns the model."""
    # Imported here: they take as long as half of minillm.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh(next(model.parameters()).device.type, (rank_and_world()[1],))
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for unit in [*(block for blocks in lists for block in blocks), model]:
        fully_shard(unit, mesh=mesh)
        # A sum, where the default is a mean (see train.backward); gloo has no sum with a factor.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    return model


def fill(model: nn.Module, twin: nn.Module) -> None:
    """Give each parameter of `model` the whole of what the processes share in `twin`."""
    for p, share in zip(model.parameters(), twin.parameters(), strict=True):
        p.data = full_tensor(share.detach())
