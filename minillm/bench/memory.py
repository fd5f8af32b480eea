"""The memory and the time of a training step, predicted from the shape of the model.

`python -m minillm.bench memory` also says what fits on which GPU.

The formulas follow the code, one function for each part. On a CPU that code is fast_train. On a GPU
it is attention, layers and rope, one operation after another, as eager mode does, with SDPA's flash
kernel, and under autocast where precision is "bf16". torch.compile keeps less, since it fuses norm,
rope and SwiGLU and computes some of their tensors again in the backward pass, so the prediction is
an upper bound.

Letters: b sequences of t tokens, d wide, f the hidden width of the feed-forward, h heads, g
key-value heads, v the vocabulary. precision is "float32" or "bf16".
"""
import statistics
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from minillm.arc.scorecard import table
from minillm.arc.sizes import SIZES
from minillm.arc.stages import SPECIAL_TOKENS, tales
from minillm.data import encode_document
from minillm.fast_train import QUERIES
from minillm.model import LlamaConfig, count_by_part, count_parameters, flops_per_token
from minillm.sft import encode_dialogue
from minillm.tokenizer import Tokenizer
from minillm.world.drills import drill, practice
from minillm.world.questions import dialogues

# Bytes of a float32 number: of weights, gradients, the optimizer's state, and the stream between
# the blocks.
FLOAT = 4


def width(precision: str) -> int:
    """Bytes of a number that a matrix product takes and gives."""
    return 2 if precision == "bf16" else FLOAT


def saved_by_norm(b: int, t: int, d: int) -> int:
    """Bytes that RMSNorm keeps.

    Its input (for the square and for the product), the normed input (for the gradient of the
    weight), and 1 / rms of each token.
    """
    return b * t * (2 * d + 1) * FLOAT


def saved_inputs(b: int, t: int, d: int, products: int, precision: str) -> int:
    """Bytes of a norm's result that the matrix products which read it keep.

    Autocast casts it again for each of these products; in float32 they share one tensor.
    """
    return b * t * d * (products * 2 if precision == "bf16" else FLOAT)


def saved_by_attention(c: LlamaConfig, b: int, t: int, precision: str) -> int:
    """Bytes that SDPA keeps.

    q, k, v and its result, which the product after it reads, too; the logsumexp (b, h, t) in
    float32. repeat_interleave has given k and v as many heads as q. rope saves only its angles,
    which exist once.
    """
    return b * t * (4 * c.dim * width(precision) + c.n_heads * FLOAT)


def saved_by_feedforward(b: int, t: int, f: int, precision: str) -> int:
    """Bytes that SwiGLU keeps.

    The gate (for silu), silu of it and up (for their product), and the product (for down).
    """
    return 4 * b * t * f * width(precision)


def saved_by_block(c: LlamaConfig, b: int, t: int, precision: str) -> int:
    """Bytes that one block keeps for its backward pass."""
    attention = saved_inputs(b, t, c.dim, 3, precision) + saved_by_attention(c, b, t, precision)
    feedforward = (saved_inputs(b, t, c.dim, 2, precision)
                   + saved_by_feedforward(b, t, c.hidden_dim, precision))
    return 2 * saved_by_norm(b, t, c.dim) + attention + feedforward


def scores(t: int) -> int:
    """How many scores of a sequence the tiles of fast_train.attend compute."""
    total = 0
    for first in range(0, t, QUERIES):         # a tile: its queries, and all keys up to the last
        end = min(first + QUERIES, t)
        total += (end - first) * end
    return total


def saved_by_hand(c: LlamaConfig, b: int, t: int, precision: str) -> int:
    """Bytes that one block of fast_train keeps, of its attention half and its feed-forward half.

    For each half, the stream, the factors of the norm and the normed input; queries, keys and
    values of all heads, and probabilities, in float32; the result of attention; gate and up. The
    joined weights of queries, keys and values are a copy.
    """
    halves = 2 * b * t * (c.dim * (FLOAT + width(precision)) + FLOAT)
    heads = 3 * b * t * c.dim * FLOAT + b * c.n_heads * scores(t) * FLOAT
    results = b * t * (c.dim + 2 * c.hidden_dim) * width(precision)
    joined = c.dim * (c.n_heads + 2 * c.n_kv_heads) * c.head_dim * width(precision)
    return halves + heads + results + joined


