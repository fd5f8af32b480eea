"""How a stage of the model is found in the cache, locked, built and stored.

The cache is keyed by what defines a stage: its settings, the text it learns from, the code that
makes it, and the stage before it. It lives in the user's cache folder (the environment variable
MINILLM_CACHE names another).
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

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file

from minillm.arc.sizes import Recipe, Tuning
from minillm.lora import add_lora
from minillm.model import Llama
from minillm.storage.shared import all_reduce_sum, check_shared, rank_and_world
from minillm.storage.text_files import cache_folder
from minillm.tokenizer import Tokenizer
from minillm.world import Setting

# The modules whose code shapes every stage.
CODE = ("arc.cache", "arc.fit", "arc.stages", "attention", "bpe", "data", "fast_train", "layers",
        "model", "optim", "parallel", "rope", "storage.shared", "tokenizer", "train",
        "world.stories", "world.templates")
RANK, ALPHA = 8, 16                       # of LoRA: what is stored of an adapter does not say them


@dataclass
class Stage:
    """A model with its tokenizer and the history of its training; floor: the entropy of its text in
    nats per token, if known; heldout: texts that it was not trained on; setting: of the stories
    that it was trained on; key: the name of its folder in the cache."""

    model: Llama
    tokenizer: Tokenizer
    history: list
    floor: float | None = None
    heldout: list = field(default_factory=list)
    setting: Setting = Setting()
    key: str = ""


def code_of(module: str) -> str:
    """The code of a module without comments, docstrings and layout, so that a change in wording
    builds nothing anew."""
    path = Path(__file__).parents[1] / f"{module.replace('.', '/')}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node):
            node.body = node.body[1:]
    return ast.dump(tree)


def key(recipe: Recipe | Tuning, code: tuple[str, ...] = CODE, after: str = "") -> str:
    """What tells stages apart: the settings, the code of modules, and the key of the stage
    before."""
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
    """Load the stage from the cache, or make it there. Two builders at once: the second waits for
    the first and loads.

    make(recipe, before, checkpoints, bar) trains it, from the stage `before`; code: the modules
    that shape it, beside CODE; heldout_texts(recipe): the texts that a stage with none before it is
    not trained on. The folder gets its name when all is in it; until then it ends in .part and
    holds checkpoints to go on from.
    """
    folder = cache_folder() / f"{name}-{key(recipe, CODE + code, before.key if before else '')}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    check_shared(folder.parent, device())
    first = rank_and_world()[0] == 0
    with only_builder(folder.with_suffix(".lock"), name) if first else nullcontext():
        if all_reduce_sum(int(first and not folder.exists()), device()):
            part = folder.with_suffix(".part")
            stage = make(recipe, before, part / "checkpoints", bar)
            if first:
                save(stage, part)
                shutil.rmtree(part / "checkpoints")
                os.replace(part, folder)
        all_reduce_sum(0, device())            # the others wait here until the folder is there
    return load(folder, recipe, before, heldout_texts)


@contextmanager
def only_builder(path: Path, name: str) -> Iterator[None]:
    """One process at a time is within; one that has to wait for another says so."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process is at the stage {name}: waiting for it.", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def save(stage: Stage, folder: Path) -> None:
    """Write what load reads."""
    stage.tokenizer.save(folder / "tokenizer.json")
    weights = {n: p.detach().cpu() for n, p in stage.model.named_parameters()}
    save_file(weights, folder / "model.safetensors")
    told = json.dumps({"history": stage.history, "floor": stage.floor})
    (folder / "history.json").write_text(told, encoding="utf-8")


def load(folder: Path, recipe: Recipe | Tuning, before: Stage | None,
         heldout_texts: Callable | None) -> Stage:
    """The stage in a folder of the cache; the arguments are those of build."""
    tensors = load_file(folder / "model.safetensors")
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
