"""Files that are whole or not there."""
import os
from contextlib import contextmanager
from pathlib import Path


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
