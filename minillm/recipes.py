"""The stages of the model. Each is loaded if this exact recipe was built before, and else built with a progress bar.

The cache is keyed by what defines a stage: its settings, the text it learns from, the code that makes it, and the stage
before it. It lives in the user's cache folder (the environment variable MINILLM_CACHE names another).
"""
import ast
import hashlib
import json
import os
import shutil
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file

from minillm.corpus import cache_folder, read_documents
from minillm.data import ENDOFTEXT, Rows, Windows, clean, encode_document, split_documents
from minillm.dpo import Pairs, count_pairs, preference_loss, sample_pairs
from minillm.generate import generate
from minillm.lora import add_lora
from minillm.model import Llama
from minillm.parallel import added_up, check_shared, rank_and_world
from minillm.quantize import quantize_model
from minillm.sft import ASSISTANT, USER, finetune
from minillm.sizes import SIZES, chosen
from minillm.tasks import dialogues, exams
from minillm.tokenizer import Tokenizer
from minillm.train import train
from minillm.words import HARBOUR
from minillm.world import Setting, World

CODE = ("attention", "bpe", "byhand", "data", "layers", "model", "optim", "parallel", "recipes", "rope", "tokenizer", "train", "words", "world")
# Those of the chat have their rows from the start, as LLaMA 3 has reserved ones, so that no later stage must grow the model.
SPECIAL_TOKENS = (ENDOFTEXT, USER, ASSISTANT)


STORIES, FILES, CHAT, LORA, DPO = (getattr(SIZES[chosen()], name) for name in ("stories", "files", "chat", "lora", "dpo"))
RANK, ALPHA, BETA = 8, 16, 0.1            # of LoRA, and of DPO


@dataclass
class Stage:
    """A model with its tokenizer and the history of its training; floor: the entropy of its text in nats per token, if known."""

    model: Llama
    tokenizer: Tokenizer
    history: list
    floor: float | None = None
    heldout: list = field(default_factory=list)      # texts that it was not trained on
    setting: Setting = Setting()                     # of the stories that it was trained on
    key: str = ""


