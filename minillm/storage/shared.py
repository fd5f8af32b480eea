"""Files of several processes: who writes, whether all see the folder, who holds which part.

Without a process group of `torch.distributed`, there is one process, which has everything whole.
"""
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world() -> tuple[int, int]:
    """The number of this process and how many there are: 0 and 1 where no process group exists."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_reduce_sum(number: int | float, device: str | torch.device = "cpu") -> int | float:
    """The sum of a number over all processes. All of them must call this."""
    if rank_and_world()[1] == 1:
        return number
    total = torch.tensor(float(number), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return type(number)(total.item())


def is_share(tensor: Tensor) -> bool:
    """Whether a tensor is the share of one process, a DTensor (see `data_parallel.sharded`)."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor of which each process has a share, in every process (all must call
    this); any other tensor as it is."""
    return tensor.full_tensor() if is_share(tensor) else tensor


def share_of(tensor: Tensor, like: Tensor) -> Tensor:
    """The share of this process in a tensor that all have whole, divided as `like` is; if `like` is
    no share, the tensor as it is."""
    if not is_share(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def check_shared(folder: str | Path, device: str | torch.device = "cpu") -> None:
    """Raises ValueError, in all processes, unless the folder is on a disk that all of them share:
    the first writes there, the others read. All must call this."""
    rank, world = rank_and_world()
    if world == 1:
        return
    # The clock of the first process makes a name that is new everywhere.
    now = all_reduce_sum(time.time_ns() // 1000 if rank == 0 else 0, device)
    mark = Path(folder) / f"shared-{now}"
    if rank == 0:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    all_reduce_sum(0, device)                   # a barrier: the mark is there
    blind = all_reduce_sum(int(not mark.exists()), device)
    if rank == 0:
        mark.unlink()
    if blind:
        raise ValueError(f"{folder}: {blind} of {world} processes do not see there what the first "
                         "one writes. Name a folder on a disk that all hosts share (MINILLM_CACHE "
                         "for stages, checkpoint for a run)")
