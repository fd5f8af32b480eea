"""The chat server: what clients get, in OpenAI's form, and that it goes on serving after whatever they do."""
import http.client
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
import uvicorn

from minillm import serve
from minillm.data import ENDOFTEXT
from minillm.generate import generate
from minillm.model import Llama, LlamaConfig
from minillm.sft import ASSISTANT, USER, encode_prompt
from minillm.tokenizer import Tokenizer
from minillm.world import World

TOKENIZER = Tokenizer.train([story.text for story in World().stories(60)], 300, (ENDOFTEXT, USER, ASSISTANT))
LIMIT = 512
HELLO = [{"role": "user", "content": "Hello, who are you?"}]
PROMPT = len(encode_prompt(HELLO, TOKENIZER))
GOOD = {"model": "tiny", "messages": HELLO, "max_tokens": 5}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab_size=300, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, max_seq_len=LIMIT))
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture(scope="module")
def port(model):
    """A running server's. Its sockets hold little, so that what a client does not read soon stands still."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    server = uvicorn.Server(uvicorn.Config(serve.application(model, TOKENIZER, "tiny"), log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def client(port):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def send(port, method="POST", path="/v1/chat/completions", body=None, headers=(), **connection):
    body = json.dumps(body) if isinstance(body, dict) else body
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=20, **connection)
    link.request(method, path, body, {"Content-Type": "application/json"} | dict(headers))
    return link.getresponse()


def error_of(response, status):
    """The error of a response, which must have OpenAI's form; nothing of the server's inside is in it."""
    text = response.read().decode()
    assert response.status == status, text
    error = json.loads(text)["error"]
    assert sorted(error) == ["code", "message", "param", "type"] and error["message"] and "Traceback" not in text
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    return error


def ask(client, content=HELLO, **settings):
    return client.chat.completions.create(model="tiny", messages=content, **settings)


def joined(chunks):
    """The text of a stream, how it ended, and its usage if it was told."""
    chunks = list(chunks)
    assert chunks[0].choices[0].delta.role == "assistant" and len({chunk.id for chunk in chunks}) == 1
    ends = [c.finish_reason for chunk in chunks for c in chunk.choices]
    assert set(ends[:-1]) == {None}
    return "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices), ends[-1], chunks[-1].usage


def script(monkeypatch, ids, seconds=0.0):
    """The model is made to write these tokens; returns the list of those that were asked for so far."""
    made = []

    def steps(*_, **__):
        for i in ids:
            time.sleep(seconds)
            made.append(i)
            yield torch.tensor([i])
    monkeypatch.setattr(serve, "steps", steps)
    return made


def endless(token=ord("x")):
    while True:
        yield token


def settled(made, seconds=10):
    """How many there are when for a third of a second no more have come."""
    end = time.time() + seconds
    while time.time() < end:
        before = len(made)
        time.sleep(0.3)
        if len(made) == before:
            return before
    pytest.fail(f"{len(made)} tokens, and it goes on")


# ---- answers


def test_the_answer_is_that_of_generate(client, model):
    ids = encode_prompt(HELLO, TOKENIZER)
    for settings in {"temperature": 0}, {"seed": 3}, {"seed": -2**63, "top_p": 0.5}, {"seed": 4, "temperature": 0.4}:
        new = generate(model, torch.tensor([ids]), 30, **settings)[0, len(ids):].tolist()
        special = [i for i, token in enumerate(new) if token >= 297]
        wanted, reason = (new[:special[0]], "stop") if special else (new, "length")
        got = ask(client, max_tokens=30, **settings)
        assert got.choices[0].message.content == TOKENIZER.decode(wanted) and got.choices[0].finish_reason == reason
        assert got.choices[0].message.role == "assistant" and got.model == "tiny" and got.object == "chat.completion"
        made = len(wanted) + bool(special)
        assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (len(ids), made, len(ids) + made)


def test_a_stream_is_the_same_answer(client, port):
    whole = ask(client, seed=1, max_completion_tokens=40)
    text, reason, usage = joined(ask(client, seed=1, max_completion_tokens=40, stream=True, stream_options={"include_usage": True}))
    assert (text, reason, usage) == (whole.choices[0].message.content, whole.choices[0].finish_reason, whole.usage)
    assert joined(ask(client, seed=1, max_tokens=40, stream=True)) == (text, reason, None)
    raw = send(port, body=GOOD | {"stream": True})
    assert raw.getheader("content-type").startswith("text/event-stream")
    events = raw.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: {") for event in events[:-2])


def test_without_a_seed_answers_differ(client):
    assert len({ask(client, max_tokens=30).choices[0].message.content for _ in range(4)}) > 1


def test_the_room_of_the_context_bounds_an_answer(client, monkeypatch):
    script(monkeypatch, [65])
    seen = []
    steps = serve.steps
    monkeypatch.setattr(serve, "steps", lambda model, ids, limit, *a, **k: seen.append(limit) or steps())
    for settings in ({}, {"max_tokens": 10**9}, {"max_tokens": 7}, {"max_tokens": 7, "max_completion_tokens": 6}, {"max_tokens": None}):
        ask(client, **settings)
    assert seen == [LIMIT - PROMPT, LIMIT - PROMPT, 7, 6, LIMIT - PROMPT]


@pytest.mark.parametrize("token", [ENDOFTEXT, USER, ASSISTANT])
def test_special_tokens_end_an_answer_and_are_not_shown(client, monkeypatch, token):
    made = script(monkeypatch, [*b"Yes.", TOKENIZER.special_tokens[token], *b"No."])
    got = ask(client)
    assert (got.choices[0].message.content, got.choices[0].finish_reason, got.usage.completion_tokens, len(made)) == ("Yes.", "stop", 5, 5)
    assert joined(ask(client, stream=True))[:2] == ("Yes.", "stop")


def test_an_empty_answer(client, monkeypatch):
    script(monkeypatch, [TOKENIZER.special_tokens[ENDOFTEXT]])
    assert ask(client).choices[0].message.content == "" and joined(ask(client, stream=True))[:2] == ("", "stop")


@pytest.mark.parametrize("stop, shown, reason", [
    ("lo", "hel", "stop"), (["zz", "l"], "he", "stop"), (["lo wor", "ell"], "h", "stop"), ("hello", "", "stop"), (["d!?", "dd"], "hello world!", "length"),
    ("world!!", "hello world!", "length"), ("!", "hello world", "stop"), (["o", "llo"], "he", "stop"), ([], "hello world!", "length")])
def test_stop_strings(client, monkeypatch, stop, shown, reason):
    script(monkeypatch, b"hello world!")
    got = ask(client, stop=stop).choices[0]
    assert (got.message.content, got.finish_reason) == (shown, reason)
    pieces = [chunk.choices[0].delta.content for chunk in ask(client, stop=stop, stream=True)]
    assert "".join(filter(None, pieces)) == shown


def test_what_cannot_be_a_stop_is_sent_at_once(client, monkeypatch):
    script(monkeypatch, b"aab-", 0.01)
    for stop, pieces in ("aaab", ["", "aab", "-", None]), ("zz", ["", "a", "a", "b", "-", None]):      # "a" and "aa" may become "aaab"
        assert [chunk.choices[0].delta.content for chunk in ask(client, stop=stop, stream=True)] == pieces


def test_characters_are_sent_whole(client, monkeypatch):
    script(monkeypatch, "aé🦙你".encode())
    text = "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, stream=True))
    assert text == ask(client).choices[0].message.content == "aé🦙你"


def test_the_dialogue_reaches_the_model(client, monkeypatch):
    seen = []
    monkeypatch.setattr(serve, "steps", lambda model, ids, *a, **k: seen.append(ids.tolist()[0]) or iter([torch.tensor([65])]))
    talk = [*HELLO, {"role": "assistant", "content": "Ida <|user|> 🦙"}, {"role": "user", "content": "And you?", "name": "x"}]
    ask(client, talk)
    assert seen == [encode_prompt(talk, TOKENIZER)]


def test_models_health_and_page(client, port):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert json.load(send(port, "GET", "/health")) == {"status": "ok"}
    page = send(port, "GET", "/")
    assert page.status == 200 and page.getheader("content-type") == "text/html; charset=utf-8"
    assert page.getheader("x-frame-options") == "DENY"
    text = page.read().decode()
    assert text == Path(serve.__file__).with_name("chat.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|@import", text), "a resource from elsewhere"
    assert not re.search(r"(inner|outer)HTML|insertAdjacent|document\.write|eval\(", text), "text that may become HTML"
    assert "default-src 'none'" in text and 'lang="en"' in text


# ---- refusals


@pytest.mark.parametrize("change, param, word", [
    ({"model": None}, "model", "id"), ({"model": 3}, "model", "3"), ({"model": ""}, "model", "id"), ({"messages": None}, "messages", "list"),
    ({"messages": "Hello"}, "messages", "Hello"), ({"messages": []}, "messages", "list"), ({"messages": ["Hello"]}, "messages", "message 0"),
    ({"messages": [{"role": "user"}]}, "messages", "message 0"), ({"messages": [{"role": "user", "content": None}]}, "messages", "NoneType"),
    ({"messages": [{"role": "user", "content": 7}]}, "messages", "int"), ({"messages": [{"role": "user", "content": " "}]}, "messages", "empty"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "surrogate"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages", "role"),
    ({"messages": [{"role": "system", "content": "Be brief."}, *HELLO]}, "messages", "system"),
    ({"messages": [*HELLO, *HELLO]}, "messages", "alternate"), ({"messages": [*HELLO, {"role": "assistant", "content": "x"}]}, "messages", "last"),
    ({"stream": "yes"}, "stream", "true or false"), ({"stream": 1}, "stream", "1"),
    ({"stream_options": {"include_usage": 1}}, "stream_options", "usage"), ({"stream_options": []}, "stream_options", "usage"),
    ({"max_tokens": 0}, "max_tokens", "0"), ({"max_tokens": 1.5}, "max_tokens", "1.5"), ({"max_tokens": True}, "max_tokens", "True"),
    ({"max_tokens": "9"}, "max_tokens", "'9'"), ({"max_completion_tokens": -1}, "max_completion_tokens", "-1"),
    ({"temperature": "hot"}, "temperature", "hot"), ({"temperature": -0.1}, "temperature", "-0.1"), ({"temperature": 2.1}, "temperature", "2.1"),
    ({"temperature": float("nan")}, "temperature", "nan"), ({"temperature": 1e-300}, "temperature", "1e-300"),
    ({"temperature": False}, "temperature", "False"),
    ({"top_p": 0}, "top_p", "0"), ({"top_p": 1.01}, "top_p", "1.01"), ({"top_p": 1e-300}, "top_p", "1e-300"), ({"top_p": [1]}, "top_p", "[1]"),
    ({"seed": 2**63}, "seed", "64"), ({"seed": 1.0}, "seed", "1.0"), ({"n": 2}, "n", "2"), ({"n": 0}, "n", "0"), ({"n": True}, "n", "True"),
    ({"stop": ""}, "stop", "1 to 100"), ({"stop": ["a"] * 5}, "stop", "4"), ({"stop": [1]}, "stop", "[1]"), ({"stop": "x" * 101}, "stop", "100"),
    ({"stop": 3}, "stop", "3"), ({"tools": [{"type": "function"}]}, "tools", "no effect"), ({"frequency_penalty": 0.5}, "frequency_penalty", "0.5"),
    ({"logprobs": True}, "logprobs", "True"), ({"response_format": {"type": "json_object"}}, "response_format", "json_object")])
def test_a_field_that_does_not_fit(port, change, param, word):
    error = error_of(send(port, body=GOOD | change), 400)
    assert error["param"] == param and word in error["message"] and error["code"] is None
    assert error["message"].startswith(param) or param == "messages"
    assert send(port, body=GOOD).status == 200


@pytest.mark.parametrize("missing", ["model", "messages"])
def test_a_field_that_is_missing(port, missing):
    assert error_of(send(port, body={k: v for k, v in GOOD.items() if k != missing}), 400)["param"] == missing


def test_values_that_ask_for_nothing_pass(client):
    ask(client, max_tokens=3, n=1, frequency_penalty=0, presence_penalty=0.0, logit_bias={}, logprobs=False, response_format={"type": "text"},
        stop=None, temperature=None, user="someone", extra_body={"tools": [], "functions": None, "unknown": 3})


@pytest.mark.parametrize("body", ["", "{", "{'model': 1}", b"\xff\xfe\x00", '{"model": "tiny"} more', "[" * 100_000, b"\x00" * 99,
                                  '{"seed": ' + "9" * 5000 + "}"])
def test_a_body_that_is_not_json(port, body):
    assert "JSON" in error_of(send(port, body=body), 400)["message"]
    assert send(port, body=GOOD).status == 200


@pytest.mark.parametrize("body", ["[]", "null", "3", '"text"'])
def test_a_body_that_is_no_object(port, body):
    assert "object" in error_of(send(port, body=body), 400)["message"]


def test_other_paths_and_methods(port):
    assert error_of(send(port, "GET", "/v1/nothing"), 404)["message"] and error_of(send(port, "GET"), 405)["message"]
    assert error_of(send(port, "OPTIONS", headers={"Access-Control-Request-Method": "POST"}), 405)
    assert error_of(send(port, "GET", "/../serve.py"), 404)


def test_the_client_knows_the_errors(client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt", messages=HELLO)
    assert missing.value.code == "model_not_found" and missing.value.param == "model" and "'tiny'" in str(missing.value)
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, [{"role": "user", "content": "Where is Ida? " * 500}])
    assert long.value.code == "context_length_exceeded" and str(LIMIT) in str(long.value)
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, [{"role": "user", "content": "Where is Ida? " * 500}], stream=True)
    assert long.value.code == "context_length_exceeded"
    assert ask(client, max_tokens=3).usage.completion_tokens


def test_a_prompt_that_just_fits_and_one_that_does_not(client):
    def prompt(n):      # of n tokens
        return [{"role": "user", "content": "\x00" * (n - 3)}]
    assert len(encode_prompt(prompt(LIMIT), TOKENIZER)) == LIMIT
    assert ask(client, prompt(LIMIT - 1)).usage.total_tokens == LIMIT
    with pytest.raises(openai.BadRequestError, match=f"{LIMIT} tokens"):
        ask(client, prompt(LIMIT))


def test_a_body_too_large(port):
    text = json.dumps(GOOD | {"user": "x" * serve.BODY})
    assert error_of(send(port, body=text), 413)
    assert error_of(send(port, body=iter([b"x" * 2**16] * 40)), 413), "chunked, without a Content-Length"
    assert send(port, body=text[:-len(text) + serve.BODY]).status == 400 and send(port, body=json.dumps(GOOD).ljust(serve.BODY)).status == 200


@pytest.mark.parametrize("name, status", [
    ("127.0.0.1", 200), ("localhost", 200), ("LOCALHOST", 200), ("[::1]", 200), ("192.168.1.7", 200), ("evil.example", 403), ("", 403),
    ("127.0.0.1.evil.example", 403), ("localhost.evil.example", 403), ("[", 403), ("2130706433", 403)])
@pytest.mark.parametrize("method, path", [("GET", "/health"), ("POST", "/v1/chat/completions")])
def test_only_its_own_name_is_served(port, name, status, method, path):
    """A name that someone else owns may lead to this machine, and then a page of theirs is of the same origin: DNS rebinding."""
    for host in (name, f"{name}:{port}"):
        response = send(port, method, path, GOOD, {"Host": host})
        assert response.status == status or error_of(response, status)
        if status == 403:
            assert error_of(response, 403)["code"] == "host_not_allowed"


@pytest.mark.parametrize("origin, status", [
    ("http://127.0.0.1:{port}", 200), ("https://evil.example", 403), ("null", 403), ("http://127.0.0.1", 403), ("http://127.0.0.1:1", 403),
    ("http://localhost:{port}", 403), ("http://127.0.0.1:{port}.evil.example", 403)])
def test_only_its_own_page_may_ask(port, origin, status):
    response = send(port, body=GOOD, headers={"Origin": origin.format(port=port)})
    assert not [name for name, _ in response.getheaders() if name.lower().startswith("access-control")]
    assert response.status == 200 if status == 200 else error_of(response, 403)["code"] == "origin_not_allowed"


# ---- failures, and clients that do what they like


def broken(*_, **__):
    yield torch.tensor([65])
    raise RuntimeError("secret inside")


def test_a_failure_is_not_the_end(client, port, monkeypatch, caplog):
    """Before the first word it has a status; later it is an event of the stream, which then has no [DONE]."""
    with monkeypatch.context() as patch:
        patch.setattr(serve, "steps", lambda *a, **k: iter(lambda: 1 / 0, None))
        for stream in False, True:
            response = send(port, body=GOOD | {"stream": stream})
            assert "division" not in error_of(response, 500)["message"]
            assert response.getheader("connection") == "close", "uvicorn will close it, and the client's next request be lost"
        patch.setattr(serve, "steps", broken)
        with pytest.raises(openai.InternalServerError):
            ask(client)
        text = ""
        with pytest.raises(openai.APIError, match="server failed") as failure:
            for chunk in ask(client, stream=True):
                text += chunk.choices[0].delta.content or ""
        assert text == "A" and "secret" not in str(failure.value) and "secret inside" in caplog.text
    assert ask(client, max_tokens=3).usage.completion_tokens


@pytest.mark.parametrize("stream", [True, False])
def test_nothing_is_generated_for_a_client_that_has_gone(client, port, monkeypatch, stream):
    with monkeypatch.context() as patch:
        made = script(patch, endless(), 0.005)
        link = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        link.request("POST", "/v1/chat/completions", json.dumps(GOOD | {"stream": stream}))
        if stream:
            response = link.getresponse()
            while b"x" not in response.readline():
                pass
            response.close()
        else:
            time.sleep(0.1)
        before = len(made)
        link.close()
        assert before and settled(made) - before < 20
    assert ask(client, max_tokens=3).usage.completion_tokens


def test_clients_that_leave_at_any_moment(client, port):
    request = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(json.dumps(GOOD))}\r\n\r\n{json.dumps(GOOD)}".encode()
    for n in range(0, len(request) + 1, 17):
        with socket.create_connection(("127.0.0.1", port)) as link:
            link.sendall(request[:n])
    assert ask(client, max_tokens=3).usage.completion_tokens


def test_a_client_that_does_not_read_holds_up_nobody(client, port, monkeypatch):
    """What is made for it stands still: the server does not pile up what nobody takes. When it reads on, nothing is missing."""
    with monkeypatch.context() as patch:
        made = script(patch, (48 + i % 10 for i in range(1500)))
        link = socket.socket()
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.connect(("127.0.0.1", port))
        body = json.dumps(GOOD | {"stream": True})
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        link.sendall((head + body).encode())
        piled = settled(made)
        assert 0 < piled < 1200
    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(lambda i: ask(client, max_tokens=20, seed=i).usage.completion_tokens, range(6)))
    assert len(made) == piled
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
    received = b""
    while part := link.recv(2**20):
        received += part
    link.close()
    assert "".join(re.findall(r'"content": "(\d)"', received.decode())) == "0123456789" * 150 and b"[DONE]" in received


def test_a_short_answer_does_not_wait_for_a_long_one(client, monkeypatch):
    with monkeypatch.context() as patch:
        made = script(patch, endless(), 0.005)
        long = ask(client, stream=True)
        next(long)
        patch.undo()
        assert ask(client, max_tokens=3).usage.completion_tokens      # before the other, which has no end
        for _ in range(len(made) + 3):
            assert next(long).choices[0].finish_reason is None
        long.close()


def test_the_server_answers_while_the_model_thinks(client, port, monkeypatch):
    think = threading.Event()
    monkeypatch.setattr(serve, "steps", lambda *a, **k: (think.wait(15) and torch.tensor([i]) for i in b"So."))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, client)
        try:
            assert send(port, "GET", "/health").status == 200 and error_of(send(port, body={}), 400) and not answer.done()
        finally:
            think.set()
        assert answer.result().choices[0].message.content == "So."


def test_eight_clients_at_once_lose_nothing(client, port):
    """Each gets its own answer, as if it were alone."""
    def answer(i):
        settings = {"seed": i % 6, "max_tokens": 12 + i % 3, "stop": "e" if i % 5 == 0 else None}
        if i % 2:
            return joined(ask(client, stream=True, stream_options={"include_usage": True}, **settings))
        whole = ask(client, **settings)
        return whole.choices[0].message.content, whole.choices[0].finish_reason, whole.usage
    alone = [answer(i) for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, list(range(16)) * 2)) == alone * 2


def test_one_thread_generates(client, monkeypatch):
    threads = []

    def steps(*_, **__):
        for i in b"one":
            threads.append(threading.get_ident())
            time.sleep(0.01)
            yield torch.tensor([i])
    monkeypatch.setattr(serve, "steps", steps)
    with ThreadPoolExecutor(4) as pool:
        assert all(got.choices[0].message.content == "one" for got in pool.map(lambda _: ask(client), range(4)))
    assert len(threads) == 12 and len(set(threads)) == 1


# ---- starting and ending


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

    before = signal.signal(signal.SIGINT, signal.default_int_handler)      # a shell's job in the background ignores SIGINT
    try:
        visitor = threading.Thread(target=visit)
        visitor.start()
        with pytest.raises(KeyboardInterrupt):
            serve.serve(model, TOKENIZER, "here", port=0)
        visitor.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert b'"here"' in seen[0]


@pytest.mark.parametrize("where, word", [({"port": "taken"}, "--port"), ({"port": 70_000}, "70000"), ({"port": -1}, "-1"),
                                         ({"host": "no such host", "port": 0}, "no such host")])
def test_where_it_cannot_listen(model, port, where, word):
    with pytest.raises(ValueError, match=word):
        serve.serve(model, TOKENIZER, "tiny", **{key: port if value == "taken" else value for key, value in where.items()})


def test_it_listens_to_this_machine_only_unless_told(model, monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "create_server", lambda address, **_: asked.append(address) or (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(ValueError):
        serve.serve(model, TOKENIZER, "tiny")
    assert asked == [("127.0.0.1", 8000)]


def test_a_tokenizer_without_the_template(model):
    plain = Tokenizer.train(["aaa bbb"], 258)
    with pytest.raises(ValueError, match="user"):
        serve.application(model, plain, "tiny")
