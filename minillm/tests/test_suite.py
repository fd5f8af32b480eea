"""What the suite itself holds to: its order in parallel, style, and the order of the chapters."""
import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from minillm.tests.order import forward_imports

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import conftest  # noqa: E402  (it is in the top folder, which is on the path only now)

PACKAGE = ROOT / "minillm"
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if "tests" not in path.parts]


def test_in_parallel_the_last_staged_chapter_goes_first_and_the_others_last(monkeypatch, tmp_path):
    names = {
        "01_plain.ipynb": "",
        "07_staged.ipynb": "import stages",
        "test_x.py": "import stages",
        "16_staged.ipynb": "import stages",
    }
    for name, text in names.items():
        (tmp_path / name).write_text(text)
    items = [SimpleNamespace(path=tmp_path / name, at=k) for name in names for k in range(2)]

    def order():
        ordered = items.copy()
        conftest.pytest_collection_modifyitems(ordered)
        return [(item.path.name[:2], item.at) for item in ordered]

    monkeypatch.setattr(conftest, "PARALLEL", True)
    assert order() == [(name, k) for name in ("16", "01", "te", "07") for k in range(2)]
    monkeypatch.setattr(conftest, "PARALLEL", False)
    assert order() == [(item.path.name[:2], item.at) for item in items]


# ---- style

