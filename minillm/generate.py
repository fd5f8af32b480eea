"""Generation: samplers, key-value cache, batches of prompts, streaming, speculative decoding (draft of the module that chapter 08 exports)."""
import codecs
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from minillm.model import check_ids


def penalize(logits, seen, penalty):
    """Divide positive and multiply negative logits of the tokens seen (bool (b, v)) by the penalty (CTRL, Keskar et al. 2019, section 4.1)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits, k):
    """logits (..., v) with all but the k largest set to -inf (Fan et al. 2018); ties with the k-th stay."""
    least = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits, p):
    """logits (..., v) with all but the nucleus set to -inf: the most likely tokens that together reach p (Holtzman et al. 2020)."""
    ordered, order = logits.sort(descending=True)
    q = ordered.softmax(-1)
    drop = q.cumsum(-1) - q >= p                      # reached before this token: the one that crosses p stays
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)


def keep_min_p(logits, p):
    """logits (..., v) with tokens below p times the probability of the most likely one set to -inf (Nguyen et al. 2024)."""
    q = logits.softmax(-1)
    return logits.masked_fill(q < p * q.amax(-1, keepdim=True), -torch.inf)


def distribution(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """The probabilities (..., v), float32, from which the next token is drawn; temperature 0 is certain of the largest logit."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    logits = logits.float() / temperature
    for keep, value in ((keep_top_k, top_k), (keep_top_p, top_p), (keep_min_p, min_p)):
        if value is not None:
            logits = keep(logits, value)
    return logits.softmax(-1)


