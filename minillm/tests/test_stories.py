"""The claims that the course builds on: probabilities are exact, one text has one origin, and the answers follow from the text."""
import itertools
import math
import re
import statistics
from dataclasses import replace

import pytest

from minillm.arc.sizes import SIZES
from minillm.data import shingles
from minillm.world import Setting, World, stories as module
from minillm.world.templates import VALLEY, Region

ONE = Region(she=("Mia",), he=(), kinds=("fox",), traits=("shy",), places=("by the river", "at the mill"),
             colours=("red",), things=("kite",))
TWO = Region(she=("Mia",), he=("Tom",), kinds=("fox", "owl"), traits=("shy", "honest"), places=("by the river", "at the mill"),
             colours=("red", "orange"), things=("kite", "apple"))


def trim(monkeypatch, sentences, links=2):
    """Fewer ways to say the same, so that the listings stay short: the openings that all settings share have only one way."""
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


CASES = {    # sentences of each kind that are left, region, setting, phrases that must occur in some story
    "pronouns, drops and takes": (2, ONE, Setting((1, 1), (1, 1), (2, 2)), (" she ", "put the red kite down", "took it along")),
    "two animals": (1, TWO, Setting((2, 2), (1, 1), (1, 1)), ("handed", "a visit", "brought", "who had", "I miss", "an honest owl")),
    "two objects": (3, ONE, Setting((1, 1), (1, 2), (1, 1)), ("It was still", "was very fond", "It lay")),
}


@pytest.mark.parametrize("case", CASES)
def test_probabilities_sum_to_one_and_no_text_has_two_origins(monkeypatch, case):
    sentences, region, setting, phrases = CASES[case]
    if setting.objects == (1, 2):
        region = Region(**{**vars(region), "colours": TWO.colours, "things": TWO.things})
    trim(monkeypatch, sentences)
    check_probabilities(World(region, setting), phrases)


def test_probabilities_where_characters_things_and_events_vary(monkeypatch):
    """As the setting of the size gpu has it. Of the events, those that say who has which of two things, each in one way."""
    trim(monkeypatch, 1, links=1)
    some = "walk", "give", "drop", "take", "who", "lost"
    monkeypatch.setattr(module, "EVENTS", {event: (weight, ways[-1:]) for event, (weight, ways) in module.EVENTS.items() if event in some})
    found = check_probabilities(World(TWO, Setting((1, 2), (1, 2), (0, 1))), ("handed the red apple", "Where is the orange kite", "Tom left the"))
    assert found == set(itertools.product((1, 2), (1, 2), (False, True)))


def check_probabilities(source, phrases):
    """The probabilities of all stories sum to one, and those drawn have the mean -log p of all; returns what numbers of
    characters and things occur, with and without an event."""
    stories = listed(source)
    assert len(stories) > 5000
    for phrase in phrases:
        assert any(phrase in story.text for story in stories), phrase
    entropy = -math.fsum(math.exp(story.logp) * story.logp for story in stories)
    sampled = [-story.logp for story in source.stories(2000)]
    error = statistics.stdev(sampled) / math.sqrt(len(sampled))
    assert abs(statistics.mean(sampled) - entropy) < 4 * error
    by_text = {story.text: story.logp for story in stories}
    assert all(abs(by_text[story.text] - story.logp) < 1e-9 for story in source.stories(200, "heldout"))
    return {(len(story.characters), len(story.things), "One " in story.text) for story in stories}


MEDIUM = Region(she=("Mia", "Vera"), he=("Tom", "Ben"), kinds=("fox", "owl", "cat"), traits=("shy", "honest", "proud"),
                places=("by the river", "at the mill", "on the hill"), colours=("red", "blue"), things=("kite", "apple"))


@pytest.mark.parametrize("seed", range(6))
def test_logprob_finds_the_one_origin_of_a_text(seed):
    source = World(MEDIUM, Setting((2, 3), (1, 2), (2, 4)))
    story = source.sample(seed)
    ways = list(source.enumerate(wanted=story.text))
    assert len(ways) == 1 and abs(ways[0].logp - story.logp) < 1e-9
    assert abs(source.logprob(story.text) - story.logp) < 1e-9


