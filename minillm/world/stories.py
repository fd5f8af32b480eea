"""The story world: a probabilistic program that simulates a few animals and writes down what happens.

Every choice draws from a known distribution and leaves its own trace in the text, so that one text comes from one
sequence of choices, and -log p(story) is the sum over its choices. The mean of that sum over stories is the entropy
of the source: the loss that no model can get below. The tests prove both by enumeration.
"""
import math
import random
from dataclasses import dataclass, field

from minillm.world.templates import DAYS, EVENTS, FIRST, FOUND, LIES, LINKS, OTHER, OWNED, VALLEY, WEATHER, WITH


@dataclass(frozen=True)
class Setting:
    """How hard a story is: inclusive ranges of how many characters, objects and events it has."""

    characters: tuple = (2, 2)
    objects: tuple = (1, 1)
    events: tuple = (3, 6)


MOVES, PASSES = ("walk", "carry", "visit", "bring", "take"), ("bring", "give", "take", "drop")   # change a place, a holder


@dataclass(eq=False)
class Character:
    name: str
    pronouns: tuple          # she, her, her / he, his, him
    trait: str
    kind: str
    place: str


@dataclass(eq=False)
class Thing:
    colour: str
    noun: str
    holder: Character | None
    place: str | None        # where it lies, None while someone holds it

    @property
    def name(self):
        return f"the {self.colour} {self.noun}"


@dataclass
class Story:
    """A story, the facts at its end, and the log-probability (nats) with which the world tells it."""

    text: str
    logp: float
    characters: list
    things: list
    asked: Thing
    places: list = field(default_factory=list)   # every place that the text names, in order

    @property
    def question(self):
        """The story up to "So now the blue kite is": what is left can only be known by tracking the state."""
        return self.text[: self.text.rindex(self.asked.name) + len(self.asked.name)]

    @property
    def answer(self):
        return self.text[len(self.question):]

    @property
    def told(self):
        """The story without its last sentence, which gives the state away."""
        return self.text[: self.text.rindex(" So now ")]


class Impossible(Exception):
    """The text told so far is not a prefix of the text that is looked for."""


class Teller:
    """Makes the choices and writes the text: drawn from `rng`, or replayed from `script` (indices; 0 past its end)."""

    def __init__(self, rng=None, script=(), wanted=None):
        self.rng, self.script, self.wanted = rng, script, wanted
        self.trail, self.logp, self.text = [], 0.0, ""

    def pick(self, options, weights=None):
        n = len(options)
        if self.rng:
            i = int(self.rng.random() * n) if weights is None else self.rng.choices(range(n), weights)[0]
        else:
            i = self.script[len(self.trail)] if len(self.trail) < len(self.script) else 0
        self.trail.append((i, n))
        self.logp += -math.log(n) if weights is None else math.log(weights[i] / sum(weights))
        return options[i]

    def say(self, sentence):
        self.text += " " + sentence if self.text else sentence
        if self.wanted is not None and not self.wanted.startswith(self.text):
            raise Impossible


def with_article(words):
    return ("an " if words[0] in "aeiou" or words.startswith("honest") else "a ") + words


def capital(words):
    return words[0].upper() + words[1:]


def without(items, *taken):
    return [x for x in items if x not in taken]


