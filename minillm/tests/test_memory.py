"""Memory predicted is memory measured, and the tables follow from it."""
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from minillm import attention
from minillm.arc.sizes import SIZES
from minillm.bench import memory
from minillm.fast_train import by_hand, chunked_loss
from minillm.model import Llama, LlamaConfig, count_parameters
from minillm.optim import AdamW, Muon
from minillm.train import TrainConfig, train_step

S = LlamaConfig(vocab_size=1024, dim=128, n_layers=4, n_heads=4, hidden_dim=344)
M = LlamaConfig(vocab_size=1024, dim=288, n_layers=6, n_heads=6, hidden_dim=768)
CASES = {"S": (S, 4, 128), "M": (M, 4, 128), "grouped queries": (replace(S, n_kv_heads=2), 4, 128), "large vocabulary": (replace(S, vocab_size=4096), 2, 128),
         "tied": (replace(S, vocab_size=4096, tie_embeddings=True), 2, 128), "long": (S, 1, 256), "few tokens": (M, 1, 8), "embeddings": (replace(S, vocab_size=8192), 1, 8),
         "wide feed-forward": (LlamaConfig(vocab_size=128, dim=64, n_layers=2, n_heads=2, hidden_dim=768), 4, 128)}


def step_twice(c, b, t, precision, device, hand=True, muon=False, accumulate=1):
    """What peak_memory measures: a model, an optimizer, two steps of training."""
    config, model = TrainConfig(steps=2, warmup=1), Llama(c).to(device)
    optimizer, forward = Muon(model, 2.0) if muon else AdamW(model), by_hand(model) if hand else model
    ids = torch.randint(c.vocab_size, (b, t + 1))
    for step in range(2):
        train_step(forward, [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())] * accumulate, optimizer, step, config, precision, chunked_loss)


def as_on_a_gpu(q, k, v, padding=None):
    """attend, as it is on a GPU: no cast to float32."""
    k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], dim=1) if z.shape[1] < q.shape[1] else z for z in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def check(case, precision, device, like=None, **settings):
    c, b, t = CASES[case]
    predicted = memory.training_memory(c, b, t, precision, like or device, **settings)["peak"]
    if like:                              # a CPU's kernel lays its result out otherwise, so that each block keeps a copy of it
        predicted += c.n_layers * b * t * c.dim * memory.width(precision)
    measured = memory.peak_memory(partial(step_twice, c, b, t, precision, device, like is None, **settings), device)
    # An allocator rounds up, and kernels need something within. Where neither counts, all must be seen.
    assert abs(predicted / measured - 1) < (0.1 if device == "cuda" else 0.03), f"predicted {predicted:,}, measured {measured:,}"


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_memory_predicted_is_memory_measured(case, precision):
    check(case, precision, "cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("case", ["S", "M", "grouped queries", "wide feed-forward"])
def test_the_formula_of_a_gpu_without_one(monkeypatch, case, precision):
    """With attention as it is there."""
    monkeypatch.setattr(attention, "attend", as_on_a_gpu)
    check(case, precision, "cpu", like="cuda")


@pytest.mark.parametrize("case, settings", [("few tokens", {"muon": True}), ("grouped queries", {"muon": True}), ("M", {"accumulate": 2})])
def test_memory_of_muon_and_of_several_batches_a_step(case, settings):
    check(case, "float32", "cuda" if torch.cuda.is_available() else "cpu", **settings)


def test_each_moment_is_the_peak_of_some_shape():
    """Else the tests above would not see a wrong term in it."""
    found = set()
    for c, b, t in CASES.values():
        use = memory.training_memory(c, b, t, "float32", "cpu")
        forward = use["activations"]
        found.add(max((forward + use["loss"], "loss"), (forward + use["temporaries"], "block"), (use["gradients"] + use["in the optimizer"], "optimizer"))[1])
    assert found == {"loss", "block", "optimizer"}


def test_what_is_held_is_counted_and_what_is_dropped_is_not():
    def work():
        a = torch.zeros(1000)
        b = a[10:20].add_(1)              # a view and in place: nothing new
        del a
        torch.ones(500) + 1               # 2 x 2000 bytes, and gone
        return b + torch.ones(10)
    assert memory.peak_memory(work) == 4000 + 2 * 2000
    assert memory.peak_memory(lambda: [torch.zeros(1000) for _ in range(3)]) == 12000
    assert memory.peak_memory(lambda: [torch.zeros(1000).sum() for _ in range(3)]) < 5000


def test_presets_fit_and_nothing_larger_does():
    rows = memory.presets()
    assert [row["GPU"].split(", ")[1] for row in rows] == [f"{n} GB" for n in (4, 8, 16, 24, 80)]
    for row, gigabytes in zip(rows, memory.GPUS):
        room = 0.9 * gigabytes
        c = next(c for c in memory.SHAPES if c.dim == int(row["wide"]))
        batch = int(row["batch"].split(" x ")[0])
        assert float(row["memory"].split()[0]) <= room + 0.05 and batch >= 4
        assert memory.training_memory(c, 2 * batch, 1024, "bf16", accumulate=2)["peak"] > room * 2**30
        for larger in memory.SHAPES[memory.SHAPES.index(c) + 1:]:
            assert memory.training_memory(larger, 4, 1024, "bf16", accumulate=2)["peak"] > room * 2**30
    assert [round(count_parameters(c) / 1e6) for c in memory.SHAPES] == [15, 50, 110, 341, 1280]
    c = memory.SHAPES[2]                                 # 110 M, by hand: 6 for each weight that multiplies, tied embeddings among them
    flops = 6 * (12 * (4 * 768**2 + 3 * 768 * 2048) + 32000 * 768) + 12 * 12 * 768 * 1024
    assert abs(memory.hours(c, 1024, 1e9, 80) * 3600 * 0.3 * 312e12 / (1e9 * flops) - 1) < 0.01


def test_the_size_gpu_takes_minutes_and_fits_where_it_is_said_to():
    base, chat = memory.recipe_rows()
    for row in base, chat:
        assert float(row["24 GB"].split()[0]) < 10 and float(row["80 GB"].split()[0]) < 5
        assert float(row["memory"].split()[0]) < 0.9 * 8
        assert float(row["memory"].split()[0]) > 0.9 * 4 and row["4 GB"] == "too small"
    dpo, c = SIZES["gpu"].dpo, SIZES["gpu"].stories.model           # rows of two answers to a question: 2 a pair, in float32, below 350 tokens
    assert memory.training_memory(c, 2 * dpo.batch_size, 350, "float32", accumulate=2)["peak"] < 0.9 * 8 * 2**30
    n, mean = SIZES["gpu"].stories.stories, float(base["tokens"].split()[0]) * 1e6 / SIZES["gpu"].stories.stories
    assert 150 < mean < 200 and n == 300_800
