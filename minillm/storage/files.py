"""Files that are whole or not there, and files that notice a changed byte.

From chapter 01 on, everything that the course saves goes through `replacing`.
"""
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

SEAL = re.compile(rb'(?<="sha256":")[0-9a-f]{64}(?=")')


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A new binary file beside `path`, which takes the place of `path` when the block ends.

    By then it is on the disk, should the power fail. After an error within the block the new file
    is gone, and `path` is as it was before. An OSError of writing, such as that of a full disk,
    names `path`.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        if error.filename is None and error.errno:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    finally:
        part.unlink(missing_ok=True)


def check_finite(tensors: dict[str, Tensor], where: str | Path) -> None:
    """Raises ValueError, naming `where` and the tensor, unless all numbers are finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{where}: tensor {name} holds numbers that are not finite (in "
                             f"{str(tensor.dtype).removeprefix('torch.')}): has training "
                             "diverged, or is the file damaged?")


def seal(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The bytes of a safetensors file of tensors and metadata {name: text}.

    Its header holds a SHA-256 over all these bytes, taken with zeros in its own place.
    """
    data = safetensors.torch.save(tensors, metadata | {"sha256": "0" * 64})
    return SEAL.sub(hashlib.sha256(data).hexdigest().encode(), data, 1)


def unseal(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata in the bytes of `seal`.

    Raises ValueError if these bytes did not come from `seal`, or one of them has changed.
    """
    found = SEAL.search(data)
    if not found:
        raise ValueError("it has no checksum")
    if found[0] != hashlib.sha256(SEAL.sub(b"0" * 64, data, 1)).hexdigest().encode():
        raise ValueError("its checksum does not match its content")
    try:
        header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
        return safetensors.torch.load(data), header["__metadata__"]
    except (ValueError, LookupError, TypeError, SafetensorError) as error:
        raise ValueError(f"it has a checksum, but is not a safetensors file ({error})") from None
