"""Reading somebody else's model folder: which config, tokenizer and shards we accept.

What our code cannot do is refused by name: each setting is honored, has the one value that we can
do, or is in a list of harmless ones, with the reason. Every function raises ValueError, naming the
file and the key. No pickle is opened. Chapter 19 opens model folders with it.
"""
from collections.abc import Collection
from pathlib import Path
from typing import Any

import regex

from minillm.storage.foreign import check_keys, read_json
from minillm.tokenizer import Tokenizer, split_pieces
from minillm.tokenizer_json import GPT2_PATTERN, unspell

HONORED = ("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size",
           "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
           "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
           "rope_parameters", "tie_word_embeddings", "layer_types")
# rope_traditional is mlx's name for neighbors instead of halves.
ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "partial_rotary_factor": 1.0, "rope_interleaved": False, "rope_traditional": False,
        "use_sliding_window": False, "chunk_size_feed_forward": 0, "pruned_heads": {},
        "is_encoder_decoder": False, "is_decoder": False, "add_cross_attention": False,
        "tie_encoder_decoder": False}
HARMLESS = (
    "initializer_range", "attention_dropout",                  # of training
    # how the result is computed, and in what form it is returned, not what it is
    "use_cache", "pretraining_tp", "dtype", "torch_dtype", "_attn_implementation",
    "attn_implementation", "return_dict", "output_attentions", "output_hidden_states",
    "torchscript", "use_bfloat16", "tf_legacy_loss",
    # of generation, where ours takes arguments; transformers 4 wrote all of them
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "max_length", "min_length",
    "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences",
    "output_scores", "return_dict_in_generate", "remove_invalid_values",
    "id2label", "label2id",             # of a classifier, which has another architecture
    "max_sequence_length",              # an older name beside max_position_embeddings
    # notes by the tool that wrote the file
    "transformers_version", "_name_or_path", "_commit_hash", "_attn_implementation_autoset",
    "tokenizer_class", "transformers.js_config", "is_llama_config", "unsloth_fixed",
    "unsloth_version")
ROPE = ("rope_theta", "rope_type", "type")
NO_BPE_OPTIONS = {"dropout": 0.0, "continuing_subword_prefix": "", "end_of_word_suffix": ""}
# A pattern that leaves out a part of this text would leave out a part of other texts, too.
PROBE = "".join(map(chr, range(32, 127))) + "\n\t\r\n  é ß 猫🦊"
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


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


def agreed(values: list[Any], what: str, path: Path) -> Any:
    """The one value that is given, perhaps several times; None if none is."""
    given = [value for value in values if value is not None]
    if any(value != given[0] for value in given):
        raise ValueError(f"{path} gives {what} twice, with different values: {given!r:.200}")
    return given[0] if given else None


def read_rope(settings: dict[str, Any], path: Path) -> tuple[float, tuple | None]:
    """theta, and the scaling of LLaMA 3.1 (factor, low, high, original) or None.

    transformers 5 writes rope_parameters; earlier versions wrote rope_theta and rope_scaling.
    """
    names = "rope_parameters", "rope_scaling"
    rope = agreed([settings.get(name) for name in names], " and ".join(names), path) or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: rope_parameters (or rope_scaling) must be an object: "
                         f"got {rope!r:.60}")
    theta = agreed([rope.get("rope_theta"), settings.get("rope_theta")], "rope_theta", path)
    theta = number({"rope_theta": theta}, "rope_theta", float, path, 10000.0, 1e12)
    kind = agreed([rope.get("rope_type"), rope.get("type")], "the type of RoPE", path)
    if kind not in (None, "default", "llama3"):
        raise ValueError(f"{path}: rope type {kind!r:.60} is unknown here "
                         "(known: default, llama3), so positions would be wrong")
    known = (*ROPE, *LLAMA3) if kind == "llama3" else ROPE
    check_keys(rope, known, {"partial_rotary_factor": 1.0}, (), path)
    if kind != "llama3":
        return theta, None
    factor, low, high = (number(rope, key, float, path) for key in LLAMA3[:3])
    if high <= low:
        raise ValueError(f"{path}: high_freq_factor {high} must be above low_freq_factor {low}")
    return theta, (factor, low, high, number(rope, LLAMA3[3], int, path))


