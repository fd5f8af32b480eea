"""A reader of the story world: how likely is it that the world tells a text, or what is wrong with
the text?

It goes through the text once. The grammar finds the sentence that comes next and the choices that
it shows. The reader then lets the world tell the sentence with these choices: if the world can make
them and writes the same sentence, the story goes on. So the rules and the probabilities are those
of `stories`, and none is repeated here. For a sentence that the world cannot tell, the reader finds
out what would have to be different.
"""
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from minillm.world.grammar import (
    CHARACTERS, END, EVENT, PARTS, PRONOUNS, THINGS, Sentence, first_sentence, grammar)
from minillm.world.stories import (
    PLAIN, Character, Scene, Setting, Teller, Thing, World, pick_number, pick_opening, without)
from minillm.world.templates import FIRST, OTHER, VALLEY, Region

# What can be wrong with the first sentence that the world could not have told there. The kind of a
# fault is the first of these that applies.
KINDS = {
    "unfinished": "the text ends before the story does, after a sentence or within one (a piece of "
                  "a sentence is compared with the templates, not with the story)",
    "order": "a sentence in the wrong part of the story: it introduces someone or something too "
             "late, is for the first character only or for the others only, or has a time of day "
             "and is not the first event, or the other way around",
    "length": "too few or too many characters, things or events for the setting, or text after "
              "the end",
    "pronoun": "a pronoun of the wrong gender, or one where a name has to be",
    "stranger": "a character or a thing that was not introduced",
    "self-reference": "the one who acts is also the other character of the sentence",
    "repeat": "a character with the name of an earlier one, or a thing with the color or noun of "
              "an earlier one",
    "place": "the sentence would be possible if the characters that it names, or a thing that lies "
             "somewhere, were elsewhere",
    "holder": "the sentence would be possible if someone else had the thing, or if it lay "
              "somewhere instead of being held or the other way around (and the characters were "
              "elsewhere, if need be)",
    "wording": "anything else: no template reads like this, or an article or a capital is wrong",
}


@dataclass(frozen=True)
class Fault:
    """Why the world cannot tell a text.

    kind: one of KINDS; sentence: the first that the world could not have told there ("" if the text
    ends too early, but after a sentence); why: a few words on it.
    """

    kind: str
    sentence: str
    why: str


@dataclass
class Reading:
    """What a text says, up to its fault if it has one.

    logp: log-probability (nats), -inf if there is a fault; characters, things: those that the text
    introduces, where they are at its end.
    """

    logp: float
    fault: Fault | None
    characters: list[Character]
    things: list[Thing]


def read(text: str, region: Region = VALLEY, setting: Setting = PLAIN) -> Reading:
    """Read a text as a story of World(region, setting).

    No text raises an error. A region does (ValueError) if it is too small for the setting, or has
    two places that only differ in the preposition.

    >>> reading = read("Long ago, a shy fox called Tom lived at the mill. Tom flew away.")
    >>> reading.fault
    Fault(kind='wording', sentence='Tom flew away.', why='no sentence of the world reads like this')
    >>> [character.kind for character in reading.characters]
    ['fox']
    """
    reader = Reader(text, region, setting)
    fault = reader.read()
    logp = -math.inf if fault else reader.teller.logp
    return Reading(logp, fault, reader.scene.people, reader.scene.things)


class Impossible(Exception):
    """The world cannot make the choices that a sentence shows, or writes another one with them."""


class Follower(Teller):
    """Makes the choices that a sentence shows, and checks that the world then writes it."""

    def expect(self, sentence: str, shown: Sequence) -> None:
        """Set the sentence that comes next and the choices that it shows, in their order.

        Those that the world does not ask for are skipped.
        """
        self.sentence, self.shown = sentence, iter(shown)

    def choose(self, options: Sequence, weights: Sequence[float] | None) -> int:
        """The index of the option that is shown. Raises Impossible if none is."""
        for value in self.shown:
            if value in options:
                i = options.index(value)
                if weights is None or weights[i] > 0:
                    return i
        raise Impossible

    def say(self, sentence: str) -> None:
        """Raises Impossible for any sentence but the expected one."""
        if sentence != self.sentence:
            raise Impossible


