"""The reader of the story world: exact probabilities, and the kinds of faults.

Whether a text is possible is compared with a list of all stories in small worlds, and with the
reader of test_stories, which knows English and not the program, in large ones.
"""
import math
import random
import re
from dataclasses import replace

import pytest

from minillm.tests import test_stories
from minillm.tests.test_stories import ONE, TWO, trim
from minillm.world import Setting, World, grammar, reader, stories
from minillm.world.reader import KINDS, read
from minillm.world.templates import HARBOUR, VALLEY

RICH = Setting((2, 4), (1, 3), (4, 12))
FEW = replace(ONE, colours=TWO.colours, things=TWO.things)
MEDIUM = replace(TWO, she=("Mia", "Vera"), he=("Tom", "Ben"), kinds=("fox", "owl", "cat"),
                 traits=("shy", "honest", "proud"))

# ---- possible or not: compared with all stories of a small world

# ways to say the same that are left, region, setting
CASES = {
    "two events": (1, ONE, Setting((1, 1), (1, 1), (2, 2))),
    "two animals": (1, TWO, Setting((2, 2), (1, 1), (1, 1))),
    "two objects": (1, FEW, Setting((1, 1), (1, 2), (1, 1))),
    "perhaps no event": (1, replace(FEW, she=("Mia", "Vera")), Setting((1, 1), (1, 2), (0, 1))),
}


@pytest.fixture(params=CASES)
def listed(monkeypatch, request):
    """Region, setting, and the log-probability of each text that can be told."""
    ways, region, setting = CASES[request.param]
    trim(monkeypatch, ways)
    found = {}
    for story in World(region, setting).enumerate():
        found.setdefault(story.text, []).append(story.logp)
    assert len(found) > 2000 and (setting.events[0] == 0 or max(map(len, found.values())) == 1)
    logps = {text: math.log(math.fsum(map(math.exp, ways))) for text, ways in found.items()}
    return region, setting, logps


def test_reads_every_story_and_nothing_else(listed):
    region, setting, logps = listed
    rng = random.Random(0)
    texts = rng.sample(sorted(logps), len(logps) if len(logps) < 4000 else 1000)
    found = {text: read(text, region, setting).logp for text in texts}
    assert all(abs(found[text] - logps[text]) < 1e-9 for text in texts)
    if len(found) == len(logps):
        assert abs(math.fsum(map(math.exp, found.values())) - 1) < 1e-9
    possible = 0
    for text, another in zip(texts[:1000], texts[1:]):
        text = mutated(text, another, rng)
        reading = read(text, region, setting)
        assert abs(reading.logp - logps[text]) < 1e-9 if text in logps else reading.fault, text
        assert reading.fault is None or reading.fault.kind in KINDS
        possible += text in logps
    assert 100 < possible < 700


def mutated(text, another, rng):
    """The text with one small change, or a mixture with another text."""
    sentences, others = split(text), split(another)
    i, j = rng.randrange(len(sentences)), rng.randrange(len(others))
    change = rng.randrange(8)
    if change < 4:
        # One word or phrase becomes another of its kind, from this world or from a larger one.
        groups = [*SWAPS, *vars(VALLEY).values()]
        group = rng.choice([group for group in groups if any(word in text for word in group)])
        old = rng.choice([word for word in group if word in text])
        spot = rng.choice([match.start() for match in re.finditer(re.escape(old), text)])
        return text[:spot] + rng.choice(group) + text[spot + len(old):]
    if change == 4:
        del sentences[i]
    elif change == 5:
        sentences.insert(i, sentences[rng.randrange(len(sentences))])
    elif change == 6:
        k = rng.randrange(len(sentences))
        sentences[i], sentences[k] = sentences[k], sentences[i]
    else:
        sentences[i] = others[j]
    return " ".join(sentences)


# Words that are mistaken for each other: those of the small worlds are more likely to fit.
SWAPS = [
    ["Mia", "Tom"], ["Mia", "Vera"], ["Mia", "she", "She", "her"], ["Tom", "he", "He", "him"],
    [" she ", " he ", " Mia "], ["She ", "He ", "Mia ", "Tom "], [" her ", " him "], ["fox", "owl"],
    ["shy", "honest"], ["a shy", "an honest"], ["river", "mill"], ["by the river", "at the mill"],
    ["red", "orange"], ["kite", "apple"], ["a red", "an orange"], [" a ", " an "], ["the ", "The "],
    ["Then ", "Soon ", "then "], ["warm", "cold"], ["morning", "evening"], [". ", ".  ", " "],
    ["It lay ", "It was with Mia, "], ["is with Mia,", "is with Tom,", "lies"], ["put", "left"],
]


def split(text):
    """The sentences of a text."""
    return re.findall(r'\S.*?[.!?]"?(?= |$)', text)