def saved_activations(c: LlamaConfig, b: int, t: int, precision: str, device: str = "cuda") -> int:
    """Bytes that all blocks and the last norm keep, and the ids (int64)."""
    block = saved_by_hand if device == "cpu" else saved_by_block
    return c.n_layers * block(c, b, t, precision) + saved_by_norm(b, t, c.dim) + 8 * b * t


def cast_weights(c: LlamaConfig, precision: str) -> int:
    """Bytes of autocast's copies of the matrices of the blocks; none in float32.

    The products keep them for their backward pass.
    """
    part = count_by_part(c)
    return 2 * (part["attention"] + part["feed-forward"]) if precision == "bf16" else 0


def loss_tensors(c: LlamaConfig, b: int, t: int, precision: str) -> int:
    """Bytes while the loss goes through its parts (fast_train.LinearCrossEntropy).

    The states and their gradient; the gradient of the output matrix, and its copy in bfloat16; the
    logits of a part of at most 1024 tokens and their softmax, and the softmax of the part before.
    """
    part = min(1024, b * t)
    narrow = width(precision) if precision == "bf16" else 0
    before = FLOAT + narrow if b * t > 1024 else 0
    states = 2 * b * t * c.dim * FLOAT
    output_matrix = c.vocab_size * c.dim * (FLOAT + narrow)
    return states + output_matrix + part * c.vocab_size * (2 * FLOAT + before)


def largest_temporaries(c: LlamaConfig, b: int, t: int, precision: str,
                        device: str = "cuda") -> int:
    """Bytes in the backward pass of the last block, above what is saved.

    Of modules (on a GPU): the gradients with respect to SwiGLU's product, silu and up, less the
    product, which has been freed; the gradient with respect to the stream, in float32 and as the
    products take it.

    By hand (on a CPU): silu of the gate, the gradients with respect to the product and the gate;
    those with respect to the result, the norm's result and the stream; those of the matrices of
    gate and up before and after the gain; these two matrices with the gain in them; the gradient of
    the third.
    """
    each = width(precision)
    if device == "cpu":
        narrow = each if precision == "bf16" else 0
        of_tokens = b * t * (3 * c.hidden_dim * each + c.dim * (3 * FLOAT + narrow))
        of_matrices = c.dim * c.hidden_dim * (3 * each + 4 * FLOAT)
        return of_tokens + of_matrices
    return b * t * (2 * c.hidden_dim * each + c.dim * (FLOAT + each))


def optimizer_temporaries(c: LlamaConfig, muon: bool = False) -> int:
    """Bytes that the optimizer needs besides its state.

    AdamW: sqrt(v), and that divided, of the largest matrix. Muon: of all matrices of one shape
    (o, i) together x and the next x, and one of (o, o) or (i, i), the smaller, all float32; or,
    before, x in bfloat16. (The updates of a shape take the place of its gradients.)
    """
    d, f, narrow = c.dim, c.hidden_dim, c.n_kv_heads * c.head_dim
    most = 2 * max(c.vocab_size, f) * d
    if not muon:
        return FLOAT * most
    # (matrices of this shape in a block, rows, columns)
    heads = [(4, d, d)] if narrow == d else [(2, d, d), (2, narrow, d)]
    for n, o, i in [*heads, (2, f, d), (1, d, f)]:
        each = 2 * o * i + max(min(o, i)**2, o * i // 2)
        most = max(most, c.n_layers * n * each)
    return FLOAT * most


def training_memory(config: LlamaConfig, batch: int, t: int, precision: str, device: str = "cuda",
                    muon: bool = False, accumulate: int = 1) -> dict[str, int]:
    """Bytes of a training step of train() on (batch, t) tokens, as {use: bytes}.

    "peak" is the most that is held at one time, at one of three moments: between forward and
    backward (all activations and the loss, and no gradients yet, except those of earlier batches if
    a step accumulates several), when the backward pass enters the last block (the loss is freed),
    and in the optimizer (all gradients, no activations).
    """
    weights = count_parameters(config) * FLOAT
    use = {
        "weights": weights,
        "gradients": weights,
        "optimizer": 2 * weights,
        "activations": saved_activations(config, batch, t, precision, device),
        "cast weights": cast_weights(config, precision) if device != "cpu" else 0,
        "loss": loss_tensors(config, batch, t, precision),
        "temporaries": largest_temporaries(config, batch, t, precision, device),
        "in the optimizer": optimizer_temporaries(config, muon),
    }
    forward = use["activations"] + use["cast weights"] + (accumulate > 1) * weights
    head = config.vocab_size * config.dim * FLOAT          # its gradient is the first
    at_loss = forward + use["loss"]
    in_last_block = forward + head + use["temporaries"]
    in_optimizer = use["gradients"] + use["in the optimizer"]
    peak = weights + use["optimizer"] + max(at_loss, in_last_block, in_optimizer)
    return use | {"peak": peak}


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors that operations inside the `with` make, while they are held.

    now: those held at this moment; most: the most that were held at one time.
    """

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

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed."""
        self.known[storage] = True
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.drop, storage.nbytes())

    def drop(self, n: int) -> None:
        """Count n bytes less."""
        self.now -= n


