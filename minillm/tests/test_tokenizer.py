"""What the notebook does not show of the tokenizer: fuzzed text, bad input, damaged files."""
import json
import pickle
import random
import sys
import unicodedata
from collections import Counter

import pytest
import regex
import tiktoken

from minillm.bpe import bpe, train_merges
from minillm.tokenizer import (PATTERN, Tokenizer, check_text, checksum, count_pieces,
                               from_tiktoken, merges_of)
from minillm.world import World

END = "<|endoftext|>"
STORIES = [World().sample(seed).text for seed in range(300)]
UNWANTED = "Cn", "Cs", "Co"           # unassigned, surrogate, private
CHARACTERS = [chr(i) for i in range(0x110000) if unicodedata.category(chr(i)) not in UNWANTED]
POOLS = ["etaoin", " \n\t\r", "0123456789", "人有权的。，", "🦙\u200d👩🚀",
         "e\u0301\u0308ſß", "\0\x1f\x85\u2028\ufeff", CHARACTERS]


def random_text(rng, length=40):
    return "".join(rng.choice(rng.choice(POOLS)) for _ in range(rng.randint(0, length)))


@pytest.fixture(scope="module")
def tokenizer():
    rng = random.Random(0)
    return Tokenizer.train(STORIES + [random_text(rng) for _ in range(500)], 900, (END, "<|user|>"))


def naive(pieces, n_merges):
    """Textbook BPE on tuples of bytes, written without anything of minillm."""
    words = {piece: [bytes([b]) for b in piece.encode()] for piece in pieces}
    merges = []
    for _ in range(n_merges):
        counts = Counter()
        for piece, n in pieces.items():
            for pair in zip(words[piece], words[piece][1:]):
                counts[pair] += n
        if not counts:
            break
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for word in words.values():
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = [best[0] + best[1]]
                i += 1
    return merges


def test_merges_equal_the_naive_ones():
    rng = random.Random(1)
    for alphabet in ("a", "ab", "aab", "abc", "aä人"):
        for _ in range(100):
            n_words = rng.randint(1, 6)
            pieces = Counter("".join(rng.choices(alphabet, k=rng.randint(1, 14)))
                             for _ in range(n_words))
            assert train_merges(pieces, 12) == naive(pieces, 12), pieces
    pieces = count_pieces([random_text(rng) for _ in range(200)])
    assert train_merges(pieces, 150) == naive(pieces, 150)


def test_training_does_not_depend_on_the_order_of_the_text():
    shuffled = random.Random(2).sample(STORIES, len(STORIES))
    one, other = Tokenizer.train(STORIES, 500), Tokenizer.train(iter(shuffled), 500)
    assert one.merges == other.merges and one.vocab == other.vocab


def test_vocabulary_is_bytes_then_merges_then_special(tokenizer):
    n = len(tokenizer.merges)
    assert [tokenizer.vocab[i] for i in range(256)] == [bytes([i]) for i in range(256)]
    assert [tokenizer.vocab[256 + i] for i in range(n)] == [a + b for a, b in tokenizer.merges]
    assert tokenizer.special_tokens == {END: 256 + n, "<|user|>": 257 + n}
    assert tokenizer.n_vocab == 258 + n == 900


def test_documents_and_special_tokens_are_boundaries():
    assert count_pieces(["ab", "cd"]) == {"ab": 1, "cd": 1} and count_pieces("abcd") == {"abcd": 1}
    assert count_pieces(f"ab{END}cd", [END]) == {"ab": 1, "cd": 1}
    learnt = Tokenizer.train([f"{END}to be{END}"] * 9 + ["to be or not to be"], 260)
    assert not any(b"|" in token or b"<" in token for token in list(learnt.vocab.values())[256:-1])


def test_fuzzed_text_equals_tiktoken_and_comes_back(tokenizer):
    rng, reference = random.Random(3), tokenizer.to_tiktoken()
    assert reference.n_vocab == tokenizer.n_vocab
    between = ["", END, "<|user|>", "<|", "<|endof"]
    for _ in range(1500):
        text = random_text(rng) + rng.choice(between) + random_text(rng)
        ids = tokenizer.encode(text, allowed_special="all")
        assert ids == reference.encode(text, allowed_special="all")
        assert tokenizer.decode(ids) == text
        plain = tokenizer.encode(text, disallowed_special=())
        assert plain == reference.encode(text, disallowed_special=())
        assert tokenizer.decode(plain) == text
        only = tokenizer.encode(text, allowed_special={END}, disallowed_special=())
        assert only == reference.encode(text, allowed_special={END}, disallowed_special=())