def code_of(module):
    """The code of a module without comments and layout, so that a change in wording builds nothing anew."""
    return ast.dump(ast.parse(Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")))


def key(recipe, code=CODE, after=""):
    settings = asdict(recipe)
    for shown in ("bar", "floor", "checkpoint"):
        settings["training"].pop(shown)
    text = after + json.dumps(settings, sort_keys=True) + "".join(map(code_of, code))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def base(bar=True):
    """The base model of the course: trained on the story world, about two minutes on two cores (size cpu) if it was not built before."""
    return build("base", STORIES, make_base, bar)


def from_files(paths, bar=True):
    """A base model of the reader's own text files, 20,000 characters or more. Raises ValueError as read_documents does."""
    texts = tuple((name, clean(text)) for name, text in read_documents(paths, least=20_000))
    return build("own", replace(FILES, texts=texts), make_base, bar)


def chat(bar=True):
    """The base model tuned on dialogues: it answers questions about a story, and tells stories on demand."""
    return build("chat", CHAT, make_chat, bar, base(bar), ("sft", "tasks"))


def lora(bar=True):
    """The chat model with a LoRA adapter for the second region, the harbour."""
    return build("lora", LORA, make_lora, bar, chat(bar), ("lora",))


def dpo(bar=True):
    """The chat model tuned on preferences: of its own answers to a question, the one with the greatest true reward is chosen."""
    return build("dpo", DPO, make_dpo, bar, chat(bar), ("dpo", "generate", "lean"))


def int8(bar=True):
    """The dpo model with the linear layers of its blocks in 8 bits, one scale a row. Made anew each time: it takes milliseconds."""
    stage = dpo(bar)
    quantize_model(stage.model)
    return stage


def training_texts(recipe):
    """The documents to learn from: of files, or stories. One story in 25 is from the harbour: enough to know its words, as the
    LLaMA of 2023 knew some Chinese, and too little to know it well, so that there is something to adapt to."""
    regions = World(setting=recipe.setting), World(HARBOUR, recipe.setting)
    return [text for _, text in split_documents(recipe.texts)[0]] or [regions[i % 25 == 24].sample(i).text for i in range(recipe.stories)]


def heldout_texts(recipe):
    return [text for _, text in split_documents(recipe.texts)[1]] or [story.text for story in heldout_stories(recipe.setting)]


def heldout_stories(setting=STORIES.setting):
    """The stories on which every stage is scored."""
    return World(setting=setting).stories(500, "heldout")


def samples(model, tokenizer, n, length=400, seed=0):
    """n texts that the model writes from nothing, each of at most `length` tokens (and max_seq_len), as numbered lines."""
    length = min(length, model.config.max_seq_len - 1)
    start = encode_document("", tokenizer)[0]
    ids = generate(model, torch.full((n, 1), start, device=next(model.parameters()).device), length, stop=start, seed=seed).tolist()
    texts = [tokenizer.decode(row[1:row.index(start, 1)] if start in row[1:] else row[1:]) for row in ids]
    return "\n".join(f"  {i + 1}. {text.strip()}" for i, text in enumerate(texts))


def build(name, recipe, make, bar, before=None, code=()):
    """Load the stage from the cache, or make it there. Two builders at once: the second waits for the first and loads.

    make(recipe, before, checkpoints, bar) trains it, from the stage `before`; code: the modules that shape it, beside CODE. The
    folder gets its name when all is in it; until then it ends in .part and holds checkpoints to go on from.
    """
    folder = cache_folder() / f"{name}-{key(recipe, CODE + code, before.key if before else '')}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    check_shared(folder.parent, device())
    first = rank_and_world()[0] == 0
    with only_builder(folder.with_suffix(".lock"), name) if first else nullcontext():
        if added_up(int(first and not folder.exists()), device()):
            part = folder.with_suffix(".part")
            stage = make(recipe, before, part / "checkpoints", bar)
            if first:
                save(stage, part)
                shutil.rmtree(part / "checkpoints")
                os.replace(part, folder)
        added_up(0, device())            # the others wait here until the folder is there
    return load(folder, recipe, before)


@contextmanager
def only_builder(path, name):
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


def make_base(recipe, before, checkpoints, bar):
    training, heldout = training_texts(recipe), heldout_texts(recipe)
    tokenizer = Tokenizer.train(training[:6000], recipe.model.vocab_size, SPECIAL_TOKENS)
    documents = [encode_document(text, tokenizer) for text in training]
    tokens = sum(len(encode_document(text, tokenizer)) - 1 for text in heldout)
    floor = None if recipe.texts else -sum(story.logp for story in heldout_stories(recipe.setting)) / tokens
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
    history = train(model, batches, replace(recipe.training, bar=bar, floor=floor, checkpoint=str(checkpoints)))
    return Stage(model, tokenizer, history, floor)


def make_chat(recipe, before, checkpoints, bar):
    if bar:
        print(f"\nChat: {recipe.examples:,} dialogues, of which the answers are learnt.")
    return tune(recipe, before, dialogues(recipe.examples, setting=before.setting), checkpoints, bar)


def make_lora(recipe, before, checkpoints, bar):
    torch.manual_seed(0)         # A is random: the same whether the stages before were built just now or loaded
    add_lora(before.model, RANK, ALPHA)
    if bar:
        print(f"\nLoRA: {recipe.examples:,} dialogues from the harbour, an adapter of rank {RANK}.")
    return tune(recipe, before, dialogues(recipe.examples, region=HARBOUR, setting=before.setting), checkpoints, bar)


def tune(recipe, before, data, checkpoints, bar):
    config = replace(recipe.training, bar=bar, checkpoint=str(checkpoints))
    return replace(before, history=finetune(before.model, data, before.tokenizer, config, recipe.batch_size), floor=None)


def make_dpo(recipe, before, checkpoints, bar):
    """Each question is answered four times; the best and the worst answer, by the true reward, make a pair."""
    model, tokenizer = before.model, before.tokenizer
    asked = exams(recipe.examples, "train", setting=before.setting)
    pairs = sample_pairs(model, tokenizer, asked, lambda question, answer: question.reward(answer))
    if bar:
        print(f"\nDPO: {len(pairs):,} pairs of answers of the chat model to {recipe.examples:,} questions.")
    batches = Pairs(pairs, tokenizer, model, recipe.batch_size)
    config = replace(recipe.training, bar=bar, checkpoint=str(checkpoints))
    return replace(before, history=train(model, batches, config, preference_loss(beta=BETA), count_pairs), floor=None)


def save(stage, folder):
    stage.tokenizer.save(folder / "tokenizer.json")
    save_file({n: p.detach().cpu() for n, p in stage.model.named_parameters()}, folder / "model.safetensors")
    (folder / "history.json").write_text(json.dumps({"history": stage.history, "floor": stage.floor}), encoding="utf-8")


def load(folder, recipe, before):
    tensors = load_file(folder / "model.safetensors")
    model = Llama(before.model.config if before else recipe.model)
    if any("lora" in name for name in tensors):
        add_lora(model, RANK, ALPHA)
    model.load_state_dict(tensors, strict=not model.config.tie_embeddings)
    saved = json.loads((folder / "history.json").read_text(encoding="utf-8"))
    heldout, setting = (before.heldout, before.setting) if before else (heldout_texts(recipe), recipe.setting)
    return Stage(model.to(device()), Tokenizer.load(folder / "tokenizer.json"), saved["history"], saved["floor"], heldout, setting,
                 folder.name)
