"""What the notebook on training cannot show about checkpoints.

Runs that are killed or interrupted, and files that are damaged, foreign or old.
"""
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors import safe_open
from torch import nn

from minillm.dpo import dpo_loss, ipo_loss, preference_loss
from minillm.fast_train import by_hand, chunked_loss, fused_loss
from minillm.lora import add_lora
from minillm.storage.checkpoint import read_checkpoint, resume
from minillm.storage.files import SEAL, seal
from minillm.model import Llama, LlamaConfig
from minillm.sft import distill_loss
from minillm.tests.test_train import TINY, Batches, names, settings, tiny, weights
from minillm.optim import AdamW
from minillm.train import (describe_loss, hash_batch, load_checkpoint, save_checkpoint, token_loss,
                           train)


# ---- killed runs

KILLED = """
import os, random, signal, sys, time
import torch
from minillm import train as training
from minillm.tests.test_train import Batches, settings, tiny, weights

folder, precision, seed = sys.argv[1:]
config = dict(steps=40, precision=precision, accumulate=2)
chance, save = random.Random(int(seed)), os.replace

def kill(*args):
    os.kill(os.getpid(), signal.SIGKILL)

# in a process of its own; where: ("batch", i), ("save", i), a time in seconds, or None
def run(where, checkpoint):
    if pid := os.fork():
        if isinstance(where, float):
            time.sleep(where)
            os.kill(pid, signal.SIGKILL)
        return os.waitpid(pid, 0)[1]
    try:
        kind, i = where if isinstance(where, tuple) else (None, 0)
        if kind == "save":       # with the temporary file written, but not renamed
            os.replace = lambda a, b: kill() if f"{i:08d}" in str(a) else save(a, b)
        model = tiny()
        training.train(model, Batches({i: kill} if kind == "batch" else {}), settings(
            **config, checkpoint=checkpoint, checkpoint_every=3))
        torch.save(weights(model), checkpoint + ".pt")
    finally:
        os._exit(0)

assert run(None, folder + "/whole") == 0
batches, saves = sorted(chance.sample(range(8, 79), 4)), [chance.randrange(1, 13) * 3]
places = [("batch", i) for i in batches] + [("save", i) for i in saves]

def when(place):      # step 9 is saved, then reads batch 18
    kind, i = place
    return (i / 2, 1) if kind == "batch" else (i, 0)

places.sort(key=when)
for place in places:
    assert run(place, folder + "/killed") == signal.SIGKILL, place
for _ in range(3):
    run(chance.uniform(0, 0.1), folder + "/killed")
assert run(None, folder + "/killed") == 0
a, b = (torch.load(f"{folder}/{name}.pt") for name in ("whole", "killed"))
assert a.isfinite().all() and torch.equal(a, b), (a - b).abs().max()
print("equal after", places)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="SIGKILL and fork are not of this system")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(tmp_path, precision):
    seed = random.randrange(10**6)
    command = [sys.executable, "-c", KILLED, str(tmp_path), precision, str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    assert "equal after" in done.stdout


def test_dropout_draws_the_same_after_a_resume(tmp_path):
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.llama, self.drop = tiny(), nn.Dropout(0.5)

        def forward(self, ids):
            return self.drop(self.llama(ids))

    whole, parts = Dropping(), Dropping()
    torch.manual_seed(1)
    train(whole, Batches(), settings())
    torch.manual_seed(1)
    saved = settings(checkpoint=str(tmp_path), checkpoint_every=4)
    with pytest.raises(ZeroDivisionError):
        train(parts, Batches({9: lambda: 1 / 0}), saved)
    torch.manual_seed(2)
    train(parts, Batches(), saved)
    assert torch.equal(weights(whole), weights(parts))


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to another process")
def test_ctrl_c_finishes_the_step_and_the_same_call_goes_on(tmp_path):
    whole, stopped = tiny(), tiny()
    train(whole, Batches(), settings())
    interrupt = Batches({7: lambda: os.kill(os.getpid(), signal.SIGINT)})
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="after step 7; saved"):
        train(stopped, interrupt, settings(checkpoint=str(tmp_path)))
    assert names(tmp_path) == ["step-00000008.safetensors"]
    assert signal.getsignal(signal.SIGINT) is before
    history = train(stopped, Batches(), settings(checkpoint=str(tmp_path)))
    assert [h["step"] for h in history] == list(range(12))
    assert torch.equal(weights(whole), weights(stopped))
    seconds = [h["seconds"] for h in history]
    assert seconds == sorted(seconds), "the clock goes on where it stopped"


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to another process")
def test_second_ctrl_c_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt, match="after step 2$"):
        train(tiny(), Batches({2: lambda: os.kill(os.getpid(), signal.SIGINT)}), settings())
    twice = Batches({2: lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]})
    with pytest.raises(KeyboardInterrupt) as stop:
        train(tiny(), twice, settings())
    assert not stop.value.args, "stopped by train instead of at once"


def test_train_in_another_thread():
    result = []
    thread = threading.Thread(target=lambda: result.append(train(tiny(), Batches(), settings())))
    thread.start()
    thread.join()
    assert len(result[0]) == 12


# ---- damaged, foreign and old checkpoints

def checkpointed(folder, model=None, **changes):
    model = model or tiny()
    config = settings(checkpoint=str(folder), checkpoint_every=4, **changes)
    return model, train(model, Batches(), config)


def test_two_newest_are_kept_and_a_finished_run_is_not_repeated(tmp_path):
    model, history = checkpointed(tmp_path)
    assert names(tmp_path) == ["step-00000008.safetensors", "step-00000012.safetensors"]
    again, same = checkpointed(tmp_path)
    assert same == history and torch.equal(weights(model), weights(again))


def test_every_changed_byte_and_every_cut_is_refused(tmp_path):
    model, _ = checkpointed(tmp_path)
    path, chance = tmp_path / "step-00000012.safetensors", random.Random(0)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    untouched = tiny(1)
    expected = weights(untouched)
    checksum = data.index(b'"sha256"')
    places = [*range(10), checksum, checksum + 20, header - 1, header, len(data) - 1]
    places += [chance.randrange(header) for _ in range(100)]
    places += [chance.randrange(len(data)) for _ in range(100)]
    damaged = []
    for i in places:
        changed = bytes([data[i] ^ chance.randrange(1, 256)])
        damaged.append(data[:i] + changed + data[i + 1:])
    cuts = [0, 1, 8, 100, header, len(data) - 1]
    cuts += [chance.randrange(len(data)) for _ in range(20)]
    damaged += [data[:i] for i in cuts]
    for content in damaged + [data + b"\0"]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="step-00000012.safetensors is damaged"):
            load_checkpoint(path, untouched, AdamW(untouched))
    assert torch.equal(weights(untouched), expected)
    path.write_bytes(data)
    load_checkpoint(path, untouched)
    assert torch.equal(weights(untouched), weights(model))


def test_the_checkpoint_before_a_damaged_one_is_used(tmp_path, capsys):
    model, history = checkpointed(tmp_path)
    newest = tmp_path / "step-00000012.safetensors"
    good = newest.read_bytes()
    newest.write_bytes(good[:-1])
    again, same = checkpointed(tmp_path)
    assert capsys.readouterr().out == (
        "checkpoint refused: step-00000012.safetensors is damaged: "
        "its checksum does not match its content\n")
    assert torch.equal(weights(model), weights(again))
    assert [h["loss"] for h in same] == [h["loss"] for h in history]
    load_checkpoint(newest, again)
    assert names(tmp_path) == ["step-00000008.safetensors", "step-00000012.safetensors"]


def test_a_damaged_later_checkpoint_does_not_push_out_good_ones(tmp_path):
    model, optimizer = tiny(), AdamW(tiny())
    (tmp_path / "step-00000099.safetensors").write_bytes(b"not a checkpoint")
    for steps in range(1, 5):
        save_checkpoint(tmp_path, model, optimizer, [{}] * steps)
    assert names(tmp_path) == [f"step-{i:08d}.safetensors" for i in (3, 4, 99)]


def test_all_damaged_begins_anew(tmp_path, capsys):
    for i in (1, 2):
        (tmp_path / f"step-{i:08d}.safetensors").write_bytes(os.urandom(50))
    model = tiny()
    assert resume(tmp_path, model, AdamW(model)) == []
    assert capsys.readouterr().out.count("refused") == 2
    assert resume(tmp_path / "nowhere", model, AdamW(model)) == []


def test_checkpoint_of_another_model_changes_nothing(tmp_path):
    checkpointed(tmp_path)
    path, wide = tmp_path / "step-00000012.safetensors", Llama(LlamaConfig(17, 16, 1, 2, 1, 16, 16))
    deep, before = Llama(LlamaConfig(17, 8, 2, 2, 1, 16, 16)), weights(wide)
    message = (r"of another model: model.model.embed_tokens.weight is "
               r"\(17, 16\) here, \(17, 8\) there")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path, wide)
    with pytest.raises(ValueError, match="here, missing there"):
        load_checkpoint(path, deep)
    save_checkpoint(tmp_path, deep, AdamW(deep), [{}])
    with pytest.raises(ValueError, match="missing here"):
        load_checkpoint(tmp_path / "step-00000001.safetensors", tiny())
    assert torch.equal(weights(wide), before)


@pytest.mark.parametrize("changes, expected", [
    ({"lr": 2e-2}, "lr 0.01 there, 0.02 here"),
    ({"steps": 20}, "steps 12 there, 20 here"),
])
def test_checkpoint_of_another_run_is_not_gone_on_with(tmp_path, changes, expected):
    checkpointed(tmp_path)
    with pytest.raises(ValueError, match=expected):
        checkpointed(tmp_path, **changes)


class Changed(Batches):
    """The batches with these numbers are others."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers = numbers

    def __getitem__(self, i):
        return super().__getitem__(i + 100 * (i in self.numbers))


