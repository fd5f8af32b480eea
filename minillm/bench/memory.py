"""The memory and the time of a training step, predicted from the shape of the model, and what fits on which GPU: `python -m minillm.bench memory`.

The formulas follow the code, one function a part. On a CPU that is fast_train. On a GPU attention, layers and rope, one operation after another,
as eager mode does, with SDPA's flash kernel, and under autocast where precision is "bf16": torch.compile keeps less, since it fuses norm,
rope and SwiGLU and computes some of their tensors anew in the backward pass, so that the prediction is an upper bound.

Letters: b sequences of t tokens, d wide, f the hidden width of the feed-forward, h heads, g key-value heads, v the vocabulary.
"""
import statistics
import weakref
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from minillm.arc.scorecard import table
from minillm.arc.sizes import SIZES
from minillm.arc.stages import SPECIAL_TOKENS, training_texts
from minillm.data import encode_document
from minillm.fast_train import QUERIES
from minillm.model import LlamaConfig, count_by_part, count_parameters, flops_per_token
from minillm.sft import encode_dialogue
from minillm.tokenizer import Tokenizer
from minillm.world.questions import dialogues

FLOAT = 4      # bytes of a float32 number: of weights, gradients, the optimizer's state, the stream between the blocks


def width(precision):
    """Bytes of a number that a matrix product takes and gives."""
    return 2 if precision == "bf16" else FLOAT


def saved_by_norm(b, t, d):
    """Of RMSNorm: its input (for the square and for the product), the normed input (for the gradient of the weight), 1 / rms a token."""
    return b * t * (2 * d + 1) * FLOAT


def saved_inputs(b, t, d, products, precision):
    """Of the norm's result, by the products that read it. Autocast casts it anew for each of them; in float32 they share one tensor."""
    return b * t * d * (products * 2 if precision == "bf16" else FLOAT)


def saved_by_attention(c, b, t, precision):
    """Of SDPA: q, k, v and its result, which the product after it reads, too; the logsumexp (b, h, t) in float32. repeat_interleave
    has given k and v as many heads as q. rope saves its angles only, which are there once."""
    return b * t * (4 * c.dim * width(precision) + c.n_heads * FLOAT)


def saved_by_feedforward(b, t, f, precision):
    """Of SwiGLU: the gate (for silu), silu of it and up (for their product), and the product (for down)."""
    return 4 * b * t * f * width(precision)


def saved_by_block(c, b, t, precision):
    """Bytes that one block keeps for its backward pass."""
    return (2 * saved_by_norm(b, t, c.dim) + saved_inputs(b, t, c.dim, 3, precision) + saved_by_attention(c, b, t, precision)
            + saved_inputs(b, t, c.dim, 2, precision) + saved_by_feedforward(b, t, c.hidden_dim, precision))


def scores(t):
    """How many scores of a sequence the tiles of fast_train.attend compute."""
    return sum((min(i + QUERIES, t) - i) * min(i + QUERIES, t) for i in range(0, t, QUERIES))


def saved_by_hand(c, b, t, precision):
    """Bytes that one block by hand keeps, of its attention half and its feed-forward half: the stream, the factors of the norm, the normed
    input; queries, keys and values of all heads, and probabilities, in float32; the result of attention; gate and up. The joined weights
    of queries, keys and values are a copy."""
    halves = 2 * b * t * (c.dim * (FLOAT + width(precision)) + FLOAT)
    heads = 3 * b * t * c.dim * FLOAT + b * c.n_heads * scores(t) * FLOAT
    joined = c.dim * (c.n_heads + 2 * c.n_kv_heads) * c.head_dim * width(precision)
    return halves + heads + b * t * (c.dim + 2 * c.hidden_dim) * width(precision) + joined


def saved_activations(c, b, t, precision, device="cuda"):
    """Of all blocks and the last norm; the ids (int64)."""
    block = saved_by_hand if device == "cpu" else saved_by_block
    return c.n_layers * block(c, b, t, precision) + saved_by_norm(b, t, c.dim) + 8 * b * t


def cast_weights(c, precision):
    """Autocast's copies of the matrices of the blocks, kept by the products for their backward pass; none in float32."""
    part = count_by_part(c)
    return 2 * (part["attention"] + part["feed-forward"]) if precision == "bf16" else 0


