"""The rival implementations that we are measured against, from PyPI and from checkouts."""
import contextlib
import copy
import importlib.util
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from minillm.model import Llama, LlamaConfig
from minillm.tokenizer import PATTERN, Tokenizer


def installed(name: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(name) is not None


def module_at(path: Path) -> ModuleType:
    """The module in a file of a checkout."""
    name = f"peer_{path.parent.name}_{path.stem}".replace(".", "_")
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package_in(folder: Path, name: str) -> ModuleType:
    """The module `name`, with dots, of a package in a folder."""
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


def hugging_face(c: LlamaConfig) -> nn.Module:
    """transformers' LLaMA of the same shape."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads,
        intermediate_size=c.hidden_dim, max_position_embeddings=c.max_seq_len,
        rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tie_embeddings))


def litgpt(c: LlamaConfig) -> nn.Module:
    """litgpt's LLaMA of the same shape."""
    from litgpt.config import Config
    from litgpt.model import GPT
    model = GPT(Config(
        n_layer=c.n_layers, n_embd=c.dim, n_head=c.n_heads, n_query_groups=c.n_kv_heads,
        block_size=c.max_seq_len, vocab_size=c.vocab_size, padded_vocab_size=c.vocab_size,
        intermediate_size=c.hidden_dim, bias=False, mlp_class_name="LLaMAMLP",
        norm_class_name="RMSNorm", norm_eps=c.norm_eps, parallel_residual=False,
        rotary_percentage=1.0, rope_base=c.rope_theta))
    model.apply(model._init_weights)
    if c.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    return model


def llama2c(source: Path, c: LlamaConfig) -> nn.Module:
    """The model of a checkout of llama2.c, which ties its embeddings; untied here if ours are."""
    m = module_at(source / "model.py")
    model = m.Transformer(m.ModelArgs(
        dim=c.dim, n_layers=c.n_layers, n_heads=c.n_heads, n_kv_heads=c.n_kv_heads,
        vocab_size=c.vocab_size, hidden_dim=c.hidden_dim, max_seq_len=c.max_seq_len))
    if not c.tie_embeddings:
        model.tok_embeddings.weight = nn.Parameter(model.output.weight.detach().clone())
    return model


def llama2c_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of llama2.c's model, which stores it in an attribute."""
    model(inputs, targets)
    return model.last_loss


def nano_gpt(source: Path, c: LlamaConfig) -> nn.Module:
    """The model of a checkout of nanoGPT.

    GPT-2's block, cheaper than LLaMA's, with tied embeddings and learned positions.
    """
    m = module_at(source / "model.py")
    with contextlib.redirect_stdout(None):
        return m.GPT(m.GPTConfig(
            block_size=c.max_seq_len, vocab_size=c.vocab_size, n_layer=c.n_layers,
            n_head=c.n_heads, n_embd=c.dim, bias=False))


def minimind(source: Path, c: LlamaConfig) -> nn.Module:
    """The model of a checkout of minimind, without its norms of queries and keys.

    LLaMA has no such norms.
    """
    m = module_at(source / "model" / "model_minimind.py")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")      # a name that transformers will drop
        model = m.MiniMindForCausalLM(m.MiniMindConfig(
            hidden_size=c.dim, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads, intermediate_size=c.hidden_dim,
            vocab_size=c.vocab_size, max_position_embeddings=c.max_seq_len,
            rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta,
            tie_word_embeddings=c.tie_embeddings))
    for layer in model.model.layers:
        layer.self_attn.q_norm = layer.self_attn.k_norm = nn.Identity()
    return model


def raschka_config(c: LlamaConfig) -> dict[str, Any]:
    """A shape as LLMs-from-scratch describes it."""
    return {
        "vocab_size": c.vocab_size, "context_length": c.max_seq_len, "emb_dim": c.dim,
        "n_heads": c.n_heads, "n_layers": c.n_layers, "hidden_dim": c.hidden_dim,
        "n_kv_groups": c.n_kv_heads, "rope_base": c.rope_theta, "rope_freq": None,
        "dtype": torch.float32,
    }


def raschka(source: Path, c: LlamaConfig) -> nn.Module:
    """Llama 3 of a checkout of LLMs-from-scratch, the faster of its two versions."""
    m = package_in(source / "pkg", "llms_from_scratch.llama3")
    model = m.Llama3ModelFast(raschka_config(c))
    if c.tie_embeddings:
        model.out_head.weight = model.tok_emb.weight
    return model


def logits_loss(logits_of: Callable, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy of a model; logits_of(model, inputs) gives its logits (b, t, v)."""
    return F.cross_entropy(logits_of(model, inputs).flatten(0, 1), targets.flatten())


@dataclass(frozen=True)
class Peer:
    """A model by others.

    make(config) -> model; loss(model, inputs, targets) -> mean cross-entropy; is_llama: whether it
    is the same architecture as ours, or only of about the same size.
    """

    make: Callable
    loss: Callable
    is_llama: bool = True


def training_peers(folder: Path | None = None) -> dict[str, Peer]:
    """{name: Peer} of those that are installed, or are in a folder of checkouts."""
    plain = partial(logits_loss, lambda model, inputs: model(inputs))
    in_output = partial(logits_loss, lambda model, inputs: model(inputs).logits)
    uncached = partial(logits_loss, lambda model, inputs: model(inputs, use_cache=False).logits)
    peers = {"transformers": Peer(hugging_face, uncached)}
    if installed("litgpt"):
        peers["litgpt"] = Peer(litgpt, plain)
    in_checkouts = {
        "llama2.c": Peer(llama2c, llama2c_loss),
        "nanoGPT": Peer(nano_gpt, lambda model, *batch: model(*batch)[1], is_llama=False),
        "minimind": Peer(minimind, in_output),
        "LLMs-from-scratch": Peer(raschka, plain),
    }
    for name, peer in in_checkouts.items():
        if folder and (folder / name).is_dir():
            peers[name] = Peer(partial(peer.make, folder / name), peer.loss, peer.is_llama)
    return peers


def peer_step(peer: Peer, c: LlamaConfig, precision: str, inputs: Tensor, targets: Tensor,
              compiling: bool = False) -> Callable[[], Tensor]:
    """A function that makes one training step of a peer's model of shape c, as its users make it.

    It returns the loss before the step.
    """
    model = peer.make(c).to(inputs.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    loss_of = torch.compile(peer.loss) if compiling else peer.loss

    def step():
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(model, inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def greedy(model: nn.Module, ids: Tensor, n: int) -> Tensor:
    """transformers' generation of n tokens after each row of ids (b, t) -> (b, t + n)."""
    model.generation_config.eos_token_id = None
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n,
                          do_sample=False, pad_token_id=0)


@torch.inference_mode()
def litgpt_greedy(model: nn.Module, ids: Tensor, n: int) -> Tensor:
    """The same as greedy, by litgpt's model with its key-value cache.

    (Its own loop for one prompt works like this; its loop for several does not shorten the cache.)
    """
    b, t = ids.shape
    model.set_kv_cache(b, t + n)
    new, at, columns = ids, torch.arange(t), [ids]
    for end in range(t, t + n):
        logits = model(new, at, input_pos_maxp1=end)
        new, at = logits[:, -1:].argmax(-1), torch.tensor([end])
        columns.append(new)
    return torch.cat(columns, dim=1)


def with_weights_of(model: Llama) -> nn.Module:
    """transformers' model with the weights of our Llama."""
    peer = hugging_face(model.config).eval()
    peer.load_state_dict(model.state_dict())
    return peer


def litgpt_with(model: Llama) -> Callable[[Tensor, int], Tensor]:
    """litgpt's writer with the weights of our Llama, see writers."""
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    peer, weights = litgpt(model.config).eval(), {}
    copy_weights_hf_llama(peer.config, {}, weights, model.state_dict())
    peer.load_state_dict(weights)
    return partial(litgpt_greedy, peer)


def minimind_with(source: Path, model: Llama) -> Callable[[Tensor, int], Tensor]:
    """minimind's writer with the weights of our Llama, see writers."""
    peer = minimind(source, model.config).eval()
    peer.load_state_dict(model.state_dict())
    return lambda ids, n: peer.generate(ids, max_new_tokens=n, do_sample=False, temperature=1.0,
                                        top_k=0, top_p=1.0, eos_token_id=None)


def raschka_with(source: Path, model: Llama) -> Callable[[Tensor, int], Tensor]:
    """The writer of LLMs-from-scratch with the weights of our Llama, see writers."""
    package = source / "pkg"
    m = package_in(package, "llms_from_scratch.kv_cache.llama3")
    config = raschka_config(model.config)
    write = package_in(package, "llms_from_scratch.kv_cache.generate").generate_text_simple
    peer = m.Llama3Model(config)
    load = package_in(package, "llms_from_scratch.llama3").load_weights_into_llama
    load(peer, config, model.state_dict())
    return partial(write, peer)


Writer = Callable[[Tensor, int], Tensor]


def writers(model: Llama, folder: Path | None = None) -> dict[str, Callable[[], Writer]]:
    """{name: make} of the peers that are there; make() is a function (ids (b, t), n) -> (b, t + n).

    They are installed, or in the folder of checkouts. Each writes with its own key-value cache,
    greedily, in float32, with the weights of our Llama.
    """
    found = {"transformers": lambda: partial(greedy, with_weights_of(model))}
    if installed("litgpt"):
        found["litgpt"] = partial(litgpt_with, model)
    for name, make in {"minimind": minimind_with, "LLMs-from-scratch": raschka_with}.items():
        if folder and (folder / name).is_dir():
            found[name] = partial(make, folder / name, model)
    return found


def dynamic_int8(model: nn.Module) -> nn.Module:
    """A copy of a model with its linear layers in int8 by PyTorch's own dynamic quantization.

    The products are int8 x int8.
    """
    with warnings.catch_warnings():
        # It is deprecated in favor of torchao, but so far the fastest on a CPU.
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear},
                                                      dtype=torch.qint8)


