"""Everything that the package writes can be read back: configurations x formats x readers.

Each configuration is written as a model folder and as GGUF files of every type, and opened by us,
by transformers, by the package gguf and by llama.cpp: the same tensors, the same logits, the same
ids of texts, the same template. What cannot be written is refused by name.
"""
import json
import os
from dataclasses import replace

import gguf as reference
import pytest
import torch
import transformers

from minillm.gguf import read_gguf
from minillm.hub import (CHAT_TEMPLATE, ScaledConfig, from_pretrained, save_gguf, save_pretrained)
from minillm.llamacpp import gguf_tensors
from minillm.lora import add_lora, lora_state_dict, save_adapter
from minillm.model import LlamaConfig
from minillm.nf4 import to_nf4
from minillm.quantize import quantize_model
from minillm.sft import ASSISTANT, USER, encode_prompt
from minillm.storage.adapter_folder import read_adapter
from minillm.tests.test_hub import far, make
from minillm.tests.test_llamacpp import ask, start, tokenize
from minillm.tokenizer import Tokenizer
from minillm.tokenizer_json import GPT2_PATTERN
from minillm.world import World

PLAIN = LlamaConfig(vocab_size=400, dim=64, n_layers=2, n_heads=4, hidden_dim=96, max_seq_len=256)
SCALED = ScaledConfig(**vars(PLAIN), rope_scaling=(8.0, 1.0, 4.0, 64))
CONFIGS = {
    "plain": PLAIN,
    "grouped": replace(PLAIN, n_kv_heads=2),
    "one key head": replace(PLAIN, n_kv_heads=1),
    "tied": replace(PLAIN, tie_embeddings=True),
    "llama3": SCALED,
    "all of them": replace(SCALED, n_kv_heads=2, tie_embeddings=True),
    "odd widths": replace(PLAIN, dim=48, hidden_dim=90, n_heads=2, n_kv_heads=1),
    "other constants": replace(PLAIN, rope_theta=5e5, norm_eps=1e-3),
    "more rows than tokens": replace(PLAIN, vocab_size=448),
}
CHAT = ("<|endoftext|>", USER, ASSISTANT)
TOKENIZERS = {                   # special tokens, pattern
    "chat": (CHAT, None),
    "plain": (("<|endoftext|>",), None),
    "none": ((), None),
    "gpt-2": (CHAT, GPT2_PATTERN),
    "odd": ((*CHAT, "[INST]", "a b", "<s>", "猫", "🦊", "\n\n"), None),
}
TEXTS = ["", "Ida has a kite.", "IT'S 2026,\r\n  naïve 猫 🦊!", "a b[INST] <s>é\n\n<|user|>x"]
DIALOGUE = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": "Who are you?"}]


