"""For the tests of serving: a server on a tiny model, clients, and a model told what to say."""
import http.client
import json
import socket
import threading
import time

import openai
import pytest
import torch
import uvicorn

from minillm.data import ENDOFTEXT
from minillm.model import Llama, LlamaConfig
from minillm.serving import server
from minillm.sft import ASSISTANT, USER, encode_prompt
from minillm.tokenizer import Tokenizer
from minillm.world import World

TEXTS = [story.text for story in World().stories(60)]
TOKENIZER = Tokenizer.train(TEXTS, 300, (ENDOFTEXT, USER, ASSISTANT))
LIMIT = 512
HELLO = [{"role": "user", "content": "Hello, who are you?"}]
PROMPT = len(encode_prompt(HELLO, TOKENIZER))
GOOD = {"model": "tiny", "messages": HELLO, "max_tokens": 5}


@pytest.fixture(scope="module", name="model")
def tiny_model():
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab_size=300, dim=32, n_layers=2, n_heads=4, n_kv_heads=2,
                              hidden_dim=48, max_seq_len=LIMIT))
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture(scope="module", name="port")
def running_port(model):
    """The port of a running server.

    Its sockets hold little, so that what a client does not read soon stands still.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    app = server.application(model, TOKENIZER, "tiny")
    config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    yield listener.getsockname()[1]
    running.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


@pytest.fixture(scope="module", name="client")
def openai_client(port):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0,
                       timeout=60) as client:
        yield client


def send(port, method="POST", path="/v1/chat/completions", body=None, headers=(), **connection):
    body = json.dumps(body) if isinstance(body, dict) else body
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=60, **connection)
    link.request(method, path, body, {"Content-Type": "application/json"} | dict(headers))
    return link.getresponse()


def error_of(response, status):
    """The error of a response, which must have OpenAI's form.

    Nothing of the server's inside is in it.
    """
    text = response.read().decode()
    assert response.status == status, text
    error = json.loads(text)["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert error["message"] and "Traceback" not in text
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    return error


def ask(client, content=HELLO, **settings):
    return client.chat.completions.create(model="tiny", messages=content, **settings)


def joined(chunks):
    """The text of a stream, how it ended, and its usage if it was told."""
    chunks = list(chunks)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    choices = [choice for chunk in chunks for choice in chunk.choices]
    ends = [choice.finish_reason for choice in choices]
    assert set(ends[:-1]) == {None}
    return "".join(choice.delta.content or "" for choice in choices), ends[-1], chunks[-1].usage


def script(monkeypatch, ids, seconds=0.0):
    """Makes the model write these tokens; returns the list of those that were asked for so far."""
    made = []

    def steps(*_, **__):
        for i in ids:
            time.sleep(seconds)
            made.append(i)
            yield torch.tensor([i])

    monkeypatch.setattr(server, "steps", steps)
    return made


def endless():
    while True:
        yield ord("x")


def until(true, seconds=60):
    """Wait until true() holds."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def settled(made, seconds=60):
    """How many there are when no more have come for a second."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        before = len(made)
        time.sleep(1)
        if len(made) == before:
            return before
    pytest.fail(f"{len(made)} tokens, and it goes on")
