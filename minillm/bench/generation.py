"""The speed of generation beside others, in float32 and in 8 bits.

    python -m minillm.bench generate
    python -m minillm.bench quantize
"""
import copy
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillm.bench.arguments import chosen, describe
from minillm.bench.ceilings import bytes_a_token, measured, memory_read
from minillm.bench.peers import c_programs, greedy, int8_writers, with_weights_of, writers
from minillm.bench.timing import Table, fastest, table, working
from minillm.fast_decode import FastDecoder
from minillm.generate import generate as our_generate
from minillm.lora import TARGETS
from minillm.model import Llama, LlamaConfig
from minillm.quantize import Int8Linear, quantize_model
from minillm.train import default_precision

TALKERS = {
    "S": LlamaConfig(vocab_size=896, dim=128, n_layers=4, n_heads=4, n_kv_heads=2, hidden_dim=344),
    "M": LlamaConfig(vocab_size=32000, dim=288, n_layers=6, n_heads=6, n_kv_heads=6,
                     hidden_dim=768),
    "L": LlamaConfig(vocab_size=32000, dim=768, n_layers=12, n_heads=12, n_kv_heads=12,
                     hidden_dim=2048),
}


def talker(c: LlamaConfig) -> Llama:
    """Our model of a shape with random weights."""
    torch.manual_seed(0)
    return Llama(c).eval()


def prompt(c: LlamaConfig, rows: int) -> Tensor:
    """Ids (rows, 8) to continue, the same at each call."""
    return torch.randint(c.vocab_size, (rows, 8), generator=torch.Generator().manual_seed(0))


def writing_table(title: str, c: LlamaConfig, ids: Tensor, n: int, contenders: dict[str, Callable],
                  rounds: int, widths: Mapping[str, float], reference: str | None = None,
                  programs: Mapping[str, Callable] | Collection = (),
                  left_out: Collection[str] = ()) -> Table:
    """The Table of {name: function (ids, n) -> (b, 8 + n)} that write n tokens after ids (b, 8).

    programs: contenders that time themselves, {name: function (n) -> seconds}. widths: {name: bytes
    per weight}, 4 if not in it. reference: None for the fastest of the PyTorch peers. left_out:
    notes of timing.working.
    """
    written = {who: work(ids, n)[:, ids.shape[1]:] for who, work in contenders.items()}
    first = next(iter(written))
    agreement = [f"{who} {(out == written[first]).float().mean():.0%}"
                 for who, out in written.items() if who != first]
    works = {who: partial(work, ids, n) for who, work in contenders.items()}
    works |= {who: partial(work, n) for who, work in dict(programs).items()}
    top = memory_read()
    seconds, rates, line = measured(works, rounds, [top])

    def more(who, rate):
        steps = rate / len(ids)                     # per second; each reads all weights once
        gigabytes = bytes_a_token(c, widths.get(who, 4)) * steps / 1e9
        return {"of memory rate": f"{gigabytes / rates[top.name]:.1%}"}

    title = f"{title}, batch {len(ids)}, {n} tokens, {torch.get_num_threads()} threads"
    peers = [who for who in contenders if not who.startswith("minillm")]
    notes = [f"The same tokens as {first}: {', '.join(agreement)}", line,
             "A share above 100%: the weights come from a cache, or this ceiling is wrong.",
             *left_out]
    return table(title, "tokens/s", len(ids) * n, seconds, reference or fastest(seconds, peers),
                 more, notes)


def generate(rounds: int = 10, peers: str | Path | None = None, shapes: Sequence[str] | None = None,
             batches: Sequence[int] = (1, 16), new_tokens: int = 64,
             show: Callable[[Table], Any] = lambda table: None) -> list[Table]:
    """Greedy generation after a prompt of 8 tokens, with a key-value cache, batch 1 and 16, in
    float32 on a CPU, at shapes S, M and L: tokens/s of all rows. The share of the memory rate
    counts the bytes of the weights, read once for a token of each row; small models come from the
    CPU's cache, and may exceed that rate.

    Returns a list of Tables; show(table) is called as each is done. Raises Refused as check does.
    """
    tables = []
    shapes, peers = chosen(TALKERS, rounds, peers, shapes)
    for name, c in shapes:
        model = talker(c)
        contenders, left_out = working(writers(model, peers), prompt(c, 1), 2)
        contenders["minillm"] = partial(our_generate, FastDecoder(model), temperature=0)
        title = f"Generation, {describe(name, c)}"
        with tempfile.TemporaryDirectory() as work:
            programs, failed = working(c_programs(peers, c, Path(work), ["run"]), 2)
            for batch in batches:
                beside = programs if batch == 1 else ()         # they write one text at a time
                tables.append(writing_table(title, c, prompt(c, batch), new_tokens, contenders,
                                            rounds, {}, programs=beside,
                                            left_out=left_out + failed))
                show(tables[-1])
    return tables


def quantize(rounds: int = 10, peers: str | Path | None = None, shapes: Sequence[str] | None = None,
             new_tokens: int = 64,
             show: Callable[[Table], Any] = lambda table: None) -> list[Table]:
    """Greedy generation by models in int8, all linear layers, batch 1, beside float32, on a CPU, at
    shapes M and L: tokens/s.

    Returns a list of Tables; show(table) is called as each is done. Raises Refused as check does.
    """
    tables = []
    shapes, peers = chosen(TALKERS, rounds, peers, shapes or ["M", "L"])
    floats = torch.bfloat16 if default_precision("cpu") == "bf16" else torch.float32
    for name, c in shapes:
        model = talker(c)
        peer = with_weights_of(model)
        others, left_out = working(int8_writers(peer, floats), prompt(c, 1), 2)
        ours = {"minillm int8, exact": int8_copy(model, digits=3),
                "minillm int8 x int8": int8_copy(model, digits=1)}
        contenders = {"transformers float32": partial(greedy, peer)} | others
        for who, m in ({"minillm float32": model} | ours).items():
            contenders[who] = partial(our_generate, FastDecoder(m), temperature=0)
        widths = dict.fromkeys([*others, *ours, "llama2.c runq.c"], 1)
        title = f"Generation in int8, {describe(name, c)}"
        with tempfile.TemporaryDirectory() as work:
            programs, failed = working(c_programs(peers, c, Path(work)), 2)
            tables.append(writing_table(title, c, prompt(c, 1), new_tokens, contenders, rounds,
                                        widths, "transformers float32", programs,
                                        left_out + failed))
        show(tables[-1])
    return tables


def int8_copy(model: Llama, digits: int) -> Llama:
    """A copy of a model with all its linear layers in int8; digits: see Int8Linear."""
    layer = partial(Int8Linear, digits=digits)
    return quantize_model(copy.deepcopy(model), layer, (*TARGETS, "lm_head"))
