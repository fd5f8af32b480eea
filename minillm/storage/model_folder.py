"""What a model folder claims: config.json, tokenizer.json, the headers of safetensors files, the index of shards.

Somebody else may have written it, so each claim is held against the files before anything is allocated or opened on its word.
Every function raises ValueError, naming the file and the key or tensor. No pickle is opened.
"""
import json
import math

import regex

from minillm.tokenizer import Tokenizer
from minillm.tokenizer_json import GPT2_PATTERN, unspell

REFUSED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0, "quantization_config": None}
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}       # bytes a number


def read_json(path):
    """The object in a JSON file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): is {path.parent} the folder of a model?") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no JSON ({error})") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object: got a {type(data).__name__}")
    return data


def number(settings, key, kind, path, default=None, limit=2**31):
    """settings[key], an int or float above 0 and below `limit`; the default if it is missing or null."""
    value = settings.get(key) if settings.get(key) is not None else default
    if value is None:
        raise ValueError(f"{path} lacks {key}")
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < limit:
        raise ValueError(f"{path}: {key} must be a {'whole ' * (kind is int)}number above 0 and below {limit}: got {value!r:.60}")
    return kind(value)


def read_rope(settings, path):
    """theta, and the scaling of LLaMA 3.1 (factor, low, high, original) or None. transformers 5 writes rope_parameters, and wrote
    rope_theta and rope_scaling before."""
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: rope_parameters (or rope_scaling) must be an object: got {rope!r:.60}")
    theta = number({"rope_theta": rope.get("rope_theta", settings.get("rope_theta"))}, "rope_theta", float, path, 10000.0, 1e12)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"{path}: rope type {kind!r:.60} is unknown here (known: default, llama3), so positions would be wrong")
    factor, low, high, original = (number(rope, key, float, path) for key in
                                   ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
    if high <= low:
        raise ValueError(f"{path}: high_freq_factor {high} must be above low_freq_factor {low}")
    return theta, (factor, low, high, int(original))


def read_shape(path):
    """The fields of a LlamaConfig, and the scaling of read_rope, from a config.json. What our Llama does not do is refused."""
    s = read_json(path)
    kind = s.get("architectures") or ["LlamaForCausalLM"], s.get("model_type")
    if kind != (["LlamaForCausalLM"], "llama"):
        raise ValueError(f"{path}: architecture {kind[0]!r:.60} of type {kind[1]!r:.60} is unknown here (known: LlamaForCausalLM, llama)")
    for key, known in REFUSED.items():
        if s.get(key, known) not in (known, None):
            raise ValueError(f"{path}: {key} = {s[key]!r:.60} is unknown here (known: {known!r})")
    dim, heads = number(s, "hidden_size", int, path), number(s, "num_attention_heads", int, path)
    if number(s, "head_dim", int, path, max(dim // heads, 1)) * heads != dim:
        raise ValueError(f"{path}: {heads} heads of head_dim {s.get('head_dim')} must make hidden_size {dim} here")
    theta, scaling = read_rope(s, path)
    return {"vocab_size": number(s, "vocab_size", int, path), "dim": dim, "n_layers": number(s, "num_hidden_layers", int, path),
            "n_heads": heads, "n_kv_heads": number(s, "num_key_value_heads", int, path, heads),
            "hidden_dim": number(s, "intermediate_size", int, path), "rope_theta": theta,
            "max_seq_len": number(s, "max_position_embeddings", int, path, 2048, 2**20 + 1),
            "norm_eps": number(s, "rms_norm_eps", float, path, 1e-6, 1), "tie_embeddings": s.get("tie_word_embeddings") is True}, scaling


def check_entry(name, entry, at, limit, path):
    """The shape, and where the data ends, of a tensor in a safetensors header, whose data must begin at `at`."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sound = all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and begin == at and end <= limit
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{path}: tensor {name} is described by {entry!r:.80}, not by dtype, shape and data_offsets") from None
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise ValueError(f"{path}: tensor {name} is stored as {dtype!r:.40}; known are {', '.join(SIZES)} (is the model quantized?)")
    if not sound or end - begin != SIZES[dtype] * math.prod(shape):
        raise ValueError(f"{path}: tensor {name}, {dtype} {shape}, cannot be bytes {begin} to {end} of {limit} (it must begin at {at})")
    return tuple(shape), end


