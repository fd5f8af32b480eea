"""What the notebook on training cannot show: diverging runs, settings that cannot train, losses,
accumulation."""
import math

import pytest
import torch
from torch import nn

from minillm.model import Llama, LlamaConfig
from minillm.train import TrainConfig, backward, learning_rate, load_checkpoint, token_loss, train

TINY = LlamaConfig(vocab_size=17, dim=8, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=16,
                   max_seq_len=16)


class Batches:
    """Batch i is a function of i; `at` maps numbers of batches to what happens when they are asked
    for."""

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
    usual = {"steps": 12, "lr": 1e-2, "warmup": 3, "bar": False, "precision": "float32"}
    return TrainConfig(**usual | changes)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- runs that must stop

class Breaking(nn.Module):
    """A model whose logits become `value` from the n-th call on, or whose gradients do, with the
    loss still finite."""

    def __init__(self, n, value=math.nan, gradient=False):
        super().__init__()
        self.llama, self.calls = tiny(), 0
        self.n, self.value, self.gradient = n, value, gradient

    def forward(self, ids):
        self.calls += 1
        logits = self.llama(ids)
        if self.calls <= self.n:
            return logits
        if self.gradient:
            logits.register_hook(lambda g: g * self.value)
            return logits
        return logits * self.value


@pytest.mark.parametrize("value, gradient", [(math.nan, False), (math.inf, False),
                                             (math.nan, True), (math.inf, True)])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run(tmp_path, value, gradient):
    model = Breaking(6, value, gradient)
    with pytest.raises(FloatingPointError, match="at step 6"):
        train(model, Batches(), settings(checkpoint=str(tmp_path), checkpoint_every=4))
    assert names(tmp_path) == ["step-00000004.safetensors"]
    twin = Breaking(99)
    with pytest.raises(ZeroDivisionError):
        train(twin, Batches({6: lambda: 1 / 0}), settings())
    assert torch.equal(weights(model), weights(twin)), "not the weights of the last good step"
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
    """Rows instead of tokens: the mean is over the rows of both batches of a step, and a batch may
    have any number of tensors."""
    def per_row(model, inputs, targets, weights, precision):
        losses = [weight * token_loss(model, x[None], y[None], precision)
                  for x, y, weight in zip(inputs, targets, weights)]
        return torch.stack(losses).sum()

    def rows(inputs, targets, weights):
        return len(inputs)

    three, one = Batches()[0], [z[:1] for z in Batches()[1]]
    batches = [(*three, torch.tensor([1.0, 2.0, 3.0])), (*one, torch.tensor([4.0]))]
    first = train(tiny(), batches, settings(steps=1, warmup=1, accumulate=2), per_row, rows)[0]
    model = tiny()
    expected = sum(per_row(model, *batch, "float32") for batch in batches) / 4
    expected.backward()
    norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert first["tokens"] == 4
    assert abs(first["loss"] - expected.item()) < 1e-5 and abs(first["grad_norm"] - norm) < 1e-5


@pytest.mark.parametrize("config", [{"steps": 2}, TrainConfig, None])
def test_another_kind_of_config_is_refused(config):
    with pytest.raises(TypeError, match="config must be a TrainConfig: got"):
        train(tiny(), Batches(), config)


def test_first_batch_is_checked_against_the_vocabulary():
    ids = torch.full((2, 5), 17)
    with pytest.raises(ValueError, match="17"):
        train(tiny(), [(ids, ids)], settings(steps=1, warmup=0))
    with pytest.raises(TypeError, match="int64"):
        train(tiny(), [(ids.float(), ids)], settings(steps=1, warmup=0))


def test_a_list_of_batches_that_ends_too_early_is_refused_before_the_first_step():
    batches, model = [Batches()[i] for i in range(5)], tiny()
    before = weights(model)
    for held in batches, tuple(batches), []:
        with pytest.raises(ValueError, match=rf"steps=3 with accumulate=2 take 6 .*{len(held)}$"):
            train(model, held, settings(steps=3, accumulate=2))
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model)))
    assert len(train(model, batches, settings(steps=5))) == 5


@pytest.mark.parametrize("changes, expected", [
    ({"steps": 0}, "steps must be between 1 and .*: got 0"),
    ({"lr": 0}, "lr .* got 0"),
    ({"lr": -1.0}, "lr .* got -1.0"),
    ({"lr": math.nan}, "lr .* got nan"),
    ({"lr": math.inf}, "lr .* got inf"),
    ({"min_lr": 1.5}, "min_lr .* 0 and 1: got 1.5"),
    ({"warmup": -1}, "warmup .* got -1"),
    ({"warmup": 13}, "warmup must be at most steps=12, .* got 13"),
    ({"weight_decay": -0.1}, "weight_decay .* got -0.1"),
    ({"clip": 0}, "clip .* got 0"),
    ({"accumulate": 0}, "accumulate .* got 0"),
    ({"checkpoint_every": 0}, "checkpoint_every .* got 0"),
    ({"betas": (0.9, 1.0)}, "betas .* got"),
    ({"betas": (0.9,)}, "betas"), ({"betas": 0.9}, "betas .* got 0.9"),
    ({"betas": None}, "betas .* got None"), ({"betas": ("a", "b")}, "betas .* got .'a', 'b'"),
    ({"precision": "fp16"}, "precision must be .* got 'fp16'")])
def test_settings_that_cannot_train(changes, expected):
    with pytest.raises(ValueError, match=expected):
        settings(**changes)


@pytest.mark.parametrize("changes", [{"steps": 2.0}, {"accumulate": True}, {"lr": "0.1"},
                                     {"lr": None}])
def test_settings_of_a_wrong_type(changes):
    with pytest.raises(TypeError, match=next(iter(changes))):
        settings(**changes)


# ---- losses and accumulation

def test_accumulation_of_unequal_batches_is_one_big_batch():
    inputs, targets = (torch.cat([Batches()[i][k] for i in range(4)]) for k in (0, 1))
    targets[2:7, 2:] = -100
    whole, parts = tiny(), tiny()
    cuts = [(0, 1), (1, 7), (7, 12)]
    loss, n = backward(whole, [(inputs, targets)])
    in_parts = backward(parts, [(inputs[a:b], targets[a:b]) for a, b in cuts])
    # The same sums of some dozens of float32 numbers in another order.
    assert in_parts == (pytest.approx(loss, rel=1e-5), n)
    assert n == (targets != -100).sum()
    for p, q in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-5)


def test_train_accumulates_consecutive_batches():
    pairs = [(Batches()[2 * i], Batches()[2 * i + 1]) for i in range(12)]
    big = [tuple(torch.cat([a[j], b[j]]) for j in range(2)) for a, b in pairs]
    whole, parts = tiny(), tiny()
    train(whole, big, settings())
    history = train(parts, Batches(), settings(accumulate=2))
    # Rounding only (1e-7 on one machine), where the weights move by up to 0.07.
    torch.testing.assert_close(weights(whole), weights(parts), atol=1e-4, rtol=0)
    assert [h["tokens"] for h in history] == [36] * 12
    assert history[5]["lr"] == learning_rate(5, settings())


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
