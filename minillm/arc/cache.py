"""How a stage of the model is found in the cache, locked, built and stored.

The cache is keyed by what defines a stage: its settings, the text it learns from, the code that
makes it, and the stage before it. It lives in the user's cache folder (the environment variable
MINILLM_CACHE names another). The folder of a stage holds the checksums of its files: a stage with a
changed byte is built again, never loaded.
"""
import ast
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from filelock import FileLock, Timeout

from minillm.arc.sizes import Recipe, Tuning
from minillm.lora import add_lora
from minillm.model import Llama
from minillm.storage.files import replacing
from minillm.storage.shared import all_reduce_sum, check_shared, rank_and_world
from minillm.storage.text_files import cache_folder, file_sha256
from minillm.tokenizer import Tokenizer
from minillm.world import Setting

# The modules whose code shapes every stage.
CODE = ("arc.cache", "arc.fit", "arc.stages", "attention", "bpe", "data", "data_parallel",
        "fast_train", "layers", "model", "optim", "rope", "storage.shared", "tokenizer", "train",
        "world.drills", "world.stories", "world.templates")
# On a CPU a stage is trained with this many threads, whatever the machine has or the caller uses:
# the order in which a matrix product is summed up depends on the number of threads, and what is
# learned late in a run depends on such differences.
THREADS = 2
RANK, ALPHA = 8, 16                       # of LoRA: they are not stored with an adapter
FILES = ("tokenizer.json", "model.safetensors", "history.json")      # of a stage in the cache
SUMS = "SHA256SUMS"                       # their checksums; `sha256sum -c SHA256SUMS` reads it, too


@dataclass
class Stage:
    """A model with its tokenizer and the history of its training; floor: the entropy of its text in
    nats per token, if known; heldout: texts that it was not trained on; setting: that of the
    stories it was trained on; key: the name of its folder in the cache."""

    model: Llama
    tokenizer: Tokenizer
    history: list
    floor: float | None = None
    heldout: list = field(default_factory=list)
    setting: Setting = Setting()
    key: str = ""


def code_of(module: str) -> str:
    """The code of a module without comments, docstrings and layout, so that no stage is built again
    for a change in their wording."""
    path = Path(__file__).parents[1] / f"{module.replace('.', '/')}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node):
            node.body = node.body[1:]
    return ast.dump(tree)


def key(recipe: Recipe | Tuning, code: tuple[str, ...] = CODE, after: str = "") -> str:
    """What tells stages apart: a hash (16 hexadecimal digits) of the settings, of the code of
    modules (named as in CODE), and of `after`, the key of the stage before."""
    settings = asdict(recipe)
    for shown in ("bar", "floor", "checkpoint"):
        settings["training"].pop(shown)
    text = after + json.dumps(settings, sort_keys=True) + "".join(map(code_of, code))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def device() -> str:
    """Where the stages are trained and used: "cuda", or "cpu" where there is no GPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def build(name: str, recipe: Recipe | Tuning, make: Callable, bar: bool,
          before: Stage | None = None, code: tuple[str, ...] = (),
          heldout_texts: Callable | None = None) -> Stage:
    """Load the stage from the cache, or make it there. If two processes want to build it at once,
    the second waits for the first, then loads it.

    make(recipe, before, checkpoints, bar) trains it, from the stage `before`; code: the modules
    that shape it, besides CODE; heldout_texts(recipe): the held-out texts of a stage that has none
    before it (any other takes over those of `before`). The folder gets its name when it is
    complete; until then its name ends in .part, and it holds checkpoints to resume from. A damaged
    folder is removed, and the stage is made again. Raises OSError, naming the folder, if it cannot
    be written, if possible before any training.
    """
    folder = cache_folder() / f"{name}-{key(recipe, CODE + code, before.key if before else '')}"
    first, there, wrong = rank_and_world()[0] == 0, folder.exists(), damage(folder)
    # A stage that all processes find intact is loaded without a lock: the cache may be read-only.
    if all_reduce_sum(int(wrong != ""), device()):
        if first and there:
            print(f"The stage {name} in {folder} is damaged ({wrong}): it has to be built again.",
                  flush=True)
        check_writable(folder.parent, name)
        check_shared(folder.parent, device())
        with only_builder(folder.with_suffix(".lock"), name) if first else nullcontext():
            if all_reduce_sum(int(first and damage(folder) != ""), device()):
                make_in(folder, name, lambda checkpoints: make(recipe, before, checkpoints, bar))
            all_reduce_sum(0, device())        # the others wait here until the folder is there
    return load(folder, recipe, before, heldout_texts)


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Have PyTorch use n threads within the block, unless several processes share the work."""
    before = torch.get_num_threads()
    if rank_and_world()[1] == 1:
        torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_in(folder: Path, name: str, make: Callable[[Path], Stage]) -> None:
    """Make a stage and keep it in `folder`, in the place of a damaged one. make(checkpoints) makes
    it, and continues from the checkpoints that an earlier call left."""
    part, first = folder.with_suffix(".part"), rank_and_world()[0] == 0
    check_writable(part, name)
    check_writable(part / "checkpoints", name)
    if first and os.path.lexists(folder):            # a link that leads nowhere, too
        with saving(name, folder):
            if folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(folder)
            else:
                folder.unlink()
    with saving(name, part), threads(THREADS):
        stage = make(part / "checkpoints")
        if first:
            save(stage, part)
            os.replace(part, folder)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def damage(folder: Path) -> str:
    """What is wrong with the folder of a finished stage, in a few words; "" if it is intact."""
    name = SUMS
    try:
        told, found = (folder / SUMS).read_bytes(), []
        for name in FILES:
            found.append(f"{file_sha256(folder / name)}  {name}\n".encode())
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    changed = [name for name, line in zip(FILES, found) if line not in told]
    if changed:
        return f"the checksum of {' and '.join(changed)} is not the one in {SUMS}"
    return "" if told == b"".join(found) else f"{SUMS} has changed"


