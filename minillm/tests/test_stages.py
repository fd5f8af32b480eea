"""Stages, cache and command line, on recipes small enough for seconds."""
import ast
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import minillm
from minillm import __main__ as command
from minillm.arc import cache, scorecard, stages
from minillm.arc.sizes import SIZES, Part, Size, size as size_in_use
from minillm.gguf import read_gguf
from minillm.hub import from_pretrained
from minillm.rl import ppo
from minillm.storage.checkpoint import read_checkpoint
from minillm.world.templates import HARBOUR

STAGES = ("base", "chat", "lora", "rlhf", "dpo")
WRITERS = {"storage.checkpoint", "storage.files", "storage.progress"}
LINES = [f"{n} bottles of milk stood on the wall, and {n + 1} under it." for n in range(600)]
TEXT = "\n".join(LINES)
PARTS = (Part(drills=16), Part(stories=16), Part(practice=16), Part(practice=16, stories=32))


def cut(monkeypatch, size, folder):
    """All recipes of a size cut to seconds, in a cache of their own; the scorecard asks little. A
    model that has learned so little gives no two answers that a judge could rank, so the pairs are
    made of the true answers, and the rewards are made up."""
    monkeypatch.setenv("MINILLM_CACHE", str(folder / "cache"))
    model = replace(size.stories.model, vocab_size=300, dim=32, n_layers=1, n_heads=2,
                    n_kv_heads=1, hidden_dim=48, max_seq_len=2048)
    training = replace(size.stories.training, steps=6, warmup=2)
    recipes = {"stories": replace(size.stories, model=model, training=training, batch_size=16,
                                  parts=PARTS, compiling=False),
               "files": replace(size.files, model=replace(model, max_seq_len=64),
                                training=training, compiling=False)}
    for name in STAGES[1:]:
        recipe = getattr(size, name)
        recipes[name] = replace(recipe, training=replace(recipe.training, steps=3, warmup=1),
                                examples=48, replay=16, batch_size=16, compiling=False)
    recipes["rlhf"] = replace(recipes["rlhf"], batch_size=2)
    monkeypatch.setattr(stages, "size", lambda: Size(**recipes))
    monkeypatch.setattr(stages, "sample_pairs", lambda model, tokenizer, prompts, judge, **_: [
        (messages, q.answer("polite"), q.answer("rude")) for messages, q in prompts])
    def made_up(asked, answers, texts):
        return torch.arange(len(texts) * len(texts[0]), dtype=torch.float).view(len(texts), -1) % 5
    monkeypatch.setattr(stages, "ppo", lambda policy, reference, tokenizer, asked, reward, *others:
                        ppo(policy, reference, tokenizer, asked, made_up, *others))
    trials = scorecard.trials.__wrapped__
    monkeypatch.setattr(scorecard, "trials", lambda setting: trials(setting, 8))
    for name in "write_texts", "tell":
        monkeypatch.setattr(scorecard, name, partial(getattr(scorecard, name), length=20))


@pytest.fixture
def small(monkeypatch, tmp_path):
    cut(monkeypatch, SIZES["cpu"], tmp_path)
    return tmp_path


