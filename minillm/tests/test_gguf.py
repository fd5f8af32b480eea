"""GGUF files: against the reader of the package gguf, and against damage."""
import os
import random
import struct
import tracemalloc

import gguf as reference
import numpy as np
import pytest
import torch

from minillm.gguf import dequantize_q8_0, nearest, pack_string, quantize_q8_0, read_gguf, write_gguf
from minillm.hub import CHAT_TEMPLATE, from_pretrained, llama3_factors, save_gguf, save_pretrained
from minillm.llamacpp import gguf_name, interleave
from minillm.lora import add_lora
from minillm.model import LlamaConfig
from minillm.tests.test_hub import SCALED, SMALL, SPECIAL, make
from minillm.tokenizer import Tokenizer
from minillm.tokenizer_json import GPT2_PATTERN, LLAMA3_PATTERN
from minillm.world import World

WIDE = LlamaConfig(**{**vars(SMALL), "dim": 64, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 100})
TIED = LlamaConfig(**{**vars(WIDE), "tie_embeddings": True})
KINDS = {       # of some entries of the metadata
    "tokenizer.ggml.token_type": "INT32",
    "tokenizer.ggml.tokens": "STRING",
    "tokenizer.ggml.add_bos_token": "BOOL",
    "llama.rope.freq_base": "FLOAT32",
    "llama.attention.layer_norm_rms_epsilon": "FLOAT32",
    "llama.context_length": "UINT32",
    "general.architecture": "STRING",
    "general.file_type": "UINT32",
}


@pytest.fixture(scope="module", name="tokenizer")
def small_tokenizer():
    return Tokenizer.train([story.text for story in World().stories(300)], 512, SPECIAL)


@pytest.fixture
def path(tokenizer, tmp_path):
    save_gguf(make(WIDE), tokenizer, tmp_path / "m.gguf", "f16")
    return tmp_path / "m.gguf"


def contents(reader):
    fields = reader.fields.items()
    return {key: field.contents() for key, field in fields if not key.startswith("GGUF.")}


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("config", [WIDE, SCALED, TIED])
def test_the_reference_reads_the_same(config, dtype, tokenizer, tmp_path):
    model = make(config)
    save_gguf(model, tokenizer, tmp_path / "m.gguf", dtype)
    metadata, tensors = read_gguf(tmp_path / "m.gguf")
    theirs = reference.GGUFReader(tmp_path / "m.gguf")
    assert contents(theirs) == metadata and [t.name for t in theirs.tensors] == list(tensors)
    assert {key: theirs.fields[key].types[-1].name for key in KINDS} == KINDS
    state = {gguf_name(n): w for n, w in model.state_dict().items()}
    if config.tie_embeddings:
        state.pop("output.weight")
    assert tensors.keys() - {"rope_freqs.weight"} == state.keys()
    for t in theirs.tensors:
        w = tensors[t.name]
        expected = dtype.upper()
        if len(t.shape) == 1:
            expected = "F32"
        elif dtype == "q8_0" and t.shape[0] % 32:
            expected = "F16"
        assert t.tensor_type.name == expected
        assert tuple(w.shape) == tuple(int(n) for n in reversed(t.shape))
        assert t.data_offset % 32 == 0
        back = reference.quants.dequantize(t.data, t.tensor_type)
        assert np.array_equal(back.ravel(), w.float().numpy().ravel())
        if dtype == "f32" and ("attn_q" in t.name or "attn_k" in t.name):
            h = config.n_heads if "attn_q" in t.name else config.n_kv_heads
            in_halves = w.view(h, -1, 2, config.dim).transpose(1, 2).reshape(w.shape)
            assert torch.equal(in_halves, state[t.name])
        elif dtype == "f32" and t.name != "rope_freqs.weight":
            assert torch.equal(w, state[t.name])
    assert ("rope_freqs.weight" in tensors) == (config is SCALED)
    if config is SCALED:
        assert torch.equal(tensors["rope_freqs.weight"], llama3_factors(config))


