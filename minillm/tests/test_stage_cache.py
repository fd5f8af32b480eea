"""Damaged stages are built again, never loaded; a cache that cannot be written is said so in time.

The stages are as small as can be: some seconds for all.
"""
import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from minillm import __main__ as command
from minillm.arc import cache, stages
from minillm.arc.sizes import SIZES, Recipe
from minillm.model import Llama, LlamaConfig
from minillm.storage import files
from minillm.storage.checkpoint import read_checkpoint
from minillm.tests.test_stages import assert_same, cut
from minillm.tokenizer import Tokenizer
from minillm.train import TrainConfig

TEXT = "the cat and the hat and the bat " * 30
RECIPE = Recipe(LlamaConfig(vocab_size=268, dim=8, n_layers=1, n_heads=2, n_kv_heads=1,
                            hidden_dim=8, max_seq_len=32),
                TrainConfig(steps=1, warmup=0), batch_size=1)
EVERY_FILE = (*cache.FILES, cache.SUMS)


class Maker:
    """Makes a stage without training, and counts how often."""

    def __init__(self):
        self.made = 0

    def __call__(self, recipe, before, checkpoints, bar):
        self.made += 1
        checkpoints.mkdir(parents=True, exist_ok=True)
        tokenizer = Tokenizer.train(TEXT, recipe.model.vocab_size, ())
        torch.manual_seed(0)
        return cache.Stage(Llama(recipe.model), tokenizer, [{"step": 0, "loss": 5.5}], 0.5)


@pytest.fixture
def maker(monkeypatch, tmp_path):
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path / "cache"))
    return Maker()


def build(make):
    return cache.build("tiny", RECIPE, make, False, heldout_texts=lambda recipe: [TEXT])


