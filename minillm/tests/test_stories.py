"""The claims that the course builds on.

Probabilities are exact, one text has one origin, and the answers follow from the text.
"""
import itertools
import math
import re
import statistics
from dataclasses import replace

import pytest

from minillm.arc.sizes import SIZES
from minillm.data import shingles
from minillm.world import Setting, World
from minillm.world import stories as module
from minillm.world.templates import VALLEY, Region

ONE = Region(she=("Mia",), he=(), kinds=("fox",), traits=("shy",),
             places=("by the river", "at the mill"), colours=("red",), things=("kite",))
TWO = Region(she=("Mia",), he=("Tom",), kinds=("fox", "owl"), traits=("shy", "honest"),
             places=("by the river", "at the mill"), colours=("red", "orange"),
             things=("kite", "apple"))


def trim(monkeypatch, sentences, links=2):
    """Fewer ways to say the same, so that the listings stay short; one way to begin the events."""
    monkeypatch.setattr(module, "DAYS", module.DAYS[1:2])
    monkeypatch.setattr(module, "WEATHER", module.WEATHER[:1])
    monkeypatch.setattr(module, "LINKS", module.LINKS[:links])
    for name in "FIRST", "OTHER", "OWNED", "FOUND":
        monkeypatch.setattr(module, name, getattr(module, name)[-sentences:])


def listed(source):
    stories = list(source.enumerate())
    assert abs(math.fsum(math.exp(story.logp) for story in stories) - 1) < 1e-9
    assert len({story.text for story in stories}) == len(stories)
    return stories


# sentences of each kind that are left, region, setting, phrases that must occur in some story
CASES = {
    "pronouns, drops and takes": (
        2, ONE, Setting((1, 1), (1, 1), (2, 2)),
        (" she ", "put the red kite down", "took it along")),
    "two animals": (
        1, TWO, Setting((2, 2), (1, 1), (1, 1)),
        ("handed", "joined", "brought", "who had", "and saw", "an honest owl")),
    "two objects": (
        3, ONE, Setting((1, 1), (1, 2), (1, 1)),
        ("It was still", "was very fond", "It lay")),
}


@pytest.mark.parametrize("case", CASES)
def test_probabilities_sum_to_one_and_no_text_has_two_origins(monkeypatch, case):
    sentences, region, setting, phrases = CASES[case]
    if setting.objects == (1, 2):
        region = Region(**{**vars(region), "colours": TWO.colours, "things": TWO.things})
    trim(monkeypatch, sentences)
    check_probabilities(World(region, setting), phrases)


def test_probabilities_where_characters_things_and_events_vary(monkeypatch):
    """As in the setting of the size gpu.

    Of the events only those that say who has which of two things, each in one way.
    """
    trim(monkeypatch, 1, links=1)
    some = "walk", "give", "drop", "take", "who", "lost"
    events = {event: (weight, ways[-1:]) for event, (weight, ways) in module.EVENTS.items()
              if event in some}
    monkeypatch.setattr(module, "EVENTS", events)
    source = World(TWO, Setting((1, 2), (1, 2), (0, 1)))
    phrases = "handed the red apple", "Where is the orange kite", "Tom left the"
    found = check_probabilities(source, phrases)
    assert found == set(itertools.product((1, 2), (1, 2), (False, True)))


def check_probabilities(source, phrases):
    """The probabilities of all stories sum to one, and those drawn have the mean -log p of all.

    Returns what numbers of characters and things occur, with and without an event.
    """
    stories = listed(source)
    assert len(stories) > 5000
    for phrase in phrases:
        assert any(phrase in story.text for story in stories), phrase
    entropy = -math.fsum(math.exp(story.logp) * story.logp for story in stories)
    sampled = [-story.logp for story in source.stories(2000)]
    error = statistics.stdev(sampled) / math.sqrt(len(sampled))
    assert abs(statistics.mean(sampled) - entropy) < 4 * error
    by_text = {story.text: story.logp for story in stories}
    for story in source.stories(200, "heldout"):
        assert abs(by_text[story.text] - story.logp) < 1e-9
    return {(len(story.characters), len(story.things), "One " in story.text) for story in stories}


def test_every_number_in_a_range_occurs_and_no_other():
    stories = World(setting=Setting((2, 4), (1, 3), (4, 12))).stories(500)
    assert {len(s.characters) for s in stories} == {2, 3, 4}
    assert {len(s.things) for s in stories} == {1, 2, 3}
    assert {s.asked is s.things[-1] for s in stories} == {True, False}


