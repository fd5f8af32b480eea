"""The scorecard counts what it says."""
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from minillm.arc import scorecard
from minillm.arc.sizes import SIZES
from minillm.data import encode_document
from minillm.model import Llama
from minillm.tokenizer import Tokenizer
from minillm.world import Setting, World
from minillm.world.questions import exams, instructions, seeded
from minillm.world.reader import KINDS
from minillm.world.templates import HARBOUR, VALLEY


def test_scorecard_counts_what_it_says():
    """A model that knows every answer scores 1, one that knows none 0.

    An untrained one needs about log2(vocab) bits per token.
    """
    stage_stories = World().stories(40, "heldout")
    texts = [s.text for s in stage_stories]
    assert 0 < scorecard.chance(stage_stories) < 0.3
    assert 0 <= scorecard.last_named(stage_stories) <= 1
    tokenizer = Tokenizer.train(texts, 400)
    model = Llama(replace(SIZES["cpu"].stories.model, vocab_size=400, max_seq_len=512))
    assert scorecard.consistency(model, stage_stories, tokenizer) == 0

    class Oracle(torch.nn.Module):
        config = model.config
        weight = torch.nn.Parameter(torch.zeros(1))

        def __init__(self):
            super().__init__()
            self.register_parameter("w", self.weight)

        def forward(self, ids):      # the next token of the right story, whatever the prompt
            logits = torch.zeros(*ids.shape, 400)
            for row, sequence in enumerate(ids.tolist()):
                story = next(d for d in documents if d[:40] == sequence[:40])
                n = min(len(story) - 1, len(sequence))
                logits[row, torch.arange(n), torch.tensor(story[1:n + 1])] = 50.0
            return logits

    documents = [encode_document(text, tokenizer) for text in texts]
    assert scorecard.consistency(Oracle(), stage_stories, tokenizer) == 1
    assert scorecard.bits_per_byte(Oracle(), texts, tokenizer) < 1e-3
    size = sum(len(text.encode()) for text in texts)
    uniform = sum(len(d) - 1 for d in documents) * math.log2(400) / size
    assert abs(scorecard.bits_per_byte(model, texts, tokenizer) / uniform - 1) < 0.05


def test_answers_and_wins_are_counted(monkeypatch):
    """Four models by their answers: polite and right, rude and right, silent, polite and wrong."""
    asked = exams(40)

    def lie(q):
        if q.value:
            return q.answer("polite", None)
        return q.answer("polite", "Nobody" if q.about == "holder" else "lies on the moon")

    said = {
        "polite": lambda q: q.answer("polite"),
        "rude": lambda q: q.answer("rude"),
        "silent": lambda q: "",
        "lying": lie,
    }

    def replies(model, tokenizer, prompts, **_):
        return [[said[model](q)] for _, q in asked]

    monkeypatch.setattr(scorecard, "replies", replies)
    assert [scorecard.accuracy(model, None, asked) for model in said] == [1, 1, 0, 0]
    assert scorecard.win_rate("polite", "rude", None, asked) == (1, 0)
    assert scorecard.win_rate("rude", "polite", None, asked) == (0, 0)
    assert scorecard.win_rate("rude", "rude", None, asked) == (0.5, 0)
    assert scorecard.win_rate("rude", "silent", None, asked) == (1, 0)
    polite = {id(q) for _, q in asked[1::2]}
    said["half"] = lambda q: q.answer("polite" if id(q) in polite else "rude")
    share, half_width = scorecard.win_rate("half", "rude", None, asked)
    # 20 wins and 20 ties: each is 0.25 from the mean
    assert share == 0.75 and abs(half_width - 1.96 * (0.25 ** 2 / 39) ** 0.5) < 1e-9


RICH = SIZES["gpu"].stories.setting


@pytest.mark.parametrize("setting", (Setting(), RICH), ids=("plain", "rich"))
def test_bounds_are_those_of_the_trials(setting):
    floor, row = scorecard.bounds(setting)
    stories, *asked = scorecard.trials(setting)
    drawn = World(setting=setting).stories(500, "heldout")
    assert [s.text for s in stories] == [s.text for s in drawn]
    assert asked == [exams(500, setting=setting), exams(500, region=HARBOUR, setting=setting)]
    size = sum(len(s.text.encode()) for s in stories)
    assert abs(floor * math.log(2) * size + sum(s.logp for s in stories)) < 1e-6
    assert 0.1 < floor < 0.3 and row["bits/byte"] == floor
    for column in "consistency", "answers", "harbour":
        assert 0 < row[column] < 0.5
    assert row["valid"] == scorecard.faults([s.text for s in stories], setting)["none"] / 500 == 1