def test_the_tokenizer_in_the_file(path, tokenizer):
    metadata = read_gguf(path)[0]
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == len({*tokens}) == 600 == metadata["llama.vocab_size"]
    assert [tokens[i] for i in range(600) if kinds[i] == 3] == list(SPECIAL)
    assert kinds[512:] == [5] * 88 and tokens[512] == "[PAD512]"
    assert metadata["tokenizer.ggml.pre"] == "llama-bpe"
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert metadata["tokenizer.ggml.eos_token_id"] == tokenizer.special_tokens["<|endoftext|>"]
    assert metadata["tokenizer.chat_template"] == CHAT_TEMPLATE
    assert len(metadata["tokenizer.ggml.merges"]) == len(tokenizer.merges)


@pytest.mark.parametrize("pattern, name", [(LLAMA3_PATTERN, "llama-bpe"), (GPT2_PATTERN, "gpt-2")])
def test_patterns_of_published_tokenizers_have_their_names(pattern, name, tokenizer, tmp_path):
    """A tokenizer.json that load_tokenizer opens can be written as GGUF."""
    special = tuple(tokenizer.special_tokens)
    published = Tokenizer(tokenizer.vocab, tokenizer.merges, special, pattern)
    save_pretrained(make(WIDE), published, tmp_path)
    save_gguf(*from_pretrained(tmp_path), tmp_path / "m.gguf")
    assert read_gguf(tmp_path / "m.gguf")[0]["tokenizer.ggml.pre"] == name


def test_interleaving_is_a_permutation_within_each_head():
    rows = torch.arange(24)[:, None]
    moved = interleave(rows, 3).flatten()
    assert moved[:8].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert (moved[8:16] - 8).tolist() == moved[:8].tolist()
    assert sorted(moved.tolist()) == list(range(24))


@pytest.mark.parametrize("w", [
    torch.randn(64, 320),
    torch.zeros(2, 32),
    torch.full((2, 32), 1e-9),
    torch.full((1, 32), -3.0),
    torch.randn(8, 64) * 1e4,
    torch.arange(-64, 64).float().view(4, 32) / 2,
    torch.full((1, 32), 1e-40),
    torch.randn(3, 4, 64),
])
def test_q8_0_is_that_of_the_reference(w):
    with np.errstate(all="ignore"):
        theirs = reference.quants.quantize(w.numpy(), reference.GGMLQuantizationType.Q8_0)
    ours = quantize_q8_0(w)
    assert np.array_equal(ours.numpy(), theirs.reshape(-1, 34))
    back = dequantize_q8_0(ours).view(w.shape)
    assert back.isfinite().all()
    # half a step, and a little, because the scale is rounded to float16
    assert (back - w).abs().max() <= 0.6 * w.abs().max() / 127 + 1e-7


def test_halves_go_away_from_zero():
    x = torch.tensor([0.5, -0.5, 1.5, 2.5, -2.5, 0.49999997, 126.5, 0.0])
    assert nearest(x).tolist() == [1, -1, 2, 3, -3, 0, 127, 0]


