# Training: loss, AdamW, learning rate, clipping, accumulation, precision, checkpoints, and the loop that joins them.
import hashlib
import json
import math
import os
import re
import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from tqdm import tqdm

from minillm.data import check_batch


def token_loss(model, inputs, targets, precision="float32"):
    """Sum (not mean) of the cross-entropies in nats, a float32 scalar, over the positions whose target is not -100.

    inputs, targets: int64 (b, t). precision: "float32", or "bf16" for a forward pass under autocast; the softmax is
    in float32 in both.
    """
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = model(inputs)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2), for what is trainable in a model.

    Matrices decay, vectors (the gains of the norms) do not. m[name] and v[name] have the shape of the parameter.
    """

    def __init__(self, model, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1):
        self.betas, self.eps, self.weight_decay, self.t = betas, eps, weight_decay, 0
        self.params = {n: p for n, p in model.named_parameters() if p.requires_grad}       # a tied weight comes once
        self.m = {n: torch.zeros_like(p) for n, p in self.params.items()}
        self.v = {n: torch.zeros_like(p) for n, p in self.params.items()}

    @torch.no_grad()
    def step(self, lr):
        """Move each parameter that has a gradient, and drop the gradient."""
        self.t += 1
        b1, b2 = self.betas
        for n, p in self.params.items():
            if p.grad is None:
                continue
            m, v = self.m[n], self.v[n]
            m.lerp_(p.grad, 1 - b1)
            v.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
            if p.ndim > 1:
                p.mul_(1 - lr * self.weight_decay)
            p.addcdiv_(m, (v.sqrt() / math.sqrt(1 - b2**self.t)).add_(self.eps), value=-lr / (1 - b1**self.t))
            p.grad = None


def learning_rate(step, c):
    """Linear warm-up over c.warmup steps, then half a cosine from c.lr to c.min_lr * c.lr. Steps count from 0.

    The first step has lr / warmup, not 0, which would waste it: in warm-up transformers' schedule is one step behind.
    """
    if step < c.warmup:
        return c.lr * (step + 1) / c.warmup
    done = (step - c.warmup) / max(1, c.steps - c.warmup)
    return c.lr * (c.min_lr + (1 - c.min_lr) * (1 + math.cos(math.pi * done)) / 2)


def clip_gradients(params, limit):
    """Scale all gradients by one factor so that their joint norm is at most limit; returns the norm before, a scalar.

    As torch.nn.utils.clip_grad_norm_ (Pascanu et al. 2013). Raises ValueError if no parameter has a gradient.
    """
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        raise ValueError("no parameter has a gradient: call backward() first, and freeze fewer parameters")
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
    scale = torch.clamp(limit / (norm + 1e-6), max=1.0)
    for g in grads:
        g.mul_(scale)
    return norm


def backward(model, micro, precision="float32"):
    """Add up the gradients of one step over its batches; returns the loss in nats per token and the number of tokens.

    micro: list of (inputs, targets), int64 (b, t) each. Divides by the tokens of all batches together, so that every
    token weighs the same, whichever batch it is in. Raises ValueError if no target counts.
    """
    tokens = int(sum((targets != -100).sum() for _, targets in micro))
    if tokens == 0:
        raise ValueError("all targets are -100: no token to learn from. Is the mask inverted, or the answer cut off?")
    device = next(model.parameters()).device
    loss = 0.0
    for inputs, targets in micro:
        part = token_loss(model, inputs.to(device), targets.to(device), precision) / tokens
        part.backward()
        loss += part.item()
    return loss, tokens


def default_precision(device):
    """"bf16" where the device multiplies bfloat16 in hardware, else "float32"."""
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "float32"


def compiled(model, device):
    """torch.compile(model), or where no compiler works the model as it is, after one line that says so."""
    try:    # torch.compile itself is lazy: only a call shows whether it works
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        print(f"torch.compile does not work here, training goes on without it ({type(error).__name__}: {reason:.100})")
        return model
    return torch.compile(model)


LIMITS = {"steps": (1, 10**9), "lr": (1e-12, 1e3), "min_lr": (0, 1), "warmup": (0, 10**9), "weight_decay": (0, 1e3),
          "clip": (1e-12, math.inf), "accumulate": (1, 10**9), "checkpoint_every": (1, 10**9)}


def check_config(c):
    """Raises ValueError, naming the value and its limit, for settings that cannot train; TypeError for a wrong type."""
    for name, (low, high) in LIMITS.items():
        value, kind = getattr(c, name), int if high == 10**9 else (int, float)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{name} must be {'an int' if kind is int else 'a number'}: got {value!r}")
        if not low <= value <= high:                   # nan, too
            raise ValueError(f"{name} must be between {low} and {high}: got {value}")
    if c.warmup > c.steps:
        raise ValueError(f"warmup must be at most steps={c.steps}, or lr is never reached: got {c.warmup}")
    if len(c.betas) != 2 or not all(0 <= b < 1 for b in c.betas):
        raise ValueError(f"betas must be two numbers from 0 to below 1: got {c.betas}")
    if c.precision not in (None, "bf16", "float32"):
        raise ValueError(f'precision must be "bf16", "float32" or None (pick): got {c.precision!r}')


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run. Defaults are LLaMA's (Touvron et al. 2023, section 2.3) but for lr and the size of the run.

    lr rises over `warmup` steps and falls by half a cosine to min_lr * lr. clip: the largest gradient norm. accumulate:
    batches a step. precision: "bf16", "float32" or None (what the device is good at). checkpoint: a folder, written
    every checkpoint_every steps, at the end and on Ctrl-C. floor (nats per token) is only shown. Errors: check_config.
    """

    steps: int = 1000
    lr: float = 3e-3
    min_lr: float = 0.1
    warmup: int = 100
    weight_decay: float = 0.1
    betas: tuple = (0.9, 0.95)
    clip: float = 1.0
    accumulate: int = 1
    precision: str | None = None
    compile: bool = False
    checkpoint: str | None = None
    checkpoint_every: int = 500
    bar: bool = True
    floor: float | None = None

    def __post_init__(self):
        check_config(self)


