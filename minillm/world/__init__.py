"""The story world, in which everything that a model should learn is known exactly.

stories simulates it, templates holds its words and sentences, questions what can be asked about it,
and reader tells whether a text is one of its stories (with grammar, the sentences it looks for).
"""
from minillm.world.stories import Setting, World  # noqa: F401  (re-exported: minillm.world.World)