def test_a_stage_is_built_once(small, monkeypatch):
    """And it is the same when it is loaded, adapter included; the base is not what a later stage
    changed."""
    first = {name: getattr(stages, name)(bar=False) for name in STAGES}
    monkeypatch.setattr(stages, "fit", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(stages, "finetune", lambda *_: pytest.fail("tuned again"))
    monkeypatch.setattr(stages, "ppo", lambda *_: pytest.fail("tuned again"))
    second = {name: getattr(stages, name)(bar=False) for name in STAGES}
    for name in STAGES:
        a, b = first[name], second[name]
        assert a.history == b.history and len(a.history) == (6 if name == "base" else 3)
        assert a.key == b.key
        assert_same(a.model, b.model)
    adapted = [name for name in STAGES if "lora" in "".join(second[name].model.state_dict())]
    assert adapted == ["lora"]
    ids = torch.randint(300, (2, 40))
    logits = [second[name].model(ids) for name in STAGES]
    for i, a in enumerate(logits):
        assert not any(torch.equal(a, b) for b in logits[:i]), f"{STAGES[i]} is an earlier stage"
    assert not list((small / "cache").glob("*.part"))


def assert_same(a, b):
    """Two models have the same weights to the bit, for they were copied, and compute the same to
    rounding: where in memory a weight lies may decide how it is multiplied."""
    weights, copies = a.state_dict(), b.state_dict()
    assert weights.keys() == copies.keys()
    assert all(torch.equal(weights[name], copies[name]) for name in weights)
    ids = torch.randint(300, (2, 40))
    torch.testing.assert_close(a(ids), b(ids), atol=1e-5, rtol=0)


def test_chat_begins_with_the_marker_of_an_answer_as_a_question_mark(small, monkeypatch):
    before, seen = stages.base(bar=False), []
    rows = before.model.model.embed_tokens.weight.detach().clone()
    tuned = stages.finetune

    def noted(model, *rest, **settings):
        seen.append(model.model.embed_tokens.weight.detach().clone())
        return tuned(model, *rest, **settings)

    monkeypatch.setattr(stages, "finetune", noted)
    stages.chat(bar=False)
    (question,) = before.tokenizer.encode("?")
    rows[before.tokenizer.special_tokens[stages.ASSISTANT]] = rows[question]
    assert torch.equal(seen[0], rows)


def test_an_adapter_is_the_same_whether_chat_was_built_just_now_or_loaded(small):
    first = stages.lora(bar=False)
    shutil.rmtree(small / "cache" / first.key)
    assert_same(first.model, stages.lora(bar=False).model)


@pytest.mark.parametrize("stage", ["base", "rlhf", "dpo"])
def test_the_key_of_a_stage_covers_all_code_that_its_code_imports(stage, monkeypatch):
    """But for how files and progress bars are written, which changes nothing in a model, and the
    arc, which imports everything."""
    codes = []
    monkeypatch.setattr(stages, "build", lambda *arguments, **_: codes.extend(arguments[5:6]))
    getattr(stages, stage)()
    keyed = {*cache.CODE, *(module for code in codes for module in code)}
    for module in keyed - {"arc.cache", "arc.stages"}:
        assert imported_by(module) <= keyed | WRITERS, module


def imported_by(module):
    """The modules of this package, as "arc.fit", from which a module imports."""
    path = Path(minillm.__file__).parent / f"{module.replace('.', '/')}.py"
    own = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level or node.module.startswith("minillm.")):
            own.add(node.module.removeprefix("minillm."))
    return own


def test_a_stage_is_built_anew_when_the_one_before_it_changes(small, monkeypatch):
    before = stages.chat(bar=False).key
    changed = replace(stages.size(), stories=replace(stages.size().stories, seed=5))
    monkeypatch.setattr(stages, "size", lambda: changed)
    assert stages.chat(bar=False).key != before


def test_one_story_in_25_is_from_the_harbour():
    texts = stages.tales(100, size_in_use().stories.setting)
    from_harbour = [i for i, text in enumerate(texts)
                    if any(place in text for place in HARBOUR.places)]
    assert from_harbour == [24, 49, 74, 99]


def test_settings_text_and_code_are_in_the_key(small, monkeypatch):
    recipe = stages.size().stories
    other = replace(recipe, training=replace(recipe.training, lr=1e-4))
    rich = replace(recipe, setting=SIZES["gpu"].stories.setting)
    mute = replace(recipe, training=replace(recipe.training, bar=False, floor=1.0))
    text = replace(recipe, texts=(("a", "b"),))
    assert len({cache.key(r) for r in (recipe, other, text, rich)}) == 4
    assert cache.key(mute) == cache.key(recipe)
    before = cache.key(recipe)
    monkeypatch.setattr(cache, "code_of", lambda module: module + "changed")
    assert cache.key(recipe) != before


def test_wording_is_not_in_the_key(monkeypatch, tmp_path):
    """Comments, docstrings and layout change nothing; a number does."""
    (tmp_path / "arc").mkdir()
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "arc" / "cache.py"))

    def code_of(source):
        (tmp_path / "a.py").write_text(source)
        return cache.code_of("a")

    plain = code_of("def f(x):\n    return 2 * x\n")
    worded = '"""What a holds."""\ndef f(x):\n    """Twice x."""\n    return 2 * x   # double\n'
    assert code_of(worded) == plain != code_of("def f(x):\n    return 3 * x\n")


def test_the_command_builds_every_stage_and_its_row(small, capsys):
    assert command.main([]) == 0
    shown = capsys.readouterr().out
    assert "Before training" in shown and "After training" in shown and scorecard.LEGEND in shown
    cards, end = shown.split(scorecard.LEGEND)
    table = cards[cards.rindex("stage"):].splitlines()
    assert [line.split()[0] for line in table] == ["stage", "(bounds)", *STAGES, "int8"]
    assert "Is this run normal?" in end


