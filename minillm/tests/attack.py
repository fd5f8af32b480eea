"""Attacks on the checks of exercises: can one be passed without solving the exercise?

    python -m minillm.tests.attack solutions/03_positions.ipynb ...

Runs the code cells of a notebook of solutions and, after each check cell, hands answers to its
check that know nothing and must be rejected. (Any exception rejects. A try that takes too long is
cut, and what passes only now and then is no leak: it must pass three times in a row.)

    given       every public function and class of minillm and torch, as it is, with some of the
                arguments in some order, or a part of its result; constants
    frames      what can be read from the frames that call the answer, from the notebook's globals,
                and from the closures of the arguments: values, elements of lists, and what
                functions found there return for the same arguments
    replayed    the results of the right answer in another run, by the number of the call,
                and by the types and shapes of the arguments
    pinned      the right answer, with one argument held at the value that it had in another run
                (the numbers of a tensor; its shape is the one of the call)

and variants of the right answer that must be accepted:

    variants    lists for tuples, float64, numbers for 0-d tensors, gradients...

Prints what was tried and what got through, and exits with 1 if anything did. For maintainers, and
for test_attack.py.

A check holds if it draws sizes and values anew each time, varies each argument, and calls the
answer *before* the expected value, or a function that computes it, has a name: first all calls,
then `def reference(...)`, then the comparison.
"""
import ast
import contextlib
import importlib
import io
import itertools
import os
import pkgutil
import random
import re
import resource
import signal
import sys
import tempfile
import time
import types
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest import mock

import nbformat
import numpy as np
import torch
import torch._dynamo  # noqa: F401  (optimizers import it late; cut in the middle, it stays broken)
from torch import Tensor, nn

import minillm
from minillm.course.exercise import CHECK, MARKER

# exercise() raises, and figures open no window
ENVIRONMENT = {"NBGRADER_EXECUTION": "attack", "MPLBACKEND": "agg"}
RUNS = 3          # a wrong answer got through if it passes so many times in a row
SEED = 1000


class TooLong(BaseException):
    """Not an Exception, so that no check takes it for an error of the answer."""


@dataclass
class Exercise:
    """One check, and one answer that is handed to it."""
    name: str
    check: types.FunctionType
    answer: object
    call: object                                   # call(answer): run the check with this answer
    own: list = field(default_factory=list)        # all answers that this check is given
    seconds: float = 0.0                           # what the right answer takes
    table: dict = field(default_factory=dict)      # attack: [tried, names of what got through]
    remarks: list = field(default_factory=list)    # which attacks do not apply, and why


# ---- a notebook of solutions

def exercises(path):
    """Run the code cells of a notebook, and yield its exercises, each after its check cell.

    Cells tagged `mistakes` are left out. Raises the error of a cell that fails.
    """
    notebook = nbformat.read(path, as_version=4)
    module = types.ModuleType("__main__")
    sys.modules["__main__"], main = module, sys.modules["__main__"]
    answers = set()
    try:
        for cell in notebook.cells:
            if cell.cell_type != "code" or "mistakes" in cell.metadata.get("tags", ()):
                continue
            source = without_magics(cell.source)
            tree = ast.parse(source)
            silence = contextlib.redirect_stdout(io.StringIO())
            with mock.patch.dict(os.environ, ENVIRONMENT), silence:
                exec(compile(tree, f"<{cell.id}>", "exec"), vars(module))
            if MARKER.search(source):
                answers = {name for node in tree.body for name in names_of(node)}
            elif CHECK.search(source):
                yield from exercises_of(tree, CHECK.search(source)[1], answers, vars(module))
    finally:
        sys.modules["__main__"] = main


def without_magics(source):
    return re.sub(r"^([ \t]*)[%!].*", r"\1pass", source, flags=re.M)


def names_of(node):
    """The names that a statement at the top of a cell defines."""
    if hasattr(node, "name"):                      # def, class
        return [node.name]
    names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
    return [n.id for n in names if isinstance(n.ctx, ast.Store)]


