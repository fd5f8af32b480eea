"""What the notebook of the data chapter cannot show: fuzzed text, damaged files, limits."""
import random
import re
from collections import Counter

import numpy as np
import pytest
import torch

from minillm.data import (ENDOFTEXT, IGNORE, Rows, Windows, check_batch, clean, duplicates,
                          encode_document, near_duplicates, overlap, quality, read_tokens, shingles,
                          split_documents, write_tokens)
from minillm.tokenizer import Tokenizer
from minillm.world import World

STORIES = [story.text for story in World().stories(60)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(STORIES, 300)


# ---- cleaning, duplicates, quality

def test_clean_fuzzed():
    rng = random.Random(0)
    pieces = ["a", "e\u0301", " ", "\t", "\n", "\r", "\r\n", "\x85", "\u2028",
              "\x00", "\x0b", "\x0c", "\x1b", "\u200b", "\ufeff", "\u00a0", "🦙"]
    for _ in range(2000):
        text = clean("".join(rng.choices(pieces, k=rng.randrange(25))))
        assert clean(text) == text and text == text.strip() and "\n\n\n" not in text
        assert not set(text) - set("aé \t\n\u00a0🦙"), repr(text)


@pytest.mark.parametrize("dirty, tidy", [
    ("Zoe\u0308\r\nand\rI\u2028went", "Zoë\nand\nI\nwent"), ("\ufeffa \t\nb", "a\nb"),
    ("a\n\n\n\n b", "a\n\n b"),
    ("👩\u200d🚀", "👩\u200d🚀"), ("a\tb", "a\tb"), ("", "")])
def test_clean(dirty, tidy):
    assert clean(dirty) == tidy


def test_duplicates_point_to_the_first():
    assert duplicates(["a b", "c", "A  b\n", "a b", "", " "]) == {2: 0, 3: 0, 5: 4}


def test_near_duplicates_point_to_the_first():
    changed = STORIES[3].replace(STORIES[3].split()[0], "Somewhere", 1)
    texts = [*STORIES, STORIES[3], changed, "", "!?"]
    found = near_duplicates(texts)
    assert found == {60: 3, 61: 3, 63: 62}


def test_shingles():
    assert shingles("One, two three!", 2) == shingles("ONE two -- three", 2)
    assert shingles("One, two three!", 2) != shingles("three two one", 2)
    assert len(shingles("one two three four five six", 5)) == 2 and len(shingles("one two", 5)) == 1
    assert len(shingles("你好吗朋友 abc", 2)) == 5
    assert overlap("one two three", shingles("zero one two", 2), 2) == 0.5


def test_quality():
    assert sum(map(bool, map(quality, STORIES))) < 10 and quality("") == ["empty"] == quality(" \n")
    assert quality("that fox and the owl have " * 20) == []
    assert quality("word " * 100)[0].startswith("different common words: 0")


# ---- split

@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
def test_split_keeps_everything_once_and_in_order(share):
    rng = random.Random(0)
    for _ in range(100):
        documents = [(name, "x" * rng.randrange(1, 50) + "\n" + "y" * rng.randrange(1, 2000))
                     for name in "aabbbbbbbc"]
        train, heldout = split_documents(documents, share)
        for name in "abc":
            whole, kept, rest = ("".join(text for n, text in part if n == name)
                                 for part in (documents, train, heldout))
            assert "".join((kept + rest).split()) == "".join(whole.split())
            assert 0.9 * share < len(rest) / len(whole) < 2.1 * share + 0.05


def test_split_of_one_long_document_cuts_at_a_line():
    text = "\n".join(f"line {i}" for i in range(1000))
    [(_, kept)], [(_, rest)] = split_documents([("book", text)])
    assert f"{kept}\n{rest}" == text and 0.09 < len(rest) / len(text) < 0.11
    [(_, kept)], [(_, rest)] = split_documents([("line", "word " * 1000)])
    assert kept.endswith("word") and rest.startswith("word")
    [(_, kept)], [(_, rest)] = split_documents([("solid", "x" * 1000)])
    assert (len(kept), len(rest)) == (900, 100)


def test_split_holds_out_whole_stories():
    train, heldout = split_documents([("stories", text) for text in STORIES])
    assert [text for _, text in train + heldout] == STORIES and 3 <= len(heldout) <= 9


# ---- batches

def test_rows_see_each_document_once_an_epoch_in_new_order():
    documents = [[0, i % 7, i, 0][: 2 + i % 3] + [i] for i in range(103)]
    rows = Rows(documents, 4, seed=1)
    for first in 0, 25:
        seen = Counter()
        for i in range(first, first + 25):
            seen.update(tuple(row[row != IGNORE].tolist()) for row in rows[i][1])
        assert sum(seen.values()) == 100 and max(seen.values()) == 1
        assert set(seen) <= {tuple(document[1:]) for document in documents}
        for row, j in zip(rows[first][1], rows.chosen(first)):
            assert row[row != IGNORE].tolist() == documents[j][1:]
    assert any(not torch.equal(rows[i][0], rows[i + 25][0]) for i in range(25))
    assert torch.equal(rows[30][1], Rows(documents, 4, seed=1)[30][1])
    assert any(rows[i][0].tolist() != Rows(documents, 4, seed=2)[i][0].tolist() for i in range(25))


def test_rows_depend_on_the_number_of_the_batch_only():
    """In any order, and asked again: each batch is the one that a fresh Rows gives."""
    documents = [[0] * (2 + i % 9) + [i] for i in range(70)]           # 17 batches an epoch
    rows = Rows(documents, 4, seed=3)
    for i in 40, 0, 16, 17, 39, 0, 1_000_000, 40:
        fresh = Rows(documents, 4, seed=3)
        assert list(rows.chosen(i)) == list(fresh.chosen(i))
        assert all(torch.equal(a, b) for a, b in zip(rows[i], fresh[i]))


def test_rows_shift_and_fill():
    inputs, targets = Rows([[9, 5, 6, 9], [9, 7]], 2)[0]
    assert sorted(inputs.tolist()) == [[9, 5, 6], [9, 7, 0]]
    assert sorted(targets.tolist()) == [[5, 6, 9], [7, IGNORE, IGNORE]]
    check_batch(inputs, targets, 10)


def test_rows_and_windows_refuse():
    for batch_size in 3, 0, -1:
        with pytest.raises(ValueError, match=f"from 1 to .* documents, .* 2: got {batch_size}"):
            Rows([[1, 2], [1, 2]], batch_size)
    with pytest.raises(ValueError, match="document 1 has 1 token"):
        Rows([[1, 2], [1]], 1)
    with pytest.raises(ValueError, match="a window of 4 tokens needs more than the 4 tokens"):
        Windows(np.arange(4), 1, 4)
    for sizes in (0, 4), (2, 0):
        with pytest.raises(ValueError, match=f"at least 1: got {sizes[0]} and {sizes[1]}"):
            Windows(np.arange(9), *sizes)


def test_ids_of_any_integer_type():
    """A tokenized corpus is kept as uint16, which cannot hold the -100 of a padded target."""
    documents = [[5, 6, 7], [5, 6], [8, 9, 65535, 4]]
    wanted = Rows(documents, 3)[0]
    for kind in np.uint16, np.uint64, np.int32, np.int64:
        found = Rows([np.array(document, dtype=kind) for document in documents], 3)[0]
        assert all(map(torch.equal, found, wanted)) and found[0].dtype == torch.int64
    found = Rows([torch.tensor(document, dtype=torch.int32) for document in documents], 3)[0]
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("wrong", [[1.0, 2.5, 3.0], "some text"])
def test_ids_that_are_no_whole_numbers_are_refused(wrong):
    """Rounded down, they would be other tokens."""
    with pytest.raises(TypeError, match="Cannot cast"):
        Rows([wrong, wrong], 2)
    with pytest.raises(TypeError, match="Cannot cast"):
        Windows(np.array([*wrong]), 1, 1)[0]


def test_windows_reach_both_ends():
    ids = np.arange(12, dtype=np.uint16)
    starts = {int(x[0, 0]) for x in (Windows(ids, 1, 10)[i][0] for i in range(50))}
    assert starts == {0, 1}
    inputs, targets = Windows(ids, 3, 5, seed=4)[7]
    assert inputs.dtype == torch.int64 and torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, Windows(ids, 3, 5, seed=4)[7][0])


