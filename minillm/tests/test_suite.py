"""What conftest.py does: the order of a run in parallel."""
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[2]))
import conftest  # noqa: E402


def test_in_parallel_the_last_staged_chapter_goes_first_and_the_others_last(monkeypatch, tmp_path):
    names = {"01_plain.ipynb": "", "07_staged.ipynb": "import stages", "test_x.py": "import stages", "16_staged.ipynb": "import stages"}
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
