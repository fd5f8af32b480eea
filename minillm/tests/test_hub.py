"""Model folders: against transformers, and against damage."""
import json
import os
import random
import shutil
import struct

import pytest
import torch
import transformers
from tokenizers import Tokenizer as Rust

from minillm.checked import load_tokenizer, parse_tokenizer
from minillm.generate import generate
from minillm.hf_tokenizer import special_entry, spell, tokenizer_json
from minillm.hub import ScaledConfig, ScaledLlama, from_pretrained, load_model, save_pretrained, tensor_shapes
from minillm.lora import add_lora
from minillm.model import Llama, LlamaConfig
from minillm.sft import ASSISTANT, USER, encode_dialogue, encode_prompt
from minillm.tasks import dialogues
from minillm.tokenizer import Tokenizer
from minillm.world import World

SMALL = LlamaConfig(vocab_size=600, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=44, max_seq_len=256, rope_theta=5e5)
SCALED = ScaledConfig(**{**vars(SMALL), "rope_scaling": (8.0, 1.0, 4.0, 64)})
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SPECIAL = ("<|endoftext|>", USER, ASSISTANT)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([story.text for story in World().stories(300)], 512, SPECIAL)


def make(config=SMALL):
    torch.manual_seed(0)
    model = (ScaledLlama if isinstance(config, ScaledConfig) else Llama)(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, float(p.ndim == 1), 0.2)       # norms around 1, so that a swapped one shows
    return model.eval()


@pytest.fixture
def folder(tokenizer, tmp_path):
    save_pretrained(make(), tokenizer, tmp_path / "model")
    return tmp_path / "model"


def published(path, shards="1GB", dtype=torch.float32, **settings):
    torch.manual_seed(0)
    config = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 3, "num_attention_heads": 4,
              "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "initializer_range": 0.2, **settings}
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).to(dtype).eval()
    for p in made.parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, 1, 0.2)
    made.save_pretrained(path, max_shard_size=shards)
    return made


@torch.no_grad()
def far(a, b, vocab_size=300, t=200):
    ids = torch.randint(0, vocab_size, (2, t), generator=torch.Generator().manual_seed(1))
    a, b = (m(ids) for m in (a, b))
    a, b = (getattr(x, "logits", x) for x in (a, b))
    return ((a - b).abs().max() / b.abs().max()).item()


# ---- what fits


@pytest.mark.parametrize("tied", [False, True])
def test_shapes_are_those_of_the_model(tied):
    config = LlamaConfig(**{**vars(SMALL), "tie_embeddings": tied})
    state = Llama(config).state_dict()
    assert tensor_shapes(config) == {n: tuple(w.shape) for n, w in state.items() if n != "lm_head.weight" or not tied}


@pytest.mark.parametrize("config", [SMALL, SCALED, LlamaConfig(**{**vars(SMALL), "tie_embeddings": True, "norm_eps": 1e-3})])
def test_a_folder_comes_back_and_opens_in_transformers(config, tokenizer, tmp_path):
    model = make(config)
    save_pretrained(model, tokenizer, tmp_path / "m")
    back, again = from_pretrained(tmp_path / "m")
    assert back.config == config and type(back) is type(model)
    assert all(torch.equal(w, model.state_dict()[n]) for n, w in back.state_dict().items())
    assert (again.vocab, again.merges, again.special_tokens, again.pattern) == \
        (tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens, tokenizer.pattern)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert far(theirs, model, 600) < 1e-5 and far(back, model, 600) == 0
    assert back.lm_head.weight.requires_grad and not any(p.is_meta for p in back.parameters())
    assert (back.lm_head.weight is back.model.embed_tokens.weight) == config.tie_embeddings
    assert sorted(os.listdir(tmp_path / "m")) == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                                                  "tokenizer_config.json"]


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1},
                                      {"rms_norm_eps": 0.1}, {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
                                      {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}])
