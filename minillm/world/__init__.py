"""The story world, in which everything that a model should learn is known exactly.

stories simulates it, templates holds its words and sentences, questions writes questions and
dialogues about it, drills writes practice texts, and reader tells whether a text is one of its
stories (with grammar, which finds the sentences).
"""
from minillm.world.stories import Setting, World  # noqa: F401  (re-exported: minillm.world.World)
