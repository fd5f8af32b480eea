"""Stages, cache and command line, on recipes small enough for seconds."""
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from minillm import __main__ as command, recipes, scorecard
from minillm.train import read_checkpoint
from minillm.world import World

TEXT = "\n".join(f"{n} bottles of milk stood on the wall, and {n + 1} under it." for n in range(600))


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Both recipes cut to seconds, in a cache of their own."""
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path / "cache"))
    model = replace(recipes.STORIES.model, vocab_size=300, dim=32, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=48,
                    max_seq_len=512)
    training = replace(recipes.STORIES.training, steps=6, warmup=2)
    monkeypatch.setattr(recipes, "STORIES", replace(recipes.STORIES, model=model, training=training, stories=64))
    monkeypatch.setattr(recipes, "FILES", replace(recipes.FILES, model=replace(model, max_seq_len=64), training=training))
    return tmp_path


def test_a_stage_is_built_once(small, monkeypatch):
    first = recipes.base(bar=False)
    monkeypatch.setattr(recipes, "train", lambda *_: pytest.fail("trained again"))
    second = recipes.base(bar=False)
    assert second.history == first.history and len(first.history) == 6
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters()))
    assert not list((small / "cache").glob("*.part"))


def test_settings_text_and_code_are_in_the_key(small, monkeypatch):
    other = replace(recipes.STORIES, training=replace(recipes.STORIES.training, lr=1e-4))
    mute = replace(recipes.STORIES, training=replace(recipes.STORIES.training, bar=False, floor=1.0))
    text = replace(recipes.STORIES, texts=(("a", "b"),))
    assert len({recipes.key(r) for r in (recipes.STORIES, other, text)}) == 3
    assert recipes.key(mute) == recipes.key(recipes.STORIES)
    before = recipes.key(recipes.STORIES)
    monkeypatch.setattr(recipes, "code_of", lambda module: module + "changed")
    assert recipes.key(recipes.STORIES) != before


def test_the_command_trains_and_reports(small, capsys):
    assert command.main([]) == 0
    shown = capsys.readouterr().out
    assert "Before training" in shown and "After training" in shown and "bits/byte" in shown and "chance" in shown


def test_the_command_reads_own_text(small, capsys):
    file = small / "milk.txt"
    file.write_text(TEXT, encoding="utf-8")
    assert command.main(["--text", str(file)]) == 0
    assert "bits per byte" in capsys.readouterr().out


@pytest.mark.parametrize("content, word", [(None, "missing.txt"), (b"", "empty"), (b"\x00\x01" * 5000, "not"), (b"\xff\xfe" * 5000, "UTF-8"),
                                           (b"too short", "few")])
def test_bad_files_end_the_command_before_any_work(small, monkeypatch, capsys, content, word):
    monkeypatch.setattr(recipes, "make", lambda *_: pytest.fail("work began"))
    file = small / "missing.txt"
    if content is not None:
        file = small / "bad.txt"
        file.write_bytes(content)
    assert command.main(["--text", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and file.name in error and word in error


def test_help_explains():
    shown = subprocess.run([sys.executable, "-m", "minillm", "--help"], capture_output=True, text=True, check=True).stdout
    assert "--text" in shown and "Ctrl-C" in shown and "MINILLM_CACHE" in shown


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to another process")
def test_control_c_keeps_a_checkpoint_and_the_same_command_goes_on(small):
    """The real command, interrupted: it says so, leaves a checkpoint, and a new start begins at that step."""
    file = small / "milk.txt"
    file.write_text(TEXT * 3, encoding="utf-8")
    program = ("import sys; from dataclasses import replace; from minillm import recipes, __main__ as c; f = recipes.FILES;"
               "m = replace(f.model, vocab_size=300, dim=32, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=48, max_seq_len=64);"
               "recipes.FILES = replace(f, model=m, training=replace(f.training, steps=int(sys.argv[1]), warmup=2)); sys.exit(c.main(sys.argv[2:]))")
    run = [sys.executable, "-u", "-c", program, "1000000", "--text", str(file)]

    def interrupted():
        """The history in the newest checkpoint that an interrupted run leaves."""
        process = subprocess.Popen(run, env=dict(os.environ, MINILLM_CACHE=str(small / "cache")), stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if "Before training" in line:
                break
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[0]
        assert process.returncode == 130 and "same command" in rest
        return read_checkpoint(max((small / "cache").rglob("step-*.safetensors")))[1]      # the one before it is kept too

    first, second = interrupted(), interrupted()
    assert first and len(second) > len(first)
    assert second[:len(first)] == first, "the second start began anew: the seconds of its first steps differ"


def test_scorecard_counts_what_it_says():
    """A model that knows every answer scores 1, one that knows none 0; an untrained one needs about log2(vocab) bits a token."""
    stage_stories = World().stories(40, "heldout")
    assert 0 < scorecard.chance(stage_stories) < 0.3 and 0 <= scorecard.last_named(stage_stories) <= 1
    tokenizer = recipes.Tokenizer.train([s.text for s in stage_stories], 400)
    model = recipes.Llama(replace(recipes.STORIES.model, vocab_size=400, max_seq_len=512))
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

    documents = [recipes.encode_document(s.text, tokenizer) for s in stage_stories]
    assert scorecard.consistency(Oracle(), stage_stories, tokenizer) == 1
    assert scorecard.bits_per_byte(Oracle(), [s.text for s in stage_stories], tokenizer) < 1e-3
    nats = sum(len(d) - 1 for d in documents) * torch.tensor(400.0).log()
    size = sum(len(s.text.encode()) for s in stage_stories)
    assert abs(scorecard.bits_per_byte(model, [s.text for s in stage_stories], tokenizer) * 0.6931 * size / nats - 1) < 0.05