def test_sampling_depends_on_seed_and_split_only():
    texts = [s.text for s in World().stories(5, start=10)]
    assert texts == [World().sample(seed).text for seed in range(10, 15)]
    train = {s.text for s in World().stories(3000, "train")}
    heldout = {s.text for s in World().stories(3000, "heldout")}
    assert len(train) == len(heldout) == 3000 and not train & heldout


def test_samples_are_not_alike():
    for split in "train", "heldout":
        found = [shingles(s.text) for s in World().stories(10, split)]
        for a, b in itertools.combinations(found, 2):
            assert len(a & b) / len(a | b) < 0.2


# ---- a second opinion: a reader that knows English, not the program

def either(words):
    return f"(?:{'|'.join(words)})"


NAMES = VALLEY.she + VALLEY.he
TRAIT, KIND = either(VALLEY.traits), either(VALLEY.kinds)
THING = f"{either(VALLEY.colours)} {either(VALLEY.things)}"
BY_GOAL = {place.split(" ", 1)[1]: place for place in VALLEY.places}

# What a pattern gives: n a name, w who acts (a name or a pronoun), o another character, p a place,
# g a place without its preposition, t a thing.
N = f"(?P<n>{either(NAMES)})"
W = f"(?P<w>{either([*NAMES, '[Ss]he', '[Hh]e'])})"
OTHER = f"(?P<o>{either(NAMES)})"
P = f"(?P<p>{either(VALLEY.places)})"
G = f"(?P<g>{either(BY_GOAL)})"
X = f"(?P<t>{THING})"
T = f"the {X}"
WORDS = f"(?:{TRAIT})? ?(?:{KIND})"
LINK = "(?:" + "|".join([
    "Then ", "Soon ", "After lunch ", "A little later ", "The next day ", r"One \w+ morning, ",
    r"One \w+ evening, ", r"On a \w+ day, "]) + ")?"

HOMES = [
    rf"Once upon a time, an? {WORDS} named {N} lived {P}\.",
    rf"(?:Her|His) name was {N}, and (?:she|he) lived {P}\.",
    rf"{N} the {WORDS} was \w+\. (?:She|He) had a little house {P}\.",
    rf"Long ago, an? {WORDS} called {N} lived {P}\.",
    rf"{N}, an? {WORDS}, lived {P}\.",
    rf"An? {WORDS} named {N} had a house {P}\.",
    rf"Everyone knew {N}, the {WORDS} {P}\.",
    rf"There was also {N}, an? {WORDS}, who lived {P}\.",
]
THINGS = [
    rf"{N} (?:had|owned) an? {X}\.",
    rf"An? {X} belonged to {N}\.",
    rf"An? {X} lay {P}\.",
    rf"Somebody had left an? {X} {P}\.",
]
EVENTS = {
    "move": [rf"{W} (?:walked to|ran all the way to|set off for) {G}\."],
    "carry": [rf"{W} carried {T} to {G}\.", rf"{W} went to {G} and took {T} along\."],
    "visit": [rf"{W} went to see {OTHER} {P}\.", rf"{W} joined {OTHER} {P}\.",
              rf"{W} looked for {OTHER} and found (?:her|him) {P}\."],
    "bring": [rf"{W} brought {T} to {OTHER} {P}\.",
              rf"{W} met {OTHER} {P} and gave (?:her|him) {T}\."],
    "give": [rf"{W} gave {OTHER} {T}\.", rf"{W} let {OTHER} have {T}\.",
             rf"{W} handed {T} to {OTHER} {P}\."],
    "drop": [rf"{W} put {T} down {P}\.", rf"{W} left {T} {P}\."],
    "take": [rf"{W} found {T} {P} and took it along\.",
             rf"{W} went to fetch {T}\. It was still {P}\."],
    "stay": [rf"{W} (?:took a nap|watched the clouds|had some soup) {P}\.",
             rf"{W} sat {P} and sang\."],
    "play": [rf"{W} (?:played with|showed everybody) {T} {P}\.", rf"{W} was very fond of {T}\."],
    "meet": [rf"{W} told {OTHER} a story\.", rf"{W} and {OTHER} laughed together\.",
             rf'{W} said to {OTHER}: "Good to see you!"'],
    "muse": [rf"{W} smiled\.", rf"{W} hummed a little song\."],
    "who": [rf"{W} wondered who had {T}\. It was with {OTHER} {P}\.",
            rf'{W} asked: "Where is {T}\?" It was with {OTHER} {P}\.'],
    "where": [rf"{W} thought of {OTHER}\. (?P=o) was {P}\.",
              rf"{W} looked around, and saw {OTHER} {P}\."],
    "lost": [rf"{W} wondered where {T} was\. It lay {P}\.",
             rf'{W} asked: "Where is {T}\?" It lay {P}\.'],
}
HERALD = re.compile(rf"There was once an? {WORDS}\. ")
PATTERNS = {"home": HOMES, "thing": THINGS}
PATTERNS |= {kind: [LINK + line for line in lines] for kind, lines in EVENTS.items()}
KINDS = {kind: [re.compile(line) for line in lines] for kind, lines in PATTERNS.items()}