@pytest.mark.parametrize("shards", ["1GB", "100KB"])
def test_a_published_llama_opens(settings, shards, tmp_path):
    made = published(tmp_path, shards, **settings)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (shards == "100KB")
    opened = load_model(tmp_path)
    assert far(opened, made) < 1e-5
    save_pretrained(opened, None, tmp_path / "again")
    assert far(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again"), made) < 1e-5


def test_bfloat16_checkpoints(tmp_path, tokenizer):
    published(tmp_path, dtype=torch.bfloat16)
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert far(load_model(tmp_path), made) < 1e-5                                  # bfloat16 numbers are float32 numbers
    half = load_model(tmp_path, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and half.rope[0].dtype == torch.float32
    save_pretrained(half, None, tmp_path / "half")
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert far(load_model(tmp_path / "half"), made) < 1e-5


def test_both_spellings_of_config(tmp_path):
    made = published(tmp_path, rope_parameters=LLAMA3 | {"rope_theta": 5e5})
    path = tmp_path / "config.json"
    new = json.loads(path.read_text())
    assert "rope_parameters" in new and "dtype" in new
    config = load_model(tmp_path).config
    for scaling in (LLAMA3, {("type" if k == "rope_type" else k): v for k, v in LLAMA3.items()}):
        old = {k: v for k, v in new.items() if k not in ("rope_parameters", "dtype", "head_dim")}
        path.write_text(json.dumps(old | {"rope_theta": 5e5, "rope_scaling": scaling, "torch_dtype": "float32"}))
        assert load_model(tmp_path).config == config and far(load_model(tmp_path), made) < 1e-5
    assert config.rope_scaling == (8.0, 1.0, 4.0, 64) and config.rope_theta == 5e5


def test_defaults_are_those_of_transformers(tmp_path):
    made = published(tmp_path, num_key_value_heads=4)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    for key in ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "hidden_act"):
        settings.pop(key, None)
    path.write_text(json.dumps(settings))
    assert far(load_model(tmp_path), transformers.LlamaForCausalLM.from_pretrained(tmp_path)) < 1e-5 and far(load_model(tmp_path), made) < 1e-5


def test_stored_copies_of_tied_weights_and_old_buffers(tmp_path):
    from safetensors.torch import load_file, save_file
    published(tmp_path, tie_word_embeddings=True)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    want = load_model(tmp_path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
                         "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, path)
    assert far(load_model(tmp_path), want) == 0
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, path)
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        load_model(tmp_path)


@torch.no_grad()
def test_stretched_positions_with_a_cache_and_on_another_device(tmp_path):
    made = published(tmp_path, rope_parameters=LLAMA3 | {"rope_theta": 5e5})
    model, ids = load_model(tmp_path), torch.randint(0, 300, (1, 150))
    new = generate(model, ids, 20, temperature=0)
    assert torch.equal(new, made.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None))
    assert model.to("meta")(ids.to("meta")).is_meta and model.rope[0].is_meta


# ---- tokenizers


def nasty(n, seed=0):
    parts = ["'s", "'LL", "'ſ", "don't", " ", "   ", "\n", "\r\n", "\t", "\x0b", "\x1c", "\x85", "\xa0", "\u2028", "é", "e\u0301", "naïve", "猫が好き",
             "Ελλάδα", "👩‍🚀", "١٢٣", "½", "²", "7", "12", "2026", "Vera", " kite", "_x", "?!", "...", "\x00", "\ufeff", "<|", "|>", *SPECIAL, "aaaaaaa", "bbb"]
    rng = random.Random(seed)
    return ["".join(rng.choices(parts, k=rng.randrange(40))) for _ in range(n)]


def test_ids_are_those_of_transformers(folder, tokenizer):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    letters = [chr(c) + "a 1" + chr(c) for c in range(0, 0x11000, 7) if not 0xD800 <= c < 0xE000]
    for text in nasty(1000) + [story.text for story in World().stories(100, "heldout")] + letters:
        ids = tokenizer.encode(text, allowed_special="all")
        assert theirs(text)["input_ids"] == ids, repr(text)
        assert theirs.decode(ids) == text
    assert theirs.eos_token == "<|endoftext|>" and theirs.pad_token is None and len(theirs) == tokenizer.n_vocab


def test_the_template_gives_the_ids_of_the_course(folder, tokenizer):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    odd = [[{"role": "user", "content": " two  blanks\n\n"}, {"role": "assistant", "content": "{{ x }} {% y %} é\t"}]]
    for messages in dialogues(30) + odd:
        assert theirs.apply_chat_template(messages, return_dict=False) == encode_dialogue(messages, tokenizer)[0]
        asked = messages[:-1]
        assert theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=False) == encode_prompt(asked, tokenizer)
    with pytest.raises(Exception, match="roles are user and assistant"):
        theirs.apply_chat_template([{"role": "system", "content": "x"}])


def test_a_tokenizer_without_chat_tokens_has_no_template(tmp_path):
    plain = Tokenizer.train([story.text for story in World().stories(100)], 300)
    save_pretrained(make(), plain, tmp_path)
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("kite")["input_ids"] == plain.encode("kite")


