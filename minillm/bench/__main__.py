"""Time our code beside that of others, in turns in one run, and print ratios of medians: `python -m minillm.bench train`, `generate`,
`quantize` or `tokenize FILE`. `memory` predicts what memory and time training takes on which GPU."""
import argparse
from functools import partial
from pathlib import Path

from minillm.bench.arguments import CHECKOUTS, Refused, check
from minillm.bench.generation import TALKERS, generate, quantize
from minillm.bench.memory import report
from minillm.bench.timing import plot
from minillm.bench.tokenizers import tokenize
from minillm.bench.training import GPU_SHAPES, SHAPES, train


def parser():
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)       # what is not said again stays as it was
    common.add_argument("--rounds", type=int, metavar="N", help="timed runs of each contender (default 10)")
    common.add_argument("--peers", type=Path, metavar="FOLDER", help=f"folder with checkouts of others: {', '.join(CHECKOUTS)}")
    common.add_argument("--plot", type=Path, metavar="FILE.png", help="save a figure of the ratios there, too")
    p = argparse.ArgumentParser(prog="python -m minillm.bench", description=__doc__, parents=[common])
    what = p.add_subparsers(dest="what", required=True)
    for work, shapes in ((train, [*SHAPES, *GPU_SHAPES]), (generate, TALKERS), (quantize, TALKERS), (tokenize, ())):
        q = what.add_parser(work.__name__, help=work.__doc__.split("\n\n")[0], description=work.__doc__.split("\n\n")[0], parents=[common])
        if shapes:
            q.add_argument("--shapes", nargs="+", metavar="SHAPE", default=None, help=f"which: of {', '.join(shapes)}")
        else:
            q.add_argument("file", type=Path, help="a text in UTF-8, of 1 MB or more")
        if work is train:
            q.add_argument("--compile", action="store_true", help="on a CPU: our step compiled, too (takes a minute a shape)")
        q.set_defaults(work=work)
    said = "what memory and time training takes on which GPU, predicted"
    what.add_parser("memory", help=said, description=said)
    return p


def main(arguments=None):
    p = parser()
    o = p.parse_args(arguments)
    if o.what == "memory":
        if len(vars(o)) > 1:
            p.error("memory is predicted, not timed: it takes no options")
        return report()
    settings = {"rounds": getattr(o, "rounds", 10), "peers": getattr(o, "peers", None), "show": partial(print, flush=True)}
    picture = getattr(o, "plot", None)
    if o.what == "tokenize":
        settings["file"] = o.file
    else:
        settings["shapes"] = o.shapes
    if o.what == "train":
        settings["compiling"] = o.compile
    try:
        check(picture=picture)
        tables = o.work(**settings)
    except Refused as error:
        p.error(str(error))
    if picture:
        plot(tables, picture)
        print(f"\nsaved {picture}")


if __name__ == "__main__":
    main()
