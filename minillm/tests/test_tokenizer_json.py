"""tokenizer.json: against transformers and tokenizers, and what our Tokenizer cannot express."""
import json
import random

import pytest
import transformers
from tokenizers import Tokenizer as Rust

from minillm.hub import save_pretrained
from minillm.sft import encode_dialogue, encode_prompt
from minillm.storage.model_folder import load_tokenizer, parse_tokenizer
from minillm.tests.test_hub import SPECIAL, make
from minillm.tokenizer import Tokenizer
from minillm.tokenizer_json import LLAMA3_PATTERN, spell, tokenizer_json
from minillm.world import World
from minillm.world.questions import dialogues


PARTS = [
    "'s", "'LL", "'ſ", "don't", " ", "   ", "\n", "\r\n", "\t", "\x0b", "\x1c", "\x85", "\xa0",
    "\u2028", "é", "e\u0301", "naïve", "猫が好き", "Ελλάδα",
    "👩‍🚀", "١٢٣", "½", "²",
    "7", "12", "2026", "Vera", " kite", "_x", "?!", "...", "\x00", "\ufeff", "<|", "|>", *SPECIAL,
    "aaaaaaa", "bbb",
]


@pytest.fixture(scope="module", name="tokenizer")
def small_tokenizer():
    return Tokenizer.train([story.text for story in World().stories(300)], 512, SPECIAL)


@pytest.fixture(name="folder")
def model_folder(tokenizer, tmp_path):
    save_pretrained(make(), tokenizer, tmp_path / "model")
    return tmp_path / "model"


def nasty(n, seed=0):
    """Texts in which everything meets that has ever made two tokenizers disagree."""
    rng = random.Random(seed)
    return ["".join(rng.choices(PARTS, k=rng.randrange(40))) for _ in range(n)]


def test_ids_are_those_of_transformers(folder, tokenizer):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    letters = [chr(c) + "a 1" + chr(c) for c in range(0, 0x11000, 7) if not 0xD800 <= c < 0xE000]
    stories = [story.text for story in World().stories(100, "heldout")]
    for text in nasty(1000) + stories + letters:
        ids = tokenizer.encode(text, allowed_special="all")
        assert theirs(text)["input_ids"] == ids, repr(text)
        assert theirs.decode(ids) == text
    assert theirs.eos_token == "<|endoftext|>" and theirs.pad_token is None
    assert len(theirs) == tokenizer.n_vocab


