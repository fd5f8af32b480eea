"""What conftest.py and bench.py do: the order of a run in parallel, and contenders that get their turns."""
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from minillm import bench

sys.path.insert(0, str(Path(__file__).parents[2]))
import conftest  # noqa: E402


def test_in_parallel_the_last_staged_chapter_goes_first_and_the_others_last(monkeypatch, tmp_path):
    names = {"01_plain.ipynb": "", "07_staged.ipynb": "import recipes", "test_x.py": "import recipes", "16_staged.ipynb": "import recipes"}
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


def test_contenders_take_turns_and_may_time_themselves():
    calls = []
    seconds = bench.in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b") or 2.5}, 3)
    assert calls == list("abababab") and seconds["b"] == [2.5] * 3 and len(seconds["a"]) == 3 and max(seconds["a"]) < 0.5


@pytest.mark.parametrize("what", ["train", "generate", "quantize"])
def test_each_comparison_runs(what, monkeypatch, capsys):
    def tiny(shapes):
        return {name: replace(c, vocab_size=64, dim=32, n_layers=1, n_heads=2, n_kv_heads=2, hidden_dim=48, max_seq_len=96) for name, c in shapes.items()}
    monkeypatch.setattr(bench, "SHAPES", tiny(bench.SHAPES))
    monkeypatch.setattr(bench, "TALKERS", tiny(bench.TALKERS))
    monkeypatch.setattr(sys, "argv", ["bench", "--rounds", "1", what])
    bench.main()
    said = capsys.readouterr().out
    assert "transformers" in said and "minillm" in said
    if what != "train":
        assert "minillm 100%" in said or "minillm float32 100%" in said and "minillm int8, exact 100%" in said
