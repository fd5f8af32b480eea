"""The speed of the tokenizer beside others: `python -m minillm.bench tokenize FILE`."""
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minillm.bench.arguments import Refused, check
from minillm.bench.peers import minbpe, minbpe_like, rust_tokenizer
from minillm.bench.timing import Table, in_turns, table, working
from minillm.tokenizer import Tokenizer


def read(file: str | Path) -> str:
    """The text of a file. Raises Refused if it does not exist or is not text."""
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{file} cannot be read as text in UTF-8: {error}") from None


def megabytes(text: str) -> float:
    """The size of a text in UTF-8, in MB (10^6 bytes)."""
    return len(text.encode()) / 1e6


def once(work: Callable[[str], Any], text: str, cut: int) -> float:
    """Seconds that work(text) would take, from one call with the first `cut` characters."""
    part = text[:cut]
    began = time.perf_counter()
    work(part)
    return (time.perf_counter() - began) * megabytes(text) / megabytes(part)


def tokenize(file: str | Path, rounds: int = 10, peers: str | Path | None = None,
             vocab_sizes: tuple[int, int] = (1024, 4096), cut: int = 50_000,
             show: Callable[[Table], Any] = lambda table: None) -> list[Table]:
    """Training a tokenizer of 1,024 tokens on a text file, and encoding the file with one of 4,096:
    MB/s. minbpe, which takes minutes to train on 1 MB, works on the first 50,000 characters, once.

    Returns the two Tables; show(table) is called as each is done. Raises Refused as check does,
    and for a file that is not text or is too small.
    """
    check(rounds, peers)
    text, name = read(file), Path(file).name
    few, many = vocab_sizes
    peers = peers and Path(peers)
    try:
        ours = Tokenizer.train(text, many, special_tokens=())
    except ValueError:
        raise Refused(f"{file} is too small a text, or has too few different words, to train a "
                      f"tokenizer of {many:,} tokens on: name another file") from None
    tables = [training(text, name, few, rounds, peers, cut)]
    show(tables[0])
    tables.append(encoding(text, name, ours, rounds, peers, cut))
    show(tables[1])
    return tables


def by_minbpe(peers: Path | None, work: Callable[[], float],
              cut: int) -> tuple[dict[str, list[float]], list[str]]:
    """{"minbpe": [seconds]} of a work that times itself, and notes; both empty without minbpe."""
    if not peers or not (peers / "minbpe").is_dir():
        return {}, []
    seconds, left_out = working({"minbpe": work})
    notes = [f"minbpe: once, on the first {cut:,} characters"] if seconds else left_out
    return {name: [took] for name, took in seconds.items()}, notes


def training(text: str, name: str, vocab_size: int, rounds: int, peers: Path | None,
             cut: int) -> Table:
    """The Table of training; peers: a folder of checkouts, or None."""
    def peer():
        make = minbpe(peers)
        return once(lambda part: make().train(part, vocab_size), text, cut)

    seconds = in_turns({
        "tokenizers (Rust)": lambda: rust_tokenizer(text, vocab_size),
        "minillm": lambda: Tokenizer.train(text, vocab_size, special_tokens=()),
    }, rounds)
    more, notes = by_minbpe(peers, peer, cut)
    size = megabytes(text)
    title = f"Training a tokenizer of {vocab_size:,} tokens on {name} ({size:.1f} MB)"
    return table(title, "MB/s", size, seconds | more, "tokenizers (Rust)", notes=notes)


def encoding(text: str, name: str, ours: Tokenizer, rounds: int, peers: Path | None,
             cut: int) -> Table:
    """The Table of encoding by the tokenizer `ours` and by others with as many tokens.

    peers: a folder of checkouts, or None.
    """
    rust, engine = rust_tokenizer(text, ours.n_vocab), ours.to_tiktoken()
    lines = text.splitlines(keepends=True)
    ours.encode(text)
    seconds = in_turns({
        "tokenizers (Rust)": lambda: rust.encode(text),
        "tokenizers (Rust), by lines": lambda: rust.encode_batch(lines),
        "tiktoken (Rust), our merges": lambda: engine.encode(text),
        "minillm, nothing cached": lambda: Tokenizer(ours.vocab, ours.merges).encode(text),
        "minillm, pre-tokens cached": lambda: ours.encode(text),
    }, rounds)
    more, notes = by_minbpe(peers, lambda: once(minbpe_like(peers, ours).encode, text, cut), cut)
    size = megabytes(text)
    title = f"Encoding {name} ({size:.1f} MB) with {ours.n_vocab:,} tokens"
    return table(title, "MB/s", size, seconds | more, "tokenizers (Rust)", notes=notes)
