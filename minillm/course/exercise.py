"""The check cell of an exercise, and the generator of `exercises/` from `solutions/`.

    python -m minillm.course.exercise
        every notebook of solutions/ whose exercises are not up to date
    python -m minillm.course.exercise solutions/03_positions.ipynb [exercises]
        only this one

A notebook of solutions holds, for each exercise, an answer cell (the answer is between
`### BEGIN SOLUTION` and `### END SOLUTION`), then a check cell (`with exercise("03.1 rotate"):`),
then cells tagged `mistakes`.
"""
import copy
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path

import nbformat
from nbformat import NotebookNode

BLANK = "your code here"
MARKER = re.compile(r"^[ \t]*### (BEGIN|END) SOLUTION", re.M)
ANSWER = re.compile(r"^([ \t]*)### BEGIN SOLUTION.*?### END SOLUTION[^\n]*", re.M | re.S)
CHECK = re.compile(r"^with exercise\(\s*[\"'](.*?)[\"']\s*\)", re.M)


@contextmanager
def exercise(name: str) -> Iterator[None]:
    """Print whether the exercise that the body of this `with` checks is solved.

    A failing body does not stop the notebook. While nbgrader grades (it sets NBGRADER_EXECUTION), a
    failing body raises instead, and so scores no points.

    >>> with exercise("03.1 rotate"):
    ...     assert 1 + 1 == 3, "was + used where * belongs?"
    03.1 rotate: not right yet: was + used where * belongs?
    """
    try:
        yield
    except Exception as error:
        if os.environ.get("NBGRADER_EXECUTION"):
            raise
        # (torch raises NotImplementedError, too)
        if isinstance(error, NotImplementedError) and str(error) == BLANK:
            print(f"{name}: not solved yet")
        elif isinstance(error, AssertionError):
            print(f"{name}: not right yet: {str(error).strip() or _where(error)}")
        else:
            print(f"{name}: stopped by {_kind(error)}\n    {_where(error)}")
    else:
        print(f"{name}: solved")


def _kind(error):
    """What went wrong, in one line, since torch's messages go on with its own C++ frames."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


def _where(error):
    """The innermost line that belongs to the notebook, not to a library that it called."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][1:]   # [0]: exercise()
    notebook = frames[0].f_globals
    index = max(i for i, frame in enumerate(frames) if frame.f_globals is notebook)
    summary = traceback.extract_tb(error.__traceback__)[index + 1]
    return f"in {summary.name}, line {summary.lineno}: {summary.line}"


def mistake(check: Callable, wrong: Callable, expected: str) -> None:
    """Show that `check` names the mistake of the function `wrong`.

    It must fail with `expected` in its message. Raises AssertionError if it passes `wrong`, fails
    with another message, or crashes.
    """
    label = f"{check.__name__}({getattr(wrong, '__name__', wrong)})"
    try:
        check(wrong)
    except AssertionError as error:
        message = str(error).strip()
        assert expected in message, f"{label} failed, but said {message!r} instead of {expected!r}"
    except Exception as error:
        raise AssertionError(f"{label} crashed with {_kind(error)} instead of saying "
                             f"{expected!r}") from error
    else:
        raise AssertionError(f"{label} passed, but should have said {expected!r}")
    print(f"caught: {message}")


def right(check: Callable, answer: Callable) -> None:
    """Show that `check` accepts `answer`, a right answer that is written differently.

    Raises AssertionError, with what the check said, if it refuses or crashes.
    """
    name = getattr(answer, "__name__", answer)
    try:
        check(answer)
    except Exception as error:
        said = str(error).strip() if isinstance(error, AssertionError) else _kind(error)
        raise AssertionError(f"{check.__name__} refused the right answer {name}: {said}") from error
    print(f"accepted: {name}")


def _is_mistake(cell):
    return "mistakes" in cell.metadata.get("tags", ())


