"""The settings of each stage, by size: shape of the model, data, steps, batch, learning rate."""
import os
from dataclasses import dataclass, replace

import torch

from minillm.model import LlamaConfig
from minillm.train import TrainConfig
from minillm.world import Setting


@dataclass(frozen=True)
class Part:
    """A part of a base model's training: how many texts of each kind it mixes, each of which is
    seen once (drills and practice: see world/drills.py)."""

    drills: int = 0
    practice: int = 0
    stories: int = 0

    @property
    def n(self) -> int:
        """The number of its texts."""
        return self.drills + self.practice + self.stories


@dataclass(frozen=True)
class Recipe:
    """How a base model is made. model.vocab_size is also the size of the tokenizer; parts: those of
    the training, in order (none: it learns from `texts`, pairs of a file's number and a document);
    seed: of the initial weights and the order of batches; setting: how rich the stories are, here
    and in later stages; compiling: see arc.fit."""

    model: LlamaConfig
    training: TrainConfig
    batch_size: int
    parts: tuple[Part, ...] = ()
    texts: tuple = ()
    seed: int = 0
    setting: Setting = Setting()
    compiling: bool = False

    def total(self, kind: str) -> int:
        """The number of its "drills", "practice" or "stories"."""
        return sum(getattr(part, kind) for part in self.parts)


@dataclass(frozen=True)
class Tuning:
    """How a stage is made from the one before it. examples: dialogues, or questions whose answers
    become preference pairs; replay: how many of the examples of the stage before are mixed in;
    seed: of the order of batches, the initial weights of an adapter, and the sampled answers;
    compiling: see arc.fit."""

    training: TrainConfig
    examples: int
    replay: int = 0
    batch_size: int = 16
    seed: int = 0
    compiling: bool = False


@dataclass(frozen=True)
class Size:
    """The recipe of each stage; files: that of a base model of the user's own text files."""

    stories: Recipe
    files: Recipe
    chat: Tuning
    lora: Tuning
    dpo: Tuning
    rlhf: Tuning


# Drills come first, and practice in the middle: practice before any stories kept some seeds from
# learning to follow one. Its effect is lost again unless some of it continues to the end. (We found
# both by trial and error.)
# Seed 1 is a lucky one: of nine, its base model writes the most valid stories (see README).
STORIES = Recipe(
    LlamaConfig(vocab_size=896, dim=128, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=344,
                max_seq_len=512),
    TrainConfig(steps=1600, lr=2e-2, muon=0.4, warmup=30, min_lr=0.02),
    batch_size=32, seed=1,
    parts=(Part(drills=9600), Part(stories=12_800), Part(practice=11_200),
           Part(practice=2640, stories=14_960)))
# A file is read many times over, and with Muon the model memorizes it (measured on Tiny
# Shakespeare), so this is plain AdamW.
FILES = replace(
    STORIES, model=replace(STORIES.model, vocab_size=1024, n_layers=4, max_seq_len=256), parts=(),
    batch_size=16, seed=0,
    training=replace(STORIES.training, steps=750, lr=3e-3, muon=0, weight_decay=0.3))
CHAT = Tuning(TrainConfig(steps=680, lr=6e-3, muon=0.7, warmup=20, min_lr=0.02), examples=9880,
              replay=1000, seed=1)
LORA = Tuning(TrainConfig(steps=160, lr=1e-2, warmup=10, min_lr=0.02, weight_decay=0),
              examples=1920, replay=640)
# In float32, because the loss is made of differences between sums over an answer, in which the
# rounding of bfloat16 shows.
DPO = Tuning(TrainConfig(steps=110, lr=3.5e-5, warmup=5, weight_decay=0, precision="float32"),
             examples=900)
# A rollout has stages.GROUP answers to each of batch_size questions. With half as many answers and
# a higher rate, more of them turn into text that is not an answer.
RLHF = Tuning(TrainConfig(steps=20, lr=7e-5, warmup=5, weight_decay=0, precision="float32"),
              examples=900, batch_size=16)
CPU = Size(STORIES, FILES, CHAT, LORA, DPO, RLHF)


def widened(recipe: Recipe) -> Recipe:
    """A recipe with a model of about eight times the parameters (FILES: seven times)."""
    model = replace(recipe.model, dim=288, n_layers=6, n_heads=6, n_kv_heads=6, hidden_dim=768)
    return replace(recipe, model=model)


def with_rate(recipe: Recipe | Tuning, lr: float) -> Recipe | Tuning:
    """A recipe with another learning rate."""
    return replace(recipe, training=replace(recipe.training, lr=lr))


# The stories and dialogues of cpu for a larger model.
MEDIUM = Size(with_rate(widened(STORIES), 1.2e-2), widened(FILES), with_rate(CHAT, 2.5e-3), LORA,
              with_rate(DPO, 2e-5), with_rate(RLHF, 3e-5))

# More of everything in a story, so that a larger model has something to learn. The vocabulary keeps
# its size, because the words of the world would not fill a larger one. Long batches are processed
# in two halves (accumulate=2), so that 8 GB of GPU memory are enough.
WIDE = LlamaConfig(vocab_size=896, dim=512, n_layers=8, n_heads=8, n_kv_heads=4, hidden_dim=1376,
                   max_seq_len=1024)
GPU = Size(
    stories=Recipe(
        WIDE, TrainConfig(steps=3200, lr=5e-3, muon=1.2, warmup=100, min_lr=0.02),
        batch_size=64, compiling=True,
        parts=(Part(drills=38_400), Part(stories=44_800), Part(practice=32_000),
               Part(practice=13_440, stories=76_160)),
        setting=Setting(characters=(2, 4), objects=(1, 3), events=(4, 12))),
    files=Recipe(
        replace(WIDE, vocab_size=1024, max_seq_len=512),
        TrainConfig(steps=1000, lr=1e-3, warmup=100, min_lr=0.02, weight_decay=0.3),
        batch_size=32, compiling=True),
    chat=Tuning(
        TrainConfig(steps=400, lr=2e-3, muon=1.5, warmup=30, min_lr=0.02, accumulate=2),
        examples=22_400, replay=3200, batch_size=32, compiling=True),
    lora=Tuning(
        TrainConfig(steps=150, lr=1e-2, warmup=15, min_lr=0.02, weight_decay=0, accumulate=2),
        examples=7200, replay=2400, batch_size=32, compiling=True),
    dpo=Tuning(
        TrainConfig(steps=100, lr=2e-5, warmup=10, weight_decay=0, precision="float32",
                    accumulate=2),
        examples=1600, compiling=True),
    rlhf=replace(with_rate(RLHF, 2e-5), examples=1600))
SIZES = {"cpu": CPU, "medium": MEDIUM, "gpu": GPU}


def chosen() -> str:
    """The name of the size in use: what the environment variable MINILLM_SIZE says, or "gpu" where
    there is one and "cpu" elsewhere.

    Raises ValueError if there is no such size."""
    name = os.environ.get("MINILLM_SIZE") or ("gpu" if torch.cuda.is_available() else "cpu")
    if name not in SIZES:
        raise ValueError(f"MINILLM_SIZE={name}: the sizes are {', '.join(SIZES)}")
    return name


def size() -> Size:
    """The size in use, see chosen."""
    return SIZES[chosen()]
