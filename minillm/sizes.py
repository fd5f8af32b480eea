"""How large the model of the course is, and how each stage of it is made, by size."""
import os
from dataclasses import dataclass, replace

from minillm.model import LlamaConfig
from minillm.train import TrainConfig


@dataclass(frozen=True)
class Recipe:
    """How a base model is made. vocab_size is that of the tokenizer; stories (0: the text of files) are seen once each."""

    model: LlamaConfig
    training: TrainConfig
    batch_size: int
    stories: int = 0
    texts: tuple = ()
    seed: int = 0


@dataclass(frozen=True)
class Tuning:
    """How a stage is made from the one before it. examples: dialogues, or questions whose answers become preference pairs."""

    training: TrainConfig
    examples: int
    batch_size: int = 16


@dataclass(frozen=True)
class Size:
    """The recipe of each stage; files: of a base model of the reader's own text."""

    stories: Recipe
    files: Recipe
    chat: Tuning
    lora: Tuning
    dpo: Tuning


def scaled(size, shape, **rates):
    """A size with other widths and depths, shape {field of LlamaConfig: value}, and other learning rates {stage: rate}."""
    made = {stage: replace(recipe, training=replace(recipe.training, lr=rates.get(stage, recipe.training.lr)))
            for stage, recipe in vars(size).items()}
    return Size(**made | {stage: replace(made[stage], model=replace(made[stage].model, **shape)) for stage in ("stories", "files")})


STORIES = Recipe(LlamaConfig(vocab_size=896, dim=128, n_layers=4, n_heads=4, n_kv_heads=2, hidden_dim=344, max_seq_len=512),
                 TrainConfig(steps=1400, lr=5e-3, muon=2.0, warmup=50, min_lr=0.02), batch_size=16, stories=22400)
CPU = Size(
    STORIES,
    # A file is read many times over, and there Muon learns it by heart (measured on Tiny Shakespeare): plain AdamW.
    files=replace(STORIES, model=replace(STORIES.model, vocab_size=1024, max_seq_len=256), stories=0,
                  training=replace(STORIES.training, steps=750, lr=3e-3, muon=0, weight_decay=0.3)),
    chat=Tuning(TrainConfig(steps=560, lr=4e-3, muon=2.0, warmup=20, min_lr=0.02), examples=8960),
    lora=Tuning(TrainConfig(steps=180, lr=1e-2, warmup=10, min_lr=0.02, weight_decay=0), examples=2880),
    # float32: the loss is made of differences between sums over an answer, in which the rounding of bfloat16 shows.
    dpo=Tuning(TrainConfig(steps=40, lr=1e-4, warmup=5, weight_decay=0, precision="float32"), examples=600))
# Seven times the parameters, with the same data.
MEDIUM = scaled(CPU, {"dim": 288, "n_layers": 6, "n_heads": 6, "n_kv_heads": 6, "hidden_dim": 768}, stories=3.5e-3, chat=2.5e-3, dpo=5e-5)
SIZES = {"cpu": CPU, "medium": MEDIUM}


def chosen():
    """The name of the size in use: "cpu", or what the environment variable MINILLM_SIZE says. Raises ValueError if there is none such."""
    name = os.environ.get("MINILLM_SIZE") or "cpu"
    if name not in SIZES:
        raise ValueError(f"MINILLM_SIZE={name}: there are the sizes {', '.join(SIZES)}")
    return name