def read_header(path):
    """{name: shape} of a safetensors file, whose header must describe each byte of the data once."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, 100_000_000):
            raise ValueError(f"{path} is truncated or no safetensors file: a header of {length:,} bytes in a file of {size:,}")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: its header cannot be read ({type(error).__name__}: {error})") from None
    shapes, end = {}, 0
    for name, entry in entries:
        shapes[name], end = check_entry(name, entry, end, size - 8 - length, path)
    if end != size - 8 - length:
        raise ValueError(f"{path} is damaged: its header describes {end:,} bytes of data, and there are {size - 8 - length:,}")
    return shapes


def tensor_files(folder):
    """The safetensors files of a folder: model.safetensors, or the shards that its index names, which must lie in the folder."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        reason = f"; {pickles[0]} is a pickle, which can run any code when it is opened: convert it where you trust it" if pickles else ""
        raise ValueError(f"{folder} has neither model.safetensors nor {index.name}{reason}")
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index} has no weight_map of tensor names to file names")
    shards = sorted(set(places.values()))
    for name in shards:
        if any(c in name for c in "/\\:\0") or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: the shard {name!r:.80} is no safetensors file of this folder")
        if not (folder / name).is_file():
            raise ValueError(f"{index}: the shard {name} is missing in {folder}")
    return [folder / name for name in shards]


def split_pattern(pre):
    """The pattern of a pre_tokenizer that splits by one pattern and then takes the bytes. Raises ValueError for any other."""
    steps = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre or {"type": "none"}]
    kinds = [step["type"] for step in steps]
    if kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        raise ValueError(f"its pre-tokenizer {kinds} does not end with the bytes of the text as it is (ByteLevel, no add_prefix_space)")
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return GPT2_PATTERN
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True) and "Regex" in steps[0]["pattern"] \
            and steps[0]["behavior"] == "Isolated" and not steps[0].get("invert"):
        return regex.compile(steps[0]["pattern"]["Regex"]).pattern
    raise ValueError(f"its pre-tokenizer {kinds} is not one pattern (Split by a Regex, Isolated) and then the bytes (ByteLevel)")


def ordered_merges(model, ranks):
    """The merges of a BPE model as pairs of bytes, one for each token that is made by merging, in the order of ids.

    Raises ValueError for an unknown token, and if the order of the merges is not that of the ids: here an id is a priority."""
    made = {}
    for merge in model["merges"]:
        a, b = (unspell(part) for part in (merge.split(" ") if isinstance(merge, str) else merge))
        if not {a, b, a + b} <= ranks.keys():
            raise ValueError(f"the merge {merge!r} has a part or a result that is not in the vocabulary")
        if max(ranks[a], ranks[b]) < ranks[a + b]:
            made.setdefault(a + b, (a, b))
    order = [ranks[token] for token in made]
    if order != sorted(order):
        raise ValueError("its merges are not in the order of the ids of what they make, as they must be here")
    return list(made.values())


def check_kind(data):
    """Raises ValueError, saying why, if the content of a tokenizer.json is not plain byte-level BPE."""
    model, added = data["model"], data.get("added_tokens") or []
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = "BPE with byte_fallback (sentencepiece, as LLaMA 1 and 2)" if model["type"] == "BPE" else model["type"]
        raise ValueError(f"its model is {kind}, not byte-level BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ValueError(f"its model has {name} = {model[name]!r:.40}, which is unknown here")
    if data.get("normalizer"):
        raise ValueError(f"it changes the text first (normalizer {data['normalizer']['type']}), so that decoding would not give it back")
    if strips := [e["content"] for e in added if e.get("lstrip") or e.get("rstrip") or e.get("single_word")]:
        raise ValueError(f"its added token {strips[0]!r} looks at its neighbours (lstrip, rstrip or single_word)")


def parse_tokenizer(data):
    """The Tokenizer in the content of a tokenizer.json. Raises ValueError for what ours cannot do, and other errors for damage."""
    check_kind(data)
    added = {entry["content"]: entry["id"] for entry in data.get("added_tokens") or []}
    ranks = {unspell(token): i for token, i in data["model"]["vocab"].items() if token not in added}
    vocab = {i: token for token, i in ranks.items()} | {i: s.encode() for s, i in added.items()}
    return Tokenizer(vocab, ordered_merges(data["model"], ranks), tuple(added), split_pattern(data.get("pre_tokenizer")))


def load_tokenizer(path):
    """The Tokenizer in a tokenizer.json. Raises ValueError naming the file if it is damaged, or of a kind that ours cannot express.

    What a post-processor puts around a text (a token for its start) is left out: here that is the chat template's business."""
    try:
        return parse_tokenizer(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, regex.error) as error:
        reason = error if type(error) is ValueError else f"it is damaged ({type(error).__name__}: {error})"
        raise ValueError(f"{path} is no tokenizer for minillm: {reason}") from None
