"""Checks of a model folder before it is opened: config, tokenizer, safetensors headers, shards.

Somebody else may have written it, so each claim is held against the files before anything is
allocated or opened on its word. Every function raises ValueError, naming the file and the key or
tensor. No pickle is opened. Written by hand; chapter 19 opens model folders with it.
"""
import json
import math
from pathlib import Path
from typing import Any

import regex

from minillm.tokenizer import Tokenizer
from minillm.tokenizer_json import GPT2_PATTERN, unspell

# keys of config.json with the one value that our Llama can do
REFUSED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
           "partial_rotary_factor": 1.0, "quantization_config": None}
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}       # bytes per number


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): "
                         f"is {path.parent} the folder of a model?") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no JSON ({error})") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object: got a {type(data).__name__}")
    return data


def number(settings: dict[str, Any], key: str, kind: type, path: Path,
           default: float | None = None, limit: float = 2**31) -> int | float:
    """settings[key], an int or float above 0 and below `limit`; the default if missing or null."""
    value = settings.get(key)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"{path} lacks {key}")
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < limit:
        words = "whole number" if kind is int else "number"
        raise ValueError(f"{path}: {key} must be a {words} above 0 and below {limit}: "
                         f"got {value!r:.60}")
    return kind(value)


def read_rope(settings: dict[str, Any], path: Path) -> tuple[float, tuple | None]:
    """theta, and the scaling of LLaMA 3.1 (factor, low, high, original) or None.

    transformers 5 writes rope_parameters; earlier versions wrote rope_theta and rope_scaling.
    """
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: rope_parameters (or rope_scaling) must be an object: "
                         f"got {rope!r:.60}")
    given = {"rope_theta": rope.get("rope_theta", settings.get("rope_theta"))}
    theta = number(given, "rope_theta", float, path, 10000.0, 1e12)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"{path}: rope type {kind!r:.60} is unknown here "
                         "(known: default, llama3), so positions would be wrong")
    factor = number(rope, "factor", float, path)
    low = number(rope, "low_freq_factor", float, path)
    high = number(rope, "high_freq_factor", float, path)
    original = number(rope, "original_max_position_embeddings", float, path)
    if high <= low:
        raise ValueError(f"{path}: high_freq_factor {high} must be above low_freq_factor {low}")
    return theta, (factor, low, high, int(original))


