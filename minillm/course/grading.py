"""The copy of an exercise notebook that is graded: as handed out, with the answers of a student.

What it guards against, and what not, stands in README, "For teachers".
"""
import copy

from nbformat import NotebookNode

from minillm.course.exercise import CHECK


def clean_copy(submitted: NotebookNode, released: NotebookNode) -> NotebookNode:
    """The notebook `released` with the answers of `submitted`, and nothing else of it.

    An answer is what stands in an answer cell (of several with one name, in the last). A check runs
    under `if "03.1 rotate":` in place of `with exercise("03.1 rotate"):`, so that a failing one
    raises whatever `exercise` is by then. A missing answer stays blank.
    """
    answers = {}
    for cell in submitted.cells:
        settings = cell.metadata.get("nbgrader") or {}
        if settings.get("solution") and cell.cell_type == "code":
            answers[settings.get("grade_id")] = cell.source
    clean = copy.deepcopy(released)
    for cell in clean.cells:
        settings = cell.metadata.get("nbgrader") or {}
        if settings.get("solution"):
            cell.source = answers.get(settings["grade_id"], cell.source)
        elif settings.get("grade"):
            cell.source = CHECK.sub(r'if "\1"', cell.source)
    return clean
