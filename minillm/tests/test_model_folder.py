"""Model folders that are damaged, hostile, or not ours."""
# pytest fills an argument with the fixture that is imported under its name:
# ruff: noqa: F811
import json
import os
import random
import shutil
import struct

import pytest
import torch
import transformers

from minillm.hub import from_pretrained, load_model, save_pretrained
from minillm.lora import add_lora
from minillm.model import Llama, LlamaConfig
from minillm.tests.test_hub import folder, tokenizer  # noqa: F401 (fixtures)
from minillm.tests.test_hub import LLAMA3, SMALL, far, make, published
from minillm.tokenizer_json import special_entry, tokenizer_json


def edited(path, **settings):
    data = json.loads(path.read_text())
    kept = {key: value for key, value in (data | settings).items() if value != "GONE"}
    path.write_text(json.dumps(kept))


@pytest.mark.parametrize("settings, message", [
    ({"model_type": "mistral"}, "mistral"),
    ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
    ({"model_type": "GONE"}, "type None"),
    ({"architectures": "LlamaForCausalLM"}, "unknown here"),
    ({"hidden_size": "GONE"}, "lacks hidden_size"), ({"hidden_size": "32"}, "hidden_size"),
    ({"hidden_size": 32.0}, "hidden_size"),
    ({"hidden_size": 0}, "hidden_size"), ({"hidden_size": True}, "hidden_size"),
    ({"hidden_size": 2**70}, "hidden_size"),
    ({"hidden_size": -32}, "hidden_size"), ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
    ({"head_dim": 16}, "head_dim 16"), ({"num_attention_heads": 3}, "heads"),
    ({"num_key_value_heads": 3}, "n_kv_heads"),
    ({"num_hidden_layers": 3}, "missing.*model.layers.2"),
    ({"num_hidden_layers": 1}, "model.layers.1.* has no place"),
    ({"num_hidden_layers": 2**30}, "cannot make"), ({"vocab_size": 2**30}, "weight has shape"),
    ({"vocab_size": 599}, r"weight has shape \(600, 32\)"), ({"intermediate_size": 43}, "mlp"),
    ({"max_position_embeddings": 2**30}, "max_position_embeddings"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"attention_bias": True}, "attention_bias"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
    ({"rope_scaling": {"rope_type": "llama3"}}, "lacks factor"),
    ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor"),
    ({"rope_scaling": LLAMA3 | {"factor": 0}}, "factor"),
    ({"rope_scaling": [8]}, "must be an object"), ({"rope_theta": "big"}, "rope_theta"),
    ({"rope_theta": -1}, "rope_theta"), ({"tie_word_embeddings": True}, "lm_head.weight differs"),
])
def test_configs_that_are_not_ours(settings, message, folder):
    edited(folder / "config.json", **settings)
    with pytest.raises(ValueError, match=message) as caught:
        from_pretrained(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"hidden_size": NaN}',
    b'{"hidden_size": 1e999}'])
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
    (b"", b"", "header cannot be read"), (b"{", b"", "header cannot be read"),
    (b"[]", b"", "header cannot be read"),
    (b"\xff" * 20, b"", "header cannot be read"), (b"[" * 100_000, b"", "header cannot be read"),
    ({"a": 1}, b"", "header cannot be read"),
    ({"a": entry(0, 4, [1])}, b"", "tensor a.* bytes 0 to 4 of 0"),
    ({"a": entry(0, 4, [1])}, b"12345", "describes 4 bytes"),
    ({"a": entry(4, 8, [1])}, b"12345678", "must begin at 0"),
    ({"a": entry(-4, 0, [1])}, b"", "tensor a"),
    ({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, b"1234", "tensor b"),
    ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12), "tensor b"),
    ({"a": entry(0, 4, [2])}, b"1234", "tensor a"),
    ({"a": entry(0, 4, [-1, -1])}, b"1234", "tensor a"),
    ({"a": entry(0, 4, [True])}, b"1234", "tensor a"),
    ({"a": entry(0, 2**62, [2**31, 2**29])}, b"1234", "tensor a"),
    ({"a": entry(0, 4, "x")}, b"1234", "tensor a"),
    ({"a": entry(0, 8, [1], "I64")}, bytes(8), "'I64'"),
    ({"a": entry(0, 4, [1], [])}, b"1234", "tensor a"),
    ({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"1234", "tensor a is described by"),
    ({"a": {"data_offsets": [0, 4, 8]}}, b"", "tensor a"),
    ({"a": entry(0, 4, [1])}, b"1234", "missing, for example lm_head.weight|cannot make"),
])
def test_hostile_headers(header, data, message, folder):
    header_file(folder / "model.safetensors", header, data)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("content", [
    b"", b"1234567", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 3) + b"{}",
    struct.pack("<Q", 2**64 - 1)])