def test_every_way_to_make_a_token_may_be_listed(tokenizer):
    """As in files that were made from tiktoken's, LLaMA 3's among them."""
    data = tokenizer_json(tokenizer)
    ranks = tokenizer.ranks
    ways = [[spell(t[:k]), spell(t[k:])] for t in sorted(ranks, key=ranks.get) for k in range(1, len(t)) if {t[:k], t[k:]} <= ranks.keys()]
    assert len(ways) > len(tokenizer.merges)
    data["model"]["merges"] = ways
    opened = parse_tokenizer(data)
    rust = Rust.from_str(json.dumps(data))
    for text in nasty(300, seed=1):
        assert opened.encode(text, allowed_special="all") == rust.encode(text).ids == tokenizer.encode(text, allowed_special="all")


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
    (("model", "vocab", "▁the"), 509, "stands for no byte"),
    (("model", "vocab", "Ġthe"), 5000, "order of the ids|gaps"),
    (("model", "merges"), ["Ġ zz"], "not in the vocabulary"),
    (("model", "merges"), [["a"]], "damaged|not enough values"),
    (("model", "merges"), [], "made by no merge"),
    (("added_tokens", 0, "rstrip"), True, "rstrip"),
    (("added_tokens", 0, "id"), "x", "damaged"),
    (("model",), [], "damaged"),
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


# ---- what does not fit


def edited(path, **settings):
    data = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (data | settings).items() if value != "GONE"}))


@pytest.mark.parametrize("settings, message", [
    ({"model_type": "mistral"}, "mistral"), ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"), ({"model_type": "GONE"}, "type None"),
    ({"architectures": "LlamaForCausalLM"}, "unknown here"),
    ({"hidden_size": "GONE"}, "lacks hidden_size"), ({"hidden_size": "32"}, "hidden_size"), ({"hidden_size": 32.0}, "hidden_size"),
    ({"hidden_size": 0}, "hidden_size"), ({"hidden_size": True}, "hidden_size"), ({"hidden_size": 2**70}, "hidden_size"),
    ({"hidden_size": -32}, "hidden_size"), ({"rms_norm_eps": "small"}, "rms_norm_eps"), ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
    ({"head_dim": 16}, "head_dim 16"), ({"num_attention_heads": 3}, "heads"), ({"num_key_value_heads": 3}, "n_kv_heads"),
    ({"num_hidden_layers": 3}, "missing.*model.layers.2"), ({"num_hidden_layers": 1}, "model.layers.1.* has no place"),
    ({"num_hidden_layers": 2**30}, "cannot make"), ({"vocab_size": 2**30}, "weight has shape"),
    ({"vocab_size": 599}, r"weight has shape \(600, 32\)"), ({"intermediate_size": 43}, "mlp"),
    ({"max_position_embeddings": 2**30}, "max_position_embeddings"), ({"hidden_act": "gelu"}, "hidden_act"),
    ({"attention_bias": True}, "attention_bias"), ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"), ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
    ({"rope_scaling": {"rope_type": "llama3"}}, "lacks factor"), ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor"),
    ({"rope_scaling": LLAMA3 | {"factor": 0}}, "factor"), ({"rope_scaling": [8]}, "must be an object"), ({"rope_theta": "big"}, "rope_theta"),
    ({"rope_theta": -1}, "rope_theta"), ({"tie_word_embeddings": True}, "lm_head.weight differs"),
])
def test_configs_that_are_not_ours(settings, message, folder):
    edited(folder / "config.json", **settings)
    with pytest.raises(ValueError, match=message) as caught:
        from_pretrained(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"hidden_size": NaN}', b'{"hidden_size": 1e999}'])
def test_configs_that_are_no_json(content, folder):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="config.json"):
        load_model(folder)


def test_missing_files_and_wrong_paths(folder, tmp_path):
    with pytest.raises(ValueError, match="is a file: name the folder"):
        load_model(folder / "config.json")
    with pytest.raises(ValueError, match="is not there"):
        load_model(tmp_path / "nowhere")
    (folder / "tokenizer.json").unlink()
    assert from_pretrained(folder)[1] is None
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json cannot be read"):
        load_model(folder)


def test_no_pickle_is_opened(folder, monkeypatch):
    import pickle
    for module in torch, pickle:
        monkeypatch.setattr(module, "load", lambda *a, **k: pytest.fail("a pickle was opened"))
    os.rename(folder / "model.safetensors", folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin is a pickle"):
        load_model(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="neither model.safetensors nor"):
        load_model(folder)


def header_file(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("header, data, message", [
    (b"", b"", "header cannot be read"), (b"{", b"", "header cannot be read"), (b"[]", b"", "header cannot be read"),
    (b"\xff" * 20, b"", "header cannot be read"), (b"[" * 100_000, b"", "header cannot be read"), ({"a": 1}, b"", "header cannot be read"),
    ({"a": entry(0, 4, [1])}, b"", "tensor a.* bytes 0 to 4 of 0"), ({"a": entry(0, 4, [1])}, b"12345", "describes 4 bytes"),
    ({"a": entry(4, 8, [1])}, b"12345678", "must begin at 0"), ({"a": entry(-4, 0, [1])}, b"", "tensor a"),
    ({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, b"1234", "tensor b"), ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12), "tensor b"),
    ({"a": entry(0, 4, [2])}, b"1234", "tensor a"), ({"a": entry(0, 4, [-1, -1])}, b"1234", "tensor a"), ({"a": entry(0, 4, [True])}, b"1234", "tensor a"),
    ({"a": entry(0, 2**62, [2**31, 2**29])}, b"1234", "tensor a"), ({"a": entry(0, 4, "x")}, b"1234", "tensor a"),
    ({"a": entry(0, 8, [1], "I64")}, bytes(8), "'I64'"), ({"a": entry(0, 4, [1], [])}, b"1234", "tensor a"),
    ({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"1234", "tensor a is described by"), ({"a": {"data_offsets": [0, 4, 8]}}, b"", "tensor a"),
    ({"a": entry(0, 4, [1])}, b"1234", "missing, for example lm_head.weight|cannot make"),
])
def test_hostile_headers(header, data, message, folder):
    header_file(folder / "model.safetensors", header, data)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 3) + b"{}", struct.pack("<Q", 2**64 - 1)])