def test_the_pattern_of_llama_3(tokenizer):
    data = tokenizer_json(tokenizer)
    data["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = LLAMA3_PATTERN
    ours, theirs = parse_tokenizer(data), Rust.from_str(json.dumps(data))
    assert ours.pattern == LLAMA3_PATTERN
    for text in nasty(300, seed=4):
        if "ſ" not in text:                # engines disagree on it
            assert ours.encode(text, allowed_special="all") == theirs.encode(text).ids, repr(text)


def test_the_template_gives_the_ids_of_the_course(folder, tokenizer):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    odd = [{"role": "user", "content": " two  blanks\n\n"},
           {"role": "assistant", "content": "{{ x }} {% y %} é\t"}]
    for messages in dialogues(30) + [odd]:
        ids = theirs.apply_chat_template(messages, return_dict=False)
        assert ids == encode_dialogue(messages, tokenizer)[0]
        asked = messages[:-1]
        ids = theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        assert ids == encode_prompt(asked, tokenizer)
    with pytest.raises(Exception, match="roles are user and assistant"):
        theirs.apply_chat_template([{"role": "system", "content": "x"}])


def test_a_tokenizer_without_chat_tokens_has_no_template(tmp_path):
    plain = Tokenizer.train([story.text for story in World().stories(100)], 300)
    save_pretrained(make(), plain, tmp_path)
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("kite")["input_ids"] == plain.encode("kite")


def test_every_way_to_make_a_token_may_be_listed(tokenizer):
    """As in files that were made from tiktoken's, LLaMA 3's among them."""
    data = tokenizer_json(tokenizer)
    ranks = tokenizer.ranks
    ways = []
    for token in sorted(ranks, key=ranks.get):
        for k in range(1, len(token)):
            a, b = token[:k], token[k:]
            if a in ranks and b in ranks:
                ways.append([spell(a), spell(b)])
    assert len(ways) > len(tokenizer.merges)
    data["model"]["merges"] = ways
    opened = parse_tokenizer(data)
    rust = Rust.from_str(json.dumps(data))
    for text in nasty(300, seed=1):
        ids = tokenizer.encode(text, allowed_special="all")
        assert opened.encode(text, allowed_special="all") == rust.encode(text).ids == ids


def change(data, path, value):
    data = json.loads(json.dumps(data))
    *before, last = path
    part = data
    for key in before:
        part = part[key]
    part[last] = value
    return data


@pytest.mark.parametrize("path, value, message", [
    (("model", "type"), "Unigram", "Unigram, not byte-level BPE"),
    (("model", "byte_fallback"), True, "sentencepiece"),
    (("model", "dropout"), 0.1, "dropout"),
    (("model", "end_of_word_suffix"), "</w>", "end_of_word_suffix"),
    (("normalizer",), {"type": "NFC"}, "normalizer NFC"),
    (("pre_tokenizer",), None, "does not end with the bytes"),
    (("pre_tokenizer",), {"type": "ByteLevel", "add_prefix_space": True}, "add_prefix_space"),
    (("pre_tokenizer", "pretokenizers", 0, "behavior"), "Removed", "one pattern"),
    (("pre_tokenizer", "pretokenizers", 0, "pattern"), {"String": " "}, "one pattern"),
    (("pre_tokenizer", "pretokenizers", 0, "pattern"), {"Regex": "(("}, "damaged"),
    (("pre_tokenizer", "pretokenizers", 0, "pattern"), {"Regex": r"\p{L}+"}, "leaves out a part"),
    (("pre_tokenizer", "pretokenizers", 0, "pattern"), {"Regex": r"(\w+)|\W+"}, "capturing group"),
    (("model", "vocab", "▁the"), 509, "stands for no byte"),
    (("model", "vocab", "Ġthe"), 5000, "order of the ids|gaps"),
    (("model", "merges"), ["Ġ zz"], "not in the vocabulary"),
    (("model", "merges"), [["a"]], "damaged|not enough values"),
    (("model", "merges"), [], "nor made by a merge"),
    (("added_tokens", 0, "rstrip"), True, "rstrip"),
    (("added_tokens", 0, "id"), "x", "damaged"),
    (("model",), [], "damaged"),
    (("truncation",), {"max_length": 9, "direction": "Right"}, "truncation"),
    (("padding",), {"pad_id": 0}, "padding"),
    (("decoder",), {"type": "Metaspace"}, "decoder Metaspace"),
    (("model", "cache_everything"), 1, "cache_everything"),
    (("prepend",), "x", "prepend"),
])
def test_other_tokenizers_are_refused_with_the_reason(path, value, message, tokenizer, tmp_path):
    data = change(tokenizer_json(tokenizer), path, value)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(tmp_path / "tokenizer.json")
    assert "tokenizer.json" in str(caught.value)


def test_merges_out_of_order_are_refused(tokenizer):
    data = tokenizer_json(tokenizer)
    data["model"]["merges"].reverse()
    with pytest.raises(ValueError, match="order of the ids"):
        parse_tokenizer(data)


def test_damaged_tokenizer_files(folder):
    path, rng = folder / "tokenizer.json", random.Random(0)
    data = path.read_bytes()
    for i in range(60):
        cut = data[:rng.randrange(len(data))] if i % 2 else bytearray(data)
        if not i % 2:
            cut[rng.randrange(len(cut))] = rng.randrange(256)
        path.write_bytes(cut)
        try:
            load_tokenizer(path)
        except ValueError as error:
            assert "tokenizer.json" in str(error)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="tokenizer.json"):
        load_tokenizer(path)