@pytest.mark.parametrize("numbers, name", [
    (range(12), "batches so far"), ([0], "batches so far"), ([1], "batches so far"),
    ([7], "batches so far"), ([11], "last batch")])
def test_checkpoint_of_other_data_is_not_gone_on_with(tmp_path, numbers, name):
    checkpointed(tmp_path)
    (tmp_path / "step-00000012.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"another run \({name} \w+ there, \w+ here"):
        train(tiny(), Changed(numbers), settings(checkpoint=str(tmp_path)))
    assert names(tmp_path) == ["step-00000008.safetensors"]


def test_other_shapes_of_the_same_bytes_are_other_data():
    ids = torch.arange(12)
    flat, square = (hash_batch((ids.view(shape), ids)) for shape in ((12,), (3, 4)))
    assert flat != square != hash_batch((ids.view(3, 4).int(), ids))
    assert hash_batch((torch.tensor(1.0).bfloat16(), ids[::2]))


def adapter(alpha):
    return add_lora(tiny(), 2, alpha)


@pytest.mark.parametrize("first, second, name", [
    (lambda: tiny(), lambda: Llama(replace(TINY, rope_theta=5e5)), "rope_theta of the model"),
    (lambda: tiny(), lambda: Llama(replace(TINY, norm_eps=1e-3)), "norm_eps of the model"),
    (lambda: adapter(4), lambda: adapter(8), "alpha of the model 4 there, 8 here"),
    (lambda: nn.Sequential(tiny(), nn.Dropout(0.1)), lambda: nn.Sequential(tiny(), nn.Dropout(0.2)),
     "p of the model 0.1 there, 0.2 here")])
def test_a_model_with_other_settings_is_not_gone_on_with(tmp_path, first, second, name):
    """None of them is a weight, so the weights in the checkpoint would fit."""
    checkpointed(tmp_path, model=first())
    with pytest.raises(ValueError, match=rf"another run \({name}"):
        checkpointed(tmp_path, model=second())


def scaled(factor):
    def loss(model, inputs, targets, precision):
        return factor * token_loss(model, inputs, targets, precision)
    return loss


def test_another_loss_is_not_gone_on_with(tmp_path):
    losses = [token_loss, scaled(2.0), scaled(3.0), partial(scaled, 2.0)(), distill_loss(tiny(), 2),
              distill_loss(tiny(), 3)]
    found = [describe_loss(loss) for loss in losses]
    assert found[1] == found[3] and len(set(found)) == 5
    assert describe_loss(partial(token_loss, precision="bf16")) != describe_loss(token_loss)
    assert describe_loss(preference_loss(ipo_loss)) != describe_loss(preference_loss(dpo_loss))
    # the faster ones, which another machine may use, are the same loss
    assert {describe_loss(loss) for loss in (chunked_loss, fused_loss)} == {found[0]}
    train(tiny(), Batches(), settings(checkpoint=str(tmp_path)), scaled(2.0))
    with pytest.raises(ValueError, match=r"another run \(loss .* 2.0 there, .* 3.0 here\)"):
        train(tiny(), Batches(), settings(checkpoint=str(tmp_path)), scaled(3.0))


class Scaled:
    """A loss whose setting is an attribute."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, model, inputs, targets, precision):
        return self.factor * token_loss(model, inputs, targets, precision)


@pytest.mark.parametrize("make", [Scaled, lambda factor: Scaled(factor).__call__])
def test_a_loss_that_keeps_its_settings_in_attributes(make, tmp_path):
    train(tiny(), Batches(), settings(checkpoint=str(tmp_path)), make(2.0))
    with pytest.raises(ValueError, match=r"another run \(loss Scaled.* 2.0 there, .* 3.0 here\)"):
        train(tiny(), Batches(), settings(checkpoint=str(tmp_path)), make(3.0))
    assert len(train(tiny(), Batches(), settings(checkpoint=str(tmp_path)), make(2.0))) == 12


def test_blocks_by_hand_go_on_with_the_run_of_plain_ones(tmp_path):
    """So that a run may move to a machine that trains in another way."""
    checkpointed(tmp_path)
    (tmp_path / "step-00000012.safetensors").unlink()
    history = train(by_hand(tiny()), Batches(), settings(checkpoint=str(tmp_path)), chunked_loss)
    assert len(history) == 12


def test_checkpoint_holds_plain_tensors_and_exact_history(tmp_path):
    model, history = checkpointed(tmp_path)
    with safe_open(tmp_path / "step-00000012.safetensors", "pt") as f:
        assert json.loads(f.metadata()["history"]) == history
        keys, state = set(f.keys()), model.state_dict()
        kinds = "model", "m", "v"
        assert keys == {"rng"} | {f"{kind}.{name}" for kind in kinds for name in state}


@pytest.mark.parametrize("content", [
    lambda: b'"sha256":"' + b"0" * 64 + b'"', lambda: seal({"a": torch.zeros(2)}, {"b": "c"})])
def test_a_sealed_file_that_is_no_checkpoint(content, tmp_path):
    data = SEAL.sub(b"0" * 64, content(), 1)
    data = SEAL.sub(hashlib.sha256(data).hexdigest().encode(), data, 1)
    (tmp_path / "step-1.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="step-1.safetensors is damaged"):
        read_checkpoint(tmp_path / "step-1.safetensors")
