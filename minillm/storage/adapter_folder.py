"""Reading a folder with a LoRA adapter, ours or peft's: plain LoRA, or refused by name.

Each setting is honored, has the one value that is plain LoRA, or is harmless; anything else is
refused. Chapter 12 loads adapters with it.
"""
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from minillm.storage.files import check_finite
from minillm.storage.foreign import check_keys, read_json, read_tensors

HONORED = ("peft_type", "r", "lora_alpha", "target_modules", "init_lora_weights")
# With any other value, the layer is not plain LoRA, or the weights beneath the adapter change.
ONLY = {"bias": "none", "use_rslora": False, "use_dora": False, "use_qalora": False,
        "use_bdlora": False, "lora_bias": False, "fan_in_fan_out": False, "rank_pattern": {},
        "alpha_pattern": {}, "loftq_config": {}, "ensure_weight_tying": False}
HARMLESS = (
    "lora_dropout", "task_type", "inference_mode",             # of training
    "qalora_group_size", "megatron_core", "runtime_config",    # of kinds that are refused
    "base_model_name_or_path", "revision", "auto_mapping", "peft_version")        # notes
# How an adapter was initialized. Other ways (PiSSA, OLoRA, LoftQ) also change the weights of the
# model, so that the adapter is wrong on the original ones.
BEGINNINGS = (None, True, False, "gaussian", "orthogonal")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter from a folder; layers: full names of those it adapts; tensors: by name."""

    rank: int
    alpha: float
    layers: list[str]
    tensors: dict[str, Tensor]


def read_adapter(folder: str | Path, layers: Sequence[str]) -> Adapter:
    """The Adapter in a folder, for a model whose linear layers have these full names.

    Raises ValueError, naming the file, for a file that is missing or damaged, and for what is not
    plain LoRA.
    """
    path, weights = (Path(folder) / f"adapter_{name}"
                     for name in ("config.json", "model.safetensors"))
    settings = read_json(path)
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type = {settings.get('peft_type')!r:.40} is unknown here "
                         "(known: 'LORA')")
    check_keys(settings, HONORED, ONLY, HARMLESS, path)
    begun = settings.get("init_lora_weights")
    if not any(begun is known or begun == known and isinstance(begun, str) for known in BEGINNINGS):
        raise ValueError(f"{path}: init_lora_weights = {begun!r:.60} may have changed the weights "
                         "of the model beneath the adapter")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{path}: r must be a whole number from 1: got {rank!r:.40}")
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise ValueError(f"{path}: lora_alpha must be a number above 0: got {alpha!r:.40}")
    if not weights.is_file():
        pickle, reason = weights.with_suffix(".bin"), ""
        if pickle.exists():
            reason = (f"; {pickle.name} is a pickle, which can run any code when it is opened: "
                      "convert it where you trust it")
        raise ValueError(f"{weights} is missing{reason}")
    names = find_layers(settings.get("target_modules"), layers, path)
    tensors = dict(read_tensors(weights))
    check_finite(tensors, weights)
    return Adapter(rank, alpha, names, tensors)


def find_layers(targets: Any, layers: Sequence[str], path: Path) -> list[str]:
    """The layers that peft's target_modules mean: names, ends of names, or one regex for all.

    Raises ValueError, naming the target, if there is no such layer.
    """
    if targets == "all-linear":
        return [name for name in layers if name.rpartition(".")[2] != "lm_head"]
    try:
        if isinstance(targets, str):
            found = {targets: [name for name in layers if re.fullmatch(targets, name)]}
        else:
            found = {t: [n for n in layers if f".{n}".endswith(f".{t}")] for t in targets}
    except (TypeError, re.error, RecursionError) as error:
        raise ValueError(f"{path}: target_modules must be names of layers, or a regex: "
                         f"got {targets!r:.60} ({error})") from None
    for target, names in found.items():
        if not names:
            raise ValueError(f"{path}: target_modules has {target!r:.60}, and no linear layer of "
                             f"the model is called that; they are called {', '.join(layers)[:300]}")
    chosen = {name for names in found.values() for name in names}
    if not chosen:
        raise ValueError(f"{path}: target_modules is empty")
    return [name for name in layers if name in chosen]