class Reader:
    """Reads one text. `scene` and `teller.logp` are the state and the log-probability so far."""

    def __init__(self, text: str, region: Region, setting: Setting):
        self.text, self.region = text, region
        self.world, self.grammar = World(region, setting), grammar(region)
        self.bounds = setting.characters, setting.objects, setting.events, (1, 1)
        self.teller = Follower()
        self.scene = Scene(self.teller)
        self.part, self.events = CHARACTERS, 0

    def read(self) -> Fault | None:
        """Read to the end, or to the first fault, which is returned.

        One text has one origin (the tests check it), so if there are several ways to read a
        sentence, the first one that is possible is right.
        """
        at = 0
        while at < len(self.text) and self.part < END:
            found = self.grammar.sentences(self.text, at)
            told = next((s for s in found if not self.misplaced(s) and self.follow(s)), None)
            if not told:
                return self.fault(at, found)
            self.part = told.pattern.part
            self.events += self.part == EVENT
            at += len(told.text) + 1
        if self.part < END:
            return Fault("unfinished", "", "the text ends before the story does")
        rest = first_sentence(self.text, at - 1)
        if rest:
            return Fault("length", rest.strip() or rest, "the story has ended")
        for number, bounds in zip(self.counts(), self.bounds[:END]):
            self.teller.expect("", [number])
            pick_number(self.teller, bounds)
        return None

    def counts(self) -> tuple[int, int, int, int]:
        """How many characters, things, events and ends were read so far."""
        return len(self.scene.people), len(self.scene.things), self.events, 0

    # ---- what a sentence speaks of

    def person(self, word: str | None) -> Character | None:
        """The character that a name means, or a pronoun in place of the one who acts."""
        subject = self.scene.subject
        if subject and word == subject.pronouns[0]:
            return subject
        return next((c for c in self.scene.people if c.name == word), None)

    def named(self, said: dict[str, str]) -> tuple[Character | None, Character | None]:
        """Who acts, and the other character: one that is met, or that has or gets a thing."""
        who, other = said.get("S") or said.get("N"), said.get("O") or said.get("name")
        return self.person(who), self.person(other)

    def thing(self, said: dict[str, str]) -> Thing | None:
        """The thing that the sentence names, if the story has it."""
        name = said.get("T", "").lower()
        return next((x for x in self.scene.things if x.name.lower() == name), None)

    def place(self, said: dict[str, str]) -> str | None:
        """The place that the sentence names."""
        return said.get("P") or self.grammar.goals.get(said.get("G"))

    # ---- telling it again

    def follow(self, sentence: Sentence) -> bool:
        """Let the world tell the sentence. If it cannot, the scene stays as it was."""
        before = self.teller.logp
        for shown in self.choices(sentence):
            self.teller.expect(sentence.text, shown)
            try:
                self.tell(sentence.pattern.part)
                return True
            except Impossible:
                self.teller.logp = before
        return False

    def tell(self, part: int) -> None:
        """Let the world tell a sentence of this part. May raise Impossible."""
        if part == CHARACTERS:
            self.world.introduce(self.teller, self.scene)
        elif part == THINGS:
            self.world.place_thing(self.teller, self.scene)
        elif part == EVENT:
            opening = None if self.events else pick_opening(self.teller)
            self.scene.happen(opening, self.region.places)
        else:
            self.world.conclude(self.teller, self.scene)

    def choices(self, sentence: Sentence) -> Iterator[list]:
        """The choices that a sentence shows, in the order in which the world makes them.

        No list if the event cannot happen, several if the words leave open with whom or what.
        """
        pattern, said = sentence.pattern, sentence.said
        (who, other), thing = self.named(said), self.thing(said)
        if pattern.part == CHARACTERS:
            yield [*map(said.get, ("name", "trait", "kind", "P")), pattern.template]
        elif pattern.part == THINGS:
            yield [said["colour"], said["thing"], other, said.get("P"), pattern.template]
        elif pattern.part == END:
            yield [thing]
        elif who:
            link, pronoun = said["link"], said.get("S") in PRONOUNS
            start = [*self.grammar.openings.get(link, (link,)), who, pattern.event]
            for pair in self.scene.possible(who)[pattern.event]:
                if all(one in (None, real) for one, real in zip((other, thing), pair)):
                    yield [*start, pair, self.place(said), pattern.template, pronoun]

    # ---- what is wrong

    def fault(self, at: int, found: list[Sentence]) -> Fault:
        """The fault of the text at this position; found: the sentences that the grammar finds."""
        if found:
            sentence = found[0]
            kind, why = self.misplaced(sentence) or self.wrong(sentence)
            return Fault(kind, sentence.text, why)
        # As long as it is the beginning of a sentence of the world, it may go on.
        start, end = at, at
        while end < len(self.text):
            start, end = end, end + len(first_sentence(self.text, end))
            if not self.grammar.begins(self.text, at, end):
                sentence = self.text[start:end].strip() or self.text[start:end]
                return Fault("wording", sentence, "no sentence of the world reads like this")
        return Fault("unfinished", self.text[at:], "the text ends within a sentence")

    def misplaced(self, sentence: Sentence) -> tuple[str, str] | None:
        """A fault of the kind "order" or "length", with the reason; None if there is none."""
        pattern, counts = sentence.pattern, self.counts()
        part, first_event = pattern.part, self.events == 0
        if part < self.part:
            return "order", f"{PARTS[part]} come before {PARTS[self.part]}"
        if part == CHARACTERS and pattern.template not in (OTHER if counts[0] else FIRST):
            can = "can only" if counts[0] else "cannot"
            return "order", f"it {can} introduce the first character"
        if part == EVENT and (sentence.said["link"] in self.grammar.openings) != first_event:
            return "order", "the first event begins with a time of day, and no other"
        for name, count, (least, _) in zip(PARTS[:part], counts, self.bounds):
            if count < least:
                return "length", f"{name}: {count} instead of {least} or more"
        most = self.bounds[part][1]
        if counts[part] >= most:
            return "length", f"{PARTS[part]}: more than {most}"
        return None

    def wrong(self, sentence: Sentence) -> tuple[str, str]:
        """A fault of one of the other kinds, with the reason."""
        part, said = sentence.pattern.part, sentence.said
        (who, other), thing = self.named(said), self.thing(said)
        names = [said[slot] for slot in ("S", "N", "O", "name") if slot in said]
        problem = self.wrong_pronoun(sentence)
        if problem:
            return "pronoun", problem
        if part == CHARACTERS:
            for c in self.scene.people:
                if said["name"] == c.name:
                    return "repeat", f"{c.name} again, after the {c.trait} {c.kind} {c.name}"
        else:
            known = {*PRONOUNS, *(c.name for c in self.scene.people)}
            strangers = without(names, *known)
            if "T" in said and not thing:
                strangers.append(said["T"])
            if strangers:
                return "stranger", f"{strangers[0]} was not introduced"
        if part == THINGS:
            for x in self.scene.things:
                for slot, taken in (("colour", x.colour), ("thing", x.noun)):
                    if said.get(slot) == taken:
                        return "repeat", f"{taken} again, after {x.name}"
        if part == EVENT and who and who is other:
            return "self-reference", f"{who.name} is both characters of the sentence"
        mended = self.mended(sentence) if part in (EVENT, END) else None
        return mended or ("wording", "the world would write it differently")

    def wrong_pronoun(self, sentence: Sentence) -> str | None:
        """What is wrong with a pronoun of the sentence; None if nothing is."""
        pattern, said, subject = sentence.pattern, sentence.said, self.scene.subject
        for slot in ("N", "O", "name"):
            if said.get(slot) in PRONOUNS:
                return f'"{said[slot]}" in place of a name'
        word = said.get("S")
        if word in PRONOUNS:
            if subject is None:
                return f'"{word}" before anyone has done anything'
            fits = word == subject.pronouns[0]
            if not fits or not self.scene.may_be_pronoun(subject, pattern.event, pattern.template):
                return f'"{word}" cannot be {subject.name} here'
        for slot in ("she", "She", "Her", "him"):
            name = said.get("O" if slot == "him" else "name")
            if slot in said and name:
                if said[slot] != self.region.pronouns(name)[PRONOUNS[slot.lower()]]:
                    return f'"{said[slot]}" cannot be {name}'
        return None

    def mended(self, sentence: Sentence) -> tuple[str, str] | None:
        """The kinds "place" and "holder": what has to change so that the sentence is possible.

        Places change rather than the holder; then the fewest changes are best, and then the other
        character is moved rather than the one who acts. None if nothing makes it possible.
        """
        people, thing = [c for c in self.named(sentence.said) if c], self.thing(sentence.said)
        # A state: (holder, place) of the thing, and the place of each character.
        true = [(thing.holder, thing.place) if thing else (None, None), *(c.place for c in people)]
        near = without([self.place(sentence.said), true[0][1], *true[1:]], None)
        elsewhere = without(self.region.places, *near)[:1]
        places = list(dict.fromkeys(near + elsewhere))
        spots = [true[0], *((None, place) for place in places), *((c, None) for c in people)]
        spots = list(dict.fromkeys(spots)) if thing else true[:1]
        states = itertools.product(spots, *[places] * len(people))

        def cost(state: tuple) -> tuple[bool, int, list[bool]]:
            changed = [new != old for new, old in zip(state, true)]
            return state[0][0] is not true[0][0], sum(changed), changed

        for state in sorted(states, key=cost):
            put(people, thing, state)
            possible = self.follow(sentence)
            put(people, thing, true)
            if possible and cost(state)[0]:
                return "holder", f"{thing.name} is {where(*true[0])}, not {where(*state[0])}"
            if possible:
                old_places, new_places = [true[0][1], *true[1:]], [state[0][1], *state[1:]]
                changes = list(zip([thing, *people], old_places, new_places))
                for x, old, new in reversed(changes):
                    if new in elsewhere:
                        return "place", f"{x.name} is already {old}"
                    if new != old:
                        return "place", f"{x.name} is {old}, not {new}"
        return None


def put(people: Sequence[Character], thing: Thing | None, state: Sequence) -> None:
    """Set the (holder, place) of a thing and the place of each character."""
    spot, *places = state
    if thing:
        thing.holder, thing.place = spot
    for character, place in zip(people, places):
        character.place = place


def where(holder: Character | None, place: str | None) -> str:
    """Where a thing is, in words."""
    return f"with {holder.name}" if holder else place
