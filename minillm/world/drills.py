"""What the base model reads besides stories: texts in which one ability is needed over and over.

To say where Tom is, a model has to find his name earlier in the text and look at the place beside
it. In stories this pays too seldom for a small model to discover it: it guesses between the places
that were named, and keeps doing so for the whole run. A drill has a dozen chances in eighty tokens.
`practice` does the same for what the chat model is asked later: a quiz says who and what a story
does not mention, and a title says what the story after it is about.
"""
import random
from dataclasses import replace

from minillm.world.stories import PLAIN, Setting, World, capital, subject_of
from minillm.world.templates import VALLEY, Region

STATEMENTS = 11           # of a drill, after the two that say who is where, and of a quiz
TITLES = 6                # of a text of titles
EVENTS = (0, 3)           # of the story before a quiz


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


def practice(seed: int, setting: Setting = PLAIN) -> str:
    """The text with this seed: every fifth is of titles, the others are quizzes."""
    return titles(seed, setting) if seed % 5 == 4 else quiz(seed, setting)


def titles(seed: int, setting: Setting = PLAIN) -> str:
    """The first sentences of some stories, each after its title: "A shy alpaca. Once upon a time, a
    shy alpaca named Vera lived by the river. Tom. Tom the fox was lazy. ..."."""
    rng, world = random.Random(f"titles {seed}"), World(setting=setting)
    texts = []
    for _ in range(TITLES):
        hero, sentence = world.begin(rng)
        texts.append(f"{capital(subject_of(hero, rng))}. {sentence}")
    return " ".join(texts)


def quiz(seed: int, setting: Setting = PLAIN) -> str:
    """A short story, and then who is where, or where the things are: "... Vera by the river. Ida
    nowhere. Where is Vera? Vera is by the river. Where is Max? I don't know. ...".

    About one in three statements is about somebody, or something, that the story does not mention.
    Things are harder, so two in three quizzes are about them. Seven in ten statements name a thing
    with its color. A thing that is not in the story has any color, so it is the noun that gives it
    away; but one in twelve statements about a thing of the story has a wrong color, which makes it
    another thing.
    """
    rng = random.Random(f"quiz {seed}")
    story = World(setting=replace(setting, events=EVENTS)).sample(f"quiz {seed}")
    of_things = rng.random() < 2 / 3
    if of_things:
        found = {x.noun: x.holder.place if x.holder else x.place for x in story.things}
        words, colours = VALLEY.things, {x.noun: x.colour for x in story.things}
    else:
        found, words = {c.name: c.place for c in story.characters}, VALLEY.she + VALLEY.he
    missing = [word for word in words if word not in found]
    statements = [story.told]
    for _ in range(STATEMENTS):
        word = rng.choice(missing if rng.random() < 1 / 3 else list(found))
        place, called = found.get(word), word
        if of_things:
            colour = colours.get(word) or rng.choice(VALLEY.colours)
            called = f"the {word}" if rng.random() < 0.3 else f"the {colour} {word}"
            if place and rng.random() < 1 / 12:
                colour = rng.choice([c for c in VALLEY.colours if c not in colours.values()])
                place, called = None, f"the {colour} {word}"
        start = rng.choice(("{X} {place}.", "{X} was {place}.", "Where is {x}? {X} is {place}."))
        if place is None and start.startswith("Where"):
            start = "Where is {x}? I don't know."
        statements.append(start.format(x=called, X=capital(called), place=place or "nowhere"))
    return " ".join(statements)