def readings(body, at):
    """The sentences that may begin there, as (kind, match)."""
    found = []
    for kind, patterns in KINDS.items():
        matches = [pattern.match(body, at) for pattern in patterns]
        found += [(kind, match) for match in matches if match]
    return found


def read(text):
    """What a careful reader knows at the end of a story.

    Returns the last sentence to expect, as {thing: answer}, and where each character is, as {name:
    place}. Asserts that each sentence agrees with the others. A sentence of no kind, or of two,
    stops the reader.
    """
    where, holder, lies, last = {}, {}, {}, None
    body = text[:text.rindex("So now ")]
    herald = HERALD.match(body)
    at = herald.end() if herald else 0
    while at < len(body):
        found = readings(body, at)
        assert len(found) == 1, f"{len(found)} readings of {body[at:at + 60]!r}"
        ((kind, match),) = found
        at = match.end() + 1
        part = dict.fromkeys("npwotg") | match.groupdict()
        name, place, other, thing = part["n"], part["p"], part["o"], part["t"]
        if kind == "home":
            where[name] = place
        elif kind == "thing":
            assert thing not in holder and thing not in lies
            (holder if name else lies)[thing] = name or place
        else:
            who = part["w"] if part["w"] in where else last
            assert who, part["w"]
            if part["w"] not in where:
                assert part["w"].lower() == ("she" if who in VALLEY.she else "he"), part["w"]
            if kind in ("visit", "bring", "who", "where"):
                assert where[other] == place and other != who
            if kind in ("give", "meet"):
                assert where[other] == where[who]
            if kind in ("give", "drop", "play", "carry", "bring"):
                assert holder[thing] == who
            if kind in ("give", "drop", "stay", "play"):
                assert place in (None, where[who])
            if kind == "who":
                assert holder[thing] == other
            if kind in ("take", "lost"):
                assert lies[thing] == place
            if kind in ("move", "carry", "visit", "bring", "take"):
                where[who] = BY_GOAL[part["g"]] if part["g"] else place
            if kind in ("give", "bring", "take"):
                holder[thing] = other or who
                lies.pop(thing, None)
            if kind == "drop":
                lies[thing] = place
                del holder[thing]
            last = who
    held = {thing: f" is with {name}, {where[name]}." for thing, name in holder.items()}
    lying = {thing: f" lies {place}." for thing, place in lies.items()}
    return held | lying, where


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_answers_follow_from_the_text_alone(size):
    lying, setting = 0, SIZES[size].stories.setting
    for story in World(setting=setting).stories(2000):
        expected, _ = read(story.text)
        assert expected[story.asked.name.removeprefix("the ")] == story.answer, story.text
        assert len(expected) == len(story.things)
        lying += story.answer.startswith(" lies")
    assert 20 < lying < 1000


def test_the_reader_notices_a_wrong_story():
    story = next(s for s in World().stories(100) if " with " in s.answer)
    holder = story.asked.holder
    other = "Ben" if holder.name == "Tom" else "Tom"
    wrong = f" is with {other}, {holder.place}."
    expected, _ = read(story.question + wrong)
    assert expected[story.asked.name.removeprefix("the ")] == story.answer != wrong
    with pytest.raises(AssertionError, match="0 readings"):
        read("Tom flew to the moon. So now ")


def test_a_region_too_small_for_its_stories_is_refused():
    small = replace(TWO, places=("by the river",))
    with pytest.raises(ValueError, match="2 places"):
        World(small)
    with pytest.raises(ValueError, match="3 characters"):
        World(TWO, Setting(characters=(2, 3)))
    with pytest.raises(ValueError, match="2 objects: got 1 and 12"):
        World(replace(VALLEY, colours=("red",)), Setting(objects=(1, 2)))
