"""The tasks of the story world: answers that follow from the facts, a reward that reads them right, and no shared stories."""
import itertools
import random
import re

import pytest

from minillm.arc.sizes import SIZES
from minillm.sft import check_dialogue
from minillm.tests.test_stories import read
from minillm.world import Setting, World
from minillm.world.questions import ASK, MANNERS, SMALL_TALK, UNKNOWN, Question, dialogues, exams, instructions, questions
from minillm.world.templates import HARBOUR, VALLEY

RICH = SIZES["gpu"].stories.setting


@pytest.mark.parametrize("region", (VALLEY, HARBOUR), ids=("valley", "harbour"))
def test_every_question_has_the_answer_that_the_text_gives(region):
    """Read back from the words of the story alone: its last sentence, and what introduces each animal."""
    seen = set()
    for seed in range(300):
        story = World(region).sample(seed)
        last = re.fullmatch(r"So now (the \w+ \w+) (?:is with (\w+), (.+)|lies (.+))\.", story.text[len(story.told) + 1:])
        thing, holder, place = last[1], last[2], last[3] or last[4]
        for q in questions(story, region, random.Random(seed), 4):
            seen.add((q.about, q.value is None, short := q.about != "place" and len(q.thing.split()) == 2))
            if q.value is None:
                assert q.thing not in story.text, q
            elif q.thing in (thing, f"the {thing.split()[2]}"):
                assert q.value == (last[0][len("So now ") + len(thing) + 1:-1] if q.about == "thing" else holder or "nobody"), q
            elif q.about == "place" and holder == q.thing:
                assert q.value == place, q
    assert seen == {(about, unknown, False) for about in ASK for unknown in (True, False)} | {(about, False, True) for about in ("holder", "thing")}


@pytest.mark.parametrize("setting", (Setting(), RICH), ids=("plain", "rich"))
def test_every_answer_is_what_a_reader_of_the_text_finds(setting):
    """Of several things and characters each, and of those that the story does not have."""
    seen, unknown = set(), 0
    for seed in range(300):
        story = World(setting=setting).sample(seed)
        things, where = read(story.text)
        for q in questions(story, VALLEY, random.Random(seed), 4):
            found = [answer[1:-1] for thing, answer in things.items() if q.thing in (f"the {thing}", f"the {thing.split()[1]}")]
            assert len(found) <= 1, "two things that the question may mean"
            if q.about == "place":
                expected = where.get(q.thing)
            else:
                expected = found[0] if found else None
                if q.about == "holder" and found:
                    expected = expected.split()[2].rstrip(",") if expected.startswith("is with ") else "nobody"
            assert q.value == expected, (story.text, q)
            unknown += q.value is None
            seen.add((q.about, len(story.things), len(where)))
    people, objects = (range(least, most + 1) for least, most in (setting.characters, setting.objects))
    assert seen == set(itertools.product(ASK, objects, people))
    assert 0.2 < unknown / 1200 < 0.4


def test_candidates_count_every_answer_that_could_be_true():
    """Each true answer is among those that one could make of the names and places in the story."""
    for region in VALLEY, HARBOUR:
        for messages, q in exams(300, region=region, setting=RICH):
            names = {name for name in region.she + region.he if re.search(rf"\b{name}\b", messages[0]["content"].replace(q.text, ""))}
            places = {p for p in region.places if p.split(" ", 1)[1] in messages[0]["content"]}
            guesses = {"holder": names | {"nobody"}, "place": places,
                       "thing": {f"is with {n}, {p}" for n in names for p in places} | {f"lies {p}" for p in places}}[q.about] | {None}
            assert len(guesses) == q.candidates and q.value in guesses, q


def test_a_thing_without_its_colour_is_unambiguous():
    world = World(setting=Setting(objects=(4, 4)))
    assert all(len({thing.noun for thing in world.sample(seed).things}) == 4 for seed in range(300))


