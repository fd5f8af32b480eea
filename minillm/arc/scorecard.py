"""The table that every stage of the model adds a row to: what it gained and what it cost."""
import functools
import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from minillm.data import IGNORE, encode_document
from minillm.fast_decode import FastDecoder
from minillm.generate import generate
from minillm.quantize import size_bytes
from minillm.sft import replies
from minillm.tokenizer import Tokenizer
from minillm.train import token_loss
from minillm.world import World
from minillm.world.questions import Question, exams, instructions
from minillm.world.reader import Reading, read
from minillm.world.stories import PLAIN, Setting, Story
from minillm.world.templates import HARBOUR, VALLEY

Asked = list[tuple[list[dict[str, str]], Question]]       # as exams() gives them
Row = dict[str, str | float | None]       # a row, by column; None: there is nothing to count
# How the numbers of a column are shown; those of all other columns are shares, shown in percent.
FORMATS = {"bits/byte": ".4f", "MB": ".1f", "tokens/s": ".0f"}


@torch.no_grad()
def bits_per_byte(model: nn.Module, texts: Sequence[str], tokenizer: Tokenizer,
                  batch_size: int = 32) -> float:
    """Bits that the model needs per UTF-8 byte of the texts, each a document with its end.

    This unit does not depend on the tokenizer. Texts longer than max_seq_len are read in
    consecutive pieces, each scored without the ones before it.
    """
    model.eval()
    length = model.config.max_seq_len
    pieces = []
    for text in texts:
        ids = encode_document(text, tokenizer)
        pieces += [ids[i:i + length + 1] for i in range(0, len(ids) - 1, length)]
    pieces.sort(key=len)
    batches = [pieces[i:i + batch_size] for i in range(0, len(pieces), batch_size)]
    nats = sum(token_loss(model, *padded(batch, model)).item() for batch in batches)
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def padded(rows: Sequence[list[int]], model: nn.Module) -> tuple[Tensor, Tensor]:
    """Lists of ids -> inputs and targets (b, t), on the device of the model.

    Targets are padded on the right with IGNORE, inputs with 0.
    """
    ids = torch.full((len(rows), max(map(len, rows))), IGNORE)
    for row, target in zip(rows, ids):
        target[:len(row)] = torch.tensor(row)
    ids = ids.to(next(model.parameters()).device)
    return ids[:, :-1].clamp(min=0), ids[:, 1:]


@torch.no_grad()
def consistency(model: nn.Module, stories: Sequence[Story], tokenizer: Tokenizer,
                batch_size: int = 32) -> float:
    """Share of stories whose end the model completes exactly.

    "So now the blue kite" -> " is with Vera, by the river.", for example. Greedy decoding gives the
    answer exactly when each of its tokens is the most likely one after those before it, so one pass
    over question and answer is enough to tell.
    """
    model.eval()
    right = 0
    for i in range(0, len(stories), batch_size):
        batch = stories[i:i + batch_size]
        documents = [encode_document(s.text, tokenizer) for s in batch]
        inputs, targets = padded([ids[:-1] for ids in documents], model)
        for row, story in enumerate(batch):
            targets[row, :len(encode_document(story.question, tokenizer)) - 2] = IGNORE
        best = model(inputs).argmax(-1)
        right += ((best == targets) | (targets == IGNORE)).all(1).sum().item()
    return right / len(stories)


def chance(stories: Sequence[Story]) -> float:
    """The consistency of a random guess.

    It guesses one of the characters of the story, or nobody, and one of the places that it names.
    """
    guesses = [(len(s.characters) + 1) * len(set(s.places)) for s in stories]
    return sum(1 / n for n in guesses) / len(stories)


def last_named(stories: Sequence[Story]) -> float:
    """The consistency of a rule that reads but tracks nothing.

    It answers with the last character and the last place that were named.
    """
    right = 0
    for s in stories:
        names = re.findall("|".join(c.name for c in s.characters), s.question)
        right += s.answer == f" is with {names[-1]}, {s.places[-1]}."
    return right / len(stories)


