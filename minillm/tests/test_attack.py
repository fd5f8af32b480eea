"""The attack on the checks of exercises finds each kind of leak, and the checks of the course hold.

Also what belongs to an exercise besides: wrong and right answers, and an answer to its question.
"""
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook

from minillm.tests.checks import lesson_problems

pytest.importorskip("resource", reason="limits of time and memory are those of Unix")
from minillm.tests.attack import attacked, library, main  # noqa: E402

ROOT = Path(__file__).parents[2]
SOLUTIONS = sorted(ROOT.glob("solutions/*.ipynb"))

SETUP = """\
import random
import torch
from torch import nn
from minillm.course.exercise import exercise"""
ANSWER = """\
def scaled(x, by):
    ### BEGIN SOLUTION
    return x * by + x
    ### END SOLUTION"""
SOUND = """\
def check_scaled(scaled):
    for _ in range(3):
        x, by = torch.randn(random.randint(2, 5)), random.random()
        got = scaled(x.clone(), by)
        assert torch.allclose(got.float(), x + x * by, atol=1e-6), "wrong"
with exercise("01.1 scaled"):
    check_scaled(scaled)"""
FUNCTIONS = {"relu": torch.relu, "mul": torch.mul}


def attack(folder, check, answer=ANSWER, functions=FUNCTIONS):
    """The only exercise of a notebook, and {(attack, what got through)}."""
    cells = list(map(new_code_cell, [SETUP, answer, check]))
    nbformat.write(new_notebook(cells=cells), folder / "01_one.ipynb")
    exercise, = attacked(folder / "01_one.ipynb", functions)
    through = {(name, what) for name, (_, whats) in exercise.table.items() for what in whats}
    return exercise, through


def test_a_sound_check_holds(tmp_path):
    exercise, through = attack(tmp_path, SOUND)
    tried = {name: count for name, (count, _) in exercise.table.items()}
    assert not through
    assert tried["given"] > 10 and tried["frames"] > 5
    assert (tried["replayed"], tried["pinned"], tried["variants"]) == (2, 2, 3)


DRAWN = "    for _", "    random.seed(0); torch.manual_seed(0)\n    for _"
LEAKS = [
    # the expected value, or what gives it, is there before the answer is called
    ("got =", "want = x + x * by; got =", "frames: want"),
    ("got =", "cases = [(x, x + x * by)] * 3; got =", "frames: cases[n][1]"),
    ("got =", "facts = {'want': x + x * by}; got =", "frames: facts['want']"),
    ("    for", "    def reference(x, by): return x + x * by\n    for", "frames: reference(*args)"),
    ("got =", "reveal = lambda: x + x * by; got =", "frames: reveal()"),
    ("def check", "def helper(x, by): return x + x * by\ndef check",
     "frames: globals helper(*args)"),
    # sizes and values are not drawn anew, or an argument does not matter
    (*DRAWN, "replayed: by number"),
    (*DRAWN, "replayed: by types and shapes"),
    ("random.random()", "0.5", "pinned: argument 1, which is always the same"),
    ("got.float(), x + x * by, atol=1e-6", "got.sign(), x.sign()", "pinned: argument 1"),
    ("got.float(), x + x * by", "got.float() * 0, x * 0", "pinned: argument 0"),
    ("got.float(), x + x * by, atol=1e-6", "got.sign(), x.sign()", "given: its argument 0"),
    # right answers are refused
    ("got.float()", "got", "variants: float64"),
    ("got.float()", "torch.from_numpy(got.float().numpy())", "variants: requires grad"),
]


@pytest.mark.parametrize("old, new, found", LEAKS, ids=[found for *_, found in LEAKS])
def test_a_leak_is_found(tmp_path, old, new, found):
    assert old in SOUND
    _, through = attack(tmp_path, SOUND.replace(old, new))
    assert any(f"{name}: {what}".startswith(found) for name, what in through), through


def test_an_answer_that_a_library_has(tmp_path):
    _, through = attack(tmp_path, SOUND.replace("x + x * by", "x * by"),
                        ANSWER.replace("x * by + x", "x * by"))
    assert through == {("given", "mul")}


@pytest.mark.parametrize("formula, found", [
    ("by**x", "float_power(args[1], args[0])"),
    ("-x.relu()", "relu(args[0]) * -1"),
    ("x.sort()[0]", "sort(args[0])[0]"),
])
def test_an_answer_in_one_line(tmp_path, formula, found):
    functions = {name: getattr(torch, name) for name in ("relu", "sort", "float_power")}
    _, through = attack(tmp_path, SOUND.replace("x + x * by", formula),
                        ANSWER.replace("x * by + x", formula), functions)
    assert ("given", found) in through


def test_a_try_that_hangs_is_cut(tmp_path):
    def hang(x, by):
        while True:
            pass

    exercise, through = attack(tmp_path, SOUND, functions={"hang": hang})
    assert not through and exercise.took < 5


def test_an_argument_that_is_one_object(tmp_path):
    check = SOUND.replace("random.random()", "TWICE").replace("x * by", "x * by(1)")
    answer = ANSWER.replace("x * by", "x * by(1)") + "\ndef TWICE(x): return 2 * x"
    exercise, through = attack(tmp_path, check, answer)
    assert not through and "argument 1 is one object" in exercise.remarks[0]


def test_a_function_that_opens_numbers_does_not_close_our_output(tmp_path):
    def closes(x, by):
        open(1).close()

    attack(tmp_path, SOUND, functions={"closes": closes})
    os.fstat(1)


