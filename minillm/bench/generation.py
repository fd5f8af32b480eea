"""The speed of generation beside others, in float32 and in 8 bits: `python -m minillm.bench generate` and `quantize`."""
import copy
import tempfile
from functools import partial
from pathlib import Path

import torch

from minillm.bench.arguments import chosen, describe
from minillm.bench.ceilings import bytes_a_token, measured, memory_read
from minillm.bench.peers import c_programs, greedy, int8_writers, with_weights_of, writers
from minillm.bench.timing import fastest, table
from minillm.fast_decode import FastDecoder
from minillm.generate import generate as our_generate
from minillm.lora import TARGETS
from minillm.model import Llama, LlamaConfig
from minillm.quantize import Int8Linear, quantize_model
from minillm.train import default_precision

TALKERS = {"S": LlamaConfig(vocab_size=896, dim=128, n_layers=4, n_heads=4, n_kv_heads=2, hidden_dim=344),
           "M": LlamaConfig(vocab_size=32000, dim=288, n_layers=6, n_heads=6, n_kv_heads=6, hidden_dim=768),
           "L": LlamaConfig(vocab_size=32000, dim=768, n_layers=12, n_heads=12, n_kv_heads=12, hidden_dim=2048)}


def talker(c):
    """Our model of a shape with random weights."""
    torch.manual_seed(0)
    return Llama(c).eval()


def writing_table(title, c, ids, n, contenders, rounds, widths, reference=None, programs=()):
    """The Table of {name: function (ids, n)} that write n tokens after ids (b, 8), and of programs {name: function (n) -> seconds}.

    widths: {name: bytes a weight}, 4 if not in it. reference: None for the fastest of the PyTorch peers."""
    written = {who: work(ids, n)[:, ids.shape[1]:] for who, work in contenders.items()}
    first = next(iter(written))
    same = ", ".join(f"{who} {(out == written[first]).float().mean():.0%}" for who, out in written.items() if who != first)
    works = {who: partial(work, ids, n) for who, work in contenders.items()}
    works |= {who: partial(work, n) for who, work in dict(programs).items()}
    top = memory_read()
    seconds, rates, line = measured(works, rounds, [top])

    def more(who, rate):
        return {"of memory rate": f"{bytes_a_token(c, widths.get(who, 4)) * rate / len(ids) / 1e9 / rates[top.name]:.1%}"}
    peers = [who for who in contenders if not who.startswith("minillm")]
    return table(f"{title}, batch {len(ids)}, {n} tokens, {torch.get_num_threads()} threads", "tokens/s", len(ids) * n, seconds,
                 reference or fastest(seconds, peers), more, [f"The same tokens as {first}: {same}", line])


def generate(rounds=10, peers=None, shapes=None, batches=(1, 16), new_tokens=64, show=lambda table: None):
    """Greedy generation after a prompt of 8 tokens, with cache, batch 1 and 16, in float32 on a CPU, at shapes S, M and L: tokens/s of all
    rows. The share of the memory rate counts the bytes of the weights, read once for a token of each row; small ones come from a cache, and
    go beyond it.

    Returns a list of Tables; show(table) is called as each is done."""
    tables = []
    shapes, peers = chosen(TALKERS, rounds, peers, shapes)
    for name, c in shapes:
        model = talker(c)
        contenders = writers(model, peers) | {"minillm": partial(our_generate, FastDecoder(model), temperature=0)}
        with tempfile.TemporaryDirectory() as work:
            programs = c_programs(peers, c, Path(work), ["run"]) if 1 in batches else {}
            for batch in batches:
                ids = torch.randint(c.vocab_size, (batch, 8), generator=torch.Generator().manual_seed(0))
                tables.append(writing_table(f"Generation, {describe(name, c)}", c, ids, new_tokens, contenders, rounds, {},
                                            programs=programs if batch == 1 else ()))
                show(tables[-1])
    return tables


def quantize(rounds=10, peers=None, shapes=None, new_tokens=64, show=lambda table: None):
    """Greedy generation by models in int8, all linear layers, batch 1, beside float32, on a CPU, at shapes M and L: tokens/s.

    Returns a list of Tables; show(table) is called as each is done."""
    tables = []
    shapes, peers = chosen(TALKERS, rounds, peers, shapes or ["M", "L"])
    for name, c in shapes:
        model = talker(c)
        peer = with_weights_of(model)
        small = int8_writers(peer, torch.bfloat16 if default_precision("cpu") == "bf16" else torch.float32)
        ours = {f"minillm {kind}": quantize_model(copy.deepcopy(model), partial(Int8Linear, digits=digits), (*TARGETS, "lm_head"))
                for kind, digits in (("int8, exact", 3), ("int8 x int8", 1))}
        contenders = {"transformers float32": partial(greedy, peer), **small} | {
            who: partial(our_generate, FastDecoder(m), temperature=0) for who, m in ({"minillm float32": model} | ours).items()}
        ids = torch.randint(c.vocab_size, (1, 8), generator=torch.Generator().manual_seed(0))
        with tempfile.TemporaryDirectory() as work:
            tables.append(writing_table(f"Generation in int8, {describe(name, c)}", c, ids, new_tokens, contenders, rounds,
                                        dict.fromkeys([*small, *ours, "llama2.c runq.c"], 1), "transformers float32",
                                        c_programs(peers, c, Path(work))))
        show(tables[-1])
    return tables