# ---- large worlds

@pytest.mark.parametrize("setting", [Setting(), RICH], ids=["plain", "rich"])
@pytest.mark.parametrize("region", [VALLEY, HARBOUR], ids=["valley", "harbor"])
def test_sampled_stories_have_their_probability_and_facts(region, setting):
    for story in World(region, setting).stories(200):
        reading = read(story.text, region, setting)
        assert abs(reading.logp - story.logp) < 1e-9 and reading.fault is None
        assert [vars(c) for c in reading.characters] == [vars(c) for c in story.characters]
        assert [facts(x) for x in reading.things] == [facts(x) for x in story.things]


def facts(thing):
    return thing.name, thing.holder and thing.holder.name, thing.place


def test_what_is_possible_agrees_with_a_reader_that_knows_english():
    """What the reader takes for possible makes sense to the other one.

    A change of one sentence that makes no sense to the other one is a fault in it or later.
    """
    rng, possible, senseless = random.Random(1), 0, 0
    texts = [story.text for story in World(setting=RICH).stories(400)]
    for text, another in zip(texts, texts[1:]):
        text = mutated(text, another, rng)
        reading = read(text, setting=RICH)
        try:
            answers, places = test_stories.read(text)
        except (AssertionError, KeyError, ValueError):
            assert reading.fault, text
            senseless += 1
        if not reading.fault:
            possible += 1
            asked, answer = re.search(r"So now the (\w+ \w+)( .*)", text).groups()
            assert answers[asked] == answer
            assert places == {c.name: c.place for c in reading.characters}
    assert possible > 10 and senseless > 100


# ---- kinds of faults

HOMES = "Once upon a time, a shy fox named Anna lived at the mill. Tom, a brave owl, lived {}. "
START = HOMES.format("by the river") + "Anna had a red kite. One warm morning, "
NEAR = HOMES.format("at the mill") + "Anna had a red kite. One warm morning, "
LYING = HOMES.format("at the mill") + "A red kite lay on the hill. One warm morning, "
THREE = "Anna took a nap at the mill. She sat at the mill and sang. Tom walked to the hill. "
MUSED = "Anna smiled. "

