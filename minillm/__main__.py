"""Train a LLaMA on the story world and tune it to talk, or train one on your own text.

Prints what it learned.
"""
import argparse
import sys
import zlib
from contextlib import redirect_stdout
from pathlib import Path

from minillm.serving import terminal

if __name__ == "__main__":
    terminal.starting()

import torch

from minillm.arc import ranges, scorecard, sizes, stages
from minillm.arc.cache import Stage
from minillm.data import ENDOFTEXT
from minillm.data_parallel import joined
from minillm.fast_decode import FastDecoder
from minillm.generate import stream
from minillm.hub import model_card, save_gguf, save_pretrained
from minillm.serving import server
from minillm.sft import answer_room, encode_prompt

ANSWER = 400      # the most tokens of an answer: more than a story has
ABOUT = """# The model of the minillm course

It tells short stories about animals and answers questions about them, in turns marked with
`<|user|>` and `<|assistant|>` (see chat_template.jinja). A program wrote the stories and dialogues
that it was trained on, so they contain nothing that people wrote and no personal data. The chapters
of the course describe the training.

Not for use outside of teaching: it knows nothing but its story world, sometimes answers wrongly,
and has not been made safe in any way."""


def arc() -> None:
    """Build every stage of the course's model, one after another, each with its row of the
    scorecard."""
    base = stages.base()
    print(f"After training it writes:\n{stages.samples(base.model, base.tokenizer, 10)}\n")
    rows = [scorecard.bounds(base.setting)[1],
            scorecard.score("base", base.model, base.tokenizer, setting=base.setting)]
    print(scorecard.table(rows))
    chat = stages.chat()
    for name in "chat", "lora", "rlhf", "dpo", "int8":
        stage = getattr(stages, name)()
        before = None if name == "chat" else chat.model
        rows.append(scorecard.score(name, stage.model, stage.tokenizer, before, base.setting))
        print(scorecard.table(rows))
    print(f"{scorecard.LEGEND}\n\n{ranges.compare(rows[1:], sizes.chosen())}\n\n"
          "Talk to it: python -m minillm chat")


def own_text(paths: list[str]) -> None:
    """Train a base model on the reader's own files, and show what it learned."""
    stage = stages.from_files(paths)
    print(f"After training it writes:\n{stages.samples(stage.model, stage.tokenizer, 3)}\n")
    bits = scorecard.bits_per_byte(stage.model, stage.heldout, stage.tokenizer)
    print(f"Held-out text: {bits:.4f} bits per byte")


def answer(stage: Stage, messages: list[dict[str, str]], seed: int = 0) -> str:
    """Print the answer to a dialogue while it is generated; returns it.

    Raises ValueError if the dialogue leaves no room for an answer.
    """
    ids, text = encode_prompt(messages, stage.tokenizer), ""
    room = min(ANSWER, answer_room(ids, stage.model))
    end = stage.tokenizer.special_tokens[ENDOFTEXT]
    ids = torch.tensor([ids], device=stages.device())
    for piece in stream(FastDecoder(stage.model), stage.tokenizer, ids, room, stop=end,
                        temperature=0.5, seed=seed):
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


def chat(prompt: str | None) -> None:
    """Talk to the tuned model (stage dpo), or answer one prompt. Stages that are missing are built
    first; their progress goes to stderr."""
    if prompt is None:
        terminal.check_input()
    else:
        terminal.check_argument(prompt, "the prompt")
        if not prompt.strip():
            raise ValueError("the prompt is empty")
    with redirect_stdout(sys.stderr):
        stage = stages.dpo()
    if prompt is not None:
        # The prompt is the seed: each has its own story, and the same one each time.
        seed = zlib.crc32(prompt.encode())
        answer(stage, [{"role": "user", "content": prompt}], seed)
        return
    print('Try "Tell a story about a shy alpaca and a kite.", then "Who has the kite?" '
          "An empty line ends the conversation.")
    messages = []
    while line := terminal.ask().strip():
        messages.append({"role": "user", "content": line})
        try:
            reply = answer(stage, messages, seed=len(messages)).strip() or "..."
        except ValueError as error:
            print(f"({error}. The conversation starts over.)")
            messages = []
        else:
            messages.append({"role": "assistant", "content": reply})


