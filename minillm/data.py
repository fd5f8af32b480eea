# Text for training: read, clean, deduplicate, filter, split, pack, and stream from disk.
import hashlib
import json
import os
import re
import sys
import unicodedata
import urllib.error
import urllib.request
import zlib
from codecs import getincrementaldecoder
from collections import defaultdict
from http.client import HTTPException
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ENDOFTEXT = "<|endoftext|>"     # stands before the first document and after each
IGNORE = -100                   # the target of a position that does not count, torch's default ignore_index


def fetch(url, part):
    "Adds to the file `part` what it lacks of `url`; starts over where the server cannot send a range. Raises OSError if cut off."
    have = part.stat().st_size if part.exists() else 0
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {}), timeout=30)
    except urllib.error.HTTPError as e:
        if e.code == 416:       # nothing lies beyond what we have: the checksum will tell whether it is right
            return
        raise
    have = have if response.status == 206 else 0
    total = have + int(response.headers.get("Content-Length", 0))
    with response, part.open("ab" if have else "wb") as file, tqdm(
            initial=have, total=total or None, unit="B", unit_scale=True, ncols=90, desc=part.stem, file=sys.stdout) as bar:
        while block := response.read(2**16):
            file.write(block)
            bar.update(len(block))
    if part.stat().st_size < total:
        raise OSError(f"the connection ended after {part.stat().st_size:,} of {total:,} bytes")


def file_sha256(path):
    "SHA-256 of a file, in hexadecimal."
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url, path, sha256):
    """Brings `url` to `path`, with a progress bar, unless it is there. What was interrupted goes on at the next call.

    Raises OSError if the connection fails (what came is kept in path.part), ValueError if the content has another checksum."""
    path, part = Path(path), Path(f"{path}.part")
    if path.exists():
        if file_sha256(path) != sha256:
            raise ValueError(f"{path} is not what {url} should be: rename or delete it, then call again")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        fetch(url, part)
    except (OSError, HTTPException) as e:
        raise OSError(f"{url}: {e or type(e).__name__}. What has come is kept: call again to go on") from None
    if (found := file_sha256(part)) != sha256:
        part.unlink()
        raise ValueError(f"{url} has checksum {found} instead of {sha256}: it was changed or damaged on the way, and is deleted")
    os.replace(part, path)
    return path


CORPORA = {     # name: address, SHA-256, bytes
    "tinyshakespeare": ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed", 1_115_394),
}


def corpus(name, folder=None):
    "The path of a corpus of `CORPORA`, downloaded at the first call into `folder` (the cache folder of the course, if None)."
    if name not in CORPORA:
        raise ValueError(f"no corpus is called {name!r}: there is {', '.join(CORPORA)}, or give the path of a text file")
    url, sha256, _ = CORPORA[name]
    return download(url, Path(folder or os.environ.get("MINILLM_CACHE") or "~/.cache/minillm").expanduser() / f"{name}.txt", sha256)


def count_characters(path):
    "Characters of a UTF-8 file, white space left out; reads in blocks. Raises ValueError if it is missing, a folder or no text."
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the text files in it")
    decoder, characters, offset, block = getincrementaldecoder("utf-8")(), 0, 0, b"-"
    try:
        with path.open("rb") as file:
            while block:
                block, pending = file.read(2**20), len(decoder.getstate()[0])
                if (at := block.find(0)) >= 0:
                    raise ValueError(f"{path} is not text: byte {offset + at} is NUL (a binary file, or UTF-16?)")
                characters += len("".join(decoder.decode(block, final=not block).split()))
                offset += len(block)
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8: byte {offset - pending + e.start} is 0x{e.object[e.start]:02x}, {e.reason}") from None
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e.strerror}") from None
    return characters


