"""What the notebook on data cannot show: downloads that fail, and files that are not text."""
import hashlib
import os
import random
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from minillm.data import ENDOFTEXT
from minillm.storage.text_files import (CORPORA, cache_folder, corpus, download, read_documents,
                                        stream_documents)

# ---- downloads

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, start = self.server, 0
        server.ranges.append(self.headers.get("Range"))
        if server.honours_ranges and self.headers.get("Range"):
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if self.path != "/file" or start >= len(CONTENT):
            self.send_error(416 if self.path == "/file" else 404)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        end = start + server.cuts.pop(0) if server.cuts else len(CONTENT)
        self.wfile.write(CONTENT[start:end])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.ranges, server.cuts, server.honours_ranges = [], [], True
        server.url = f"http://127.0.0.1:{server.server_port}/file"
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_download(server, tmp_path, capsys):
    path = download(server.url, tmp_path / "new" / "file.bin", SHA256)
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]
    out, err = capsys.readouterr()
    assert "100%" in out and not err
    assert download(server.url, path, SHA256) == path
    assert server.ranges == [None], "asked for what it had"


def test_interrupted_download_goes_on(server, tmp_path):
    server.cuts = [100_000, 50_000]
    path = tmp_path / "file.bin"
    for have in 100_000, 150_000:
        with pytest.raises(OSError, match=f"after {have:,} of 300,000 bytes.*Call again"):
            download(server.url, path, SHA256)
        assert not path.exists() and (tmp_path / "file.bin.part").stat().st_size == have
    download(server.url, path, SHA256)
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100000-", "bytes=150000-"]


def test_server_without_ranges_starts_over(server, tmp_path):
    server.cuts, server.honours_ranges = [100_000], False
    with pytest.raises(OSError):
        download(server.url, tmp_path / "file.bin", SHA256)
    assert download(server.url, tmp_path / "file.bin", SHA256).read_bytes() == CONTENT


def test_part_that_is_whole_needs_nothing_more(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    assert download(server.url, tmp_path / "file.bin", SHA256).read_bytes() == CONTENT


@pytest.mark.parametrize("start", [b"", b"x" * 1000, b"x" * 400_000])
def test_wrong_checksum_leaves_nothing(server, tmp_path, start):
    if start:
        (tmp_path / "file.bin.part").write_bytes(start)
    with pytest.raises(ValueError, match="has the checksum"):
        download(server.url, tmp_path / "file.bin", SHA256 if start else "0" * 64)
    assert not any(tmp_path.iterdir())
    assert download(server.url, tmp_path / "file.bin", SHA256).read_bytes() == CONTENT


def test_download_spares_a_file_of_other_content(server, tmp_path):
    (tmp_path / "mine.txt").write_text("my own text")
    with pytest.raises(ValueError, match="mine.txt is not what"):
        download(server.url, tmp_path / "mine.txt", SHA256)
    assert (tmp_path / "mine.txt").read_text() == "my own text" and not server.ranges


def test_missing_page_and_missing_server(server, tmp_path):
    with pytest.raises(OSError, match="404"):
        download(server.url + "x", tmp_path / "file.bin", SHA256)
    server.shutdown()
    server.server_close()
    with pytest.raises(OSError, match="refused"):
        download(server.url, tmp_path / "file.bin", SHA256)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["file/below.bin", "folder.bin"])
def test_a_place_that_cannot_be_written_is_named(server, tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "folder.bin.part").mkdir()
    with pytest.raises(OSError, match="cannot be written .*MINILLM_CACHE") as refused:
        download(server.url, tmp_path / place, SHA256)
    assert str(tmp_path / place.split("/")[0]) in str(refused.value)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no file that is always full here")
def test_a_disk_that_gets_full_during_a_download_is_named(server, tmp_path):
    (tmp_path / "file.bin.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left.*Call again") as refused:
        download(server.url, tmp_path / "file.bin", SHA256)
    assert str(tmp_path / "file.bin.part") in str(refused.value)


def test_corpus(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="no corpus is called 'tinyshakespear'.*tinyshakespeare"):
        corpus("tinyshakespear")
    text = ("Once upon a time. " * 100).encode()
    monkeypatch.setitem(CORPORA, "tales", (server.url, hashlib.sha256(text).hexdigest(), len(text)))
    (tmp_path / "tales.txt").write_bytes(text)
    assert corpus("tales") == tmp_path / "tales.txt"
    assert read_documents("tales") == [(str(tmp_path / "tales.txt"), text.decode())]