def write_texts(model: nn.Module, tokenizer: Tokenizer, n: int, temperature: float = 1.0,
                seed: int = 0, length: int | None = None, batch_size: int = 100) -> list[str]:
    """n texts that the model writes from nothing: what follows <|endoftext|>, up to the next one.

    A text that does not end is cut off after `length` tokens, at most as many as max_seq_len has
    room for.
    """
    room = model.config.max_seq_len - 1
    length = room if length is None else min(length, room)
    end = encode_document("", tokenizer)[0]
    device = next(model.parameters()).device
    texts = []
    for first in range(0, n, batch_size):
        start = torch.full((min(batch_size, n - first), 1), end, device=device)
        ids = generate(model, start, length, temperature, stop=end, seed=seed + first)
        for row in ids[:, 1:].tolist():
            written = row[:row.index(end)] if end in row else row
            texts.append(tokenizer.decode(written))
    return texts


def read_story(text: str, setting: Setting = PLAIN) -> Reading:
    """A text, read as a story of the valley or of the harbour.

    One in 25 of the stories that the models learn from is from the harbour, so either region will
    do. If neither could have told the text, this is the reading that introduces more of its
    characters (the valley's, if both introduce as many): the fault that it names is the one to fix.
    """
    readings = [read(text, region, setting) for region in (VALLEY, HARBOUR)]
    return max(readings, key=lambda reading: (reading.fault is None, len(reading.characters)))


def faults(texts: Sequence[str], setting: Setting = PLAIN) -> Counter[str]:
    """How many of the texts have a first fault of each kind (reader.KINDS).

    "none" counts those that the world could have told.
    """
    found = [read_story(text, setting).fault for text in texts]
    return Counter(fault.kind if fault else "none" for fault in found)


def validity(model: nn.Module, tokenizer: Tokenizer, n: int = 200, temperature: float = 0.5,
             seed: int = 0, setting: Setting = PLAIN) -> float:
    """Share of n stories, written by the model from nothing, that the world could have told.

    In the valley or in the harbour. With 200 stories, the standard error is up to 3.5 percentage
    points.
    """
    texts = write_texts(model, tokenizer, n, temperature, seed)
    return faults(texts, setting)["none"] / len(texts)


def speed(model: nn.Module, tokenizer: Tokenizer, new_tokens: int = 64) -> float:
    """Tokens per second while the model writes one story.

    The best of three, since whatever else the machine does only adds to the time.
    """
    device = next(model.parameters()).device
    start = torch.tensor([encode_document("", tokenizer)[:1]], device=device)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        generate(model, start, new_tokens)
        seconds.append(time.perf_counter() - began)
    return new_tokens / min(seconds)


def size_mb(model: nn.Module) -> float:
    """Megabytes (10^6 bytes) of the weights, floats or codes and scales; shared ones count once."""
    return size_bytes(model) / 1e6


def grades(model: nn.Module, tokenizer: Tokenizer, asked: Asked) -> list[bool]:
    """For each question, whether the greedy answer is right.

    asked: pairs of a dialogue and the Question it ends with.
    """
    answers = replies(model, tokenizer, [messages for messages, _ in asked], partial=True)
    return [question.right(answer) for (_, question), (answer,) in zip(asked, answers)]


def accuracy(model: nn.Module, tokenizer: Tokenizer, asked: Asked) -> float:
    """Share of questions whose greedy answer is right, see grades."""
    return statistics.mean(grades(model, tokenizer, asked))


def tell(model: nn.Module, tokenizer: Tokenizer, requests: Sequence[tuple],
         temperature: float = 0.5, seed: int = 0, length: int | None = None) -> list[str]:
    """The stories that the model tells on request, each of at most `length` tokens (None: half of
    max_seq_len); requests: as instructions() gives them."""
    length = length or model.config.max_seq_len // 2
    told = replies(model, tokenizer, [messages for messages, _ in requests], 1, temperature,
                   length, batch_size=100, seed=seed, partial=True)
    return [text for text, in told]


def follows(text: str, wanted: tuple[str, str], setting: Setting = PLAIN) -> dict[str, bool]:
    """Which parts of a request a story has, as {part: bool}.

    wanted: the animal ("Vera", or "shy alpaca") and the thing ("kite"). The parts are "name", or
    "trait" and "kind", of the first character of the story, and "thing", which the story has to
    introduce.
    """
    animal, thing = wanted
    reading = read_story(text, setting)
    hero = reading.characters[0] if reading.characters else None
    words = dict(zip(("trait", "kind") if " " in animal else ("name",), animal.split()))
    found = {part: hero is not None and getattr(hero, part) == word for part, word in words.items()}
    return found | {"thing": any(x.noun == thing for x in reading.things)}


