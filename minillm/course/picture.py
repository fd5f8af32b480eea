"""The picture of the arc: README.md's scorecard as bars, one row per stage of the model.

`python -m minillm.course.contents` draws it, from the table in README.md.
"""
from pathlib import Path

PICTURE = Path(__file__).with_name("arc.svg")
PANELS = {                      # a column of the scorecard: the title of its panel, and a mark
    "gap": ("above the floor,\n% (less is better)", None),
    "valid": ("own stories that\ncould be true, %", None),
    "answers": ("questions\nanswered, %", "guessing"),
    "harbour": ("questions, in the\nsecond region, %", "guessing"),
    "wins": ("wins against\nthe chat model, %", "even"),
    "MB": ("weights, MB\n", None),
}


def scorecard(text: str) -> dict[str, dict[str, float]]:
    """The scorecard in a text: {stage: {column: number}}. A blank is left out.

    Columns are aligned at the right. Raises ValueError if the text holds no scorecard.

    >>> scorecard('stage  gap  wins\\n base  2.9%\\nchat  4.6%   50%')
    {'base': {'gap': 2.9}, 'chat': {'gap': 4.6, 'wins': 50.0}}
    """
    lines = iter(text.splitlines())
    header = next((line for line in lines if line.strip().startswith("stage ")), None)
    if header is None:
        raise ValueError("no scorecard: no line begins with `stage`")
    ends = [(name, header.index(name) + len(name)) for name in header.split()]
    rows = {}
    for line in lines:
        if not line.strip() or line.startswith("```"):
            break
        row, begin = {}, ends[0][1]
        stage = line[:begin].split()[0]
        for name, end in ends[1:]:
            entry = line[begin:end].strip().rstrip("%")
            begin = end
            if entry:
                row[name] = float(entry)
        rows[stage] = row
    return rows


def draw(readme: str, path: Path = PICTURE) -> None:
    """Draw the scorecard that README.md holds, to an SVG file that is the same each time."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = scorecard(readme)
    bounds = rows.pop("(bounds)")
    with matplotlib.rc_context({"svg.hashsalt": "minillm", "svg.fonttype": "none",
                                "font.size": 9, "axes.spines.top": False,
                                "axes.spines.right": False}):
        figure = Figure(figsize=(10, 2.6), layout="constrained")
        for axes, (column, (title, mark)) in zip(figure.subplots(1, len(PANELS)), PANELS.items()):
            found = [(i, row[column]) for i, row in enumerate(rows.values()) if column in row]
            bars = axes.barh(*zip(*found), color="C0", height=0.65)
            axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
            axes.set_title(title, fontsize=9)
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.set_xlim(0, 1.28 * max(value for _, value in found))
            axes.set_xticks([])
            axes.spines["bottom"].set_visible(False)
            axes.set_yticks(range(len(rows)), rows if column == "gap" else [""] * len(rows))
            axes.tick_params(length=0)
            if mark:
                axes.axvline(bounds[column], color="C3", linestyle="--", linewidth=1)
                axes.text(bounds[column], len(rows) - 0.35, mark, color="C3", fontsize=8,
                          ha="center", va="top")
        figure.savefig(path, metadata={"Date": None, "Creator": None})