def describe_run(config, batches):
    """What a resumed run must share with its beginning: the settings that shape the weights, and its first batch."""
    free = ("compile", "checkpoint", "checkpoint_every", "bar", "floor")
    data = hashlib.sha256(b"".join(z.cpu().numpy().tobytes() for z in batches[0])).hexdigest()[:16]
    return {k: str(v) for k, v in asdict(config).items() if k not in free} | {"first batch": data}


SEAL = re.compile(rb'(?<="sha256":")[0-9a-f]{64}(?=")')


def save_checkpoint(folder, model, optimizer, history, keep=2, run=None):
    """Write folder/step-NNNNNNNN.safetensors: weights, optimizer state, random state of the CPU, and as metadata the
    history, whose length is the position in the data, the settings of the run, and a SHA-256 over the file.

    Atomic: a temporary file is renamed. Of the steps so far, the newest `keep` files are kept. Returns the path.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{n}": p.detach() for n, p in model.named_parameters()} | {"rng": torch.get_rng_state()}
    for n in optimizer.params:
        tensors |= {f"m.{n}": optimizer.m[n], f"v.{n}": optimizer.v[n]}
    meta = {"history": json.dumps(history), "run": json.dumps(run), "sha256": "0" * 64}
    data = safetensors.torch.save({n: t.contiguous() for n, t in tensors.items()}, meta)
    data = SEAL.sub(hashlib.sha256(data).hexdigest().encode(), data, 1)
    path = folder / f"step-{len(history):08d}.safetensors"
    with open(path.with_suffix(".tmp"), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())            # on the disk before it has its name, should the power fail
    os.replace(path.with_suffix(".tmp"), path)
    for old in sorted(p for p in folder.glob("step-*.safetensors") if p <= path)[:-keep]:
        old.unlink()
    return path


def read_checkpoint(path):
    """The tensors, history and settings in a file of save_checkpoint. Raises ValueError naming it if a byte changed."""
    data = Path(path).read_bytes()
    seal = SEAL.search(data)
    if not seal or seal[0] != hashlib.sha256(SEAL.sub(b"0" * 64, data, 1)).hexdigest().encode():
        raise ValueError(f"{Path(path).name} is damaged: its checksum does not fit its content")
    header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
    return safetensors.torch.load(data), *(json.loads(header["__metadata__"][k]) for k in ("history", "run"))


def restore(path, tensors, history, model, optimizer=None):
    """Copy the tensors of a checkpoint into model, and where an optimizer is given into that and the random state.

    Raises ValueError, and changes nothing, if they are of another model.
    """
    wanted = {f"model.{n}": p for n, p in model.named_parameters()}
    if optimizer:
        wanted |= {f"{k}.{n}": z for k, zs in (("m", optimizer.m), ("v", optimizer.v)) for n, z in zs.items()}
    for n in wanted | {n: 0 for n in tensors if n.startswith("model.")}:
        here, there = (tuple(z[n].shape) if n in z else "missing" for z in (wanted, tensors))
        if here != there:
            raise ValueError(f"{Path(path).name} is of another model: {n} is {here} here, {there} there")
    with torch.no_grad():
        for n, p in wanted.items():
            p.copy_(tensors[n])
    if optimizer:
        optimizer.t = len(history)
        torch.set_rng_state(tensors["rng"])


def load_checkpoint(path, model, optimizer=None):
    """Restore model (and optimizer and random state) from a file of save_checkpoint; returns the history.

    Raises ValueError naming the file if it is damaged or belongs to another model; nothing is changed then.
    """
    tensors, history, _ = read_checkpoint(path)
    restore(path, tensors, history, model, optimizer)
    return history


def resume(folder, model, optimizer, run=None):
    """Load the newest intact checkpoint of a folder, saying which ones were refused; returns its history, or [].

    Raises ValueError if it is of another model or, where both know, of a run with other settings.
    """
    for path in sorted(Path(folder).glob("step-*.safetensors"), reverse=True):
        try:
            tensors, history, there = read_checkpoint(path)
        except ValueError as error:
            print(f"checkpoint refused: {error}")
            continue
        if run and there and run != there:
            differ = [f"{k} {there.get(k)} there, {v} here" for k, v in run.items() if there.get(k) != v]
            raise ValueError(f"{path} is of another run ({'; '.join(differ)}): use another checkpoint folder")
        restore(path, tensors, history, model, optimizer)
        return history
    return []


@contextmanager
def stop_signal():
    """An event that the first Ctrl-C sets, so that a step can be finished and saved. The second interrupts at once."""
    stop = threading.Event()

    def handler(*args):
        if stop.is_set():
            signal.default_int_handler(*args)
        stop.set()

    if threading.current_thread() is not threading.main_thread():      # only the main thread may set handlers
        yield stop
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def begin(model, batches, c):
    """What a run begins with, or goes on with: the optimizer, the history so far, and the description of the run."""
    if hasattr(model, "config"):
        check_batch(*batches[0], model.config.vocab_size)
    model.train()
    model.zero_grad()            # what an experiment left over would count in the first step
    optimizer, run = AdamW(model, c.betas, weight_decay=c.weight_decay), describe_run(c, batches)
    return optimizer, resume(c.checkpoint, model, optimizer, run) if c.checkpoint else [], run


def train(model, batches, config):
    """Train in place on batches[i] -> inputs, targets, int64 (b, t), where a target of -100 does not count.

    Returns the history, one dict a step: step, loss (nats per token, before the step), lr, grad_norm, tokens, seconds.
    With config.checkpoint the run goes on from the newest intact checkpoint of that folder. Raises FloatingPointError,
    naming the step, when loss or gradient is not finite (the weights are those before that step), KeyboardInterrupt
    after saving at Ctrl-C, ValueError for a batch or checkpoint that does not fit.
    """
    c, device = config, next(model.parameters()).device
    precision = c.precision or default_precision(device)
    optimizer, history, run = begin(model, batches, c)
    forward = compiled(model, device) if c.compile else model
    began = time.perf_counter() - (history[-1]["seconds"] if history else 0)
    with stop_signal() as stop, tqdm(total=c.steps, initial=len(history), disable=not c.bar, file=sys.stdout, ncols=110,
                                     mininterval=0.2 if sys.stdout.isatty() else 10) as bar:
        for step in range(len(history), c.steps):
            loss, tokens = backward(forward, [batches[step * c.accumulate + i] for i in range(c.accumulate)], precision)
            norm, lr = clip_gradients(model.parameters(), c.clip).item(), learning_rate(step, c)
            if not math.isfinite(loss + norm):
                raise FloatingPointError(f"loss {loss}, gradient norm {norm} at step {step}: stopped before it changed "
                                         "the weights. Try a lower lr or a longer warmup, and look at that batch")
            optimizer.step(lr)
            history.append({"step": step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": tokens,
                            "seconds": time.perf_counter() - began})
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}" + (f" (floor {c.floor:.3f})" if c.floor else ""), refresh=False)
            stopped = stop.is_set()
            if c.checkpoint and (stopped or step + 1 == c.steps or (step + 1) % c.checkpoint_every == 0):
                save_checkpoint(c.checkpoint, model, optimizer, history, run=run)
            if stopped:
                saved = "; saved, the same call goes on" if c.checkpoint else ""
                raise KeyboardInterrupt(f"stopped after step {step}{saved}")
    return history