def loss_tensors(c, b, t, precision):
    """When the loss goes through its parts (fast_train.LinearCrossEntropy): the states and their gradient; the gradient of the output matrix,
    and its copy in bfloat16; of a part of at most 1024 tokens the logits and their softmax, and the latter of the part before."""
    part, narrow = min(1024, b * t), width(precision) if precision == "bf16" else 0
    before = FLOAT + narrow if b * t > 1024 else 0
    return 2 * b * t * c.dim * FLOAT + c.vocab_size * c.dim * (FLOAT + narrow) + part * c.vocab_size * (2 * FLOAT + before)


def largest_temporaries(c, b, t, precision, device="cuda"):
    """In the backward pass of the last block, above what is saved. Of modules: the gradients by SwiGLU's product, by silu and by up, less the
    product, which has gone; the gradient by the stream, in float32 and as the products take it. By hand: silu of the gate, the gradients
    by the product and by the gate; those by the result, by the norm's result and by the stream; those of the matrices of gate and up before
    and after the gain; these two matrices with the gain in them; the gradient of the third."""
    if device == "cpu":
        narrow = width(precision) if precision == "bf16" else 0
        return (b * t * (3 * c.hidden_dim * width(precision) + c.dim * (3 * FLOAT + narrow))
                + c.dim * c.hidden_dim * (3 * width(precision) + 4 * FLOAT))
    return b * t * (2 * c.hidden_dim * width(precision) + c.dim * (FLOAT + width(precision)))


