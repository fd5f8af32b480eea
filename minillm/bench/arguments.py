"""What the benchmark is asked for, checked before anything is timed."""
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from minillm.model import LlamaConfig, count_parameters

CHECKOUTS = ("llama2.c", "nanoGPT", "minimind", "LLMs-from-scratch", "minbpe")


class Refused(ValueError):
    """What was asked for cannot be measured."""


def check(rounds: int = 1, peers: str | Path | None = None, shapes: Sequence[str] = (),
          known: Collection[str] = (), picture: Path | None = None) -> None:
    """Raises Refused, naming the value and what to do, for what cannot be measured."""
    if rounds < 1:
        raise Refused(f"rounds must be at least 1, or nothing is timed: got {rounds}")
    if peers is not None and not Path(peers).is_dir():
        raise Refused(f"there is no folder {peers}")
    if peers is not None and not any((Path(peers) / name).is_dir() for name in CHECKOUTS):
        raise Refused(f"the folder {peers} holds none of the checkouts {', '.join(CHECKOUTS)}")
    if unknown := [name for name in shapes if name not in known]:
        raise Refused(f"there is no shape {unknown[0]!r} here: choose from {', '.join(known)}")
    if picture is None:
        return
    if not picture.parent.is_dir() or picture.suffix not in (".png", ".svg", ".pdf"):
        raise Refused(f"the plot cannot be saved as {picture}: name a .png, .svg or .pdf file in a "
                      "folder that exists")


def chosen(known: Mapping[str, LlamaConfig], rounds: int, peers: str | Path | None,
           shapes: Sequence[str] | None) -> tuple[list[tuple[str, LlamaConfig]], Path | None]:
    """The names and configs to measure, and the folder of checkouts as a Path or None.

    Raises Refused as check does.
    """
    check(rounds, peers, shapes or (), known)
    return [(name, known[name]) for name in shapes or known], peers and Path(peers)


def describe(name: str, c: LlamaConfig) -> str:
    """A shape in words, for the title of a table."""
    return (f"shape {name} ({c.dim} wide, {c.n_layers} layers, vocabulary {c.vocab_size:,}, "
            f"{count_parameters(c) / 1e6:.1f} M parameters)")
