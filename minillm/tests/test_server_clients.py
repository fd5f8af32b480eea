"""The server goes on: after failures, with clients that leave or do not read, with many at once."""
import http.client
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

from minillm.serving import server
from minillm.tests.server import GOOD, ask, endless, error_of, joined, script, send, settled, until
# fixtures: pytest finds them here, by name
from minillm.tests.server import openai_client, running_port, tiny_model  # noqa: F401


def broken(*_, **__):
    yield torch.tensor([65])
    raise RuntimeError("secret inside")


def test_a_failure_is_not_the_end(client, port, monkeypatch, caplog):
    """Before the first word it has a status; later it is an event of the stream.

    Such a stream has no [DONE].
    """
    with monkeypatch.context() as patch:
        patch.setattr(server, "steps", lambda *a, **k: iter(lambda: 1 / 0, None))
        for stream in False, True:
            response = send(port, body=GOOD | {"stream": stream})
            assert "division" not in error_of(response, 500)["message"]
            assert response.getheader("connection") == "close", \
                "uvicorn will close it, and the client's next request be lost"
        patch.setattr(server, "steps", broken)
        with pytest.raises(openai.InternalServerError):
            ask(client)
        text = ""
        with pytest.raises(openai.APIError, match="server failed") as failure:
            for chunk in ask(client, stream=True):
                text += chunk.choices[0].delta.content or ""
        assert text == "A" and "secret" not in str(failure.value)
        assert "secret inside" in caplog.text
    assert ask(client, max_tokens=3).usage.completion_tokens


@pytest.mark.parametrize("stream", [True, False])
def test_nothing_is_generated_for_a_client_that_has_gone(client, port, monkeypatch, stream):
    with monkeypatch.context() as patch:
        made = script(patch, endless(), 0.005)
        link = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        link.request("POST", "/v1/chat/completions", json.dumps(GOOD | {"stream": stream}))
        if stream:
            response = link.getresponse()
            while b"x" not in response.readline():
                pass
            response.close()
        else:
            until(lambda: made)
        link.close()
        settled(made)       # or it goes on, because there is no end
    assert ask(client, max_tokens=3).usage.completion_tokens


def test_clients_that_leave_at_any_moment(client, port):
    body = json.dumps(GOOD)
    head = ("POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Length: {len(body)}\r\n\r\n")
    request = (head + body).encode()
    for n in range(0, len(request) + 1, 17):
        with socket.create_connection(("127.0.0.1", port)) as link:
            link.sendall(request[:n])
    assert ask(client, max_tokens=3).usage.completion_tokens


def test_a_client_that_does_not_read_holds_up_nobody(client, port, monkeypatch):
    """What is made for it stands still: the server does not pile up what nobody takes.

    How much is on its way then depends on the buffers of the system, so the answer is long. When
    the client reads on, nothing is missing.
    """
    with monkeypatch.context() as patch:
        made = script(patch, (48 + i % 10 for i in range(5000)))
        link = socket.socket()
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.connect(("127.0.0.1", port))
        body = json.dumps(GOOD | {"stream": True})
        head = ("POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                f"Content-Length: {len(body)}\r\n\r\n")
        link.sendall((head + body).encode())
        piled = settled(made)
        assert 0 < piled < 4500
    with ThreadPoolExecutor(3) as pool:
        answers = pool.map(lambda i: ask(client, max_tokens=20, seed=i), range(6))
        assert all(answer.usage.completion_tokens for answer in answers)
    assert len(made) == piled
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
    received = b""
    while part := link.recv(2**20):
        received += part
    link.close()
    digits = "".join(re.findall(r'"content": "(\d)"', received.decode()))
    assert digits == "0123456789" * 500 and b"[DONE]" in received


def test_a_short_answer_does_not_wait_for_a_long_one(client, monkeypatch):
    with monkeypatch.context() as patch:
        made = script(patch, endless(), 0.005)
        long = ask(client, stream=True)
        next(long)
        patch.undo()
        # it comes before the other, which has no end
        assert ask(client, max_tokens=3).usage.completion_tokens
        for _ in range(len(made) + 3):
            assert next(long).choices[0].finish_reason is None
        long.close()


def test_the_server_answers_while_the_model_thinks(client, port, monkeypatch):
    think = threading.Event()

    def steps(*_, **__):
        for i in b"So.":
            assert think.wait(60)
            yield torch.tensor([i])

    monkeypatch.setattr(server, "steps", steps)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, client)
        try:
            assert send(port, "GET", "/health").status == 200
            assert error_of(send(port, body={}), 400) and not answer.done()
        finally:
            think.set()
        assert answer.result().choices[0].message.content == "So."


def test_eight_clients_at_once_lose_nothing(client, port):
    """Each gets its own answer, as if it were alone."""
    def answer(i):
        settings = {"seed": i % 6, "max_tokens": 12 + i % 3, "stop": "e" if i % 5 == 0 else None}
        if i % 2:
            settings |= {"stream": True, "stream_options": {"include_usage": True}}
            return joined(ask(client, **settings))
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

    monkeypatch.setattr(server, "steps", steps)
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda _: ask(client), range(4))
        assert all(got.choices[0].message.content == "one" for got in answers)
    assert len(threads) == 12 and len(set(threads)) == 1


def test_one_request_too_many_is_told_so(client, port, monkeypatch):
    monkeypatch.setattr(server, "BUSY", 2)
    with monkeypatch.context() as patch:
        made = script(patch, endless(), 0.005)
        streams = [ask(client, stream=True) for _ in range(2)]
        assert error_of(send(port, body=GOOD), 503)["code"] == "busy"
        for stream in streams:
            stream.close()
        settled(made)
    assert ask(client, max_tokens=3).usage.completion_tokens
