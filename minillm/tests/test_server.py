"""The chat server: what clients get, in OpenAI's form, and where it listens."""
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import openai
import pytest
import torch

from minillm.__main__ import main
from minillm.arc import stages
from minillm.data import ENDOFTEXT
from minillm.generate import generate
from minillm.serving import server
from minillm.sft import ASSISTANT, USER, encode_prompt
from minillm.tests.server import GOOD, HELLO, LIMIT, PROMPT, TOKENIZER, ask, joined, script, send
# fixtures: pytest finds them here, by name
from minillm.tests.server import openai_client, running_port, tiny_model  # noqa: F401
from minillm.tokenizer import Tokenizer


def test_the_answer_is_that_of_generate(client, model):
    ids = encode_prompt(HELLO, TOKENIZER)
    for settings in ({"temperature": 0}, {"seed": 3}, {"seed": -2**63, "top_p": 0.5},
                     {"seed": 4, "temperature": 0.4}):
        new = generate(model, torch.tensor([ids]), 30, **settings)[0, len(ids):].tolist()
        special = [i for i, token in enumerate(new) if token >= 297]
        wanted, reason = (new[:special[0]], "stop") if special else (new, "length")
        got = ask(client, max_tokens=30, **settings)
        choice, usage = got.choices[0], got.usage
        assert choice.message.content == TOKENIZER.decode(wanted)
        assert choice.finish_reason == reason and choice.message.role == "assistant"
        assert got.model == "tiny" and got.object == "chat.completion"
        made = len(wanted) + bool(special)
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), made)
        assert usage.total_tokens == len(ids) + made


def test_a_stream_is_the_same_answer(client, port):
    whole = ask(client, seed=1, max_completion_tokens=40)
    chunks = ask(client, seed=1, max_completion_tokens=40, stream=True,
                 stream_options={"include_usage": True})
    text, reason, usage = joined(chunks)
    choice = whole.choices[0]
    assert (text, reason, usage) == (choice.message.content, choice.finish_reason, whole.usage)
    assert joined(ask(client, seed=1, max_tokens=40, stream=True)) == (text, reason, None)
    raw = send(port, body=GOOD | {"stream": True})
    assert raw.getheader("content-type").startswith("text/event-stream")
    events = raw.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])


def test_the_content_of_a_message_may_be_texts_in_parts(client):
    content = [{"type": "text", "text": "Hello, "}, {"type": "text", "text": "who are you?"}]
    in_parts = ask(client, [{"role": "user", "content": content}], seed=1)
    whole = ask(client, seed=1)
    assert in_parts.choices[0].message.content == whole.choices[0].message.content


@pytest.mark.parametrize("nothing", ["", None, " \n"])
def test_an_empty_answer_may_be_sent_back(client, nothing):
    """With all that the client keeps of a message, in which much is null."""
    message = ask(client, max_tokens=1).choices[0].message.model_dump() | {"content": nothing}
    assert len(message) > 2
    dialogue = [*HELLO, message, {"role": "user", "content": "Why?"}]
    stands = {"role": "assistant", "content": server.SILENCE}
    prompt = encode_prompt([HELLO[0], stands, dialogue[2]], TOKENIZER)
    assert ask(client, dialogue, max_tokens=1).usage.prompt_tokens == len(prompt)


@pytest.mark.parametrize("field", [{"top_k": 1}, {"min_p": 1.0}])
def test_the_samplers_of_other_servers_have_their_effect(client, field):
    """With one candidate left, an answer is the greedy one, whatever the seed."""
    greedy = ask(client, max_tokens=12, temperature=0).choices[0].message.content
    drawn = ask(client, max_tokens=12, temperature=2, seed=1, extra_body=field)
    free = ask(client, max_tokens=12, temperature=2, seed=1)
    assert drawn.choices[0].message.content == greedy != free.choices[0].message.content


def test_a_repetition_penalty_has_its_effect(client):
    plain, other = (ask(client, max_tokens=12, temperature=0,
                        extra_body={"repetition_penalty": x}).choices[0].message.content
                    for x in (1, 10))
    assert plain != other


def test_a_model_by_its_name(client):
    assert client.models.retrieve("tiny").id == "tiny" == client.models.list().data[0].id
    with pytest.raises(openai.NotFoundError, match="no model 'a/b'"):
        client.models.retrieve("a/b")


def test_without_a_seed_answers_differ(client):
    assert len({ask(client, max_tokens=30).choices[0].message.content for _ in range(4)}) > 1


def test_the_room_of_the_context_bounds_an_answer(client, monkeypatch):
    script(monkeypatch, [65])
    seen = []
    steps = server.steps

    def watched(model, ids, limit, *_, **__):
        seen.append(limit)
        return steps()

    monkeypatch.setattr(server, "steps", watched)
    for settings in ({}, {"max_tokens": 10**9}, {"max_tokens": 7},
                     {"max_tokens": 7, "max_completion_tokens": 6}, {"max_tokens": None}):
        ask(client, **settings)
    assert seen == [LIMIT - PROMPT, LIMIT - PROMPT, 7, 6, LIMIT - PROMPT]