def test_ruff_finds_nothing():
    """In modules, tests and notebooks; pyproject.toml says what is looked for."""
    done = subprocess.run([sys.executable, "-m", "ruff", "check", ROOT],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_begins_with_a_docstring():
    without = [str(path.relative_to(ROOT)) for path in MODULES
               if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert MODULES and not without, "\n".join(without)


def test_public_functions_have_type_hints():
    offenders = []
    for path in MODULES:
        problems = hint_problems(path.read_text(encoding="utf-8"))
        offenders += [f"{path.relative_to(ROOT)}: {problem}" for problem in problems]
    assert not offenders, f"{len(offenders)} without type hints:\n" + "\n".join(offenders)


FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef


def hint_problems(source):
    """The public functions, and methods of public classes, that lack hints, with what they lack.

    Of dunder methods only __init__ counts, and of it only the parameters.
    """
    problems = []
    for node in ast.parse(source).body:
        if isinstance(node, FUNCTIONS) and not node.name.startswith("_"):
            problems += missing_hints(node, node.name, is_method=False)
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                if not isinstance(method, FUNCTIONS):
                    continue
                if method.name == "__init__" or not method.name.startswith("_"):
                    name = f"{node.name}.{method.name}"
                    problems += missing_hints(method, name, is_method=True)
    return problems


def missing_hints(function, name, is_method):
    arguments = function.args
    parameters = [*arguments.posonlyargs, *arguments.args]
    decorators = [d.id for d in function.decorator_list if isinstance(d, ast.Name)]
    if is_method and "staticmethod" not in decorators:
        parameters = parameters[1:]                                  # self or cls
    others = [*arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    parameters += [parameter for parameter in others if parameter is not None]
    missing = [parameter.arg for parameter in parameters if parameter.annotation is None]
    if function.returns is None and function.name != "__init__":
        missing.append("its result")
    return [f"{name}, line {function.lineno}: {', '.join(missing)}"] if missing else []


@pytest.mark.parametrize("source, found", [
    ("def f(x: int, *y: int, z: int = 0, **w: int) -> int: ...", []),
    ("def f(x, *y, z=0, **w) -> int: ...", ["f, line 1: x, z, y, w"]),
    ("async def f(): ...", ["f, line 1: its result"]),
    ("def _f(x): ...\nclass _A:\n    def f(self, x): ...", []),
    ("def f() -> int:\n    def g(x): ...", []),
    ("class A:\n    def __init__(self): ...\n    def __len__(self): ...\n    def _f(self, x): ...",
     []),
    ("class A:\n    def __init__(self, x): ...", ["A.__init__, line 2: x"]),
    ("class A:\n    @property\n    def f(self): ...", ["A.f, line 3: its result"]),
    ("class A:\n    @staticmethod\n    def f(x) -> int: ...", ["A.f, line 3: x"]),
    ("class A:\n    @classmethod\n    def f(cls, x: int) -> int: ...", []),
])
def test_hint_problems(source, found):
    assert hint_problems(source) == found


# ---- the order of the chapters

# Allowed: (module, what it imports), with the reason.
LOANS = {
    ("attention", "rope.apply_rope"):
        "attention (02) shows the whole layer before the next chapter explains how RoPE rotates",
}


def test_no_module_uses_what_a_later_chapter_builds():
    problems = forward_imports(PACKAGE, loans=LOANS)
    assert not problems, "\n".join(problems)


def module(folder, name, text="", chapter=None):
    """Write a module of a package, exported by a chapter or written by hand."""
    path = folder / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    header = f"# File to edit: ../notebooks/{chapter:02}_{path.stem}.ipynb.\n" if chapter else ""
    path.write_text(f'"""A module."""\n{header}{text}\n')


@pytest.fixture
def package(tmp_path):
    """Three chapters in order, and wings that only use what comes before."""
    folder = tmp_path / "made"
    module(folder, "__init__")
    module(folder, "first", "import torch\nfrom elsewhere import third", chapter=1)
    module(folder, "second", "from .first import a\nfrom made.wing.early import b", chapter=2)
    module(folder, "third", "from made import second\nimport made.wing.late", chapter=3)
    module(folder, "wing/__init__")
    module(folder, "wing/early", "from made.first import a")
    module(folder, "wing/late", "from ..third import a\nfrom . import early")
    module(folder, "tests/test_first", "from made.third import a")
    return folder


def test_a_tree_in_order_is_clean(package):
    assert forward_imports(package) == []


@pytest.mark.parametrize("planted, found", [
    ("from .third import a", "first (01) imports third (03)"),
    ("from . import third", "first (01) imports third (03)"),
    ("from made import third", "first (01) imports third (03)"),
    ("import made.third as t", "first (01) imports third (03)"),
    ("from made.third import (\n    a, b)", "first (01) imports third (03)"),
    ("def f():\n    from made.third import a", "first (01) imports third (03)"),
    ("try:\n    import made.third\nexcept ImportError:\n    pass", "first (01) imports third (03)"),
    ("from made.wing import late", "first (01) imports third (03) through wing.late"),
    ("from made.wing.late import a", "first (01) imports third (03) through wing.late"),
    ("class A:\n    def f(self):\n        from .wing import late",
     "first (01) imports third (03) through wing.late"),
])
def test_a_forward_import_is_found(package, planted, found):
    module(package, "first", planted, chapter=1)
    assert forward_imports(package) == [found]


def test_a_forward_import_through_two_wings_is_found(package):
    module(package, "wing/early", "def f():\n    from made.other.more import a")
    module(package, "other/__init__", "from made.third import a")
    module(package, "other/more")
    assert forward_imports(package) == ["second (02) imports third (03) through wing.early, other"]


def test_wings_that_import_each_other_do_not_stop_the_search(package):
    module(package, "wing/early", "from made.wing import late")
    assert forward_imports(package) == [
        "second (02) imports third (03) through wing.early, wing.late"]


def test_a_module_without_a_header_may_be_given_a_chapter(package):
    module(package, "given", "from .third import a")
    module(package, "second", "from .given import a", chapter=2)
    assert forward_imports(package) == ["second (02) imports third (03) through given"]
    assert forward_imports(package, {"given": 5}) == ["second (02) imports given (05)"]
    assert forward_imports(package, {"given": 2}) == ["given (02) imports third (03)"]


def test_a_loan_is_of_one_name(package):
    loans = {("first", "third.a")}
    module(package, "first", "from .third import a", chapter=1)
    assert forward_imports(package, loans=loans) == []
    module(package, "first", "from .third import a, b", chapter=1)
    assert forward_imports(package, loans=loans) == ["first (01) imports third (03)"]
