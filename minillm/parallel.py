"""One run on several processes, started by torchrun (chapter 10).

Each process takes its rows of every batch, and gradients are added up. The result is that of one
process, to rounding (data parallelism; Li et al. 2020, "PyTorch Distributed"). `sharded` also
splits what they hold.
"""
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank_and_world() -> tuple[int, int]:
    """The number of this process and how many there are: 0 and 1 outside of `joined`."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def joined() -> Iterator[None]:
    """Within, the processes that torchrun started work together.

    Each has a GPU of its own where there are any, and only the first prints to stdout. Without
    torchrun, nothing changes. Raises ValueError if a host has GPUs, but fewer than processes.
    """
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    if torch.cuda.is_available():
        here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > gpus:
            raise ValueError(f"{here} processes on a host with {gpus} GPUs: start torchrun with "
                             f"--nproc-per-node {gpus}")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        with open(os.devnull, "w") as nothing:
            with redirect_stdout(nothing if dist.get_rank() else sys.stdout):
                yield
                # All leave together: a process that leaves early cuts off those that still receive.
                added_up(0, "cuda" if torch.cuda.is_available() else "cpu")
    finally:
        dist.destroy_process_group()


def my_rows(batch: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """This process's share of a batch, tensors with the same number of rows: every world-th row.

    Raises ValueError unless all processes get the same number. Otherwise rows that belong together,
    like the two answers of a pair of preferences, would be torn apart.
    """
    rank, world = rank_and_world()
    if len(batch[0]) % world:
        raise ValueError(f"{world} processes cannot share a batch of {len(batch[0])} rows: make "
                         f"batch_size a multiple of {world}")
    return tuple(z[rank::world] for z in batch)


def added_up(number: float, device: str | torch.device = "cpu") -> float:
    """The sum of a number over all processes."""
    if rank_and_world()[1] == 1:
        return number
    total = torch.tensor(float(number), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return type(number)(total.item())


def is_share(tensor: Tensor) -> bool:
    """Whether a tensor is the share of a process, a DTensor, see `sharded`."""
    return hasattr(tensor, "full_tensor")


def add_gradients(params: Iterable[Tensor]) -> None:
    """Replace each gradient by its sum over all processes, in one transfer.

    A parameter that has none counts as zeros. Those of sharded parameters were added up in the
    backward pass.
    """
    params = [p for p in params if not is_share(p)]
    if rank_and_world()[1] == 1 or not params:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for p, g in zip(params, flat.split([p.numel() for p in params])):
        p.grad = g.view_as(p)


def same_everywhere(params: Iterable[Tensor]) -> None:
    """Copy the parameters of the first process to all others, in place.

    Sharded ones are left alone: they belong to one model already.
    """
    if rank_and_world()[1] > 1:
        for p in params:
            if not is_share(p):
                dist.broadcast(p.data, 0)


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor of which each process has a share, in every process (all must call).

    Any other tensor is returned as it is.
    """
    return tensor.full_tensor() if is_share(tensor) else tensor


def share_of(tensor: Tensor, like: Tensor) -> Tensor:
    """The share of this process in a tensor that all have whole, divided as `like` is.

    If `like` is no share, the tensor is returned as it is.
    """
    if not is_share(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


@contextmanager
def sharded(model: nn.Module) -> Iterator[nn.Module]:
    """Within, a model to train in place of `model`, of which each process holds only its share.

    The share is a part of the rows of each tensor: of parameters, gradients and moments
    (Rajbhandari et al. 2020, "ZeRO", stage 3; Zhao et al. 2023, "PyTorch FSDP", here its second
    version). A block is put together for its own forward and backward pass only. With one process,
    the model itself.

    `model` is empty meanwhile, and has the weights, whole, in every process afterwards; also after
    a FloatingPointError or a Ctrl-C that ended the run in all processes at the same step. After any
    other error it stays empty, because the processes can exchange nothing more.
    """
    if rank_and_world()[1] == 1:
        yield model
        return
    same_everywhere(model.parameters())
    model.zero_grad()
    # A copy that shares the tensors, because fully_shard cannot be undone.
    shared = {id(z): z for z in (*model.parameters(), *model.buffers())}
    twin = split(deepcopy(model, shared))
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
    """Apply PyTorch's fully_shard to the blocks and to the rest, in place; returns the model.

    The blocks are what is in lists of modules.
    """
    # Imported here, because they take as long as half of minillm.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh(next(model.parameters()).device.type, (rank_and_world()[1],))
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = [block for modules in lists for block in modules]
    for unit in [*blocks, model]:
        fully_shard(unit, mesh=mesh)
        # A sum, where the default is a mean: see train.backward.
        unit.set_gradient_divide_factor(1.0)
        # gloo has no sum with a factor, and takes a mean for a sum.
        unit.set_force_sum_reduction_for_comms(True)
    return model


def fill(model: nn.Module, twin: nn.Module) -> None:
    """Give each parameter of `model` the whole of what the processes share in `twin`."""
    for p, share in zip(model.parameters(), twin.parameters(), strict=True):
        p.data = whole(share.detach())


def check_shared(folder: str | Path, device: str | torch.device = "cpu") -> None:
    """Raises ValueError, in all processes, unless the folder is on a disk that all of them share.

    The first writes there, the others read. All must call.
    """
    rank, world = rank_and_world()
    if world == 1:
        return
    # A name that is new everywhere: the time, in microseconds, of the first process.
    stamp = added_up(time.time_ns() // 1000 if rank == 0 else 0, device)
    mark = Path(folder) / f"shared-{stamp}"
    if rank == 0:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    added_up(0, device)
    blind = added_up(int(not mark.exists()), device)
    if rank == 0:
        mark.unlink()
    if blind:
        raise ValueError(f"{folder}: {blind} of {world} processes do not see there what the first "
                         "one writes. Name a folder on a disk that all hosts share (MINILLM_CACHE "
                         "for stages, checkpoint for a run)")