def test_lengths_beyond_the_file(content, folder):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="truncated or not a safetensors"):
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
    for bad in ("../x.safetensors", str(tmp_path / "x.safetensors"), "..\\x.safetensors",
                "C:x.safetensors", "x.bin", "x\0.safetensors"):
        reindex(inside, {name: bad})
        with pytest.raises(ValueError, match="is not a safetensors file of this folder"):
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
    keep = {"model.norm.weight": places["model.norm.weight"]}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": keep}))
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


@pytest.mark.parametrize("swap", [
    lambda m, t, f: (t, m, f), lambda m, t, f: (f, m, t), lambda m, t, f: (m, f, t),
    lambda m, t, f: (m.state_dict(), t, f)])
def test_arguments_in_another_order_are_named(swap, tokenizer, tmp_path):
    with pytest.raises(TypeError, match="pass save_pretrained a Llama, a Tokenizer or None"):
        save_pretrained(*swap(make(), tokenizer, tmp_path / "m"))
    assert not os.listdir(tmp_path)


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
    assert load_model(folder).config == other.config
    assert far(opened, make(), 600) < 1e-6           # the open one did not change, but for rounding
    assert sorted(os.listdir(folder.parent)) == ["model", "note.txt"]


@pytest.mark.parametrize("name, message", [
    ("model-00001-of-00002.safetensors", "model-00001"), ("adapter_config.json", "adapter_config"),
    ("special_tokens_map.json", "special_tokens_map"), ("tokenizer.model", "tokenizer.model"),
    ("additional_chat_templates/", "additional_chat_templates"), ("vocab.json", "vocab.json"),
    ("README.md", None), ("LICENSE", None), ("m.gguf", None), (".git/", None),
    ("checkpoints/", None),
])
def test_a_folder_that_was_used_before(name, message, tokenizer, tmp_path):
    """What other readers would take together with ours, or in its place, is not overlooked."""
    place = tmp_path / name
    place.mkdir() if name.endswith("/") else place.write_text("{}")
    if message is None:
        save_pretrained(make(), tokenizer, tmp_path)
        return
    with pytest.raises(ValueError, match=f"holds {message}"):
        save_pretrained(make(), tokenizer, tmp_path)
    assert os.listdir(tmp_path) == [name.rstrip("/")]


def test_a_tokenizer_of_an_earlier_model_is_not_left_beside_a_new_one(folder):
    with pytest.raises(ValueError, match="holds chat_template.jinja"):
        save_pretrained(make(), None, folder)


def test_a_model_folder_with_an_adapter_in_it(folder):
    """transformers would add the adapter."""
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter"):
        load_model(folder)


