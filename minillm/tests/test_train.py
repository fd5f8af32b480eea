"""What the notebook on training cannot show: killed, damaged and diverging runs; parity with torch and transformers."""
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import nn

from minillm import train as training
from minillm.model import Llama, LlamaConfig
from minillm.train import (AdamW, backward, clip_gradients, learning_rate, load_checkpoint, Muon, resume,
                           save_checkpoint, token_loss, train, TrainConfig)

TINY = LlamaConfig(vocab_size=17, dim=8, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=16, max_seq_len=16)


class Batches:
    """Batch i is a function of i; `at` maps numbers of batches to what happens when they are asked for."""

    def __init__(self, at=None):
        self.at = at or {}

    def __getitem__(self, i):
        if i in self.at:
            self.at[i]()
        ids = torch.randint(17, (3, 7), generator=torch.Generator().manual_seed(i))
        return ids[:, :-1], ids[:, 1:]


def tiny(seed=0):
    torch.manual_seed(seed)
    return Llama(TINY)


def settings(**changes):
    return TrainConfig(**{"steps": 12, "lr": 1e-2, "warmup": 3, "bar": False, "precision": "float32"} | changes)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


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

def run(where, checkpoint):      # in a process of its own; where: ("batch", i), ("save", i), a time in seconds, or None
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
places.sort(key=lambda place: place[1] / (2 if place[0] == "batch" else 1))
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
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), precision, str(seed)], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
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
    with pytest.raises(ZeroDivisionError):
        train(parts, Batches({9: lambda: 1 / 0}), settings(checkpoint=str(tmp_path), checkpoint_every=4))
    torch.manual_seed(2)
    train(parts, Batches(), settings(checkpoint=str(tmp_path), checkpoint_every=4))
    assert torch.equal(weights(whole), weights(parts))


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to another process")
def test_ctrl_c_finishes_the_step_and_the_same_call_goes_on(tmp_path):
    whole, stopped = tiny(), tiny()
    train(whole, Batches(), settings())
    interrupt = Batches({7: lambda: os.kill(os.getpid(), signal.SIGINT)})
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="after step 7; saved"):
        train(stopped, interrupt, settings(checkpoint=str(tmp_path)))
    assert names(tmp_path) == ["step-00000008.safetensors"] and signal.getsignal(signal.SIGINT) is before
    history = train(stopped, Batches(), settings(checkpoint=str(tmp_path)))
    assert [h["step"] for h in history] == list(range(12)) and torch.equal(weights(whole), weights(stopped))
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

def checkpointed(folder, **changes):
    model = tiny()
    return model, train(model, Batches(), settings(checkpoint=str(folder), checkpoint_every=4, **changes))


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
    places = [*range(10), data.index(b'"sha256"'), data.index(b'"sha256"') + 20, header - 1, header, len(data) - 1]
    places += [chance.randrange(header) for _ in range(100)] + [chance.randrange(len(data)) for _ in range(100)]
    damaged = [data[:i] + bytes([data[i] ^ chance.randrange(1, 256)]) + data[i + 1:] for i in places]
    damaged += [data[:i] for i in [0, 1, 8, 100, header, len(data) - 1] + [chance.randrange(len(data)) for _ in range(20)]]
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
    assert capsys.readouterr().out == ("checkpoint refused: step-00000012.safetensors is damaged: its checksum does not fit "
                                       "its content\n")
    assert torch.equal(weights(model), weights(again)) and [h["loss"] for h in same] == [h["loss"] for h in history]
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
    with pytest.raises(ValueError, match=r"of another model: model.model.embed_tokens.weight is \(17, 16\) here, \(17, 8\) there"):
        load_checkpoint(path, wide)
    with pytest.raises(ValueError, match="here, missing there"):
        load_checkpoint(path, deep)
    save_checkpoint(tmp_path, deep, AdamW(deep), [{}])
    with pytest.raises(ValueError, match="missing here"):
        load_checkpoint(tmp_path / "step-00000001.safetensors", tiny())
    assert torch.equal(weights(wide), before)


@pytest.mark.parametrize("changes, expected", [({"lr": 2e-2}, "lr 0.01 there, 0.02 here"), ({"steps": 20}, "steps 12 there, 20 here")])
def test_checkpoint_of_another_run_is_not_gone_on_with(tmp_path, changes, expected):
    checkpointed(tmp_path)
    with pytest.raises(ValueError, match=expected):
        checkpointed(tmp_path, **changes)


