"""What the notebook on training cannot show: diverging runs, settings that cannot train, parity with torch and transformers."""
import math

import pytest
import torch
from torch import nn

from minillm import train as training
from minillm.model import Llama, LlamaConfig
from minillm.train import AdamW, backward, clip_gradients, learning_rate, load_checkpoint, Muon, token_loss, train, TrainConfig

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
    model = Breaking(6, value, gradient)
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
