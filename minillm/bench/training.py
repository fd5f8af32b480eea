"""The speed of a training step beside others: `python -m minillm.bench train`."""
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minillm.arc.fit import faster
from minillm.bench.arguments import chosen, describe
from minillm.bench.ceilings import matrix_product, measured, mfu, peak_of
from minillm.bench.peers import peer_step, training_peers
from minillm.bench.timing import Table, fastest, table, working
from minillm.fast_train import keep_memory
from minillm.model import Llama, LlamaConfig
from minillm.optim import AdamW
from minillm.train import TrainConfig, default_precision, train_step

SHAPES = {
    "S": LlamaConfig(vocab_size=1024, dim=128, n_layers=4, n_heads=4, hidden_dim=344),
    "M": LlamaConfig(vocab_size=1024, dim=288, n_layers=6, n_heads=6, hidden_dim=768)}
# On a GPU: the shapes of llama2.c's stories15M, 42M and 110M, which tie their embeddings, and how
# many rows of tokens a step has.
GPU_SHAPES = {
    name: LlamaConfig(32000, dim, layers, heads, None, hidden, max_seq_len=512, tie_embeddings=True)
    for name, dim, layers, heads, hidden in (
        ("15M", 288, 6, 6, 768), ("42M", 512, 8, 8, 1376), ("110M", 768, 12, 12, 2048))}
GPU_ROWS = {"15M": 64, "42M": 48, "110M": 32}
STEPS = 10                                     # per turn on a GPU, where one is too short to time
GPU_PEERS = ("transformers", "nanoGPT")        # each is compiled, which takes most of a minute


def our_step(c: LlamaConfig, precision: str, inputs: Tensor, targets: Tensor,
             compiling: bool = False) -> Callable[[], float]:
    """A function that makes one training step of our model of shape c, and returns the loss before
    it: the step of train(), with what arc.fit makes faster."""
    model = Llama(c).to(inputs.device)
    forward, loss = faster(model, compiling=compiling)
    optimizer, config = AdamW(model), TrainConfig(steps=1, warmup=0, lr=1e-3)
    return lambda: train_step(forward, [(inputs, targets)], optimizer, 0, config, precision,
                              loss)["loss"]


def place() -> tuple[torch.device, bool]:
    """The device to train on, and whether it is a GPU."""
    on_gpu = torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu"), on_gpu


def contenders(c: LlamaConfig, inputs: Tensor, targets: Tensor, peers: Path | None,
               compiling: bool, on_gpu: bool) -> dict[str, tuple[str, Callable]]:
    """{name: (precision, function () -> step)}: on a CPU in eager float32, and ours in the default
    precision, too, and with `compiling` compiled; on a GPU all compiled and in its default
    precision."""
    known, precision = training_peers(peers), default_precision(inputs.device)
    batch, found = (inputs, targets), {}
    if on_gpu:
        for name in GPU_PEERS:
            if name in known:
                make = partial(peer_step, known[name], c, precision, *batch, compiling=True)
                found[f"{name} {precision}, compiled"] = precision, make
    else:
        for name, peer in known.items():
            found[f"{name} float32"] = "float32", partial(peer_step, peer, c, "float32", *batch)
        found["minillm float32"] = "float32", partial(our_step, c, "float32", *batch)
        if precision != "float32":
            make = partial(our_step, c, precision, *batch)
            found[f"minillm {precision} (default)"] = precision, make
    if compiling or on_gpu:
        make = partial(our_step, c, precision, *batch, compiling=True)
        found[f"minillm {precision}, compiled"] = precision, make
    return found


def ready(make: Callable, on_gpu: bool) -> tuple[Callable, float | None]:
    """make(), warmed up, and its peak memory in GB (10^9 bytes) without what else is on the GPU;
    None on a CPU."""
    before = torch.cuda.memory_allocated() if on_gpu else 0
    step = make()
    step()                               # compiles, which takes memory of its own
    if not on_gpu:
        return step, None
    torch.cuda.reset_peak_memory_stats()
    step()
    return step, (torch.cuda.max_memory_allocated() - before) / 1e9