@pytest.mark.parametrize("settings, message", [
    ({"rope_interleaved": True}, "rope_interleaved = True"),
    ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"), ({"is_decoder": True}, "is_decoder"),
    ({"logits_scaling": 8}, "logits_scaling = 8"),
    ({"tie_word_embeddings": "true"}, "tie_word_embeddings must be"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings must be"),
    ({"rope_scaling": LLAMA3, "rope_parameters": LLAMA3 | {"factor": 4.0}}, "different values"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, "rope_theta twice"),
    ({"rope_scaling": LLAMA3 | {"attention_factor": 2.0}}, "attention_factor"),
    ({"rope_scaling": LLAMA3 | {"type": "yarn"}}, "type of RoPE twice"),
    ({"rope_traditional": True}, "rope_traditional"), ({"sliding_window": 16}, "sliding_window"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"quantization": {"bits": 4, "group_size": 64}}, "quantization"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"layer_types": ["full_attention"]}, "for each of the 2 layers"),
    ({"layer_types": "full_attention"}, "layer_types"),
    ({"layer_types": {"full_attention": 2}}, "layer_types"),
    ({"pruned_heads": {"1": [0]}}, "pruned_heads"),
    ({"chunk_size_feed_forward": 8}, "chunk_size_feed_forward = 8"),
    ({"attention_multiplier": 2.0}, "attention_multiplier"),
])
def test_settings_that_could_change_the_result(settings, message, folder):
    edited(folder / "config.json", **settings)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(folder)
    assert "config.json" in str(caught.value)


def test_settings_of_published_models_that_change_nothing(folder):
    """From the config.json of SmolLM2-135M, and of early conversions of LLaMA."""
    want = load_model(folder)
    edited(folder / "config.json", **{
        "_name_or_path": "x", "transformers_version": "4.46.3", "attention_dropout": 0.0,
        "is_llama_config": True, "initializer_range": 0.041, "pretraining_tp": 1,
        "rope_interleaved": False, "use_cache": True, "pad_token_id": None,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "max_sequence_length": 2048, "torch_dtype": "bfloat16"})
    assert far(load_model(folder), want, 600) < 1e-6


def test_settings_of_other_tools_that_change_nothing(folder):
    """transformers 4.48 to 4.55, programs that write all of a config, mlx."""
    want = load_model(folder)
    edited(folder / "config.json", **{
        "_attn_implementation_autoset": True, "_attn_implementation": "sdpa", "_commit_hash": "1",
        "attn_implementation": "flash_attention_2", "return_dict": True, "torchscript": False,
        "output_attentions": False, "output_hidden_states": False,
        "tokenizer_class": "PreTrainedTokenizerFast", "use_sliding_window": False,
        "rope_traditional": False})
    assert far(load_model(folder), want, 600) < 1e-6


def test_a_config_with_all_that_transformers_knows(folder):
    """to_dict() of the pinned version, and what 4.57 has in it beside that; layer_types is of
    newer architectures, and some tools write it for a LLaMA, too."""
    want = load_model(folder)
    whole = transformers.LlamaConfig.from_pretrained(folder).to_dict()
    assert {"chunk_size_feed_forward", "is_encoder_decoder", "id2label"} <= whole.keys()
    (folder / "config.json").write_text(json.dumps(whole))
    assert far(load_model(folder), want, 600) < 1e-6
    edited(folder / "config.json", **{
        "pruned_heads": {}, "is_decoder": False, "add_cross_attention": False,
        "tie_encoder_decoder": False, "max_length": 20, "min_length": 0, "do_sample": False,
        "early_stopping": False, "num_beams": 1, "temperature": 1.0, "top_k": 50, "top_p": 1.0,
        "typical_p": 1.0, "repetition_penalty": 1.0, "length_penalty": 1.0,
        "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "num_return_sequences": 1,
        "output_scores": False, "return_dict_in_generate": False, "remove_invalid_values": False,
        "num_beam_groups": 1, "diversity_penalty": 0.0, "tf_legacy_loss": False,
        "use_bfloat16": False, "layer_types": ["full_attention"] * 2})
    assert far(load_model(folder), want, 600) < 1e-6
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert (theirs(ids).logits - want(ids)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", ["float16", None, float])
def test_a_dtype_that_is_none_of_torchs(dtype, folder):
    """transformers takes names."""
    with pytest.raises(TypeError, match="dtype must be one of torch's"):
        load_model(folder, dtype)