@pytest.mark.parametrize("setting", (Setting(), RICH), ids=("plain", "rich"))
def test_a_story_follows_its_own_request_and_another_one_seldom(setting):
    requests = instructions(200, setting=setting)
    stories = [story.text for story, _ in seeded(200, "heldout", VALLEY, setting, "request")]
    for (_, wanted), text in zip(requests, stories):
        own = scorecard.follows(text, wanted, setting)
        assert all(own.values()) and set(own) in ({"name", "thing"}, {"trait", "kind", "thing"})
        assert not any(scorecard.follows("Hello!", wanted, setting).values())
        # Asked for another trait, the story does not follow.
        hero = scorecard.read_story(text, setting).characters[0]
        wrong = {"shy": "brave"}.get(hero.trait, "shy")
        found = scorecard.follows(text, (f"{wrong} {hero.kind}", wanted[1]), setting)
        assert found == {"trait": False, "kind": True, "thing": True}
        absent = next(noun for noun in VALLEY.things if noun not in text)
        assert not scorecard.follows(text, (wanted[0], absent), setting)["thing"]
    shifted = [all(scorecard.follows(text, wanted, setting).values())
               for (_, wanted), text in zip(requests, stories[1:] + stories[:1])]
    assert sum(shifted) < 20


@pytest.mark.parametrize("region", (VALLEY, HARBOUR), ids=("valley", "harbour"))
def test_stories_of_both_regions_are_valid_and_damaged_ones_are_not(monkeypatch, region):
    told = [s.text for s in World(region).stories(50, "heldout")]
    cut = [text[:text.rindex(" So now")] for text in told]
    worded = [text.replace("So now", "And now") for text in told]
    assert scorecard.faults(told) == {"none": 50}
    assert scorecard.faults(cut) == {"unfinished": 50}
    assert scorecard.faults(worded) == {"wording": 50}
    counts = scorecard.faults(told + cut + worded + ["", "<|user|> Hello!", "\ufffd"])
    assert counts.total() == 153 and set(counts) <= {"none", *KINDS}
    shares = (told, 1), (cut, 0), (told + worded, 1 / 2), (told + cut + worded, 1 / 3)
    for texts, share in shares:
        monkeypatch.setattr(scorecard, "write_texts", lambda *_, texts=texts: texts)
        assert scorecard.validity(None, None) == share


def test_a_rich_story_is_valid_in_its_setting():
    told = [s.text for s in World(setting=RICH).stories(20, "heldout")]
    assert scorecard.faults(told, RICH) == {"none": 20}
    assert scorecard.faults(told)["length"] > 0


def test_a_text_is_read_as_a_story_of_the_region_of_its_characters():
    for region, stranger in (VALLEY, "Pearl"), (HARBOUR, "Vera"):
        story = World(region).sample(0)
        reading = scorecard.read_story(f"{story.question} is with {stranger}.")
        assert [c.name for c in reading.characters] == [c.name for c in story.characters]
        assert reading.fault.sentence.startswith("So now")


def test_texts_end_where_the_model_ends_them(monkeypatch):
    """Batches of 2, each with a seed of its own; there is no room for the end of the longest."""
    texts = [s.text for s in World().stories(5)]
    tokenizer = Tokenizer.train(texts, 400)
    documents = [encode_document(text, tokenizer) for text in texts]
    room = max(map(len, documents)) - 3          # without its end and the last token
    calls = []

    def generate(model, ids, length, temperature, stop, seed):
        rows = documents[seed - 7:][:len(ids)]
        assert stop == documents[0][0] and (ids == stop).all() and ids.shape[1] == 1
        calls.append((len(ids), length, temperature, seed))
        return torch.tensor([(row + [stop] * length)[:length + 1] for row in rows])

    monkeypatch.setattr(scorecard, "generate", generate)
    model = torch.nn.Linear(1, 1)
    model.config = SimpleNamespace(max_seq_len=room + 1)
    written = scorecard.write_texts(model, tokenizer, 5, 0.5, seed=7, batch_size=2)
    assert calls == [(2, room, 0.5, 7), (2, room, 0.5, 9), (1, room, 0.5, 11)]
    longest = max(range(5), key=lambda i: len(documents[i]))
    assert written[:longest] + written[longest + 1:] == texts[:longest] + texts[longest + 1:]
    assert texts[longest].startswith(written[longest]) and written[longest] != texts[longest]
    assert scorecard.faults(written) == {"none": 4, "unfinished": 1}
    calls.clear()
    scorecard.write_texts(model, tokenizer, 1, seed=7, length=10)
    scorecard.write_texts(model, tokenizer, 1, seed=7, length=10**6)
    assert [(length, temperature) for _, length, temperature, _ in calls] == [(10, 1), (room, 1)]


def test_the_table_formats_numbers_and_keeps_text():
    rows = [{"stage": "(bounds)", "bits/byte": 0.17224, "gap": 0.0, "MB": None, "tokens/s": None},
            {"stage": "base", "bits/byte": 0.2, "gap": 0.1129, "MB": 3.26, "tokens/s": 1234.5},
            {"stage": "own", "bits/byte": "?", "gap": "11.3%", "MB": "", "tokens/s": "12"}]
    assert scorecard.table(rows).splitlines() == [
        "   stage  bits/byte    gap   MB  tokens/s",
        "(bounds)     0.1722   0.0%               ",
        "    base     0.2000  11.3%  3.3      1234",
        "     own          ?  11.3%             12"]