def several(step: Callable, n: int) -> None:
    """n steps, one after the other."""
    for _ in range(n):
        step()


def batch_of(name: str, c: LlamaConfig, device: torch.device,
             on_gpu: bool) -> tuple[Tensor, Tensor]:
    """Inputs and targets, int64 (rows, c.max_seq_len), of random tokens: 16 rows, or on a GPU
    GPU_ROWS[name], and a quarter of that if it has less than 40 GB."""
    rows = GPU_ROWS[name] if on_gpu else 16
    if on_gpu and torch.cuda.get_device_properties(0).total_memory < 40e9:
        rows //= 4
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(c.vocab_size, (rows, c.max_seq_len + 1), generator=generator).to(device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def train_shape(name: str, c: LlamaConfig, rounds: int, peers: Path | None,
                compiling: bool) -> Table:
    """The Table of one shape; peers: a folder of checkouts."""
    device, on_gpu = place()
    inputs, targets = batch_of(name, c, device, on_gpu)
    makers = contenders(c, inputs, targets, peers, compiling, on_gpu)
    steps, left_out = working({who: partial(ready, make, on_gpu)
                               for who, (_, make) in makers.items()})
    tops = {makers[who][0]: matrix_product(makers[who][0], device) for who in steps}
    works = {who: partial(several, step, STEPS if on_gpu else 1)
             for who, (step, _) in steps.items()}
    seconds, rates, line = measured(works, rounds, tops.values())
    machine = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads"
    peak = peak_of(machine)

    def more(who, rate):
        ceiling = rates[tops[makers[who][0]].name]
        columns = {"MFU": f"{mfu(c, c.max_seq_len, rate, ceiling):.1%}"}
        if on_gpu:
            of_peak = f"{mfu(c, c.max_seq_len, rate, peak):.1%}" if peak else "?"
            columns |= {"of data sheet": of_peak, "peak memory": f"{steps[who][1]:.2f} GB"}
        return columns

    llamas = [who for who in seconds if not who.startswith(("minillm", "nanoGPT"))]
    notes = [f"MFU: share of the measured matrix product. {line}",
             "An MFU above 100% says that this ceiling is wrong.", *left_out]
    if peak:
        notes.append(f"By the data sheet: {peak / 1e3:,.0f} TFLOP/s in bf16")
    rows = f"{len(inputs)} x {c.max_seq_len} tokens"
    title = f"Training step, {describe(name, c)}, {rows}, {machine}"
    return table(title, "tokens/s", inputs.numel() * (STEPS if on_gpu else 1), seconds,
                 fastest(seconds, llamas), more, notes)


def train(rounds: int = 10, peers: str | Path | None = None, shapes: list[str] | None = None,
          compiling: bool = False,
          show: Callable[[Table], None] = lambda table: None) -> list[Table]:
    """A training step (forward, loss, backward, clipping, AdamW): on a CPU of 16 x 256 tokens at
    shapes S and M in eager float32, and ours in its default precision; on a GPU of 32 to 64 x 512
    tokens at shapes 15M, 42M and 110M, all compiled and in bf16.

    Returns a list of Tables, one per shape; show(table) is called as each is done. The ratio is to
    the fastest peer with LLaMA's block. MFU counts the FLOPs of our shape, for nanoGPT, too. Peak
    memory is that of a contender by itself. On a CPU, freed memory is kept for all of them
    (keep_memory); otherwise, the address that a tensor happens to get would decide. Raises Refused
    as check does."""
    tables = []
    keep_memory()
    on_gpu = place()[1]
    named, peers = chosen(GPU_SHAPES if on_gpu else SHAPES, rounds, peers, shapes)
    for name, c in named:
        tables.append(train_shape(name, c, rounds, peers, compiling))
        show(tables[-1])
        if compiling or on_gpu:
            # Otherwise, the next shape would be compiled for dynamic sizes.
            torch.compiler.reset()
    return tables
