"""The check of an exercise, the generator of `exercises/`, and what nbgrader needs of both."""
import os
import re
import subprocess
import sys

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from minillm.course.exercise import (BLANK, exercise, generate, main, mistake, right, stamp,
                                     strip, without_outputs)

ANSWER = '''\
def one(x):
    """The number one."""
    ### BEGIN SOLUTION
    y = x - x
    return y + 1
    ### END SOLUTION'''
STUB = '''\
def one(x):
    """The number one."""
    raise NotImplementedError("your code here")'''
CHECK = '''\
def check_one(one):
    assert one(5) == 1, "is it one?"

with exercise("01.1 one"):
    check_one(one)'''
MISTAKE = 'mistake(check_one, lambda x: x, "is it one?")'


@pytest.fixture(autouse=True)
def not_grading(monkeypatch):
    monkeypatch.delenv("NBGRADER_EXECUTION", raising=False)


def blank(x):
    raise NotImplementedError(BLANK)


def wrong(x):
    raise AssertionError("is it one?")    # pytest adds to the message of an `assert` in this file


def crash(x):
    return torch.ones(2, 3) @ torch.ones(2, 3)


def not_implemented_by_torch(x):
    raise NotImplementedError("not on this device" + "\nC++ frames")


def says_nothing(x):
    raise AssertionError


@pytest.mark.parametrize("function, said", [
    (abs, "1.1 f: solved\n"),
    (blank, "1.1 f: not solved yet\n"),
    (wrong, "1.1 f: not right yet: is it one?\n"),
    (says_nothing, "1.1 f: not right yet: in says_nothing, line N: raise AssertionError\n"),
    (crash,
     "1.1 f: stopped by RuntimeError: mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)\n"
     "    in crash, line N: return torch.ones(2, 3) @ torch.ones(2, 3)\n"),
    (not_implemented_by_torch,
     "1.1 f: stopped by NotImplementedError: not on this device\n"
     "    in not_implemented_by_torch, line N: "
     'raise NotImplementedError("not on this device" + "\\nC++ frames")\n'),
])
def test_exercise_prints_how_it_stands(function, said, capsys):
    with exercise("1.1 f"):
        function(1)
    out, err = capsys.readouterr()
    line = str(function.__code__.co_firstlineno + 1) if function is not abs else ""
    assert (out.replace(f"line {line}:", "line N:"), err) == (said, "")


def test_exercise_names_the_notebook_line_that_called_a_library(capsys):
    def calls_torch(x):
        # fails inside torch, two frames further in
        return torch.nn.functional.linear(x, torch.ones(4, 5))

    with exercise("1.1 f"):
        torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(2, 3))(torch.ones(2))
    assert 'torch.nn.Sequential(' in capsys.readouterr().out.splitlines()[1]
    with exercise("1.1 f"):
        calls_torch(torch.ones(2))
    assert "in calls_torch, line" in capsys.readouterr().out.splitlines()[1]


def test_exercise_does_not_stop_an_interrupt():
    with pytest.raises(KeyboardInterrupt), exercise("1.1 f"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("function, error", [
    (blank, NotImplementedError), (wrong, AssertionError), (crash, RuntimeError)])
def test_exercise_raises_while_nbgrader_grades(function, error, monkeypatch, capsys):
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    with pytest.raises(error), exercise("1.1 f"):
        function(1)
    assert capsys.readouterr() == ("", "")


def test_mistake_prints_the_caught_message(capsys):
    mistake(lambda f: f(1), wrong, "is it")
    assert capsys.readouterr().out == "caught: is it one?\n"


@pytest.mark.parametrize("function, said", [
    (abs, r"check_one\(abs\) passed, but should have said 'is it one\?'"),
    (says_nothing, r"check_one\(says_nothing\) failed, but said '.*' instead of 'is it one\?'"),
    (crash, r"check_one\(crash\) crashed with RuntimeError: mat1 and mat2 .* "
            r"instead of saying 'is it one\?'"),
])
def test_mistake_that_is_not_caught(function, said):
    def check_one(function):
        function(1)

    with pytest.raises(AssertionError, match=said):
        mistake(check_one, function, "is it one?")


def test_right_prints_what_was_accepted(capsys):
    right(lambda f: f(1), abs)
    assert capsys.readouterr().out == "accepted: abs\n"


@pytest.mark.parametrize("function, said", [
    (wrong, "check_one refused the right answer wrong: is it one?"),
    (crash, "check_one refused the right answer crash: RuntimeError: mat1 and mat2"),
])
def test_right_that_is_refused(function, said):
    def check_one(f):
        f(1)

    with pytest.raises(AssertionError, match=re.escape(said)):
        right(check_one, function)


def notebook(*sources, mistakes=(MISTAKE,)):
    cells = [new_markdown_cell("# 01 One"), *map(new_code_cell, sources)]
    cells += [new_code_cell(source, metadata={"tags": ["mistakes"]}) for source in mistakes]
    for cell in cells[1:]:
        cell.execution_count, cell.outputs = 1, [new_output("stream", text="kept")]
    return new_notebook(cells=cells)


def test_strip():
    solution = notebook(ANSWER, CHECK)
    discussion = new_markdown_cell("Seen in the solutions only.", metadata={"tags": ["mistakes"]})
    solution.cells.append(discussion)
    before = nbformat.writes(solution)
    exercises = strip(solution)
    assert [cell.source for cell in exercises.cells] == ["# 01 One", STUB, CHECK]
    assert [cell.id for cell in exercises.cells] == [cell.id for cell in solution.cells[:3]]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in exercises.cells[1:])
    assert nbformat.writes(solution) == before, "strip changed the solutions themselves"


