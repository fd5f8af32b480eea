"""Drills and practice say what is true; the base model reads them besides its stories."""
import re
from dataclasses import replace

import pytest
import torch

from minillm.arc import pool, stages
from minillm.arc.pool import spread
from minillm.arc.sizes import SIZES, Part
from minillm.arc.stages import Curriculum
from minillm.data import ENDOFTEXT
from minillm.tokenizer import Tokenizer
from minillm.world import World
from minillm.world.drills import EVENTS, STATEMENTS, TITLES, drill, practice, quiz, titles
from minillm.world.stories import PLAIN, capital, with_article
from minillm.world.templates import HARBOUR, VALLEY

RICH = SIZES["gpu"].stories.setting


@pytest.mark.parametrize("region", (VALLEY, HARBOUR), ids=("valley", "harbour"))
def test_a_drill_says_who_is_where(region):
    texts = [drill(seed, region) for seed in range(300)]
    assert texts == [drill(seed, region) for seed in range(300)] and len(set(texts)) == 300
    plain = total = 0
    for text in texts:
        statements = re.findall(r"(\w+) (was )?([^.]+)\.", text)
        assert " ".join(f"{name} {was}{place}." for name, was, place in statements) == text
        homes = {name: place for name, _, place in statements[:2]}
        assert len(homes) == len(set(homes.values())) == 2 and len(statements) == 2 + STATEMENTS
        assert not any(was for _, was, _ in statements[:2])
        assert all(homes[name] == place for name, _, place in statements)
        assert set(homes) <= {*region.she, *region.he}
        assert set(homes.values()) <= set(region.places)
        plain += sum(not was for _, was, _ in statements[2:])
        total += STATEMENTS
    assert 0.45 < plain / total < 0.55


def ways(subject, place):
    """How a quiz may say where somebody or something is; place: None if the story does not say."""
    X = capital(subject)
    answer = f"{X} is {place}." if place else "I don't know."
    place = place or "nowhere"
    return {f"{X} {place}.", f"{X} was {place}.", f"Where is {subject}? {answer}"}


@pytest.mark.parametrize("setting", (PLAIN, RICH), ids=("plain", "rich"))
def test_a_quiz_says_who_and_what_is_where_and_what_is_not_there(setting):
    missing = of_things = bare = of_wrong_color = 0
    for seed in range(300):
        text = quiz(seed, setting)
        assert text == quiz(seed, setting)
        story = World(setting=replace(setting, events=EVENTS)).sample(f"quiz {seed}")
        told, statements = text[:len(story.told)], text[len(story.told) + 1:]
        statements = re.findall(r"(Where is [^?]+\? [^.]+\.|[^.]+\.) ?", statements)
        assert told == story.told and len(statements) == STATEMENTS
        assert " ".join([told, *statements]) == text
        about_things = any(word in statements[0] for word in VALLEY.things)
        if about_things:
            places = {x.noun: x.holder.place if x.holder else x.place for x in story.things}
            colours = {x.noun: [x.colour] for x in story.things}
            of_noun = {noun: {f"the {noun}", *(f"the {colour} {noun}" for colour in
                                               colours.get(noun, VALLEY.colours))}
                       for noun in VALLEY.things}
            others = [colour for colour in VALLEY.colours if [colour] not in colours.values()]
            fooled = set().union(*(ways(f"the {colour} {noun}", None) for colour in others
                                   for noun in places))
            of_wrong_color += len(fooled.intersection(statements))
            bare += sum(f"he {noun}" in said for said in statements for noun in VALLEY.things)
        else:
            places = {c.name: c.place for c in story.characters}
            of_noun, fooled = {name: {name} for name in VALLEY.she + VALLEY.he}, set()
        true = set().union(*(ways(subject, places.get(word)) for word, subjects in of_noun.items()
                             for subject in subjects))
        assert (true | fooled).issuperset(statements), text
        missing += sum("nowhere" in said or "I don't know" in said for said in statements)
        of_things += about_things
    assert 0.33 < missing / (300 * STATEMENTS) < 0.41 and 0.6 < of_things / 300 < 0.74
    assert 0.25 < bare / (of_things * STATEMENTS) < 0.33
    assert of_wrong_color > 50


SUBJECT = (f"(?:An? (?:{'|'.join(VALLEY.traits)}) (?:{'|'.join(VALLEY.kinds)})"
           f"|{'|'.join(VALLEY.she + VALLEY.he)})")


def test_a_title_names_what_its_story_is_about():
    named = 0
    for seed in range(200):
        text = titles(seed)
        assert text == titles(seed)
        parts = re.findall(rf"({SUBJECT})\. (.+?\.) ?(?=$|{SUBJECT}\.)", text)
        assert " ".join(f"{title}. {story}" for title, story in parts) == text
        assert len(parts) == TITLES
        for title, story in parts:
            if " " in title:
                article, trait, kind = title.split()
                assert with_article(trait) == f"{article.lower()} {trait}"
                assert {trait, kind} <= set(re.findall(r"\w+", story))
            else:
                assert title in re.findall(r"\w+", story)
                named += 1
    assert 0.25 < named / (200 * TITLES) < 0.35


def test_every_fifth_text_of_practice_is_of_titles():
    assert [practice(i) for i in range(10)] == [
        titles(i) if i in (4, 9) else quiz(i) for i in range(10)]
    assert practice(0, RICH) == quiz(0, RICH) != quiz(0)


def test_a_curriculum_is_one_source_after_the_other():
    sources = [[torch.zeros(1) + 10 * k + i for i in range(3)] for k in range(3)]
    batches = Curriculum((sources[0], 2), (sources[1], 1), (sources[2], 3))
    assert [batches[i].item() for i in range(6)] == [0, 1, 10, 20, 21, 22]
    with pytest.raises(IndexError):
        batches[6]


def test_each_part_goes_on_where_the_kind_was_left():
    recipe = replace(SIZES["cpu"].stories, batch_size=2, parts=(
        Part(drills=4), Part(stories=2), Part(practice=2), Part(practice=2, stories=4)))
    texts = stages.training_texts(recipe)
    assert texts == stages.tales(6, PLAIN)
    tokenizer = Tokenizer.train(texts, 300, stages.SPECIAL_TOKENS)
    stories = [stages.encode_document(text, tokenizer) for text in texts]
    batches = stages.curriculum(recipe, stories, tokenizer)
    read, begun = [], []
    for i in range(7):
        inputs, targets = batches[i]
        read.append({tokenizer.decode([first, *row[row != -100].tolist()]).replace(ENDOFTEXT, "")
                     for first, row in zip(inputs[:, 0].tolist(), targets)})
        begun += (inputs[:, 0] == tokenizer.special_tokens[ENDOFTEXT]).tolist()
    assert read[0] | read[1] == {drill(i) for i in range(4)}
    assert (read[2], read[3]) == (set(texts[:2]), {practice(0), practice(1)})
    assert read[4] | read[5] | read[6] == {practice(2), practice(3), *texts[2:]}
    # Only practice has no token for the beginning of a document before it.
    assert all(begun[:6]) and not any(begun[6:8]) and sum(begun[8:]) == 4


def cube(i):
    return i**3


def test_many_processes_give_what_one_gives(monkeypatch):
    monkeypatch.setattr(pool, "LEAST", 10)
    alone = spread(cube, range(101))
    monkeypatch.setattr(pool, "CORES", 1)
    assert spread(cube, range(101)) == alone == [i**3 for i in range(101)]
    assert spread(cube, []) == []