def test_fuzzed_ids_decode_as_tiktoken_does(tokenizer):
    rng, reference = random.Random(4), tokenizer.to_tiktoken()
    for _ in range(1500):
        ids = rng.choices(range(tokenizer.n_vocab), k=rng.randint(0, 12))
        assert tokenizer.decode(ids) == reference.decode(ids)


def test_a_vocabulary_extended_behind_its_special_tokens_equals_tiktoken(tokenizer):
    """Merges of two trainings in one list: some tokens can be made in several ways, or in none."""
    rng = random.Random(5)
    texts = ["人人有权享有生命、自由和人身安全。人人有权享有国籍。"]
    texts += [random_text(rng) for _ in range(100)]
    merges = train_merges(count_pieces(texts), 300)
    new = [(a, b) for a, b in merges if a + b not in tokenizer.ranks]
    vocab = tokenizer.vocab | {tokenizer.n_vocab + i: a + b for i, (a, b) in enumerate(new)}
    larger = Tokenizer(vocab, tokenizer.merges + new, (*tokenizer.special_tokens, "<|new|>"))
    assert larger.special_tokens[END] == tokenizer.special_tokens[END]
    assert larger.special_tokens["<|new|>"] == larger.n_vocab - 1 == len(vocab)
    reference = larger.to_tiktoken()
    for _ in range(1000):
        text = random_text(rng)
        ids = larger.encode(text)
        assert ids == reference.encode(text) and larger.decode(ids) == text


