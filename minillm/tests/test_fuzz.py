"""Every kind of file that the package reads, cut off and with bytes changed, 2,000 times each.

A damaged file may still be a file of its kind (a weight has changed). What is refused is refused
with a ValueError or an OSError that names the file, or the folder of a model, where the fault may
lie in any of its files. The damage is seeded.
"""
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minillm.arc import cache, sizes
from minillm.data import ENDOFTEXT, read_tokens, write_tokens
from minillm.gguf import read_gguf
from minillm.hub import read_config, read_tensors, save_gguf, save_pretrained
from minillm.lora import add_lora, lora_layers, save_adapter
from minillm.model import Llama, LlamaConfig
from minillm.optim import AdamW
from minillm.quantize import load_model, quantize_model, save_model
from minillm.sft import ASSISTANT, USER
from minillm.storage.adapter_folder import read_adapter
from minillm.storage.checkpoint import load_checkpoint, save_checkpoint
from minillm.storage.model_folder import load_tokenizer
from minillm.storage.text_files import read_documents
from minillm.tokenizer import Tokenizer

TIMES = 2000
CONFIG = LlamaConfig(vocab_size=280, dim=8, n_layers=1, n_heads=2, hidden_dim=8, max_seq_len=32)
TEXT = "The shy fox has a kite. Ida saw the fox and the kite at the river. " * 20
TOKENIZER = Tokenizer.train(TEXT, 270, (ENDOFTEXT, USER, ASSISTANT))


def read_model(folder):
    """What load_model reads."""
    return read_tensors(folder, read_config(folder / "config.json"), torch.float32)


def model_folder(folder):
    save_pretrained(Llama(CONFIG), TOKENIZER, folder)
    return read_model


def sharded_folder(folder):
    save_pretrained(Llama(CONFIG), None, folder)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    places = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for shard in sorted(set(places.values())):
        save_file({name: tensors[name] for name in names if places[name] == shard}, folder / shard)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return read_model


def tokenizer_folder(folder):
    model_folder(folder)
    return lambda folder: load_tokenizer(folder / "tokenizer.json")


def adapter_folder(folder):
    model = add_lora(Llama(CONFIG), 2, 4)
    save_adapter(model, folder)
    layers = list(lora_layers(model))
    return lambda folder: read_adapter(folder, layers)


def own_tokenizer(folder):
    TOKENIZER.save(folder / "own.json")
    return lambda folder: Tokenizer.load(folder / "own.json")


def gguf_file(folder):
    save_gguf(Llama(CONFIG), TOKENIZER, folder / "m.gguf")
    return lambda folder: read_gguf(folder / "m.gguf")


def quantized_file(folder):
    save_model(quantize_model(Llama(CONFIG)), folder / "int8.safetensors")
    return lambda folder: load_model(folder / "int8.safetensors")


def checkpoint_file(folder):
    model = Llama(CONFIG)
    optimizer = AdamW(model)
    path = save_checkpoint(folder, model, optimizer, [{"loss": 1.0}])
    return lambda folder: load_checkpoint(path, model, optimizer)


def stage_folder(folder):
    cache.save(cache.Stage(Llama(CONFIG), TOKENIZER, [{"loss": 1.0}]), folder)
    recipe = replace(sizes.STORIES, model=CONFIG)
    return lambda folder: cache.load(folder, recipe, None, lambda recipe: [])


def text_file(folder):
    (folder / "a.txt").write_text(TEXT.replace("fox", "füchsin"), encoding="utf-8")
    return lambda folder: read_documents(folder / "a.txt", least=1)


def tokens_file(folder):
    write_tokens(folder / "a.bin", [TEXT], TOKENIZER)
    return lambda folder: read_tokens(folder / "a.bin", TOKENIZER)


KINDS = [
    ("config.json", model_folder), ("model.safetensors", model_folder),
    ("model.safetensors.index.json", sharded_folder), ("model-0.safetensors", sharded_folder),
    ("tokenizer.json", tokenizer_folder),
    ("adapter_config.json", adapter_folder), ("adapter_model.safetensors", adapter_folder),
    ("own.json", own_tokenizer), ("m.gguf", gguf_file),
    ("int8.safetensors", quantized_file), ("step-00000001.safetensors", checkpoint_file),
    ("model.safetensors", stage_folder), ("history.json", stage_folder),
    ("tokenizer.json", stage_folder), ("SHA256SUMS", stage_folder),
    ("a.txt", text_file), ("a.bin", tokens_file),
]


def damaged(data, rng):
    """The bytes, cut off or with one to three of them changed."""
    if rng.random() < 0.3:
        return data[:rng.randrange(len(data))]
    copy = bytearray(data)
    near = rng.choice([len(data), min(len(data), 400)])       # half of them where headers are
    for _ in range(rng.randrange(1, 4)):
        copy[rng.randrange(near)] = rng.choice([rng.randrange(256), ord(rng.choice('0-9".,{}[]'))])
    return bytes(copy)


@pytest.mark.parametrize("name, make", KINDS, ids=[f"{m.__name__}-{n}" for n, m in KINDS])
def test_damage_is_refused_by_name(name, make, tmp_path):
    torch.manual_seed(0)
    read, path, rng = make(tmp_path), tmp_path / name, random.Random(0)
    whole, refused = path.read_bytes(), 0
    read(tmp_path)
    for i in range(TIMES):
        path.write_bytes(damaged(whole, rng))
        try:
            read(tmp_path)
        except (ValueError, OSError) as error:
            assert name in str(error) or str(tmp_path) in str(error), f"damage {i}: {error}"
            refused += 1
    assert refused > TIMES // 4


def test_the_damage_is_always_the_same():
    rng, again = random.Random(0), random.Random(0)
    data = Path(__file__).read_bytes()
    assert [damaged(data, rng) for _ in range(9)] == [damaged(data, again) for _ in range(9)]
