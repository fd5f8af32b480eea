"""Time our code beside others, in turns in one run, and print ratios of medians: `python -m minillm.bench train` (or `generate`, `quantize`, `tokenize FILE`)."""
import argparse
import copy
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from minillm.generate import generate
from minillm.lora import TARGETS
from minillm.model import Llama, LlamaConfig
from minillm.optim import AdamW
from minillm.peers import c_programs, dynamic_int8, hugging_face, peer_step, peers_in, rust_tokenizer
from minillm.quantize import Int8Linear, quantize_model
from minillm.tokenizer import Tokenizer
from minillm.train import clip_gradients, default_precision, token_loss

SHAPES = {"S": LlamaConfig(vocab_size=1024, dim=128, n_layers=4, n_heads=4, n_kv_heads=4, hidden_dim=344),
          "M": LlamaConfig(vocab_size=1024, dim=288, n_layers=6, n_heads=6, n_kv_heads=6, hidden_dim=768)}

TALKERS = {"S": LlamaConfig(vocab_size=896, dim=128, n_layers=4, n_heads=4, n_kv_heads=2, hidden_dim=344),
           "M": LlamaConfig(vocab_size=32000, dim=288, n_layers=6, n_heads=6, n_kv_heads=6, hidden_dim=768),
           "L": LlamaConfig(vocab_size=32000, dim=768, n_layers=12, n_heads=12, n_kv_heads=12, hidden_dim=2048)}


def in_turns(contenders, rounds):
    """Run each of {name: function} once to warm up, then `rounds` times in turns; returns {name: [seconds]}.

    A function that times itself returns its seconds, a float."""
    seconds = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, work in contenders.items():
            began = time.perf_counter()
            said = work()
            if turn:
                seconds[name].append(said if isinstance(said, float) else time.perf_counter() - began)
    return seconds


def report(title, seconds, amount, unit, reference):
    """A line per contender: rate by the median, ratio of medians to the reference, and the spread of the single ratios."""
    print(f"\n{title}\n{'':34}{unit:>14} {'ratio':>6}  (lowest - highest of the turns)")
    for name, times in seconds.items():
        ratios = sorted(r / t for r, t in zip(seconds[reference], times))
        middle = statistics.median(seconds[reference]) / statistics.median(times)
        print(f"{name:34}{amount / statistics.median(times):14,.1f} {middle:6.2f}  ({ratios[0]:.2f} - {ratios[-1]:.2f})")


def our_step(config, precision, inputs, targets):
    model = Llama(config)
    optimizer = AdamW(model)

    def step():
        (token_loss(model, inputs, targets, precision) / targets.numel()).backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step(1e-3)
    return step


def train(rounds, folder, batch=16):
    """A training step (forward, loss, backward, clipping, AdamW) of 16 x 256 tokens at both shapes."""
    for name, c in SHAPES.items():
        ids = torch.randint(c.vocab_size, (batch, c.max_seq_len + 1), generator=torch.Generator().manual_seed(0))
        inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        precision = default_precision("cpu")
        contenders = {"transformers float32": peer_step(hugging_face(c), lambda model: model(inputs, use_cache=False).logits, inputs, targets),
                      "minillm float32": our_step(c, "float32", inputs, targets)}
        if precision != "float32":
            contenders[f"minillm {precision} (default)"] = our_step(c, precision, inputs, targets)
        contenders |= peers_in(folder, c, inputs, targets) if folder else {}
        report(f"Training step, shape {name} ({c.dim} wide, {c.n_layers} layers), {torch.get_num_threads()} threads",
               in_turns(contenders, rounds), targets.numel(), "tokens/s", "transformers float32")


def greedy(model, ids, n):
    """A function that lets transformers write n tokens after the prompts ids (b, t)."""
    model.generation_config.eos_token_id = None
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": n, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(ids, **settings)


def side_by_side(title, contenders, reference, ids, n, rounds, programs=()):
    """Time functions that write n tokens after ids (b, 8); say how many of their tokens are those of the reference.

    programs: functions of n that write from nothing, and return their seconds."""
    written = {name: work()[:, ids.shape[1]:] for name, work in contenders.items()}
    same = ", ".join(f"{name} {(out == written[reference]).float().mean():.0%}" for name, out in written.items() if name != reference)
    contenders = contenders | {name: partial(work, n) for name, work in dict(programs).items()}
    report(f"{title}, batch {len(ids)}, {torch.get_num_threads()} threads; the same tokens as {reference}: {same}",
           in_turns(contenders, rounds), len(ids) * n, "tokens/s", reference)