def stream_documents(path):
    "Yields the documents of a text file, which `<|endoftext|>` separates; only one of them is in memory at a time."
    lines = []
    with Path(path).open(encoding="utf-8", newline="") as file:
        for line in file:
            *ends, line = line.split(ENDOFTEXT)
            for end in ends:
                yield "".join([*lines, end])
                lines = []
            lines.append(line)
    yield "".join(lines)


def read_documents(paths, least=1000):
    """The documents of text files as a list of (path, text). A path may also be the name of one of `CORPORA`.

    All files are checked before the first is read. Raises ValueError if one is missing, a folder, empty or not UTF-8 text, or if
    all together have fewer than `least` characters."""
    paths = [corpus(p) if p in CORPORA else Path(p) for p in ([paths] if isinstance(paths, (str, Path)) else paths)]
    counts = {path: count_characters(path) for path in paths}
    for path, n in counts.items():
        if n == 0:
            raise ValueError(f"{path} is empty")
    if (n := sum(counts.values())) < least:
        raise ValueError(f"{', '.join(map(str, paths)) or 'no file'}: {n} characters are too few to learn from, at least {least} are needed")
    return [(str(path), text) for path in paths for text in stream_documents(path) if text.strip()]


def clean(text):
    "`text` in Unicode's form NFC, with line ends \\n and without control characters, zero-width spaces and spaces at line ends."
    text = re.sub("\r\n?|[\x85\u2028\u2029]", "\n", unicodedata.normalize("NFC", text))
    text = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\ufeff]", "", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[^\S\n]+\n", "\n", text)).strip()


def duplicates(texts):
    "{i: j}: text i says the same as the earlier text j, but for case and white space."
    first, found = {}, {}
    for i, text in enumerate(texts):
        digest = hashlib.sha256(" ".join(text.casefold().split()).encode()).digest()
        if (j := first.setdefault(digest, i)) != i:
            found[i] = j
    return found