def stamp(notebook: NotebookNode) -> None:
    """Mark answer and check cells, in place, for nbgrader.

    Answers can be edited; checks are locked and worth one point each. Raises ValueError unless
    answers and checks alternate, each in a cell of its own, every answer has its two markers and
    every check has a name of its own.
    """
    for cell in notebook.cells:
        cell.metadata.pop("nbgrader", None)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and not _is_mistake(cell)]
    marked = [cell for cell in code if MARKER.search(cell.source) or CHECK.search(cell.source)]
    if not marked:
        raise ValueError("no exercise: no cell has a line that begins with `with exercise(...):`")
    grade_ids = set()
    nothing = nbformat.v4.new_code_cell()
    for answer, check in zip_longest(marked[::2], marked[1::2], fillvalue=nothing):
        grade_id = _grade_id(answer, check)
        if grade_id in grade_ids:
            raise ValueError(f"{CHECK.search(check.source)[1]}: two exercises have this name")
        grade_ids.add(grade_id)
        _mark(answer, {"grade_id": f"{grade_id}-answer", "solution": True, "grade": False,
                       "locked": False})
        _mark(check, {"grade_id": grade_id, "solution": False, "grade": True, "locked": True,
                      "points": 1})


def _grade_id(answer, check):
    """The name of an exercise as nbgrader wants it. Raises ValueError unless both cells fit."""
    markers = MARKER.findall(answer.source)
    names = CHECK.findall(check.source)
    misplaced = CHECK.findall(answer.source)
    if misplaced:
        raise ValueError(f"{misplaced[0]}: a check needs a cell of its own, after a cell with the "
                         "answer between ### BEGIN SOLUTION and ### END SOLUTION")
    first_line = answer.source.strip().splitlines()[0]
    if markers != ["BEGIN", "END"] * (len(markers) // 2):
        raise ValueError(f"{first_line!r}: each ### BEGIN SOLUTION needs one ### END SOLUTION "
                         f"after it, found {markers}")
    if len(names) != 1 or MARKER.search(check.source):
        raise ValueError(f"{first_line!r}: an answer needs one check (with exercise(...):), before "
                         "the next answer")
    return re.sub("[^A-Za-z0-9]+", "-", names[0]).strip("-")


def _mark(cell, settings):
    common = {"schema_version": 3, "task": False}
    cell.metadata["nbgrader"] = nbformat.from_dict(common | settings)


def strip(notebook: NotebookNode) -> NotebookNode:
    """A copy of a notebook of solutions as the learner gets it.

    Without the answers, the `mistakes` cells and the outputs.
    """
    notebook = copy.deepcopy(notebook)
    stamp(notebook)
    notebook.cells = [cell for cell in notebook.cells if not _is_mistake(cell)]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = ANSWER.sub(rf'\1raise NotImplementedError("{BLANK}")', cell.source)
            cell.outputs, cell.execution_count = [], None
    return notebook


def without_outputs(notebook: NotebookNode) -> list[tuple]:
    """What a notebook contains, whether it was run or not.

    The id, kind, source and metadata of each cell.
    """
    return [(cell.id, cell.cell_type, cell.source, cell.metadata) for cell in notebook.cells]


def _write(notebook, path):
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    nbformat.write(notebook, draft)
    os.replace(draft, path)


def generate(solution: str | Path, folder: str | Path) -> bool:
    """Stamp the notebook `solution`, and write its exercises, executed, to `folder`.

    Returns False if they were up to date. Raises ValueError as stamp does.
    """
    from nbclient import NotebookClient    # only here: learners need exercise() alone, and at once

    solution, target = Path(solution), Path(folder) / Path(solution).name
    notebook = nbformat.read(solution, as_version=4)
    before = copy.deepcopy(notebook)
    try:
        stamp(notebook)
    except ValueError as error:
        raise ValueError(f"{solution}: {error}") from None
    if notebook != before:
        _write(notebook, solution)
    blank = strip(notebook)
    if target.exists():
        there = nbformat.read(target, as_version=4)
        if without_outputs(there) == without_outputs(blank):
            return False
    target.parent.mkdir(parents=True, exist_ok=True)
    # coalesce_streams: otherwise, a line whose parts arrive separately is stored in two pieces.
    NotebookClient(blank, kernel_name="python3", timeout=600, record_timing=False,
                   coalesce_streams=True,
                   resources={"metadata": {"path": str(target.parent)}}).execute()
    _write(blank, target)
    return True


def main(solutions: str = "solutions", exercises: str = "exercises") -> None:
    """The command: `solutions` is a notebook or a folder of them. Prints what became of each."""
    one = solutions.endswith(".ipynb")
    paths = [Path(solutions)] if one else sorted(Path(solutions).glob("*.ipynb"))
    if not paths:
        raise ValueError(f"no notebook in {solutions}: run this in the top folder of the course")
    for path in paths:
        state = "written" if generate(path, exercises) else "up to date"
        print(f"{Path(exercises) / path.name}: {state}", flush=True)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ValueError as error:
        sys.exit(str(error))