def read_shape(path: Path) -> tuple[dict[str, Any], tuple | None]:
    """The fields of a LlamaConfig, and the scaling of read_rope, from a config.json.

    What our Llama does not do is refused.
    """
    s = read_json(path)
    names, kind = s.get("architectures") or ["LlamaForCausalLM"], s.get("model_type")
    if names != ["LlamaForCausalLM"] or kind != "llama":
        raise ValueError(f"{path}: architecture {names!r:.60} of type {kind!r:.60} "
                         "is unknown here (known: LlamaForCausalLM, llama)")
    for key, known in REFUSED.items():
        if s.get(key, known) not in (known, None):
            raise ValueError(f"{path}: {key} = {s[key]!r:.60} is unknown here (known: {known!r})")
    dim = number(s, "hidden_size", int, path)
    heads = number(s, "num_attention_heads", int, path)
    if number(s, "head_dim", int, path, max(dim // heads, 1)) * heads != dim:
        raise ValueError(f"{path}: {heads} heads of head_dim {s.get('head_dim')} "
                         f"must make hidden_size {dim} here")
    theta, scaling = read_rope(s, path)
    shape = {
        "vocab_size": number(s, "vocab_size", int, path),
        "dim": dim,
        "n_layers": number(s, "num_hidden_layers", int, path),
        "n_heads": heads,
        "n_kv_heads": number(s, "num_key_value_heads", int, path, heads),
        "hidden_dim": number(s, "intermediate_size", int, path),
        "rope_theta": theta,
        "max_seq_len": number(s, "max_position_embeddings", int, path, 2048, 2**20 + 1),
        "norm_eps": number(s, "rms_norm_eps", float, path, 1e-6, 1),
        "tie_embeddings": s.get("tie_word_embeddings") is True,
    }
    return shape, scaling


def check_entry(
        name: str, entry: Any, at: int, limit: int, path: Path) -> tuple[tuple[int, ...], int]:
    """The shape of a tensor in a safetensors header, and where its data ends.

    The data must begin at `at` and must not go beyond `limit`.
    """
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        sound = whole and begin == at and end <= limit
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{path}: tensor {name} is described by {entry!r:.80}, "
                         "not by dtype, shape and data_offsets") from None
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise ValueError(f"{path}: tensor {name} is stored as {dtype!r:.40}; "
                         f"known are {', '.join(SIZES)} (is the model quantized?)")
    if not sound or end - begin != SIZES[dtype] * math.prod(shape):
        raise ValueError(f"{path}: tensor {name}, {dtype} {shape}, cannot be bytes "
                         f"{begin} to {end} of {limit} (it must begin at {at})")
    return tuple(shape), end


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a safetensors file, whose header must describe each byte of data once."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, 100_000_000):
            raise ValueError(f"{path} is truncated or no safetensors file: "
                             f"a header of {length:,} bytes in a file of {size:,}")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: its header cannot be read "
                             f"({type(error).__name__}: {error})") from None
    shapes, end, total = {}, 0, size - 8 - length
    for name, entry in entries:
        shapes[name], end = check_entry(name, entry, end, total, path)
    if end != total:
        raise ValueError(f"{path} is damaged: its header describes {end:,} bytes of data, "
                         f"and there are {total:,}")
    return shapes


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: model.safetensors, or the shards that its index names.

    Shards must lie in the folder itself.
    """
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        reason = ""
        pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        if pickles:
            reason = (f"; {min(path.name for path in pickles)} is a pickle, which can run any code "
                      "when it is opened: convert it where you trust it")
        raise ValueError(f"{folder} has neither model.safetensors nor {index.name}{reason}")
    places = read_json(index).get("weight_map")
    named = isinstance(places, dict) and all(isinstance(name, str) for name in places.values())
    if not named or not places:
        raise ValueError(f"{index} has no weight_map of tensor names to file names")
    shards = sorted(set(places.values()))
    for name in shards:
        if any(c in name for c in "/\\:\0") or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: the shard {name!r:.80} is no safetensors file "
                             "of this folder")
        if not (folder / name).is_file():
            raise ValueError(f"{index}: the shard {name} is missing in {folder}")
    return [folder / name for name in shards]


def split_pattern(pre: dict | None) -> str:
    """The pattern of a pre_tokenizer that splits by one pattern and then takes the bytes.

    Raises ValueError for any other.
    """
    steps = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre or {"type": "none"}]
    kinds = [step["type"] for step in steps]
    first, last = steps[0], steps[-1]
    if kinds[-1] != "ByteLevel" or last.get("add_prefix_space"):
        raise ValueError(f"its pre-tokenizer {kinds} does not end with the bytes of the text "
                         "as it is (ByteLevel, no add_prefix_space)")
    if kinds == ["ByteLevel"] and first.get("use_regex", True):
        return GPT2_PATTERN
    if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
        by_regex = "Regex" in first["pattern"]
        if by_regex and first["behavior"] == "Isolated" and not first.get("invert"):
            return regex.compile(first["pattern"]["Regex"]).pattern
    raise ValueError(f"its pre-tokenizer {kinds} is not one pattern (Split by a Regex, Isolated) "
                     "and then the bytes (ByteLevel)")


def ordered_merges(model: dict, ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges of a BPE model as pairs of bytes, in the order of ids.

    There is one for each token that is made by merging. Raises ValueError for an unknown token, and
    if the order of the merges is not that of the ids, because here an id is a priority.
    """
    made = {}
    for merge in model["merges"]:
        a, b = (unspell(part) for part in (merge.split(" ") if isinstance(merge, str) else merge))
        if not {a, b, a + b} <= ranks.keys():
            raise ValueError(f"the merge {merge!r} has a part or a result "
                             "that is not in the vocabulary")
        if max(ranks[a], ranks[b]) < ranks[a + b]:
            made.setdefault(a + b, (a, b))
    order = [ranks[token] for token in made]
    if order != sorted(order):
        raise ValueError("its merges are not in the order of the ids of what they make, "
                         "as they must be here")
    return list(made.values())


def check_kind(data: dict) -> None:
    """Raises ValueError, with the reason, if a tokenizer.json is not plain byte-level BPE."""
    model, added = data["model"], data.get("added_tokens") or []
    if model["type"] != "BPE":
        raise ValueError(f"its model is {model['type']}, not byte-level BPE")
    if model.get("byte_fallback"):
        raise ValueError("its model is BPE with byte_fallback (sentencepiece, as LLaMA 1 and 2), "
                         "not byte-level BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ValueError(f"its model has {name} = {model[name]!r:.40}, which is unknown here")
    if data.get("normalizer"):
        raise ValueError(f"it changes the text first (normalizer {data['normalizer']['type']}), "
                         "so that decoding would not give it back")
    for entry in added:
        if entry.get("lstrip") or entry.get("rstrip") or entry.get("single_word"):
            raise ValueError(f"its added token {entry['content']!r} looks at its neighbours "
                             "(lstrip, rstrip or single_word)")


def parse_tokenizer(data: dict) -> Tokenizer:
    """The Tokenizer in the content of a tokenizer.json.

    Raises ValueError for what ours cannot do, and other errors for damage.
    """
    check_kind(data)
    model = data["model"]
    added = {entry["content"]: entry["id"] for entry in data.get("added_tokens") or []}
    ranks = {unspell(token): i for token, i in model["vocab"].items() if token not in added}
    vocab = {i: token for token, i in ranks.items()} | {i: s.encode() for s, i in added.items()}
    merges = ordered_merges(model, ranks)
    return Tokenizer(vocab, merges, tuple(added), split_pattern(data.get("pre_tokenizer")))


def load_tokenizer(path: Path) -> Tokenizer:
    """The Tokenizer in a tokenizer.json.

    Raises ValueError naming the file if it is damaged, or of a kind that ours cannot express. What
    a post-processor puts around a text (a token for its start) is left out, because here that is
    up to the chat template.
    """
    try:
        return parse_tokenizer(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError,
            regex.error) as error:
        reason = error
        if type(error) is not ValueError:
            reason = f"it is damaged ({type(error).__name__}: {error})"
        raise ValueError(f"{path} is no tokenizer for minillm: {reason}") from None
