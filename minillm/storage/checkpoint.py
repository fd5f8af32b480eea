"""Writes, finds and resumes the checkpoints of a run, and makes Ctrl-C wait for the end of a step.

How often a checkpoint is written is a setting of minillm/train.py.
"""
import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from minillm.optim import AdamW
from minillm.storage.files import replacing, seal, unseal
from minillm.storage.shared import check_shared, full_tensor, rank_and_world, share_of


def state(model: nn.Module, optimizer: AdamW | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their names there.

    These are the weights and, if an optimizer is given, its two moments.
    """
    tensors = {f"model.{name}": p for name, p in model.named_parameters()}
    if optimizer:
        tensors |= {f"m.{name}": m for name, m in optimizer.m.items()}
        tensors |= {f"v.{name}": v for name, v in optimizer.v.items()}
    return tensors


def save_checkpoint(folder: str | Path, model: nn.Module, optimizer: AdamW, history: list[dict],
                    keep: int = 2, run: dict | None = None) -> Path:
    """Write folder/step-NNNNNNNN.safetensors and return its path.

    It holds the weights, the optimizer's state, the random state of the CPU, and as metadata the
    history, whose length is the position in the data, the settings of the run, and a SHA-256 over
    the file. Atomic, see files.replacing. Of the steps so far, the newest `keep` files are kept.
    If there are several processes, all must call this; the first one writes, and writes whole
    tensors, whether they are sharded or not.
    """
    folder, first = Path(folder), rank_and_world()[0] == 0
    path = folder / f"step-{len(history):08d}.safetensors"
    tensors = {"rng": torch.get_rng_state()}
    for name, tensor in state(model, optimizer).items():
        tensor = full_tensor(tensor.detach())
        if first:           # the other processes drop it before they get the next
            tensors[name] = tensor.cpu()
    if not first:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"history": json.dumps(history), "run": json.dumps(run)}
    data = seal({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    with replacing(path) as file:
        file.write(data)
    so_far = sorted(p for p in folder.glob("step-*.safetensors") if p <= path)
    for old in so_far[:-keep]:
        old.unlink()
    return path


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], list[dict], dict | None]:
    """The tensors, history and settings (None if not given) in a file of save_checkpoint.

    Raises ValueError naming the file if a byte has changed.
    """
    try:
        tensors, meta = unseal(Path(path).read_bytes())
        return tensors, json.loads(meta["history"]), json.loads(meta["run"])
    except (ValueError, KeyError) as error:
        raise ValueError(f"{Path(path).name} is damaged: {error}") from None


def restore(path: str | Path, tensors: dict[str, Tensor], history: list[dict], model: nn.Module,
            optimizer: AdamW | None = None) -> None:
    """Copy the tensors of a checkpoint into a model.

    If an optimizer is given, its state and the random state are restored, too. Raises ValueError,
    and changes nothing, if the tensors are of another model.
    """
    wanted = state(model, optimizer)
    unknown = [name for name in tensors if name.startswith("model.") and name not in wanted]
    for name in [*wanted, *unknown]:
        here = tuple(wanted[name].shape) if name in wanted else "missing"
        there = tuple(tensors[name].shape) if name in tensors else "missing"
        if here != there:
            raise ValueError(f"{Path(path).name} is of another model: "
                             f"{name} is {here} here, {there} there")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(share_of(tensors[name], tensor))
    if optimizer:
        optimizer.t = len(history)
        torch.set_rng_state(tensors["rng"])


def load_checkpoint(path: str | Path, model: nn.Module,
                    optimizer: AdamW | None = None) -> list[dict]:
    """Restore a model from a file of save_checkpoint; returns the history.

    If an optimizer is given, its state and the random state are restored, too. Raises ValueError
    naming the file if it is damaged or belongs to another model; nothing is changed then.
    """
    tensors, history, _ = read_checkpoint(path)
    restore(path, tensors, history, model, optimizer)
    return history


def resume(folder: str | Path, model: nn.Module, optimizer: AdamW,
           run: Callable[[int], dict] | None = None) -> list[dict]:
    """Load the newest intact checkpoint of a folder; returns its history, or [].

    run(n): the description of this run after n steps. Prints which files were refused. Raises
    ValueError if the checkpoint is of another model or, if the descriptions of both runs are known,
    of another run, naming what differs, and as check_shared does.
    """
    check_shared(folder, next(model.parameters()).device)
    for path in sorted(Path(folder).glob("step-*.safetensors"), reverse=True):
        try:
            tensors, history, there = read_checkpoint(path)
        except ValueError as error:
            print(f"checkpoint refused: {error}")
            continue
        here = run(len(history)) if run and there else there
        if here != there:
            names = [name for name in {**here, **there} if here.get(name) != there.get(name)]
            differ = "; ".join(f"{name} {there.get(name)} there, {here.get(name)} here"
                               for name in names)
            raise ValueError(f"{path} is of another run ({differ}): use another checkpoint folder")
        restore(path, tensors, history, model, optimizer)
        return history
    return []


@contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, so that a step can be finished and saved.

    The second Ctrl-C interrupts at once.
    """
    stop = threading.Event()

    def handler(*args):
        if stop.is_set():
            signal.default_int_handler(*args)
        stop.set()

    # only the main thread may set handlers
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