def peak_memory(work: Callable[[], Any], device: str | torch.device = "cpu") -> int:
    """The most bytes of tensors on the device that work() holds at one time.

    work makes model and optimizer and takes two steps. On a GPU, the allocator is asked about a
    second call of work: it also sees what kernels allocate inside, but not the CUDA context (some
    500 MB) nor the workspaces that cuBLAS keeps from the first call. On a CPU, the results of all
    operations are counted.
    """
    if torch.device(device).type == "cuda":
        work()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with Held() as held:
        work()
    return held.most


# Tensor cores, their clock in GHz when boosted, and what one does in a cycle: operations on
# bfloat16 numbers, added up in float32, without sparsity (NVIDIA's white papers of GA102, AD102,
# A100). One GPU for each size of memory, in GB of 2^30 bytes.
GPUS = {
    4: ("RTX 3050 Laptop", 64, 1.5, 128),
    8: ("RTX 4060", 96, 2.46, 128),
    16: ("RTX 4080", 304, 2.505, 128),
    24: ("RTX 4090", 512, 2.52, 128),
    80: ("A100", 432, 1.41, 512),
}
# Share of that peak that training reaches: an assumption, good for a compiled model and large
# batches.
MFU = 0.3
# Share of the memory that stays free: for the CUDA context, the workspace of cuBLAS, and what is
# lost between the blocks of the allocator.
SPARE = 0.1
SHAPES = [LlamaConfig(32000, dim, layers, heads, None, hidden, 1024, tie_embeddings=True)
          for dim, layers, heads, hidden in (
              (288, 6, 6, 768), (576, 8, 9, 1536), (768, 12, 12, 2048), (1024, 24, 16, 2816),
              (2048, 24, 16, 5504))]


def peak_flops(gigabytes: int) -> float:
    """Operations per second of the GPU with that memory, at most."""
    _, cores, gigahertz, each = GPUS[gigabytes]
    return cores * gigahertz * 1e9 * each


def hours(config: LlamaConfig, t: float, tokens: float, gigabytes: int) -> float:
    """Hours to train on so many tokens in sequences of t, on the GPU with that memory."""
    return tokens * flops_per_token(config, t) / (MFU * peak_flops(gigabytes)) / 3600


def fits(memory: int, gigabytes: int) -> bool:
    """Whether so many bytes leave SPARE of the memory of a GPU free."""
    return memory <= (1 - SPARE) * gigabytes * 2**30


def largest_batch(config: LlamaConfig, t: int, gigabytes: int, precision: str = "bf16") -> int:
    """The largest power of 2 whose training step fits, 0 if not even one sequence does.

    The step may accumulate several such batches.
    """
    batch = 0
    while True:
        larger = max(1, 2 * batch)
        memory = training_memory(config, larger, t, precision, accumulate=2)["peak"]
        if not fits(memory, gigabytes):
            return batch
        batch = larger


