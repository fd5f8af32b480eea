"""Stories and dialogues in great numbers are written and encoded by several processes, where there
are cores for them. The size gpu needs 150,000, which takes one core a minute and more."""
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

CORES, LEAST = 4, 5000       # with fewer cores or calls, starting processes does not pay


def cores() -> int:
    """How many cores this process may use; 1 where processes cannot be forked."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def spread(function: Callable, items: Sequence) -> list:
    """[function(item) for item in items], where no call depends on another.

    function: one that can be pickled (of a module, or a partial of one), and does not use torch.
    """
    if cores() < CORES or len(items) < LEAST:
        return [function(item) for item in items]
    # Forked, and not started anew: a script that builds a stage would be run again by each process.
    with ProcessPoolExecutor(cores(), get_context("fork")) as processes:
        return list(processes.map(function, items, chunksize=len(items) // (8 * cores()) + 1))
