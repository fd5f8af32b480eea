"""What bench.py runs beside our code: the same models and tokenizers by others."""
import contextlib
import copy
import importlib.util
import re
import subprocess
import sys
import warnings

import tokenizers
import torch
import torch.nn.functional as F
import transformers

from minillm.tokenizer import PATTERN


def peer_step(model, logits_of, inputs, targets):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step():
        F.cross_entropy(logits_of(model).flatten(0, 1), targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def hugging_face(c):
    """transformers' LLaMA of the same shape."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, intermediate_size=c.hidden_dim, max_position_embeddings=c.max_seq_len,
        rms_norm_eps=c.norm_eps))


def dynamic_int8(model):
    """A copy of a model with its linear layers in int8 by PyTorch's own dynamic quantization (int8 x int8)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")      # it is deprecated in favour of torchao, and as yet the fastest on a CPU
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8)


def module_at(path):
    spec = importlib.util.spec_from_file_location(f"peer_{path.parent.name.replace('.', '_')}", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def llama2c(source, c):
    """The model of a checkout of llama2.c."""
    m = module_at(source / "model.py")
    return m.Transformer(m.ModelArgs(dim=c.dim, n_layers=c.n_layers, n_heads=c.n_heads, n_kv_heads=c.n_kv_heads, vocab_size=c.vocab_size,
                                     hidden_dim=c.hidden_dim, max_seq_len=c.max_seq_len))


def peers_in(folder, c, inputs, targets):
    """Steps of the models in checkouts of llama2.c and nanoGPT, where `folder` has them."""
    steps = {}
    if (path := folder / "llama2.c").exists():
        steps["llama2.c float32"] = peer_step(llama2c(path, c), lambda model: model(inputs, targets), inputs, targets)
    if (path := folder / "nanoGPT" / "model.py").exists():
        m = module_at(path)
        config = m.GPTConfig(block_size=c.max_seq_len, vocab_size=c.vocab_size, n_layer=c.n_layers, n_head=c.n_heads,
                             n_embd=c.dim, bias=False)
        steps["nanoGPT float32 (GPT-2 block)"] = peer_step(m.GPT(config), lambda model: model(inputs, targets)[0], inputs, targets)
    return steps


def c_programs(folder, c, work):
    """{name: function (tokens) -> seconds} of llama2.c's run.c (float32) and runq.c (int8), compiled into the folder `work`, for a
    model of shape c with random weights. What a token costs does not depend on the weights; that a program starts and loads is not counted.
    """
    source, programs = folder / "llama2.c", {}
    if not (source / "run.c").exists():
        return programs
    sys.path.insert(0, str(source))          # export.py imports model.py
    export, model = module_at(source / "export.py"), llama2c(source, c)
    sys.path.remove(str(source))
    model.tok_embeddings.weight.data[1] = 0       # of the token that ends a text: with random weights it might come first of all
    for name, write in (("run", export.legacy_export), ("runq", export.version2_export)):
        with contextlib.redirect_stdout(None):
            write(model, work / f"{name}.bin")
        subprocess.run(["gcc", "-Ofast", "-fopenmp", "-march=native", source / f"{name}.c", "-lm", "-o", work / name], check=True)

        def seconds(tokens, name=name):
            call = [work / name, work / f"{name}.bin", "-t", "0", "-n", str(tokens), "-z", source / "tokenizer.bin"]
            said = subprocess.run(call, check=True, capture_output=True, text=True, errors="replace").stderr
            return tokens / float(re.search(r"achieved tok/s: ([0-9.]+)", said)[1])
        programs[f"llama2.c {name}.c"] = seconds
    return programs


def rust_tokenizer(text, vocab_size):
    """The same training by Hugging Face's tokenizers, in Rust."""
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator([text], tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False))
    return t