def test_table_of_corpora():
    for name, (url, sha256, size) in CORPORA.items():
        assert url.startswith("https://") and size > 0, name
        assert len(sha256) == 64 and int(sha256, 16), name


# ---- files of text

TOO_FEW = r"5 characters \(white space not counted\) are too few to learn from, at least 1000"


@pytest.mark.parametrize("content, message", [
    (b"", "is empty"), (b" \n\t\r\n", "is empty"), ("\u00a0\u2003".encode(), "is empty"),
    (b"short", TOO_FEW),
    (b"a" * 2000 + b"\0" + b"a" * 2000, "byte 2000 is NUL"),
    (b"a" * (2**20 + 5) + b"\0", "byte 1048581 is NUL"),
    ("abc".encode("utf-16"), "NUL"),
    (b"a" * 3000 + b"\xe9t\xe9", "byte 3000 is 0xe9"),
    (b"a" * (2**20 - 1) + "é".encode() + b"\xff", "byte 1048577 is 0xff"),
    (b"a" * (2**20 - 1) + b"\xc3x", "byte 1048575 is 0xc3"),
    (b"a" * 2000 + b"\xe2\x82", "byte 2000 is 0xe2"),
    (b"a" * 2000 + b"\xed\xa0\x80", "byte 2000 is 0xed"),
])
def test_bad_file_is_refused(tmp_path, content, message):
    (tmp_path / "bad.txt").write_bytes(content)
    paths = [tmp_path / "bad.txt"]
    if len(content) != 5:
        (tmp_path / "good.txt").write_text("word " * 1000)
        paths.insert(0, tmp_path / "good.txt")
    with pytest.raises(ValueError, match=message) as error:
        read_documents(paths)
    assert "bad.txt" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name, message", [
    ("gone.txt", "gone.txt cannot be read: No such file"),
    ("", "is a folder"),
])
def test_missing_file_and_folder(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path / name)


def test_no_file():
    with pytest.raises(ValueError, match="no file: 0 characters"):
        read_documents([])


def test_documents_of_several_files(tmp_path):
    first = "\ufefféé\r\n".encode() * 500
    (tmp_path / "a.txt").write_bytes(first + b"<|endoftext|>\n<|endoftext|>last")
    (tmp_path / "b.txt").write_text("你" * 2**20 + "好")
    got = read_documents([str(tmp_path / "a.txt"), tmp_path / "b.txt"])
    lengths = [(name[-5:], len(text)) for name, text in got]
    assert lengths == [("a.txt", 2500), ("a.txt", 4), ("b.txt", 2**20 + 1)]


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="no pipes with a path here")
def test_a_pipe_is_read_once():
    """As a shell hands <(zcat book.gz) over. A second look would find it empty."""
    end, begin = os.pipe()
    os.write(begin, ("word " * 1000 + ENDOFTEXT + "last").encode())
    os.close(begin)
    documents = read_documents(f"/dev/fd/{end}")
    os.close(end)
    assert [len(text) for _, text in documents] == [5000, 4]


def test_a_tilde_in_the_cache_is_the_home_folder(monkeypatch):
    """A file of settings hands it over as it is; only a shell would expand it."""
    monkeypatch.setenv("MINILLM_CACHE", "~/models")
    assert cache_folder() == Path.home() / "models"


@pytest.mark.skipif(os.name == "nt", reason="Windows knows no passwd")
@pytest.mark.parametrize("cache", [None, "~/models"])
def test_a_user_without_a_home_is_told_what_to_set(monkeypatch, cache):
    """A container that runs under a number."""
    import pwd

    def nobody(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")
    for name in "HOME", "XDG_CACHE_HOME", "MINILLM_CACHE":
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    if cache:
        monkeypatch.setenv("MINILLM_CACHE", cache)
    with pytest.raises(ValueError, match="MINILLM_CACHE"):
        cache_folder()


def test_stream_documents_cuts_like_split(tmp_path):
    rng, path = random.Random(0), tmp_path / "x.txt"
    parts = ["a", "é", "\n", "\r\n", "\r", ENDOFTEXT, "<|endof", "text|>", " "]
    for _ in range(200):
        text = "".join(rng.choices(parts, k=rng.randrange(20)))
        path.write_bytes(text.encode())
        assert [*stream_documents(path)] == text.split(ENDOFTEXT)
