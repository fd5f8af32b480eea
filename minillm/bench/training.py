"""The speed of a training step beside others: `python -m minillm.bench train`."""
from functools import partial

import torch

from minillm.bench.arguments import chosen, describe
from minillm.bench.ceilings import matrix_product, measured, mfu, peak_of
from minillm.bench.peers import peer_step, training_peers
from minillm.bench.timing import fastest, table
from minillm.fast_train import by_hand, chunked_loss, keep_memory
from minillm.model import Llama, LlamaConfig
from minillm.optim import AdamW
from minillm.train import clip_gradients, compiled, default_precision

SHAPES = {"S": LlamaConfig(vocab_size=1024, dim=128, n_layers=4, n_heads=4, n_kv_heads=4, hidden_dim=344),
          "M": LlamaConfig(vocab_size=1024, dim=288, n_layers=6, n_heads=6, n_kv_heads=6, hidden_dim=768)}

# On a GPU: the shapes of llama2.c's stories15M, 42M and 110M, which tie their embeddings, and how many rows of tokens a step has.
GPU_SHAPES = {"15M": LlamaConfig(32000, 288, 6, 6, None, 768, max_seq_len=512, tie_embeddings=True),
              "42M": LlamaConfig(32000, 512, 8, 8, None, 1376, max_seq_len=512, tie_embeddings=True),
              "110M": LlamaConfig(32000, 768, 12, 12, None, 2048, max_seq_len=512, tie_embeddings=True)}
GPU_ROWS = {"15M": 64, "42M": 48, "110M": 32}
STEPS = 10                                     # of a turn on a GPU, where one is too short to time
GPU_PEERS = ("transformers", "nanoGPT")        # each is compiled, which takes most of a minute


def our_step(c, precision, inputs, targets, compiling=False):
    """A function that makes one training step of our model of shape c, and returns the loss before it."""
    model = Llama(c).to(inputs.device)
    optimizer = AdamW(model)
    forward = compiled(model, inputs.device) if compiling else by_hand(model)

    def step():
        loss = chunked_loss(forward, inputs, targets, precision) / targets.numel()
        loss.backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step(1e-3)
        return loss.detach()
    return step


def place():
    """The device to train on, and whether it is a GPU."""
    on_gpu = torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu"), on_gpu


def contenders(c, inputs, targets, peers, compiling, on_gpu):
    """{name: (precision, function () -> step)}: on a CPU in eager float32, and ours in the default precision, too, and with `compiling`
    compiled; on a GPU all compiled and in its default precision."""
    known, precision, batch = training_peers(peers), default_precision(inputs.device), (inputs, targets)
    if on_gpu:
        found = {f"{name} {precision}, compiled": (precision, partial(peer_step, known[name], c, precision, *batch, compiling=True))
                 for name in GPU_PEERS if name in known}
    else:
        found = {f"{name} float32": ("float32", partial(peer_step, peer, c, "float32", *batch)) for name, peer in known.items()}
        found["minillm float32"] = "float32", partial(our_step, c, "float32", *batch)
        if precision != "float32":
            found[f"minillm {precision} (default)"] = precision, partial(our_step, c, precision, *batch)
    if compiling or on_gpu:
        found[f"minillm {precision}, compiled"] = precision, partial(our_step, c, precision, *batch, compiling=True)
    return found


def ready(make, on_gpu):
    """make(), warm, and the peak of its memory in GB, all else that lies on the GPU left out; None on a CPU."""
    if not on_gpu:
        return make(), None
    before = torch.cuda.memory_allocated()
    step = make()
    step()                               # compiles, which takes memory of its own
    torch.cuda.reset_peak_memory_stats()
    step()
    return step, (torch.cuda.max_memory_allocated() - before) / 1e9


def several(step, n):
    for _ in range(n):
        step()


def batch_of(name, c, device, on_gpu):
    """Inputs and targets, int64 (rows, c.max_seq_len), of random tokens: 16 rows, or on a GPU those of GPU_ROWS, a quarter below 40 GB."""
    rows = GPU_ROWS[name] if on_gpu else 16
    if on_gpu and torch.cuda.get_device_properties(0).total_memory < 40e9:
        rows //= 4
    ids = torch.randint(c.vocab_size, (rows, c.max_seq_len + 1), generator=torch.Generator().manual_seed(0)).to(device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def train_shape(name, c, rounds, peers, compiling):
    """The Table of one shape; peers: a Path or None."""
    device, on_gpu = place()
    inputs, targets = batch_of(name, c, device, on_gpu)
    makers = contenders(c, inputs, targets, peers, compiling, on_gpu)
    steps = {who: ready(make, on_gpu) for who, (_, make) in makers.items()}
    tops = {precision: matrix_product(precision, device) for precision, _ in makers.values()}
    works = {who: partial(several, step, STEPS) if on_gpu else step for who, (step, _) in steps.items()}
    seconds, rates, line = measured(works, rounds, tops.values())
    machine = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads"
    peak = peak_of(machine)

    def more(who, rate):
        columns = {"MFU": f"{mfu(c, c.max_seq_len, rate, rates[tops[makers[who][0]].name]):.1%}"}
        if on_gpu:
            columns["of data sheet"] = f"{mfu(c, c.max_seq_len, rate, peak):.1%}" if peak else "?"
            columns["peak memory"] = f"{steps[who][1]:.2f} GB"
        return columns
    llamas = [who for who in seconds if not who.startswith(("minillm", "nanoGPT"))]
    notes = [f"MFU: share of the measured matrix product. {line}"]
    if peak:
        notes.append(f"By the data sheet: {peak / 1e3:,.0f} TFLOP/s in bf16")
    return table(f"Training step, {describe(name, c)}, {len(inputs)} x {c.max_seq_len} tokens, {machine}", "tokens/s",
                 inputs.numel() * (STEPS if on_gpu else 1), seconds, fastest(seconds, llamas), more, notes)


def train(rounds=10, peers=None, shapes=None, compiling=False, show=lambda table: None):
    """A training step (forward, loss, backward, clipping, AdamW): on a CPU of 16 x 256 tokens at shapes S and M in eager float32, and
    ours in its default precision; on a GPU of 32 to 64 x 512 tokens at shapes 15M, 42M and 110M, all compiled and in bf16.

    Returns a list of Tables, one a shape; show(table) is called as each is done. The ratio is to the fastest peer with LLaMA's block. MFU
    counts the FLOPs of our shape, for nanoGPT, too. Peak memory is that of a contender by itself. On a CPU memory is kept for all of them
    (keep_memory), or where it lies would decide. Raises Refused as check."""
    tables = []
    keep_memory()
    shapes, peers = chosen(GPU_SHAPES if place()[1] else SHAPES, rounds, peers, shapes)
    for name, c in shapes:
        tables.append(train_shape(name, c, rounds, peers, compiling))
        show(tables[-1])
        if compiling or place()[1]:
            torch.compiler.reset()       # or the next shape would be taken for one of changing size, and compiled as such
    return tables