def test_check_batch():
    ids = torch.tensor([[1, 2], [3, 0]])
    assert check_batch(ids, torch.tensor([[2, IGNORE], [0, 1]]), 4) is None
    for wrong, error, message in [
            ((ids.int(), ids), TypeError, "inputs must be an int64 tensor, got torch.int32"),
            ((ids, [[1]]), TypeError, "targets must be an int64 tensor, got list"),
            ((ids.numpy(), ids), TypeError, "inputs must be"),
            ((ids[0], ids), ValueError, r"shape \(batch, time\).*\(2,\)"),
            ((ids[:, :0], ids[:, :0]), ValueError, r"got \(2, 0\)"),
            ((ids, ids[:1]), ValueError, "one shape"),
            ((ids + 1, ids), ValueError,
             "inputs hold the id 4, but the vocabulary has the ids 0 to 3"),
            ((ids - 1, ids), ValueError, "inputs hold the id -1"),
            ((ids, ids + 9), ValueError, "targets hold the id 10"),
            ((ids, ids - 1), ValueError, "targets hold the id -1"),
            ((ids * 0 + IGNORE, ids), ValueError, "inputs hold the id -100"),
            ((ids, ids * 0 + IGNORE), ValueError, "every target is -100")]:
        with pytest.raises(error, match=message):
            check_batch(*wrong, 4)