def exercises_of(tree, name, answers, namespace):
    """The exercises of a check cell: check_NAME(...) calls in `with exercise(...)`."""
    found = []
    body = next(node for node in ast.walk(tree) if isinstance(node, ast.With)
                and ast.unparse(node.items[0]).startswith("exercise("))
    for node in ast.walk(body):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "").startswith("check"):
            places = [(i, a) for i, a in enumerate(node.args)]
            places += [(k.arg, k.value) for k in node.keywords]
            given = {place: value(a, namespace) for place, a in places}
            mine = [place for place, a in places if getattr(a, "id", None) in answers]
            check, own = namespace[node.func.id], [given[place] for place in mine]
            for place, answer in zip(mine, own):
                label = name if len(mine) == 1 else f"{name} ({answer.__name__})"
                found.append(Exercise(label, check, answer, caller(check, given, place), own))
    if not found:
        found = [Exercise(name, None, None, None)]
        note(found[0], "given", "everything: the check is no check_...(answer)", True)
    return found


def value(node, namespace):
    return eval(compile(ast.Expression(node), "<check>", "eval"), namespace)


def caller(check, given, place):
    def call(answer):
        values = {**given, place: answer}
        positional = [values[p] for p in values if isinstance(p, int)]
        return check(*positional, **{p: v for p, v in values.items() if isinstance(p, str)})
    return call


# ---- one try

def seeded(number):
    random.seed(number)
    np.random.seed(number)
    torch.default_generator.manual_seed(number)      # (torch.manual_seed is slow, because of CUDA)


TIMERS = {signal.SIGPROF: signal.ITIMER_PROF, signal.SIGALRM: signal.ITIMER_REAL}


def cut(*_):
    raise TooLong


def start_timers(seconds):
    """Raise TooLong after so many seconds of processor time, or ten times as many on the clock."""
    for timer, factor in (signal.ITIMER_PROF, 1), (signal.ITIMER_REAL, 10):
        signal.setitimer(timer, factor * seconds, 1)     # and each second, if something swallows it


def stop_timers():
    while True:
        try:
            for timer in TIMERS.values():
                signal.setitimer(timer, 0)
            return
        except TooLong:                                  # at this very moment
            pass