def check_sampling(temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0):
    """Raises ValueError, naming the value, for settings that make no distribution."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 (greedy) or above: got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, or None to keep all: got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1: got {top_p}")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p must be 0 to 1: got {min_p}")
    if not 0 < repetition_penalty < float("inf"):
        raise ValueError(f"repetition_penalty must be above 0 (1 leaves the logits as they are): got {repetition_penalty}")


class KVCache:
    """Keys and values of one layer, (b, g, length, k) each, allocated at once and filled from the left."""

    def __init__(self, batch, n_kv_heads, length, head_dim, dtype=torch.float32, device=None, padding=None):
        self.k, self.v = torch.empty(2, batch, n_kv_heads, length, head_dim, dtype=dtype, device=device)
        self.length, self.padding = 0, padding

    def append(self, k, v):
        """Add k, v (b, g, t, k); returns those of all positions so far. Raises ValueError if they do not fit."""
        start, end = self.length, self.length + k.shape[2]
        if end > self.k.shape[2]:
            raise ValueError(f"the cache has room for {self.k.shape[2]} tokens, {start} are in it, {end - start} more do not fit")
        self.k[:, :, start:end], self.v[:, :, start:end], self.length = k, v, end
        return self.k[:, :, :end], self.v[:, :, :end]

    def truncate(self, n):
        """Forget all but the first n positions. Raises ValueError if there are fewer."""
        if not 0 <= n <= self.length:
            raise ValueError(f"the cache holds {self.length} tokens: cannot keep {n}")
        self.length = n


def make_caches(model, batch, length, padding=None):
    """An empty KVCache for each layer of a Llama, in the dtype and on the device of its weights."""
    c, w = model.config, model.model.embed_tokens.weight
    return [KVCache(batch, c.n_kv_heads, length, c.head_dim, w.dtype, w.device, padding) for _ in range(c.n_layers)]


def pad_left(prompts, pad_id):
    """Prompts (lists of ids) as one batch: ids int64 (b, t), filled with pad_id on the left, and padding int64 (b,), how many.

    Raises ValueError if there is no prompt, or one is empty.
    """
    if not prompts or not all(len(p) for p in prompts):
        raise ValueError(f"each prompt needs at least one token: got lengths {[len(p) for p in prompts]}")
    t = max(map(len, prompts))
    padding = torch.tensor([t - len(p) for p in prompts])
    return torch.tensor([[pad_id] * (t - len(p)) + list(p) for p in prompts]), padding


def check_prompt(model, ids, max_new_tokens, padding=None):
    """Raises TypeError or ValueError unless ids (b, t) and so many new tokens fit into the model, and each row has a token."""
    room = model.config.max_seq_len
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be 0 or more: got {max_new_tokens}")
    check_ids(ids, ids.shape[-1], model.config)
    b, t = ids.shape
    if not b or not t:
        raise ValueError(f"the prompt is empty (ids has shape {(b, t)}): begin with one token at least, such as <|endoftext|>")
    if t + max_new_tokens > room:
        raise ValueError(f"a prompt of {t} and {max_new_tokens} new tokens are more than max_seq_len={room}: shorten one of them")
    if padding is not None and (padding.shape != (b,) or not ((padding >= 0) & (padding < t)).all()):
        raise ValueError(f"padding must be ({b},) counts of 0 to {t - 1} positions, so that each row has a token: got {padding.tolist()}")


def one_token_linear(blocks, bias, x):
    """x @ weight.T + bias, where blocks (4, o/4, i) views the weight and x holds one vector; else as nn.Linear."""
    n, o, i = blocks.shape
    if x.numel() != i:
        return F.linear(x, blocks.view(n * o, i), bias)
    y = torch.bmm(blocks, x.reshape(1, i).t().expand(n, i, 1)).view(*x.shape[:-1], n * o)
    return y if bias is None else y + bias


def large_linears(model, least=2**14):
    """The plain float32 nn.Linear of a model on a CPU with `least` weights or more, and what to call instead of their forward."""
    return [(m, partial(one_token_linear, m.weight.view(4, -1, m.in_features), m.bias)) for m in model.modules()
            if type(m) is nn.Linear and m.weight.numel() >= least and m.out_features % 4 == 0 and "forward" not in vars(m)
            and m.weight.dtype == torch.float32 and m.weight.device.type == "cpu" and m.weight.is_contiguous()]


@contextmanager
def swapped(linears):
    """Within it, the modules of large_linears use their other forward."""
    try:
        for module, forward in linears:
            vars(module)["forward"] = forward         # setattr of nn.Module is slow, and this is done for every token
        yield
    finally:
        for module, _ in linears:
            vars(module).pop("forward", None)


@torch.no_grad()
def steps(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0, seed=0, padding=None):
    """Yield the next token of each row, int64 (b,), max_new_tokens times. Settings and errors as in generate, which checks them."""
    (b, t), linears = ids.shape, large_linears(model)
    caches = make_caches(model, b, t + max_new_tokens, padding)
    rng = torch.Generator(ids.device).manual_seed(seed)
    seen = torch.zeros(b, model.config.vocab_size, dtype=torch.bool, device=ids.device)
    if repetition_penalty != 1:
        real = torch.arange(t, device=ids.device) >= (0 if padding is None else padding[:, None])
        for row, tokens, mine in zip(seen, ids, real.expand(b, t)):
            row[tokens[mine]] = True
    for step in range(max_new_tokens):
        with swapped(linears):
            logits = model(ids, caches, 0 if step == 0 else t + step - 1)[:, -1].float()
        if repetition_penalty != 1:
            logits = penalize(logits, seen, repetition_penalty)
        if temperature == 0:
            new = logits.argmax(-1)
        else:
            new = torch.multinomial(distribution(logits, temperature, top_k, top_p, min_p), 1, generator=rng)[:, 0]
        if repetition_penalty != 1:
            seen.scatter_(1, new[:, None], True)
        yield new
        ids = new[:, None]


def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0, stop=None,
             seed=0, padding=None):
    """Continue ids, int64 (b, t), by up to max_new_tokens; returns (b, t + n), n the steps until every row has met the token `stop`.

    A row that has met it is filled with it. temperature divides the logits; 0 takes the most likely token. top_k, top_p, min_p
    and repetition_penalty as in the functions above. padding (b,): filler at the left of the rows, from pad_left.
    Raises ValueError, before any work, for settings out of range, an empty prompt, or more tokens than max_seq_len.
    """
    check_sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    check_prompt(model, ids, max_new_tokens, padding)
    done, rows = torch.zeros(len(ids), dtype=torch.bool, device=ids.device), [ids]
    for new in steps(model, ids, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, padding):
        if stop is not None:
            new[done] = stop
            done |= new == stop
        rows.append(new[:, None])
        if done.all():
            break
    return torch.cat(rows, dim=1)


def stream(model, tokenizer, ids, max_new_tokens, stop=None, **settings):
    """Yield the continuation of ids (1, t) as pieces of text, each as soon as its characters are whole, until the token `stop`."""
    check_sampling(**{k: v for k, v in settings.items() if k not in ("seed", "padding")})
    check_prompt(model, ids, max_new_tokens)
    return pieces(tokenizer, (new.item() for new in steps(model, ids, max_new_tokens, **settings)), stop)


def pieces(tokenizer, ids, stop=None):
    """Yield the text of ids (an iterable) piece by piece; bytes wait until their character is complete."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for i in ids:
        if i == stop:
            break
        if text := decoder.decode(tokenizer.vocab[i]):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