def test_checkpoint_of_other_data_is_not_gone_on_with(tmp_path):
    class Other(Batches):
        def __getitem__(self, i):
            return super().__getitem__(i + 100)

    checkpointed(tmp_path)
    with pytest.raises(ValueError, match="first batch"):
        train(tiny(), Other(), settings(checkpoint=str(tmp_path)))
    assert names(tmp_path) == ["step-00000008.safetensors", "step-00000012.safetensors"]


def test_checkpoint_holds_plain_tensors_and_exact_history(tmp_path):
    from safetensors import safe_open
    model, history = checkpointed(tmp_path)
    with safe_open(tmp_path / "step-00000012.safetensors", "pt") as f:
        assert json.loads(f.metadata()["history"]) == history
        keys, state = set(f.keys()), model.state_dict()
        assert keys == {"rng"} | {f"{kind}.{name}" for kind in ("model", "m", "v") for name in state}


# ---- runs that must stop

class Breaking(nn.Module):
    """A model whose logits become `value` from the n-th call on, or whose gradients do, with the loss still finite."""

    def __init__(self, n, value=math.nan, gradient=False):
        super().__init__()
        self.llama, self.calls, self.n, self.value, self.gradient = tiny(), 0, n, value, gradient

    def forward(self, ids):
        self.calls += 1
        logits = self.llama(ids)
        if self.calls <= self.n:
            return logits
        if self.gradient:
            logits.register_hook(lambda g: g * self.value)
            return logits
        return logits * self.value


@pytest.mark.parametrize("value, gradient", [(math.nan, False), (math.inf, False), (math.nan, True), (math.inf, True)])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run(tmp_path, value, gradient):
    model, until = Breaking(6, value, gradient), tiny()
    with pytest.raises(FloatingPointError, match="at step 6"):
        train(model, Batches(), settings(checkpoint=str(tmp_path), checkpoint_every=4))
    assert names(tmp_path) == ["step-00000004.safetensors"]
    twin = Breaking(99)
    with pytest.raises(ZeroDivisionError):
        train(twin, Batches({6: lambda: 1 / 0}), settings())
    assert torch.equal(weights(model), weights(twin)), "the weights are not those of the last good step"
    assert len(load_checkpoint(tmp_path / "step-00000004.safetensors", Breaking(0))) == 4


def test_first_step_may_break_too():
    with pytest.raises(FloatingPointError, match="at step 0"):
        train(Breaking(0), Batches(), settings())


def masked(targets):
    return torch.full_like(targets, -100)


def test_a_batch_without_targets_is_refused():
    model = tiny()
    inputs, targets = Batches()[0]
    with pytest.raises(ValueError, match="-100"):
        train(model, [(inputs, masked(targets))] * 12, settings())
    with pytest.raises(ValueError, match="all targets are -100"):
        train(model, [(inputs, targets), (inputs, masked(targets))] * 6, settings())
    assert backward(model, [(inputs, targets), (inputs, masked(targets))])[1] == targets.numel()


def test_another_loss_over_other_items():
    """Rows instead of tokens: the mean is over the rows of both batches of a step, and a batch may have any number of tensors."""
    def per_row(model, inputs, targets, weights, precision):
        return torch.stack([weight * token_loss(model, x[None], y[None], precision) for x, y, weight in zip(inputs, targets, weights)]).sum()

    batches = [(*Batches()[0], torch.tensor([1.0, 2.0, 3.0])), (*[z[:1] for z in Batches()[1]], torch.tensor([4.0]))]
    model, rows = tiny(), lambda inputs, targets, weights: len(inputs)
    first = train(model, batches, settings(steps=1, warmup=1, accumulate=2), per_row, rows)[0]
    model = tiny()
    expected = sum(per_row(model, *batch, "float32") for batch in batches) / 4
    expected.backward()
    norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert first["tokens"] == 4 and abs(first["loss"] - expected.item()) < 1e-5 and abs(first["grad_norm"] - norm) < 1e-5


def test_first_batch_is_checked_against_the_vocabulary():
    ids = torch.full((2, 5), 17)
    with pytest.raises(ValueError, match="17"):
        train(tiny(), [(ids, ids)], settings(steps=1, warmup=0))
    with pytest.raises(TypeError, match="int64"):
        train(tiny(), [(ids.float(), ids)], settings(steps=1, warmup=0))


@pytest.mark.parametrize("changes, expected", [
    ({"steps": 0}, "steps must be between 1 and .*: got 0"), ({"lr": 0}, "lr .* got 0"), ({"lr": -1.0}, "lr .* got -1.0"),
    ({"lr": math.nan}, "lr .* got nan"), ({"lr": math.inf}, "lr .* got inf"), ({"min_lr": 1.5}, "min_lr .* 0 and 1: got 1.5"),
    ({"warmup": -1}, "warmup .* got -1"), ({"warmup": 13}, "warmup must be at most steps=12, .* got 13"),
    ({"weight_decay": -0.1}, "weight_decay .* got -0.1"), ({"clip": 0}, "clip .* got 0"), ({"accumulate": 0}, "accumulate .* got 0"),
    ({"checkpoint_every": 0}, "checkpoint_every .* got 0"), ({"betas": (0.9, 1.0)}, "betas .* got"), ({"betas": (0.9,)}, "betas"),
    ({"precision": "fp16"}, "precision must be .* got 'fp16'")])