def presets(least: int = 4) -> list[dict[str, str]]:
    """A row for each GPU: the largest of SHAPES that fits, and what training it takes.

    It fits if a batch of at least `least` sequences of max_seq_len tokens does. The row has its
    largest batch, the memory predicted, and the time for 20 tokens per parameter (Hoffmann et al.
    2022, "Chinchilla").
    """
    rows = []
    for gigabytes, (name, *_) in GPUS.items():
        fitting = [c for c in SHAPES if largest_batch(c, c.max_seq_len, gigabytes) >= least]
        c = max(fitting, key=count_parameters)
        t, parameters = c.max_seq_len, count_parameters(c)
        batch, tokens = largest_batch(c, t, gigabytes), 20 * parameters
        memory = training_memory(c, batch, t, "bf16", accumulate=2)["peak"]
        rows.append({
            "GPU": f"{name}, {gigabytes} GB",
            "TFLOP/s": f"{peak_flops(gigabytes) / 1e12:.0f}",
            "parameters": f"{parameters / 1e6:.0f} M",
            "wide": str(c.dim),
            "layers": str(c.n_layers),
            "batch": f"{batch} x {t}",
            "memory": f"{memory / 2**30:.1f} GB",
            "tokens": f"{tokens / 1e9:.2f} G",
            "time": f"{hours(c, t, tokens, gigabytes):.1f} h",
        })
    return rows


def recipe_rows(name: str = "gpu") -> list[dict[str, str]]:
    """A row for base and chat of a size, by a sample of their texts and a tokenizer trained on it.

    Tokens, the memory of a batch of the longest texts, and the minutes on each GPU that has that
    memory.
    """
    size = SIZES[name]
    c = size.stories.model
    setting = size.stories.setting
    texts = tales(6000, setting)
    tokenizer = Tokenizer.train(texts, c.vocab_size, SPECIAL_TOKENS)
    talks = dialogues(1000, setting=setting)
    of_texts = [len(encode_document(text, tokenizer)) - 1 for text in texts]
    of_talks = [len(encode_dialogue(talk, tokenizer)[0]) - 1 for talk in talks]
    of_drills, of_practice = ([len(encode_document(text, tokenizer)) - 1 for text in some] for some
                              in (map(drill, range(1000)),
                                  map(partial(practice, setting=setting), range(1000))))
    a_text, a_talk = statistics.mean(of_texts), statistics.mean(of_talks)
    in_base = (size.stories.total("stories") * a_text
               + size.stories.total("drills") * statistics.mean(of_drills)
               + size.stories.total("practice") * statistics.mean(of_practice))
    in_chat = size.chat.examples * a_talk + size.chat.replay * a_text
    rows = []
    for stage, recipe, lengths, tokens in (("base", size.stories, of_texts, in_base),
                                           ("chat", size.chat, of_talks, in_chat)):
        mean, longest = statistics.mean(lengths), max(lengths)
        training = recipe.training
        memory = training_memory(c, recipe.batch_size, longest, "bf16", muon=training.muon > 0,
                                 accumulate=training.accumulate)["peak"]
        row = {
            "stage": stage,
            "batch": f"{recipe.batch_size} x {longest}",
            "memory": f"{memory / 2**30:.1f} GB",
            "tokens": f"{tokens / 1e6:.1f} M",
        }
        for gigabytes in GPUS:
            minutes = f"{60 * hours(c, mean, tokens, gigabytes):.1f} min"
            row[f"{gigabytes} GB"] = minutes if fits(memory, gigabytes) else "too small"
        rows.append(row)
    return rows


def report() -> None:
    """Print both tables."""
    print(f"What fits with {SPARE:.0%} to spare, in bfloat16 under autocast with AdamW, and the "
          f"time at {MFU:.0%} of the peak (an assumption):")
    print(table(presets()))
    parameters = count_parameters(SIZES["gpu"].stories.model)
    print(f"\nThe size gpu, {parameters / 1e6:.0f} M parameters, its batches at their longest:")
    print(table(recipe_rows()))
    print("These are upper bounds for a compiled model, which keeps less. Measured with torch\n"
          "2.11: a step of 64 x 288 tokens at the size gpu took 5.0 GB on an H100 without\n"
          "compiling, and 3.4 GB on an H200 compiled (predicted: 4.8). The base model took 145 s\n"
          "on an H100, compiling included.")
