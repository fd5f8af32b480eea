"""GGUF files in llama.cpp itself: the same ids, the same continuations, the same template."""
import json
import random
import urllib.request

import pytest
import torch
import xllamacpp

from minillm.generate import generate
from minillm.hub import save_gguf
from minillm.sft import encode_prompt
from minillm.tests.test_gguf import WIDE
from minillm.tests.test_hub import SPECIAL, make
from minillm.tests.test_tokenizer_json import nasty
from minillm.tokenizer import Tokenizer
from minillm.tokenizer_json import LLAMA3_PATTERN
from minillm.world import World


def ask(server, path, **body):
    """The JSON that llama.cpp's server answers."""
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def start(path):
    """llama.cpp's server on a file."""
    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx = 512
    settings.n_parallel = 1
    settings.cpuparams.n_threads = 1
    settings.verbosity = -1
    settings.warmup = False
    return xllamacpp.Server(settings)


def tokenize(server, text):
    """The ids of a text, special tokens among them."""
    return ask(server, "/tokenize", content=text, add_special=False, parse_special=True)["tokens"]


def numbers(n, seed):
    """Numbers of up to nine digits: patterns differ in how they cut them."""
    rng = random.Random(seed)
    return " ".join(str(rng.randrange(10**9)) for _ in range(n))


@pytest.fixture(scope="module")
def tokenizer():
    texts = [story.text for story in World().stories(300)] + [numbers(3000, 0)]
    return Tokenizer.train(texts, 600, SPECIAL)


@pytest.fixture(scope="module")
def opened(tokenizer, tmp_path_factory):
    """A model, and llama.cpp's server on its file, by type."""
    model, folder, servers = make(WIDE), tmp_path_factory.mktemp("gguf"), {}
    for dtype in ("f32", "f16", "q8_0"):
        save_gguf(model, tokenizer, folder / f"{dtype}.gguf", dtype)
        servers[dtype] = start(folder / f"{dtype}.gguf")
    return model, servers


def test_llama_cpp_has_the_same_ids(opened, tokenizer):
    _, servers = opened
    texts = [story.text for story in World().stories(100, "heldout")] + [numbers(50, 1)]
    texts += [text for text in nasty(200, seed=2) if "\0" not in text]
    for text in texts:
        ids = tokenize(servers["f32"], text)
        assert ids == tokenizer.encode(text, allowed_special="all"), repr(text)


def test_llama_cpp_splits_as_the_pattern_of_llama_3(opened, tokenizer, tmp_path):
    special = tuple(tokenizer.special_tokens)
    published = Tokenizer(tokenizer.vocab, tokenizer.merges, special, LLAMA3_PATTERN)
    save_gguf(opened[0], published, tmp_path / "m.gguf", "f16")
    server = start(tmp_path / "m.gguf")
    texts = [text for text in nasty(100, seed=3) if "\0" not in text and "ſ" not in text]
    for text in texts + [numbers(50, 1), "DON'T, WE'LL\n\n  2026"]:
        ids = tokenize(server, text)
        assert ids == published.encode(text, allowed_special="all"), repr(text)


@pytest.mark.parametrize("dtype, n, least", [("f32", 32, 9), ("f16", 32, 5), ("q8_0", 1, 6)])
def test_llama_cpp_continues_as_we_do(opened, tokenizer, dtype, n, least):
    """Ten beginnings, n tokens each, greedy.

    The weights are random, so that two tokens may be nearly equally likely. Rounded weights, or
    the kernels of another processor, may decide otherwise, and then all that follows differs. By
    chance (one token of 600) not even one of the ten would agree.
    """
    model, servers = opened
    end, same = tokenizer.special_tokens["<|endoftext|>"], 0
    greedy = {"n_predict": n, "temperature": 0, "return_tokens": True, "ignore_eos": True}
    for story in World().stories(10, "heldout"):
        ids = [end] + tokenizer.encode(story.text)[:20]
        ours = generate(model, torch.tensor([ids]), n, temperature=0)[0, len(ids):].tolist()
        theirs = ask(servers[dtype], "/completion", prompt=ids, **greedy)["tokens"]
        same += theirs == ours
    assert same >= least


def test_llama_cpp_talks_by_the_template(opened, tokenizer):
    model, servers = opened
    messages = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Yes?"},
                {"role": "user", "content": "Who are you?"}]
    for dialogue in messages, messages[:1]:
        prompt = ask(servers["f32"], "/apply-template", messages=dialogue)["prompt"]
        assert tokenize(servers["f32"], prompt) == encode_prompt(dialogue, tokenizer)
