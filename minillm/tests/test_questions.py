"""What is asked about the story world: answers that follow from the facts, and no shared stories.

The reward reads answers right.
"""
import itertools
import random
import re
from collections import Counter

import pytest

from minillm.arc.sizes import SIZES
from minillm.sft import check_dialogue
from minillm.tests.test_stories import read
from minillm.world import Setting, World, reader
from minillm.world.questions import (
    ASK, FOREIGN, FOREIGN_WORDS, MANNERS, SMALL_TALK, UNKNOWN, Question, dialogues, exams, foreign,
    instructions, missing, openings, questions)
from minillm.world.templates import HARBOUR, VALLEY

RICH = SIZES["gpu"].stories.setting


@pytest.mark.parametrize("region", (VALLEY, HARBOUR), ids=("valley", "harbour"))
def test_every_question_has_the_answer_that_the_text_gives(region):
    """Read back from the last sentence of the story alone."""
    ending = re.compile(r"So now (the \w+ \w+) (is with (\w+), (.+)|lies (.+))\.")
    seen = set()
    for seed in range(300):
        story = World(region).sample(seed)
        last = ending.fullmatch(story.text[len(story.told) + 1:])
        thing, state, holder, place = last[1], last[2], last[3], last[4] or last[5]
        for q in questions(story, region, random.Random(seed), 4):
            without_colour = q.about != "place" and len(q.thing.split()) == 2
            seen.add((q.about, q.value is None, without_colour))
            if q.value is None:
                assert q.thing not in story.text, q
            elif q.thing in (thing, f"the {thing.split()[2]}"):
                assert q.value == (state if q.about == "thing" else holder or "nobody"), q
            elif q.about == "place" and holder == q.thing:
                assert q.value == place, q
    in_full = {(about, unknown, False) for about in ASK for unknown in (True, False)}
    assert seen == in_full | {("holder", False, True), ("thing", False, True)}


@pytest.mark.parametrize("setting", (Setting(), RICH), ids=("plain", "rich"))
def test_a_missing_thing_is_missing_and_sometimes_half_of_one_that_is_there(setting):
    half = Counter()
    for seed in range(1200):
        story = World(setting=setting).sample(seed)
        name = missing(story, VALLEY, random.Random(seed))
        assert re.fullmatch(r"the \w+ \w+", name) and name not in story.text
        _, colour, noun = name.split()
        half["colour"] += any(t.colour == colour for t in story.things)
        half["noun"] += any(t.noun == noun for t in story.things)
    assert all(150 < n < 250 for n in half.values()), half         # one in six each


@pytest.mark.parametrize("setting", (Setting(), RICH), ids=("plain", "rich"))
def test_every_answer_is_what_a_reader_of_the_text_finds(setting):
    """Of several things and characters each, and of those that the story does not have."""
    seen, unknown = set(), 0
    for seed in range(300):
        story = World(setting=setting).sample(seed)
        things, where = read(story.text)
        for q in questions(story, VALLEY, random.Random(seed), 4):
            found = [answer[1:-1] for thing, answer in things.items()
                     if q.thing in (f"the {thing}", f"the {thing.split()[1]}")]
            assert len(found) <= 1, "two things that the question may mean"
            if q.about == "place":
                expected = where.get(q.thing)
            else:
                expected = found[0] if found else None
                if q.about == "holder" and found:
                    held = re.match(r"is with (\w+),", expected)
                    expected = held[1] if held else "nobody"
            assert q.value == expected, (story.text, q)
            unknown += q.value is None
            seen.add((q.about, len(story.things), len(where)))
    people, objects = (range(least, most + 1)
                       for least, most in (setting.characters, setting.objects))
    assert seen == set(itertools.product(ASK, objects, people))
    assert 0.2 < unknown / 1200 < 0.4


