"""Files that are replaced whole, and progress bars in terminals and log files."""
import errno
import io
import os
import struct
import subprocess
import sys

import pytest

from minillm.storage import files
from minillm.storage.files import replacing
from minillm.storage.progress import Lines, progress_bar


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    """write() does not know the name of its file."""
    def fsync(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "x.bin"
    path.write_bytes(b"before")
    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left") as refused:
            with replacing(path) as file:
                file.write(b"after")
    assert refused.value.filename == str(path) and refused.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["x.bin"]


@pytest.mark.parametrize("error", [OSError("no number"), FileNotFoundError(2, "gone", "y.bin")])
def test_another_error_within_stays_as_it_is(tmp_path, error):
    with pytest.raises(OSError) as refused:
        with replacing(tmp_path / "x.bin"):
            raise error
    assert refused.value is error


PROGRAM = """
from minillm.storage.progress import progress_bar
with progress_bar(total=30) as bar:
    bar.mininterval = 0
    for i in range(30):
        bar.update()
        bar.set_postfix_str("loss 1.234 (floor 0.345)")
"""


def test_a_log_file_gets_lines(tmp_path):
    with open(tmp_path / "log", "w") as log:
        subprocess.run([sys.executable, "-c", PROGRAM], stdout=log, check=True)
    lines = (tmp_path / "log").read_bytes().decode().splitlines()
    assert all("|" in line and "\r" not in line for line in lines)
    assert "0/30" in lines[0] and "30/30" in lines[-1] and "loss 1.234" in lines[-1]


def test_the_lines_of_a_log_file():
    log = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    lines = Lines(log)
    for text in "\r  0%|   | 0/3", "\r 33%|#  | 1/3   ", "", "\n", "\r100%|###| 3/3", "\n":
        lines.write(text)
    lines.flush()
    assert log.buffer.getvalue().decode().splitlines() == [
        "0%|   | 0/3", "33%|#  | 1/3", "100%|###| 3/3"]


@pytest.mark.parametrize("width", [20, 60, 150])
def test_a_bar_is_never_wider_than_its_terminal(width):
    """A line that is too long goes on in the next one, and each state of the bar adds one more."""
    termios = pytest.importorskip("termios", reason="no terminals of this kind here")
    import fcntl
    import pty
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=child) as process:
        os.close(child)
        shown = b""
        while block := read(parent):
            shown += block
    os.close(parent)
    states = [line for line in shown.decode().replace("\n", "\r").split("\r") if line]
    assert process.returncode == 0 and len(states) > 2
    assert max(map(len, states)) < width and (width < 100 or max(map(len, states)) > 110)


def read(end):
    try:
        return os.read(end, 4096)
    except OSError:                # on Linux, at the end
        return b""


def test_a_notebook_keeps_one_line(monkeypatch):
    """Its output is no file, and understands the way back to the start of a line."""
    class Cell(io.StringIO):
        encoding = "utf-8"

    monkeypatch.setattr(sys, "stdout", Cell())
    with progress_bar(total=2) as bar:
        bar.update(2)
    assert sys.stdout.getvalue().count("\r") >= 1 and sys.stdout.getvalue().count("\n") == 1
