"""What bench.py lets write beside our code: generation by others, in float32 and int8, with our weights, and llama2.c's programs."""
import contextlib
import copy
import os
import re
import subprocess
import warnings
from functools import partial

import torch

from minillm.peers import hugging_face, installed, litgpt, llama2c, minimind, package_in, raschka_config


def greedy(model, ids, n):
    """transformers' generation of n tokens after each row of ids (b, t) -> (b, t + n)."""
    model.generation_config.eos_token_id = None
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, pad_token_id=0)


@torch.inference_mode()
def litgpt_greedy(model, ids, n):
    """The same by litgpt's model with its cache. (Its own loop for one prompt goes so; that for several does not shorten the cache.)"""
    b, t = ids.shape
    model.set_kv_cache(b, t + n)
    new, at, columns = ids, torch.arange(t), [ids]
    for end in range(t, t + n):
        new, at = model(new, at, input_pos_maxp1=end)[:, -1:].argmax(-1), torch.tensor([end])
        columns.append(new)
    return torch.cat(columns, dim=1)


def with_weights_of(model):
    """transformers' model with the weights of our Llama."""
    peer = hugging_face(model.config).eval()
    peer.load_state_dict(model.state_dict())
    return peer


def litgpt_with(model):
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    peer, weights = litgpt(model.config).eval(), {}
    copy_weights_hf_llama(peer.config, {}, weights, model.state_dict())
    peer.load_state_dict(weights)
    return partial(litgpt_greedy, peer)


def minimind_with(source, model):
    peer = minimind(source, model.config).eval()
    peer.load_state_dict(model.state_dict())
    return lambda ids, n: peer.generate(ids, max_new_tokens=n, do_sample=False, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None)


def raschka_with(source, model):
    package = source / "pkg"
    m, config = package_in(package, "llms_from_scratch.kv_cache.llama3"), raschka_config(model.config)
    write = package_in(package, "llms_from_scratch.kv_cache.generate").generate_text_simple
    peer = m.Llama3Model(config)
    package_in(package, "llms_from_scratch.llama3").load_weights_into_llama(peer, config, model.state_dict())
    return partial(write, peer)


def writers(model, folder=None):
    """{name: function (ids (b, t), n) -> (b, t + n)} of the peers that are installed or lie in the folder of checkouts, each with its own
    key-value cache, greedy, in float32, with the weights of our Llama."""
    found = {"transformers": partial(greedy, with_weights_of(model))}
    if installed("litgpt"):
        found["litgpt"] = litgpt_with(model)
    for name, make in {"minimind": minimind_with, "LLMs-from-scratch": raschka_with}.items():
        if folder and (folder / name).is_dir():
            found[name] = make(folder / name, model)
    return found


def dynamic_int8(model):
    """A copy of a model with its linear layers in int8 by PyTorch's own dynamic quantization (int8 x int8)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")      # it is deprecated in favour of torchao, and as yet the fastest on a CPU
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8)


def torchao_int8(model, dtype):
    """A copy of a model in dtype, with its linear layers in int8, weight-only, by torchao."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    small = copy.deepcopy(model).to(dtype)
    quantize_(small, Int8WeightOnlyConfig(set_inductor_config=False))
    return small


def int8_writers(peer, dtype):
    """{name: function (ids, n)} of transformers' model in int8 by others; dtype: of what torchao keeps in floats."""
    found = {"transformers, dynamic int8": partial(greedy, dynamic_int8(peer))}
    if installed("torchao"):
        floats = "bf16" if dtype == torch.bfloat16 else "float32"
        found[f"transformers, torchao int8 ({floats})"] = partial(greedy, torchao_int8(peer, dtype))
    return found


def c_programs(folder, c, work, names=("run", "runq")):
    """{name: function (tokens) -> seconds} of llama2.c's run.c (float32) and runq.c (int8), compiled into the folder `work`, for a
    model of shape c with random weights. What a token costs does not depend on the weights; that a program starts and loads is not counted.
    """
    source, programs = (folder or work) / "llama2.c", {}
    if not (source / "run.c").exists():
        return programs
    export, model = package_in(source, "export"), llama2c(source, c)
    for layer in (model.tok_embeddings, model.output):
        layer.weight.data[1] = 0       # of the token that ends a text: with random weights it might come first of all
    for name, write in {"run": export.legacy_export, "runq": export.version2_export}.items():
        if name not in names:
            continue
        with contextlib.redirect_stdout(None):
            write(model, work / f"{name}.bin")
        subprocess.run(["gcc", "-Ofast", "-fopenmp", "-march=native", source / f"{name}.c", "-lm", "-o", work / name], check=True)

        def seconds(tokens, name=name):
            call = [work / name, work / f"{name}.bin", "-t", "0", "-n", str(tokens), "-z", source / "tokenizer.bin"]
            said = subprocess.run(call, check=True, capture_output=True, text=True, errors="replace",
                                  env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}).stderr
            return tokens / float(re.search(r"achieved tok/s: ([0-9.]+)", said)[1])
        programs[f"llama2.c {name}.c"] = seconds
    return programs
