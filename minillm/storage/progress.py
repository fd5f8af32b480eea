"""A progress bar for wherever it is shown: a terminal of any width, a notebook, or a log file."""
import io
import sys
from typing import Any, TextIO

from tqdm import tqdm


class Lines:
    """A log file, in which each state of a progress bar is a line of its own.

    A bar goes back to the start of its line with a carriage return. A file keeps all that was
    written, so the log of a CI service would show it as one endless line.
    """

    def __init__(self, file: TextIO):
        self.file, self.encoding = file, file.encoding

    def write(self, text: str) -> None:
        """Write the state in `text`, if there is one: tqdm also writes bare line ends."""
        if state := text.strip():
            self.file.write(f"{state}\n")

    def flush(self) -> None:
        """Flush the file."""
        self.file.flush()


def progress_bar(**settings: Any) -> tqdm:
    """A tqdm of these settings on stdout.

    In a terminal it is as wide as the terminal is now; elsewhere it reports at most once every ten
    seconds how far it is.
    """
    out = sys.stdout
    if out.isatty():
        return tqdm(file=out, dynamic_ncols=True, mininterval=0.2, **settings)
    is_file = isinstance(out, io.TextIOWrapper)       # and not the output of a cell of a notebook
    return tqdm(file=Lines(out) if is_file else out, ncols=110, mininterval=10, **settings)