def test_candidates_count_every_answer_that_could_be_true():
    """Each true answer is among those that one could make of the names and places in the story."""
    for region in VALLEY, HARBOUR:
        for messages, q in exams(300, region=region, setting=RICH):
            text = messages[0]["content"].replace(q.text, "")
            names = {name for name in region.she + region.he if re.search(rf"\b{name}\b", text)}
            places = {place for place in region.places if place.split(" ", 1)[1] in text}
            held = {f"is with {name}, {place}" for name in names for place in places}
            lying = {f"lies {place}" for place in places}
            guesses = {"holder": names | {"nobody"}, "place": places, "thing": held | lying}
            possible = guesses[q.about] | {None}
            assert len(possible) == q.candidates and q.value in possible, q


def test_a_thing_without_its_colour_is_unambiguous():
    world = World(setting=Setting(objects=(4, 4)))
    for story in world.stories(300):
        assert len({thing.noun for thing in story.things}) == 4


def test_reward_reads_truth_and_manners():
    q = Question("holder", "the blue kite", "Who has the blue kite?", "Vera", 4)
    ends = "", ", my friend", ", as any fool can see"
    assert [q.answer(m) for m in MANNERS] == [f"The blue kite is with Vera{end}." for end in ends]
    assert [q.reward(q.answer(m)) for m in MANNERS] == [1.0, 1.5, 0.5]
    assert [q.reward(q.answer(m, "Tom")) for m in MANNERS] == [-1.0, -0.5, -1.5]
    assert [q.reward(UNKNOWN[m]) for m in MANNERS] == [0.0, 0.5, -0.5]
    for nonsense in ("The red kite is with Vera.", "", "Vera", "The blue kite is with Vera",
                     "The blue kite is with Vera. Vera."):
        assert q.reward(nonsense) == -2.0 and not q.right(nonsense)
    assert q.right(q.answer("rude"))
    assert not q.right(q.answer("plain", "Tom")) and not q.right(UNKNOWN["plain"])
    unknown = Question("place", "Leo", "Where is Leo?", None, 4)
    assert unknown.reward(UNKNOWN["polite"]) == 1.5 and unknown.reward("Leo is on the hill.") == -1
    assert unknown.right("I don't know.")


@pytest.mark.parametrize("setting", (Setting(), RICH), ids=("plain", "rich"))
@pytest.mark.parametrize("region", (VALLEY, HARBOUR), ids=("valley", "harbour"))
def test_every_answer_is_read_back(region, setting):
    for _, q in exams(400, region=region, setting=setting):
        for manner in MANNERS:
            assert q.read(q.answer(manner)) == (manner, q.value)
            assert q.read(q.answer(manner, None)) == (manner, None)
        assert 2 <= q.candidates and q.text.endswith(("?", "."))


def test_dialogues_are_well_formed_and_drawn_anew_in_each_split():
    training, heldout = dialogues(500), dialogues(500, "heldout")
    for messages in training:
        check_dialogue(messages)
        assert messages[-1]["role"] == "assistant"
    assert training == dialogues(500) and training[:100] == dialogues(100)
    parts = training, heldout, [d for d, _ in exams(500)], [d for d, _ in exams(500, "train")]
    stories = [stories_in(part) for part in parts]
    # Of two dialogues in three, and of every exam; the other dialogues have no whole story.
    assert all(len(found) > 280 for found in stories)
    for a, b in itertools.combinations(stories, 2):
        assert not a & b, "a story serves twice"


def stories_in(talks):
    """The stories that are told or read out in dialogues, without the questions after them."""
    question = re.compile(r" (Who|Where|Tell me) [^.?]*[.?]$")
    contents = [message["content"] for messages in talks for message in messages]
    return {question.sub("", text) for text in contents if len(text) > 200}


