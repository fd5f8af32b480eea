"""The copy of an exercise notebook that is graded: as handed out, with the answers of a student.

README, "For teachers", says what it guards against, and what it does not.
"""
import copy

from nbformat import NotebookNode

from minillm.course.exercise import CHECK


def clean_copy(submitted: NotebookNode, released: NotebookNode) -> NotebookNode:
    """The notebook `released` with the answers of `submitted`, and nothing else from it.

    An answer is the source of an answer cell (the last one, if several have the same name). A check
    runs under `if "03.1 rotate":` in place of `with exercise("03.1 rotate"):`, so that a check that
    fails raises its error, even if a student has redefined `exercise`. A missing answer stays
    blank.
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
