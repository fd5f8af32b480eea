from contextlib import contextmanager
from dataclasses import dataclass, asdict
from pathlib import Path
import hashlib, json, math, os, signal, sys, threading, time
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm


def default_precision(device):
    """"bf16" where the device multiplies bfloat16 in hardware, else "float32"."""
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "float32"


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run. lr rises over warmup steps and falls by half a cosine to min_lr * lr; clip is the largest gradient norm.

    Defaults are LLaMA's (Touvron et al. 2023, section 2.3) but for the size of the run. accumulate batches make one step.
    floor (nats per token) is only shown. checkpoint: a folder, written every checkpoint_every steps and on interruption.
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


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2), decaying matrices only."""

    def __init__(self, model, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1):
        self.betas, self.eps, self.weight_decay, self.t = betas, eps, weight_decay, 0
        self.params = dict(model.named_parameters())       # a tied weight once
        self.m = {n: torch.zeros_like(p) for n, p in self.params.items()}
        self.v = {n: torch.zeros_like(p) for n, p in self.params.items()}

    @torch.no_grad()
    def step(self, lr):
        self.t += 1
        b1, b2 = self.betas
        for n, p in self.params.items():
            m, v = self.m[n], self.v[n]
            m.lerp_(p.grad, 1 - b1)
            v.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
            if p.ndim > 1:
                p.mul_(1 - lr * self.weight_decay)
            p.addcdiv_(m, (v / (1 - b2**self.t)).sqrt_().add_(self.eps), value=-lr / (1 - b1**self.t))
            p.grad = None


def learning_rate(step, c):
    """Linear warm-up, then half a cosine from lr to min_lr * lr (steps count from 0)."""
    if step < c.warmup:
        return c.lr * (step + 1) / c.warmup
    done = (step - c.warmup) / max(1, c.steps - c.warmup)
    return c.lr * (c.min_lr + (1 - c.min_lr) * (1 + math.cos(math.pi * done)) / 2)


def clip_gradients(params, limit):
    """Scale all gradients so that their joint norm is at most limit; returns the norm before."""
    grads = [p.grad for p in params]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
    scale = torch.clamp(limit / (norm + 1e-6), max=1.0)
    for g in grads:
        g.mul_(scale)
    return norm


def token_loss(model, inputs, targets, precision):
    """Sum of the cross-entropies (nats, float32) over the positions whose target is not -100."""
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = model(inputs)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")


def digest(tensors, meta):
    """SHA-256 over everything that a checkpoint holds."""
    h = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        h.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        h.update(t.reshape(-1).view(torch.uint8).numpy())
    return h.hexdigest()


def save_checkpoint(folder, model, optimizer, history, keep=2):
    """Write folder/step-NNNNNNNN.safetensors: weights, optimizer state, random state, and the history, whose length is the
    position in the data. Atomic: a temporary file is renamed. Keeps the newest `keep` files. Returns the path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{n}": p.detach() for n, p in model.named_parameters()} | {"rng": torch.get_rng_state()}
    for n in optimizer.params:
        tensors |= {f"m.{n}": optimizer.m[n], f"v.{n}": optimizer.v[n]}
    meta = {"history": json.dumps(history)}
    path = folder / f"step-{len(history):08d}.safetensors"
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata=meta | {"sha256": digest(tensors, meta)})
    os.replace(temporary, path)
    for old in sorted(folder.glob("step-*.safetensors"))[:-keep]:
        old.unlink()
    return path


