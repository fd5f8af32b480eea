"""The scorecard counts what it says."""
import math
from dataclasses import replace

import pytest
import torch

from minillm.arc import scorecard, stages
from minillm.arc.sizes import SIZES
from minillm.world import Setting, World
from minillm.world.questions import exams
from minillm.world.templates import HARBOUR


def test_scorecard_counts_what_it_says():
    """A model that knows every answer scores 1, one that knows none 0; an untrained one needs about log2(vocab) bits a token."""
    stage_stories = World().stories(40, "heldout")
    assert 0 < scorecard.chance(stage_stories) < 0.3 and 0 <= scorecard.last_named(stage_stories) <= 1
    tokenizer = stages.Tokenizer.train([s.text for s in stage_stories], 400)
    model = stages.Llama(replace(SIZES["cpu"].stories.model, vocab_size=400, max_seq_len=512))
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

    documents = [stages.encode_document(s.text, tokenizer) for s in stage_stories]
    assert scorecard.consistency(Oracle(), stage_stories, tokenizer) == 1
    assert scorecard.bits_per_byte(Oracle(), [s.text for s in stage_stories], tokenizer) < 1e-3
    nats = sum(len(d) - 1 for d in documents) * torch.tensor(400.0).log()
    size = sum(len(s.text.encode()) for s in stage_stories)
    assert abs(scorecard.bits_per_byte(model, [s.text for s in stage_stories], tokenizer) * 0.6931 * size / nats - 1) < 0.05


def test_answers_and_wins_are_counted(monkeypatch):
    """Four models by their answers: always polite and right, always rude and right, always silent, and always polite and wrong."""
    asked = exams(40)
    said = {"polite": lambda q: q.answer("polite"), "rude": lambda q: q.answer("rude"), "silent": lambda q: "",
            "lying": lambda q: q.answer("polite", None if q.value else "Nobody" if q.about == "holder" else "lies on the moon")}
    monkeypatch.setattr(scorecard, "replies", lambda model, tokenizer, prompts, **_: [[said[model](q)] for _, q in asked])
    assert [scorecard.accuracy(model, None, asked) for model in said] == [1, 1, 0, 0]
    assert scorecard.win_rate("polite", "rude", None, asked) == (1, 0) and scorecard.win_rate("rude", "polite", None, asked) == (0, 0)
    assert scorecard.win_rate("rude", "rude", None, asked) == (0.5, 0) and scorecard.win_rate("rude", "silent", None, asked) == (1, 0)
    said["half"] = lambda q: q.answer("polite" if asked.index(next(a for a in asked if a[1] is q)) % 2 else "rude")
    share, half_width = scorecard.win_rate("half", "rude", None, asked)
    assert share == 0.75 and abs(half_width - 1.96 * (0.0625 / 39 * 40 / 40) ** 0.5) < 1e-9


@pytest.mark.parametrize("setting", (Setting(), SIZES["gpu"].stories.setting), ids=("plain", "rich"))
def test_bounds_are_those_of_the_trials(setting):
    floor, row = scorecard.bounds(setting)
    stories, *asked = scorecard.trials(setting)
    assert [s.text for s in stories] == [s.text for s in World(setting=setting).stories(500, "heldout")]
    assert asked == [exams(500, setting=setting), exams(500, region=HARBOUR, setting=setting)]
    assert abs(floor * math.log(2) * sum(len(s.text.encode()) for s in stories) + sum(s.logp for s in stories)) < 1e-6
    assert 0.1 < floor < 0.3 and row["bits/byte"] == f"{floor:.4f}"
    assert all(0 < float(row[column].rstrip("%")) < 50 for column in ("consistency", "answers", "harbour"))
