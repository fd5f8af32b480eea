"""Time our code beside others, in turns in one run, and print ratios of medians: `python -m minillm.bench train` (or `generate`, or `tokenize FILE`)."""
import argparse
import importlib.util
import statistics
import sys
import time
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers

from minillm.generate import generate
from minillm.model import Llama, LlamaConfig
from minillm.tokenizer import PATTERN, Tokenizer
from minillm.optim import AdamW
from minillm.train import clip_gradients, default_precision, token_loss

SHAPES = {"S": LlamaConfig(vocab_size=1024, dim=128, n_layers=4, n_heads=4, n_kv_heads=4, hidden_dim=344),
          "M": LlamaConfig(vocab_size=1024, dim=288, n_layers=6, n_heads=6, n_kv_heads=6, hidden_dim=768)}

TALKERS = {"S": LlamaConfig(vocab_size=896, dim=128, n_layers=4, n_heads=4, n_kv_heads=2, hidden_dim=344),
           "M": LlamaConfig(vocab_size=32000, dim=288, n_layers=6, n_heads=6, n_kv_heads=6, hidden_dim=768)}


def in_turns(contenders, rounds):
    """Run each of {name: function} once to warm up, then `rounds` times in turns; returns {name: [seconds]}."""
    seconds = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, work in contenders.items():
            began = time.perf_counter()
            work()
            if turn:
                seconds[name].append(time.perf_counter() - began)
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


def peer_step(model, logits_of, inputs, targets):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step():
        F.cross_entropy(logits_of(model).flatten(0, 1), targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def hugging_face(c):
    """transformers' LLaMA of the same shape."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, intermediate_size=c.hidden_dim, max_position_embeddings=c.max_seq_len,
        rms_norm_eps=c.norm_eps))


def module_at(path):
    spec = importlib.util.spec_from_file_location(f"peer_{path.parent.name.replace('.', '_')}", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peers_in(folder, c, inputs, targets):
    """Steps of the models in checkouts of llama2.c and nanoGPT, where `folder` has them."""
    steps = {}
    if (path := folder / "llama2.c" / "model.py").exists():
        m = module_at(path)
        args = m.ModelArgs(dim=c.dim, n_layers=c.n_layers, n_heads=c.n_heads, n_kv_heads=c.n_kv_heads, vocab_size=c.vocab_size,
                           hidden_dim=c.hidden_dim, max_seq_len=c.max_seq_len)
        steps["llama2.c float32"] = peer_step(m.Transformer(args), lambda model: model(inputs, targets), inputs, targets)
    if (path := folder / "nanoGPT" / "model.py").exists():
        m = module_at(path)
        config = m.GPTConfig(block_size=c.max_seq_len, vocab_size=c.vocab_size, n_layer=c.n_layers, n_head=c.n_heads,
                             n_embd=c.dim, bias=False)
        steps["nanoGPT float32 (GPT-2 block)"] = peer_step(m.GPT(config), lambda model: model(inputs, targets)[0], inputs, targets)
    return steps


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


def write(rounds, new_tokens=64):
    """Greedy generation after a prompt of 8 tokens, with cache, batch 1 and 16, float32: tokens/s of all rows."""
    for name, c in TALKERS.items():
        model = Llama(c)
        peer = hugging_face(c).eval()
        peer.load_state_dict(model.state_dict())
        peer.generation_config.eos_token_id = None
        for batch in (1, 16):
            ids = torch.randint(c.vocab_size, (batch, 8), generator=torch.Generator().manual_seed(0))
            settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
            contenders = {"transformers generate": lambda: peer.generate(ids, **settings),
                          "minillm generate": lambda: generate(model, ids, new_tokens, temperature=0)}
            ours, theirs = (work() for work in contenders.values())
            same = (ours[:, 8:] == theirs[:, 8:]).float().mean().item()
            report(f"Generation, shape {name} ({c.dim} wide, {c.n_layers} layers, vocabulary {c.vocab_size:,}), batch {batch}, "
                   f"{torch.get_num_threads()} threads; {same:.0%} of the tokens are the same",
                   in_turns(contenders, rounds), batch * new_tokens, "tokens/s", "transformers generate")


def rust_tokenizer(text, vocab_size):
    """The same training by Hugging Face's tokenizers, in Rust."""
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator([text], tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False))
    return t


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
    what.add_parser("tokenize", help=tokenize.__doc__).add_argument("file", type=Path)
    options = parser.parse_args()
    if options.what == "train":
        train(options.rounds, options.peers)
    elif options.what == "generate":
        write(options.rounds)
    else:
        tokenize(options.rounds, options.file)


if __name__ == "__main__":
    main()
