"""One run on several processes, started by torchrun: each takes its rows of every batch, and gradients are added up. The result is
that of one process, to rounding (data parallelism; Li et al. 2020, "PyTorch Distributed"). `sharded` also splits what they hold."""
import os
import sys
import time
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn


def rank_and_world():
    """The number of this process and how many there are: 0 and 1 outside of `joined`."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


@contextmanager
def joined():
    """Within, the processes that torchrun started work together, each on a GPU of its own where there are any; only the first prints
    to stdout. Without torchrun: nothing. Raises ValueError if a host has GPUs, but fewer than processes."""
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    if torch.cuda.is_available():
        here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > gpus:
            raise ValueError(f"{here} processes on a host with {gpus} GPUs: start torchrun with --nproc-per-node {gpus}")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        with open(os.devnull, "w") as nothing, redirect_stdout(nothing if dist.get_rank() else sys.stdout):
            yield
            added_up(0, "cuda" if torch.cuda.is_available() else "cpu")          # who leaves early cuts off those that still receive
    finally:
        dist.destroy_process_group()


def my_rows(batch):
    """This process's share of a batch, a tuple of tensors with as many rows each: every world-th row. Raises ValueError unless
    all get as many: rows that belong together, the two answers of a pair of preferences, would be torn apart."""
    rank, world = rank_and_world()
    if len(batch[0]) % world:
        raise ValueError(f"{world} processes cannot share a batch of {len(batch[0])} rows: make batch_size a multiple of {world}")
    return tuple(z[rank::world] for z in batch)


def added_up(number, device="cpu"):
    """The sum of a number over all processes."""
    if rank_and_world()[1] == 1:
        return number
    total = torch.tensor(float(number), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return type(number)(total.item())


def is_share(tensor):
    """Whether a tensor is the share of a process, a DTensor, see `sharded`."""
    return hasattr(tensor, "full_tensor")


def add_gradients(params):
    """Replace each gradient by its sum over all processes, in one transfer. A parameter that has none counts as zeros. Those of
    sharded parameters were added up in the backward pass."""
    params = [p for p in params if not is_share(p)]
    if rank_and_world()[1] == 1 or not params:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params])
    dist.all_reduce(flat)
    for p, g in zip(params, flat.split([p.numel() for p in params])):
        p.grad = g.view_as(p)


def same_everywhere(params):
    """Copy the parameters of the first process to all others, in place. Sharded ones are of one model already."""
    if rank_and_world()[1] > 1:
        for p in params:
            if not is_share(p):
                dist.broadcast(p.data, 0)


def whole(tensor):
    """The whole tensor of which each process has a share, in every process (all must call); any other tensor as it is."""
    return tensor.full_tensor() if is_share(tensor) else tensor


def share_of(tensor, like):
    """The share of this process in a tensor that all have whole, divided as `like` is; if `like` is no share, the tensor as it is."""
    if not is_share(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


@contextmanager
def sharded(model):
    """Within, a model to train in place of `model`, of whose parameters, gradients and moments each process holds its share, a part of
    the rows of each tensor (Rajbhandari et al. 2020, "ZeRO", stage 3; Zhao et al. 2023, "PyTorch FSDP", here its second version). A block
    is put together for its own forward and backward pass only. With one process, the model itself.

    `model` is empty meanwhile, and has the weights, whole, in every process afterwards; also after a FloatingPointError or a Ctrl-C
    that ended the run in all processes at the same step. After any other error it stays empty: the processes cannot exchange more.
    """
    if rank_and_world()[1] == 1:
        yield model
        return
    same_everywhere(model.parameters())
    model.zero_grad()
    twin = split(deepcopy(model, {id(z): z for z in (*model.parameters(), *model.buffers())}))     # fully_shard cannot be undone
    for p in model.parameters():
        p.data = p.data.new_empty(0)
    try:
        yield twin
    except (FloatingPointError, KeyboardInterrupt) as stopped:
        if stopped.args:                     # a second Ctrl-C has none
            fill(model, twin)
        raise
    fill(model, twin)


def split(model):
    """Apply PyTorch's fully_shard to what is in lists of modules, the blocks, and to the rest, in place; returns the model."""
    from torch.distributed.device_mesh import init_device_mesh          # imported here: they take as long as half of minillm
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh(next(model.parameters()).device.type, (rank_and_world()[1],))
    for unit in [*(block for blocks in model.modules() if isinstance(blocks, nn.ModuleList) for block in blocks), model]:
        fully_shard(unit, mesh=mesh)
        unit.set_gradient_divide_factor(1.0)              # a sum, where the default is a mean: see train.backward
        unit.set_force_sum_reduction_for_comms(True)      # gloo has no sum with a factor, and takes a mean for a sum
    return model


def fill(model, twin):
    """Give each parameter of `model` the whole of what the processes share in `twin`."""
    for p, share in zip(model.parameters(), twin.parameters(), strict=True):
        p.data = whole(share.detach())


def check_shared(folder, device="cpu"):
    """Raises ValueError, in all processes, unless the folder is on a disk that all of them share: the first writes there, the others
    read. All must call."""
    rank, world = rank_and_world()
    if world == 1:
        return
    mark = Path(folder) / f"shared-{added_up(time.time_ns() // 1000 if rank == 0 else 0, device)}"       # a name that is new everywhere
    if rank == 0:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    added_up(0, device)
    blind = added_up(int(not mark.exists()), device)
    if rank == 0:
        mark.unlink()
    if blind:
        raise ValueError(f"{folder}: {blind} of {world} processes do not see there what the first one writes. Name a folder on a disk "
                         "that all hosts share (MINILLM_CACHE for stages, checkpoint for a run)")
