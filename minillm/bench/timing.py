"""Contenders that take turns in one run, tables of the ratios of their medians, and the picture of such tables."""
import io
import statistics
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure

from minillm.storage.files import replacing


def in_turns(contenders, rounds):
    """Run each of {name: function} once to warm up, then `rounds` times in turns; returns {name: [seconds]}.

    A function that times itself returns its seconds, a float. On a GPU the work must be done, not only asked for, before the clock is read.
    Raises ValueError if rounds is below 1."""
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
            if turn:
                seconds[name].append(said if isinstance(said, float) else time.perf_counter() - began)
    return seconds


@dataclass(frozen=True)
class Row:
    """A contender: its rate by the median of the turns, the ratio of its median to the reference's, the lowest and highest ratio of a
    turn, and further columns as {heading: text}."""

    name: str
    rate: float
    ratio: float
    low: float
    high: float
    more: dict = field(default_factory=dict)


def rounded(rate):
    return f"{rate:,.0f}" if rate >= 1000 else f"{rate:.3g}"


@dataclass(frozen=True)
class Table:
    """What one run found: rows, the unit of their rates, the name of the row with ratio 1, and lines to print below."""

    title: str
    unit: str
    reference: str
    rows: list
    notes: tuple = ()

    def __str__(self):
        headings = list(dict.fromkeys(heading for row in self.rows for heading in row.more))
        lines = [f"\n{self.title}", f"{'':34}{self.unit:>14} {'ratio':>6}  (turns)      " + "".join(f"{h:>16}" for h in headings)]
        lines += [f"{row.name:34}{rounded(row.rate):>14} {row.ratio:6.2f}  ({row.low:.2f} - {row.high:.2f})"
                  + "".join(f"{row.more.get(h, ''):>16}" for h in headings) for row in self.rows]
        return "\n".join(line.rstrip() for line in [*lines, *self.notes])


def table(title, unit, amount, seconds, reference, more=lambda name, rate: {}, notes=()):
    """The Table of {name: [seconds]} in which each contender worked off `amount` of `unit`; more(name, rate) are further columns.

    A ratio is the reference's time over the contender's: of the medians, and of each turn."""
    rows, base = [], seconds[reference]
    for name, times in seconds.items():
        rate, ratios = amount / statistics.median(times), [r / t for r, t in zip(base, times)]
        rows.append(Row(name, rate, statistics.median(base) / statistics.median(times), min(ratios), max(ratios), more(name, rate)))
    return Table(title, unit, reference, rows, tuple(notes))


def fastest(seconds, names):
    """Which of the names has the lowest median."""
    return min((name for name in seconds if name in names), key=lambda name: statistics.median(seconds[name]))


def plot(tables, path=None):
    """A figure with a panel for each Table: bars for the ratios of medians, lines from the lowest to the highest turn, rates beside them.

    path: also save it there, as the kind of picture that the name ends in; the file is whole or not there."""
    heights = [1.3 + 0.3 * len(t.rows) for t in tables]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    panels = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, t in zip(panels, tables):
        ratios = [row.ratio for row in t.rows]
        colours = ["tab:orange" if row.name.startswith("minillm") else "tab:blue" for row in t.rows]
        # a turn's ratio may lie on one side of the ratio of medians only
        spread = [[max(0, r.ratio - r.low) for r in t.rows], [max(0, r.high - r.ratio) for r in t.rows]]
        axes.barh([row.name for row in t.rows], ratios, xerr=spread, color=colours, capsize=2)
        for i, row in enumerate(t.rows):
            axes.annotate(f"  {rounded(row.rate)} {t.unit}", (max(row.ratio, row.high), i), va="center", fontsize=8)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.3 * max(max(row.ratio, row.high) for row in t.rows))
        axes.set_xlabel(f"speed as a multiple of {t.reference} (lines: lowest to highest turn)")
        axes.set_title("\n".join(textwrap.wrap(t.title, 100)), fontsize=9)
    if path is not None:
        picture = io.BytesIO()
        figure.savefig(picture, format=Path(path).suffix[1:], dpi=120)
        with replacing(path) as file:
            file.write(picture.getvalue())
    return figure