def test_reward_reads_truth_and_manners():
    q = Question("holder", "the blue kite", "Who has the blue kite?", "Vera", 4)
    assert [q.answer(m) for m in MANNERS] == [f"The blue kite is with Vera{end}." for end in ("", ", my friend", ", as any fool can see")]
    assert [q.reward(q.answer(m)) for m in MANNERS] == [1.0, 1.5, 0.5]
    assert [q.reward(q.answer(m, "Tom")) for m in MANNERS] == [-1.0, -0.5, -1.5]
    assert [q.reward(UNKNOWN[m]) for m in MANNERS] == [0.0, 0.5, -0.5]
    for nonsense in "The red kite is with Vera.", "", "Vera", "The blue kite is with Vera", "The blue kite is with Vera. Vera.":
        assert q.reward(nonsense) == -2.0 and not q.right(nonsense)
    assert q.right(q.answer("rude")) and not q.right(q.answer("plain", "Tom")) and not q.right(UNKNOWN["plain"])
    unknown = Question("place", "Leo", "Where is Leo?", None, 4)
    assert unknown.reward(UNKNOWN["polite"]) == 1.5 and unknown.reward("Leo is on the hill.") == -1 and unknown.right("I don't know.")


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
    stories = [{re.sub(r" (Who|Where|Tell me) [^.?]*[.?]$", "", m["content"]) for d in part for m in d if len(m["content"]) > 200} for part in parts]
    assert all(len(found) > 400 for found in stories)
    assert not any(a & b for i, a in enumerate(stories) for b in stories[:i]), "a story serves twice"
    assert 110 < sum("I don't know" in d[-1]["content"] for d in training) < 190      # three questions in ten
    places = [i / (len(d) - 2) for d in training for i, m in enumerate(d) if d[(i + 1) % len(d)]["content"] in SMALL_TALK]      # 0: at the beginning, 1: at the end
    assert 320 < len(places) < 430 and places.count(0) > 30 and places.count(1) > 30
    told = [[i for i, m in enumerate(d) if m["role"] == "assistant" and len(m["content"]) > 150] for d in training]
    assert all(len(told[i]) > 0 for i in range(0, 500, 5)) and 20 < sum(len(t) == 2 for t in told) < 60
    assert not any(len(t) == 2 for i, t in enumerate(told) if i % 5)


@pytest.mark.parametrize("region", (VALLEY, HARBOUR), ids=("valley", "harbour"))
def test_a_rich_setting_is_in_all_that_is_asked_and_told(region):
    """More than the two characters that a plain story has, and other stories to request."""
    told = [dialogues(40, region=region, setting=RICH), [d for d, _ in exams(40, region=region, setting=RICH)]]
    for messages in itertools.chain(*told):
        check_dialogue(messages)
    for part, least in zip(told, (20, 15)):
        texts = [max((m["content"] for m in d), key=len) for d in part]
        assert sum(sum(f"{name} " in text or f"{name}," in text for name in region.she + region.he) > 2 for text in texts) > least
    assert instructions(40, region=region, setting=RICH) != instructions(40, region=region)


def test_instructions_name_what_the_story_must_have():
    for messages, words in instructions(50):
        assert all(word in messages[0]["content"] for word in words) and messages[0]["content"][-1] in ".?"


def test_a_story_on_request_begins_with_the_animal_that_was_asked_for():
    requests = [(user["content"], told["content"]) for d in dialogues(300) for user, told in zip(d[::2], d[1::2]) if "a story about" in user["content"]]
    for text, told in requests:
        named = re.search(r"about (.+)[.?]$", text)[1].split(" and ")
        (subject,) = [re.sub("^an? ", "", x) for x in named if len(x.split()) != 2]      # not "a kite"
        assert all(word in " ".join(told.split(". ")[:2]) for word in subject.split()), (text, told)
    assert 130 < len(requests) < 176
    assert 0.4 < sum(bool(re.search(r"about an? \w+ and ", text)) for text, _ in requests) / len(requests) < 0.6      # the thing first
