"""The sizes of the model, and that each holds what it is to learn."""
import subprocess
import sys

import pytest
import torch

from minillm import __main__ as command
from minillm.arc import scorecard, sizes, stages
from minillm.model import count_parameters
from minillm.sft import encode_dialogue, encode_prompt
from minillm.tests.test_stages import cut
from minillm.tokenizer import Tokenizer
from minillm.world import Setting, World
from minillm.world.drills import practice
from minillm.world.questions import dialogues, exams
from minillm.world.templates import HARBOUR, VALLEY


def test_sizes(monkeypatch):
    monkeypatch.setenv("MINILLM_SIZE", "medium")
    assert sizes.chosen() == "medium"
    cpu, medium = sizes.SIZES["cpu"], sizes.SIZES["medium"]
    assert medium.stories.model.dim == medium.files.model.dim == 288
    assert medium.files.model.vocab_size == cpu.files.model.vocab_size
    assert (medium.chat.training.lr, medium.lora) == (2.5e-3, cpu.lora)
    assert medium.chat.examples == cpu.chat.examples
    assert 20e6 < count_parameters(sizes.SIZES["gpu"].stories.model) < 60e6
    monkeypatch.setenv("MINILLM_SIZE", "large")
    said = "MINILLM_SIZE=large: the sizes are cpu, medium, gpu"
    with pytest.raises(ValueError, match=said):
        sizes.chosen()


@pytest.mark.parametrize("there, name", [(True, "gpu"), (False, "cpu")])
def test_a_gpu_is_used_where_there_is_one(monkeypatch, there, name):
    monkeypatch.delenv("MINILLM_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert sizes.chosen() == name
    monkeypatch.setenv("MINILLM_SIZE", "medium")
    assert sizes.chosen() == "medium"


@pytest.mark.parametrize("arguments", [[], ["chat"], ["export", "folder"], ["serve"],
                                       ["--text", "tinyshakespeare"]], ids=str)
def test_an_unknown_size_ends_the_command_with_one_line(monkeypatch, arguments):
    monkeypatch.setenv("MINILLM_SIZE", "large")
    ended = subprocess.run([sys.executable, "-m", "minillm", *arguments],
                           capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    said = "minillm: MINILLM_SIZE=large: the sizes are cpu, medium, gpu\n"
    assert ended.stderr.endswith(said) and "Traceback" not in ended.stderr


@pytest.mark.parametrize("name", sizes.SIZES)
def test_stories_and_dialogues_are_seen_once(name):
    size = sizes.SIZES[name]
    recipe = size.stories
    assert recipe.training.steps * recipe.batch_size == sum(part.n for part in recipe.parts)
    assert all(part.n % recipe.batch_size == 0 for part in recipe.parts)
    for stage in size.chat, size.lora:
        assert seen(stage) == stage.examples + stage.replay
    assert seen(size.dpo) <= 2 * size.dpo.examples             # pairs: about twice


def seen(tuning):
    """The rows that a stage is trained on, those that come twice counted twice."""
    return tuning.training.steps * tuning.training.accumulate * tuning.batch_size


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_context_holds_the_longest_story_dialogue_and_question(name):
    """With room to spare: some thousands are measured here, and some ten thousands are made. An
    answer has 40 tokens at most."""
    recipe = sizes.SIZES[name].stories
    setting, limit = recipe.setting, recipe.model.max_seq_len
    texts = stages.tales(6000, setting)
    practiced = [practice(i, setting) for i in range(3000)]
    tokenizer = Tokenizer.train(texts, recipe.model.vocab_size, stages.SPECIAL_TOKENS)
    longest = {kind: max(len(stages.encode_document(text, tokenizer)) for text in some)
               for kind, some in (("story", texts), ("practice", practiced))}
    for region in VALLEY, HARBOUR:
        talks = dialogues(2000, region=region, setting=setting)
        asked = exams(1000, region=region, setting=setting)
        longest["dialogue"] = max(len(encode_dialogue(d, tokenizer)[0]) for d in talks)
        longest["question"] = max(len(encode_prompt(d, tokenizer)) for d, _ in asked) + 40
        assert max(longest.values()) < 0.95 * limit, (region.places[0], longest)
    # So no size has a larger vocabulary.
    with pytest.raises(ValueError, match="more than this corpus can fill"):
        Tokenizer.train(texts, 1024, stages.SPECIAL_TOKENS)


def test_every_stage_of_the_size_gpu_learns_from_its_rich_stories(monkeypatch, tmp_path, capsys):
    """The whole command at that size, but with a tiny model; what each stage learns from is looked
    at where it is used."""
    cut(monkeypatch, sizes.SIZES["gpu"], tmp_path)
    setting, learned = sizes.SIZES["gpu"].stories.setting, []

    def noted(used):
        """A function that does the same, and writes down what it was given besides the model."""
        def note(model, *rest, **settings):
            learned.append(rest)
            return used(model, *rest, **settings)
        return note

    for name in "finetune", "sample_pairs":
        monkeypatch.setattr(stages, name, noted(getattr(stages, name)))
    assert command.main([]) == 0
    base, table = stages.base(bar=False), capsys.readouterr().out
    assert base.setting == stages.dpo(bar=False).setting == setting
    world, heldout = World(setting=setting), stages.heldout_stories(setting)
    assert base.heldout == [story.text for story in world.stories(500, "heldout")]
    assert base.heldout == [story.text for story in heldout]
    texts = stages.training_texts(stages.size().stories)
    assert texts[23:25] == [world.sample(23).text, World(HARBOUR, setting).sample(24).text]
    tokens = sum(len(stages.encode_document(text, base.tokenizer)) - 1 for text in base.heldout)
    assert abs(base.floor + sum(story.logp for story in heldout) / tokens) < 1e-9
    (chat, *_), (lora, *_), (_, asked, _) = learned
    assert chat == dialogues(48, setting=setting)
    assert lora == (dialogues(48, region=HARBOUR, setting=setting)
                    + dialogues(16, setting=setting))
    assert asked == exams(48, "train", setting=setting)
    of_this, of_plain = scorecard.bounds(setting)[0], scorecard.bounds(Setting())[0]
    assert f"{of_this:.4f}" in table and f"{of_plain:.4f}" not in table