def test_strip_keeps_indentation_and_what_stands_around_an_answer():
    source = """\
class A:
    def f(self):
        x = 1
        ### BEGIN SOLUTION
        if x:
            return x
        ### END SOLUTION
        return 2

    def g(self):
        ### BEGIN SOLUTION
        return 1
        ### END SOLUTION"""
    assert strip(notebook(source, CHECK)).cells[1].source == """\
class A:
    def f(self):
        x = 1
        raise NotImplementedError("your code here")
        return 2

    def g(self):
        raise NotImplementedError("your code here")"""


def test_stamp():
    solution = notebook("import torch", ANSWER, CHECK)
    stamp(solution)
    _, _, answer, check, wrong = (cell.metadata.get("nbgrader") for cell in solution.cells)
    assert answer == dict(grade_id="01-1-one-answer", solution=True, grade=False, locked=False,
                          schema_version=3, task=False)
    assert check == dict(grade_id="01-1-one", solution=False, grade=True, locked=True, points=1,
                         schema_version=3, task=False)
    assert wrong is None and "nbgrader" not in solution.cells[1].metadata
    assert all(cell.outputs[0].text == "kept" for cell in solution.cells[1:])


def test_stamp_takes_back_what_no_longer_holds():
    solution = notebook("import torch", ANSWER, CHECK)
    solution.cells[1].metadata["nbgrader"] = {"grade_id": "was an answer"}
    stamp(solution)
    assert "nbgrader" not in solution.cells[1].metadata


@pytest.mark.parametrize("sources, said", [
    ([ANSWER.replace("### END", "END"), CHECK],
     r"'def one\(x\):': each ### BEGIN SOLUTION needs one"),
    ([ANSWER.replace("### BEGIN", "BEGIN"), CHECK], "each ### BEGIN SOLUTION needs one"),
    ([ANSWER + "\n    ### BEGIN SOLUTION", CHECK], "each ### BEGIN SOLUTION needs one"),
    ([STUB, CHECK], "01.1 one: a check needs a cell of its own, after a cell with the answer"),
    ([ANSWER, CHECK, CHECK], "01.1 one: a check needs a cell of its own"),
    ([ANSWER + "\n" + CHECK], "01.1 one: a check needs a cell of its own"),
    ([ANSWER], r"'def one\(x\):': an answer needs one check"),
    ([ANSWER, ANSWER, CHECK], "an answer needs one check"),
    ([ANSWER, CHECK + "\n" + CHECK], "an answer needs one check"),
    ([ANSWER, CHECK, ANSWER, CHECK], "01.1 one: two exercises have this name"),
    (["import torch"], "no exercise"),
    ([], "no exercise"),
])
def test_a_notebook_of_solutions_that_is_not_well_formed(sources, said):
    with pytest.raises(ValueError, match=said):
        strip(notebook(*sources))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """solutions/01_one.ipynb and the exercises generated from it."""
    folder = tmp_path_factory.mktemp("course")
    (folder / "solutions").mkdir()
    solution = notebook("from minillm.course.exercise import exercise, mistake", ANSWER, CHECK)
    nbformat.write(solution, folder / "solutions/01_one.ipynb")
    assert generate(folder / "solutions/01_one.ipynb", folder / "exercises")
    return folder


def test_generate(folders):
    solution = nbformat.read(folders / "solutions/01_one.ipynb", as_version=4)
    exercises = nbformat.read(folders / "exercises/01_one.ipynb", as_version=4)
    assert without_outputs(exercises) == without_outputs(strip(solution))
    assert [cell.get("execution_count") for cell in exercises.cells] == [None, 1, 2, 3]
    assert exercises.cells[3].outputs[0].text == "01.1 one: not solved yet\n"
    assert solution.cells[2].metadata["nbgrader"]["solution"], "the solutions were not stamped"
    assert solution.cells[2].outputs[0].text == "kept", "stamping lost an output"
    assert [path.name for path in (folders / "exercises").iterdir()] == ["01_one.ipynb"], (
        "left a draft behind")


def test_generate_again_changes_nothing(folders, capsys):
    paths = [folders / "solutions/01_one.ipynb", folders / "exercises/01_one.ipynb"]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths]
    main(str(folders / "solutions"), str(folders / "exercises"))
    assert capsys.readouterr().out.endswith("01_one.ipynb: up to date\n")
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths] == before


def test_generated_exercises_grade_as_nbgrader_expects(folders):
    """While NBGRADER_EXECUTION is set, the blank raises and the solution does not."""
    for name, solved in ("exercises", False), ("solutions", True):
        cells = nbformat.read(folders / name / "01_one.ipynb", as_version=4).cells[1:]
        script = "\n".join(cell.source for cell in cells)
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                             env={**os.environ, "NBGRADER_EXECUTION": "autograde"})
        assert run.returncode == (0 if solved else 1), run.stderr
        assert ("NotImplementedError: your code here" in run.stderr) == (not solved)
        assert run.stdout == ("01.1 one: solved\ncaught: is it one?\n" if solved else "")


def test_main_names_the_file_and_the_fault(tmp_path):
    nbformat.write(notebook(STUB, CHECK), tmp_path / "01_one.ipynb")
    with pytest.raises(ValueError, match="01_one.ipynb: 01.1 one: a check needs"):
        main(str(tmp_path / "01_one.ipynb"), str(tmp_path / "exercises"))
    assert not (tmp_path / "exercises").exists()
    with pytest.raises(ValueError, match="no notebook in"):
        main(str(tmp_path / "elsewhere"), str(tmp_path))