def test_values_of_every_type_are_read(tmp_path):
    writer = reference.GGUFWriter(tmp_path / "m.gguf", "llama")
    values = {"uint8": 200, "int8": -3, "uint16": 60000, "int16": -300, "uint32": 2**32 - 1,
              "int32": -2**31, "float32": 0.5, "bool": True, "string": "naïve 猫",
              "uint64": 2**64 - 1, "int64": -2**63, "float64": 0.1}
    for name, value in values.items():
        getattr(writer, f"add_{name}")(name, value)
    writer.add_array("list", [1, 2, 3])
    writer.add_array("names", ["a", "", "猫"])
    writer.add_tensor("w", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("v", np.arange(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata, tensors = read_gguf(tmp_path / "m.gguf")
    assert metadata == contents(reference.GGUFReader(tmp_path / "m.gguf"))
    assert metadata["uint64"] == 2**64 - 1 and metadata["float64"] == 0.1
    assert tensors["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tensors["v"].dtype == torch.float16 and tensors["v"].tolist() == [0, 1, 2, 3, 4]


def test_metadata_of_every_kind_that_we_write(tmp_path):
    metadata = {"a": 1, "b": 0.25, "c": "", "d": True, "e": [], "f": [-1, 2], "g": ["x", "猫"],
                "h": 2**32 - 1, "i": [0.5, 1.5]}
    write_gguf(tmp_path / "m.gguf", metadata, {"w": torch.ones(2, 32), "v": torch.ones(3)}, "q8_0")
    back, tensors = read_gguf(tmp_path / "m.gguf")
    assert back == metadata == contents(reference.GGUFReader(tmp_path / "m.gguf"))
    assert torch.allclose(tensors["w"], torch.ones(2, 32), atol=1e-3)


# ---- what does not fit


def test_what_cannot_be_written_leaves_nothing(tokenizer, tmp_path):
    model, target = make(WIDE), tmp_path / "m.gguf"
    with pytest.raises(ValueError, match="dtype must be f32, f16 or q8_0: got 'q4_K'"):
        save_gguf(model, tokenizer, target, "q4_K")
    with pytest.raises(ValueError, match="name a file"):
        save_gguf(model, tokenizer, tmp_path)
    with pytest.raises(ValueError, match="name a file"):
        save_gguf(model, tokenizer, tmp_path / "nowhere" / "m.gguf")
    with pytest.raises(ValueError, match="512 tokens, the model only 400"):
        save_gguf(make(LlamaConfig(**{**vars(WIDE), "vocab_size": 400})), tokenizer, target)
    with pytest.raises(ValueError, match="base_layer.* has no place"):
        save_gguf(add_lora(make(WIDE), 2, 4), tokenizer, target)
    words = Tokenizer.train([story.text for story in World().stories(50)], 300, pattern=r"\w+|\W")
    with pytest.raises(ValueError, match="no name for the pattern"):
        save_gguf(model, words, target)
    with pytest.raises(ValueError, match="a GGUF file holds the tokenizer, too, and there is none"):
        save_gguf(model, None, target)
    too_large, not_finite = "blk.1.ffn_up.weight has a weight that", "up_proj.weight .* not finite"
    for value, dtype, message in ((70000.0, "f16", too_large), (-1e7, "q8_0", too_large),
                                  (float("nan"), "f32", not_finite),
                                  (float("inf"), "f32", not_finite)):
        broken = make(WIDE)
        broken.model.layers[1].mlp.up_proj.weight.data[3, 3] = value
        with pytest.raises(ValueError, match=message):
            save_gguf(broken, tokenizer, target, dtype)
    assert os.listdir(tmp_path) == []
    target.write_text("mine")
    with pytest.raises(ValueError):
        save_gguf(broken, tokenizer, target, "f32")
    assert target.read_text() == "mine"


def test_every_truncation_is_noticed(tmp_path):
    whole = tmp_path / "m.gguf"
    metadata = {"a": 1, "names": ["x", "yy"], "numbers": [1, 2]}
    write_gguf(whole, metadata, {"w": torch.ones(2, 32), "v": torch.ones(3)}, "q8_0")
    data = whole.read_bytes()
    for n in range(len(data) - 32):                 # what is missing at the end may be padding only
        whole.write_bytes(data[:n])
        with pytest.raises(ValueError, match="m.gguf"):
            read_gguf(whole)


def test_damage_is_an_error_or_harmless(path):
    data, rng = path.read_bytes(), random.Random(0)
    head = data.index(b"output_norm.weight") + 60
    for _ in range(150):
        copy = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            value = rng.choice((0, 255, 128, rng.randrange(256)))
            place = rng.choice((rng.randrange(24), rng.randrange(400), rng.randrange(head)))
            copy[place] = value
        path.write_bytes(copy)
        try:
            read_gguf(path)
        except ValueError as error:
            assert "m.gguf" in str(error)


HEAD = struct.pack("<4sI", b"GGUF", 3)


def info(name, shape, kind, offset):
    return pack_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file_of(*infos, data=b""):
    head = HEAD + struct.pack("<QQ", len(infos), 0) + b"".join(infos)
    return head + bytes(-len(head) % 32) + data


def metadata_of(count, *parts):
    """A file without tensors that announces `count` entries of metadata."""
    return HEAD + struct.pack("<QQ", 0, count) + b"".join(parts)


KEY = pack_string("k")
SHORT = bytes(64)       # data of one or two small tensors


@pytest.mark.parametrize("content, message", [
    # the header
    (b"", "header"),
    (b"GGUF", "header"),
    (b"GGML" + bytes(20), "not GGUF of version 3"),
    (struct.pack("<4sIQQ", b"GGUF", 2, 0, 0), "version 2"),
    (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "not GGUF of version 3"),
    (HEAD + struct.pack("<QQ", 0, 2**64 - 1), "the metadata"),
    (HEAD + struct.pack("<QQ", 2**64 - 1, 0), "the list of tensors"),
    (HEAD + struct.pack("<QQ", 2**60, 2**60), "the metadata"),
    # metadata
    (metadata_of(1, struct.pack("<Q", 2**63), bytes(20)), "key 0"),
    (metadata_of(1, struct.pack("<Q", 2), b"\xff\xff", bytes(20)), "not UTF-8"),
    (metadata_of(1, KEY, struct.pack("<IQ", 8, 2**62)), "k: "),
    (metadata_of(1, KEY, struct.pack("<IQ", 13, 0)), "k has the unknown type 13"),
    (metadata_of(1, KEY, struct.pack("<IIQ", 9, 4, 2**62)), "k: "),
    (metadata_of(1, KEY, struct.pack("<IIQ", 9, 8, 2**61)), "k: "),
    (metadata_of(1, KEY, struct.pack("<IIQ", 9, 9, 1), bytes(20)), "k has the unknown type 9"),
    (metadata_of(1, KEY, struct.pack("<IIQ", 9, 77, 1), bytes(20)), "k has the unknown type 77"),
    (metadata_of(2, 2 * (KEY + struct.pack("<II", 4, 1))), "the key k comes twice"),
    (metadata_of(1, pack_string("general.alignment"), struct.pack("<II", 4, 0)), "power of two"),
    (metadata_of(1, pack_string("general.alignment"), struct.pack("<II", 4, 24)), "power of two"),
    (metadata_of(1, pack_string("general.alignment"), struct.pack("<I", 8), pack_string("32")),
     "power of two"),
    # sizes of tensors
    (file_of(info("w", [2**40, 2**40], 0, 0)), "data of tensor w"),
    (file_of(info("w", [2**63, 2], 0, 0)), "data of tensor w"),
    (file_of(info("w", [2**32, 2**32], 0, 0), data=SHORT), "data of tensor w"),
    (file_of(info("w", [0, 2**63], 0, 0)), "tensor w"),
    (file_of(info("w", [8], 0, 0), data=bytes(31)), "data of tensor w"),
    # their places, types and names
    (file_of(info("w", [4], 0, 32), data=SHORT), "tensor w.* expected"),
    (file_of(info("w", [4], 0, 2**63), data=SHORT), "tensor w"),
    (file_of(info("w", [4], 0, 0), info("v", [4], 0, 0), data=SHORT), "tensor v.* at 32"),
    (file_of(info("w", [33], 8, 0), data=SHORT), "whole blocks"),
    (file_of(info("w", [4], 12, 0), data=SHORT), "tensor w has type 12"),
    (file_of(info("w", [4], 0, 0), info("w", [4], 0, 32), data=SHORT), "tensor w comes twice"),
    # dimensions
    (file_of(info("w", [], 0, 0), data=SHORT), "0 dimensions"),
    (file_of(info("w", [1] * 5, 0, 0), data=SHORT), "5 dimensions"),
    (HEAD + struct.pack("<QQ", 1, 0) + pack_string("w") + struct.pack("<I", 2**31) + SHORT,
     "dimensions"),
])
def test_hostile_files(content, message, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as caught:
            read_gguf(path)
        assert "m.gguf" in str(caught.value)
        # far less than any of these files claims to hold
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        read_gguf(tmp_path)
    with pytest.raises(ValueError, match="is not there"):
        read_gguf(tmp_path / "m.gguf")
