"""The story world: its simulator (stories), its words and sentences (templates), and what can be asked about it (questions)."""
from minillm.world.stories import Setting, World  # noqa: F401