def torchao_int8(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a model in dtype, with its linear layers in int8, weight-only, by torchao."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    small = copy.deepcopy(model).to(dtype)
    quantize_(small, Int8WeightOnlyConfig(set_inductor_config=False))
    return small


def int8_writers(peer: nn.Module, dtype: torch.dtype) -> dict[str, Callable[[], Writer]]:
    """{name: make}, as in writers, of transformers' model in int8 by others.

    dtype: the type of what torchao does not quantize.
    """
    found = {"transformers, dynamic int8": lambda: partial(greedy, dynamic_int8(peer))}
    if installed("torchao"):
        floats = "bf16" if dtype == torch.bfloat16 else "float32"
        found[f"transformers, torchao int8 ({floats})"] = (
            lambda: partial(greedy, torchao_int8(peer, dtype)))
    return found


def c_programs(folder: Path | None, c: LlamaConfig, work: Path,
               names: Collection[str] = ("run", "runq"),
               ) -> dict[str, Callable[[], Callable[[int], float]]]:
    """{name: make} of llama2.c's run.c (float32) and runq.c (int8); see c_program."""
    source = (folder or work) / "llama2.c"
    if not source.is_dir():
        return {}
    return {f"llama2.c {name}.c": partial(c_program, source, name, c, work) for name in names}


def c_program(source: Path, name: str, c: LlamaConfig, work: Path) -> Callable[[int], float]:
    """A function (tokens) -> seconds of a program of llama2.c.

    It is compiled into the folder `work`, for a model of shape c with random weights: the time for
    a token does not depend on the weights. The time to start and load is not counted.
    """
    export, model = package_in(source, "export"), llama2c(source, c)
    for layer in (model.tok_embeddings, model.output):
        # Token 1 ends a text, and with random weights it might be the first to be written.
        layer.weight.data[1] = 0
    write = {"run": export.legacy_export, "runq": export.version2_export}[name]
    with contextlib.redirect_stdout(None):
        write(model, work / f"{name}.bin")
    options = ["-Ofast", "-fopenmp", "-march=native"]
    subprocess.run(["gcc", *options, source / f"{name}.c", "-lm", "-o", work / name], check=True,
                   capture_output=True)
    call = [work / name, work / f"{name}.bin", "-z", source / "tokenizer.bin", "-t", "0"]
    return partial(c_seconds, call)


def c_seconds(call: list, tokens: int) -> float:
    """The seconds that a program of llama2.c takes to write so many tokens, by its own clock."""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([*call, "-n", str(tokens)], check=True, capture_output=True, text=True,
                          errors="replace", env=os.environ | threads)
    return tokens / float(re.search(r"achieved tok/s: ([0-9.]+)", done.stderr)[1])


def rust_tokenizer(text: str, vocab_size: int) -> tokenizers.Tokenizer:
    """A tokenizer like ours, trained on the text by Hugging Face's tokenizers (Rust)."""
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    t.train_from_iterator([text], trainer)
    return t


def minbpe(folder: Path | None) -> Callable[[], Any] | None:
    """A function () -> an untrained RegexTokenizer of minbpe that splits as ours does.

    None where the folder has no minbpe.
    """
    if not folder or not (folder / "minbpe").is_dir():
        return None
    return partial(package_in(folder / "minbpe", "minbpe.regex").RegexTokenizer, PATTERN)


def minbpe_like(folder: Path | None, ours: Tokenizer) -> Any:
    """minbpe's tokenizer with the merges of ours; None if the folder has no minbpe."""
    make = minbpe(folder)
    if make is None:
        return None
    t = make()
    t.merges = {(ours.ranks[a], ours.ranks[b]): ours.ranks[a + b] for a, b in ours.merges}
    t.vocab = t._build_vocab()
    return t
