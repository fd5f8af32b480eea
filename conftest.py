"""Settings of `pytest` for the whole course: notebooks (run by nbval), doctests and `minillm/tests`."""
import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:    # workers with several threads each would slow each other down many times over
    os.environ.setdefault("OMP_NUM_THREADS", "1")

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