# kind, what comes before, the first sentence that cannot be told, why
FAULTS = [
    ("order", "", "Anna, a shy fox, lived at the mill.", "it cannot introduce the first"),
    ("order", HOMES[:58], "Long ago, a brave owl called Tom lived at the mill.", "it can o"),
    ("order", START + MUSED, "Ida, a quiet goose, lived at the mill.", "characters come before"),
    ("order", START + MUSED, "Tom owned a blue drum.", "things come before events"),
    ("order", START[:-18], "Anna smiled.", "a time of day"),
    ("order", START[:-18], "Then Anna smiled.", "a time of day"),
    ("order", START + MUSED, "On a cold day, Anna smiled.", "a time of day"),
    ("length", HOMES.format("by the river"), "Ida, a quiet goose, lived at the mill.", "more than"),
    ("length", HOMES[:58], "Anna had a red kite.", "characters: 1 instead of 2 or more"),
    ("length", START[:-18], "Tom owned a blue drum.", "things: more than 1"),
    ("length", START + 2 * MUSED, "So now the red kite is with Anna, at the mill.", "events: 2"),
    ("length", START + 6 * MUSED, "Then Tom walked to the hill.", "events: more than 6"),
    ("length", START + THREE + "So now the red kite is with Anna, at the mill. ", "The end.",
     "has ended"),
    ("pronoun", "", "There was once a shy fox. His name was Anna, and he lived at the mill.",
     '"he" cannot be Anna'),
    ("pronoun", "", "Anna the fox was shy. He had a little house at the mill.", '"he" cannot be A'),
    ("pronoun", HOMES.format("by the river"), "He had a red kite.", "in place of a name"),
    ("pronoun", START, "She smiled.", '"she" before anyone has done anything'),
    ("pronoun", START + MUSED, "He took a nap at the mill.", '"he" cannot be Anna here'),
    ("pronoun", START + MUSED, "Then she walked to the hill.", '"she" cannot be Anna here'),
    ("pronoun", NEAR + MUSED, "She and Tom laughed together.", '"she" in place of a name'),
    ("pronoun", START, "Anna went to see him by the river.", '"him" in place of a name'),
    ("pronoun", START, "Anna looked for Tom and found her by the river.", '"her" cannot be Tom'),
    ("stranger", HOMES.format("by the river"), "Ida had a red kite.", "Ida was not introduced"),
    ("stranger", START, "Ida took a nap at the mill.", "Ida was not introduced"),
    ("stranger", START, "Anna went to see Ida by the river.", "Ida was not introduced"),
    ("stranger", START, "Anna was very fond of the red drum.", "the red drum was not introduced"),
    ("stranger", START + THREE, "So now the red kite is with Ida, at the mill.", "Ida was not"),
    ("stranger", START + THREE, "So now the blue kite lies at the mill.", "the blue kite was not"),
    ("self-reference", START, "Anna told Anna a story.", "Anna is both"),
    ("self-reference", START + MUSED, "She gave Anna the red kite.", "Anna is both"),
    ("self-reference", START + MUSED,
     "She thought of Anna. Anna was at the mill.", "Anna is both"),
    ("self-reference", START, "Tom looked around, and saw Tom by the river.", "Tom is b"),
    ("self-reference", START + MUSED,
     "Soon she wondered who had the red kite. It was with Anna at the mill.", "Anna is both"),
    ("repeat", HOMES[:58], "Anna, a brave owl, lived by the river.", "Anna again, after the shy f"),
    ("place", START, "Anna took a nap by the river.", "Anna is at the mill, not by the river"),
    ("place", START, "Anna walked to the mill.", "Anna is already at the mill"),
    ("place", NEAR, "Anna joined Tom at the mill.", "Anna is already at the mill"),
    ("place", START, "Anna joined Tom on the hill.", "Tom is by the river, not on the hill"),
    ("place", START, "Anna told Tom a story.", "Tom is by the river, not at the mill"),
    ("place", START, "Anna gave Tom the red kite.", "Tom is by the river, not at the mill"),
    ("place", START, "Anna left the red kite by the river.", "Anna is at the mill, not by the"),
    ("place", START, "Tom wondered who had the red kite. It was with Anna in the barn.",
     "Anna is at the mill, not in the barn"),
    ("place", START, "Tom thought of Anna. Anna was by the river.", "Anna is at the mill"),
    ("place", LYING, "Tom wondered where the red kite was. It lay in the barn.",
     "the red kite is on the hill, not in the barn"),
    ("place", LYING, "Anna found the red kite in the barn and took it along.",
     "the red kite is on the hill, not in the barn"),
    ("place", START + THREE, "So now the red kite is with Anna, on the hill.", "Anna is at the m"),
    ("place", LYING + THREE, "So now the red kite lies at the mill.", "the red kite is on the hi"),
    ("holder", NEAR, "Tom gave Anna the red kite.", "the red kite is with Anna, not with Tom"),
    ("holder", START, "Tom gave Anna the red kite.", "the red kite is with Anna, not with Tom"),
    ("holder", START, "Tom left the red kite by the river.", "with Anna, not with Tom"),
    ("holder", LYING, "Tom played with the red kite at the mill.", "on the hill, not with Tom"),
    ("holder", NEAR, "Tom found the red kite at the mill and took it along.",
     "the red kite is with Anna, not at the mill"),
    ("holder", START, "Anna wondered who had the red kite. It was with Tom by the river.",
     "the red kite is with Anna, not with Tom"),
    ("holder", LYING, "Anna wondered who had the red kite. It was with Tom at the mill.",
     "the red kite is on the hill, not with Tom"),
    ("holder", START, "Tom wondered where the red kite was. It lay at the mill.", "with Anna, not"),
    ("holder", START + THREE, "So now the red kite is with Tom, on the hill.", "with Anna, not"),
    ("holder", START + THREE, "So now the red kite lies on the hill.", "with Anna, not on the hil"),
    ("wording", "", "Hello!", "no sentence of the world"),
    ("wording", HOMES[:58], "Tom, an brave owl, lived by the river.", "write it differently"),
    ("wording", HOMES.format("by the river"), "Anna had a orange kite.", "write it differently"),
    ("wording", START, "anna smiled.", "write it differently"),
    ("wording", START + MUSED, "she smiled.", "write it differently"),
    ("wording", START + MUSED, "Then She smiled.", "write it differently"),
    ("wording", START, "Anna flew to the moon.", "no sentence of the world"),
    ("wording", START, "Anna smiled at the mill.", "no sentence of the world"),
    ("wording", START, "Olga smiled.", "no sentence of the world"),
    ("wording", START + "Anna thought of Tom. ", "Ida was by the river.", "no sentence"),
    ("wording", HOMES[:57] + "\n", "Tom, a brave owl, lived by the river.", "no sentence"),
    ("wording", START + MUSED + " ", "Anna smiled.", "no sentence of the world"),
]


@pytest.mark.parametrize("kind, before, sentence, why", FAULTS)
def test_faults_are_found_and_named(kind, before, sentence, why):
    opened = before.endswith("morning, ")
    for after in "", " Then Tom flew to the moon.", " Bananas":
        fault = read(before + sentence + after).fault
        assert fault.kind == kind and why in fault.why
        assert fault.sentence == "One warm morning, " * opened + sentence