def test_export_writes_files_that_open_again(small, capsys):
    assert command.main(["export", str(small / "out"), "--gguf"]) == 0
    stage, (model, tokenizer) = stages.dpo(bar=False), from_pretrained(small / "out")
    assert_same(model, stage.model)
    assert tokenizer.vocab == stage.tokenizer.vocab
    card = (small / "out" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: apache-2.0\n") and "300" in card
    assert len(read_gguf(small / "out" / "minillm-f16.gguf")[1]) == len(model.state_dict())
    assert "Before training" not in capsys.readouterr().out
    file = small / "small" / "minillm-q8_0.gguf"
    for order in (["--gguf", str(file.parent), "--type", "q8_0"],
                  [str(file.parent), "--type", "q8_0", "--gguf"]):
        assert command.main(["export", *order]) == 0 and file.is_file()
        file.unlink()
    with pytest.raises(SystemExit):
        command.main(["export", str(small / "none"), "--type", "f16"])
    assert "add --gguf" in capsys.readouterr().err and not (small / "none").exists()
    (small / "file").touch()
    for folder, word in ((small / "file", "is a file"), (small / "file" / "below", "is a file"),
                         ("", "empty")):
        assert command.main(["export", str(folder)]) == 2
        assert word in capsys.readouterr().err


def test_serve_gets_the_newest_stage(small, monkeypatch):
    calls = []
    monkeypatch.setattr(command.server, "serve", lambda *arguments: calls.append(arguments))
    assert command.main(["serve", "--port", "0"]) == 0
    (listener, model, tokenizer, *rest), = calls
    listener.close()
    assert listener.family == socket.AF_INET and rest == ["minillm", "127.0.0.1"]
    assert_same(model, stages.dpo(bar=False).model)


def test_chat_answers_one_prompt_and_nothing_else_on_stdout(small, capsys):
    assert command.main(["chat", "--prompt", "Who are you?"]) == 0
    first = capsys.readouterr()
    assert "Before training" in first.err and "Before training" not in first.out
    assert first.out.endswith("\n")
    assert command.main(["chat", "--prompt", "Who are you?"]) == 0
    assert capsys.readouterr().out == first.out


def test_each_prompt_has_a_seed_of_its_own(small, monkeypatch):
    seeds = []
    monkeypatch.setattr(command, "answer", lambda stage, messages, seed: seeds.append(seed))
    for prompt in "Tell a story.", "Tell a story about a fox.", "Tell a story.":
        assert command.main(["chat", "--prompt", prompt]) == 0
    assert seeds[0] == seeds[2] != seeds[1]


def test_who_waits_for_another_process_is_told_so(tmp_path, monkeypatch):
    """The other one lets go when this one says that it waits."""
    hold = f"""if True:
        import sys
        from filelock import FileLock
        lock = FileLock({str(tmp_path / 'lock')!r})
        lock.acquire()
        print()
        sys.stdin.read()"""
    said = []

    def heard(*words, **_):
        said.append(words)
        other.stdin.close()

    monkeypatch.setattr(cache, "print", heard, raising=False)
    with cache.only_builder(tmp_path / "lock", "base"):
        assert said == []
    with subprocess.Popen([sys.executable, "-uc", hold], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with cache.only_builder(tmp_path / "lock", "base"):
            assert said == [("Another process is at the stage base: waiting for it.",)]


@pytest.mark.parametrize("prompt, word", [("", "empty"), (" \n", "empty"),
                                          ("Where is Ida? " * 300, "2048")])
def test_bad_prompts(small, capsys, prompt, word):
    assert command.main(["chat", "--prompt", prompt]) == 2
    captured = capsys.readouterr()
    assert word in captured.err.splitlines()[-1] and not captured.out


def test_a_talk_of_several_turns(small, monkeypatch, capsys):
    """Each answer sees the turns before it; too long a conversation starts over; the end of the
    input ends it."""
    lines, seen, answer = ["Hello!", "Who are you?", "What? " * 1000, "Hello!"], [], command.answer

    def typed(prompt):
        if not lines:
            raise EOFError
        return lines.pop(0)

    def counted(stage, messages, **settings):
        seen.append(len(messages))
        return answer(stage, messages, **settings)

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(command, "answer", counted)
    assert command.main(["chat"]) == 0
    assert seen == [1, 3, 5, 1] and "starts over" in capsys.readouterr().out


def test_the_command_reads_own_text(small, capsys):
    file = small / "milk.txt"
    file.write_text(TEXT, encoding="utf-8")
    assert command.main(["--text", str(file)]) == 0
    assert "bits per byte" in capsys.readouterr().out


def test_a_text_of_few_words_fills_a_smaller_vocabulary(small, monkeypatch):
    """And from another folder it is the same stage."""
    cut = stages.size()
    files = replace(cut.files, model=replace(cut.files.model, vocab_size=1024))
    monkeypatch.setattr(stages, "size", lambda: replace(cut, files=files))
    (small / "other").mkdir()
    text, keys = "7:00,18.5,on\n8:00,19.5,off\n" * 1000, []
    for folder in small, small / "other":
        (folder / "log.csv").write_text(text, encoding="utf-8")
        stage = stages.from_files([str(folder / "log.csv")], bar=False)
        assert stage.tokenizer.n_vocab == stage.model.config.vocab_size < 300
        keys.append(stage.key)
    assert keys[0] == keys[1]


def test_a_text_of_one_letter_is_refused_by_the_name_of_its_file(small, monkeypatch, capsys):
    monkeypatch.setattr(stages, "make_base", lambda *_: pytest.fail("work began"))
    file = small / "letters.txt"
    file.write_text("a" * 60_000)
    assert command.main(["--text", str(file)]) == 2
    assert re.search(r"letters.txt: the text repeats itself .* 3 tokens, and we need more than "
                     r"\d+: give a text", capsys.readouterr().err)


def test_a_text_without_spaces_is_many_tokens(small):
    """As DNA is: one pre-token, whose letters do not repeat themselves."""
    file, rng = small / "dna.txt", random.Random(0)
    file.write_text("".join(rng.choices("acgt", k=30_000)))
    assert stages.from_files([str(file)], bar=False).history


@pytest.mark.parametrize("content, word", [
    (None, "missing.txt"), (b"", "empty"), (b"\x00\x01" * 5000, "not"),
    (b"\xff\xfe" * 5000, "UTF-8"), (b"too short", "few")])
def test_bad_files_end_the_command_before_any_work(small, monkeypatch, capsys, content, word):
    monkeypatch.setattr(stages, "make_base", lambda *_: pytest.fail("work began"))
    file = small / "missing.txt"
    if content is not None:
        file = small / "bad.txt"
        file.write_bytes(content)
    assert command.main(["--text", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and file.name in error and word in error


def test_help_explains():
    shown = subprocess.run([sys.executable, "-m", "minillm", "--help"],
                           capture_output=True, text=True, check=True).stdout
    assert "--text" in shown and "Ctrl-C" in shown and "MINILLM_CACHE" in shown


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to another process")
def test_control_c_keeps_a_checkpoint_and_the_same_command_goes_on(small):
    """The real command, interrupted: it says so, leaves a checkpoint, and a new start begins at
    that step."""
    file = small / "milk.txt"
    file.write_text(TEXT * 3, encoding="utf-8")
    program = """if True:
        import sys
        from dataclasses import replace
        from minillm import __main__ as command
        from minillm.arc import sizes, stages
        size = sizes.SIZES["cpu"]
        model = replace(size.files.model, vocab_size=300, dim=32, n_layers=1, n_heads=2,
                        n_kv_heads=1, hidden_dim=48, max_seq_len=64)
        training = replace(size.files.training, steps=int(sys.argv[1]), warmup=2,
                           checkpoint_every=20)
        files = replace(size.files, model=model, training=training)
        stages.size = lambda: replace(size, files=files)
        sys.exit(command.main(sys.argv[2:]))"""
    run = [sys.executable, "-u", "-c", program, "1000000", "--text", str(file)]

    def newest():
        """The last step that is in a checkpoint, -1 if there is none."""
        files = (small / "cache").rglob("step-*.safetensors")
        return max((int(path.stem.removeprefix("step-")) for path in files), default=-1)

    def interrupted():
        """The history in the newest checkpoint that an interrupted run leaves."""
        before, end = newest(), time.monotonic() + 300
        process = subprocess.Popen(run, env=dict(os.environ, MINILLM_CACHE=str(small / "cache")),
                                   stdout=subprocess.PIPE, text=True)
        while newest() == before:                   # until it trains, and has written one more
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=300)[0]
        assert process.returncode == 130 and "same command" in rest
        path = max((small / "cache").rglob("step-*.safetensors"))       # the one before it is kept
        return read_checkpoint(path)[1]

    first, second = interrupted(), interrupted()
    assert first and len(second) > len(first)
    assert second[:len(first)] == first, "the second start began anew: its first seconds differ"
