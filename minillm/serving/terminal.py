"""What a terminal may do to a command: Ctrl-C while it starts, an old console, no input at all.

It imports nothing heavy, because the commands call it before they import torch, which takes
seconds.
"""
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


def stop_quietly(*_: int | FrameType | None) -> None:
    """What Ctrl-C does until `ready`: end the process with one line. An exception would come out of
    the middle of an import, with dozens of lines, and some libraries swallow it."""
    os.write(2, b"\nStopped.\n")
    os._exit(130)


def starting() -> None:
    """Call it first: from here to `ready`, Ctrl-C is stop_quietly."""
    signal.signal(signal.SIGINT, stop_quietly)


def ready() -> None:
    """Call it where KeyboardInterrupt is handled: from here on, Ctrl-C raises it. Also makes any
    console print any text, with ? for the characters that it cannot show."""
    if signal.getsignal(signal.SIGINT) is stop_quietly:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):        # not in a notebook
            stream.reconfigure(errors="replace")


@contextmanager
def gone_readers() -> Iterator[None]:
    """End the command when nobody reads its output any more (`| head`), with the exit status 141:
    128 + SIGPIPE, which is what a shell reports."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)      # for what is still in the buffer
        sys.exit(141)


def check_input() -> None:
    """Raises ValueError if there is no standard input: in a service, under cron, after <&-."""
    if sys.stdin is None or sys.stdin.closed:
        raise ValueError("there is no standard input to read from: ask one question with --prompt")


def ask(prompt: str = "> ") -> str:
    """A line from the terminal; at the end of the input, an empty one.

    Raises ValueError if it is not text in the terminal's encoding.
    """
    try:
        return input(prompt)
    except EOFError:
        print()
        return ""
    except UnicodeDecodeError as error:
        raise ValueError(f"the input is not {error.encoding}: set your terminal to UTF-8") from None


def check_argument(text: str, name: str) -> None:
    """Raises ValueError unless an argument of the command line is text: bytes in another encoding
    arrive as surrogates."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        encoding = sys.getfilesystemencoding()
        raise ValueError(f"{name} is not {encoding}: set your terminal to UTF-8")
