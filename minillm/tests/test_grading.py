"""The clean copy that is graded: what a submission can do to the checks, and what not."""
import copy

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from minillm.course.exercise import BLANK, stamp, strip
from minillm.course.grading import clean_copy

FIRST = "from minillm.course.exercise import exercise"
ANSWER = "def one():\n    ### BEGIN SOLUTION\n    return 1\n    ### END SOLUTION"
CHECK = '''\
def check_one(one):
    assert one() == 1, "is it one?"

with exercise("01.1 one"):
    check_one(one)'''
TEACHERS = new_notebook(cells=[new_code_cell(FIRST), new_markdown_cell("What is one?"),
                               new_code_cell(ANSWER), new_code_cell(CHECK)])
stamp(TEACHERS)
RELEASED = strip(TEACHERS)
SILENT = "\n".join(["from contextlib import contextmanager, suppress", "@contextmanager",
                    "def exercise(name):", "    with suppress(BaseException):", "        yield"])


def submission(answer="def one():\n    return 1"):
    notebook = copy.deepcopy(RELEASED)
    notebook.cells[2].source = answer
    return notebook


def passes(notebook, monkeypatch):
    """Whether no cell raises, as nbgrader runs a notebook: one cell after the other."""
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    names = {}
    try:
        for cell in notebook.cells:
            if cell.cell_type == "code":
                exec(cell.source, names)
    except (AssertionError, NotImplementedError):
        return False
    return True


def test_a_right_answer_passes_and_a_wrong_or_blank_one_does_not(monkeypatch):
    assert passes(clean_copy(submission(), RELEASED), monkeypatch)
    for body in "return 2", f'raise NotImplementedError("{BLANK}")':
        copied = clean_copy(submission(f"def one():\n    {body}"), RELEASED)
        assert not passes(copied, monkeypatch)


def test_another_exercise_makes_every_check_pass_and_the_clean_copy_undoes_it(monkeypatch):
    cheat = submission("def one():\n    return 2\n\n" + SILENT)
    assert passes(cheat, monkeypatch)
    assert not passes(clean_copy(cheat, RELEASED), monkeypatch)


def added(notebook):
    notebook.cells.insert(2, new_code_cell(SILENT))


def changed(notebook):
    notebook.cells[0].source = SILENT


def edited(notebook):
    notebook.cells[3].source = "pass"


def copied(notebook):
    notebook.cells.insert(3, copy.deepcopy(notebook.cells[3]))


def deleted(notebook):
    del notebook.cells[3]


def not_code(notebook):
    notebook.cells.append(new_markdown_cell("x", metadata=notebook.cells[2].metadata))


@pytest.mark.parametrize("change", [added, changed, edited, copied, deleted, not_code])
def test_only_answers_come_from_a_submission(change):
    notebook = submission()
    change(notebook)
    clean = clean_copy(notebook, RELEASED)
    assert clean == clean_copy(submission(), RELEASED)
    nbformat.validate(clean)
    assert [cell.source for cell in clean.cells] == [
        FIRST, "What is one?", "def one():\n    return 1",
        CHECK.replace('with exercise("01.1 one"):', 'if "01.1 one":')]
    assert RELEASED.cells[3].source == CHECK, "the notebook that was handed out stays"


def test_of_two_answers_with_one_name_the_last_counts_and_a_missing_one_is_blank():
    twice = submission()
    twice.cells.append(new_code_cell("def one(): return 2", metadata=twice.cells[2].metadata))
    assert clean_copy(twice, RELEASED).cells[2].source == "def one(): return 2"
    gone = submission()
    del gone.cells[2]
    assert clean_copy(gone, RELEASED).cells[2].source == RELEASED.cells[2].source
    lost = submission()                # another program may have dropped what nbgrader wrote
    for cell in lost.cells:
        cell.metadata = nbformat.from_dict({})
    assert BLANK in clean_copy(lost, RELEASED).cells[2].source
