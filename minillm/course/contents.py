"""The chapters of the course: their parts, what they need, and how long they take.

    python -m minillm.course.contents
        write README.md's table of chapters, and the picture of the scorecard, anew
    python -m minillm.course.contents notebooks/09_scaling.ipynb ...
        run these chapters first, and store how long they take

Everything comes from the notebooks, except the seconds that a chapter takes to run: these were
measured on two cores, with the trained stages in the cache, and are stored in seconds.json.
"""
import json
import re
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[2]
SECONDS = Path(__file__).with_name("seconds.json")
PARTS = {                       # the number of the first chapter, and the title of the part
    1: "Part 1: build a LLaMA",
    6: "Part 2: train it",
    11: "Part 3: adapt it",
    15: "Part 4: align it",
    17: "Part 5: shrink and ship it",
    20: "Part 6: the wider family",
    23: "Appendices",
}
BEGIN = "<!-- chapters: written by python -m minillm.course.contents -->"
END = "<!-- chapters end -->"


@dataclass
class Chapter:
    """What the table says about a notebook in notebooks/."""
    name: str                   # "03_positions"
    title: str                  # "Positions"
    modules: list[str]          # that it exports, without .py
    imports: set[str]           # modules of minillm that its code mentions
    words: int                  # of prose
    lines: int                  # of code, without empty ones
    seconds: int | None         # to run it

    @property
    def number(self) -> int:
        """The number of the chapter."""
        return int(self.name[:2])

    @property
    def part(self) -> str:
        """The title of its part."""
        return PARTS[max(first for first in PARTS if first <= self.number)]

    @property
    def minutes(self) -> int:
        """To read it, to the nearest ten: 200 words, or 20 lines of code, per minute."""
        return 10 * round((self.words / 200 + self.lines / 20) / 10)


def chapter(path: Path, seconds: dict[str, int]) -> Chapter:
    """The chapter in this notebook; seconds: how long chapters take to run, by name.

    Raises ValueError if its first line is not a title such as `# 03 Positions`.
    """
    cells = nbformat.read(path, as_version=4).cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    modules = re.findall(r"^#\|[ \t]*default_exp[ \t]+(\w+)", code, re.M)
    modules += re.findall(r"^#\|[ \t]*export[ \t]+(\w+)", code, re.M)
    imports = set(re.findall(r"\bminillm\.(\w+)", code))
    for names in re.findall(r"from minillm import (.*)", code):
        imports |= set(re.findall(r"\w+", names))
    title = re.match(r"# \d+ (.*)", prose)
    if not title:
        raise ValueError(f"{path.name}: the first line should be a title such as `# 03 Positions`")
    return Chapter(path.stem, title[1], list(dict.fromkeys(modules)), imports, len(prose.split()),
                   len([line for line in code.splitlines() if line.strip()]),
                   seconds.get(path.stem))


def chapters(root: Path = ROOT) -> list[Chapter]:
    """All chapters in order."""
    seconds = json.loads(SECONDS.read_text(encoding="utf-8"))
    return [chapter(path, seconds) for path in sorted(root.glob("notebooks/*.ipynb"))]


def needed(course: list[Chapter]) -> dict[str, list[Chapter]]:
    """By name, the earlier chapters whose modules a chapter uses.

    Without those that another of them needs, too: chapter 08 uses what 05 and 07 built, but 07
    needs 05, so that 07 is enough.
    """
    exported = {module: c for c in course for module in c.modules}
    direct, all_of = {}, {}
    for c in course:
        used = {exported[m].name for m in c.imports if m in exported}
        direct[c.name] = {name for name in used if name < c.name}
        all_of[c.name] = direct[c.name].union(*(all_of[name] for name in direct[c.name]))
    by_name = {c.name: c for c in course}
    return {name: [by_name[n] for n in sorted(names - set().union(*(all_of[n] for n in names)))]
            for name, names in direct.items()}


def address(root: Path = ROOT) -> str:
    """The address of the repository on GitHub that pyproject.toml names, "" if it names none."""
    with open(root / "pyproject.toml", "rb") as file:
        return tomllib.load(file)["project"].get("urls", {}).get("Repository", "")


def table(course: list[Chapter], address: str = "", root: Path = ROOT) -> str:
    """The table of chapters in Markdown, with links from the top folder of the course.

    With the address of the repository, also links that open a chapter in Colab, and the course in a
    codespace.
    """
    heads = ["", "chapter", "builds", "needs", "read", "run", "exercises"]
    where = address.removeprefix("https://github.com/")
    if address:
        heads.append(f"open in [Codespaces](https://codespaces.new/{where}), or in")
    lines = [row(heads), row(["---"] * len(heads)).replace(" ", "")]
    before, part = needed(course), None
    for c in course:
        if c.part != part:
            part = c.part
            lines.append(row(["", f"**{part}**", *[""] * (len(heads) - 2)]))
        exercises = f"exercises/{c.name}.ipynb"
        cells = [
            f"{c.number:02}",
            f"[{c.title}](notebooks/{c.name}.ipynb)",
            ", ".join(f"[`{m}.py`](minillm/{m}.py)" for m in c.modules),
            ", ".join(f"{n.number:02}" for n in before[c.name]),
            f"{c.minutes}&nbsp;min",
            "" if c.seconds is None else duration(c.seconds),
            f"[{c.number:02}]({exercises})" if (root / exercises).exists() else "",
        ]
        if address:
            cells.append(f"[Colab](https://colab.research.google.com/github/{where}/blob/main/"
                         f"notebooks/{c.name}.ipynb)")
        lines.append(row(cells))
    return "\n".join(lines)


def row(cells: list[str]) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


def duration(seconds: int) -> str:
    """About how long: to the nearest ten seconds or, from 95 seconds on, the nearest half minute.

    >>> duration(4), duration(83), duration(117)
    ('10&nbsp;s', '80&nbsp;s', '2&nbsp;min')
    """
    if seconds < 95:
        return f"{max(10, 10 * round(seconds / 10))}&nbsp;s"
    return f"{round(seconds / 30) / 2:g}&nbsp;min"


def with_table(readme: str, table: str) -> str:
    """The text of README.md with this table between its two markers.

    Raises ValueError if README.md lacks one of them.
    """
    if BEGIN not in readme or END not in readme:
        raise ValueError(f"README.md lacks the lines {BEGIN!r} and {END!r}")
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def measure(path: Path) -> int:
    """Run a chapter, without changing its file; returns the seconds that it took."""
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    start = time.perf_counter()
    NotebookClient(notebook, kernel_name="python3", timeout=1800,
                   resources={"metadata": {"path": str(path.parent)}}).execute()
    return round(time.perf_counter() - start)


def main(*notebooks: str) -> None:
    """The command."""
    from minillm.course.picture import draw

    seconds = json.loads(SECONDS.read_text(encoding="utf-8"))
    for path in map(Path, notebooks):
        seconds[path.stem] = measure(path)
        print(f"{path}: {seconds[path.stem]} s", flush=True)
        SECONDS.write_text(json.dumps(seconds, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    readme = ROOT / "README.md"
    text = with_table(readme.read_text(encoding="utf-8"), table(chapters(), address()))
    readme.write_text(text, encoding="utf-8")
    draw(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