def win_rate(model: nn.Module, other: nn.Module, tokenizer: Tokenizer, asked: Asked,
             seed: int = 0) -> tuple[float, float]:
    """How often the model's answer has a greater true reward than the other's.

    The share of questions, where a tie counts half, and half the width of its 95% confidence
    interval. Both answers are drawn at temperature 1.
    """
    prompts = [messages for messages, _ in asked]
    drawn = [replies(m, tokenizer, prompts, temperature=1.0, seed=seed, partial=True)
             for m in (model, other)]
    results = []
    for (_, question), (a,), (b,) in zip(asked, *drawn):
        a, b = question.reward(a), question.reward(b)
        results.append((a > b) + 0.5 * (a == b))
    half_width = 1.96 * statistics.stdev(results) / math.sqrt(len(results))
    return statistics.mean(results), half_width


LEGEND = """\
bits/byte: what the model needs per byte of held-out stories; gap: how far that is above the
entropy of the world, which no model can beat; consistency: share of stories ended right ("So now
the blue kite" -> " is with Vera, by the river."); valid: share of 200 stories, written from nothing
at temperature 0.5, that the world could have told; answers: share of questions about a story
answered right; unknown: share of those that the story leaves open, answered "I don't know";
harbour: answers in another region; requests: share of 200 stories, told on request, that have all
that was asked for; wins: how often its answer is better than that of the chat model (ties count
half). The first row: the entropy, what the world itself writes (all of it is valid), and a guess
among what the story names."""


@functools.cache
def trials(setting: Setting = PLAIN, n: int = 500) -> tuple[list[Story], Asked, Asked]:
    """What every stage is scored on.

    n held-out stories, n questions about others in the valley, and n in the harbour.
    """
    stories = World(setting=setting).stories(n, "heldout")
    return stories, exams(n, setting=setting), exams(n, region=HARBOUR, setting=setting)


def bounds(setting: Setting = PLAIN) -> tuple[float, Row]:
    """The lowest possible bits per byte, and the first row of the scorecard.

    That row has this bound, the share of valid stories of the world itself (all of them), and what
    guessing scores.
    """
    stories, valley, harbour = trials(setting)
    size = sum(len(s.text.encode()) for s in stories)
    floor = sum(-s.logp for s in stories) / math.log(2) / size
    row = {
        "stage": "(bounds)",
        "bits/byte": floor,
        "gap": 0.0,
        "consistency": chance(stories),
        "valid": 1.0,
        "answers": statistics.mean(1 / q.candidates for _, q in valley),
        "unknown": statistics.mean(1 / q.candidates for _, q in valley if q.value is None),
        "harbour": statistics.mean(1 / q.candidates for _, q in harbour),
        "requests": None,
        "wins": 0.5,
        "MB": None,
        "tokens/s": None,
    }
    return floor, row


def score(name: str, model: nn.Module, tokenizer: Tokenizer, chat: nn.Module | None = None,
          setting: Setting = PLAIN) -> Row:
    """One row of the scorecard: numbers, which table() formats.

    chat: the model to win against (None: no wins are counted); setting: that of the stories that
    the model learned from.
    """
    stories, valley, harbour = trials(setting)
    bpb = bits_per_byte(model, [s.text for s in stories], tokenizer)
    fast = FastDecoder(model)
    right = grades(fast, tokenizer, valley)
    wanted = instructions(200, setting=setting)
    told = zip(tell(fast, tokenizer, wanted), wanted)
    return {
        "stage": name,
        "bits/byte": bpb,
        "gap": bpb / bounds(setting)[0] - 1,
        "consistency": consistency(model, stories, tokenizer),
        "valid": validity(fast, tokenizer, setting=setting),
        "answers": statistics.mean(right),
        "unknown": statistics.mean(r for r, (_, q) in zip(right, valley) if q.value is None),
        "harbour": accuracy(fast, tokenizer, harbour),
        "requests": statistics.mean(all(follows(text, words, setting).values())
                                    for text, (_, words) in told),
        "wins": win_rate(fast, FastDecoder(chat), tokenizer, valley)[0] if chat else None,
        "MB": size_mb(model),
        "tokens/s": speed(fast, tokenizer),
    }


def cell(column: str, value: str | float | None) -> str:
    """A value of a row as the scorecard shows it; text stays as it is."""
    if value is None:
        return ""
    return value if isinstance(value, str) else format(value, FORMATS.get(column, ".1%"))


def table(rows: Sequence[Row]) -> str:
    """Rows (dicts with the same keys) as text in columns."""
    lines = [list(rows[0])] + [[cell(*item) for item in row.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(text.rjust(w) for text, w in zip(line, widths)) for line in lines)