def test_settings_that_cannot_train(changes, expected):
    with pytest.raises(ValueError, match=expected):
        settings(**changes)


@pytest.mark.parametrize("changes", [{"steps": 2.0}, {"accumulate": True}, {"lr": "0.1"}, {"lr": None}])
def test_settings_of_a_wrong_type(changes):
    with pytest.raises(TypeError, match=next(iter(changes))):
        settings(**changes)


# ---- parity

def test_adamw_is_torchs():
    ours, theirs = tiny(), tiny()
    decay = [p for p in theirs.parameters() if p.ndim > 1]
    rest = [p for p in theirs.parameters() if p.ndim == 1]
    assert len(rest) == 3
    optimizer = AdamW(ours, (0.9, 0.95), weight_decay=0.1)
    reference = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
                                  betas=(0.9, 0.95), eps=1e-8)
    start = weights(ours)
    for i in range(50):
        for model in ours, theirs:
            backward(model, [Batches()[i]])
        for group in reference.param_groups:
            group["lr"] = 1e-2 * (i + 1) / 50
        optimizer.step(1e-2 * (i + 1) / 50)
        reference.step()
        reference.zero_grad()
    assert (weights(ours) - start).abs().max() > 0.05
    torch.testing.assert_close(weights(ours), weights(theirs), atol=1e-6, rtol=1e-5)


def test_adamw_skips_what_is_frozen_or_unused():
    model = tiny()
    frozen, unused = model.model.embed_tokens.weight.requires_grad_(False), nn.Parameter(torch.ones(2, 2))
    model.unused = unused
    before = frozen.clone()
    train(model, Batches(), settings())
    assert torch.equal(frozen, before) and torch.equal(unused, torch.ones(2, 2))


def test_tied_weights_move_once_and_stay_tied(tmp_path):
    model = Llama(LlamaConfig(17, 8, 1, 2, 1, 16, 16, tie_embeddings=True))
    train(model, Batches(), settings(checkpoint=str(tmp_path)))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    other = Llama(model.config)
    load_checkpoint(tmp_path / "step-00000012.safetensors", other)
    assert torch.equal(weights(model), weights(other)) and other.lm_head.weight is other.model.embed_tokens.weight


@pytest.mark.parametrize("limit", [1e-3, 0.5, 1e9, math.inf])
def test_clipping_is_torchs(limit):
    ours, theirs = tiny(), tiny()
    for model in ours, theirs:
        backward(model, [Batches()[0]])
    norm = clip_gradients(ours.parameters(), limit)
    assert torch.isclose(norm, nn.utils.clip_grad_norm_(theirs.parameters(), limit))
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


def test_clipping_needs_a_gradient():
    with pytest.raises(ValueError, match="backward"):
        clip_gradients(tiny().parameters(), 1.0)


def test_learning_rate_is_transformers():
    """From the end of warm-up on they are equal; before, ours is one step ahead, for theirs begins with a step at rate 0."""
    from transformers import get_cosine_with_min_lr_schedule_with_warmup
    c = TrainConfig(steps=50, warmup=7, lr=0.02, min_lr=0.1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=c.lr)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, c.warmup, c.steps, min_lr_rate=c.min_lr)
    theirs = []
    for _ in range(c.steps):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    ours = [learning_rate(i, c) for i in range(c.steps)]
    assert ours[7:] == pytest.approx(theirs[7:]) and ours[:7] == pytest.approx(theirs[1:8])
    assert theirs[0] == 0 and ours[0] == pytest.approx(c.lr / 7) and learning_rate(50, c) == pytest.approx(c.lr * c.min_lr)


def test_learning_rate_without_warmup_or_cosine():
    assert learning_rate(0, TrainConfig(steps=5, warmup=0, lr=1.0)) == 1.0
    assert learning_rate(4, TrainConfig(steps=5, warmup=5, lr=1.0)) == 1.0
    assert learning_rate(3, TrainConfig(steps=5, warmup=0, lr=1.0, min_lr=1)) == 1.0