def load_checkpoint(path, model, optimizer=None):
    """Restore model (and optimizer and random state) from a file of save_checkpoint; returns the history.

    Raises ValueError naming the file if it is damaged or belongs to another model; nothing is changed then.
    """
    try:
        with safe_open(path, "pt") as f:
            meta, tensors = f.metadata(), {n: f.get_tensor(n) for n in f.keys()}
        intact = meta.pop("sha256") == digest(tensors, meta)
        history = json.loads(meta["history"])
    except Exception as e:
        raise ValueError(f"{Path(path).name} is not a readable checkpoint ({e})") from None
    if not intact:
        raise ValueError(f"{Path(path).name} is damaged: its checksum does not match its content")
    params = dict(model.named_parameters())
    for n, p in params.items():
        if (t := tensors.get(f"model.{n}")) is None or t.shape != p.shape:
            raise ValueError(f"{Path(path).name} is of another model: {n} is {tuple(p.shape)} here, {t is not None and tuple(t.shape)} there")
    with torch.no_grad():
        for n, p in params.items():
            p.copy_(tensors[f"model.{n}"])
    if optimizer:
        optimizer.t = len(history)
        for n in params:
            optimizer.m[n].copy_(tensors[f"m.{n}"])
            optimizer.v[n].copy_(tensors[f"v.{n}"])
        torch.set_rng_state(tensors["rng"])
    return history


def resume(folder, model, optimizer):
    """Load the newest intact checkpoint of a folder, saying which ones were refused; returns its history, [] if there is none."""
    for path in sorted(Path(folder).glob("step-*.safetensors"), reverse=True):
        try:
            return load_checkpoint(path, model, optimizer)
        except ValueError as e:
            print(f"checkpoint refused: {e}")
    return []


@contextmanager
def stop_signal():
    """An object whose .stop turns true at Ctrl-C, so that a step is finished and saved before training ends."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = signal.signal(signal.SIGINT, lambda *_: flag.set())
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)


def train(model, batches, config):
    """Train in place on batches[i] -> inputs, targets, int64 (b, t), -100 where a target does not count.

    Returns the history, one dict a step: step, loss (nats per token), lr, grad_norm, tokens, seconds. With config.checkpoint the
    run goes on from the newest intact checkpoint of that folder. Raises FloatingPointError, naming the step, when the loss is
    not finite (the weights are still those of the step before); KeyboardInterrupt after saving.
    """
    c, device = config, next(model.parameters()).device
    precision = c.precision or default_precision(device)
    optimizer = AdamW(model, c.betas, weight_decay=c.weight_decay)
    history = resume(c.checkpoint, model, optimizer) if c.checkpoint else []
    forward = torch.compile(model) if c.compile else model
    model.train()
    began = time.perf_counter() - (history[-1]["seconds"] if history else 0)
    with stop_signal() as stop, tqdm(total=c.steps, initial=len(history), disable=not c.bar, file=sys.stdout, ncols=110,
                                     mininterval=0.2 if sys.stdout.isatty() else 10) as bar:
        for step in range(len(history), c.steps):
            loss, tokens = backward(forward, [batches[step * c.accumulate + i] for i in range(c.accumulate)], precision, device)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {step}; the weights are those of step {step - 1}")
            norm, lr = clip_gradients(model.parameters(), c.clip), learning_rate(step, c)
            optimizer.step(lr)
            history.append(dict(step=step, loss=loss, lr=lr, grad_norm=norm.item(), tokens=tokens, seconds=time.perf_counter() - began))
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}" + (f" (floor {c.floor:.3f})" if c.floor else ""), refresh=False)
            if c.checkpoint and (stop.is_set() or len(history) % c.checkpoint_every == 0):
                save_checkpoint(c.checkpoint, model, optimizer, history)
            if stop.is_set():
                raise KeyboardInterrupt
    return history


def backward(model, micro, precision, device):
    """Accumulate the gradients of one step over its batches; returns the loss in nats per token and the number of tokens.

    The sum is over tokens, so that a batch with few tokens does not count as much as one with many.
    """
    tokens = int(sum((targets != -100).sum() for _, targets in micro))
    loss = 0.0
    for inputs, targets in micro:
        part = token_loss(model, inputs.to(device), targets.to(device), precision) / tokens
        part.backward()
        loss += part.item()
    return loss, tokens
