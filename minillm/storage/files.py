"""Files that are whole or not there, and files that notice a changed byte."""
import hashlib
import json
import os
import re
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch

SEAL = re.compile(rb'(?<="sha256":")[0-9a-f]{64}(?=")')


@contextmanager
def replacing(path):
    """A new binary file beside `path` to write to. It takes the place of `path` when the block ends, on the disk by then should the
    power fail; after an error within the block it is gone, and what `path` was before stays."""
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def seal(tensors, metadata):
    """The bytes of a safetensors file of tensors and metadata {name: text}, with a SHA-256 over all of them in its header."""
    data = safetensors.torch.save(tensors, metadata | {"sha256": "0" * 64})
    return SEAL.sub(hashlib.sha256(data).hexdigest().encode(), data, 1)


def unseal(data):
    """The tensors and metadata in bytes of seal. Raises ValueError if they are none, or one has changed."""
    found = SEAL.search(data)
    if not found:
        raise ValueError("it has no checksum")
    if found[0] != hashlib.sha256(SEAL.sub(b"0" * 64, data, 1)).hexdigest().encode():
        raise ValueError("its checksum does not fit its content")
    header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
    return safetensors.torch.load(data), header["__metadata__"]
