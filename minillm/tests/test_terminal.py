"""Terminals as they are: Ctrl-C while a command starts, old consoles, no input, closed pipes."""
import io
import os
import signal
import subprocess
import sys

import pytest

from minillm import __main__ as command
from minillm.serving import terminal

POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to another process")


@POSIX
@pytest.mark.parametrize("arguments", [
    ["minillm", "chat", "--prompt", "Hello"], ["minillm.bench", "memory"]])
def test_control_c_while_torch_is_imported_is_one_line(arguments, tmp_path):
    """Python tells each import when it is done: the signal comes with the first one of torch."""
    process = subprocess.Popen([sys.executable, "-X", "importtime", "-m", *arguments], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=os.environ | {"MINILLM_CACHE": str(tmp_path)})
    for line in process.stderr:
        if "| torch." in line.replace("  ", ""):
            break
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    said = [line for line in error.splitlines() if not line.startswith("import time:") and line]
    assert process.returncode == 130 and said == ["Stopped."] and not out


def test_control_c_in_a_comparison_is_one_line(monkeypatch, capsys):
    from minillm.bench import __main__ as bench

    def interrupted(*_):
        raise KeyboardInterrupt           # Ctrl-C does this, unless the parent ignores signals

    monkeypatch.setattr(bench, "run", interrupted)
    with pytest.raises(SystemExit) as ended:
        bench.main(["train"])
    assert ended.value.code == 130 and capsys.readouterr().err == "\nStopped.\n"


def test_a_console_without_the_letters_shows_the_rest(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setattr(command, "own_text", lambda paths: print("Он: 1.2345 bits per byte"))
    assert command.main(["--text", "book.txt"]) == 0
    console.flush()
    assert console.buffer.getvalue() == b"??: 1.2345 bits per byte" + os.linesep.encode()


@pytest.mark.parametrize("closed", [False, True])
def test_without_standard_input_there_is_a_sentence_before_any_work(closed, monkeypatch, capsys):
    stdin = io.StringIO()
    stdin.close()
    monkeypatch.setattr(sys, "stdin", stdin if closed else None)
    monkeypatch.setattr(command.stages, "dpo", lambda: pytest.fail("built a stage"))
    assert command.main(["chat"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no standard input" in error and "--prompt" in error


def test_a_prompt_in_another_encoding(monkeypatch, capsys):
    monkeypatch.setattr(command.stages, "dpo", lambda: pytest.fail("built a stage"))
    prompt = b"caf\xe9".decode(errors="surrogateescape")       # as Python hands an argument over
    assert command.main(["chat", "--prompt", prompt]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "UTF-8" in error and "codec" not in error


def test_a_typed_line_in_another_encoding(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8"))
    with pytest.raises(ValueError, match="the input is not utf-8"):
        terminal.ask()


def test_the_end_of_the_input_is_an_empty_line(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    assert [terminal.ask(), terminal.ask()] == ["Hello", ""]


@POSIX
def test_a_reader_that_has_gone_ends_the_command_quietly():
    program = """if True:
        from minillm.serving import terminal
        with terminal.gone_readers():
            while True:
                print("x" * 1000)"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(60) == 141


def test_help_on_a_narrow_terminal():
    done = subprocess.run([sys.executable, "-m", "minillm", "--help"], capture_output=True,
                          text=True, env=os.environ | {"COLUMNS": "10", "TERM": "dumb"})
    assert done.returncode == 0 and "--text" in done.stdout
