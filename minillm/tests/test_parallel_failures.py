"""A process that dies or hangs: the others end in time, with a sentence, and what was saved is
intact."""
import json
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from minillm.collectives import torchrun
from minillm.data_parallel import Processes, joined, reporting_lost_processes
from minillm.model import Llama, LlamaConfig
from minillm.storage.shared import rank_and_world
from minillm.tests import parallel_runs as runs
from minillm.train import TrainConfig, load_checkpoint, train

STEP = 4        # in which it happens, after the checkpoint of four steps:
SAVED = "step-00000004.safetensors"


class Batches:
    def __init__(self, what=None, folder=None):
        self.what, self.folder = what, folder

    def __getitem__(self, i):
        if self.what and i == STEP and rank_and_world()[0] == 1:
            # The first process, which is ended soon after the second, may still be saving.
            while not (self.folder / SAVED).exists():
                time.sleep(0.01)
            self.what()
        return runs.batch(i)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    time.sleep(60)


def fail():
    raise OSError("the disk of this host is full")


def config(folder):
    return TrainConfig(steps=6, warmup=2, precision="float32", bar=False, checkpoint=str(folder),
                       checkpoint_every=2)


def in_each(what, folder, patience):
    """Train until `what` happens on the second of two processes; leaves what each said at its
    end."""
    try:
        with joined(patience):
            rank = rank_and_world()[0]
            train(runs.build(exact=False), Batches(what, folder), config(folder), group=Processes())
    except OSError as error:
        (folder / f"said{rank}").write_text(json.dumps([type(error).__name__, str(error)]))
        raise


@pytest.mark.parametrize("what, patience", [(die, 60), (hang, 4), (fail, 60)])
def test_the_others_end_with_a_sentence_and_the_checkpoint_is_intact(what, patience, tmp_path):
    program = f"""
from pathlib import Path
from minillm.tests import test_parallel_failures as test
test.in_each(test.{what.__name__}, Path({str(tmp_path)!r}), {patience})
"""
    done = torchrun(program, 2, seconds=50)
    assert done.returncode != 0
    kind, said = json.loads((tmp_path / "said0").read_text())
    assert kind == "ConnectionError"
    assert said.startswith("process 0 of 2 lost the others: one has ended or does not answer.")
    if what is fail:
        assert json.loads((tmp_path / "said1").read_text()) == [
            "OSError", "the disk of this host is full"]
    [left] = {path.name for path in tmp_path.glob("step-*")} - {"step-00000002.safetensors"}
    assert left == SAVED and load_file(tmp_path / left)
    model = Llama(LlamaConfig(**runs.SHAPE))
    history = load_checkpoint(tmp_path / left, model)
    unbroken = runs.build(exact=False)
    whole = train(unbroken, Batches(), TrainConfig(steps=6, warmup=2, precision="float32",
                                                   bar=False))
    assert [h["loss"] for h in history] == pytest.approx([h["loss"] for h in whole[:4]], rel=1e-4)
    train(model, Batches(), config(tmp_path))               # goes on, in one process
    for p, q in zip(model.parameters(), unbroken.parameters()):
        torch.testing.assert_close(p, q, atol=1e-3, rtol=1e-3)


def test_the_signal_to_end_is_a_sentence_within_and_the_former_handler_returns():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ConnectionError, match="process 0 of 1 lost the others"):
        with reporting_lost_processes():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("message, kind", [
    ("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer",
     ConnectionError), ("mat1 and mat2 shapes cannot be multiplied", RuntimeError)])
def test_only_errors_of_the_connection_are_renamed(message, kind):
    with pytest.raises(kind) as error, reporting_lost_processes():
        raise RuntimeError(message)
    assert ("lost the others" in str(error.value)) == (kind is ConnectionError)
