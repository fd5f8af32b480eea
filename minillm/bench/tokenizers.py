"""The speed of the tokenizer beside others: `python -m minillm.bench tokenize FILE`."""
import time
from pathlib import Path

from minillm.bench.arguments import Refused, check
from minillm.bench.peers import minbpe, minbpe_like, rust_tokenizer
from minillm.bench.timing import in_turns, table
from minillm.tokenizer import Tokenizer


def read(file):
    """The text of a file. Raises Refused if it is not there or no text."""
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{file} cannot be read as text in UTF-8: {error}") from None


def megabytes(text):
    return len(text.encode()) / 1e6


def once(work, text, cut):
    """Seconds that work(the first `cut` characters of text) takes, in proportion to the length of the whole."""
    part = text[:cut]
    began = time.perf_counter()
    work(part)
    return (time.perf_counter() - began) * megabytes(text) / megabytes(part)


def tokenize(file, rounds=10, peers=None, vocab_sizes=(1024, 4096), cut=50_000, show=lambda table: None):
    """Training a tokenizer of 1,024 tokens on a text file, and encoding that file by one of 4,096: MB/s. minbpe, which takes minutes to
    train on 1 MB, works on the first 50,000 characters, once.

    Returns the two Tables; show(table) is called as each is done. Raises Refused for a file that is no text or too small."""
    check(rounds, peers)
    text, (few, many), peers = read(file), vocab_sizes, peers and Path(peers)
    try:
        ours = Tokenizer.train(text, many, special_tokens=())
    except ValueError as error:
        raise Refused(f"{file} is too small a text: {error}") from None
    tables = [training(text, Path(file).name, few, rounds, minbpe(peers), cut)]
    show(tables[0])
    tables.append(encoding(text, Path(file).name, ours, rounds, minbpe_like(peers, ours), cut))
    show(tables[1])
    return tables


def training(text, name, vocab_size, rounds, peer, cut):
    """The Table of training; peer: a function that makes minbpe's tokenizer, or None."""
    seconds = in_turns({
        "tokenizers (Rust)": lambda: rust_tokenizer(text, vocab_size),
        "minillm": lambda: Tokenizer.train(text, vocab_size, special_tokens=())}, rounds)
    if peer:
        seconds["minbpe"] = [once(lambda part: peer().train(part, vocab_size), text, cut)]
    return table(f"Training a tokenizer of {vocab_size:,} tokens on {name} ({megabytes(text):.1f} MB)", "MB/s", megabytes(text), seconds,
                 "tokenizers (Rust)", notes=about(peer, cut))


def encoding(text, name, ours, rounds, peer, cut):
    """The Table of encoding by the tokenizer `ours`, by others of as many tokens, and by minbpe's with our merges, or None."""
    rust, engine, lines = rust_tokenizer(text, ours.n_vocab), ours.to_tiktoken(), text.splitlines(keepends=True)
    ours.encode(text)
    seconds = in_turns({
        "tokenizers (Rust)": lambda: rust.encode(text), "tokenizers (Rust), by lines": lambda: rust.encode_batch(lines),
        "tiktoken (Rust), our merges": lambda: engine.encode(text),
        "minillm, nothing cached": lambda: Tokenizer(ours.vocab, ours.merges).encode(text),
        "minillm, pre-tokens cached": lambda: ours.encode(text)}, rounds)
    if peer:
        seconds["minbpe"] = [once(peer.encode, text, cut)]
    return table(f"Encoding {name} ({megabytes(text):.1f} MB) with {ours.n_vocab:,} tokens", "MB/s", megabytes(text), seconds,
                 "tokenizers (Rust)", notes=about(peer, cut))


def about(peer, cut):
    return [f"minbpe: once, on the first {cut:,} characters"] if peer else []
