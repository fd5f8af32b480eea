"""The stages of the model. Each is loaded if this exact recipe was built before, and else built with a progress bar.

The cache is keyed by what defines a stage: its settings, the text it learns from, and the code that makes it. It lives in
the user's cache folder (the environment variable MINILLM_CACHE names another).
"""
import ast
import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from platformdirs import user_cache_path
from safetensors.torch import load_file, save_file

from minillm.data import Rows, Windows, clean, encode_document, read_documents, split_documents
from minillm.generate import generate
from minillm.model import Llama, LlamaConfig
from minillm.tokenizer import Tokenizer
from minillm.train import TrainConfig, train
from minillm.world import World

CODE = ("attention", "data", "layers", "model", "recipes", "rope", "tokenizer", "train", "world")


@dataclass(frozen=True)
class Recipe:
    """How a base model is made. vocab_size is that of the tokenizer; stories (0: the text of files) are seen once each."""

    model: LlamaConfig
    training: TrainConfig
    batch_size: int
    stories: int = 0
    texts: tuple = ()
    seed: int = 0


STORIES = Recipe(LlamaConfig(vocab_size=720, dim=128, n_layers=4, n_heads=4, n_kv_heads=2, hidden_dim=344),
                 TrainConfig(steps=2200, lr=5e-3, muon=2.0, warmup=50, min_lr=0.02), batch_size=16, stories=35200)
# A file is read many times over, and there Muon learns it by heart (measured on Tiny Shakespeare): plain AdamW.
FILES = replace(STORIES, model=replace(STORIES.model, vocab_size=1024), stories=0,
                training=replace(STORIES.training, steps=750, lr=3e-3, muon=0, weight_decay=0.3))


@dataclass
class Stage:
    """A model with its tokenizer and the history of its training; floor: the entropy of its text in nats per token, if known."""

    model: Llama
    tokenizer: Tokenizer
    history: list
    floor: float | None = None
    heldout: list = field(default_factory=list)      # texts that it was not trained on


def cache_folder():
    return Path(os.environ.get("MINILLM_CACHE") or user_cache_path("minillm"))


def code_of(module):
    """The code of a module without comments and layout, so that a change in wording builds nothing anew."""
    return ast.dump(ast.parse(Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")))


def key(recipe):
    settings = asdict(recipe)
    for shown in ("bar", "floor", "checkpoint"):
        settings["training"].pop(shown)
    text = json.dumps(settings, sort_keys=True) + "".join(map(code_of, CODE))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def base(bar=True):
    """The base model of the course: trained on the story world, about three minutes on two cores if it was not built before."""
    return build("base", STORIES, bar)


def from_files(paths, bar=True):
    """A base model of the reader's own text files, 20,000 characters or more. Raises ValueError as read_documents does."""
    texts = tuple((name, clean(text)) for name, text in read_documents(paths, least=20_000))
    return build("own", replace(FILES, texts=texts), bar)


def training_texts(recipe):
    return [text for _, text in split_documents(recipe.texts)[0]] or [story.text for story in World().stories(recipe.stories)]


def heldout_texts(recipe):
    return [text for _, text in split_documents(recipe.texts)[1]] or [story.text for story in heldout_stories()]


def heldout_stories():
    """The stories on which every stage is scored."""
    return World().stories(500, "heldout")


def samples(model, tokenizer, n, length=200, seed=0):
    """n texts that the model writes from nothing, each of at most `length` tokens (and max_seq_len), as numbered lines."""
    length = min(length, model.config.max_seq_len - 1)
    start = encode_document("", tokenizer)[0]
    ids = generate(model, torch.full((n, 1), start, device=next(model.parameters()).device), length, stop=start, seed=seed).tolist()
    texts = [tokenizer.decode(row[1:row.index(start, 1)] if start in row[1:] else row[1:]) for row in ids]
    return "\n".join(f"  {i + 1}. {text.strip()}" for i, text in enumerate(texts))


def build(name, recipe, bar):
    """Load the stage from the cache, or build it there. Two builders at once: the second waits for the first and loads."""
    folder = cache_folder() / f"{name}-{key(recipe)}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            make(folder, recipe, bar)
    return load(folder, recipe)


def make(folder, recipe, bar):
    """Train the tokenizer and the model. The folder gets its name when all is in it; until then it holds checkpoints to go on from."""
    part = folder.with_suffix(".part")
    training, heldout = training_texts(recipe), heldout_texts(recipe)
    tokenizer = Tokenizer.train(training[:3000], recipe.model.vocab_size)
    documents = [encode_document(text, tokenizer) for text in training]
    tokens = sum(len(encode_document(text, tokenizer)) - 1 for text in heldout)
    floor = None if recipe.texts else -sum(story.logp for story in heldout_stories()) / tokens
    if recipe.stories:
        batches = Rows(documents, recipe.batch_size, recipe.seed)
    else:
        batches = Windows(np.concatenate(documents), recipe.batch_size, recipe.model.max_seq_len, recipe.seed)
    torch.manual_seed(recipe.seed)
    model = Llama(recipe.model).to(device())
    if recipe.training.muon:
        # Embeddings of size 1, where 0.02 is usual: found by trying. With 0.02 this recipe learns faster for some hundred steps,
        # and then stays behind, above all in keeping track of who has what.
        torch.nn.init.normal_(model.model.embed_tokens.weight)
    if bar:
        rate = sum(len(text.encode()) for text in heldout) / tokens
        print(f"Tokenizer: {tokenizer.n_vocab} tokens, {rate:.2f} bytes a token. Model: {sum(p.numel() for p in model.parameters()):,} "
              f"parameters. Before training it writes:\n{samples(model, tokenizer, 2, 30)}")
    history = train(model, batches, replace(recipe.training, bar=bar, floor=floor, checkpoint=str(part / "checkpoints")))
    tokenizer.save(part / "tokenizer.json")
    save_file({n: p.detach().cpu() for n, p in model.named_parameters()}, part / "model.safetensors")
    (part / "history.json").write_text(json.dumps({"history": history, "floor": floor}), encoding="utf-8")
    shutil.rmtree(part / "checkpoints")
    os.replace(part, folder)


def load(folder, recipe):
    model = Llama(recipe.model)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=not recipe.model.tie_embeddings)
    saved = json.loads((folder / "history.json").read_text(encoding="utf-8"))
    return Stage(model.to(device()), Tokenizer.load(folder / "tokenizer.json"), saved["history"], saved["floor"], heldout_texts(recipe))