def lines_run(function, *arguments):
    """How many lines of Python a call runs: work, measured without a clock."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function(*arguments)
    finally:
        sys.settrace(before)
    return count


def test_long_pieces_take_no_quadratic_time(tokenizer):
    rng = random.Random(6)
    for piece in ("a" * 200_000, "".join(rng.choices("etaoin", k=100_000))):
        ids = bpe(piece.encode(), tokenizer.ranks)
        assert tokenizer.decode(ids) == piece
        # Twice the length is twice the work; for a quadratic encoder it would be four times.
        long, half = piece[:20_000].encode(), piece[:10_000].encode()
        assert lines_run(bpe, long, tokenizer.ranks) < 2.5 * lines_run(bpe, half, tokenizer.ranks)
    assert train_merges({"a" * 100_000: 1}, 3) == [(b"a" * n, b"a" * n) for n in (1, 2, 4)]


def test_training_on_one_long_word_is_not_slower_than_on_many_short_ones():
    """DNA, base64, a minified file: a merge touches its own places, and not the whole word."""
    rng = random.Random(0)
    letters = "".join(rng.choices("acgt", k=3000))
    words = Counter(letters[i:i + 40] for i in range(0, len(letters), 40))
    one, many = (lines_run(train_merges, pieces, 200) for pieces in ({letters: 1}, words))
    assert one < 2 * many
    longer = {"".join(rng.choices("acgt", k=6000)): 1}
    assert lines_run(train_merges, longer, 200) < 2.5 * one


def test_merges_of_long_runs_equal_the_naive_ones():
    rng = random.Random(8)
    for alphabet in ("a", "ab", "aaaab"):
        pieces = Counter("".join(rng.choices(alphabet, k=rng.randint(60, 200))) for _ in range(3))
        assert train_merges(pieces, 60) == naive(pieces, 60)


def test_the_cache_stays_within_its_limit(tokenizer):
    fresh = Tokenizer(tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens)
    fresh.cache.limit = 10
    assert fresh.encode(STORIES[0]) == tokenizer.encode(STORIES[0])
    assert len(fresh.cache) <= 10
    assert pickle.loads(pickle.dumps(fresh)).encode(STORIES[1]) == tokenizer.encode(STORIES[1])


@pytest.mark.parametrize("call, error, words", [
    (lambda t: t.encode(3), TypeError, "must be a str, got int: 3"),
    (lambda t: t.encode(b"bytes"), TypeError, "got bytes"),
    (lambda t: t.encode("ab\ud800"), ValueError, "U.D800 at position 2"),
    (lambda t: t.encode(f"a{END}"), ValueError, "special token '<.endoftext.>'"),
    (lambda t: t.encode(f"a{END}", allowed_special={"<|user|>"}), ValueError,
     "special token '<.endoftext.>'"),
    (lambda t: t.decode([0, 900]), ValueError, "id 900 .* 0 to 899"),
    (lambda t: t.decode([-1]), ValueError, "id -1"),
    (lambda t: t.decode([1.0]), TypeError, "list of int"),
    (lambda t: t.decode([[1, 2]]), TypeError, "list of int"),
    (lambda t: t.decode(7), TypeError, "list of int"),
    (lambda t: t.decode("text"), TypeError, "list of int"),
    (lambda t: Tokenizer.train("", 300), ValueError, "empty"),
    (lambda t: Tokenizer.train([], 300), ValueError, "empty"),
    (lambda t: Tokenizer.train(END, 300), ValueError, "empty"),
    (lambda t: Tokenizer.train(["a", 7], 300), TypeError, "document 1 must be a str"),
    (lambda t: Tokenizer.train(b"bytes", 300), TypeError, "document 0 must be a str"),
    (lambda t: Tokenizer.train("\udfff", 300), ValueError, "document 0 has a lone surrogate"),
    (lambda t: Tokenizer.train("hello", 256), ValueError, "vocab_size 256 is too small"),
    (lambda t: Tokenizer.train("hello", 300), ValueError, "Ask for 261 at most"),
    (lambda t: Tokenizer.train("hello", 258.0), TypeError, "float"),
    (lambda t: Tokenizer.train("hello", 258, ("x", "x")), ValueError, "contains or repeats 'x'"),
    (lambda t: Tokenizer.train("hello", 258, ("<a>", "<a><b>")), ValueError,
     "contains or repeats '<a>'"),
    (lambda t: Tokenizer.train("hello", 258, ("",)), ValueError, "special token 0 is empty"),
    (lambda t: Tokenizer.train("hello", 258, "<a>"), TypeError, "tuple of str"),
    (lambda t: Tokenizer.train("hello", 258, None), TypeError, "for none: got None"),
    (lambda t: Tokenizer.train("hello", 258, {"<a>", "<b>"}), TypeError, "tuple of str"),
    (lambda t: Tokenizer.train("hello", 258, {"<a>": 3}), ValueError, "cannot have the id 3"),
    (lambda t: Tokenizer.train("hello", 258, {"bos": "<s>"}), TypeError, "'bos' must have an int"),
    (lambda t: t.encode("a", allowed_special=END), TypeError, "a set of str, or .all."),
    (lambda t: t.encode("a", allowed_special=None), TypeError, "got None"),
    (lambda t: t.encode("a", disallowed_special=END), TypeError, "a set of str, or .all."),
    (lambda t: Tokenizer.train("hello 1", 258, pattern=r"\p{L}+"), ValueError, "leaves out"),
    (lambda t: Tokenizer(t.vocab, t.merges, t.special_tokens, r"(\w+)|\W+"), ValueError,
     r"'\(.*' has a capturing group \(\.\.\.\): write \(\?:"),
    (lambda t: Tokenizer(t.vocab, t.merges, t.special_tokens, r"(?P<all>[\s\S])"), ValueError,
     "capturing group"),
    (lambda t: Tokenizer(t.vocab, t.merges, t.special_tokens, "(("), ValueError,
     "is not a regular expression: missing"),
    (lambda t: Tokenizer([b"a"], []), TypeError, r"vocab must be a dict .*got \[b'a'\]"),
    (lambda t: Tokenizer(t.ranks, t.merges), TypeError, r"dict \{id: bytes\}, got \{b'"),
    (lambda t: Tokenizer(t.vocab, t.merges, t.special_tokens | {"<a>": 1000}), ValueError,
     "without gaps: 900 is missing"),
    (lambda t: Tokenizer(t.vocab, t.merges, t.special_tokens | {"<a>": 65}), ValueError,
     "'<a>' cannot have the id 65, which is that of b'A'"),
    (lambda t: Tokenizer(t.vocab, t.merges, t.special_tokens | {"<a>": 900, "<b>": 900}),
     ValueError, "'<b>' cannot have the id 900, which is that of b'<a>'"),
    (lambda t: Tokenizer(t.vocab, t.merges, {END: 898, "<|user|>": 900}), ValueError,
     "899 and 900 are the same"),
    (lambda t: Tokenizer({0: b"a"}, []), ValueError, "lacks 255"),
    (lambda t: Tokenizer({}, []), ValueError, "lacks 256"),
    (lambda t: Tokenizer(t.vocab, t.merges), ValueError, "made by a merge"),
    (lambda t: Tokenizer(t.vocab, t.merges[:-1], t.special_tokens), ValueError, "made by a merge"),
    (lambda t: Tokenizer(t.vocab, t.merges[1:], t.special_tokens), ValueError,
     "each must be a byte or an earlier merge"),
    (lambda t: Tokenizer(t.vocab, t.merges + t.merges[:1], t.special_tokens), ValueError,
     "the result new"),
    (lambda t: Tokenizer(t.vocab | {901: b"x"}, t.merges, t.special_tokens), ValueError,
     "without gaps"),
    (lambda t: Tokenizer(t.vocab | {900: t.vocab[899]}, t.merges, t.special_tokens), ValueError,
     "899 and 900 are the same"),
    (lambda t: Tokenizer(t.vocab | {256: t.vocab[257], 257: t.vocab[256]}, t.merges,
                         t.special_tokens), ValueError, "rise in the order"),
])
def test_bad_input_is_named(tokenizer, call, error, words):
    with pytest.raises(error) as caught:
        call(tokenizer)
    assert regex.search(words, str(caught.value)), str(caught.value)


def test_special_tokens_have_the_ids_they_are_given(tokenizer):
    vocab = {i: t for i, t in tokenizer.vocab.items() if i < 898}
    swapped = Tokenizer(vocab, tokenizer.merges, {"<a>": 899, END: 898, "<b>": 900})
    assert swapped.special_tokens == {"<a>": 899, END: 898, "<b>": 900} and swapped.n_vocab == 901
    assert swapped.encode(f"<b>{END}<a>", allowed_special="all") == [900, 898, 899]
    same = Tokenizer(tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens)
    assert same.special_tokens == tokenizer.special_tokens


# ---- vocabularies of tiktoken

def test_there_and_back(tokenizer, tmp_path):
    back = from_tiktoken(tokenizer.to_tiktoken())
    for name in "vocab", "merges", "special_tokens", "pattern":
        assert getattr(back, name) == getattr(tokenizer, name)
    assert merges_of(tokenizer.ranks) == tokenizer.merges


def test_gaps_and_bytes_in_another_order_as_in_real_vocabularies(tokenizer, tmp_path):
    """cl100k_base has both: its bytes begin with "!", and its special tokens leave gaps."""
    rng = random.Random(9)
    order = rng.sample(range(256), 256)
    ranks = {t: order[i] if i < 256 else i for t, i in tokenizer.ranks.items()}
    n = len(ranks)
    theirs = tiktoken.Encoding("x", pat_str=tokenizer.pattern, mergeable_ranks=ranks,
                               special_tokens={END: n + 1, "<|user|>": n + 2, "<|z|>": n + 5})
    ours = from_tiktoken(theirs)
    assert ours.special_tokens == {END: n + 1, "<|user|>": n + 2, "<|z|>": n + 5} | {
        f"<|unused {i}|>": i for i in (n, n + 3, n + 4)}
    assert ours.merges == tokenizer.merges and ours.n_vocab == theirs.n_vocab == n + 6
    ours.save(tmp_path / "x.json")
    for again in ours, Tokenizer.load(tmp_path / "x.json"):
        for _ in range(300):
            text = random_text(rng) + rng.choice(["", END, "<|z|>"])
            ids = theirs.encode(text, allowed_special="all")
            assert again.encode(text, allowed_special="all") == ids and again.decode(ids) == text


@pytest.mark.parametrize("ranks, message", [
    ({bytes([i]): i for i in range(255)}, "1 of the 256 bytes have no rank"),
    ({bytes([i]): i for i in range(256)} | {b"abc": 256}, "b'abc' is not made of two earlier ones"),
    ({bytes([i]): i for i in range(256)} | {b"abc": 256, b"ab": 257}, "b'abc' is not made of two"),
])
def test_ranks_that_no_merges_can_have_made(ranks, message):
    encoding = tiktoken.Encoding("x", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    with pytest.raises(ValueError, match=message):
        from_tiktoken(encoding)


def test_a_token_that_only_a_whole_piece_gives():
    """As b".:.:" of LLaMA 3: merging goes another way, but a piece that is a token is one."""
    ranks = {bytes([i]): i for i in range(256)} | {b":.": 256, b".:": 257, b".:.:": 258}
    theirs = tiktoken.Encoding("x", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    ours = from_tiktoken(theirs)
    assert ours.merges == [(b":", b"."), (b".", b":"), (b".:", b".:")]
    for text in ".:.:", ".:.:.:", "a.:.:b .:.:":
        assert ours.encode(text) == theirs.encode(text)


def test_edge_cases(tokenizer):
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""
    assert Tokenizer.train("x", 257).merges == []
    assert Tokenizer.train("x", 256, ()).encode("hé") == [104, 195, 169]
    # a special token may equal an ordinary one: two ids
    single = Tokenizer.train("abc abc", 258, ("a",))
    ids = single.encode("ba", allowed_special="all")
    assert ids[-1] == 257 and single.encode("a", disallowed_special=()) == [97]
    assert single.to_tiktoken().encode("ba", allowed_special="all") == ids
    assert tokenizer.decode([0xE4, 0xBD]) == "\ufffd" and check_text("fine") is None
    again = Tokenizer(tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens)
    assert again.encode("The end") == tokenizer.encode("The end")


def test_saved_and_loaded(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("an older file")
    tokenizer.save(path)
    loaded = Tokenizer.load(str(path))
    for name in "vocab", "merges", "special_tokens", "pattern", "n_vocab":
        assert getattr(loaded, name) == getattr(tokenizer, name)
    # nothing half-written stays behind
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    digits = Tokenizer.train("1234", 256, (), pattern=PATTERN.replace("{1,3}", ""))
    digits.save(path)
    assert Tokenizer.load(path).pattern == digits.pattern


def test_a_failed_save_leaves_the_old_file(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    before = path.read_bytes()

    def fail(*names):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError):
        Tokenizer.train("abc", 258).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


def test_damaged_files_are_refused_by_name(tokenizer, tmp_path):
    path, rng = tmp_path / "tokenizer.json", random.Random(7)
    tokenizer.save(path)
    good = path.read_bytes()
    cases = [b"", b"{", b"null", b"[]", b"{}", b"[" * 100_000, b"\xff\xfe", b'{"sha256": 1}',
             good[:len(good) // 2], good + b"}"]
    for _ in range(60):                                       # any single byte changed
        i = rng.randrange(len(good))
        cases.append(good[:i] + bytes([good[i] ^ 1 << rng.randrange(7)]) + good[i + 1:])
    content = json.loads(good)
    content["data"]["merges"].pop()
    cases.append(json.dumps(content).encode())
    data = content["data"]
    # a checksum alone does not make a tokenizer
    for wrong in ([], {}, "text", {**data, "merges": [[1, 2]]}, {**data, "vocab": {"0": "a"}},
                  data):
        cases.append(json.dumps({"sha256": checksum(wrong), "data": wrong}).encode())
    for case in cases:
        path.write_bytes(case)
        try:
            loaded = Tokenizer.load(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:              # a changed byte of white space, or of the case of an escape
            assert json.loads(case) == json.loads(good) and loaded.vocab == tokenizer.vocab
    with pytest.raises(FileNotFoundError):
        Tokenizer.load(tmp_path / "none.json")


def test_a_valid_file_with_other_content_than_its_checksum_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    Tokenizer.train("the cat sat on the mat, the cat sat", 262).save(path)
    file = json.loads(path.read_text(encoding="utf-8"))
    assert file["sha256"] == checksum(file["data"]) != checksum([file["data"]])
    file["sha256"] = checksum("other")
    path.write_text(json.dumps(file), encoding="utf-8")
    with pytest.raises(ValueError, match="tokenizer.json"):
        Tokenizer.load(path)
