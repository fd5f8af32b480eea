"""Checkpoints: files from which a killed run goes on as if nothing had happened, and a Ctrl-C that waits for the end of a step."""
import json
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import torch

from minillm.storage.files import replacing, seal, unseal
from minillm.storage.shared import check_shared, full_tensor, rank_and_world, share_of


def state(model, optimizer=None):
    """The tensors of a checkpoint by their names there: weights, and where an optimizer is given its two moments."""
    moments = (("m", optimizer.m), ("v", optimizer.v)) if optimizer else ()
    return {f"model.{n}": p for n, p in model.named_parameters()} | {f"{k}.{n}": z for k, zs in moments for n, z in zs.items()}


def save_checkpoint(folder, model, optimizer, history, keep=2, run=None):
    """Write folder/step-NNNNNNNN.safetensors: weights, optimizer state, random state of the CPU, and as metadata the
    history, whose length is the position in the data, the settings of the run, and a SHA-256 over the file.

    Atomic, see files.replacing. Of the steps so far, the newest `keep` files are kept. Returns the path. Of several processes all
    must call, and the first writes: whole tensors, whether sharded or not.
    """
    folder, first = Path(folder), rank_and_world()[0] == 0
    path = folder / f"step-{len(history):08d}.safetensors"
    tensors = {"rng": torch.get_rng_state()}
    for n, z in state(model, optimizer).items():
        z = full_tensor(z.detach())
        tensors |= {n: z.cpu()} if first else {}           # the others drop it before they get the next
    if not first:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    data = seal({n: t.contiguous() for n, t in tensors.items()}, {"history": json.dumps(history), "run": json.dumps(run)})
    with replacing(path) as file:
        file.write(data)
    for old in sorted(p for p in folder.glob("step-*.safetensors") if p <= path)[:-keep]:
        old.unlink()
    return path


def read_checkpoint(path):
    """The tensors, history and settings in a file of save_checkpoint. Raises ValueError naming it if a byte changed."""
    try:
        tensors, meta = unseal(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{Path(path).name} is damaged: {error}") from None
    return tensors, json.loads(meta["history"]), json.loads(meta["run"])


def restore(path, tensors, history, model, optimizer=None):
    """Copy the tensors of a checkpoint into model, and where an optimizer is given into that and the random state.

    Raises ValueError, and changes nothing, if they are of another model.
    """
    wanted = state(model, optimizer)
    for n in wanted | {n: 0 for n in tensors if n.startswith("model.")}:
        here, there = (tuple(z[n].shape) if n in z else "missing" for z in (wanted, tensors))
        if here != there:
            raise ValueError(f"{Path(path).name} is of another model: {n} is {here} here, {there} there")
    with torch.no_grad():
        for n, p in wanted.items():
            p.copy_(share_of(tensors[n], p))
    if optimizer:
        optimizer.t = len(history)
        torch.set_rng_state(tensors["rng"])


def load_checkpoint(path, model, optimizer=None):
    """Restore model (and optimizer and random state) from a file of save_checkpoint; returns the history.

    Raises ValueError naming the file if it is damaged or belongs to another model; nothing is changed then.
    """
    tensors, history, _ = read_checkpoint(path)
    restore(path, tensors, history, model, optimizer)
    return history


def resume(folder, model, optimizer, run=None):
    """Load the newest intact checkpoint of a folder, saying which ones were refused; returns its history, or [].

    Raises ValueError if it is of another model or, where both know, of a run with other settings, and as check_shared.
    """
    check_shared(folder, next(model.parameters()).device)
    for path in sorted(Path(folder).glob("step-*.safetensors"), reverse=True):
        try:
            tensors, history, there = read_checkpoint(path)
        except ValueError as error:
            print(f"checkpoint refused: {error}")
            continue
        if run and there and run != there:
            differ = [f"{k} {there.get(k)} there, {v} here" for k, v in run.items() if there.get(k) != v]
            raise ValueError(f"{path} is of another run ({'; '.join(differ)}): use another checkpoint folder")
        restore(path, tensors, history, model, optimizer)
        return history
    return []


@contextmanager
def stop_signal():
    """An event that the first Ctrl-C sets, so that a step can be finished and saved. The second interrupts at once."""
    stop = threading.Event()

    def handler(*args):
        if stop.is_set():
            signal.default_int_handler(*args)
        stop.set()

    if threading.current_thread() is not threading.main_thread():      # only the main thread may set handlers
        yield stop
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