def offsets(size):
    """Beginning, end, and places between, the header of a safetensors file among them."""
    places = {0, 1, 7, 8, 9, 60, size // 3, size // 2, 2 * size // 3, size - 2, size - 1}
    return sorted(at for at in places if at < size)


@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_changed_byte_is_noticed_wherever_it_is(maker, tmp_path, name):
    folder = tmp_path / "cache" / build(maker).key
    assert sorted(path.name for path in folder.iterdir()) == sorted(EVERY_FILE)
    assert cache.damage(folder) == ""
    path = folder / name
    data = path.read_bytes()
    for at in offsets(len(data)):
        for bit in 1, 0x20, 0x80:
            path.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1:])
            assert name in cache.damage(folder), (at, bit)
            with pytest.raises(ValueError, match="is damaged") as refused:
                cache.load(folder, RECIPE, None, None)
            assert str(folder) in str(refused.value)
    for cut_off in data[:0], data[:-1], data[:len(data) // 2], data + b"\n":
        path.write_bytes(cut_off)
        assert name in cache.damage(folder), len(cut_off)
    path.unlink()
    assert cache.damage(folder) == f"{name} is missing"
    path.write_bytes(data)
    assert cache.damage(folder) == ""


@pytest.mark.parametrize("name", EVERY_FILE)
@pytest.mark.parametrize("how", ["changed", "cut off", "missing"])
def test_a_damaged_stage_is_named_and_built_again(maker, tmp_path, capsys, name, how):
    first = build(maker)
    folder = tmp_path / "cache" / first.key
    path = folder / name
    data = path.read_bytes()
    path.unlink()
    if how != "missing":
        middle = len(data) // 2
        end = bytes([data[middle] ^ 1]) + data[middle + 1:] if how == "changed" else b""
        path.write_bytes(data[:middle] + end)
    capsys.readouterr()
    second = build(maker)
    said = capsys.readouterr().out
    assert maker.made == 2 and cache.damage(folder) == ""
    assert said.count("\n") == 1 and "tiny" in said and str(folder) in said and name in said
    assert_equal(first, second)
    assert_equal(first, build(maker))
    assert maker.made == 2 and capsys.readouterr().out == ""


def assert_equal(a, b):
    assert (a.key, a.history, a.floor, a.tokenizer.vocab) == (
        b.key, b.history, b.floor, b.tokenizer.vocab)
    theirs = b.model.state_dict()
    assert all(torch.equal(w, theirs[name]) for name, w in a.model.state_dict().items())


def test_a_file_that_cannot_be_read_is_damage(maker, tmp_path, monkeypatch):
    folder = tmp_path / "cache" / build(maker).key
    real = cache.file_sha256

    def broken(path):
        if path.name == "history.json":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(cache, "file_sha256", broken)
    assert cache.damage(folder) == "history.json cannot be read: Input/output error"


def test_damage_that_building_did_not_repair_is_refused(maker, tmp_path, monkeypatch):
    """As where the disk itself is broken: what was saved just now comes back changed."""
    def spoiled(stage, folder, save=cache.save):
        save(stage, folder)
        (folder / "history.json").write_text(json.dumps({"history": [], "floor": 0}))

    monkeypatch.setattr(cache, "save", spoiled)
    with pytest.raises(ValueError, match="history.json"):
        build(maker)


def test_a_finished_stage_needs_no_lock_and_no_space(maker, monkeypatch):
    """So a cache that can only be read serves all who share it."""
    build(maker)
    for name in "only_builder", "check_writable", "replacing":
        monkeypatch.setattr(cache, name, lambda *_: pytest.fail("wrote to the cache"))
    build(maker)
    assert maker.made == 1


def test_a_stray_folder_is_no_stage(maker, tmp_path):
    folder = tmp_path / "cache" / build(maker).key
    for path in folder.iterdir():
        path.unlink()
    (folder / "notes.txt").write_text("not a stage")
    assert_equal(build(maker), build(maker))
    assert maker.made == 2 and cache.damage(folder) == ""


@pytest.mark.parametrize("stray", ["file", "a link that leads nowhere", "a link to a damaged one"])
def test_what_lies_in_the_place_of_a_stage_gives_way(maker, tmp_path, stray):
    """Noticed before training, and not when its result is to be put there. What a link leads to
    is not ours."""
    folder = tmp_path / "cache" / build(maker).key
    elsewhere = tmp_path / "elsewhere"
    shutil.move(folder, elsewhere)
    if stray == "file":
        folder.write_text("not a folder")
    else:
        target = elsewhere if "damaged" in stray else tmp_path / "nowhere"
        folder.symlink_to(target, target_is_directory=True)
        (elsewhere / "history.json").write_text("{}")
    build(maker)
    assert maker.made == 2 and cache.damage(folder) == "" and not folder.is_symlink()
    assert len(list(elsewhere.iterdir())) == len(EVERY_FILE)


def test_a_link_to_a_stage_is_as_good_as_the_stage(maker, tmp_path):
    folder = tmp_path / "cache" / build(maker).key
    shutil.move(folder, tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    build(maker)
    assert maker.made == 1


# ---- shared with others

@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_all_who_share_a_cache_may_wait_for_each_other(maker, tmp_path, monkeypatch):
    """Whoever comes first makes the file of the lock, and another user has to open it, too."""
    stage, before = build(maker), os.umask(0o077)
    try:
        with cache.only_builder(tmp_path / "x.lock", "tiny"):
            assert (tmp_path / "x.lock").stat().st_mode & 0o777 == 0o666
    finally:
        os.umask(before)
    lock = tmp_path / "cache" / f"{stage.key}.lock"
    assert lock.stat().st_mode & 0o777 == 0o666


def test_a_stage_that_another_user_keeps_to_himself_is_named(maker, tmp_path, monkeypatch):
    """Neither its files nor its checkpoints can be listed, and it cannot be removed."""
    folder = tmp_path / "cache" / build(maker).key
    (folder / "history.json").write_text("{}")

    def denied(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(cache.shutil, "rmtree", denied)
    monkeypatch.setattr(cache.Path, "glob", denied)
    with pytest.raises(OSError, match="stage tiny could not be saved in .*begins again") as refused:
        build(maker)
    assert str(folder) in str(refused.value) and maker.made == 1


@pytest.mark.parametrize("spoil", [
    lambda lock: lock.mkdir(), lambda lock: lock.symlink_to(lock.parent / "elsewhere")])
def test_a_lock_that_cannot_be_had_is_named(maker, tmp_path, spoil):
    folder = tmp_path / "cache" / build(maker).key
    shutil.rmtree(folder)
    lock = folder.with_suffix(".lock")
    lock.unlink(missing_ok=True)
    spoil(lock)
    with pytest.raises(OSError, match="cannot be locked .* stage tiny .*MINILLM_CACHE") as refused:
        build(maker)
    assert str(lock) in str(refused.value) and maker.made == 1


# ---- what cannot be written

def full_disk(monkeypatch):
    """From now on nothing gets onto the disk: the system notices when it is to be written out."""
    def fsync(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fsync)


def test_a_full_disk_is_refused_before_training(maker, monkeypatch, tmp_path):
    full_disk(monkeypatch)
    with pytest.raises(OSError, match="No space left") as refused:
        build(maker)
    assert maker.made == 0
    for word in "tiny", str(tmp_path / "cache"), "MINILLM_CACHE":
        assert word in str(refused.value)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_cache_that_cannot_be_made_is_refused_before_training(maker, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    for place in "file", "file/below":
        monkeypatch.setenv("MINILLM_CACHE", str(tmp_path / place))
        with pytest.raises(OSError, match="MINILLM_CACHE") as refused:
            build(maker)
        assert str(tmp_path / place) in str(refused.value)
    assert maker.made == 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0,
                    reason="permissions of folders do not bind the user root, nor Windows")
@pytest.mark.parametrize("part", [None, ".", "checkpoints"])
def test_a_folder_without_permission_is_refused_before_training(maker, tmp_path, part):
    """The cache itself, and what an interrupted run left in it."""
    stage = build(maker)
    folder = tmp_path / "cache" / stage.key
    locked = folder.parent
    if part:
        (folder.with_suffix(".part") / "checkpoints").mkdir(parents=True)
        locked = folder.with_suffix(".part") / part
    (folder / "history.json").unlink()
    locked.chmod(0o500)
    try:
        with pytest.raises(OSError, match="Permission denied") as refused:
            build(maker)
    finally:
        locked.chmod(0o700)
    assert maker.made == 1 and str(locked) in str(refused.value)


@pytest.mark.parametrize("place", ["cache", ".part", "checkpoints"])
def test_what_cannot_be_written_is_refused_before_training(maker, monkeypatch, place):
    """As the test before it, also for root: writing there fails."""
    real = cache.replacing

    def replacing(path):
        if path.parent.name.endswith(place):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(cache, "replacing", replacing)
    with pytest.raises(OSError, match="Permission denied"):
        build(maker)
    assert maker.made == 0


def test_a_damaged_stage_that_cannot_be_removed_is_named(maker, monkeypatch, tmp_path, capsys):
    folder = tmp_path / "cache" / build(maker).key
    (folder / "history.json").write_text("{}")

    def rmtree(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(cache.shutil, "rmtree", rmtree)
    with pytest.raises(OSError, match="Permission denied") as refused:
        build(maker)
    assert f"{folder} (" in str(refused.value) and maker.made == 1
    assert f"{folder} is damaged" in capsys.readouterr().out


def test_a_stage_is_trained_with_the_same_number_of_threads_everywhere(maker, monkeypatch):
    """And the caller has his own number again afterwards, after an error, too."""
    seen, before = [], torch.get_num_threads()

    def make(*args):
        seen.append(torch.get_num_threads())
        if len(seen) == 1:
            raise RuntimeError("stopped")
        return maker(*args)

    try:
        torch.set_num_threads(3)
        with pytest.raises(RuntimeError, match="stopped"):
            build(make)
        assert torch.get_num_threads() == 3
        build(make)
        assert torch.get_num_threads() == 3 and seen == [cache.THREADS, cache.THREADS]
        monkeypatch.setattr(cache, "rank_and_world", lambda: (0, 2))
        with cache.threads(2):
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def small(monkeypatch, tmp_path):
    cut(monkeypatch, SIZES["cpu"], tmp_path)
    return tmp_path


@pytest.mark.parametrize("when", ["saving", "training"])
def test_a_disk_that_gets_full_loses_no_training(small, monkeypatch, capsys, when):
    """The command says so in one line. Once there is room, it continues from the newest checkpoint:
    that of the last step, or the one before that could not be written."""
    recipe = replace(stages.size().files,
                     training=replace(stages.size().files.training, checkpoint_every=4, steps=6))
    monkeypatch.setattr(stages, "size", lambda: replace(SIZES["cpu"], files=recipe))
    text = small / "own.txt"
    text.write_text("\n".join(f"{n} bottles stood on the wall, and {n + 1} under it."
                              for n in range(600)))
    whole = stages.from_files([text], bar=False)
    monkeypatch.setenv("MINILLM_CACHE", str(small / "another"))
    synced = []

    def fsync(number):
        """There is room until a file of so many has been written."""
        synced.append(number)
        if len(synced) > room:
            raise OSError(errno.ENOSPC, "No space left on device")

    # Three probes, the checkpoints after steps 4 and 6, the tokenizer; then the model.
    room = {"training": 4, "saving": 6}[when]
    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fsync", fsync)
        assert command.main(["--text", str(text)]) == 2
    error = capsys.readouterr().err
    part, = (small / "another").glob("*.part")
    assert error.count("\n") == 1 and error.startswith("minillm: the stage own")
    for word in str(part), "No space left", "continues from the checkpoint", "MINILLM_CACHE":
        assert word in error
    kept = read_checkpoint(max((part / "checkpoints").iterdir()))[1]
    assert len(kept) == {"training": 4, "saving": 6}[when]
    again = stages.from_files([text], bar=False)
    assert again.history[:len(kept)] == kept                 # also the seconds: not trained again
    assert_same(again.model, whole.model)
    assert not list((small / "another").glob("*.part"))
    assert cache.damage(small / "another" / again.key) == ""


def test_the_checksums_are_those_that_sha256sum_reads(maker, tmp_path):
    folder = tmp_path / "cache" / build(maker).key
    lines = (folder / cache.SUMS).read_text().splitlines()
    assert [line.split("  ")[1] for line in lines] == list(cache.FILES)
    if sys.platform == "linux":
        done = subprocess.run(["sha256sum", "-c", cache.SUMS], cwd=folder, capture_output=True)
        assert done.returncode == 0, done.stderr