def pair(name, batch):
    """Our model of a shape of TALKERS with random weights, transformers' with the same, prompts (batch, 8), and what they are called."""
    c = TALKERS[name]
    torch.manual_seed(0)
    model, peer = Llama(c).eval(), hugging_face(c).eval()
    peer.load_state_dict(model.state_dict())
    return model, peer, torch.randint(c.vocab_size, (batch, 8)), f"shape {name} ({c.dim} wide, {c.n_layers} layers, vocabulary {c.vocab_size:,})"


def write(rounds, new_tokens=64):
    """Greedy generation after a prompt of 8 tokens, with cache, batch 1 and 16, float32: tokens/s of all rows."""
    for name in ("S", "M"):
        for batch in (1, 16):
            model, peer, ids, shape = pair(name, batch)
            side_by_side(f"Generation, {shape}", {"transformers": greedy(peer, ids, new_tokens),
                         "minillm": partial(generate, model, ids, new_tokens, temperature=0)}, "transformers", ids, new_tokens, rounds)


def shrink(rounds, folder, new_tokens=64):
    """Greedy generation by models in int8, all linear layers, batch 1, beside float32: tokens/s."""
    for name in ("M", "L"):
        model, peer, ids, shape = pair(name, 1)
        ours = {"minillm float32": model} | {
            f"minillm {kind}": quantize_model(copy.deepcopy(model), partial(Int8Linear, digits=digits), (*TARGETS, "lm_head"))
            for kind, digits in (("int8, exact", 3), ("int8 x int8", 1))}
        contenders = {"transformers float32": greedy(peer, ids, new_tokens),
                      "transformers, dynamic int8": greedy(dynamic_int8(peer), ids, new_tokens)}
        contenders |= {kind: partial(generate, m, ids, new_tokens, temperature=0) for kind, m in ours.items()}
        with tempfile.TemporaryDirectory() as work:
            programs = c_programs(folder, TALKERS[name], Path(work)) if folder else {}
            side_by_side(f"Generation in int8, {shape}", contenders, "transformers float32", ids, new_tokens, rounds, programs)


def tokenize(rounds, path, vocab_size=1024):
    """Training a vocabulary of 1,024 on a text file, and encoding that file."""
    text = path.read_text(encoding="utf-8")
    report(f"Training a tokenizer of {vocab_size} tokens on {path.name}", in_turns({
        "tokenizers (Rust)": lambda: rust_tokenizer(text, vocab_size), "minillm": lambda: Tokenizer.train(text, vocab_size)}, rounds),
        len(text.encode()) / 1e6, "MB/s", "tokenizers (Rust)")
    rust, ours = rust_tokenizer(text, vocab_size), Tokenizer.train(text, vocab_size)
    engine, saved = ours.to_tiktoken(), (ours.vocab, ours.merges, ours.special_tokens)
    report("Encoding that file, nothing cached", in_turns({
        "tokenizers (Rust)": lambda: rust.encode(text), "minillm": lambda: Tokenizer(*saved).encode(text),
        "minillm, to_tiktoken": lambda: engine.encode(text)}, rounds), len(text.encode()) / 1e6, "MB/s", "tokenizers (Rust)")


def main():
    parser = argparse.ArgumentParser(prog="python -m minillm.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="timed runs of each contender (default 10)")
    what = parser.add_subparsers(dest="what", required=True)
    what.add_parser("train", help=train.__doc__).add_argument("--peers", type=Path, help="folder with checkouts of llama2.c, nanoGPT")
    what.add_parser("generate", help=write.__doc__)
    what.add_parser("quantize", help=shrink.__doc__).add_argument("--peers", type=Path, help="folder with a checkout of llama2.c")
    what.add_parser("tokenize", help=tokenize.__doc__).add_argument("file", type=Path)
    options = parser.parse_args()
    if options.what == "train":
        train(options.rounds, options.peers)
    elif options.what == "generate":
        write(options.rounds)
    elif options.what == "quantize":
        shrink(options.rounds, options.peers)
    else:
        tokenize(options.rounds, options.file)


if __name__ == "__main__":
    main()