def test_lengths_beyond_the_file(content, folder):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="truncated or no safetensors"):
        load_model(folder)


def test_random_damage_of_headers(folder):
    path, rng = folder / "model.safetensors", random.Random(0)
    data = path.read_bytes()
    length, refused = 8 + int.from_bytes(data[:8], "little"), 0
    for i in range(300):
        copy = bytearray(data)
        if i % 3:
            copy[rng.randrange(length)] = rng.randrange(256)
        else:
            del copy[rng.randrange(len(copy)):]
        path.write_bytes(copy)
        try:
            load_model(folder)
        except ValueError as error:
            refused += "model" in str(error)
    assert refused > 250


def reindex(folder, changes):
    path = folder / "model.safetensors.index.json"
    data = json.loads(path.read_text())
    data["weight_map"] |= changes
    path.write_text(json.dumps(data))


def test_shards_outside_the_folder_and_wrong_ones(tmp_path):
    inside = tmp_path / "m"
    published(inside, "100KB")
    name = "model.norm.weight"
    shard = json.loads((inside / "model.safetensors.index.json").read_text())["weight_map"][name]
    shutil.copy(inside / shard, tmp_path / "x.safetensors")
    for bad in ("../x.safetensors", str(tmp_path / "x.safetensors"), "..\\x.safetensors", "C:x.safetensors", "x.bin", "x\0.safetensors"):
        reindex(inside, {name: bad})
        with pytest.raises(ValueError, match="is no safetensors file of this folder"):
            load_model(inside)
    reindex(inside, {name: "other.safetensors"})
    with pytest.raises(ValueError, match="other.safetensors is missing"):
        load_model(inside)
    shutil.copy(inside / shard, inside / "other.safetensors")
    with pytest.raises(ValueError, match="is in .*, too"):
        load_model(inside)
    reindex(inside, {name: 7})
    with pytest.raises(ValueError, match="no weight_map"):
        load_model(inside)
    (inside / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match="no weight_map"):
        load_model(inside)


def test_a_shard_that_lacks_its_tensor(tmp_path):
    published(tmp_path, "100KB")
    places = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    keep = places["model.norm.weight"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": keep}}))
    with pytest.raises(ValueError, match="missing|cannot make"):
        load_model(tmp_path)


def test_what_cannot_be_shipped_is_not_written(tokenizer, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file: name a folder"):
        save_pretrained(make(), tokenizer, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(ValueError, match="base_layer.* has no place"):
        save_pretrained(add_lora(make(), 2, 4), tokenizer, tmp_path / "m")
    few = Llama(LlamaConfig(**{**vars(SMALL), "vocab_size": 500}))
    with pytest.raises(ValueError, match="512 tokens, the model only 500"):
        save_pretrained(few, tokenizer, tmp_path / "m")
    assert os.listdir(tmp_path) == ["file"]


def test_a_tokenizer_too_large_for_the_model_is_refused(folder, tokenizer):
    data = tokenizer_json(tokenizer)
    data["added_tokens"] += [special_entry(f"<|{i}|>", i) for i in range(512, 601)]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="601 tokens, the model only 600"):
        from_pretrained(folder)


def test_a_folder_is_overwritten_file_by_file_and_nothing_else(folder, tokenizer, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder.parent / "note.txt").write_text("mine")
    other = make(LlamaConfig(**{**vars(SMALL), "n_layers": 1}))

    def full_disk(*args):
        raise OSError("no space")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="no space"):
            save_pretrained(other, tokenizer, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    opened = load_model(folder)
    save_pretrained(other, tokenizer, folder)
    assert load_model(folder).config == other.config and far(opened, make(), 600) == 0      # the open one did not change
    assert sorted(os.listdir(folder.parent)) == ["model", "note.txt"]
