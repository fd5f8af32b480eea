"""README's table of chapters and its picture say what the notebooks and the scorecard say."""
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from minillm.course.contents import (BEGIN, END, PARTS, ROOT, address, chapter, chapters, needed,
                                     table, with_table)
from minillm.course.picture import PANELS, PICTURE, draw, scorecard

README = (ROOT / "README.md").read_text(encoding="utf-8")


def write(folder, name, code, words=0, title="Something"):
    (folder / "notebooks").mkdir(exist_ok=True)
    prose = f"# {name[:2]} {title}\n" + "word " * words
    cells = [new_markdown_cell(prose), *map(new_code_cell, code)]
    nbformat.write(new_notebook(cells=cells), folder / f"notebooks/{name}.ipynb")
    return folder / f"notebooks/{name}.ipynb"


def test_a_chapter(tmp_path):
    path = write(tmp_path, "09_scaling", [
        "#| default_exp scaling\n", "#| export\nfrom minillm.model import Llama\n\nx = 1",
        "#| export fits\nfrom minillm import data, train"], words=2000, title="Scaling: laws")
    found = chapter(path, {"09_scaling": 83})
    assert (found.number, found.title, found.part) == (9, "Scaling: laws", "Part 2: train it")
    assert found.modules == ["scaling", "fits"]
    assert {"model", "data", "train"} <= found.imports
    assert found.seconds == 83 and found.lines == 6
    assert found.minutes == 10, "2,000 words are 10 minutes"


def test_each_number_has_its_part():
    parts = [chapter.part for chapter in chapters()]
    assert parts == sorted(parts, key=list(PARTS.values()).index)


def test_what_is_needed_without_what_that_needs_itself(tmp_path):
    write(tmp_path, "01_a", ["#| default_exp a"])
    write(tmp_path, "02_b", ["#| default_exp b\nimport minillm.a"])
    write(tmp_path, "03_c", ["#| default_exp c\nfrom minillm import a, b"])
    write(tmp_path, "04_d", ["from minillm.a import x", "from minillm.elsewhere import y"])
    found = needed(chapters(tmp_path))
    assert {name: [c.name for c in before] for name, before in found.items()} == {
        "01_a": [], "02_b": ["01_a"], "03_c": ["02_b"], "04_d": ["01_a"]}


def test_the_table(tmp_path):
    write(tmp_path, "01_a", ["#| default_exp a"])
    write(tmp_path, "23_b", ["import minillm.a"], words=6000, title="Speed")
    rows = table(chapters(tmp_path), root=tmp_path).splitlines()
    assert rows[2:] == [
        "| | **Part 1: build a LLaMA** | | | | | |",
        "| 01 | [Something](notebooks/01_a.ipynb) | [`a.py`](minillm/a.py) | | 0&nbsp;min | | |",
        "| | **Appendices** | | | | | |",
        "| 23 | [Speed](notebooks/23_b.ipynb) | | 01 | 30&nbsp;min | | |"]
    with_links = table(chapters(tmp_path), "https://github.com/ada/course", tmp_path).splitlines()
    assert "https://codespaces.new/ada/course" in with_links[0]
    assert with_links[-1].endswith("| [Colab](https://colab.research.google.com/github/ada/course/"
                                   "blob/main/notebooks/23_b.ipynb) |")
    assert len({len(re.findall(r"\|", line)) for line in with_links}) == 1, "a row is too short"


def test_address(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[project.urls]\n# Repository = "x"\n')
    assert address(tmp_path) == ""
    (tmp_path / "pyproject.toml").write_text('[project.urls]\nRepository = "https://x.org/a"\n')
    assert address(tmp_path) == "https://x.org/a"


def test_readme_keeps_what_stands_around_the_table():
    assert with_table(f"a\n{BEGIN}\nold\n{END}\nb", "new") == f"a\n{BEGIN}\nnew\n{END}\nb"
    with pytest.raises(ValueError, match="lacks the lines"):
        with_table("a", "new")


def test_the_table_of_readme_is_up_to_date():
    """Minutes to read may be off by ten, so that a new sentence does not change README."""
    read = re.compile(r"\| (\d+)&nbsp;min \|")
    now, advice = with_table(README, table(chapters(), address())), "run -m minillm.course.contents"
    assert read.sub("", README) == read.sub("", now), advice
    for there, here in zip(read.findall(README), read.findall(now), strict=True):
        assert abs(int(there) - int(here)) <= 10, advice


# ---- the picture

def test_scorecard_with_blanks():
    text = "\n".join(["```", "   stage   gap  wins  MB",
                      "(bounds)  0.0%   50%", "    base  2.9%       3.1", "```", "more"])
    assert scorecard(text) == {"(bounds)": {"gap": 0.0, "wins": 50.0},
                               "base": {"gap": 2.9, "MB": 3.1}}
    with pytest.raises(ValueError, match="no scorecard"):
        scorecard("nothing")


def test_the_picture_shows_the_scorecard_of_readme(tmp_path):
    rows = scorecard(README)
    draw(README, tmp_path / "arc.svg")
    for path in tmp_path / "arc.svg", PICTURE:
        texts = re.findall(r">([^<>\n]+)</text>", path.read_text(encoding="utf-8"))
        for stage, row in rows.items():
            if stage != "(bounds)":
                assert stage in texts
                assert {f"{row[column]:.3g}" for column in PANELS if column in row} <= set(texts), (
                    f"{path.name} lacks a number of {stage}: run python -m minillm.course.contents")
    draw(README, tmp_path / "again.svg")
    assert (tmp_path / "arc.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()
