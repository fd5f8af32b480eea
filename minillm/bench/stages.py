"""What each stage scores with several seeds: `python -m minillm.bench stages --seeds 8`."""
import os
from collections.abc import Callable
from typing import Any

import torch

from minillm.arc import ranges, scorecard, sizes
from minillm.arc import stages as arc
from minillm.arc.scorecard import Row, cell
from minillm.bench.arguments import Refused

NAMES = ("base", "chat", "lora", "rlhf", "dpo", "int8")


def stages(seeds: int = 8, save: bool = False,
           show: Callable[[str], Any] = lambda text: None) -> list[list[Row]]:
    """Training every stage with several seeds, one after another, at the size in use: the mean,
    standard deviation, minimum and maximum of each column of the scorecard.

    Returns the rows of each seed, those of the stages in order; show(text) is called with each row
    as it is scored, and with a table of each stage at the end. save: write the ranges, with which
    `python -m minillm` compares a run, to minillm/arc/ranges.json. Finished stages are in the
    cache. Raises Refused, before any training, for fewer than two seeds and for a file that cannot
    be written; ValueError and OSError as cache.build does.
    """
    check(seeds, save)
    size = sizes.chosen()
    show(f"{seeds} seeds at the size {size}, torch {torch.__version__}")
    runs = [score_all(seed, show) for seed in range(seeds)]
    for table in tables(runs):
        show(f"\n{table}")
    if save:
        ranges.write(size, runs)
        show(f"\nsaved {ranges.PATH}")
    return runs


def check(seeds: int, save: bool) -> None:
    """Raises Refused, naming the value, for what cannot be measured or saved."""
    if seeds < 2:
        raise Refused(f"seeds must be at least 2, or there is no deviation: got {seeds}")
    if not save:
        return
    if not os.access(ranges.PATH.parent, os.W_OK):
        raise Refused(f"{ranges.PATH} cannot be written: leave out --save, or make the folder "
                      "writable")
    try:
        ranges.read()                         # other sizes in it are kept
    except ValueError as error:
        raise Refused(str(error)) from None


def score_all(seed: int, show: Callable[[str], Any]) -> list[Row]:
    """Train the stages with a seed, or load them, and score them; returns their rows."""
    rows, chat = [], None
    for name in NAMES:
        stage = getattr(arc, name)(bar=False, seed=seed)
        row = scorecard.score(name, stage.model, stage.tokenizer, chat, stage.setting)
        if name == "chat":
            chat = stage.model                # which later stages are compared with
        rows.append(row)
        # int8 is not trained: its history is that of dpo. The history of rlhf has no seconds.
        seconds = None if name == "int8" else stage.history[-1].get("seconds")
        trained = "" if seconds is None else f", {seconds:.0f} s of training"
        show(f"seed {seed}, {name}{trained}: {figures(row)}")
    return rows


def figures(row: Row) -> str:
    """The numbers of a row in one line."""
    return ", ".join(f"{column} {cell(column, value)}" for column, value in row.items()
                     if column != "stage" and value is not None)


def tables(runs: list[list[Row]]) -> list[str]:
    """A table for each stage, with rows for the mean, standard deviation, minimum and maximum."""
    texts = []
    for stage, columns in ranges.spreads(runs).items():
        rows = []
        for measure in "mean", "sd", "min", "max":
            numbers = {column: spread[measure] for column, spread in columns.items()}
            rows.append({f"{stage:>4}": measure} | numbers)
        texts.append(scorecard.table(rows))
    return texts
