"""Time our code beside that of others, in turns in one run, and print ratios of medians.

`python -m minillm.bench train`, `generate`, `quantize` or `tokenize FILE`; `memory` predicts how
much memory and time training takes on which GPU. `stages` trains every stage of the course's model
with several seeds, and prints how far their scores spread.
"""
import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from minillm.serving import terminal

if __name__ == "__main__":
    terminal.starting()

from minillm.arc import sizes
from minillm.bench.arguments import CHECKOUTS, Refused, check
from minillm.bench.generation import TALKERS, generate, quantize
from minillm.bench.stages import stages
from minillm.bench.timing import plot
from minillm.bench.tokenizers import tokenize
from minillm.bench.training import GPU_SHAPES, SHAPES, train


def parser() -> argparse.ArgumentParser:
    """The command line."""
    # SUPPRESS: otherwise, the defaults after the command would replace options given before it.
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--rounds", type=int, metavar="N",
                        help="timed runs of each contender (default 10)")
    common.add_argument("--peers", type=Path, metavar="FOLDER",
                        help=f"folder with checkouts of others: {', '.join(CHECKOUTS)}")
    common.add_argument("--plot", type=Path, metavar="FILE.png",
                        help="also save a figure of the ratios")
    p = argparse.ArgumentParser(prog="python -m minillm.bench", description=__doc__,
                                parents=[common])
    what = p.add_subparsers(dest="what", required=True)
    known = {train: [*SHAPES, *GPU_SHAPES], generate: TALKERS, quantize: TALKERS, tokenize: ()}
    for work, shapes in known.items():
        said = work.__doc__.split("\n\n")[0]
        q = what.add_parser(work.__name__, help=said, description=said, parents=[common])
        if shapes:
            q.add_argument("--shapes", nargs="+", metavar="SHAPE", default=None,
                           help=f"which to measure, of {', '.join(shapes)}")
        else:
            q.add_argument("file", type=Path, help="a UTF-8 text file of 1 MB or more")
        if work is train:
            q.add_argument("--compile", action="store_true",
                           help="on a CPU: also our step compiled (a minute per shape)")
        q.set_defaults(work=work)
    said = stages.__doc__.split("\n\n")[0]
    q = what.add_parser("stages", help=said, description=said)
    q.add_argument("--seeds", type=int, metavar="N", default=8,
                   help="number of seeds (default 8)")
    q.add_argument("--save", action="store_true",
                   help="keep the ranges: python -m minillm compares each run with them")
    said = "how much memory and time training takes on which GPU, predicted"
    what.add_parser("memory", help=said, description=said)
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    """The command. What cannot be measured ends it with a sentence on stderr and exit status 2."""
    terminal.ready()
    p = parser()
    try:
        with terminal.gone_readers():
            run(p, arguments)
    except KeyboardInterrupt:
        p.exit(130, "\nStopped.\n")


def run(p: argparse.ArgumentParser, arguments: Sequence[str] | None) -> None:
    """Do what the command line asks for."""
    options = p.parse_args(arguments)

    def refuse(error):
        p.exit(2, f"{p.prog}: error: {error}\n")

    try:
        sizes.chosen()
    except ValueError as error:                      # MINILLM_SIZE names no size
        refuse(error)
    if options.what == "memory":
        if len(vars(options)) > 1:
            refuse("memory is predicted, not timed: it takes no options")
        from minillm.bench.memory import report      # reads MINILLM_SIZE, which is right by now
        return report()
    if options.what == "stages":
        if set(vars(options)) > {"what", "seeds", "save"}:
            refuse("stages are trained, not timed: the options are --seeds and --save")
        return train_stages(p, options.seeds, options.save)
    settings = {
        "rounds": getattr(options, "rounds", 10),
        "peers": getattr(options, "peers", None),
        "show": partial(print, flush=True),
    }
    picture = getattr(options, "plot", None)
    if options.what == "tokenize":
        settings["file"] = options.file
    else:
        settings["shapes"] = options.shapes
    if options.what == "train":
        settings["compiling"] = options.compile
    try:
        check(picture=picture)
        tables = options.work(**settings)
    except Refused as error:
        refuse(error)
    if picture:
        plot(tables, picture)
        print(f"\nsaved {picture}")


def train_stages(p: argparse.ArgumentParser, seeds: int, save: bool) -> None:
    """The command stages."""
    try:
        stages(seeds, save, partial(print, flush=True))
    except KeyboardInterrupt:
        p.exit(130, "\nStopped. Finished stages are kept: the same command continues.\n")
    except (ValueError, OSError) as error:           # Refused, or a cache that cannot be written
        p.exit(2, f"{p.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
