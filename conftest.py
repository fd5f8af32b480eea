"""Settings of `pytest` for the whole course: notebooks (run by nbval), doctests and the tests."""
import importlib.util
import os

import pytest

PARALLEL = "PYTEST_XDIST_WORKER" in os.environ     # pytest -n 2
if PARALLEL:
    # Workers with several threads each would slow each other down many times over. Stages are
    # trained with two all the same; there, a thread that waits should leave its core to others.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# The tests and notebooks assert what models of this size can do, so it is also used on a GPU, where
# another size is the default.
os.environ.setdefault("MINILLM_SIZE", "cpu")

if importlib.util.find_spec("sphinx") is None:
    collect_ignore = ["minillm/course/book_pages.py"]    # needs the extra [book] of pyproject.toml

failed = {}    # notebook: its first cell that failed


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and item.path.suffix == ".ipynb":
        failed.setdefault(item.path, item.name)
    return report


def pytest_runtest_setup(item):
    """Later cells need what earlier ones define: one cause, one failure in the report."""
    if item.path in failed:
        pytest.skip(f"{failed[item.path]} of this notebook failed")


def pytest_collection_modifyitems(items):
    """In parallel, the last chapter that starts from a stage goes first, the other such ones last.

    It needs the stages base, chat and dpo, and builds them while the other worker does what needs
    none. The other chapters that start from a stage come last, and find these built.
    """
    if not PARALLEL:
        return
    chapters = {item.path for item in items if item.path.suffix == ".ipynb"}
    staged = {path for path in chapters if "import stages" in path.read_text(encoding="utf-8")}
    last = max(staged, default=None)

    def turn(item):
        if item.path == last:
            return 0
        return 2 if item.path in staged else 1

    items.sort(key=turn)