class World:
    """A source of stories whose entropy is known.

    >>> story = World().sample(0)
    >>> story.text.startswith(story.question) and story.text.endswith(story.answer)
    True
    """

    def __init__(self, region=VALLEY, setting=Setting()):
        most = setting.characters[1]
        if len(region.places) < 2 or min(len(region.she + region.he), len(region.traits), len(region.kinds)) < most:
            raise ValueError(f"a region needs at least 2 places, and names, traits and kinds for {most} characters: got "
                             f"{len(region.places)}, {len(region.she + region.he)}, {len(region.traits)} and {len(region.kinds)}")
        if min(len(region.colours), len(region.things)) < setting.objects[1]:
            raise ValueError(f"a region needs colours and things for {setting.objects[1]} objects: got {len(region.colours)} and {len(region.things)}")
        self.region, self.setting = region, setting

    def sample(self, seed, split="train"):
        """The story with this seed. `split` ("train" or "heldout") is part of the seed, so the two never share one."""
        return self.tell(Teller(random.Random(f"{split} {seed}")))

    def stories(self, n, split="train", start=0):
        return [self.sample(seed, split) for seed in range(start, start + n)]

    def enumerate(self, wanted=None):
        """Every story that the world can tell, by depth-first search over the choices; with `wanted`, every way to tell
        that text (the search turns back at the first word that differs). Small settings only without `wanted`."""
        script = []
        while True:
            teller = Teller(script=script, wanted=wanted)
            try:
                story = self.tell(teller)
                if wanted is None or story.text == wanted:
                    yield story
            except Impossible:
                pass
            script = teller.trail
            while script and script[-1][0] == script[-1][1] - 1:
                script.pop()
            if not script:
                return
            script = [i for i, _ in script]
            script[-1] += 1

    def logprob(self, text):
        """Log-probability (nats) of a text under the world, -inf if it cannot be told."""
        ways = [story.logp for story in self.enumerate(wanted=text)]
        return math.log(sum(math.exp(w) for w in ways)) if ways else -math.inf

    def tell(self, t):
        r, s = self.region, self.setting
        scene = Scene(t)
        for _ in range(t.pick(range(s.characters[0], s.characters[1] + 1))):
            self.introduce(t, scene)
        for _ in range(t.pick(range(s.objects[0], s.objects[1] + 1))):
            self.place_thing(t, scene)
        opening = t.pick(DAYS).format(t.pick(WEATHER)) + ", "
        for _ in range(t.pick(range(s.events[0], s.events[1] + 1))):
            scene.happen(opening, r.places)
            opening = None
        asked = t.pick(scene.things)
        holder = asked.holder
        place = holder.place if holder else asked.place
        t.say((WITH if holder else LIES).format(T=asked.name, name=holder and holder.name, P=place))
        return Story(t.text, t.logp, scene.people, scene.things, asked, scene.places)

    def introduce(self, t, scene):
        r, people = self.region, scene.people
        name = t.pick(without(r.she + r.he, *(p.name for p in people)))
        person = Character(name, ("she", "her", "her") if name in r.she else ("he", "his", "him"),
                           t.pick(without(r.traits, *(p.trait for p in people))),
                           t.pick(without(r.kinds, *(p.kind for p in people))), t.pick(r.places))
        article = with_article(person.trait)
        she, her, _ = person.pronouns
        t.say(t.pick(OTHER if people else FIRST).format(
            name=name, kind=person.kind, trait=person.trait, P=person.place, she=she, She=capital(she), Her=capital(her),
            a=article, A=capital(article)))
        people.append(person)
        scene.places.append(person.place)

    def place_thing(self, t, scene):
        r = self.region
        colour = t.pick(without(r.colours, *(x.colour for x in scene.things)))
        noun = t.pick(without(r.things, *(x.noun for x in scene.things)))
        owner = t.pick([*scene.people, None], [3] * len(scene.people) + [2])
        place = None if owner else t.pick(r.places)
        article = with_article(colour)
        t.say(t.pick(OWNED if owner else FOUND).format(
            name=owner and owner.name, thing=noun, P=place, a=article, A=capital(article)))
        scene.things.append(Thing(colour, noun, owner, place))
        scene.places += [place] if place else []


class Scene:
    """The state of a story: who is where and has what; `happen` changes it and says so."""

    def __init__(self, teller):
        self.t, self.people, self.things, self.places, self.subject = teller, [], [], [], None

    def possible(self, who):
        """What `who` can do now: {event: the pairs (other character, thing) that it can be done with}."""
        others = without(self.people, who)
        near = [p for p in others if p.place == who.place]
        far = without(others, *near)
        mine = [x for x in self.things if x.holder is who]
        return {"walk": [(None, None)], "carry": [(None, x) for x in mine], "visit": [(o, None) for o in far],
                "bring": [(o, x) for o in far for x in mine], "give": [(o, x) for o in near for x in mine],
                "drop": [(None, x) for x in mine], "take": [(None, x) for x in self.things if x.place], "rest": [(None, None)],
                "play": [(None, x) for x in mine], "greet": [(o, None) for o in near], "muse": [(None, None)],
                "who": [(x.holder, x) for x in self.things if x.holder in others], "where": [(o, None) for o in far],
                "lost": [(None, x) for x in self.things if x.place]}

    def happen(self, opening, all_places):
        t = self.t
        link = opening if opening else t.pick([l for l, _ in LINKS], [w for _, w in LINKS])
        who = t.pick(self.people)
        possible = self.possible(who)
        events = [e for e in EVENTS if possible[e]]
        event = t.pick(events, [EVENTS[e][0] for e in events])
        other, thing = t.pick(possible[event])
        if event in ("walk", "carry"):
            place = t.pick(without(all_places, who.place))
        else:
            place = other.place if other else thing.place if event in ("take", "lost") else who.place
        sentence = t.pick(EVENTS[event][1])
        pronoun = who is self.subject and event not in MOVES and "{S}" in sentence and t.pick((True, False))
        t.say(capital(link + sentence.format(
            S=who.pronouns[0] if pronoun else who.name, N=who.name, O=other and other.name, him=other and other.pronouns[2],
            P=place, G=place.split(" ", 1)[1], T=thing and thing.name, trait=who.trait, kind=who.kind)))
        if event in MOVES:
            who.place = place
        if event in PASSES:
            thing.holder = who if event == "take" else other
            thing.place = place if event == "drop" else None
        if "{P}" in sentence or "{G}" in sentence:
            self.places.append(place)
        self.subject = who
