"""Memory predicted is memory measured, and the tables follow from it.

On the CPU measured means computed: the sizes of all tensors that are held at one time, whatever the
processor. Where there is a GPU, what its allocator says is printed beside (pytest -rP).
"""
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
WIDE = LlamaConfig(vocab_size=128, dim=64, n_layers=2, n_heads=2, hidden_dim=768)
CASES = {    # a shape, sequences, tokens of each
    "S": (S, 4, 128),
    "M": (M, 4, 128),
    "grouped queries": (replace(S, n_kv_heads=2), 4, 128),
    "large vocabulary": (replace(S, vocab_size=4096), 2, 128),
    "tied": (replace(S, vocab_size=4096, tie_embeddings=True), 2, 128),
    "long": (S, 1, 256),
    "few tokens": (M, 1, 8),
    "embeddings": (replace(S, vocab_size=8192), 1, 8),
    "wide feed-forward": (WIDE, 4, 128),
}


def step_twice(c, b, t, precision, device, hand=True, muon=False, accumulate=1):
    """What peak_memory measures: a model, an optimizer, two steps of training."""
    config, model = TrainConfig(steps=2, warmup=1), Llama(c).to(device)
    optimizer = Muon(model, 2.0) if muon else AdamW(model)
    forward = by_hand(model) if hand else model
    ids = torch.randint(c.vocab_size, (b, t + 1))
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    for step in range(2):
        train_step(forward, [batch] * accumulate, optimizer, step, config, precision, chunked_loss)


def as_on_a_gpu(q, k, v, padding=None):
    """attend, as it is on a GPU: no cast to float32."""
    if k.shape[1] < q.shape[1]:
        k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], dim=1) for z in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def predicted(case, precision, device, **settings):
    c, b, t = CASES[case]
    return memory.training_memory(c, b, t, precision, device, **settings)["peak"]


def measured(case, precision, device, **settings):
    work = partial(step_twice, *CASES[case], precision, device, **settings)
    return memory.peak_memory(work, device)


def check(expected, found):
    """Within 3%: all that is larger than a few percent of the peak must be in the formula."""
    assert abs(expected / found - 1) < 0.03, f"predicted {expected:,}, measured {found:,}"


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_memory_predicted_is_memory_measured(case, precision):
    check(predicted(case, precision, "cpu"), measured(case, precision, "cpu"))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("case", ["S", "M", "grouped queries", "wide feed-forward"])
def test_the_formula_of_a_gpu_without_one(monkeypatch, case, precision):
    """With attention as it is there."""
    monkeypatch.setattr(attention, "attend", as_on_a_gpu)
    c, b, t = CASES[case]
    # A CPU's kernel lays its result out otherwise, so that each block keeps a copy of it.
    copies = c.n_layers * b * t * c.dim * memory.width(precision)
    check(predicted(case, precision, "cuda") + copies, measured(case, precision, "cpu", hand=False))


@pytest.mark.parametrize("case, settings", [
    ("few tokens", {"muon": True}), ("grouped queries", {"muon": True}), ("M", {"accumulate": 2})])
def test_memory_of_muon_and_of_several_batches_a_step(case, settings):
    expected = predicted(case, "float32", "cpu", **settings)
    check(expected, measured(case, "float32", "cpu", **settings))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_what_the_allocator_of_a_gpu_says(case, precision):
    """Printed, not asserted: an allocator rounds up, and kernels need memory of their own."""
    expected, found = predicted(case, precision, "cuda"), measured(case, precision, "cuda")
    print(f"{case}, {precision}: predicted {expected:,}, measured {found:,} bytes")


def test_each_moment_is_the_peak_of_some_shape():
    """Otherwise the tests above would not see a wrong term in it."""
    found = set()
    for c, b, t in CASES.values():
        use = memory.training_memory(c, b, t, "float32", "cpu")
        forward = use["activations"]
        moments = {
            "loss": forward + use["loss"],
            "block": forward + use["temporaries"],
            "optimizer": use["gradients"] + use["in the optimizer"],
        }
        found.add(max(moments, key=moments.get))
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


def peak(c, batch, t=1024, precision="bf16"):
    """The bytes of a step that accumulates several batches, on a GPU."""
    return memory.training_memory(c, batch, t, precision, accumulate=2)["peak"]


def test_presets_fit_and_nothing_larger_does():
    rows = memory.presets()
    sizes = [row["GPU"].split(", ")[1] for row in rows]
    assert sizes == [f"{n} GB" for n in (4, 8, 16, 24, 80)]
    for row, gigabytes in zip(rows, memory.GPUS):
        room = 0.9 * gigabytes
        c = next(c for c in memory.SHAPES if c.dim == int(row["wide"]))
        batch = int(row["batch"].split(" x ")[0])
        assert float(row["memory"].split()[0]) <= room + 0.05 and batch >= 4
        assert peak(c, 2 * batch) > room * 2**30
        for larger in memory.SHAPES[memory.SHAPES.index(c) + 1:]:
            assert peak(larger, 4) > room * 2**30
    millions = [round(count_parameters(c) / 1e6) for c in memory.SHAPES]
    assert millions == [15, 50, 110, 341, 1280]


def test_hours_by_hand():
    """Of 110 M parameters: 6 operations per weight that multiplies, tied embeddings included."""
    c = memory.SHAPES[2]
    weights = 12 * (4 * 768**2 + 3 * 768 * 2048) + 32000 * 768
    flops = 6 * weights + 12 * 12 * 768 * 1024
    done = memory.hours(c, 1024, 1e9, 80) * 3600 * 0.3 * 312e12
    assert abs(done / (1e9 * flops) - 1) < 0.01


def test_the_size_gpu_takes_minutes_and_fits_where_it_is_said_to():
    base, chat = memory.recipe_rows()
    for row in base, chat:
        assert float(row["24 GB"].split()[0]) < 10 and float(row["80 GB"].split()[0]) < 5
        assert float(row["memory"].split()[0]) < 0.9 * 8
        assert float(row["memory"].split()[0]) > 0.9 * 4 and row["4 GB"] == "too small"
    size = SIZES["gpu"]
    # Rows of two answers to a question: 2 for each pair, in float32, below 350 tokens.
    assert peak(size.stories.model, 2 * size.dpo.batch_size, 350, "float32") < 0.9 * 8 * 2**30
    # A story has about 170 tokens, a drill 72, a text of practice 170 (checked below).
    of = size.stories.total
    expected = 170 * of("stories") + 72 * of("drills") + 170 * of("practice")
    assert 0.9 < float(base["tokens"].split()[0]) * 1e6 / expected < 1.1
