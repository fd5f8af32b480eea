"""The checks themselves, on samples that are each broken in one way."""
from shutil import copy

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from minillm.course.exercise import stamp, strip
from minillm.course.export import write_modules
from minillm.tests.checks import (BOOTSTRAP, chapter_problems, code_cells, exercise_problems,
                                  lesson_problems, link_problems, package_problems, run_problems,
                                  solution_problems)


def executed(*cells, **metadata):
    """A notebook whose code cells are numbered as if run. Cells have the same ids at each call."""
    notebook = new_notebook(cells=list(cells), metadata=metadata)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    for count, cell in enumerate(code_cells(notebook), 1):
        cell.execution_count = count
    return notebook


def shows(**output):
    return new_code_cell("f()", outputs=[new_output(**output)])


def test_run_problems_pass_a_sound_notebook():
    cell = shows(output_type="stream", text="1/2 of https://example.org/Users/page\n")
    assert run_problems(executed(new_markdown_cell("![ok](figure.svg)"), cell)) == []


WIDGET = {"application/vnd.jupyter.widget-view+json": {}}
IMAGE = {"text/html": "<img src='http://x/y.png'>"}


@pytest.mark.parametrize("cell, expected", [
    (shows(output_type="error", ename="KeyError", evalue="", traceback=[]),
     "stored error KeyError"),
    (shows(output_type="stream", name="stderr", text="a warning"), "writes to stderr"),
    (shows(output_type="stream", text="saved to /Users/ada/model"),
     "path of one machine: /Users/ada"),
    (shows(output_type="execute_result", data={"text/plain": r"'C:\\Users\\ada'"}),
     "path of one machine"),
    (shows(output_type="display_data", data=WIDGET), "shows a widget"),
    (shows(output_type="display_data", data=IMAGE), "fetches an image"),
    (new_markdown_cell("![logo](https://example.org/logo.png)"), "fetches an image"),
])
def test_run_problems_in_one_cell(cell, expected):
    assert any(expected in problem for problem in run_problems(executed(new_code_cell("1"), cell)))


@pytest.mark.parametrize("counts, expected", [
    ([None, 1], "never executed"),
    ([2, 1], "out of order"),
    ([1, 1], "out of order"),
    ([], "no code cell"),
])
def test_run_problems_of_order(counts, expected):
    notebook = new_notebook(cells=[new_code_cell("1", execution_count=count) for count in counts])
    assert expected in run_problems(notebook)[0]


def test_run_problems_of_widget_state():
    assert "widget state" in run_problems(executed(new_code_cell("1"), widgets={}))[0]


def test_run_problems_of_timing():
    cell = new_code_cell("1", metadata={"execution": {"iopub.status.busy": "2026-01-01"}})
    assert "times of a run" in run_problems(executed(cell))[0]


def test_link_problems(tmp_path):
    (tmp_path / "here.ipynb").touch()
    notebook = executed(new_markdown_cell(
        "[a](here.ipynb) [b](https://example.org) [c](#top) [d](gone.ipynb#part)"))
    assert link_problems(notebook, tmp_path) == ["dead link: gone.ipynb"]


@pytest.mark.parametrize("sources, expected", [
    ([BOOTSTRAP, "#| export\nimport os\nN: int = 1\ndef f(): pass", "f()"], None),
    ([BOOTSTRAP, "def f(): 'naive'", "#| export\ndef f(): pass"], None),
    (["import os"], "not the usual one"),
    ([], "not the usual one"),
    ([BOOTSTRAP, "#| export\nprint(1)"], "not an import or a definition: print(1)"),
    ([BOOTSTRAP, "#| export\n%pip install x"], "not plain Python"),
    ([BOOTSTRAP, "#| export\ndef f(): pass", "def f(): 'again'"], "exported {'f'} again"),
    ([BOOTSTRAP, "#| export\nN = 1", "N = 2"], "exported {'N'} again"),
    ([BOOTSTRAP, "#| export\nclass A: pass", "#| export\nclass A: 'again'"],
     "exported {'A'} again"),
])
def test_chapter_problems(sources, expected):
    problems = chapter_problems(executed(*map(new_code_cell, sources)))
    assert problems == [] if expected is None else expected in problems[0]


@pytest.fixture
def package(tmp_path):
    """A course of one chapter, and the two modules exported from it."""
    root = tmp_path / "course"
    (root / "notebooks").mkdir(parents=True)
    cells = ("#| default_exp a", '#| export\n"""What a holds."""\nfrom minillm.b import g',
             "#| export\ndef f(x): return g(x)",
             '#| export b\n"""What b holds."""\ndef g(x): return x')
    nbformat.write(executed(*map(new_code_cell, cells)), root / "notebooks/01_a.ipynb")
    write_modules(root / "notebooks/01_a.ipynb", root / "minillm")
    return root


def empty_folder(path):
    path.mkdir()
    return path


def test_package_problems_pass_a_sound_package(package, tmp_path):
    (package / "minillm/written_by_hand.py").touch()
    assert package_problems(package, empty_folder(tmp_path / "scratch")) == []


def test_exporting_again_changes_nothing(package):
    before = {path.name: path.read_text() for path in package.glob("minillm/*")}
    written = write_modules(package / "notebooks/01_a.ipynb", package / "minillm")
    assert written == sorted(before) == ["a.py", "b.py"]
    assert {path.name: path.read_text() for path in package.glob("minillm/*")} == before


