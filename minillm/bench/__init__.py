"""Our speed and memory beside those of others: `python -m minillm.bench`.

In a notebook: `tables = bench.train(rounds=3, shapes=["S"])`, `print(*tables)`,
`bench.plot(tables)`.
"""
import importlib
from typing import Any

MODULES = {"generate": "generation", "quantize": "generation", "plot": "timing",
           "tokenize": "tokenizers", "train": "training"}


def __getattr__(name: str) -> Any:
    """bench.train and the others, imported when they are first asked for, because they import
    torch, which takes seconds."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{MODULES[name]}"), name)
