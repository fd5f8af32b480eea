"""The story world: a probabilistic program that simulates a few animals and writes what happens.

Every choice draws from a known distribution and leaves its own trace in the text, so that one text
comes from one sequence of choices, and -log p(story) is the sum over its choices. The mean of that
sum over stories is the entropy of the source: the loss that no model can get below. The tests check
both by enumeration.
"""
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from minillm.world.templates import (
    DAYS, EVENTS, FIRST, FOUND, LIES, LINKS, OTHER, OWNED, VALLEY, WEATHER, WITH, Region)


@dataclass(frozen=True)
class Setting:
    """How hard a story is: inclusive ranges of how many characters, objects and events it has."""

    characters: tuple[int, int] = (2, 2)
    objects: tuple[int, int] = (1, 1)
    events: tuple[int, int] = (3, 6)


PLAIN = Setting()
MOVES = ("walk", "carry", "visit", "bring", "take")      # events that change where a character is
PASSES = ("bring", "give", "take", "drop")               # events that change who has a thing


@dataclass(eq=False)
class Character:
    """An animal of a story, and where it is now."""

    name: str
    pronouns: tuple[str, str, str]     # she, her, her / he, his, him
    trait: str
    kind: str
    place: str


@dataclass(eq=False)
class Thing:
    """A thing of a story, and who has it now or where it lies."""

    colour: str
    noun: str
    holder: Character | None
    place: str | None                  # where it lies, None while someone holds it

    @property
    def name(self) -> str:
        return f"the {self.colour} {self.noun}"


@dataclass
class Story:
    """A story, the facts at its end, and the log-probability (nats) with which it is told."""

    text: str
    logp: float
    characters: list[Character]
    things: list[Thing]
    asked: Thing
    places: list[str] = field(default_factory=list)      # every place that the text names, in order

    @property
    def question(self) -> str:
        """The story up to "So now the blue kite", after which one has to know its state."""
        return self.text[: self.text.rindex(self.asked.name) + len(self.asked.name)]

    @property
    def answer(self) -> str:
        """What follows the question: " is with Vera, by the river."."""
        return self.text[len(self.question):]

    @property
    def told(self) -> str:
        """The story without its last sentence, which gives the state away."""
        return self.text[: self.text.rindex(" So now ")]


class Teller:
    """Makes the choices and writes the text.

    Choices are drawn from `rng`, or replayed from `script` (indices; 0 past its end). `trail` has
    each choice as (index, number of options), and `logp` the sum of their log-probabilities (nats).
    """

    def __init__(self, rng: random.Random | None = None, script: Sequence[int] = ()):
        self.rng, self.script = rng, script
        self.trail, self.logp, self.text = [], 0.0, ""

    def pick(self, options: Sequence, weights: Sequence[float] | None = None) -> Any:
        """One of the options, in proportion to the weights (None: all alike)."""
        n, i = len(options), self.choose(options, weights)
        self.trail.append((i, n))
        self.logp += -math.log(n) if weights is None else math.log(weights[i] / sum(weights))
        return options[i]

    def choose(self, options: Sequence, weights: Sequence[float] | None) -> int:
        """The index of the option to pick."""
        if self.rng and weights is None:
            return int(self.rng.random() * len(options))
        if self.rng:
            return self.rng.choices(range(len(options)), weights)[0]
        return self.script[len(self.trail)] if len(self.trail) < len(self.script) else 0

    def say(self, sentence: str) -> None:
        """Append a sentence."""
        self.text += " " + sentence if self.text else sentence


def with_article(words: str) -> str:
    """The words with "a " or "an " before them."""
    return ("an " if words[0] in "aeiou" or words.startswith("honest") else "a ") + words


def subject_of(hero: Character, rng: random.Random) -> str:
    """How a title or a request names the hero of a story: "a shy alpaca", or three times in ten
    "Vera"."""
    return hero.name if rng.random() < 0.3 else f"{with_article(hero.trait)} {hero.kind}"