def edit_module(root):
    module = root / "minillm/a.py"
    module.write_text(module.read_text() + "\n")


def edit_notebook(root):
    notebook = root / "notebooks/01_a.ipynb"
    notebook.write_text(notebook.read_text().replace("return g", "return 2 * g"))


def add_notebook(*sources):
    notebook = executed(*map(new_code_cell, sources))
    return lambda root: nbformat.write(notebook, root / "notebooks/02_c.ipynb")


@pytest.mark.parametrize("spoil, expected", [
    (edit_module, "a.py is not what 01_a.ipynb exports"),
    (edit_notebook, "a.py is not what 01_a.ipynb exports"),
    (lambda root: (root / "minillm/a.py").unlink(), "a.py is not what 01_a.ipynb exports"),
    (lambda root: copy(root / "minillm/a.py", root / "minillm/old.py"), "old.py has no notebook"),
    (lambda root: copy(root / "notebooks/01_a.ipynb", root / "notebooks/02_b.ipynb"),
     "exported by several notebooks"),
    (add_notebook("#| default_exp c"), "02_c.ipynb: `#| default_exp NAME` names"),
    (add_notebook("#| export\nC = 1"), "02_c.ipynb: `#| default_exp NAME` names"),
    (add_notebook('#| export a\n"""A"""\nA = 1'), "a.py is exported by several notebooks"),
    (add_notebook("#| default_exp c", "#| export\nC = 1"),
     "exported to c.py must begin with a docstring"),
    (lambda root: (root / "notebooks/01_a.ipynb").unlink(), "no notebook exports a module"),
])
def test_package_problems(package, tmp_path, spoil, expected):
    spoil(package)
    problems = package_problems(package, empty_folder(tmp_path / "scratch"))
    assert any(expected in problem for problem in problems)


def solved():
    """A notebook of solutions with one exercise, stamped, as stored after a run."""
    answer = new_code_cell(
        "def one():\n    ### BEGIN SOLUTION\n    return 1\n    ### END SOLUTION")
    check = new_code_cell('with exercise("01.1 one"):\n    assert one() == 1',
                          metadata={"tags": ["nbval-check-output"]},
                          outputs=[new_output("stream", text="01.1 one: solved\n")])
    wrong = new_code_cell("mistake(check, wrong, 'one')", metadata={"tags": ["mistakes"]})
    notebook = executed(answer, check, wrong)
    stamp(notebook)
    return notebook


def not_solved():
    notebook = strip(solved())
    notebook.cells[1].outputs = [new_output("stream", text="01.1 one: not solved yet\n")]
    return notebook


def test_exercise_problems_pass_sound_notebooks():
    assert solution_problems(solved(), "01_a.ipynb") == []
    assert exercise_problems(not_solved(), solved()) == []


@pytest.mark.parametrize("spoil, expected", [
    (lambda cells: cells[0].metadata.pop("nbgrader"), "not stamped"),
    (lambda cells: cells[1].metadata.pop("tags"), "lacks the tag"),
    (lambda cells: cells[1].update(outputs=[]), "instead of 'solved'"),
    (lambda cells: cells[1].outputs[0].update(text="01.1 one: not right yet: solved\n"),
     "instead of 'solved'"),
])
def test_solution_problems(spoil, expected):
    notebook = solved()
    spoil(notebook.cells)
    assert expected in solution_problems(notebook, "01_a.ipynb")[0]


def test_solution_problems_of_number():
    assert "number of the chapter, 02" in solution_problems(solved(), "02_b.ipynb")[0]


@pytest.mark.parametrize("spoil, expected", [
    (lambda cells: cells.pop(0), "not what the solutions give"),
    (lambda cells: cells.append(new_markdown_cell("more")), "not what the solutions give"),
    (lambda cells: cells[0].update(source="def one():\n    return 1"),
     "not what the solutions give"),
    (lambda cells: cells[0].update(id="other"), "not what the solutions give"),
    (lambda cells: cells[1].outputs[0].update(text="01.1 one: solved\n"),
     "instead of 'not solved yet'"),
])
def test_exercise_problems(spoil, expected):
    notebook = not_solved()
    spoil(notebook.cells)
    assert expected in exercise_problems(notebook, solved())[0]


def lesson(caught=3, accepted=2, answer="*An answer:* yes.", tag="mistakes"):
    notebook = solved()
    said = [f"caught: it is not {i}" for i in range(caught)]
    said += ["accepted: another"] * accepted
    notebook.cells[2].outputs = [new_output("stream", text="\n".join(said))]
    notebook.cells += [new_markdown_cell("**Think:** is it?"),
                       new_markdown_cell(answer, metadata={"tags": [tag]})]
    return notebook


@pytest.mark.parametrize("notebook, expected", [
    (lesson(), None),
    (lesson(caught=2), "2 different mistakes"),
    (lesson(accepted=1), "1 right answers"),
    (lesson(answer="Yes."), "01.1 one: no answer after"),
    (lesson(tag="other"), "01.1 one: no answer after"),
])
def test_lesson_problems(notebook, expected):
    problems = lesson_problems(notebook)
    assert problems == [] if expected is None else expected in problems[0]


def test_lesson_problems_count_different_mistakes():
    notebook = lesson(caught=0)
    notebook.cells[2].outputs[0].text += "\ncaught: it is not one" * 3
    assert "1 different mistakes" in lesson_problems(notebook)[0]
