"""The table that every stage of the model adds a row to: what it gained and what it cost."""
import functools
import math
import re
import statistics
import time

import torch

from minillm.data import IGNORE, encode_document
from minillm.fast_decode import FastDecoder
from minillm.generate import generate
from minillm.quantize import size_bytes
from minillm.sft import replies
from minillm.train import token_loss
from minillm.world import Setting, World
from minillm.world.questions import exams
from minillm.world.templates import HARBOUR


@torch.no_grad()
def bits_per_byte(model, texts, tokenizer, batch_size=32):
    """Bits that the model needs per UTF-8 byte of the texts (each a document, its end included), the unit that does not depend
    on the tokenizer. Texts longer than max_seq_len are read in pieces that follow each other."""
    model.eval()
    length = model.config.max_seq_len
    pieces = []
    for text in texts:
        ids = encode_document(text, tokenizer)
        pieces += [ids[i:i + length + 1] for i in range(0, len(ids) - 1, length)]
    pieces.sort(key=len)
    nats = sum(token_loss(model, *padded(pieces[i:i + batch_size], model)).item() for i in range(0, len(pieces), batch_size))
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def padded(rows, model):
    """Lists of ids -> inputs and targets, filled up at the right with IGNORE, on the device of the model."""
    ids = torch.full((len(rows), max(map(len, rows))), IGNORE)
    for row, target in zip(rows, ids):
        target[:len(row)] = torch.tensor(row)
    ids = ids.to(next(model.parameters()).device)
    return ids[:, :-1].clamp(min=0), ids[:, 1:]


@torch.no_grad()
def consistency(model, stories, tokenizer, batch_size=32):
    """Share of stories whose end the model completes exactly: "So now the blue kite" -> " is with Vera, by the river."

    Greedy decoding gives the answer exactly when each of its tokens is the most likely one after those before it, so that
    one pass over question and answer tells."""
    model.eval()
    right = 0
    for i in range(0, len(stories), batch_size):
        batch = stories[i:i + batch_size]
        inputs, targets = padded([encode_document(s.text, tokenizer)[:-1] for s in batch], model)
        for row, story in enumerate(batch):
            targets[row, :len(encode_document(story.question, tokenizer)) - 2] = IGNORE
        best = model(inputs).argmax(-1)
        right += ((best == targets) | (targets == IGNORE)).all(1).sum().item()
    return right / len(stories)


def chance(stories):
    """The consistency of a guess at random: among the characters of the story and none, and the places that it names."""
    return sum(1 / ((len(s.characters) + 1) * len(set(s.places))) for s in stories) / len(stories)


def last_named(stories):
    """The consistency of a rule that reads but tracks nothing: the last character and the last place that were named."""
    right = 0
    for s in stories:
        names = re.findall("|".join(c.name for c in s.characters), s.question)
        right += s.answer == f" is with {names[-1]}, {s.places[-1]}."
    return right / len(stories)


def speed(model, tokenizer, new_tokens=64):
    """Tokens per second of one story being written, the best of three, since whatever else the machine does only adds to the time."""
    start = torch.tensor([encode_document("", tokenizer)[:1]], device=next(model.parameters()).device)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        generate(model, start, new_tokens)
        seconds.append(time.perf_counter() - began)
    return new_tokens / min(seconds)


def size_mb(model):
    """Megabytes (10^6 bytes) of the weights, floats or codes and scales, a shared one counted once."""
    return size_bytes(model) / 1e6


def accuracy(model, tokenizer, asked):
    """Share of questions, pairs of a dialogue and the Question it ends with, whose greedy answer is right."""
    answers = replies(model, tokenizer, [messages for messages, _ in asked], partial=True)
    return sum(question.right(answer) for (_, question), (answer,) in zip(asked, answers)) / len(asked)


def win_rate(model, other, tokenizer, asked, seed=0):
    """Share of questions to which the model's answer has a greater true reward than that of the other, ties counted half, and
    half the width of its 95% interval. Both answers are drawn at temperature 1."""
    drawn = [replies(m, tokenizer, [messages for messages, _ in asked], temperature=1.0, seed=seed, partial=True) for m in (model, other)]
    results = []
    for (_, question), (a,), (b,) in zip(asked, *drawn):
        a, b = question.reward(a), question.reward(b)
        results.append((a > b) + 0.5 * (a == b))
    return statistics.mean(results), 1.96 * statistics.stdev(results) / math.sqrt(len(results))


LEGEND = """bits/byte: what the model needs per byte of held-out stories; gap: how far that is above the entropy of the world, which no
model can beat; consistency: share of stories ended right ("So now the blue kite" -> " is with Vera, by the river."); answers:
share of questions about a story answered right; harbour: the same in another region; wins: how often its answer is better than
that of the chat model (ties count half). The first row: the entropy, and a guess among what the story names."""


@functools.cache
def trials(setting=Setting(), n=500):
    """What every stage is scored on: held-out stories, and questions about others, in the valley and in the harbour."""
    return World(setting=setting).stories(n, "heldout"), exams(n, setting=setting), exams(n, region=HARBOUR, setting=setting)


def bounds(setting=Setting()):
    """The first row: the least bits per byte that are possible, and what guessing scores."""
    stories, valley, harbour = trials(setting)
    floor = sum(-s.logp for s in stories) / math.log(2) / sum(len(s.text.encode()) for s in stories)
    guess = [statistics.mean(1 / q.candidates for _, q in asked) for asked in (valley, harbour)]
    return floor, {"stage": "(bounds)", "bits/byte": f"{floor:.4f}", "gap": "0.0%", "consistency": f"{chance(stories):.1%}",
                   "answers": f"{guess[0]:.1%}", "harbour": f"{guess[1]:.1%}", "wins": "50.0%", "MB": "", "tokens/s": ""}


def score(name, model, tokenizer, chat=None, setting=Setting()):
    """One row of the scorecard; chat: the model to win against (None, or the model itself: no wins to count); setting: of the
    stories that the model learnt from."""
    stories, valley, harbour = trials(setting)
    bpb = bits_per_byte(model, [s.text for s in stories], tokenizer)
    fast = FastDecoder(model)
    wins = f"{win_rate(fast, FastDecoder(chat), tokenizer, valley)[0]:.1%}" if chat else ""
    return {"stage": name, "bits/byte": f"{bpb:.4f}", "gap": f"{bpb / bounds(setting)[0] - 1:.1%}",
            "consistency": f"{consistency(model, stories, tokenizer):.1%}", "answers": f"{accuracy(fast, tokenizer, valley):.1%}",
            "harbour": f"{accuracy(fast, tokenizer, harbour):.1%}", "wins": wins,
            "MB": f"{size_mb(model):.1f}", "tokens/s": f"{speed(fast, tokenizer):.0f}"}


def table(rows):
    """Rows (dicts with the same keys) as text in columns."""
    lines = [list(rows[0])] + [list(row.values()) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths)) for line in lines)
