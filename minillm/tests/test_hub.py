"""Model folders: against transformers, and against damage."""
import json
import os

import pytest
import torch
import transformers

from minillm.generate import generate
from minillm.hub import (ScaledConfig, ScaledLlama, from_pretrained, load_model, model_card,
                         save_pretrained, tensor_shapes)
from minillm.model import Llama, LlamaConfig
from minillm.sft import ASSISTANT, USER
from minillm.tokenizer import Tokenizer
from minillm.world import World

SMALL = LlamaConfig(vocab_size=600, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=44,
                    max_seq_len=256, rope_theta=5e5)
SCALED = ScaledConfig(**{**vars(SMALL), "rope_scaling": (8.0, 1.0, 4.0, 64)})
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
SPECIAL = ("<|endoftext|>", USER, ASSISTANT)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([story.text for story in World().stories(300)], 512, SPECIAL)


def make(config=SMALL):
    torch.manual_seed(0)
    model = (ScaledLlama if isinstance(config, ScaledConfig) else Llama)(config)
    for p in model.parameters():
        # norms around 1, so that a swapped one shows
        torch.nn.init.normal_(p, float(p.ndim == 1), 0.2)
    return model.eval()


@pytest.fixture
def folder(tokenizer, tmp_path):
    save_pretrained(make(), tokenizer, tmp_path / "model")
    return tmp_path / "model"


def published(path, shards="1GB", dtype=torch.float32, **settings):
    torch.manual_seed(0)
    config = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 172,
              "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
              "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "initializer_range": 0.2}
    config = transformers.LlamaConfig(**config | settings)
    made = transformers.LlamaForCausalLM(config).to(dtype).eval()
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


@pytest.mark.parametrize("tied", [False, True])
def test_shapes_are_those_of_the_model(tied):
    config = LlamaConfig(**{**vars(SMALL), "tie_embeddings": tied})
    shapes = {name: tuple(z.shape) for name, z in Llama(config).state_dict().items()}
    if tied:
        del shapes["lm_head.weight"]
    assert tensor_shapes(config) == shapes


@pytest.mark.parametrize("config", [
    SMALL, SCALED, LlamaConfig(**{**vars(SMALL), "tie_embeddings": True, "norm_eps": 1e-3})])
def test_a_folder_comes_back_and_opens_in_transformers(config, tokenizer, tmp_path):
    model = make(config)
    save_pretrained(model, tokenizer, tmp_path / "m")
    back, again = from_pretrained(tmp_path / "m")
    assert back.config == config and type(back) is type(model)
    assert all(torch.equal(w, model.state_dict()[n]) for n, w in back.state_dict().items())
    assert (again.vocab, again.merges, again.special_tokens, again.pattern) == \
        (tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens, tokenizer.pattern)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    # Equal weights at other addresses: a library of matrix products may round them otherwise.
    assert far(theirs, model, 600) < 1e-5 and far(back, model, 600) < 1e-6
    assert back.lm_head.weight.requires_grad and not any(p.is_meta for p in back.parameters())
    assert (back.lm_head.weight is back.model.embed_tokens.weight) == config.tie_embeddings
    assert sorted(os.listdir(tmp_path / "m")) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json"]


def test_a_card_is_written_and_none_is_left_alone(tokenizer, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    save_pretrained(make(), tokenizer, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    card = model_card(make(), "# A model", "mit")
    save_pretrained(make(), tokenizer, tmp_path, card)
    said = (tmp_path / "README.md").read_text(encoding="utf-8")
    _, header, text = said.split("---\n")
    settings = dict(line.split(": ") for line in header.splitlines())
    assert settings["license"] == "mit" and settings["library_name"] == "transformers"
    parameters = sum(p.numel() for p in make().parameters())
    assert "# A model" in text and f"{parameters:,}" in text and "256 tokens" in text


@torch.no_grad()
def test_generate_goes_on_until_the_end(folder):
    """Without a word about the length, transformers would stop after 20 tokens."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ours = from_pretrained(folder)[0]
    theirs.generation_config.eos_token_id = None
    ids = torch.randint(0, 500, (1, 8), generator=torch.Generator().manual_seed(3))
    new = theirs.generate(ids, pad_token_id=0)
    assert new.shape == (1, 208) and torch.equal(new, generate(ours, ids, 200, temperature=0))


@pytest.mark.parametrize("settings", [
    {}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1},
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
    # bfloat16 numbers are float32 numbers
    assert far(load_model(tmp_path), made) < 1e-5
    half = load_model(tmp_path, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.rope[0].dtype == torch.float32
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
        old |= {"rope_theta": 5e5, "rope_scaling": scaling, "torch_dtype": "float32"}
        path.write_text(json.dumps(old))
        assert load_model(tmp_path).config == config and far(load_model(tmp_path), made) < 1e-5
    assert config.rope_scaling == (8.0, 1.0, 4.0, 64) and config.rope_theta == 5e5


def test_defaults_are_those_of_transformers(tmp_path):
    made = published(tmp_path, num_key_value_heads=4)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    for key in ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters",
                "tie_word_embeddings", "hidden_act"):
        settings.pop(key, None)
    path.write_text(json.dumps(settings))
    ours, theirs = load_model(tmp_path), transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert far(ours, theirs) < 1e-5 and far(ours, made) < 1e-5


def test_stored_copies_of_tied_weights_and_old_buffers(tmp_path):
    from safetensors.torch import load_file, save_file
    published(tmp_path, tie_word_embeddings=True)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    want = load_model(tmp_path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
                         "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, path)
    assert far(load_model(tmp_path), want) < 1e-6
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, path)
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        load_model(tmp_path)


@torch.no_grad()
def test_stretched_positions_with_a_cache_and_on_another_device(tmp_path):
    made = published(tmp_path, rope_parameters=LLAMA3 | {"rope_theta": 5e5})
    model, ids = load_model(tmp_path), torch.randint(0, 300, (1, 150))
    new = generate(model, ids, 20, temperature=0)
    theirs = made.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0,
                           eos_token_id=None)
    assert torch.equal(new, theirs)
    assert model.to("meta")(ids.to("meta")).is_meta and model.rope[0].is_meta
