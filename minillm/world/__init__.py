"""The story world, in which everything that a model should learn is known exactly.

stories simulates it, templates holds its words and sentences, and questions what can be asked
about it.
"""
from minillm.world.stories import Setting, World  # noqa: F401  (re-exported: minillm.world.World)
