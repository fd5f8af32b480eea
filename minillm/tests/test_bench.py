"""The benchmark: turns, tables, shares, pictures, what is refused, and the work of each contender.

Peers in checkouts are tested where MINILLM_PEERS names their folder, the others where they are
installed.
"""
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from minillm import bench
from minillm.bench import __main__ as command
from minillm.bench import ceilings, generation, peers, timing, training
from minillm.bench.arguments import CHECKOUTS
from minillm.generate import generate
from minillm.model import Llama, LlamaConfig, count_parameters
from minillm.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ["MINILLM_PEERS"]) if "MINILLM_PEERS" in os.environ else None
TINY = LlamaConfig(vocab_size=64, dim=64, n_layers=2, n_heads=2, n_kv_heads=2, hidden_dim=168,
                   max_seq_len=96)
SECONDS = {"a": [4.0, 2.0, 3.0], "minillm": [1.0, 1.0, 2.0]}


def batch(c, rows=4):
    ids = torch.randint(c.vocab_size, (rows, 33), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def checkout(name):
    if FOLDER is None or not (FOLDER / name).is_dir():
        pytest.skip(f"MINILLM_PEERS names no folder with a checkout of {name}")
    return FOLDER


def peer(name):
    known = peers.training_peers(checkout(name) if name in CHECKOUTS else None)
    return known.get(name) or pytest.skip(f"{name} is not installed")


def test_contenders_take_turns_and_may_time_themselves(monkeypatch):
    calls = []
    contenders = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b") or 2.5}
    clock = itertools.count(start=10, step=7)                 # 7 seconds from one look to the next
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    seconds = timing.in_turns(contenders, 3)
    assert calls == list("abababab")
    assert seconds == {"a": [7] * 3, "b": [2.5] * 3}


def test_a_table_has_the_ratio_of_medians_and_the_spread_of_the_turns():
    t = timing.table("title", "tokens/s", 6, SECONDS, "a",
                     lambda name, rate: {"share": f"{rate:.0f}!"}, ["a note"])
    a, ours = t.rows
    assert (a.rate, a.ratio, a.low, a.high) == (2, 1, 1, 1)
    assert (ours.rate, ours.ratio, ours.low, ours.high) == (6, 3, 1.5, 4)
    said = str(t).splitlines()
    assert said[-1] == "a note" and "share" in said[2]
    assert said[-2].split() == ["minillm", "6", "3.00", "(1.50", "-", "4.00)", "6!"]
    assert timing.fastest(SECONDS | {"b": [2.0, 2.0, 9.0]}, ["a", "b"]) == "b"


def test_a_picture_is_saved_whole(tmp_path):
    t = timing.table("title", "tokens/s", 6, SECONDS, "a")
    timing.plot([t, t], tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        picture.load()
        assert picture.width > 500 and len(picture.convert("RGB").getcolors(10 ** 6)) > 10
    assert [f.name for f in tmp_path.iterdir()] == ["x.png"]
    axes = timing.plot([t]).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [1, 3] and "a" in axes.get_xlabel()


@pytest.mark.parametrize("arguments, words", [
    ("train --rounds 0", "rounds must be at least 1"),
    ("--rounds 0 train", "rounds must be at least 1"),
    ("--rounds -2 generate", "rounds must be at least 1"),
    ("--rounds 0 quantize", "rounds must be at least 1"),
    ("tokenize x --rounds 0", "rounds must be at least 1"),
    ("generate --peers /no/such/folder", "there is no folder"),
    ("quantize --peers minillm", "none of the checkouts"),
    ("train --shapes S Q", "no shape 'Q'"),
    ("generate --plot /no/such/folder/x.png", "cannot be saved"),
    ("train --plot x.txt", "cannot be saved"),
    ("tokenize /no/such/file", "cannot be read"),
    ("tokenize pyproject.toml", "too small a text"),
    ("train --rounds two", "invalid int"),
    ("--rounds 3 memory", "takes no options"),
    ("--rounds 3 stages", "the options are --seeds and --save"),
    ("stages --seeds 1", "seeds must be at least 2"),
])
def test_refuses(arguments, words, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments.split())
    check_refusal(stopped.value.code, capsys.readouterr().err, words)


def check_refusal(code, stderr, words):
    """Exit code 2 and a sentence, after the usage where the arguments themselves are wrong."""
    said = stderr.splitlines()[-1]
    assert code == 2 and words in said and said.startswith("python -m minillm.bench")
    assert stderr.count("error:") == 1 and "Traceback" not in stderr


@pytest.mark.parametrize("arguments", ["train", "generate", "quantize", "tokenize x", "memory",
                                       "stages"])
def test_a_size_that_does_not_exist_is_refused_by_every_command(arguments, capsys, monkeypatch):
    monkeypatch.setenv("MINILLM_SIZE", "huge")
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments.split())
    check_refusal(stopped.value.code, capsys.readouterr().err, "MINILLM_SIZE=huge: the sizes are")


def test_a_size_that_does_not_exist_is_refused_by_a_new_process():
    """In which nothing is imported yet: modules that read the size must not be the first to."""
    run = [sys.executable, "-m", "minillm.bench", "memory"]
    done = subprocess.run(run, cwd=ROOT, env=os.environ | {"MINILLM_SIZE": "huge"},
                          capture_output=True, text=True)
    check_refusal(done.returncode, done.stderr, "MINILLM_SIZE=huge: the sizes are")
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1


def test_rounds_may_come_before_or_after_what_is_timed():
    for arguments in ("--rounds 3 train", "train --rounds 3", "--rounds 5 train --rounds 3"):
        assert command.parser().parse_args(arguments.split()).rounds == 3
    with pytest.raises(ValueError, match="at least 1"):
        timing.in_turns({}, 0)


def test_shares_by_hand():
    c = LlamaConfig(vocab_size=1000, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=100,
                    max_seq_len=128)
    weights = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 100)
    flops = 6 * (weights + 64 * 1000) + 2 * 12 * 64 * 128
    assert ceilings.mfu(c, 128, rate=10_000, ceiling=200) == pytest.approx(flops * 10_000 / 200e9)
    assert ceilings.bytes_a_token(c) == 4 * (weights + 5 * 64 + 64 * 1000)   # with 5 norms' gains
    tied = replace(c, tie_embeddings=True)
    assert ceilings.bytes_a_token(tied, 1) == weights + 5 * 64 + 64 * 1000
    assert ceilings.matrix_product("float32").amount == pytest.approx(2 * 2048 ** 3 / 1e9)
    memory = ceilings.memory_read(8)
    assert memory.work() == memory.amount * 1e9 / 4                      # as many ones as it says


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989e3), ("NVIDIA H100 PCIe", 756e3), ("NVIDIA H200", 989e3),
    ("NVIDIA A100-SXM4-80GB", 312e3), ("NVIDIA L4", 121e3), ("NVIDIA L40S", None),
    ("NVIDIA GeForce RTX 3090", 71e3), ("2 threads", None),
])
def test_peaks(name, peak):
    assert ceilings.peak_of(name) == peak