def capital(words: str) -> str:
    """The words with a capital first letter."""
    return words[0].upper() + words[1:]


def without(items: Iterable, *taken: Any) -> list:
    """The items that are not among those taken."""
    return [x for x in items if x not in taken]


class World:
    """A source of stories whose entropy is known.

    >>> story = World().sample(0)
    >>> story.text.startswith(story.question) and story.text.endswith(story.answer)
    True
    """

    def __init__(self, region: Region = VALLEY, setting: Setting = PLAIN):
        most = setting.characters[1]
        names = region.she + region.he
        if len(region.places) < 2 or len(names) < most:
            raise ValueError(f"a region needs at least 2 places, and names for {most} characters: "
                             f"got {len(region.places)} and {len(names)}")
        most = setting.objects[1]
        if min(len(region.colours), len(region.things)) < most:
            raise ValueError(f"a region needs colours and things for {most} objects: got "
                             f"{len(region.colours)} and {len(region.things)}")
        self.region, self.setting = region, setting

    def sample(self, seed: int | str, split: str = "train") -> Story:
        """The story with this seed.

        `split` ("train" or "heldout") is part of the seed, so the two never share one.
        """
        return self.tell(Teller(random.Random(f"{split} {seed}")))

    def begin(self, rng: random.Random) -> tuple[Character, str]:
        """The hero of a story, and the sentence that introduces him or her."""
        teller = Teller(rng)
        scene = Scene(teller)
        self.introduce(teller, scene)
        return scene.people[0], teller.text

    def stories(self, n: int, split: str = "train", start: int = 0) -> list[Story]:
        """The n stories with the seeds from `start` on."""
        return [self.sample(seed, split) for seed in range(start, start + n)]

    def enumerate(self) -> Iterator[Story]:
        """Every story that the world can tell, by depth-first search over the choices.

        For small settings only.
        """
        script = []
        while True:
            teller = Teller(script=script)
            yield self.tell(teller)
            # The next script: drop the choices that were at their last option, and advance the one
            # before them.
            trail = teller.trail
            while trail and trail[-1][0] == trail[-1][1] - 1:
                trail.pop()
            if not trail:
                return
            script = [i for i, _ in trail]
            script[-1] += 1

    def tell(self, t: Teller) -> Story:
        """The story that the choices of a Teller make."""
        setting = self.setting
        scene = Scene(t)
        for _ in range(pick_number(t, setting.characters)):
            self.introduce(t, scene)
        for _ in range(pick_number(t, setting.objects)):
            self.place_thing(t, scene)
        opening = pick_opening(t)
        for _ in range(pick_number(t, setting.events)):
            scene.happen(opening, self.region.places)
            opening = None
        asked = self.conclude(t, scene)
        return Story(t.text, t.logp, scene.people, scene.things, asked, scene.places)

    def introduce(self, t: Teller, scene: "Scene") -> None:
        """A new character, whose name no other has."""
        region, people = self.region, scene.people
        name = t.pick(without(region.she + region.he, *(p.name for p in people)))
        trait = t.pick(region.traits)
        kind = t.pick(region.kinds)
        place = t.pick(region.places)
        she, her, _ = pronouns = region.pronouns(name)
        article = with_article(trait)
        sentence = t.pick(OTHER if people else FIRST)
        t.say(sentence.format(name=name, kind=kind, trait=trait, P=place, a=article,
                              A=capital(article), she=she, She=capital(she), Her=capital(her)))
        people.append(Character(name, pronouns, trait, kind, place))
        scene.places.append(place)

    def place_thing(self, t: Teller, scene: "Scene") -> None:
        """A new thing, with an owner or lying somewhere; no other has its color or its kind."""
        region = self.region
        colour = t.pick(without(region.colours, *(x.colour for x in scene.things)))
        noun = t.pick(without(region.things, *(x.noun for x in scene.things)))
        owner = t.pick([*scene.people, None], [3] * len(scene.people) + [2])
        place = None if owner else t.pick(region.places)
        article = with_article(colour)
        sentence = t.pick(OWNED if owner else FOUND)
        t.say(sentence.format(name=owner and owner.name, thing=noun, P=place, a=article,
                              A=capital(article)))
        scene.things.append(Thing(colour, noun, owner, place))
        if place:
            scene.places.append(place)

    def conclude(self, t: Teller, scene: "Scene") -> Thing:
        """The last sentence: where one of the things is now. Returns that thing."""
        asked = t.pick(scene.things)
        holder = asked.holder
        if holder:
            t.say(WITH.format(T=asked.name, name=holder.name, P=holder.place))
        else:
            t.say(LIES.format(T=asked.name, P=asked.place))
        return asked