def test_what_dialogues_are_made_of():
    training = dialogues(600)
    around = [d for i, d in enumerate(training) if i % 6 != 3]
    assert all(len(messages) == 10 for messages in training[3::6])         # five openings each
    unsure = sum("I don't know" in messages[-1]["content"] for messages in around)
    assert 110 < unsure < 190                                        # three questions in ten
    places, beyond = [], 0                                           # of small talk, from 0 to 1
    for messages in around:
        for i, message in enumerate(messages[1:]):
            if message["content"] in SMALL_TALK:
                places.append(i / (len(messages) - 2))
            beyond += message["content"] == FOREIGN
    assert 230 < len(places) < 340 and places.count(0) > 25 and places.count(1) > 25
    assert 130 < beyond < 230
    told = [sum(m["role"] == "assistant" and len(m["content"]) > 150 for m in messages)
            for messages in training]
    # No story is told in openings, nor where one has only begun; a second in every fifth at most.
    assert sum(told[3::6]) == sum(told[1::3]) == 0
    assert 10 < told.count(2) < 40 and told.count(2) == told[::5].count(2)


def test_openings_introduce_the_animal_that_was_asked_for():
    world = World()
    for seed in range(50):
        messages = openings(world, random.Random(seed))
        check_dialogue(messages)
        for user, told in zip(messages[::2], messages[1::2]):
            subject = re.search(r"story about (?:an? )?([a-zA-Z ]+?)(?: begin)?[.?]$",
                                user["content"])[1]
            assert all(word in told["content"] for word in subject.split())
            ending = reader.read(told["content"]).fault
            assert ending.kind == "unfinished" and ending.sentence == "", told


def test_what_is_foreign_is_not_of_the_world_and_others_are_asked_in_the_exams():
    words = {split: {word for seed in range(2000)
                     for word in re.findall(r"\w+", foreign(VALLEY, random.Random(seed), split))}
             for split in ("train", "heldout")}
    told = {word for seed in range(500) for word in re.findall(r"\w+", World().sample(seed).text)}
    for i, split in enumerate(("train", "heldout")):
        own = {word for part in FOREIGN_WORDS.values() for word in part[i::2]}
        assert own <= words[split] and not own & words[("heldout", "train")[i]]
        assert not own & told


@pytest.mark.parametrize("region", (VALLEY, HARBOUR), ids=("valley", "harbour"))
def test_a_rich_setting_is_in_all_that_is_asked_and_told(region):
    """More than the two characters that a plain story has, and other stories to request."""
    settings = {"region": region, "setting": RICH}
    talks, asked = dialogues(40, **settings), [d for d, _ in exams(40, **settings)]
    for messages in talks + asked:
        check_dialogue(messages)
    for part, least in (talks, 20), (asked, 15):
        texts = [max((m["content"] for m in messages), key=len) for messages in part]
        names = [sum(f"{name} " in text or f"{name}," in text for name in region.she + region.he)
                 for text in texts]
        assert sum(n > 2 for n in names) > least
    assert instructions(40, region=region, setting=RICH) != instructions(40, region=region)


def test_instructions_name_what_the_story_must_have():
    for messages, words in instructions(50):
        text = messages[0]["content"]
        assert all(word in text for word in words) and text[-1] in ".?"


def test_a_story_on_request_begins_with_the_animal_that_was_asked_for():
    pairs = [(user["content"], told["content"]) for messages in dialogues(300)
             for user, told in zip(messages[::2], messages[1::2])]
    requests = [(text, told) for text, told in pairs
                if "ell " in text and "a story about" in text and told != FOREIGN]
    for text, told in requests:
        named = re.search(r"about (.+)[.?]$", text)[1].split(" and ")
        # of "a shy alpaca" or "Vera" and "a kite", the animal
        (subject,) = [re.sub("^an? ", "", x) for x in named if len(x.split()) != 2]
        beginning = " ".join(told.split(". ")[:2])
        assert all(word in beginning for word in subject.split()), (text, told)
    assert 50 < len(requests) < 90
    thing_first = sum(bool(re.search(r"about an? \w+ and ", text)) for text, _ in requests)
    assert 0.3 < thing_first / len(requests) < 0.7