@pytest.mark.parametrize("best", [2, 6, 11])       # a turn before, among and after the contenders
def test_a_ceiling_is_the_best_of_its_turns_before_among_and_after(best):
    calls = []

    def top():
        calls.append("t")
        return 1.5 if calls.count("t") == best else 3.0
    contenders = {"a": lambda: calls.append("a") or 1.0}
    ceiling = ceilings.Ceiling("top", "GB/s", 6, top)
    seconds, rates, line = ceilings.measured(contenders, 2, [ceiling])
    assert calls == list("tttt" "atatat" "tttt") and seconds == {"a": [1, 1]}
    assert rates == {"top": 4} and "GB/s" in line


def test_a_contender_that_fails_is_left_out_with_the_reason():
    def broken():
        raise ImportError("no module called x\nand more")
    made, notes = timing.working({"sound": lambda: len, "broken": broken,
                                  "fails later": lambda: lambda text: 1 / 0}, "abc")
    assert made == {"sound": len}
    assert notes == ["Left out: broken (ImportError: no module called x)",
                     "Left out: fails later (ZeroDivisionError: division by zero)"]
    with pytest.raises(ImportError):
        timing.working({"minillm float32": broken})


@pytest.mark.parametrize("what", ["train", "generate", "quantize", "tokenize"])
def test_incomplete_checkouts_do_not_stop_a_comparison(what, monkeypatch, capsys, tmp_path):
    for name in CHECKOUTS:
        (tmp_path / name).mkdir()
    for known in (training.SHAPES, generation.TALKERS):
        monkeypatch.setitem(known, "M", TINY)
    monkeypatch.setattr(training, "place", lambda: (torch.device("cpu"), False))
    monkeypatch.setattr(training, "keep_memory", lambda: None)
    for module in training, generation:
        monkeypatch.setattr(module, "measured",
                            lambda works, rounds, tops: (timing.in_turns(works, rounds),
                                                         {top.name: 1.0 for top in tops}, ""))
    command.main([what, "--rounds", "1", "--peers", str(tmp_path), *words_or_shape(what, tmp_path)])
    said = capsys.readouterr().out
    missing = {"train": ["llama2.c", "nanoGPT", "minimind", "LLMs-from-scratch"],
               "generate": ["minimind", "LLMs-from-scratch", "llama2.c run.c"],
               "quantize": ["llama2.c run.c", "llama2.c runq.c"], "tokenize": ["minbpe"]}[what]
    assert all(f"Left out: {name}" in said for name in missing), said
    assert "minillm" in said


def learns(step, model, times=6):
    """Some steps on one batch lower its loss and move every parameter."""
    before = [p.detach().clone() for p in model.parameters()]
    losses = [step() for _ in range(times)]
    assert losses[-1] < losses[0] - 0.01, losses
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_our_step_trains(precision, monkeypatch):
    made = []
    monkeypatch.setattr(training, "Llama", lambda c: made.append(Llama(c)) or made[0])
    learns(training.our_step(TINY, precision, *batch(TINY)), made[0])


@pytest.mark.parametrize("name", [
    "transformers", "litgpt", "llama2.c", "nanoGPT", "minimind", "LLMs-from-scratch"])