def test_accumulation_of_unequal_batches_is_one_big_batch():
    inputs, targets = (torch.cat([Batches()[i][k] for i in range(4)]) for k in (0, 1))
    targets[2:7, 2:] = -100
    whole, parts = tiny(), tiny()
    cuts = [(0, 1), (1, 7), (7, 12)]
    loss, n = backward(whole, [(inputs, targets)])
    assert backward(parts, [(inputs[a:b], targets[a:b]) for a, b in cuts]) == (pytest.approx(loss, rel=1e-6), n)
    assert n == (targets != -100).sum()
    for p, q in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-5)


def test_train_accumulates_consecutive_batches():
    big = [tuple(torch.cat([Batches()[2 * i + k][j] for k in range(2)]) for j in range(2)) for i in range(12)]
    whole, parts = tiny(), tiny()
    train(whole, big, settings())
    history = train(parts, Batches(), settings(accumulate=2))
    torch.testing.assert_close(weights(whole), weights(parts), atol=1e-4, rtol=0)
    assert [h["tokens"] for h in history] == [36] * 12 and history[5]["lr"] == learning_rate(5, settings())


def test_token_loss_is_a_float32_sum_over_what_counts():
    model, (inputs, targets) = tiny(), Batches()[0]
    targets = targets.clone()
    targets[0] = -100
    mean = nn.functional.cross_entropy(model(inputs)[1:].flatten(0, 1), targets[1:].flatten())
    assert torch.isclose(token_loss(model, inputs, targets), mean * 12)
    assert token_loss(model, inputs, targets, "bf16").dtype == torch.float32
    assert torch.isclose(token_loss(model, inputs, targets, "bf16"), mean * 12, rtol=0.02)


def test_leftover_gradients_do_not_count():
    clean, dirty = tiny(), tiny()
    backward(dirty, [Batches()[5]])
    for model in clean, dirty:
        train(model, Batches(), settings())
    assert torch.equal(weights(clean), weights(dirty))


# ---- torch.compile

def test_without_a_compiler_one_line_says_so(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    compiled, plain = tiny(), tiny()
    train(compiled, Batches(), settings(compile=True))
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "no C++ compiler found" in out and "and much more" not in out
    train(plain, Batches(), settings())
    assert torch.equal(weights(compiled), weights(plain))


def test_a_model_is_compiled_where_it_works(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda f: asked.append(f) or f)
    model = tiny()
    train(model, Batches(), settings(compile=True))
    assert asked[-1] is model and training.compiled(model, "cpu") is model


def test_muon_steps_matrices_of_the_blocks_and_leaves_the_rest_to_adamw():
    """Embeddings, head and norms move as under AdamW; a block's matrix moves by an orthogonal step, whatever the gradient's size."""
    moved = {}
    for kind, factor in (("muon", 1.0), ("muon", 128.0), ("adamw", 1.0)):
        torch.manual_seed(0)
        model = Llama(LlamaConfig(vocab_size=50, dim=16, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=24))
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        ids = torch.arange(40).view(2, 20)
        (token_loss(model, ids, ids.roll(-1, 1)) * factor).backward()
        optimizer = Muon(model, 2.0, weight_decay=0) if kind == "muon" else AdamW(model, weight_decay=0)
        optimizer.step(0.01)
        moved[kind, factor] = {n: p.detach() - before[n] for n, p in model.named_parameters()}
        assert all(p.grad is None for p in model.parameters())
    for n, step in moved["muon", 1.0].items():
        if ".layers." in n and step.ndim == 2:
            values = torch.linalg.svdvals(step) / 0.02 / max(1, step.shape[0] / step.shape[1]) ** 0.5
            assert 0.6 < values.max() < 1.4, n          # the smallest belong to directions that this batch hardly has
            torch.testing.assert_close(step, moved["muon", 128.0][n], atol=1e-4, rtol=0)
        else:
            torch.testing.assert_close(step, moved["adamw", 1.0][n])


def test_muon_resumes_bit_for_bit(tmp_path):
    config = {"steps": 12, "lr": 5e-3, "warmup": 2, "muon": 2.0, "bar": False, "precision": "float32"}
    batches = [(x := torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(i)), x.roll(-1, 1)) for i in range(12)]

    def fresh():
        torch.manual_seed(0)
        return Llama(LlamaConfig(vocab_size=50, dim=16, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=24))

    whole = fresh()
    training.train(whole, batches, TrainConfig(**config))

    class Cut(list):
        def __getitem__(self, i):
            if i == 7:
                raise OSError("disk gone")
            return super().__getitem__(i)

    saved = TrainConfig(**config, checkpoint=str(tmp_path), checkpoint_every=5)
    with pytest.raises(OSError):
        training.train(fresh(), Cut(batches), saved)
    resumed = fresh()
    training.train(resumed, batches, saved)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))