def read_shape(path: Path) -> tuple[dict[str, Any], tuple | None]:
    """The fields of a LlamaConfig, and the scaling of read_rope, from a config.json.

    What our Llama does not do is refused.
    """
    s = read_json(path)
    names, kind = s.get("architectures") or ["LlamaForCausalLM"], s.get("model_type")
    if names != ["LlamaForCausalLM"] or kind != "llama":
        raise ValueError(f"{path}: architecture {names!r:.60} of type {kind!r:.60} "
                         "is unknown here (known: LlamaForCausalLM, llama)")
    check_keys(s, HONORED, ONLY, HARMLESS, path)
    layers, kinds = number(s, "num_hidden_layers", int, path), s.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and len(kinds) == layers
                                  and all(kind == "full_attention" for kind in kinds)):
        raise ValueError(f"{path}: layer_types = {kinds!r:.60} is unknown here (known: "
                         f'"full_attention" for each of the {layers} layers)')
    tied = s.get("tie_word_embeddings")
    if tied is not None and not isinstance(tied, bool):
        raise ValueError(f"{path}: tie_word_embeddings must be true or false: got {tied!r:.60}")
    dim = number(s, "hidden_size", int, path)
    heads = number(s, "num_attention_heads", int, path)
    width = number(s, "head_dim", int, path, max(dim // heads, 1))
    if width * heads != dim:
        raise ValueError(f"{path}: hidden_size {dim} must be num_attention_heads {heads} times "
                         f"head_dim {width} here")
    theta, scaling = read_rope(s, path)
    shape = {
        "vocab_size": number(s, "vocab_size", int, path),
        "dim": dim,
        "n_layers": layers,
        "n_heads": heads,
        "n_kv_heads": number(s, "num_key_value_heads", int, path, heads),
        "hidden_dim": number(s, "intermediate_size", int, path),
        "rope_theta": theta,
        "max_seq_len": number(s, "max_position_embeddings", int, path, 2048, 2**20 + 1),
        "norm_eps": number(s, "rms_norm_eps", float, path, 1e-6, 1),
        "tie_embeddings": tied is True,
    }
    return shape, scaling


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: model.safetensors, or the shards that its index names.

    Shards must be in the folder itself.
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
            raise ValueError(f"{index}: the shard {name!r:.80} is not a safetensors file "
                             "of this folder")
        if not (folder / name).is_file():
            raise ValueError(f"{index}: the shard {name} is missing in {folder}")
    return [folder / name for name in shards]


def check_unmixed(folder: Path, names: Collection[str]) -> None:
    """Raises ValueError unless a new model, whose files are `names`, has the folder to itself.

    A shard, a tokenizer or an adapter that an earlier model left there would be read together with
    the new files, or in their place. Files that no loader of models opens may stay.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a folder")
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        unread = path.name.startswith(".") or path.suffix in (".gguf", ".md", ".part")
        if path.is_dir():
            unread = path.name != "additional_chat_templates"
        if path.name not in names and path.name != "LICENSE" and not unread:
            raise ValueError(f"{folder} holds {path.name}, which may be read together with the new "
                             "files, or in their place: take it out, or name another folder")


def split_pattern(pre: dict | None) -> str:
    """The pattern of a pre_tokenizer that splits by one pattern and then takes the bytes.

    Raises ValueError for any other, and for a pattern that leaves out a part of a text.
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
            pattern = regex.compile(first["pattern"]["Regex"]).pattern
            split_pieces(PROBE, pattern)
            return pattern
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
    # a post-processor puts a token before or after a text: here that is up to the chat template
    read = "added_tokens", "normalizer", "pre_tokenizer", "decoder", "model"
    check_keys(data, read, {}, ("version", "post_processor"), "its top level")
    model, added = data["model"], data.get("added_tokens") or []
    if model["type"] != "BPE":
        raise ValueError(f"its model is {model['type']}, not byte-level BPE")
    if model.get("byte_fallback"):
        raise ValueError("its model is BPE with byte_fallback (sentencepiece, as LLaMA 1 and 2), "
                         "not byte-level BPE")
    # Nothing is ever unknown where each byte is a token. Where merges make all tokens, ignoring the
    # merges for a piece that is a token as a whole changes nothing (section 19.3).
    harmless = "unk_token", "fuse_unk", "ignore_merges"
    known = "type", "vocab", "merges", "byte_fallback"
    check_keys(model, known, NO_BPE_OPTIONS, harmless, "its model")
    for name in "normalizer", "decoder":
        kind = (data.get(name) or {}).get("type")
        if kind not in ((None, "ByteLevel") if name == "decoder" else (None,)):
            raise ValueError(f"it has the {name} {kind}, so that decoding would not give the "
                             "text back")
    for entry in added:
        if entry.get("lstrip") or entry.get("rstrip") or entry.get("single_word"):
            raise ValueError(f"its added token {entry['content']!r} looks at its neighbors "
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
        return parse_tokenizer(read_json(path))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError,
            regex.error) as error:
        reason = error
        if type(error) is not ValueError:
            reason = f"it is damaged ({type(error).__name__}: {error})"
        raise ValueError(f"{path} is not a tokenizer that minillm can read: {reason}") from None