@pytest.mark.parametrize("token", [ENDOFTEXT, USER, ASSISTANT])
def test_special_tokens_end_an_answer_and_are_not_shown(client, monkeypatch, token):
    made = script(monkeypatch, [*b"Yes.", TOKENIZER.special_tokens[token], *b"No."])
    got = ask(client)
    assert (got.choices[0].message.content, got.choices[0].finish_reason) == ("Yes.", "stop")
    assert got.usage.completion_tokens == len(made) == 5
    assert joined(ask(client, stream=True))[:2] == ("Yes.", "stop")


def test_an_empty_answer(client, monkeypatch):
    script(monkeypatch, [TOKENIZER.special_tokens[ENDOFTEXT]])
    assert ask(client).choices[0].message.content == ""
    assert joined(ask(client, stream=True))[:2] == ("", "stop")


@pytest.mark.parametrize("stop, shown, reason", [
    ("lo", "hel", "stop"),
    (["zz", "l"], "he", "stop"),
    (["lo wor", "ell"], "h", "stop"),
    ("hello", "", "stop"),
    (["d!?", "dd"], "hello world!", "length"),
    ("world!!", "hello world!", "length"),
    ("!", "hello world", "stop"),
    (["o", "llo"], "he", "stop"),
    ([], "hello world!", "length"),
])
def test_stop_strings(client, monkeypatch, stop, shown, reason):
    script(monkeypatch, b"hello world!")
    got = ask(client, stop=stop).choices[0]
    assert (got.message.content, got.finish_reason) == (shown, reason)
    pieces = [chunk.choices[0].delta.content for chunk in ask(client, stop=stop, stream=True)]
    assert "".join(filter(None, pieces)) == shown


def test_what_cannot_be_a_stop_is_sent_at_once(client, monkeypatch):
    script(monkeypatch, b"aab-", 0.01)
    # "a" and "aa" may become "aaab"
    for stop, pieces in ("aaab", ["", "aab", "-", None]), ("zz", ["", "a", "a", "b", "-", None]):
        chunks = ask(client, stop=stop, stream=True)
        assert [chunk.choices[0].delta.content for chunk in chunks] == pieces


def test_characters_are_sent_whole(client, monkeypatch):
    script(monkeypatch, "aé🦙你".encode())
    chunks = ask(client, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == ask(client).choices[0].message.content == "aé🦙你"


def test_the_dialogue_reaches_the_model(client, monkeypatch):
    seen = []

    def steps(model, ids, *_, **__):
        seen.append(ids.tolist()[0])
        return iter([torch.tensor([65])])

    monkeypatch.setattr(server, "steps", steps)
    talk = [*HELLO, {"role": "assistant", "content": "Ida <|user|> 🦙"},
            {"role": "user", "content": "And you?", "name": "x"}]
    ask(client, talk)
    assert seen == [encode_prompt(talk, TOKENIZER)]


def test_models_health_and_page(client, port):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert json.load(send(port, "GET", "/health")) == {"status": "ok"}
    page = send(port, "GET", "/")
    assert page.status == 200 and page.getheader("content-type") == "text/html; charset=utf-8"
    assert page.getheader("x-frame-options") == "DENY"
    text = page.read().decode()
    assert text == Path(server.__file__).with_name("chat.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|@import", text), "a resource from elsewhere"
    assert not re.search(r"(inner|outer)HTML|insertAdjacent|document\.write|eval\(", text), \
        "text that may become HTML"
    assert "default-src 'none'" in text and 'lang="en"' in text


def test_serve_says_where_it_is_and_ends_with_control_c(model, capsys):
    if sys.platform == "win32":
        pytest.skip("Windows sends no SIGINT to itself")
    seen = []

    def visit():
        try:
            while not (shown := capsys.readouterr().out):
                time.sleep(0.05)
            url = re.search(r"http://127\.0\.0\.1:(\d+)/v1", shown)
            seen.append(send(int(url[1]), "GET", "/v1/models").read())
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    # a shell's job in the background ignores SIGINT
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        visitor = threading.Thread(target=visit)
        visitor.start()
        with pytest.raises(KeyboardInterrupt):
            server.serve(server.listen(port=0), model, TOKENIZER, "here")
        visitor.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert b'"here"' in seen[0]


@pytest.mark.parametrize("where, word", [
    ({"port": "taken"}, "--port"),
    ({"port": 70_000}, "70000"),
    ({"port": -1}, "-1"),
    ({"host": "no such host", "port": 0}, "no such host"),
])
def test_where_it_cannot_listen(port, where, word):
    taken = {key: port if value == "taken" else value for key, value in where.items()}
    with pytest.raises(ValueError, match=word):
        server.listen(**taken)


def test_it_listens_to_this_machine_only_unless_told(monkeypatch):
    asked = []

    def create_server(address, **_):
        asked.append(address)
        raise OSError("no")

    monkeypatch.setattr(socket, "create_server", create_server)
    with pytest.raises(ValueError):
        server.listen()
    assert asked == [("127.0.0.1", 8000)]


def test_an_address_that_is_taken_is_said_before_a_model_is_built(port, monkeypatch, capsys):
    monkeypatch.setattr(stages, "dpo", lambda: pytest.fail("it was built"))
    assert main(["serve", "--port", str(port)]) == 2
    assert "--port" in capsys.readouterr().err


def test_a_tokenizer_without_the_template(model):
    plain = Tokenizer.train(["aaa bbb"], 258)
    with pytest.raises(ValueError, match="user"):
        server.application(model, plain, "tiny")