def test_colors_and_nouns_of_things_differ():
    before = START[:-18]
    for sentence, why in (("Tom owned a red drum.", "red again, after the red kite"),
                          ("Tom owned a blue kite.", "kite again, after the red kite")):
        fault = read(before + sentence, setting=RICH).fault
        assert (fault.kind, fault.sentence, fault.why) == ("repeat", sentence, why)


def test_every_kind_of_fault_has_an_example():
    assert {kind for kind, *_ in FAULTS} | {"unfinished"} == set(KINDS)


def test_any_beginning_of_a_story_is_unfinished():
    for story in World().stories(2):
        for n in range(len(story.text)):
            fault = read(story.text[:n]).fault
            assert fault.kind == "unfinished" and story.text[:n].endswith(fault.sentence)


def test_what_is_introduced_before_the_fault_is_known():
    reading = read(NEAR + "Anna gave Tom the red kite. Tom was very fond of the red drum.")
    assert reading.logp == -math.inf and reading.fault.kind == "stranger"
    assert [(c.name, c.trait, c.kind) for c in reading.characters] == [
        ("Anna", "shy", "fox"), ("Tom", "brave", "owl")]
    assert facts(reading.things[0]) == ("the red kite", "Tom", None)
    # To find the fault, the reader tries other states; the true one is kept.
    reading = read(START + "Tom gave Anna the red kite.")
    assert [c.place for c in reading.characters] == ["at the mill", "by the river"]
    assert facts(reading.things[0]) == ("the red kite", "Anna", None)


def test_a_failed_try_leaves_no_trace():
    before, after = (reader.Reader(START + MUSED + text, VALLEY, Setting())
                     for text in ("", "then Tom took a nap by the river."))
    assert before.read().kind == "unfinished" and after.read().kind == "wording"
    assert before.teller.logp == after.teller.logp < -30
    assert before.scene.places == after.scene.places
    assert before.scene.subject.name == after.scene.subject.name == "Anna"


# ---- any text, any templates

def test_no_text_raises_an_error():
    rng = random.Random(2)
    story = World(setting=RICH).sample(0).text
    letters = story + "éſKİ猫\0\n\t{}()[]\\|?*\ud800"
    texts = [
        "", " ", "\n", ".", '"', "!?" * 1000, "a" * 100_000, "猫。" * 100, "{name} lived {P}.",
        story + "\n", story + " ", story + story, story.upper(), story.lower(), START * 50,
        START + MUSED * 2000,
        START + "ſhe smiled.", START + "Anna ſmiled.",
        "She, a shy fox, lived at the mill.", START + "She and her laughed together.",
        START + "Him gave his the red kite.", START + "So now the red kite is with her.",
    ]
    for _ in range(500):
        spot = rng.randrange(len(story))
        texts.append(story[:spot] + rng.choice(letters) + story[spot + rng.randrange(20):])
        texts.append(" ".join(rng.sample(story.split(" "), 10)))
        texts.append(" ".join(rng.sample(split(story), 5)))
    for text in texts:
        reading = read(text, setting=RICH)
        assert (reading.logp == -math.inf) == (reading.fault is not None)
        assert reading.fault is None or reading.fault.kind in KINDS


def test_other_templates_need_no_other_reader(monkeypatch):
    """With new words, weights and sentences.

    One does not say who has the thing, one is the beginning of another, and one never occurs.
    """
    events = {event: (2 * weight + 1, ways[:2]) for event, (weight, ways) in stories.EVENTS.items()}
    events["walk"] = 3, ("suddenly, {N} danced to {G}!", "{P}! That is where {S} went.")
    events["who"] = 5, ("{S} dreamed of {T}. Somebody had {T} {P}.", "{T}, {S} had not forgotten.")
    events["rest"] = 0, ("{S} rested.",)
    events["muse"] = 3, ("{S} slept.", "{S} slept. What a day!")
    new = {"EVENTS": events, "LINKS": (("", 1), ("So ", 4), ("So then, ", 2)),
           "LIES": "{P} one finds {T} now.", "FIRST": ("{A} {kind} lived {P}: {name}.",)}
    for module in stories, grammar, reader:
        for name in new.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, new[name])
    grammar.grammar.cache_clear()
    try:
        for story in World(setting=RICH).stories(200):
            assert abs(read(story.text, setting=RICH).logp - story.logp) < 1e-9, story.text
        never = START.replace(HOMES[:58], "A shy fox lived at the mill: Anna. ") + "Anna rested."
        assert read(never).fault.kind == "wording"
    finally:
        grammar.grammar.cache_clear()


def test_places_that_differ_in_the_preposition_only_are_refused():
    with pytest.raises(ValueError, match="preposition"):
        read("", replace(MEDIUM, places=("by the river", "in the river")))