@pytest.mark.parametrize("change", [lambda text: text + " ", lambda text: text[:-1], lambda text: text.lower(), lambda text: "",
                                    lambda text: text.replace("So now the", "So now a")])
def test_logprob_of_what_cannot_be_told(change):
    source = World(ONE, Setting((1, 1), (1, 1), (1, 2)))
    assert source.logprob(change(source.sample(0).text)) == -math.inf


def test_every_number_in_a_range_occurs_and_no_other():
    stories = World(setting=Setting((2, 4), (1, 3), (4, 12))).stories(500)
    assert {len(s.characters) for s in stories} == {2, 3, 4} and {len(s.things) for s in stories} == {1, 2, 3}
    assert {s.asked is s.things[-1] for s in stories} == {True, False}


def test_sampling_depends_on_seed_and_split_only():
    assert [s.text for s in World().stories(5, start=10)] == [World().sample(seed).text for seed in range(10, 15)]
    train, heldout = ({s.text for s in World().stories(3000, split)} for split in ("train", "heldout"))
    assert len(train) == len(heldout) == 3000 and not train & heldout


def test_samples_are_not_alike():
    for split in "train", "heldout":
        for a, b in itertools.combinations([shingles(s.text) for s in World().stories(10, split)], 2):
            assert len(a & b) / len(a | b) < 0.2


# ---- a second opinion: a reader that knows English, not the program

NAME, THING = rf"({'|'.join(VALLEY.she + VALLEY.he)})", rf"(?:{'|'.join(VALLEY.colours)}) (?:{'|'.join(VALLEY.things)})"
PLACE, WHO = rf"({'|'.join(VALLEY.places)})", rf"({'|'.join(VALLEY.she + VALLEY.he)}|[Ss]he|[Hh]e)"
BY_GOAL = {place.split(" ", 1)[1]: place for place in VALLEY.places}
GOAL = rf"({'|'.join(BY_GOAL)})"
WORDS = rf"({'|'.join(VALLEY.traits)})? ?({'|'.join(VALLEY.kinds)})"
LINK = r"(?:Then |Soon |After lunch |A little later |The next day |One \w+ morning, |One \w+ evening, |On a \w+ day, )?"


N, W, O, P, G, T = rf"(?P<n>{NAME})", rf"(?P<w>{WHO})", rf"(?P<o>{NAME})", rf"(?P<p>{PLACE})", rf"(?P<g>{GOAL})", rf"the (?P<t>{THING})"
X = rf"(?P<t>{THING})"
HOMES = [re.compile(line + r"\.") for line in [
    rf"Once upon a time, an? {WORDS} named {N} lived {P}", rf"(?:Her|His) name was {N}, and (?:she|he) lived {P}",
    rf"{N} the {WORDS} was \w+\. (?:She|He) had a little house {P}", rf"Long ago, {P}, there lived an? {WORDS} called {N}",
    rf"{N}, an? {WORDS}, lived {P}", rf"An? {WORDS} named {N} had a house {P}", rf"Everyone knew {N}, the {WORDS} {P}",
    rf"There was also {N}, an? {WORDS}, who lived {P}"]]
THINGS = [re.compile(line + r"\.") for line in [
    rf"{N} (?:had|owned) an? {X}", rf"An? {X} belonged to {N}", rf"An? {X} lay {P}", rf"Somebody had left an? {X} {P}"]]
