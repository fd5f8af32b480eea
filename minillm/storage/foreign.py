"""JSON and safetensors files that somebody else may have written: read, or refused by name.

What a file claims about itself is checked against the file before anything is allocated or opened
because of it. Every function raises ValueError, naming the file and the key or tensor, for what is
damaged or unknown; a safetensors file that cannot be read raises OSError. Model folders (chapter
19) and adapters (chapter 12) are read with it.
"""
import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}       # bytes per number


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError also for a file that cannot be read."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): "
                         f"is {path.parent} the right folder?") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or not JSON ({error})") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object: got a {type(data).__name__}")
    return data


def check_keys(settings: Mapping[str, Any], honored: Collection[str], only: Mapping[str, Any],
               harmless: Collection[str], where: str | Path) -> None:
    """Raises ValueError, naming the key, for a setting that is not known to leave the result right.

    honored: keys that are read elsewhere. only: {key: the one value that we can do}. harmless: keys
    that change no result. Null counts as not given.
    """
    for key, value in settings.items():
        if value is None or key in honored or key in harmless:
            continue
        if key not in only:
            raise ValueError(f"{where}: {key} = {value!r:.60} is unknown here, and may change what "
                             "comes out")
        if value != only[key]:
            raise ValueError(f"{where}: {key} = {value!r:.60} is unknown here "
                             f"(known: {only[key]!r})")


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
            raise ValueError(f"{path} is truncated or not a safetensors file: "
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


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of a safetensors file, one after another, in their stored types."""
    names = read_header(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            for name in names:
                yield name, file.get_tensor(name)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
