"""Several seeds of every stage, the ranges of their scores, and runs compared with them."""
import json
import re
import statistics
from types import SimpleNamespace

import pytest
import torch

from minillm import __main__ as course
from minillm.arc import ranges, stages
from minillm.arc.sizes import SIZES
from minillm.bench import __main__ as command
from minillm.bench.stages import NAMES
from minillm.tests.test_stages import cut

GAPS = [0.100, 0.104, 0.096, 0.102, 0.098, 0.101, 0.099, 0.100]
SD = statistics.stdev(GAPS)               # 0.00245


@pytest.fixture
def path(monkeypatch, tmp_path):
    monkeypatch.setattr(ranges, "PATH", tmp_path / "ranges.json")
    return ranges.PATH


def runs():
    """Of eight seeds: two stages, one of which has no wins."""
    return [[{"stage": "base", "gap": gap, "wins": None, "MB": 3.26, "tokens/s": 100 * seed},
             {"stage": "dpo", "gap": gap + 0.1, "wins": 0.6 + 0.01 * (seed % 2), "MB": 3.26,
              "tokens/s": 100 * seed}] for seed, gap in enumerate(GAPS)]


def test_spreads_by_hand():
    measured = ranges.spreads(runs())
    assert list(measured) == ["base", "dpo"] and "wins" not in measured["base"]
    assert measured["base"]["gap"] == pytest.approx(
        {"mean": 0.1, "sd": (42e-6 / 7) ** 0.5, "min": 0.096, "max": 0.104})
    assert measured["dpo"]["wins"]["min"] == 0.6 and measured["dpo"]["wins"]["max"] == 0.61
    assert measured["base"]["MB"]["sd"] == 0


def test_each_size_has_its_ranges(path):
    assert ranges.read() == {}
    ranges.write("cpu", runs())
    ranges.write("gpu", runs()[:3])
    ranges.write("gpu", runs()[:4])
    known = json.loads(path.read_text())
    assert known == ranges.read() and list(known) == ["cpu", "gpu"]
    assert (known["cpu"]["seeds"], known["gpu"]["seeds"]) == (8, 4)
    assert known["cpu"]["torch"] == torch.__version__
    assert set(known["cpu"]["stages"]["dpo"]) == {"gap", "wins", "MB"}       # a speed is no range
    assert set(known["cpu"]["stages"]["dpo"]["gap"]) == {"mean", "sd", "min", "max"}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_damaged_file_is_named(path):
    for text in "", "{", "\x00":
        path.write_text(text)
        with pytest.raises(ValueError, match="ranges.json is damaged"):
            ranges.read()
        with pytest.raises(ValueError, match="ranges.json is damaged"):
            ranges.write("cpu", runs())


def said(path, **changes):
    """What is said of a run that scores as the seeds on average, with some figures of dpo
    changed."""
    ranges.write("cpu", runs())
    base = {"stage": "base", "gap": 0.1, "wins": None, "MB": 3.26, "tokens/s": 0.5}
    dpo = base | {"stage": "dpo", "gap": 0.2, "wins": 0.605} | changes
    return ranges.compare([base, dpo], "cpu")


NORMAL = ("Is this run normal? All figures lie within the range of 8 seeds (mean +- 5 standard "
          "deviations).")


@pytest.mark.parametrize("changes", [
    {}, {"gap": 0.2 + 4.5 * SD}, {"gap": 0.2 - 4.5 * SD}, {"tokens/s": 1e6}, {"MB": 3.2601},
    {"wins": None}])
def test_a_normal_run_is_said_to_be_one(path, changes):
    assert said(path, **changes) == NORMAL


@pytest.mark.parametrize("column, value, shown", [
    ("gap", 0.2 + 6 * SD, "21.5%, where 8 seeds had 19.6% to 20.4%, 20.0% on average"),
    ("gap", 0.2 - 6 * SD, "18.5%, where 8 seeds had 19.6% to 20.4%, 20.0% on average"),
    ("wins", 0.5, "50.0%, where 8 seeds had 60.0% to 61.0%, 60.5% on average"),
    ("MB", 3.4, "3.4, where 8 seeds had 3.3 to 3.3, 3.3 on average"),
    ("gap", float("nan"), "nan%")])
