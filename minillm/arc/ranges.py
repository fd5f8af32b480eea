"""Is a run normal? What several seeds scored, kept in ranges.json, and how a scorecard compares.

`python -m minillm.bench stages --seeds 8 --save` measures the ranges of the size in use and writes
them; `python -m minillm` compares each run with them.
"""
import json
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch

from minillm.arc.scorecard import Row, cell
from minillm.storage.files import replacing

PATH = Path(__file__).with_name("ranges.json")
SPEEDS = ("tokens/s",)                    # say more about the machine than about the model
WIDTH = 5                                 # standard deviations, see outside()

# What to look at when a figure is not normal, by column, and for columns without an entry.
ADVICE = {
    "bits/byte": "how far the loss fell (history of the stage), and the settings (arc/sizes.py)",
    "gap": "how far the loss fell (history of the stage), and the settings (arc/sizes.py)",
    "consistency": "if bits/byte is normal, how stories end (world/stories.py) and how that is "
                   "scored (arc/scorecard.py)",
    "valid": "if bits/byte is normal, the first faults of the stories that it writes (faults() in "
             "arc/scorecard.py), and how they are sampled (generate.py)",
    "answers": "the dialogues (world/questions.py) and which of their tokens count (sft.py)",
    "unknown": "the questions that have no answer (missing() in world/questions.py), and whether "
               "the model compares both the color and the noun of a thing (chapter 11)",
    "requests": "the dialogues that begin stories (openings() in world/questions.py)",
    "harbour": "if only lora is off, the adapter (lora.py) and the dialogues from the harbour",
    "wins": "the preference pairs, and the loss over them (dpo.py, history of the stage)",
    "MB": "the shape of the model, and the type of its weights",
}
OTHERWISE = "the loss (history of the stage) and the settings (arc/sizes.py)"

Spread = dict[str, float]                 # mean, sd, min, max
Ranges = dict[str, dict[str, Spread]]     # stage: column: Spread


def spread(numbers: Sequence[float]) -> Spread:
    """Mean, standard deviation (divided by n - 1), minimum and maximum of two numbers or more."""
    return {"mean": statistics.mean(numbers), "sd": statistics.stdev(numbers),
            "min": min(numbers), "max": max(numbers)}


def spreads(runs: Sequence[Sequence[Row]]) -> Ranges:
    """The spread of each column that has numbers, by stage.

    runs: for each seed, the rows of its scorecard, with the same stages in the same order.
    """
    ranges = {}
    for rows in zip(*runs):
        columns = {}
        for column in rows[0]:
            values = [row[column] for row in rows]
            if all(isinstance(value, (int, float)) for value in values):
                columns[column] = spread(values)
        ranges[rows[0]["stage"]] = columns
    return ranges


def read() -> dict[str, dict]:
    """{size: {"seeds": how many, "torch": version, "stages": Ranges}}; {} if none was measured.

    Raises ValueError, naming the file, if it cannot be understood.
    """
    if not PATH.exists():
        return {}
    try:
        return json.loads(PATH.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{PATH} is damaged ({error}): fetch it again, or delete it and measure "
                         "with python -m minillm.bench stages --save") from None


def write(size: str, runs: Sequence[Sequence[Row]]) -> None:
    """Put the ranges of a size into the file, in place of those it had; speeds are left out.

    runs: see spreads.
    """
    stages = {}
    for stage, columns in spreads(runs).items():
        stages[stage] = {column: {key: round(value, 6) for key, value in s.items()}
                         for column, s in columns.items() if column not in SPEEDS}
    measured = {"seeds": len(runs), "torch": torch.__version__, "stages": stages}
    text = json.dumps(read() | {size: measured}, indent=1) + "\n"
    with replacing(PATH) as file:
        file.write(text.encode())


def outside(column: str, value: float, s: Spread) -> bool:
    """Whether a figure is more than WIDTH standard deviations from the mean.

    The limits and the figure are rounded as the scorecard shows them. Why not the minimum and the
    maximum? With 8 seeds, a ninth normal run is beyond them in a given column with probability
    2/9. And why 5 deviations? Mean and deviation are themselves estimates from 8 numbers, so that
    the distance of a ninth, divided by sd * sqrt(1 + 1/8), follows Student's t with 7 degrees of
    freedom (if the figures are normally distributed): it exceeds 3 deviations in 2.5% of normal
    runs, and 5 in 0.2%. A scorecard has about 50 figures. With 3 deviations one normal figure in
    each scorecard would be off on average, with 5 at most one normal run in 10 has any. The price
    is that a small fault passes.
    """
    low, high = s["mean"] - WIDTH * s["sd"], s["mean"] + WIDTH * s["sd"]
    return not shown(column, low) <= shown(column, value) <= shown(column, high)


def shown(column: str, value: float) -> float:
    """A figure as the scorecard shows it, as a number again."""
    return float(cell(column, value).rstrip("%"))


def compare(rows: Sequence[Row], size: str) -> str:
    """Whether the rows of a scorecard are those of a normal run of a size, in lines to print.

    rows: those of the stages, without the bounds. Raises ValueError as read does.
    """
    known = read().get(size)
    if known is None:
        return (f"Is this run normal? No range is known for the size {size}: "
                "python -m minillm.bench stages --seeds 8 measures one.")
    seeds, off, unknown = f"{known['seeds']} seeds", [], []
    for row in rows:
        columns = known["stages"].get(row["stage"], {})
        for column, value in row.items():
            if column in SPEEDS or not isinstance(value, (int, float)):
                continue
            if column not in columns:
                unknown.append(f"{column} of {row['stage']}")
            elif outside(column, value, columns[column]):
                off.append(sentence(row["stage"], column, value, columns[column], seeds))
    if off:
        verdict = [f"Is this run normal? These figures are not within {WIDTH} standard deviations "
                   f"of the mean of {seeds} (torch {known['torch']}):", *off,
                   "Each stage is made from one before it, so begin with the first line."]
    else:
        verdict = [f"Is this run normal? All figures lie within the range of {seeds} (mean +- "
                   f"{WIDTH} standard deviations)."]
    if unknown:
        verdict.append(f"No range is known for {', '.join(unknown)}.")
    return "\n".join(textwrap.fill(line, 100, subsequent_indent="  ") for line in verdict)


def sentence(stage: str, column: str, value: float, s: Spread, seeds: str) -> str:
    """What to say about a figure that is outside."""
    low, high, mean = (cell(column, s[key]) for key in ("min", "max", "mean"))
    return (f"- {column} of {stage}: {cell(column, value)}, where {seeds} had {low} to {high}, "
            f"{mean} on average. Look at this: {ADVICE.get(column, OTHERWISE)}.")
