"""Optimizers, clipping and learning rate: parity with torch and transformers, and what must not
move."""
import math

import pytest
import torch
from torch import nn

from minillm.model import Llama, LlamaConfig
from minillm.optim import AdamW, Muon, fused_adamw, orthogonalize
from minillm.tests.test_train import Batches, settings, tiny, weights
from minillm.train import (TrainConfig, backward, clip_gradients, learning_rate, load_checkpoint,
                           token_loss, train)


def test_adamw_is_torchs():
    ours, theirs = tiny(), tiny()
    decay = [p for p in theirs.parameters() if p.ndim > 1]
    rest = [p for p in theirs.parameters() if p.ndim == 1]
    assert len(rest) == 3
    optimizer = AdamW(ours, (0.9, 0.95), weight_decay=0.1)
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
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
    # Each takes its own gradients, so that rounding may grow over fifty steps. A wrong rule (decay
    # of vectors, eps inside the root, no bias correction) moves weights by 0.02 and more.
    torch.testing.assert_close(weights(ours), weights(theirs), atol=1e-4, rtol=0)


def test_adamw_skips_what_is_frozen_or_unused():
    model = tiny()
    frozen = model.model.embed_tokens.weight.requires_grad_(False)
    model.unused = unused = nn.Parameter(torch.ones(2, 2))
    before = frozen.clone()
    train(model, Batches(), settings())
    assert torch.equal(frozen, before) and torch.equal(unused, torch.ones(2, 2))


def test_tied_weights_move_once_and_stay_tied(tmp_path):
    model = Llama(LlamaConfig(17, 8, 1, 2, 1, 16, 16, tie_embeddings=True))
    train(model, Batches(), settings(checkpoint=str(tmp_path)))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    other = Llama(model.config)
    load_checkpoint(tmp_path / "step-00000012.safetensors", other)
    assert torch.equal(weights(model), weights(other))
    assert other.lm_head.weight is other.model.embed_tokens.weight


def two_layers():
    torch.manual_seed(0)
    return Llama(LlamaConfig(vocab_size=50, dim=16, n_layers=2, n_heads=2, n_kv_heads=1,
                             hidden_dim=24))


def test_muon_steps_matrices_of_the_blocks_and_leaves_the_rest_to_adamw():
    """Embeddings, head and norms move as under AdamW; a block's matrix moves by an orthogonal step,
    whatever the gradient's size."""
    moved = {}
    for kind, factor in (("muon", 1.0), ("muon", 128.0), ("adamw", 1.0)):
        model = two_layers()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        ids = torch.arange(40).view(2, 20)
        (token_loss(model, ids, ids.roll(-1, 1)) * factor).backward()
        muon = kind == "muon"
        optimizer = Muon(model, 2.0, weight_decay=0) if muon else AdamW(model, weight_decay=0)
        optimizer.step(0.01)
        moved[kind, factor] = {n: p.detach() - before[n] for n, p in model.named_parameters()}
        assert all(p.grad is None for p in model.parameters())
    for n, step in moved["muon", 1.0].items():
        if ".layers." in n and step.ndim == 2:
            rows, columns = step.shape
            values = torch.linalg.svdvals(step) / 0.02 / max(1, rows / columns) ** 0.5
            # Only the largest: the smallest belong to directions that this batch hardly has.
            assert 0.6 < values.max() < 1.4, n
            torch.testing.assert_close(step, moved["muon", 128.0][n], atol=1e-4, rtol=0)
        else:
            torch.testing.assert_close(step, moved["adamw", 1.0][n])


def test_muon_resumes_bit_for_bit(tmp_path):
    config = {"steps": 12, "lr": 5e-3, "warmup": 2, "muon": 2.0, "bar": False,
              "precision": "float32"}
    rows = [torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(i))
            for i in range(12)]
    batches = [(x, x.roll(-1, 1)) for x in rows]
    whole = two_layers()
    train(whole, batches, TrainConfig(**config))

    class Cut(list):
        def __getitem__(self, i):
            if i == 7:
                raise OSError("disk gone")
            return super().__getitem__(i)

    saved = TrainConfig(**config, checkpoint=str(tmp_path), checkpoint_every=5)
    with pytest.raises(OSError):
        train(two_layers(), Cut(batches), saved)
    resumed = two_layers()
    train(resumed, batches, saved)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


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
    """From the end of warm-up on they are equal; before, ours is one step ahead, for theirs begins
    with a step at rate 0."""
    from transformers import get_cosine_with_min_lr_schedule_with_warmup
    c = TrainConfig(steps=50, warmup=7, lr=0.02, min_lr=0.1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=c.lr)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, c.warmup, c.steps,
                                                           min_lr_rate=c.min_lr)
    theirs = []
    for _ in range(c.steps):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    ours = [learning_rate(i, c) for i in range(c.steps)]
    assert ours[7:] == pytest.approx(theirs[7:]) and ours[:7] == pytest.approx(theirs[1:8])
    assert theirs[0] == 0 and ours[0] == pytest.approx(c.lr / 7)
    assert learning_rate(50, c) == pytest.approx(c.lr * c.min_lr)


def test_after_the_last_step_the_learning_rate_stays():
    """A cosine rises again after its half wave, back to the full rate."""
    c = TrainConfig(steps=10, warmup=2, lr=1.0, min_lr=0.1)
    assert [learning_rate(step, c) for step in (10, 11, 18, 10**6)] == [pytest.approx(0.1)] * 4
    assert learning_rate(9, c) > 0.1


@pytest.mark.parametrize("wrong", [lambda m: m.parameters(), lambda m: list(m.parameters()),
                                   lambda m: m.state_dict()], ids=["generator", "list", "dict"])
@pytest.mark.parametrize("kind", [AdamW, lambda model: Muon(model, 0.4)], ids=["AdamW", "Muon"])
def test_an_optimizer_gets_the_model(kind, wrong):
    """PyTorch's get its parameters."""
    with pytest.raises(TypeError, match="pass the model itself"):
        kind(wrong(tiny()))


def test_learning_rate_without_warmup_or_cosine():
    assert learning_rate(0, TrainConfig(steps=5, warmup=0, lr=1.0)) == 1.0
    assert learning_rate(4, TrainConfig(steps=5, warmup=5, lr=1.0)) == 1.0
    assert learning_rate(3, TrainConfig(steps=5, warmup=0, lr=1.0, min_lr=1)) == 1.0


@pytest.mark.parametrize("some", ["", "norm", "proj"])
def test_the_kernel_of_a_gpu_does_the_same_for_any_parameters(some):
    """Also where there are no vectors, as in an adapter, or no matrices."""
    ways = []
    for move in (AdamW.move, fused_adamw):
        optimizer = AdamW(tiny())
        names = [n for n in optimizer.params if some in n]
        for t in range(1, 4):
            optimizer.t = t
            for n in names:
                p = optimizer.params[n]
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
            with torch.no_grad():
                move(optimizer, names, 1e-2)
        ways.append(torch.cat([p.detach().flatten() for p in optimizer.params.values()]))
    assert torch.allclose(*ways, atol=1e-6) and len(names) > 2


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 24, 10), (1, 10, 24)])
def test_orthogonalize_is_five_times_a_polynomial_of_the_singular_values(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = x.bfloat16().float()                                  # as it is rounded at first
    unit = x.double() / x.double().norm(dim=(1, 2), keepdim=True)
    u, s, v = torch.linalg.svd(unit, full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(orthogonalize(x).double(), (u * s[:, None]) @ v, atol=1e-4, rtol=0)