def verify(p, q, drafted, rng):
    """Which drafted tokens stay, so that the result is distributed as p: (kept (b, m + 1), passed (b, n)).

    p (b, n + 1, v), q (b, n, v): what target and draft think of each place; drafted (b, n), drawn from q. m is the number that
    all rows accept; the last kept token is drawn anew where it was refused (Leviathan et al. 2023, algorithm 1).
    """
    n = drafted.shape[1]
    ratio = (p[:, :n].gather(2, drafted[..., None]) / q.gather(2, drafted[..., None]))[..., 0]
    passed = torch.rand(ratio.shape, generator=rng, device=p.device) < ratio
    m = int(passed.all(0).cumprod(0).sum())
    rest = p[:, m] if m == n else (p[:, m] - q[:, m]).clamp(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p[:, m])
    last = torch.multinomial(rest, 1, generator=rng)
    if m < n:
        last = torch.where(passed[:, m:m + 1], drafted[:, m:m + 1], last)
    return torch.cat((drafted[:, :m], last), dim=1), passed


@torch.no_grad()
def speculate(model, draft, ids, max_new_tokens, k=4, temperature=1.0, seed=0):
    """Continue ids (b, t) as generate does, but let `draft` propose k tokens that `model` checks in one pass.

    Returns ids (b, t + max_new_tokens) and the share of the checked proposals that were accepted. Raises ValueError as generate, if k < 1, or
    if the two models have other vocabularies.
    """
    check_sampling(temperature)
    check_prompt(model, ids, max_new_tokens)
    check_prompt(draft, ids, max_new_tokens)
    if k < 1 or model.config.vocab_size != draft.config.vocab_size:
        raise ValueError(f"k must be at least 1 and the vocabularies equal: got k={k}, {model.config.vocab_size} and {draft.config.vocab_size} tokens")
    end, rng = ids.shape[1] + max_new_tokens, torch.Generator(ids.device).manual_seed(seed)
    caches, draft_caches = (make_caches(m, len(ids), end) for m in (model, draft))
    linears = large_linears(draft)

    def read(m, caches, ids, last):
        """The distributions after the `last` newest tokens of ids, of which the cache holds the beginning: (b, last, v)."""
        start = caches[0].length
        return distribution(m(ids[:, start:], caches, start)[:, -last:], temperature)

    accepted = checked = 0
    while ids.shape[1] < end:
        n = min(k, end - ids.shape[1] - 1)
        longer, q = ids, [ids.new_empty(len(ids), 0, model.config.vocab_size, dtype=torch.float32)]
        with swapped(linears):
            for _ in range(n):
                q.append(read(draft, draft_caches, longer, 1))
                longer = torch.cat((longer, torch.multinomial(q[-1][:, 0], 1, generator=rng)), dim=1)
        kept, passed = verify(read(model, caches, longer, n + 1), torch.cat(q, dim=1), longer[:, ids.shape[1]:], rng)
        ids = torch.cat((ids, kept), dim=1)
        for cache in caches + draft_caches:
            cache.truncate(min(cache.length, ids.shape[1] - 1))
        run = passed.cumprod(1)
        accepted, checked = accepted + run.sum().item(), checked + run.sum().item() + (1 - run).any(1).sum().item()
    return ids, accepted / max(checked, 1)