def pick_opening(t: Teller) -> str:
    """What the first event begins with: "One warm morning, "."""
    return t.pick(DAYS).format(t.pick(WEATHER)) + ", "


def pick_number(t: Teller, bounds: tuple[int, int]) -> int:
    """A number from the inclusive range, all equally likely."""
    low, high = bounds
    return t.pick(range(low, high + 1))


class Scene:
    """The state of a story: who is where and has what. `happen` changes it and says so."""

    def __init__(self, teller: Teller):
        self.t = teller
        self.people, self.things, self.places = [], [], []
        self.subject = None            # who acted in the event before: the one a pronoun means

    def possible(self, who: Character) -> dict[str, list[tuple[Character | None, Thing | None]]]:
        """What `who` can do now: {event: pairs (other character, thing) it can be done with}."""
        others = without(self.people, who)
        near = [p for p in others if p.place == who.place]
        far = without(others, *near)
        mine = [x for x in self.things if x.holder is who]
        lying = [x for x in self.things if x.place]
        return {
            "walk": [(None, None)],
            "carry": [(None, x) for x in mine],
            "visit": [(o, None) for o in far],
            "bring": [(o, x) for o in far for x in mine],
            "give": [(o, x) for o in near for x in mine],
            "drop": [(None, x) for x in mine],
            "take": [(None, x) for x in lying],
            "rest": [(None, None)],
            "play": [(None, x) for x in mine],
            "greet": [(o, None) for o in near],
            "muse": [(None, None)],
            "who": [(x.holder, x) for x in self.things if x.holder in others],
            "where": [(o, None) for o in others],
            "lost": [(None, x) for x in lying],
        }

    def may_be_pronoun(self, who: Character, event: str, sentence: str) -> bool:
        """Whether the sentence of an event may call `who` she or he instead of the name."""
        return who is self.subject and event not in MOVES and "{S}" in sentence

    def happen(self, opening: str | None, all_places: Sequence[str]) -> None:
        """One event: who does what, with whom and where; then the state after it.

        opening: what the first event of a story begins with, None for the others.
        """
        t = self.t
        link = opening or t.pick([words for words, _ in LINKS], [weight for _, weight in LINKS])
        who = t.pick(self.people)
        possible = self.possible(who)
        events = [e for e in EVENTS if possible[e]]
        event = t.pick(events, [EVENTS[e][0] for e in events])
        other, thing = t.pick(possible[event])
        if event in ("walk", "carry"):
            place = t.pick(without(all_places, who.place))
        elif other:
            place = other.place
        elif event in ("take", "lost"):
            place = thing.place
        else:
            place = who.place
        sentence = t.pick(EVENTS[event][1])
        pronoun = self.may_be_pronoun(who, event, sentence) and t.pick((True, False))
        t.say(capital(link + sentence.format(
            S=who.pronouns[0] if pronoun else who.name, N=who.name,
            O=other and other.name, him=other and other.pronouns[2], T=thing and thing.name,
            P=place, G=place.split(" ", 1)[1])))
        if event in MOVES:
            who.place = place
        if event in PASSES:
            thing.holder = who if event == "take" else other
            thing.place = place if event == "drop" else None
        if "{P}" in sentence or "{G}" in sentence:
            self.places.append(place)
        self.subject = who