def test_a_figure_outside_is_named_with_what_to_look_at(path, column, value, shown):
    text = said(path, **{column: value})
    assert NORMAL not in text and max(map(len, text.splitlines())) <= 100
    text = " ".join(text.split())
    assert text.startswith("Is this run normal? These figures are not within 5 standard")
    assert text.count("- ") == 1
    assert f"- {column} of dpo: {shown}" in text
    assert f"Look at this: {ranges.ADVICE[column]}." in text


def test_what_has_no_range_is_said(path):
    assert ranges.compare([{"stage": "base", "gap": 0.1}], "cpu") == (
        "Is this run normal? No range is known for the size cpu: "
        "python -m minillm.bench stages --seeds 8 measures one.")
    text = said(path, rhyme=0.9)
    assert text == f"{NORMAL}\nNo range is known for rhyme of dpo."


def test_another_column_gets_a_range_and_advice(path):
    """The code asks for no column by its name."""
    more = [[row | {"rhyme": 0.9} for row in rows] for rows in runs()]
    ranges.write("cpu", more)
    assert ranges.compare(more[0], "cpu") == NORMAL
    off = ranges.compare([row | {"rhyme": 0.8} for row in more[0]], "cpu")
    assert " ".join(off.split()).count(ranges.OTHERWISE) == 2


def test_ranges_in_the_package_are_of_stages_that_exist():
    known = ranges.read()
    if not known:
        pytest.skip("no range was measured yet")
    assert set(known) <= set(SIZES)
    for size in known.values():
        assert list(size["stages"]) == list(NAMES) and size["seeds"] >= 8
        for columns in size["stages"].values():
            assert all(s["min"] <= s["mean"] <= s["max"] for s in columns.values())


# ---- the benchmark, on stages that take seconds

@pytest.fixture
def small(monkeypatch, tmp_path, path):
    cut(monkeypatch, SIZES["cpu"], tmp_path)
    monkeypatch.setenv("MINILLM_SIZE", "cpu")
    return tmp_path


def test_the_benchmark_trains_each_stage_with_each_seed(small, path, capsys):
    command.main(["stages", "--seeds", "2", "--save"])
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if line.startswith("seed ")]
    named = [re.split(", |: ", line)[:2] for line in lines]
    assert named == [[f"seed {seed}", name] for seed in (0, 1) for name in NAMES]
    assert len(lines) == 12 and sum("s of training" in line for line in lines) == 8
    assert lines[11].startswith("seed 1, int8: bits/byte ") and "tokens/s" in lines[11]
    for name in NAMES:
        table = shown.split(f"\n{name:>4} ")[1].splitlines()
        assert "bits/byte" in table[0] and ("wins" in table[0]) == (name in NAMES[2:])
        assert [line.split()[0] for line in table[1:5]] == ["mean", "sd", "min", "max"]
    assert set(ranges.read()) == {"cpu"} and str(path) in shown
    folders = {folder.name for folder in (small / "cache").iterdir() if folder.is_dir()}
    assert len(folders) == 10
    # Seed 0 is what the course gives; and a run that was measured is a normal one.
    assert {stages.lora(bar=False).key, stages.dpo(bar=False).key} <= folders
    assert course.main([]) == 0
    assert "All figures lie within the range of 2 seeds" in capsys.readouterr().out


