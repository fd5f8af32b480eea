"""Drills: who is where, said over and over, for a model to learn from before it reads stories.

To say where Tom is, a model has to find his name earlier in the text and look at the place beside
it. In stories this pays too seldom for a small model to discover it: it guesses between the places
that were named, and stays there for the whole run. A drill has a dozen chances in eighty tokens.
"""
import random

from minillm.world.templates import VALLEY, Region

STATEMENTS = 11           # after the two that say who is where


def drill(seed: int, region: Region = VALLEY) -> str:
    """The drill with this seed: "Vera by the river. Tom at the mill. Vera was by the river. Tom at
    the mill. ...".

    About half of the statements have the place directly after the name. That is what is learned
    first, and then the others follow.
    """
    rng = random.Random(f"drill {seed}")
    homes = dict(zip(rng.sample(region.she + region.he, 2), rng.sample(region.places, 2)))
    statements = [f"{name} {place}." for name, place in homes.items()]
    for _ in range(STATEMENTS):
        name, place = rng.choice(list(homes.items()))
        statements.append(f"{name} {rng.choice(('', 'was '))}{place}.")
    return " ".join(statements)