def made_tokenizer(name):
    special, pattern = TOKENIZERS[name]
    texts = [story.text for story in World().stories(60)]
    return Tokenizer.train(texts, 380, special, **({"pattern": pattern} if pattern else {}))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_of_every_configuration(name, tmp_path):
    config, tokenizer = CONFIGS[name], made_tokenizer("chat")
    model = make(config)
    save_pretrained(model, tokenizer, tmp_path)
    back, _ = from_pretrained(tmp_path)
    assert back.config == config and same(back.state_dict(), model.state_dict())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert far(theirs, model, config.vocab_size) < 1e-5
    asked = transformers.AutoTokenizer.from_pretrained(tmp_path)("Ida", return_tensors="pt")
    assert list(asked) == ["input_ids", "attention_mask"]
    told = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert told["model_input_names"] == list(asked)       # transformers 4 asks for one more
    assert theirs.generate(**asked, max_new_tokens=2, pad_token_id=0).shape[0] == 1


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_gguf_file_of_every_configuration_and_type(name, dtype, tmp_path):
    config, tokenizer = CONFIGS[name], made_tokenizer("chat")
    model, path = make(config), tmp_path / "m.gguf"
    save_gguf(model, tokenizer, path, dtype)
    metadata, tensors = read_gguf(path)
    state = {n: w.detach() for n, w in model.state_dict().items()}
    if config.tie_embeddings:
        del state["lm_head.weight"]
    wanted = gguf_tensors(state, config)
    tolerance = {"f32": 0, "f16": 1e-3, "q8_0": 0.02}[dtype]
    for key, w in wanted.items():
        assert (tensors[key].float() - w).norm() <= tolerance * w.norm(), key
    assert tensors.keys() - wanted.keys() == (
        {"rope_freqs.weight"} if isinstance(config, ScaledConfig) else set())
    fields = reference.GGUFReader(path).fields
    assert {key for key in fields if not key.startswith("GGUF.")} == metadata.keys()
    ids = [*range(20, 40)]
    with torch.no_grad():
        likely = model(torch.tensor([ids]))[0, -1].topk(3).indices.tolist()
    new = ask(start(path), "/completion", prompt=ids, n_predict=1, temperature=0,
              return_tokens=True, ignore_eos=True)["tokens"]
    assert new[0] in likely           # rounding may swap the first few


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_tokenizer_in_every_reader(name, tmp_path):
    tokenizer, model = made_tokenizer(name), make(PLAIN)
    save_pretrained(model, tokenizer, tmp_path)
    save_gguf(model, tokenizer, tmp_path / "m.gguf")
    _, back = from_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    server = start(tmp_path / "m.gguf")
    for text in TEXTS:
        ids = tokenizer.encode(text, allowed_special="all")
        assert back.encode(text, allowed_special="all") == ids
        assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == text
        assert tokenize(server, text) == ids, text
    if set(CHAT) <= set(TOKENIZERS[name][0]):
        assert theirs.chat_template == CHAT_TEMPLATE
        ids = encode_prompt(DIALOGUE, tokenizer)
        assert theirs.apply_chat_template(DIALOGUE, add_generation_prompt=True,
                                          return_dict=False) == ids
        assert tokenize(server, ask(server, "/apply-template", messages=DIALOGUE)["prompt"]) == ids
    else:
        assert theirs.chat_template is None and not (tmp_path / "chat_template.jinja").exists()


@pytest.mark.parametrize("special, model", [("Z", PLAIN), ("é", PLAIN), ("[PAD399]", PLAIN)])
def test_a_special_token_that_is_spelled_like_another_is_refused(special, model, tmp_path):
    """A byte ("é" is how byte 233 is spelled), and a row beyond the tokenizer's in GGUF."""
    tokenizer = Tokenizer.train([story.text for story in World().stories(60)], 380, (special,))
    with pytest.raises(ValueError, match="spelled like|called '"):
        save_gguf(make(model), tokenizer, tmp_path / "m.gguf")
    if special != "[PAD399]":
        with pytest.raises(ValueError, match=f"the special token '{special}' is spelled like"):
            save_pretrained(make(model), tokenizer, tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["plain", "grouped", "llama3"])
def test_an_adapter_of_every_configuration(name, tmp_path):
    model = add_lora(make(CONFIGS[name]), 2, 4)
    layers = [n for n, m in make(CONFIGS[name]).named_modules() if hasattr(m, "in_features")]
    save_adapter(model, tmp_path)
    back = read_adapter(tmp_path, layers)
    assert (back.rank, back.alpha) == (2, 4) and same(back.tensors, lora_state_dict(model))
    assert back.layers == [n for n in layers if n != "lm_head"]


@pytest.mark.parametrize("change", [lambda m: add_lora(m, 2, 4), quantize_model, to_nf4])
@pytest.mark.parametrize("write", [
    save_pretrained, lambda model, tokenizer, path: save_gguf(model, tokenizer, path / "m.gguf")])
def test_what_is_no_plain_model_is_refused_by_name(change, write, tmp_path):
    with pytest.raises(ValueError, match="tensor .* has no place"):
        write(change(make(PLAIN)), made_tokenizer("chat"), tmp_path)
    assert os.listdir(tmp_path) == []