def check_writable(folder: Path, name: str) -> None:
    """Raises OSError, in all processes, unless the first can make `folder` and write to it. All
    must call. name: the stage that is to be kept there."""
    reason = ""
    if rank_and_world()[0] == 0:
        probe = folder / f"probe-{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(probe) as file:
                file.write(bytes(2**20))             # an empty file would fit on a full disk
            probe.unlink()
        except OSError as error:
            reason = f" ({error.strerror})"
    if all_reduce_sum(int(reason != ""), device()):
        raise OSError(f"{folder} cannot be written{reason}, so the stage {name} could not be kept: "
                      "it was not trained. Make room there, make it writable, or name another "
                      "folder with the environment variable MINILLM_CACHE")


@contextmanager
def saving(name: str, folder: Path) -> Iterator[None]:
    """An OSError within, such as that of a full disk, is raised as one that names the stage and the
    folder, and says how to go on."""
    try:
        yield
    except OSError as error:
        try:
            kept = any((folder / "checkpoints").glob("step-*.safetensors"))
        except PermissionError:                      # the folder of another user
            kept = False
        then = "continues from the checkpoint there" if kept else "begins again"
        raise OSError(f"the stage {name} could not be saved in {folder} "
                      f"({error.strerror or error}). When this is fixed, the same command {then}. "
                      "The environment variable MINILLM_CACHE names another folder, to start over "
                      "there") from error


@contextmanager
def only_builder(path: Path, name: str) -> Iterator[None]:
    """Let one process in at a time; one that has to wait says so. Users who share the cache can all
    lock the file. Raises OSError, naming the file, if it cannot be locked."""
    lock = FileLock(path, mode=0o666)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process is at the stage {name}: waiting for it.", flush=True)
        lock.acquire()
    except OSError as error:
        raise OSError(f"{path} cannot be locked ({error.strerror}), so the stage {name} was not "
                      "trained. Delete this file, or name another folder with the environment "
                      "variable MINILLM_CACHE") from None
    try:
        yield
    finally:
        lock.release()


def save(stage: Stage, folder: Path) -> None:
    """Write what load reads, the checksums last."""
    weights = {n: p.detach().cpu() for n, p in stage.model.named_parameters()}
    told = json.dumps({"history": stage.history, "floor": stage.floor})
    stage.tokenizer.save(folder / "tokenizer.json")
    write(folder / "model.safetensors", safetensors.torch.save(weights))
    write(folder / "history.json", told.encode())
    sums = "".join(f"{file_sha256(folder / name)}  {name}\n" for name in FILES)
    write(folder / SUMS, sums.encode())


def write(path: Path, data: bytes) -> None:
    """Write a file that is whole or not there."""
    with replacing(path) as file:
        file.write(data)


def load(folder: Path, recipe: Recipe | Tuning, before: Stage | None,
         heldout_texts: Callable | None) -> Stage:
    """The stage in a folder of the cache; the arguments are those of build.

    Raises ValueError, naming the folder, if it is damaged.
    """
    if wrong := damage(folder):
        raise ValueError(f"{folder} is damaged ({wrong}): delete it, and the stage is built again")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    model = Llama(before.model.config if before else recipe.model)
    if any("lora" in name for name in tensors):
        add_lora(model, RANK, ALPHA)
    model.load_state_dict(tensors, strict=not model.config.tie_embeddings)
    saved = json.loads((folder / "history.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if before:
        heldout, setting = before.heldout, before.setting
    else:
        heldout, setting = heldout_texts(recipe), recipe.setting
    return Stage(model.to(device()), tokenizer, saved["history"], saved["floor"], heldout, setting,
                 folder.name)
