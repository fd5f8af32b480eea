"""Writes and encodes large numbers of stories and dialogues with several processes, if there are
enough cores. The size gpu needs 150,000 of them, more than a minute of work for one core."""
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

CORES, LEAST = 4, 5000       # with fewer cores or calls, starting processes does not pay


def cores() -> int:
    """How many cores this process may use; 1 where the system does not tell (macOS, Windows)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def spread(function: Callable, items: Sequence) -> list:
    """[function(item) for item in items], where no call depends on another.

    function: one that can be pickled (defined in a module, or a partial of such a function) and
    does not use torch.
    """
    if cores() < CORES or len(items) < LEAST:
        return [function(item) for item in items]
    # Forked, not spawned: each spawned process would run the script that builds a stage again.
    with ProcessPoolExecutor(cores(), get_context("fork")) as processes:
        return list(processes.map(function, items, chunksize=len(items) // (8 * cores()) + 1))