@pytest.mark.parametrize("tied", [False, True])
def test_peers_are_as_large_as_ours_and_their_steps_train(name, tied):
    c = replace(TINY, tie_embeddings=tied)
    known, made = peer(name), []
    size = sum(p.numel() for p in known.make(c).parameters())
    if known.is_llama:
        assert size == count_parameters(c)
    else:
        ours = count_parameters(replace(c, tie_embeddings=True))
        assert abs(size / ours - 1) < 0.1
    watched = replace(known, make=lambda c: made.append(known.make(c)) or made[0])
    step = peers.peer_step(watched, c, "float32", *batch(c))
    torch.manual_seed(0)
    learns(step, made[0])


@pytest.mark.parametrize("name", ["transformers", "litgpt", "minimind", "LLMs-from-scratch"])
def test_peers_write_what_we_write(name):
    peer(name)
    torch.manual_seed(0)
    model, ids = Llama(TINY).eval(), torch.randint(64, (3, 5))
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 100      # so that it matters where a token stands
        layer.self_attn.o_proj.weight.data *= 10
    write = peers.writers(model, FOLDER)[name]()
    assert torch.equal(write(ids, 20), generate(model, ids, 20, temperature=0))
    assert torch.equal(write(ids[:1], 20), write(ids, 20)[:1])


def test_torchao_writes_nearly_what_we_write():
    pytest.importorskip("torchao")
    model = Llama(TINY).eval()
    small = peers.torchao_int8(peers.with_weights_of(model), torch.float32)
    assert "Int8Tensor" in type(small.model.layers[0].mlp.up_proj.weight).__name__
    ids = torch.randint(64, (1, 8))
    with torch.no_grad():
        error = small(ids).logits - model(ids)
        assert 0 < error.norm() < 0.05 * model(ids).norm()


def test_minbpe_has_our_merges():
    folder, text = checkout("minbpe"), "the cat and the hat and the bat " * 30
    ours = Tokenizer.train(text, 268, special_tokens=())
    assert peers.minbpe_like(folder, ours).encode(text) == ours.encode(text)
    trained = peers.minbpe(folder)()
    trained.train(text, 268)
    assert len(trained.vocab) == 268 and peers.minbpe(None) is None


def words_or_shape(what, folder):
    """The last arguments: a file with many different words for tokenize, else the shape M."""
    if what != "tokenize":
        return ["--shapes", "M"]
    words = map("".join, itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=3))
    (folder / "x.txt").write_text(" ".join(list(words)[::3]))
    return [str(folder / "x.txt")]


@pytest.mark.parametrize("what", ["train", "generate", "quantize", "tokenize"])
def test_each_comparison_runs(what, monkeypatch, capsys, tmp_path):
    for known in (training.SHAPES, generation.TALKERS):
        monkeypatch.setitem(known, "M", TINY)
    kept = []
    monkeypatch.setattr(training, "place", lambda: (torch.device("cpu"), False))
    monkeypatch.setattr(training, "keep_memory", lambda: kept.append(what))
    monkeypatch.setattr(generation, "memory_read", partial(ceilings.memory_read, 8))
    arguments = [what, "--rounds", "1", "--plot", str(tmp_path / "x.png")]
    command.main(arguments + words_or_shape(what, tmp_path))
    said = capsys.readouterr().out
    assert kept == ["train"] * (what == "train")
    assert "minillm" in said and (tmp_path / "x.png").stat().st_size > 5000
    beside = {"train": "float32 matrix product", "tokenize": "tiktoken"}
    assert beside.get(what, "reading memory") in said
    if what == "generate":
        assert said.count("minillm 100%") == 2
    if what == "quantize":
        assert "minillm float32 100%" in said and "minillm int8, exact" in said


def test_the_table_of_a_gpu(monkeypatch):
    monkeypatch.setattr(training, "place", lambda: (torch.device("cpu"), True))
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    tiny = replace(TINY, tie_embeddings=True, max_seq_len=32)
    monkeypatch.setitem(training.GPU_SHAPES, "15M", tiny)
    monkeypatch.setitem(training.GPU_ROWS, "15M", 8)
    used = iter(range(0, 10 ** 10, 10 ** 9))
    gpu = {
        "memory_allocated": lambda: next(used),
        "max_memory_allocated": lambda: 5 * 10 ** 9,
        "reset_peak_memory_stats": lambda: None,
        "get_device_name": lambda: "NVIDIA L4",
        "get_device_properties": lambda i: SimpleNamespace(total_memory=24e9),
    }
    for name, said in gpu.items():
        monkeypatch.setattr(torch.cuda, name, said)
    told = []
    [t] = bench.train(rounds=1, shapes=["15M"], show=told.append)
    assert told == [t] and "2 x 32 tokens, NVIDIA L4" in t.title
    assert [row.more["peak memory"] for row in t.rows] == ["5.00 GB", "4.00 GB"]
    assert all(row.more["of data sheet"].endswith("%") for row in t.rows)
    assert {row.name.split()[0] for row in t.rows} == {"transformers", "minillm"}
    assert "121 TFLOP/s" in t.notes[-1]