def shingles(text, n=5):
    "The runs of `n` words (Chinese: characters) in `text`, as a set of 32-bit hashes; case and punctuation do not count."
    words = re.findall(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+", text.casefold())
    return {zlib.crc32(" ".join(words[i:i + n]).encode()) for i in range(max(1, len(words) - n + 1))}


def near_duplicates(texts, threshold=0.7, bands=32, rows=4):
    """{i: j}: texts i and j < i share about `threshold` or more of their shingles (Jaccard similarity).

    MinHash (Broder 1997) with bands * rows hash functions; only texts that agree in all rows of a band are compared."""
    a, b = np.random.default_rng(0).integers(0, 2**64, (2, bands * rows, 1), dtype=np.uint64)
    signatures, buckets, found = [], defaultdict(list), {}
    for i, text in enumerate(texts):
        x = np.array([*shingles(text)], dtype=np.uint64)
        signatures.append(((a | 1) * x + b >> 32).min(axis=1))
        keys = [(k, part.tobytes()) for k, part in enumerate(signatures[i].reshape(bands, rows))]
        candidates = sorted({j for key in keys for j in buckets[key]})
        similar = [j for j in candidates if (signatures[j] == signatures[i]).mean() >= threshold]
        if similar:
            found[i] = similar[0]
        for key in [] if similar else keys:
            buckets[key].append(i)
    return found


def quality(text):
    "What speaks against `text` as training data, a list of str: rules of Gopher (Rae et al. 2021, A.1) and C4 (Raffel et al. 2020)."
    words, lines = text.split(), [line for line in text.splitlines() if line.strip()]
    if not words:
        return ["empty"]
    common = {"the", "be", "to", "of", "and", "that", "have", "with"} & set(text.lower().split())
    measures = {"words": (len(words), 50, 100_000),
                "letters per word": (sum(map(len, words)) / len(words), 3, 10),
                "share of words with a letter": (sum(any(map(str.isalpha, w)) for w in words) / len(words), 0.8, 1),
                "different common words": (len(common), 2, 8),
                "# and ... per word": (sum(text.count(s) for s in ("#", "...", "…")) / len(words), 0, 0.1),
                "share of repeated lines": (1 - len(set(lines)) / len(lines), 0, 0.3),
                "curly brackets": (text.count("{"), 0, 0)}
    return [f"{name}: {value:.3g}, outside {low} to {high}" for name, (value, low, high) in measures.items() if not low <= value <= high]


def overlap(text, seen, n=8):
    "The share of the n-word shingles of `text` that are in the set `seen`."
    own = shingles(text, n)
    return len(own & seen) / len(own)


def split_documents(documents, share=0.1):
    """Two lists of (name, text): for training, and held out. The last `share` (by characters) of each name is held out.

    Whole documents, unless one is itself longer than the share: that is cut at the end of a line."""
    train, heldout = [], []
    for name, group in groupby(documents, key=lambda document: document[0]):
        texts = [text for _, text in group]
        total, start = sum(map(len, texts)), 0
        for text in texts:
            room = round((1 - share) * total) - start
            if room >= len(text):
                train.append((name, text))
            elif room <= 0 or len(text) <= share * total:
                heldout.append((name, text))
            else:
                at = max(text.rfind("\n", 0, room), 0) or max(text.rfind(" ", 0, room), 0) or room
                train.append((name, text[:at]))
                heldout.append((name, text[at:].lstrip()))
            start += len(text)
    return train, heldout


def encode_document(text, tokenizer):
    "Ids of `text` between two <|endoftext|>. A <|endoftext|> within the text is ordinary text."
    if ENDOFTEXT not in tokenizer.special_tokens:
        raise ValueError(f"the tokenizer lacks the special token {ENDOFTEXT}: train it with special_tokens=({ENDOFTEXT!r},)")
    end = tokenizer.special_tokens[ENDOFTEXT]
    return [end, *tokenizer.encode(text, disallowed_special=()), end]


class Rows:
    """Batches of whole documents, one a row, filled up at the right with targets of IGNORE.

    documents: lists of token ids, each with its own start and end token. rows[i] -> inputs, targets, int64 (b, t): batch i of an
    endless sequence that goes through all documents, in another order each epoch, and depends on the seed only, so that i
    is all there is to know to resume. Documents of like length share a batch, so that little is filled up.
    """
    def __init__(self, documents, batch_size, seed=0):
        if len(documents) < batch_size:
            raise ValueError(f"batch_size={batch_size} is more than the {len(documents)} documents")
        if short := [i for i, document in enumerate(documents) if len(document) < 2]:
            raise ValueError(f"document {short[0]} has {len(documents[short[0]])} token(s): it takes 2 to have a target")
        self.documents, self.batch_size, self.seed, self.epoch = documents, batch_size, seed, None

    def plan(self, epoch):
        "The batches of an epoch: shuffle, sort by length within pools of 32 batches, cut, shuffle the batches."
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, epoch))
            order, size = rng.permutation(len(self.documents)), self.batch_size
            pools = [order[i:i + 32 * size] for i in range(0, len(order), 32 * size)]
            pools = [sorted(pool, key=lambda j: len(self.documents[j])) for pool in pools]
            batches = [pool[i:i + size] for pool in pools for i in range(0, len(pool) - size + 1, size)]
            self.epoch, self.batches = epoch, [batches[i] for i in rng.permutation(len(batches))]
        return self.batches

    def __getitem__(self, i):
        n = len(self.plan(self.epoch or 0))
        rows = [self.documents[j] for j in self.plan(i // n)[i % n]]
        ids = torch.full((len(rows), max(map(len, rows))), IGNORE)
        for row, document in zip(ids, rows):
            row[:len(document)] = torch.tensor(document)
        return ids[:, :-1].clamp(min=0), ids[:, 1:]


class Windows:
    """Batches of random windows of one long array of token ids (a memmap, where it is larger than memory).

    windows[i] -> inputs, targets, int64 (batch_size, length); depends on the seed and i only.
    """
    def __init__(self, ids, batch_size, length, seed=0):
        if len(ids) <= length:
            raise ValueError(f"a window of {length} tokens needs more than the {len(ids)} tokens there are")
        self.ids, self.batch_size, self.length, self.seed = ids, batch_size, length, seed

    def __getitem__(self, i):
        starts = np.random.default_rng((self.seed, i)).integers(0, len(self.ids) - self.length, self.batch_size)
        ids = torch.from_numpy(np.stack([self.ids[s:s + self.length + 1] for s in starts]).astype(np.int64))
        return ids[:, :-1], ids[:, 1:]


def check_batch(inputs, targets, vocab_size):
    "Raises TypeError or ValueError unless both are int64 (b, t), with ids below `vocab_size`, and some target counts."
    for name, ids, low in ("inputs", inputs, 0), ("targets", targets, IGNORE):
        if not isinstance(ids, torch.Tensor) or ids.dtype != torch.int64:
            raise TypeError(f"{name} must be an int64 tensor, got {getattr(ids, 'dtype', type(ids).__name__)}")
        if ids.ndim != 2 or ids.numel() == 0:
            raise ValueError(f"{name} must have the shape (batch, time), both at least 1, got {tuple(ids.shape)}")
        wrong = ids[((ids < 0) & (ids != low)) | (ids >= vocab_size)]
        if len(wrong):
            raise ValueError(f"{name} hold the id {wrong[0]}: the vocabulary has the ids 0 to {vocab_size - 1}. Another tokenizer?")
    if inputs.shape != targets.shape:
        raise ValueError(f"inputs {tuple(inputs.shape)} and targets {tuple(targets.shape)} must have one shape")
    if (targets == IGNORE).all():
        raise ValueError(f"every target is {IGNORE}, so the loss would be 0 / 0")


HEADER = 256        # bytes before the ids: JSON that says what they are


def fingerprint(tokenizer):
    "A number that differs between tokenizers."
    return zlib.crc32(repr((sorted(tokenizer.vocab.items()), tokenizer.pattern)).encode())


def write_tokens(path, documents, tokenizer):
    """Encodes `documents` (an iterable of str), one at a time, into a file for `read_tokens`; returns the number of tokens.

    The file appears under its name when it is whole. uint16, or uint32 from 65,536 tokens in the vocabulary on."""
    path, dtype, crc, n = Path(path), "<u2" if tokenizer.n_vocab < 2**16 else "<u4", 0, 0
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(bytes(HEADER))
            for text in documents:
                ids = np.array(encode_document(text, tokenizer)[n > 0:], dtype)     # one <|endoftext|> between two documents
                crc, n = zlib.crc32(ids, crc), n + len(ids)
                file.write(ids)
            if n == 0:
                raise ValueError(f"no document to write to {path}")
            header = {"minillm": "tokens", "dtype": dtype, "tokens": n, "crc32": crc, "tokenizer": fingerprint(tokenizer)}
            file.seek(0)
            file.write(json.dumps(header).ljust(HEADER).encode())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return n


def read_tokens(path, tokenizer=None):
    """The ids in a file of `write_tokens` as an array that stays on disk (memmap).

    Raises ValueError if the file is damaged or of another kind, or was written with another tokenizer than `tokenizer`."""
    try:
        with open(path, "rb") as file:
            header, crc = json.loads(file.read(HEADER)), 0
            ids = np.memmap(path, header["dtype"], "r", HEADER, header["tokens"])
            while block := file.read(2**20):
                crc = zlib.crc32(block, crc)
        if crc != header["crc32"]:
            raise ValueError("the checksum does not fit the content")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is damaged or no file of write_tokens ({e}): write it again") from None
    if tokenizer and header["tokenizer"] != fingerprint(tokenizer):
        raise ValueError(f"{path} was written with another tokenizer: write it again with this one")
    return ids
