"""What the machine can do at most, measured beside the contenders: matrix products and reading memory; and what GPUs promise."""
import statistics
from dataclasses import dataclass
from typing import Callable

import torch

from minillm.bench.timing import in_turns
from minillm.model import count_parameters, flops_per_token

# Dense bfloat16 TFLOP/s with float32 sums, the tensor cores' peak without sparsity. From NVIDIA's data sheets of H100 (2023; SXM and
# PCIe), H200 (2024), A100 (2021) and L4 (2023), which but for A100's state twice that, with sparsity; and from the tables of NVIDIA's
# "Ada GPU architecture" (RTX 4090) and "Ampere GA102 GPU architecture" (RTX 3090). The first whose words are all in
# the device's name counts.
PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "L4": 121, "RTX 4090": 165, "RTX 3090": 71}


@dataclass(frozen=True)
class Ceiling:
    """Work that does nothing else than what limits the contenders: `amount` of `unit` a call."""

    name: str
    unit: str
    amount: float
    work: Callable


def matrix_product(precision, device="cpu"):
    """The Ceiling of arithmetic, in GFLOP/s: products of square matrices in "float32" or "bf16", 2 n^3 operations each."""
    n, times = (8192, 10) if torch.device(device).type == "cuda" else (2048, 1)
    a, b = torch.rand(2, n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    out = torch.empty_like(a)

    def work():
        for _ in range(times):
            torch.mm(a, b, out=out)
    return Ceiling(f"{precision} matrix product {n} x {n}", "GFLOP/s", times * 2 * n ** 3 / 1e9, work)


def memory_read(megabytes=512):
    """The Ceiling of reading memory, in GB/s, for a CPU: a sum over more float32 numbers than its caches hold."""
    numbers = torch.ones(megabytes * 10 ** 6 // 4)
    return Ceiling("reading memory", "GB/s", megabytes / 1e3, numbers.sum)


def measured(contenders, rounds, ceilings):
    """in_turns with Ceilings among the contenders; returns the seconds, the ceilings' rates by name, and a line that states them."""
    seconds = in_turns(contenders | {c.name: c.work for c in ceilings}, rounds)
    rates = {c.name: c.amount / statistics.median(seconds.pop(c.name)) for c in ceilings}
    return seconds, rates, "Ceilings, in the same turns: " + ", ".join(f"{c.name} {rates[c.name]:,.0f} {c.unit}" for c in ceilings)


def peak_of(name):
    """The peak by the data sheet, in GFLOP/s, of a GPU of that name, or None if PEAKS lacks it."""
    words = set(name.replace("-", " ").split())
    return next((1e3 * peak for known, peak in PEAKS.items() if words >= set(known.split())), None)


def mfu(c, t, rate, ceiling):
    """Model FLOPs utilization (PaLM, Chowdhery et al. 2022, section 4.1): what training Llama(c) on `rate` tokens/s, in rows of t tokens,
    needs (flops_per_token) as a share of a ceiling in GFLOP/s."""
    return flops_per_token(c, t) * rate / (1e9 * ceiling)


def bytes_a_token(c, bytes_a_weight=4):
    """Bytes of weights that a token of Llama(c), or a batch of them, reads: all but the embedding, of which it reads rows."""
    return bytes_a_weight * (count_parameters(c) - (0 if c.tie_embeddings else c.vocab_size * c.dim))
