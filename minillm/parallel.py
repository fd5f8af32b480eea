"""One run on several processes, started by torchrun: each takes its rows of every batch, and gradients are added up. The result is
that of one process, to rounding (data parallelism; Li et al. 2020, "PyTorch Distributed")."""
import os
import sys
from contextlib import contextmanager, redirect_stdout

import torch
import torch.distributed as dist


def rank_and_world():
    """The number of this process and how many there are: 0 and 1 outside of `joined`."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


@contextmanager
def joined():
    """Within, the processes that torchrun started work together, each on a GPU of its own where there are any; only the first prints
    to stdout. Without torchrun: nothing."""
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        with open(os.devnull, "w") as nothing, redirect_stdout(nothing if dist.get_rank() else sys.stdout):
            yield
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


def add_gradients(params):
    """Replace each gradient by its sum over all processes, in one transfer. A parameter that has none counts as zeros."""
    if rank_and_world()[1] == 1:
        return
    params = list(params)
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params])
    dist.all_reduce(flat)
    for p, g in zip(params, flat.split([p.numel() for p in params])):
        p.grad = g.view_as(p)


def same_everywhere(params):
    """Copy the parameters of the first process to all others, in place."""
    if rank_and_world()[1] > 1:
        for p in params:
            dist.broadcast(p.data, 0)
