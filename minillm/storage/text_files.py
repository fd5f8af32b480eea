"""Text files for training: checked, read, and, if they are well-known ones, downloaded once.

Chapter 06 reads its corpora with this module.
"""
import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from http.client import HTTPException
from pathlib import Path

from platformdirs import user_cache_path

from minillm.data import ENDOFTEXT
from minillm.storage.progress import progress_bar

CORPORA = {     # name: address, SHA-256, bytes
    "tinyshakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed", 1_115_394),
}


def cache_folder() -> Path:
    """Where downloads and the stages of the model are kept.

    That is the user's cache folder, or the one that MINILLM_CACHE names (a ~ at its beginning is
    the home folder). Raises ValueError if there is no home folder.
    """
    try:
        return Path(os.environ.get("MINILLM_CACHE") or user_cache_path("minillm")).expanduser()
    except (RuntimeError, KeyError):              # neither HOME nor an entry in passwd
        raise ValueError("the home folder of this user is not known, so there is no place for what "
                         "is kept: name a folder with the environment variable "
                         "MINILLM_CACHE") from None


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, which is read only once, because a pipe (/dev/stdin, or <(...))
    cannot be read again.

    Raises ValueError if it is missing, a folder or not text.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the text files in it")
    try:
        data = path.read_bytes()
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e.strerror}") from None
    if (at := data.find(0)) >= 0:
        raise ValueError(f"{path} is not text: byte {at} is NUL (a binary file, or UTF-16?)")
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8: byte {e.start} is 0x{data[e.start]:02x} "
                         f"({e.reason})") from None


def count_characters(text: str, block: int = 2**20) -> int:
    """How many characters a text has, without whitespace. Block by block, which saves memory."""
    return sum(len("".join(text[i:i + block].split())) for i in range(0, len(text), block))


def stream_documents(path: str | Path) -> Iterator[str]:
    """Yields the documents of a text file, which are separated by `<|endoftext|>`.

    Only one of them is in memory at a time.
    """
    lines = []
    with Path(path).open(encoding="utf-8", newline="") as file:
        for line in file:
            *ends, line = line.split(ENDOFTEXT)
            for end in ends:
                yield "".join([*lines, end])
                lines = []
            lines.append(line)
    yield "".join(lines)


def fetch(url: str, part: Path) -> None:
    """Appends to the file `part` the rest of `url`; starts over if the server sends no ranges.

    Raises OSError if the connection is cut off.
    """
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as e:
        # there is nothing after what we have: the checksum will tell whether it is right
        if e.code == 416:
            return
        raise
    have = have if response.status == 206 else 0
    total = have + int(response.headers.get("Content-Length", 0))
    with response, part.open("ab" if have else "wb") as file:
        with progress_bar(desc=part.stem, initial=have, total=total or None, unit="B",
                          unit_scale=True) as bar:
            while block := response.read(2**16):
                file.write(block)
                bar.update(len(block))
    if part.stat().st_size < total:
        raise OSError(f"the connection ended after {part.stat().st_size:,} of {total:,} bytes")


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url: str, path: str | Path, sha256: str) -> Path:
    """Downloads `url` to `path`, with a progress bar, unless it is there; returns the path.

    An interrupted download continues at the next call. Raises OSError if the connection fails or
    the file cannot be written (path.part keeps what came), ValueError if the content has a
    different checksum.
    """
    path, part = Path(path), Path(f"{path}.part")
    if path.exists():
        if file_sha256(path) != sha256:
            raise ValueError(f"{path} is not what {url} should be: "
                             "rename or delete it, then call again")
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fetch(url, part)
    except (OSError, HTTPException) as e:
        place = getattr(e, "filename", None)         # urllib's errors have their address here
        if isinstance(place, (str, Path)) and place != url:
            raise OSError(f"{place} cannot be written ({e.strerror}): make its folder writable, or "
                          "name another one (MINILLM_CACHE says where downloads go)") from None
        raise OSError(f"{url}: {str(e) or type(e).__name__}. Call again to continue from where it "
                      f"stopped ({part} has what came)") from None
    if (found := file_sha256(part)) != sha256:
        part.unlink()
        raise ValueError(f"{url} has the checksum {found} instead of {sha256}: "
                         "it was changed or damaged, so it has been deleted")
    os.replace(part, path)
    return path


def corpus(name: str, folder: str | Path | None = None) -> Path:
    """The path of a corpus of `CORPORA`.

    The first call downloads it into `folder` (if None, `cache_folder()`). Raises ValueError for an
    unknown name, and as download does.
    """
    if name not in CORPORA:
        raise ValueError(f"no corpus is called {name!r}: there is {', '.join(CORPORA)}, "
                         "or give the path of a text file")
    url, sha256, _ = CORPORA[name]
    return download(url, Path(folder or cache_folder()) / f"{name}.txt", sha256)


def read_documents(
        paths: str | Path | Iterable[str | Path], least: int = 1000) -> list[tuple[str, str]]:
    """The documents of text files as a list of (path, text).

    A path may also be the name of one of `CORPORA`. Raises ValueError if a file is missing, a
    folder, empty or not UTF-8 text, or if all together have fewer than `least` characters
    (whitespace not counted), and as corpus does.
    """
    if isinstance(paths, (str, Path)):
        paths = [paths]
    paths = [corpus(path) if path in CORPORA else Path(path) for path in paths]
    texts = {path: read_text(path) for path in paths}
    counts = {path: count_characters(text) for path, text in texts.items()}
    for path, n in counts.items():
        if n == 0:
            raise ValueError(f"{path} is empty")
    if (n := sum(counts.values())) < least:
        raise ValueError(f"{', '.join(map(str, paths)) or 'no file'}: {n} characters (white space "
                         f"not counted) are too few to learn from, at least {least} are needed")
    documents = []
    for path in paths:
        documents += [(str(path), text) for text in texts[path].split(ENDOFTEXT) if text.strip()]
    return documents
