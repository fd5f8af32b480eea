"""What the machine can do at most: matrix products and reading memory, and what GPUs promise.

The ceilings are measured in the same turns as the contenders, and before and after them: the best
of all counts, since a busy moment makes a ceiling too low, and never too high.
"""
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from minillm.bench.timing import in_turns
from minillm.model import LlamaConfig, count_parameters, flops_per_token

# Dense bfloat16 TFLOP/s with float32 sums, the tensor cores' peak without sparsity. From NVIDIA's
# data sheets of H100 (2023; SXM and PCIe), H200 (2024), A100 (2021) and L4 (2023), which except for
# A100's state twice that, with sparsity; and from the tables of NVIDIA's "Ada GPU architecture"
# (RTX 4090) and "Ampere GA102 GPU architecture" (RTX 3090). The first entry whose words are all in
# the device's name counts.
PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "L4": 121, "RTX 4090": 165,
         "RTX 3090": 71}
EXTRA = 3           # turns of the ceilings alone, before and again after


@dataclass(frozen=True)
class Ceiling:
    """Work that does nothing but what limits the contenders: `amount` of `unit` per call."""

    name: str
    unit: str
    amount: float
    work: Callable


def matrix_product(precision: str, device: str | torch.device = "cpu") -> Ceiling:
    """The Ceiling of arithmetic, in GFLOP/s: products of square matrices, 2 n^3 operations each.

    precision: "float32" or "bf16".
    """
    on_gpu = torch.device(device).type == "cuda"
    n, times = (8192, 10) if on_gpu else (2048, 1)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.rand(2, n, n, device=device, dtype=dtype)
    out = torch.empty_like(a)

    def work():
        for _ in range(times):
            torch.mm(a, b, out=out)

    operations = times * 2 * n ** 3
    return Ceiling(f"{precision} matrix product {n} x {n}", "GFLOP/s", operations / 1e9, work)


def memory_read(megabytes: int = 512) -> Ceiling:
    """The Ceiling of reading memory, in GB/s, for a CPU.

    A sum over more float32 numbers than its caches hold.
    """
    numbers = torch.ones(megabytes * 10 ** 6 // 4)
    return Ceiling("reading memory", "GB/s", megabytes / 1e3, numbers.sum)


def measured(contenders: dict[str, Callable], rounds: int, ceilings: Collection[Ceiling],
             ) -> tuple[dict[str, list[float]], dict[str, float], str]:
    """in_turns with Ceilings among the contenders, and EXTRA turns of theirs before and after.

    Returns the seconds of the contenders, the ceilings' best rates by name, and a line that states
    them.
    """
    works = {c.name: c.work for c in ceilings}
    before = in_turns(works, EXTRA)
    seconds = in_turns(contenders | works, rounds)
    after = in_turns(works, EXTRA)
    rates = {}
    for c in ceilings:
        best = min(before[c.name] + seconds.pop(c.name) + after[c.name])
        rates[c.name] = c.amount / best
    said = ", ".join(f"{c.name} {rates[c.name]:,.0f} {c.unit}" for c in ceilings)
    return seconds, rates, f"Ceilings, the best of all turns, and of some before and after: {said}"


def peak_of(name: str) -> float | None:
    """The data sheet's peak, in GFLOP/s, of a GPU of that name, or None if PEAKS lacks it."""
    words = set(name.replace("-", " ").split())
    for known, peak in PEAKS.items():
        if words >= set(known.split()):
            return 1e3 * peak
    return None


def mfu(c: LlamaConfig, t: int, rate: float, ceiling: float) -> float:
    """Model FLOPs utilization (PaLM, Chowdhery et al. 2022, section 4.1).

    What training Llama(c) on `rate` tokens/s, in rows of t tokens, needs (flops_per_token) as a
    share of a ceiling in GFLOP/s.
    """
    return flops_per_token(c, t) * rate / (1e9 * ceiling)


def bytes_a_token(c: LlamaConfig, bytes_a_weight: float = 4) -> float:
    """Bytes of weights that a step of generation with Llama(c) reads, whatever its batch.

    All but the embedding, of which only the rows of the tokens are read.
    """
    embedding = 0 if c.tie_embeddings else c.vocab_size * c.dim
    return bytes_a_weight * (count_parameters(c) - embedding)
