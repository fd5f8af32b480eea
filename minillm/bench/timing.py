"""Contenders that take turns in one run, tables of the ratios of their medians, and a picture."""
import io
import statistics
import textwrap
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minillm.storage.files import replacing


def working(makers: Mapping[str, Callable[[], Any]],
            *trial: Any) -> tuple[dict[str, Any], list[str]]:
    """{name: make()} for each of {name: make} that works, and a note about each that does not.

    What others wrote may fail in any way (a checkout that is incomplete, another version of a
    library), and the comparison goes on without it. An error of ours, whose name begins with
    minillm, is raised. trial: if given, what was made is also called once with these arguments.
    """
    made, notes = {}, []
    for name, make in makers.items():
        try:
            work = make()
            if trial:
                work(*trial)
            made[name] = work
        except Exception as error:
            if name.startswith("minillm"):
                raise
            reason = (str(error).splitlines() or [""])[0]
            notes.append(f"Left out: {name} ({type(error).__name__}: {reason[:100]})")
    return made, notes


def in_turns(contenders: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Run each of {name: function} once to warm up, then `rounds` times in turns.

    Returns {name: [seconds]}. A function that times itself returns its seconds, a float. On a GPU
    the clock is read when the work is done, not when it has been asked for. Raises ValueError if
    rounds is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, or nothing is timed: got {rounds}")
    done = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, work in contenders.items():
            done()
            began = time.perf_counter()
            said = work()
            done()
            took = said if isinstance(said, float) else time.perf_counter() - began
            if turn > 0:
                seconds[name].append(took)
    return seconds


@dataclass(frozen=True)
class Row:
    """A contender in a Table.

    Its rate at the median time of its turns; the ratio of the reference's median time to its own;
    the lowest and the highest ratio of a turn; and further columns as {heading: text}.
    """

    name: str
    rate: float
    ratio: float
    low: float
    high: float
    more: dict[str, str] = field(default_factory=dict)


def rounded(rate: float) -> str:
    """A rate as text, with three digits or more."""
    return f"{rate:,.0f}" if rate >= 1000 else f"{rate:.3g}"


@dataclass(frozen=True)
class Table:
    """What one run found.

    Rows, the unit of their rates, the name of the row with ratio 1, and lines to print below.
    """

    title: str
    unit: str
    reference: str
    rows: list[Row]
    notes: tuple[str, ...] = ()

    def __str__(self):
        headings = list(dict.fromkeys(heading for row in self.rows for heading in row.more))
        columns = "".join(f"{heading:>16}" for heading in headings)
        lines = ["", self.title, f"{'':34}{self.unit:>14} {'ratio':>6}  (turns)      {columns}"]
        for row in self.rows:
            columns = "".join(f"{row.more.get(heading, ''):>16}" for heading in headings)
            lines.append(f"{row.name:34}{rounded(row.rate):>14} {row.ratio:6.2f}  "
                         f"({row.low:.2f} - {row.high:.2f}){columns}")
        return "\n".join(line.rstrip() for line in [*lines, *self.notes])


def table(title: str, unit: str, amount: float, seconds: dict[str, list[float]], reference: str,
          more: Callable[[str, float], dict[str, str]] = lambda name, rate: {},
          notes: Iterable[str] = ()) -> Table:
    """The Table of {name: [seconds]} in which each contender did `amount` of `unit`.

    A ratio is the reference's time over the contender's: of the medians, and of each turn.
    more(name, rate) gives further columns as {heading: text}.
    """
    rows, base = [], seconds[reference]
    for name, times in seconds.items():
        median = statistics.median(times)
        rate, ratio = amount / median, statistics.median(base) / median
        ratios = [r / t for r, t in zip(base, times)]
        rows.append(Row(name, rate, ratio, min(ratios), max(ratios), more(name, rate)))
    return Table(title, unit, reference, rows, tuple(notes))


def fastest(seconds: dict[str, list[float]], names: Collection[str]) -> str:
    """Which of the names has the lowest median; which of all, if none of the names was timed."""
    return min([name for name in seconds if name in names] or seconds,
               key=lambda name: statistics.median(seconds[name]))


def plot(tables: Sequence[Table], path: str | Path | None = None) -> Figure:
    """A figure with a panel for each Table.

    Bars show the ratios of medians, lines reach from the lowest to the highest turn, and rates are
    written beside them. path: also save it there, in the format that its suffix names; an error
    leaves no partial file.
    """
    heights = [1.3 + 0.3 * len(t.rows) for t in tables]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    panels = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, t in zip(panels, tables):
        draw(axes, t)
    if path is not None:
        picture = io.BytesIO()
        figure.savefig(picture, format=Path(path).suffix[1:], dpi=120)
        with replacing(path) as file:
            file.write(picture.getvalue())
    return figure


def draw(axes: Axes, t: Table) -> None:
    """One panel of plot."""
    ratios = [row.ratio for row in t.rows]
    ours = [row.name.startswith("minillm") for row in t.rows]
    # 0 if all turns are on one side of the ratio of medians, which may happen
    below = [max(0, row.ratio - row.low) for row in t.rows]
    above = [max(0, row.high - row.ratio) for row in t.rows]
    axes.barh([row.name for row in t.rows], ratios, xerr=[below, above],
              color=["tab:orange" if own else "tab:blue" for own in ours], capsize=2)
    for i, row in enumerate(t.rows):
        end = max(row.ratio, row.high), i
        axes.annotate(f"  {rounded(row.rate)} {t.unit}", end, va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(max(row.ratio, row.high) for row in t.rows))
    axes.set_xlabel(f"speed as a multiple of {t.reference} (lines: lowest to highest turn)")
    axes.set_title("\n".join(textwrap.wrap(t.title, 100)), fontsize=9)
