"""The checks on the notebooks, the package and the exercises of this course."""
from pathlib import Path

import pytest
from nbformat.v4 import new_markdown_cell, new_notebook

from minillm.tests.checks import (chapter_problems, exercise_problems, link_problems,
                                  package_problems, read, run_problems, solution_problems)

ROOT = Path(__file__).parents[2]
CHAPTERS = sorted(ROOT.glob("notebooks/*.ipynb"))
SOLUTIONS = sorted(ROOT.glob("solutions/*.ipynb"))
EXERCISES = sorted(ROOT.glob("exercises/*.ipynb"))


def report(problems):
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


def each(paths):
    names = [f"{path.parent.name}/{path.name}" for path in paths]
    return pytest.mark.parametrize("path", paths, ids=names)


@each(CHAPTERS + SOLUTIONS + EXERCISES)
def test_notebook_was_run(path):
    notebook = read(path)
    report(run_problems(notebook) + link_problems(notebook, path.parent))


@each(CHAPTERS)
def test_chapter(path):
    report(chapter_problems(read(path)))


@each(SOLUTIONS)
def test_solutions(path):
    report(solution_problems(read(path), path.name))


@each(EXERCISES)
def test_exercises(path):
    report(exercise_problems(read(path), read(ROOT / "solutions" / path.name)))


def test_links_of_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    report(link_problems(new_notebook(cells=[new_markdown_cell(text)]), ROOT))


def test_each_has_its_counterpart():
    chapters, solutions, exercises = (
        {path.name for path in paths} for paths in (CHAPTERS, SOLUTIONS, EXERCISES))
    assert solutions == exercises and solutions <= chapters


def test_package_is_what_the_notebooks_export(tmp_path):
    report(package_problems(ROOT, tmp_path))