def test_a_seed_shapes_every_stage(small):
    """With the stage before it alike: its first weights, its batches, its pairs."""
    first, second = (stages.base(bar=False, seed=seed) for seed in (0, 1))
    assert first.key != second.key
    assert first.history[0]["loss"] != second.history[0]["loss"]
    assert first.heldout == second.heldout
    size, chat = stages.size(), stages.chat(bar=False)
    for name, make, before in (("chat", stages.make_chat, first), ("lora", stages.make_lora, chat),
                               ("dpo", stages.make_dpo, chat)):
        losses = []
        for seed in 0, 1, 0:
            start = getattr(stages, "chat" if before is chat else "base")(bar=False)
            recipe = stages.seeded(getattr(size, name), seed)
            history = make(recipe, start, small / f"{name}-{len(losses)}", False).history
            losses.append([step["loss"] for step in history])
        assert losses[0] == losses[2] != losses[1], name


def test_every_stage_is_made_from_those_of_the_same_seed(monkeypatch):
    def build(name, recipe, make, bar, before=None, *_, **__):
        way = f"{before.way} {name}" if before else name
        return SimpleNamespace(way=f"{way} {recipe.seed}", model=None)

    monkeypatch.setattr(stages, "build", build)
    monkeypatch.setattr(stages, "quantize_model", lambda model: None)
    ways = {name: getattr(stages, name)(seed=3).way for name in NAMES}
    own = stages.size()
    base = f"base {own.stories.seed + 3}"
    chat = f"{base} chat {own.chat.seed + 3}"
    dpo = f"{chat} dpo {own.dpo.seed + 3}"
    assert ways == {"base": base, "chat": chat, "lora": f"{chat} lora {own.lora.seed + 3}",
                    "rlhf": f"{chat} rlhf {own.rlhf.seed + 3}", "dpo": dpo, "int8": dpo}
    assert stages.dpo().way == (f"base {own.stories.seed} chat {own.chat.seed} "
                                f"dpo {own.dpo.seed}")


def test_a_seed_shapes_the_adapter_and_the_sampled_answers(small, monkeypatch):
    """What trains here does not train, so that only the seed tells two stages apart."""
    seen = []

    def finetune(model, *_, seed, **__):
        seen.append((seed, [p.sum().item() for n, p in model.named_parameters() if "lora_A" in n]))
        return []

    def sample_pairs(*_, seed):
        seen.append(seed)
        raise InterruptedError

    for name, used in (("finetune", finetune), ("sample_pairs", sample_pairs)):
        monkeypatch.setattr(stages, name, used)
    for seed in 0, 1:
        stage = stages.base(bar=False)
        stages.make_lora(stages.seeded(stages.size().lora, seed), stage, small, False)
        with pytest.raises(InterruptedError):
            recipe = stages.seeded(stages.size().dpo, seed)
            stages.make_dpo(recipe, stages.base(bar=False), small, False)
    (zero, a), first, (one, b), second = seen
    assert (zero, first, one, second) == (0, 0, 1, 1)
    assert a and len(a) == len(b) and all(x != y for x, y in zip(a, b))


def test_the_benchmark_says_how_it_goes_on(small, monkeypatch, capsys):
    def stopped(bar, seed):
        raise KeyboardInterrupt("stopped after step 3")

    def full(bar, seed):
        raise OSError("the stage base could not be saved")

    for base, code, words in ((stopped, 130, "same command continues"),
                              (full, 2, "could not be saved")):
        monkeypatch.setattr(stages, "base", base)
        with pytest.raises(SystemExit) as ended:
            command.main(["stages"])
        error = capsys.readouterr().err
        assert ended.value.code == code and words in error and "Traceback" not in error


def test_what_cannot_be_saved_is_refused_before_training(small, path, monkeypatch, capsys):
    monkeypatch.setattr(stages, "base", lambda **_: pytest.fail("it trained"))
    path.write_text("{")
    with pytest.raises(SystemExit):
        command.main(["stages", "--save"])
    assert "is damaged" in capsys.readouterr().err
    path.unlink()
    monkeypatch.setattr("os.access", lambda place, mode: place != path.parent)
    with pytest.raises(SystemExit):
        command.main(["stages", "--save"])
    assert "cannot be written" in capsys.readouterr().err
