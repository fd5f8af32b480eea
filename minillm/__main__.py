"""Train a LLaMA on the story world, or on your own text, and show what it learnt."""
import argparse
import sys

from minillm import recipes, scorecard


def report(stage, own_text):
    """What the model writes, and its row of the scorecard."""
    print(f"After training it writes:\n{recipes.samples(stage.model, stage.tokenizer, 3 if own_text else 10)}\n")
    if own_text:
        bpb = scorecard.bits_per_byte(stage.model, stage.heldout, stage.tokenizer)
        print(f"Held-out text: {bpb:.4f} bits per byte")
    else:
        print(scorecard.table([scorecard.score("base", stage.model, stage.tokenizer, recipes.heldout_stories())]))
        print(scorecard.LEGEND)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m minillm", description=__doc__, epilog="Finished stages are kept in the user's "
                                     "cache folder, or in the one that MINILLM_CACHE names. Ctrl-C keeps a checkpoint: the same command goes on.")
    parser.add_argument("--text", nargs="+", metavar="FILE", help="learn from these UTF-8 text files instead of the story world")
    options = parser.parse_args(arguments)
    try:
        report(recipes.from_files(options.text) if options.text else recipes.base(), options.text)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from the last checkpoint.")
        return 130
    except ValueError as error:
        print(f"minillm: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