# ---- files of tokens

def test_tokens_round_trip(tmp_path, tokenizer):
    documents = STORIES[:10] + ["", f"a forged {ENDOFTEXT} mark", "你好 🦙"]
    n = write_tokens(tmp_path / "x.tokens", iter(documents), tokenizer)
    ids = read_tokens(tmp_path / "x.tokens", tokenizer)
    end = tokenizer.special_tokens[ENDOFTEXT]
    expected = [end, *(i for text in documents for i in encode_document(text, tokenizer)[1:])]
    assert ids.tolist() == expected and len(ids) == n and ids.dtype == np.uint16
    assert isinstance(ids, np.memmap) and not ids.flags.writeable
    assert (ids == end).sum() == len(documents) + 1


@pytest.mark.parametrize("size, dtype", [(2**16 - 1, np.uint16), (2**16, np.uint32),
                                         (2**17, np.uint32)])
def test_width_of_ids(tmp_path, size, dtype):
    class Wide:
        n_vocab, special_tokens, vocab, pattern = size, {ENDOFTEXT: size - 1}, {}, ""

        def encode(self, text, disallowed_special):
            return [0, size - 2]
    write_tokens(tmp_path / "x", ["a"], Wide())
    ids = read_tokens(tmp_path / "x")
    assert ids.tolist() == [size - 1, 0, size - 2, size - 1] and ids.dtype == dtype


def test_failed_writing_leaves_the_old_file(tmp_path, tokenizer):
    path = tmp_path / "x.tokens"
    write_tokens(path, ["one"], tokenizer)
    before = path.read_bytes()
    for documents, error in ((["two", 3], TypeError), ([], ValueError),
                             ((1 / 0 for _ in "x"), ZeroDivisionError)):
        with pytest.raises(error):
            write_tokens(path, documents, tokenizer)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_tokenizer_without_end_mark(tmp_path):
    with pytest.raises(ValueError, match="lacks the special token"):
        write_tokens(tmp_path / "x", ["a"], Tokenizer.train(STORIES, 300, special_tokens=()))


def test_any_damage_is_noticed(tmp_path, tokenizer):
    path = tmp_path / "x.tokens"
    write_tokens(path, STORIES[:2], tokenizer)
    whole, rng = path.read_bytes(), random.Random(0)
    spoilt = [whole[:n] for n in (0, 1, 100, 256, 257, len(whole) - 1, len(whole) - 2)]
    spoilt += [whole + b"\0", whole + whole]
    spoilt += [b"[]".ljust(300), b"{}".ljust(300), b"null".ljust(300)]
    spoilt += [rng.randbytes(1000), b"text " * 100]
    for _ in range(200):
        at = rng.randrange(256, len(whole))
        spoilt.append(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1:])
    for content in spoilt:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="x.tokens is damaged, or was not written"):
            read_tokens(path)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="with another tokenizer"):
        read_tokens(path, Tokenizer.train(STORIES, 301))
    with pytest.raises(ValueError, match="gone is damaged, or was not written"):
        read_tokens(tmp_path / "gone")


@pytest.mark.parametrize("text", [" " * 10**6 + "x", "\t \n" * 10**5, "a" * 10**6, "\n" * 10**6])
def test_cleaning_takes_time_in_proportion_to_the_text(text):
    """A run of spaces that was tried from each of its characters would take hours."""
    assert len(clean(text)) <= len(text)


def test_spaces_at_line_ends_are_taken_out_as_by_the_plain_rule():
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices("a \t\n\u3000", k=rng.randrange(12)))
        plain = re.sub(r"[^\S\n]+\n", "\n", text)
        assert clean(text) == re.sub(r"\n{3,}", "\n\n", plain).strip()