@contextlib.contextmanager
def timers():
    """In the body, attempt() can cut what takes too long."""
    before = {number: signal.signal(number, cut) for number in TIMERS}
    try:
        yield
    finally:
        stop_timers()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def memory_for(gigabytes):
    """In the body, more memory than that cannot be allocated (where /proc says what is used)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        yield
        return
    now = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + gigabytes * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (int(most), now[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, now)


def attempt(function, seconds, seed):
    """What function() raises, or None. Silent, with random numbers from this seed."""
    seeded(seed)
    error, modules = None, len(sys.modules)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            try:
                start_timers(seconds)
                function()
            finally:
                stop_timers()
        except BaseException as raised:                  # SystemExit, TooLong, ...
            error = raised
        stop_timers()                                    # (in case it came just before the first)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    if isinstance(error, TooLong):
        for name in list(sys.modules)[modules:]:         # an import may have been cut
            del sys.modules[name]
    if isinstance(error, KeyboardInterrupt):
        raise error
    return error


def passes(exercise, make, runs=RUNS):
    """Whether the answer of make() passes each of several runs (it is made anew for each)."""
    return all(attempt(lambda: exercise.call(make()), limit(exercise), SEED + 1 + k) is None
               for k in range(runs))


def limit(exercise):
    """The seconds that one try may take."""
    return 1 + 3 * exercise.seconds


def note(exercise, attack, name, got_through):
    row = exercise.table.setdefault(attack, [0, []])
    row[0] += 1
    if got_through:
        row[1].append(name)


def label(name, point):
    return f"{name}, as {point.name}" if point.name else name


# ---- the calls of the right answer

FIXED = {str, bytes, int, float, bool}


def copied(x):
    """A copy of data; models, functions, generators... are handed on as they are."""
    if isinstance(x, Tensor):
        return x.detach().clone().requires_grad_(x.requires_grad)
    if type(x) is list:
        return x[:] if FIXED.issuperset(map(type, x)) else [copied(y) for y in x]
    if type(x) is tuple:
        return x if FIXED.issuperset(map(type, x)) else tuple([copied(y) for y in x])
    if isinstance(x, dict) and type(x) is dict:
        return {key: copied(y) for key, y in x.items()}
    return x.copy() if isinstance(x, np.ndarray) else x


def kind(x):
    """The type of a value, with the shape of tensors."""
    if isinstance(x, (Tensor, np.ndarray)):
        return type(x).__name__, str(x.dtype), tuple(x.shape)
    if type(x) in (list, tuple):
        return type(x).__name__, tuple(kind(y) for y in x)
    return type(x).__name__


def kinds(args, kwargs):
    return tuple(map(kind, args)), tuple((name, kind(x)) for name, x in sorted(kwargs.items()))


@dataclass
class Point:
    """A function that an answer consists of: the answer itself, or a method of a class."""
    name: str
    original: object
    place: object              # place(function): an answer with the function in its place
    skip: int = 0              # the first arguments that are not the caller's: self


def points(answer):
    """The functions of an answer, each of which is attacked while the others are right."""
    if isinstance(answer, type):
        def place(name):
            return lambda function: type(answer.__name__, (answer,), {name: function})

        methods = [name for name, x in vars(answer).items() if isinstance(x, types.FunctionType)
                   and (not name.startswith("_") or name in ("__init__", "__call__"))]
        return [Point(f".{name}", getattr(answer, name), place(name), 1) for name in methods]
    return [Point("", answer, lambda function: function)] if callable(answer) else []


def recorded(exercise, point, seed):
    """The calls of the right answer in one run of the check: (args, kwargs, result or error)."""
    calls = []

    def recorder(*args, **kwargs):
        given = copied(args[point.skip:]), copied(kwargs)
        try:
            result = point.original(*args, **kwargs)
        except Exception as error:
            calls.append((*given, error))
            raise
        calls.append((*given, copied(result)))
        return result

    start = time.process_time()
    error = attempt(lambda: exercise.call(point.place(recorder)), 600, seed)
    exercise.seconds = max(exercise.seconds, time.process_time() - start)
    if error is not None:
        raise AssertionError(f"{exercise.name}: the right answer fails in another run: "
                             f"{type(error).__name__}: {error}") from error
    return calls


# ---- given: functions of libraries, and constants

# They change the state of torch, need files or devices, or crash the interpreter.
LEFT_OUT = ("set_", "use_", "save", "load", "manual_seed", "seed", "compile", "from_file", "cuda",
            "cudnn", "miopen", "mkldnn", "fbgemm", "init_num_threads", "prepare_multiprocessing",
            "import_ir_module", "autocast", "clear_autocast", "typename", "fork", "wait",
            "quantized_", "fused_moving_avg", "parse_", "unify_type", "merge_type", "sym_",
            "resize", "export", "vmap", "cond", "while_loop")
TORCH = (torch, nn, nn.functional, torch.linalg, torch.special, torch.fft)
RUNNERS = ("arc", "bench", "course", "serving", "tests", "__main__")


def library():
    """{name: function or class} of minillm and torch."""
    found = {}
    for info in pkgutil.walk_packages(minillm.__path__, "minillm."):
        if info.name.split(".")[1] in RUNNERS:
            continue
        module = importlib.import_module(info.name)
        for name, x in vars(module).items():
            own = callable(x) and getattr(x, "__module__", "") == info.name
            if own and not name.startswith("_"):
                found[f"{info.name}.{name}"] = x
    seen = set()
    for module in TORCH:
        for name in dir(module):
            x = getattr(module, name)
            public = not name.startswith(("_", *LEFT_OUT)) and callable(x)
            public = public and not (module is torch and isinstance(x, type))   # files, JIT...
            if public and id(x) not in seen:
                seen.add(id(x))
                found[f"{module.__name__}.{name}"] = x
    return found


def constants(count):
    """{name: answer} that look at nothing, or return an argument."""
    values = {"None": None, "True": True, "False": False, "0": 0, "1": 1, "0.0": 0.0, "''": "",
              "[]": [], "()": (), "{}": {}, "zero": torch.tensor(0.0), "inf": float("inf"),
              "nan": float("nan"), "tensor(nan)": torch.tensor(float("nan"))}
    answers = {name: (lambda *_, x=x, **__: copied(x)) for name, x in values.items()}
    for i in range(count):
        answers[f"its argument {i}"] = lambda *args, i=i, **kwargs: (*args, *kwargs.values())[i]
    return answers


def attack_given(exercise, point, calls, functions):
    args, kwargs, result = calls[0]
    comparable = not (kwargs or isinstance(result, Exception) or numbers(result) is None)
    for name, function in {**constants(len(args) + len(kwargs)), **functions}.items():
        wrong = without_self(function) if point.skip else function
        got_through = (survives(exercise, function, args, kwargs, result)
                       and passes(exercise, partial(point.place, wrong)))
        note(exercise, "given", label(name, point), got_through)
        if comparable and not got_through and name in functions:
            attack_in_one_line(exercise, point, name, function, args, result)


def survives(exercise, function, args, kwargs, result):
    """Whether a call like the first call of the check goes through; else the check need not run."""
    if isinstance(result, Exception):
        return True
    seconds = 0.2 + exercise.seconds
    return attempt(lambda: function(*copied(args), **copied(kwargs)), seconds, SEED) is None


def without_self(function):
    return lambda self, *args, **kwargs: function(*args, **kwargs)


def attack_in_one_line(exercise, point, name, function, args, result):
    """The function with some of the arguments in some order, or a part of what it returns.

    Only what agrees with the right answer at the first call is handed to the check.
    """
    for order in orders(len(args)):
        found = []
        call = partial(keep, found, function, [copied(args[i]) for i in order])
        if attempt(call, 0.2, SEED) is not None:
            continue
        for way, use in PARTS.items():
            if (way or order != tuple(range(len(args)))) and agrees(use, found[0], result):
                shown = f"{name}({', '.join(f'args[{i}]' for i in order)}){way}"
                line = in_one_line(function, order, use, point.skip)
                got_through = passes(exercise, partial(point.place, line))
                note(exercise, "given", label(shown, point), got_through)
                if got_through:
                    return


def keep(found, function, args):
    found.append(function(*args))


def orders(count):
    """Which arguments to hand on, in which order."""
    if count > 3:                                  # all of them, or all but one
        return [tuple(range(count)), *itertools.combinations(range(count), count - 1)]
    return [order for k in range(1, count + 1) for order in itertools.permutations(range(count), k)]


PARTS = {"": lambda x: x, "[0]": lambda x: x[0], "[1]": lambda x: x[1], "[-1]": lambda x: x[-1],
         ".mean()": lambda x: x.mean(), ".sum()": lambda x: x.sum(), " * -1": lambda x: -x,
         ".mT": lambda x: x.mT}


def in_one_line(function, order, use, skip):
    return lambda *args: use(function(*(args[skip + i] for i in order)))


def numbers(x):
    """The numbers of a result as one tensor, or None."""
    try:
        if type(x) in (list, tuple):
            return torch.cat([numbers(y).flatten() for y in x])
        return torch.as_tensor(x).detach().double()
    except Exception:
        return None


def agrees(use, found, result):
    """Whether a part of what was found is the right result, but for rounding."""
    try:
        x, y = numbers(use(found)), numbers(result)
        return x.shape == y.shape and torch.allclose(x, y, rtol=1e-4, atol=1e-5, equal_nan=True)
    except Exception:
        return False


# ---- frames: what the answer can read where it is called

def in_reach(check, own, args, kwargs):
    """{name: value} that a function called by the check can see; the innermost frame goes first."""
    frames, frame = {}, sys._getframe(2)
    while frame is not None and frame.f_code is not attempt.__code__:
        for name, x in frame.f_locals.items():
            frames.setdefault(name, x)
        if frame.f_code is check.__code__:
            break
        frame = frame.f_back
    for name, x in check.__globals__.items():
        if not name.startswith("__") and not isinstance(x, types.ModuleType):
            frames.setdefault(f"globals {name}", x)
    for i, x in enumerate((*args, *kwargs.values())):
        for name, cell in zip(getattr(getattr(x, "__code__", None), "co_freevars", ()),
                              getattr(x, "__closure__", None) or ()):
            with contextlib.suppress(ValueError):               # an empty cell
                frames.setdefault(f"closure of argument {i}: {name}", cell.cell_contents)
    return {name: x for name, x in frames.items() if not any(x is y for y in own)}


def uses(x):
    """{how: use(value, args, kwargs, number of the call)}: what may be made of a value in reach."""
    ways = {"": lambda v, args, kwargs, n: v}
    if callable(x):
        ways["(*args)"] = lambda v, args, kwargs, n: v(*args, **kwargs)
        ways["()"] = lambda v, args, kwargs, n: v()
    elif isinstance(x, (list, tuple, Tensor, np.ndarray, dict)) and getattr(x, "ndim", 1):
        def item(v, n):
            return list(v.values())[n] if isinstance(v, dict) else v[n]

        ways["[n]"] = lambda v, args, kwargs, n: item(v, n)
        for j in (-1, 0, 1, 2):
            ways[f"[n][{j}]"] = lambda v, args, kwargs, n, j=j: item(v, n)[j]
        if isinstance(x, dict):
            for key in list(x)[:5]:
                ways[f"[{key!r}]"] = lambda v, args, kwargs, n, key=key: v[key]
            ways["[args[0]]"] = lambda v, args, kwargs, n: v[args[0]]
            ways["[args]"] = lambda v, args, kwargs, n: v[args]
        if isinstance(x, (list, tuple)):
            for j in range(min(4, len(x))):
                ways[f"[{j}]"] = lambda v, args, kwargs, n, j=j: v[j]
    elif hasattr(x, "__dict__") and not isinstance(x, (type, nn.Module, types.ModuleType)):
        for name in vars(x):
            ways[f".{name}"] = lambda v, args, kwargs, n, name=name: getattr(v, name)
    return ways


def of_library(x):
    """Functions of libraries are handed in by `given`."""
    return callable(x) and str(getattr(x, "__module__", "")).split(".")[0] not in ("__main__",
                                                                                   "None")


def attack_frames(exercise, point):
    own = [*exercise.own, point.original]
    seen = {}                                                   # (name, how): use

    def scout(*args, **kwargs):
        outer = args[point.skip:]
        for name, x in in_reach(exercise.check, [*own, scout], outer, kwargs).items():
            if not (name.startswith("globals") and of_library(x)):
                seen.update({(name, how): use for how, use in uses(x).items()})
        return point.original(*args, **kwargs)

    attempt(lambda: exercise.call(point.place(scout)), 600, SEED)
    for (name, how), use in seen.items():
        got_through = passes(exercise, partial(thief, exercise, point, own, name, use))
        note(exercise, "frames", label(name + how, point), got_through)


def thief(exercise, point, own, name, use):
    """The answer with a function that returns what it finds under this name, used in this way."""
    count = itertools.count()

    def steal(*args, **kwargs):
        outer = args[point.skip:]
        found = in_reach(exercise.check, own, outer, kwargs)[name]
        return use(found, outer, kwargs, next(count))

    return point.place(steal)


# ---- replayed

def attack_replayed(exercise, point, calls):
    for name, parrot in ("by number", by_number), ("by types and shapes", by_kinds):
        got_through = passes(exercise, partial(parrot, point, calls))
        note(exercise, "replayed", label(name, point), got_through)


def by_number(point, calls):
    left = iter(calls)
    return point.place(lambda *args, **kwargs: given_again(next(left)[2]))


def by_kinds(point, calls):
    table = {}
    for args, kwargs, result in calls:
        table.setdefault(kinds(args, kwargs), []).append(result)

    def parrot(*args, **kwargs):
        results = table[kinds(args[point.skip:], kwargs)]
        return given_again(results.pop(0) if len(results) > 1 else results[0])

    return point.place(parrot)


def given_again(result):
    if isinstance(result, Exception):
        raise result
    return copied(result)


# ---- pinned

def attack_pinned(exercise, point, calls):
    for place in sorted({p for args, kwargs, _ in calls for p in named(args, kwargs)}, key=str):
        pins = {}
        for args, kwargs, _ in calls:
            if place in named(args, kwargs):
                x = named(args, kwargs)[place]
                pins.setdefault(loose_kind(x), x)
        seen = []                      # at each call: the value, and what it was pinned to
        got_through = passes(exercise, partial(holding, point, place, pins, seen))
        name = f"argument {place}"
        if got_through and all(x is pin and not isinstance(x, DATA) for x, pin in seen):
            exercise.remarks.append(label(f"{name} is one object, the same at each call", point))
            continue                   # a tokenizer, for example
        if got_through and all(same(x, pin) for x, pin in seen):
            name += ", which is always the same"
        note(exercise, "pinned", label(name, point), got_through)


DATA = int, float, complex, str, bytes, list, tuple, dict, set, Tensor, np.ndarray, type(None)


def named(args, kwargs):
    """The arguments by position or name."""
    return {**dict(enumerate(args)), **kwargs}


def loose_kind(x):
    """The type, with the number of dimensions of tensors."""
    return (*kind(x)[:2], x.ndim) if isinstance(x, (Tensor, np.ndarray)) else type(x).__name__


def holding(point, place, pins, seen):
    """The right answer with one argument pinned to what it was at the first call of its kind."""
    pins = dict(pins)

    def pinned(*args, **kwargs):
        given = named(args[point.skip:], kwargs)
        if place in given:
            x = given[place]
            pin = recycled(pins.setdefault(loose_kind(x), copied(x)), x)
            seen.append((copied(x), pin))
            if isinstance(place, int):
                args = (*args[:point.skip + place], copied(pin), *args[point.skip + place + 1:])
            else:
                kwargs = {**kwargs, place: copied(pin)}
        return point.original(*args, **kwargs)

    return point.place(pinned)


def recycled(pin, x):
    """The values of `pin`, over and over, in the shape or length of x."""
    if isinstance(pin, Tensor) and pin.shape != x.shape and pin.numel():
        return pin.flatten()[torch.arange(x.numel()) % pin.numel()].reshape(x.shape)
    if isinstance(pin, np.ndarray) and pin.shape != x.shape and pin.size:
        return np.resize(pin, x.shape)
    if type(pin) in (list, tuple) and len(pin) != len(x) and pin:
        return type(pin)(itertools.islice(itertools.cycle(pin), len(x)))
    return pin


def same(a, b):
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if type(a) in (list, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    try:
        return bool(a == b)
    except Exception:
        return a is b


# ---- variants of the right answer

def changed(x, change, top=True):
    """x with `change` applied to it or to its parts, and None where that changes nothing."""
    new = change(x)
    if new is not None and (top or change is not VARIANTS["0-d tensors of ints"]):
        return new
    if type(x) in (list, tuple):
        parts = [changed(y, change, top=False) for y in x]
        if any(y is not None for y in parts):
            return type(x)(y if new is None else new for y, new in zip(x, parts))
    return None


def is_float(x):
    return isinstance(x, Tensor) and x.is_floating_point()


VARIANTS = {
    "lists as tuples": lambda x: tuple(x) if type(x) is list else None,
    "tuples as lists": lambda x: list(x) if type(x) is tuple else None,
    "float64": lambda x: x.double() if is_float(x) and x.dtype != torch.float64 else None,
    "0-d tensors of floats":
        lambda x: torch.tensor(x, dtype=torch.float64) if type(x) is float else None,
    "0-d tensors of ints":                           # as argmax and sum give them
        lambda x: torch.tensor(x) if type(x) is int else None,
    "requires grad":
        lambda x: x.clone().requires_grad_() if is_float(x) and not x.requires_grad else None,
}
WITHOUT_GRADIENT = {
    "numbers of 0-d tensors": lambda x: x.item() if isinstance(x, Tensor) and x.ndim == 0 else None,
    "detached": lambda x: x.detach() if is_float(x) and x.requires_grad else None,
}


def has_gradient(x):
    """Whether a check may go backward through x, or through a part of it."""
    if type(x) in (list, tuple):
        return any(map(has_gradient, x))
    return isinstance(x, nn.Module) or is_float(x) and x.requires_grad


def attack_variants(exercise, point, calls):
    results = [result for _, _, result in calls if not isinstance(result, Exception)]
    given = [x for args, kwargs, _ in calls for x in named(args, kwargs).values()]
    variants = VARIANTS
    if not any(has_gradient(x) for x in given):
        variants = {**variants, **WITHOUT_GRADIENT}
    for name, change in variants.items():
        if any(changed(result, change) is not None for result in results):
            try_variant(exercise, point, name, partial(variant, point.original, change))
    if any(is_float(x) and x.dtype != torch.float64 for x in given):
        failed = []
        try_variant(exercise, point, "computed in float64",
                    partial(in_float64, point.original, failed), failed)


def variant(original, change, *args, **kwargs):
    result = original(*args, **kwargs)
    new = changed(result, change)
    return result if new is None else new


def in_float64(original, failed, *args, **kwargs):
    """Where the right answer itself fails on float64, this says nothing about the check."""
    try:
        return original(*(x.double() if is_float(x) else x for x in args), **kwargs)
    except Exception as error:
        failed.append(error)
        raise


def try_variant(exercise, point, name, function, failed=()):
    def answer(*args, **kwargs):           # a function, so that it becomes a method of a class
        return function(*args, **kwargs)

    error = attempt(lambda: exercise.call(point.place(answer)), limit(exercise), SEED + 1)
    if not failed:
        said = f" ({type(error).__name__}: {str(error).strip()[:120]})" if error else ""
        note(exercise, "variants", label(name, point) + said, error is not None)


# ---- all of them

def attack(exercise, functions):
    """Fill in exercise.table."""
    if exercise.check is None:
        return
    if not callable(exercise.answer):
        exercise.remarks.append("the answer is a value: only constants and variants of it")
        for name, wrong in constants(0).items():
            note(exercise, "given", name, passes(exercise, wrong))
        for name, change in VARIANTS.items():
            new = changed(exercise.answer, change)
            if new is not None:
                note(exercise, "variants", name, not passes(exercise, lambda new=new: new, runs=1))
        return
    for point in points(exercise.answer):
        calls = recorded(exercise, point, SEED)
        if not calls:
            note(exercise, "given", label("everything: the check never calls it", point), True)
            continue
        if point.name != ".__init__":                # a constructor returns nothing
            attack_given(exercise, point, calls, functions)
            attack_frames(exercise, point)
            attack_variants(exercise, point, calls)
        if any(args or kwargs for args, kwargs, _ in calls):
            attack_pinned(exercise, point, calls)
            if point.name != ".__init__":
                attack_replayed(exercise, point, calls)
        elif not point.skip:
            exercise.remarks.append("takes no arguments: nothing to replay or to pin")
    if isinstance(exercise.answer, type):
        for name, function in functions.items():
            if isinstance(function, type):
                note(exercise, "given", name, passes(exercise, lambda f=function: f))


ATTACKS = "given", "frames", "replayed", "pinned", "variants"


def attacked(path, functions=None):
    """The exercises of a notebook of solutions, attacked."""
    functions = library() if functions is None else functions
    path, there = Path(path).resolve(), os.getcwd()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.chdir(folder)                             # what is written there by accident is lost
        try:
            for exercise in exercises(path):
                start = time.process_time()
                with timers(), memory_for(2), mock.patch("builtins.open", open_by_name):
                    attack(exercise, functions)
                exercise.took = time.process_time() - start
                yield exercise
        finally:
            os.chdir(there)


def open_by_name(file, *args, open=open, **kwargs):
    """open(), but not open(1), which would close our stdout in the end."""
    if isinstance(file, int):
        raise TypeError("a number is no name of a file")
    return open(file, *args, **kwargs)


def report(exercise):
    """A line of the table, and what got through."""
    cells = []
    for name in ATTACKS:
        tried, through = exercise.table.get(name, (0, ()))
        cells.append(f"{len(through)} of {tried}" if tried else "-")
    lines = [f"{exercise.name:<40.40}" + "".join(f"{cell:>12}" for cell in cells)
             + f"{exercise.took:8.1f} s"]
    for name in ATTACKS:
        through = exercise.table.get(name, (0, ()))[1]
        verb = "refused" if name == "variants" else "passed"
        lines += [f"    {verb}: {name}: {what}" for what in through]
    return "\n".join(lines + [f"    ({remark})" for remark in exercise.remarks])


def main(paths, functions=None):
    """Print the table of these notebooks. Returns how many tries got through."""
    functions, leaks = functions or library(), 0
    print(f"{'wrong answers that passed, of those tried':<40}"
          + "".join(f"{name:>12}" for name in ATTACKS[:-1]) + f"{'refused':>12}")
    for path in paths:
        for exercise in attacked(path, functions):
            print(report(exercise), flush=True)
            leaks += sum(len(through) for _, through in exercise.table.values())
    return leaks


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(1 if main(sys.argv[1:]) else 0)