EVENTS = {kind: [re.compile(LINK + line) for line in lines] for kind, lines in {
    "move": [rf"{W} (?:walked to|ran all the way to|set off for) {G}\."],
    "carry": [rf"{W} carried {T} to {G}\.", rf"{W} went to {G} and took {T} along\."],
    "visit": [rf"{W} went to see {O} {P}\.", rf"{W} paid {O} a visit {P}\.", rf"{W} looked for {O} and found (?:her|him) {P}\."],
    "bring": [rf"{W} brought {T} to {O}, who was {P}\.", rf"{W} met {O} {P} and gave (?:her|him) {T}\."],
    "give": [rf"{W} gave {O} {T}\.", rf"{W} let {O} have {T}\.", rf"{W} handed {T} to {O} {P}\."],
    "drop": [rf"{W} put {T} down {P}\.", rf"{W} left {T} {P}\."],
    "take": [rf"{W} found {T} {P} and took it along\.", rf"{W} went to fetch {T}\. It was still {P}\."],
    "stay": [rf"{W} (?:took a nap|watched the clouds|had some soup) {P}\.", rf"{W} sat {P} and sang\."],
    "play": [rf"{W} (?:played with|showed everybody) {T} {P}\.", rf"{W} was very fond of {T}\."],
    "meet": [rf"{W} told {O} a story\.", rf"{W} and {O} laughed together\.", rf'{W} said to {O}: "Good to see you!"'],
    "muse": [rf"{W} was as (?:{'|'.join(VALLEY.traits)}) as ever\.", rf"{W} the (?:{'|'.join(VALLEY.kinds)}) smiled\."],
    "who": [rf"{W} wondered who had {T}\. It was with {O}, {P}\.", rf'{W} asked: "Where is {T}\?" It was with {O}, {P}\.'],
    "where": [rf"{W} wondered where {O} was\. (?P=o) was {P}\.", rf'"I miss {O}," said {W}\. But (?P=o) was only {P}\.'],
    "lost": [rf"{W} wondered where {T} was\. It lay {P}\.", rf'{W} asked: "Where is {T}\?" It lay {P}\.'],
}.items()}
HERALD = re.compile(rf"There was once an? {WORDS}\. ")
KINDS = {"home": HOMES, "thing": THINGS, **EVENTS}    # a sentence of no kind, or of two, stops the reader


def read(text):
    """The last sentence that a careful reader expects, as {thing: answer}, and where each character is, as {name: place}; asserts that
    each sentence agrees with the others."""
    where, holder, lies, last = {}, {}, {}, None
    body = text[:text.rindex("So now ")]
    at = match.end() if (match := HERALD.match(body)) else 0
    while at < len(body):
        found = [(kind, m) for kind, many in KINDS.items() for pattern in many if (m := pattern.match(body, at))]
        assert len(found) == 1, f"{len(found)} readings of {body[at:at + 60]!r}"
        (kind, m), = found
        at = m.end() + 1
        part = {"n": None, "p": None, "w": None, "o": None, "t": None, "g": None} | m.groupdict()
        name, place, other, thing = part["n"], part["p"], part["o"], part["t"]
        if kind == "home":
            where[name] = place
        elif kind == "thing":
            assert thing not in holder and thing not in lies
            (holder if name else lies)[thing] = name or place
        else:
            who = part["w"] if part["w"] in where else last
            assert who and (part["w"] in where or part["w"].lower() == ("she" if who in VALLEY.she else "he")), part["w"]
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
    return ({thing: f" is with {name}, {where[name]}." for thing, name in holder.items()}
            | {thing: f" lies {place}." for thing, place in lies.items()}), where


@pytest.mark.parametrize("setting", [SIZES["cpu"].stories.setting, SIZES["gpu"].stories.setting], ids=("cpu", "gpu"))
def test_answers_follow_from_the_text_alone(setting):
    lying = 0
    for story in World(setting=setting).stories(2000):
        expected, _ = read(story.text)
        assert expected[story.asked.name.removeprefix("the ")] == story.answer, story.text
        assert len(expected) == len(story.things)
        lying += story.answer.startswith(" lies")
    assert 20 < lying < 1000


def test_the_reader_notices_a_wrong_story():
    story = next(s for s in World().stories(100) if " with " in s.answer)
    name = story.asked.holder.name
    wrong = story.text[:-len(story.answer)] + f" is with {'Tom' if name != 'Tom' else 'Ben'}, {story.asked.holder.place}."
    assert read(wrong)[0][story.asked.name.removeprefix("the ")] == story.answer != wrong[len(story.question):]
    with pytest.raises(AssertionError, match="0 readings"):
        read("Tom flew to the moon. So now ")


def test_a_region_too_small_for_its_stories_is_refused():
    small = Region(("Vera",), ("Tom",), ("fox", "owl"), ("shy", "odd"), ("by the river",), ("red",), ("kite",))
    with pytest.raises(ValueError, match="2 places"):
        World(small)
    with pytest.raises(ValueError, match="3 characters"):
        World(replace(small, places=("by the river", "at the mill")), Setting(characters=(2, 3)))
    with pytest.raises(ValueError, match="2 objects: got 1 and 12"):
        World(replace(VALLEY, colours=("red",)), Setting(objects=(1, 2)))
