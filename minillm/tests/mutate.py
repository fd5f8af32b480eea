"""Does the test suite notice when the body of an exported function is deleted? For maintainers.

    python -m minillm.tests.mutate notebooks/02_attention.ipynb ...      (default: all chapters)

In a copy of the course, one function after another loses its body (it returns None), in the
notebook and in the module exported from it; then the notebook, its solutions and `minillm/tests`
run up to the first failure. Prints the functions whose loss nothing notices, and exits with their
number. It takes a while.
"""
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat

from minillm.course.export import write_modules

ROOT = Path(__file__).parents[2]


def mutants(source):
    """Pairs of a function's name and the source of its cell without the body of that function.

    >>> for name, cell in mutants('def f(x):\\n    "Doc."\\n    return x'):
    ...     print(name, cell.splitlines()[-1])
    f     return None
    """
    tree = ast.parse(source)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for parent in [tree, *classes]:
        for node in parent.body:
            if not isinstance(node, ast.FunctionDef):
                continue
            body = node.body
            docstring = body[:1] if ast.get_docstring(node) else []
            nothing = ast.Pass() if node.name == "__init__" else ast.parse("return None").body[0]
            node.body = [*docstring, nothing]
            name = node.name if parent is tree else f"{parent.name}.{node.name}"
            yield name, ast.unparse(tree)
            node.body = body


def failure(course, name):
    """The last lines of pytest's report, or "" if all tests of this chapter pass."""
    paths = [f"notebooks/{name}", f"solutions/{name}"]
    paths = [path for path in paths if (course / path).exists()]
    env = {**os.environ, "PYTHONPATH": str(course), "MINILLM_CACHE": str(course / "cache")}
    unrelated = [f"--ignore=minillm/tests/{module}.py"
                 for module in ("test_notebooks", "test_exercise")]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--nbval-cell-timeout=300",
               *unrelated, *paths, "minillm"]
    try:
        run = subprocess.run(command, cwd=course, env=env, capture_output=True, text=True,
                             timeout=1200)
    except subprocess.TimeoutExpired:
        return "does not end"
    return run.stdout[-1500:] if run.returncode else ""


def survivors(course, name):
    """Names of the functions of one chapter whose loss nothing notices."""
    path = course / "notebooks" / name
    original, unnoticed = path.read_bytes(), []
    for index, cell in enumerate(nbformat.reads(original.decode(), as_version=4).cells):
        if not re.match(r"#\|\s*export", cell.source):
            continue
        directive = cell.source.partition("\n")[0]
        for function, source in mutants(cell.source):
            notebook = nbformat.reads(original.decode(), as_version=4)
            notebook.cells[index].source = f"{directive}\n{source}"
            nbformat.write(notebook, path)
            write_modules(path, course / "minillm")
            noticed = failure(course, name)
            print(f"{name} {function}: {'noticed' if noticed else 'NOT NOTICED'}", flush=True)
            unnoticed += [] if noticed else [function]
    path.write_bytes(original)
    write_modules(path, course / "minillm")
    return unnoticed


def main(*paths):
    count = 0
    with tempfile.TemporaryDirectory() as folder:
        course = Path(folder) / "course"
        ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT, course, ignore=ignored)
        for path in paths or sorted(course.glob("notebooks/*.ipynb")):
            name = Path(path).name
            if before := failure(course, name):
                sys.exit(f"{before}\n{name} fails as it is: mend that first")
            count += len(survivors(course, name))
    print(f"{count} not noticed")
    return count


if __name__ == "__main__":
    sys.exit(min(main(*sys.argv[1:]), 100))
