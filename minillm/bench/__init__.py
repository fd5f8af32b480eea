"""Our speed and memory beside those of others: `python -m minillm.bench`.

In a notebook: `tables = bench.train(rounds=3, shapes=["S"])`, `print(*tables)`,
`bench.plot(tables)`.
"""
# Re-exported, so that bench.train() and the others can be called.
from minillm.bench.generation import generate, quantize  # noqa: F401
from minillm.bench.timing import plot  # noqa: F401
from minillm.bench.tokenizers import tokenize  # noqa: F401
from minillm.bench.training import train  # noqa: F401