def optimizer_temporaries(c, muon=False):
    """Of AdamW: sqrt(v), and that divided, of the largest matrix. Of Muon: of all matrices of one shape (o, i) together x and the next x,
    and one of (o, o) or (i, i), the smaller, all float32; or, before, x in bfloat16. (The updates of a shape take the place of its gradients.)"""
    d, f, narrow = c.dim, c.hidden_dim, c.n_kv_heads * c.head_dim
    heads = [(4, d, d)] if narrow == d else [(2, d, d), (2, narrow, d)]
    shapes = [*heads, (2, f, d), (1, d, f)] if muon else []
    return FLOAT * max([2 * max(c.vocab_size, f) * d] + [c.n_layers * n * (2 * o * i + max(min(o, i)**2, o * i // 2)) for n, o, i in shapes])


def training_memory(config, batch, t, precision, device="cuda", muon=False, accumulate=1):
    """Bytes of a training step of train() on (batch, t) tokens, as {use: bytes}, "peak" the most that is held at one time.

    The peak is in one of three moments: when the loss turns (all activations and the loss, and no gradients yet, but those of the batches
    before where a step accumulates several), when the backward pass enters the last block (the loss has gone), and in the optimizer (all
    gradients, no activations)."""
    weights = count_parameters(config) * FLOAT
    use = {"weights": weights, "gradients": weights, "optimizer": 2 * weights, "activations": saved_activations(config, batch, t, precision, device),
           "cast weights": cast_weights(config, precision) if device != "cpu" else 0, "loss": loss_tensors(config, batch, t, precision),
           "temporaries": largest_temporaries(config, batch, t, precision, device), "in the optimizer": optimizer_temporaries(config, muon)}
    forward = use["activations"] + use["cast weights"] + (accumulate > 1) * weights
    head = config.vocab_size * config.dim * FLOAT          # its gradient is the first
    moments = forward + use["loss"], forward + head + use["temporaries"], use["gradients"] + use["in the optimizer"]
    return use | {"peak": weights + use["optimizer"] + max(moments)}


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors that operations within make, as long as they are held; `most`: at one time."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        result = function(*arguments, **(settings or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.known:
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage):
        self.known[storage] = True
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.drop, storage.nbytes())

    def drop(self, n):
        self.now -= n


def peak_memory(work, device="cpu"):
    """The most bytes of tensors on the device that work() holds at one time, where work makes model and optimizer and takes two steps.

    On a GPU by its allocator, at the second call of work: it sees what kernels need within, too, but not the CUDA context (some 500 MB) nor
    the workspaces that cuBLAS keeps from the first call. On a CPU by the results of all operations."""
    if torch.device(device).type == "cuda":
        work()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with Held() as held:
        work()
    return held.most


# Tensor cores, their clock in GHz when boosted, and what one does in a cycle: operations on bfloat16 numbers, added up in float32, without
# sparsity (NVIDIA's white papers of GA102, AD102, A100). Of each size of memory, in GB of 2^30 bytes, one GPU.
GPUS = {4: ("RTX 3050 Laptop", 64, 1.5, 128), 8: ("RTX 4060", 96, 2.46, 128), 16: ("RTX 4080", 304, 2.505, 128), 24: ("RTX 4090", 512, 2.52, 128),
        80: ("A100", 432, 1.41, 512)}
MFU = 0.3          # share of that peak that training reaches: an assumption, good for a compiled model and large batches
SPARE = 0.1        # of the memory: for the CUDA context, the workspace of cuBLAS, and what falls between blocks
SHAPES = [LlamaConfig(32000, dim, layers, heads, None, hidden, 1024, tie_embeddings=True) for dim, layers, heads, hidden in (
    (288, 6, 6, 768), (576, 8, 9, 1536), (768, 12, 12, 2048), (1024, 24, 16, 2816), (2048, 24, 16, 5504))]


def peak_flops(gigabytes):
    """Operations a second of the GPU of that memory, at most."""
    _, cores, gigahertz, each = GPUS[gigabytes]
    return cores * gigahertz * 1e9 * each


def hours(config, t, tokens, gigabytes):
    """To train on so many tokens in sequences of t."""
    return tokens * flops_per_token(config, t) / (MFU * peak_flops(gigabytes)) / 3600


def largest_batch(config, t, gigabytes, precision="bf16"):
    """The largest power of 2 whose training step, which may accumulate several, fits with SPARE to spare; 0 if not even one sequence fits."""
    batch, room = 0, (1 - SPARE) * gigabytes * 2**30
    while training_memory(config, max(1, 2 * batch), t, precision, accumulate=2)["peak"] <= room:
        batch = max(1, 2 * batch)
    return batch


def presets(least=4):
    """A row (dict) for each GPU: the largest of SHAPES that fits with at least `least` sequences of max_seq_len tokens, its largest batch, the
    memory predicted, and the time for 20 tokens a parameter (Hoffmann et al. 2022, "Chinchilla")."""
    rows = []
    for gigabytes, (name, *_) in GPUS.items():
        c = max((c for c in SHAPES if largest_batch(c, c.max_seq_len, gigabytes) >= least), key=count_parameters)
        batch, tokens = largest_batch(c, c.max_seq_len, gigabytes), 20 * count_parameters(c)
        rows.append({"GPU": f"{name}, {gigabytes} GB", "TFLOP/s": f"{peak_flops(gigabytes) / 1e12:.0f}", "parameters": f"{count_parameters(c) / 1e6:.0f} M",
                     "wide": str(c.dim), "layers": str(c.n_layers), "batch": f"{batch} x {c.max_seq_len}",
                     "memory": f"{training_memory(c, batch, c.max_seq_len, 'bf16', accumulate=2)['peak'] / 2**30:.1f} GB", "tokens": f"{tokens / 1e9:.2f} G",
                     "time": f"{hours(c, c.max_seq_len, tokens, gigabytes):.1f} h"})
    return rows


def recipe_rows(name="gpu"):
    """A row for base and chat of a size: tokens, the memory of a batch of the longest, and the minutes on each GPU that has that memory.
    From a sample of stories and dialogues and a tokenizer trained on it."""
    size = SIZES[name]
    c = size.stories.model
    texts = training_texts(replace(size.stories, stories=6000))
    tokenizer = Tokenizer.train(texts, c.vocab_size, SPECIAL_TOKENS)
    lengths = {"base": (size.stories, size.stories.stories, [len(encode_document(text, tokenizer)) - 1 for text in texts]),
               "chat": (size.chat, size.chat.examples, [len(encode_dialogue(d, tokenizer)[0]) - 1 for d in dialogues(1000, setting=size.stories.setting)])}
    rows = []
    for stage, (recipe, n, found) in lengths.items():
        mean, longest = statistics.mean(found), max(found)
        memory = training_memory(c, recipe.batch_size, longest, "bf16", muon=recipe.training.muon > 0, accumulate=recipe.training.accumulate)["peak"]
        rows.append({"stage": stage, "batch": f"{recipe.batch_size} x {longest}", "memory": f"{memory / 2**30:.1f} GB", "tokens": f"{n * mean / 1e6:.1f} M"}
                    | {f"{gigabytes} GB": f"{60 * hours(c, mean, n * mean, gigabytes):.1f} min" if memory <= (1 - SPARE) * gigabytes * 2**30
                       else "too small" for gigabytes in GPUS})
    return rows


def report():
    """Print both tables."""
    print(f"What fits with {SPARE:.0%} to spare, in bfloat16 under autocast with AdamW, and the time at {MFU:.0%} of the peak (an assumption):")
    print(table(presets()))
    print(f"\nThe size gpu, {count_parameters(SIZES['gpu'].stories.model) / 1e6:.0f} M parameters, its batches at their longest:")
    print(table(recipe_rows()))
    print("Predicted, none of it tried on a GPU.")
