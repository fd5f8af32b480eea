"""The templates of the story world as regular expressions: which sentence may come next in a text?

A template becomes an expression with a group for each of its slots. It is lenient where the reader
has to see what is wrong: a slot for a name takes a pronoun, too, and capitals do not matter.
"""
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from string import Formatter

import regex

from minillm.world.templates import (
    DAYS, EVENTS, FIRST, FOUND, LIES, LINKS, OTHER, OWNED, WEATHER, WITH, Region)

PARTS = "characters", "things", "events", "end"                  # of a story, in order
CHARACTERS, THINGS, EVENT, END = range(4)
PRONOUNS = {"she": 0, "he": 0, "her": 1, "his": 1, "him": 2}     # word: index in Character.pronouns
SENTENCE = regex.compile(r'.*?[.!?]"?(?=\s|\Z)', regex.DOTALL)


@dataclass(frozen=True)
class Pattern:
    """A template as a regular expression; part: an index of PARTS; event: a key of EVENTS, or
    ""."""

    part: int
    event: str
    template: str
    regex: regex.Pattern


@dataclass(frozen=True)
class Sentence:
    """What a template finds in a text (it may be two sentences), and the words by slot.

    The words are spelled as in the region. Instead of the slots a and A there is "trait" or
    "colour", and for events "link", which is what they begin with.
    """

    text: str
    pattern: Pattern
    said: dict[str, str]


class Grammar:
    """All templates with the words of a region.

    openings: {"One warm morning, ": (day, weather)}; goals: {"the river": "by the river"}. Raises
    ValueError if two places have the same words after the preposition.
    """

    def __init__(self, region: Region):
        self.openings = {day.format(weather) + ", ": (day, weather)
                         for day, weather in itertools.product(DAYS, WEATHER)}
        self.goals = {place.split(" ", 1)[1]: place for place in region.places}
        if len(self.goals) < len(region.places):
            raise ValueError("a region has two places with the same words after the preposition: "
                             f"got {region.places}")
        links = [*self.openings, *(words for words, _ in LINKS)]
        words = {word for group in vars(region).values() for word in group}
        words |= {*links, *self.goals, *PRONOUNS}
        self.words = {word.lower(): word for word in words}

        colour, noun, trait = map(either, (region.colours, region.things, region.traits))
        person, pronoun = either([*region.she, *region.he, *PRONOUNS]), either(PRONOUNS)
        slots = dict.fromkeys(("name", "S", "N", "O"), person)
        slots |= dict.fromkeys(("him", "she", "She", "Her"), pronoun)
        slots |= {"trait": trait, "kind": either(region.kinds), "thing": noun,
                  "T": f"the {colour} {noun}", "P": either(region.places), "G": either(self.goals)}

        self.patterns = []
        self.add(CHARACTERS, dict.fromkeys(FIRST + OTHER), slots, article=f"an? {trait}")
        self.add(THINGS, OWNED + FOUND, slots, article=f"an? {colour}")
        for event, (_, templates) in EVENTS.items():
            self.add(EVENT, templates, slots, event=event, start=f"(?P<link>{either(links)})")
        self.add(END, (WITH, LIES), slots)

    def add(self, part: int, templates: Iterable[str], slots: dict[str, str], article: str = "",
            event: str = "", start: str = "") -> None:
        """Add templates; slots: the expression of each; article: that of the slots a and A."""
        slots = slots | {"a": article, "A": article}
        for template in templates:
            compiled = regex.compile(start + expression(template, slots), regex.IGNORECASE)
            self.patterns.append(Pattern(part, event, template, compiled))

    def sentences(self, text: str, at: int) -> list[Sentence]:
        """The sentences that may begin at this position of the text, the longest first."""
        found = []
        for pattern in self.patterns:
            match = pattern.regex.match(text, at)
            if match and (pattern.part == END or text[match.end(): match.end() + 1] in ("", " ")):
                said = {slot: self.spelled(word) for slot, word in match.groupdict().items()}
                described = said.pop("a", None) or said.pop("A", None)
                if described:
                    slot = "trait" if pattern.part == CHARACTERS else "colour"
                    said[slot] = self.spelled(described.split(" ", 1)[1])
                found.append(Sentence(match[0], pattern, said))
        return sorted(found, key=lambda sentence: -len(sentence.text))

    def spelled(self, word: str) -> str:
        """The word as the region has it."""
        return self.words.get(word.lower(), word)

    def begins(self, text: str, start: int, end: int) -> bool:
        """Whether text[start:end] is a sentence of the world or the beginning of one."""
        return any(pattern.regex.fullmatch(text, start, end, partial=True)
                   for pattern in self.patterns)


@lru_cache(maxsize=16)
def grammar(region: Region) -> Grammar:
    """The grammar of a region, made once."""
    return Grammar(region)


def either(words: Iterable[str]) -> str:
    """A regular expression for one of the words, the longest that fits."""
    return f"(?:{'|'.join(map(regex.escape, sorted(words, key=len, reverse=True)))})"


def expression(template: str, slots: dict[str, str]) -> str:
    """A template as a regular expression. A slot used twice has the same words both times."""
    parts, seen = [], set()
    for literal, slot, _, _ in Formatter().parse(template):
        parts.append(regex.escape(literal))
        if slot:
            parts.append(f"(?P={slot})" if slot in seen else f"(?P<{slot}>{slots[slot]})")
            seen.add(slot)
    return "".join(parts)


def first_sentence(text: str, at: int) -> str:
    """The text from `at` to the end of that sentence, or to its own end."""
    match = SENTENCE.match(text, at)
    return match[0] if match else text[at:]
