"""Folders with adapters: what peft writes is read as peft means it, all else is refused by name."""
import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from minillm.storage.adapter_folder import read_adapter


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=24, max_position_embeddings=64))


@pytest.fixture(scope="module")
def layers(base):
    return [n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)]


def written(base, folder, **settings):
    """What peft writes, and the layers around which it put an adapter."""
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]} | settings
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**settings))
    model.save_pretrained(folder)
    return {n.removeprefix("base_model.model.").removesuffix(".lora_A")
            for n, _ in model.named_modules() if n.endswith(".lora_A")}


@pytest.mark.parametrize("targets", [
    ["q_proj", "v_proj"], "all-linear", ["self_attn.q_proj", "mlp.up_proj"],
    ["model.layers.1.self_attn.q_proj"], r".*\.(q_proj|v_proj)", r"model\.layers\.0\..*_proj"])
def test_names_as_peft_writes_them(targets, base, layers, tmp_path):
    wanted = written(base, tmp_path, target_modules=targets)
    found = read_adapter(tmp_path, layers)
    assert set(found.layers) == wanted and (found.rank, found.alpha) == (2, 4)
    assert len(found.tensors) == 2 * len(wanted)


def test_all_linear_as_a_word(base, layers, tmp_path):
    """As a user of peft may write it by hand: all linear layers but the last."""
    written(base, tmp_path)
    edit(tmp_path, target_modules="all-linear")
    assert read_adapter(tmp_path, layers).layers == [n for n in layers if n != "lm_head"]


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in settings.items() if v != "GONE"}))


@pytest.mark.parametrize("changes, message", [
    ({"peft_type": "GONE"}, "peft_type = None"), ({"peft_type": "LOHA"}, "'LOHA'"),
    ({"r": "GONE"}, "r must be"), ({"r": 2.0}, "r must be"), ({"r": True}, "r must be"),
    ({"lora_alpha": "GONE"}, "lora_alpha must be"), ({"lora_alpha": -1}, "lora_alpha must be"),
    ({"target_modules": "GONE"}, "target_modules must be"),
    ({"target_modules": 3}, "target_modules must be"), ({"target_modules": "(("}, "must be"),
    ({"target_modules": []}, "empty"), ({"target_modules": ["wq"]}, "'wq', and no linear layer"),
    ({"bias": "all"}, "bias = 'all'"), ({"use_rslora": True}, "use_rslora"),
    ({"use_dora": True}, "use_dora"), ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"), ({"layers_to_transform": [1]}, "layers_to"),
    ({"exclude_modules": ["x"]}, "exclude_modules"), ({"lora_bias": True}, "lora_bias"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
    ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
    ({"init_lora_weights": "olora"}, "olora"), ({"init_lora_weights": 1}, "init_lora_weights"),
    ({"a_switch_of_next_year": 1}, "a_switch_of_next_year"),
])
def test_other_kinds_are_refused_by_name(changes, message, base, layers, tmp_path):
    written(base, tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        read_adapter(tmp_path, layers)
    assert "adapter_config.json" in str(caught.value)


def test_other_beginnings_that_leave_the_model_as_it_was(base, layers, tmp_path):
    for begun in True, "gaussian", "orthogonal":
        written(base, tmp_path / str(begun), init_lora_weights=begun)
        assert read_adapter(tmp_path / str(begun), layers).layers


def test_weights_in_a_pickle_are_named_and_not_opened(base, layers, tmp_path):
    written(base, tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="safetensors is missing; adapter_model.bin is a pickle"):
        read_adapter(tmp_path, layers)


@pytest.mark.parametrize("damage", [
    shutil.rmtree, lambda f: (f / "adapter_model.safetensors").unlink(),
    lambda f: (f / "adapter_model.safetensors").write_bytes(b""),
    lambda f: (f / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/"),
    lambda f: (f / "adapter_config.json").write_text(""),
    lambda f: (f / "adapter_config.json").write_text("[]")])
def test_damaged_folders(damage, base, layers, tmp_path):
    written(base, tmp_path / "adapter")
    damage(tmp_path / "adapter")
    with pytest.raises(ValueError, match="adapter_"):
        read_adapter(tmp_path / "adapter", layers)