def export(folder: str, gguf: str | None = None) -> None:
    """Write the tuned model (stage dpo) to FOLDER as files that transformers can open and, with
    --gguf, as a file for llama.cpp. Stages that are missing are built first."""
    if not folder:
        raise ValueError("the name of the folder is empty")
    folder = Path(folder)
    for path in (folder, *folder.parents):       # report it now, not after minutes of building
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file: name a folder")
    with redirect_stdout(sys.stderr):
        stage = stages.dpo()
    card = model_card(stage.model, ABOUT, "apache-2.0")
    save_pretrained(stage.model, stage.tokenizer, folder, card)
    print(f"{folder}: open it with transformers' AutoModelForCausalLM and AutoTokenizer, "
          "or minillm.hub.from_pretrained")
    if gguf:
        path = folder / f"minillm-{gguf}.gguf"
        save_gguf(stage.model, stage.tokenizer, path, gguf)
        print(f"{path}: open it with llama.cpp")


def serve(host: str, port: int) -> None:
    """Talk to the tuned model (stage dpo) in a browser, or from any program that speaks OpenAI's
    protocol. Stages that are missing are built first."""
    # Listen first: a bad address is reported at once, not after minutes of building.
    listener = server.listen(host, port)
    with redirect_stdout(sys.stderr):
        stage = stages.dpo()
    try:
        server.serve(listener, stage.model, stage.tokenizer, "minillm", host)
    except KeyboardInterrupt:
        print("\nThe server has stopped.")


EPILOG = ("Finished stages are kept in the user's cache folder, or in the one that MINILLM_CACHE "
          "names. Ctrl-C keeps a checkpoint, and the same command continues from there.")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options on the command line. Raises SystemExit for wrong ones, and for --help."""
    parser = argparse.ArgumentParser(prog="python -m minillm", description=__doc__, epilog=EPILOG)
    parser.add_argument("--text", nargs="+", metavar="FILE",
                        help="learn from these UTF-8 text files instead of the story world")
    what = parser.add_subparsers(dest="what", metavar="[chat | export | serve]")

    talking = what.add_parser("chat", help=chat.__doc__)
    talking.add_argument("--prompt", help="answer this prompt on stdout, then exit")

    exporting = what.add_parser("export", help=export.__doc__)
    exporting.add_argument("folder", metavar="FOLDER")
    exporting.add_argument("--gguf", action="store_true",
                           help="also write a GGUF file, minillm-TYPE.gguf, for llama.cpp")
    exporting.add_argument("--type", choices=("f32", "f16", "q8_0"),
                           help="how the GGUF file stores matrices: in 32, 16 or 8.5 bits per "
                                "weight; by default f16")

    serving = what.add_parser("serve", help=serve.__doc__)
    serving.add_argument("--host", default="127.0.0.1",
                         help="address to listen on, by default %(default)s, this machine only; "
                              "there is no password")
    serving.add_argument("--port", type=int, default=8000, help="by default %(default)s")

    options = parser.parse_args(arguments)
    if options.what == "export" and options.type and not options.gguf:
        exporting.error("--type applies only to a GGUF file: add --gguf")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 2 for an error, 130 after Ctrl-C."""
    terminal.ready()
    try:
        options = parse(arguments)
        sizes.chosen()           # an unknown size is refused before any work
        with terminal.gone_readers(), joined():
            if options.what == "chat":
                chat(options.prompt)
            elif options.what == "export":
                export(options.folder, (options.type or "f16") if options.gguf else None)
            elif options.what == "serve":
                serve(options.host, options.port)
            elif options.text:
                own_text(options.text)
            else:
                arc()
    except KeyboardInterrupt as stopped:
        in_training = bool(stopped.args)         # train() raises it with the step
        goes_on = " The same command continues from the last checkpoint." if in_training else ""
        print(f"\nStopped.{goes_on}")
        return 130
    except (ValueError, OSError) as error:
        print(f"minillm: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