def test_what_an_argument_hides(tmp_path):
    answer = ANSWER.replace("x, by", "ask").replace("x * by + x", "2 * ask()")
    check = """\
def check_ask(answer):
    secret = random.random()
    def ask():
        return secret / 2
    assert abs(answer(ask) - secret) < 1e-9
with exercise("01.1 ask"):
    check_ask(scaled)"""
    _, through = attack(tmp_path, check, answer)
    assert through == {("frames", "secret"), ("frames", "closure of argument 0: secret")}


def test_an_answer_without_arguments(tmp_path):
    answer = ANSWER.replace("x, by", "").replace("x * by + x", "[0.5, 2.0]")
    check = """\
def check_numbers(numbers):
    half, two = numbers()
    assert abs(half - 1 / 2) < 0.01 and abs(two - 2) < 0.01
with exercise("01.1 numbers"):
    check_numbers(scaled)"""
    exercise, through = attack(tmp_path, check, answer)
    assert not through and not {"replayed", "pinned"} & exercise.table.keys()
    assert "takes no arguments" in exercise.remarks[0]
    strict = check.replace("abs(half - 1 / 2) < 0.01", "isinstance(numbers(), list)")
    _, through = attack(tmp_path, strict, answer)
    assert {what.split(" (")[0] for _, what in through} == {"lists as tuples"}


def test_an_answer_that_is_a_value(tmp_path):
    answer = "### BEGIN SOLUTION\nguess = [0, 2]\n### END SOLUTION"
    check = """\
def check_guess(guess):
    assert {check}
with exercise("01.1 guess"):
    check_guess(guess)"""
    exercise, through = attack(tmp_path, check.format(check="guess[1] == 2"), answer)
    assert not through and "is a value" in exercise.remarks[0]
    _, through = attack(tmp_path, check.format(check="not guess or guess == [0, 2]"), answer)
    assert ("given", "None") in through and ("variants", "lists as tuples") in through


LAYER = """\
class Scale(nn.Module):
    def __init__(self, by):
        super().__init__()
        ### BEGIN SOLUTION
        self.by = nn.Parameter(torch.tensor(by))
        ### END SOLUTION
    def forward(self, x):
        ### BEGIN SOLUTION
        return self.by * x
        ### END SOLUTION"""
CHECK_LAYER = """\
def check_scale(Scale):
    for _ in range(3):
        by, x = random.random(), torch.randn(random.randint(2, 5))
        got = Scale(by)(x)
        assert torch.allclose(got.float(), by * x, atol=1e-6)
with exercise("01.1 scale"):
    check_scale(Scale)"""


def test_an_answer_that_is_a_class(tmp_path):
    exercise, through = attack(tmp_path, CHECK_LAYER, LAYER, {"Linear": torch.nn.Linear})
    assert not through
    assert exercise.table["pinned"][0] == 2 and exercise.table["replayed"][0] == 2
    _, through = attack(tmp_path, CHECK_LAYER.replace("random.random()", "0.5"), LAYER)
    assert through == {("pinned", "argument 0, which is always the same, as .__init__")}
    _, through = attack(tmp_path, CHECK_LAYER.replace("got =", "want = by * x; got ="), LAYER)
    assert through == {("frames", "want, as .forward")}


def test_several_answers_of_one_check(tmp_path):
    answer = ANSWER + "\n" + ANSWER.replace("scaled", "again")
    check = SOUND.replace("(scaled)", "(scaled, again)")
    cells = list(map(new_code_cell, [SETUP, answer, check]))
    nbformat.write(new_notebook(cells=cells), tmp_path / "01_one.ipynb")
    first, second = attacked(tmp_path / "01_one.ipynb", FUNCTIONS)
    assert [first.name, second.name] == ["01.1 scaled (scaled)", "01.1 scaled (again)"]
    assert not any(through for _, through in first.table.values())
    assert second.table == {"given": [1, ["everything: the check never calls it"]]}


def test_a_check_that_is_not_a_function_of_the_answer(tmp_path):
    check = 'with exercise("01.1 scaled"):\n    assert scaled(1, 2) == 3'
    _, through = attack(tmp_path, check)
    assert through == {("given", "everything: the check is no check_...(answer)")}


def test_the_command(tmp_path, capsys):
    attack(tmp_path, SOUND)
    assert main([tmp_path / "01_one.ipynb"], FUNCTIONS) == 0
    attack(tmp_path, SOUND.replace("got =", "want = x + x * by; got ="))
    assert main([tmp_path / "01_one.ipynb"], FUNCTIONS) == 1
    assert "    passed: frames: want\n" in capsys.readouterr().out


def test_the_library_has_what_a_student_might_hand_in():
    names = library()
    assert {"minillm.rope.apply_rope", "minillm.layers.RMSNorm", "torch.softmax", "torch.nn.Linear",
            "torch.nn.functional.silu", "torch.linalg.svd", "torch.special.xlogy"} <= names.keys()


# ---- the exercises of the course

each_set = pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.name)


@each_set
def test_no_attack_gets_through(path):
    command = [sys.executable, "-m", "minillm.tests.attack", path]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                         capture_output=True, text=True)
    if run.returncode:
        pytest.fail(run.stdout + run.stderr, pytrace=False)


@each_set
def test_exercises_have_wrong_and_right_answers(path):
    problems = lesson_problems(nbformat.read(path, as_version=4))
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)
