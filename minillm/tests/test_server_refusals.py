"""What the server refuses, and with which status: fields, bodies, paths, prompts, foreign pages."""
import json
import typing

import openai
import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming

from minillm.serving import server
from minillm.sft import encode_prompt
from minillm.tests.server import GOOD, HELLO, LIMIT, TOKENIZER, ask, error_of, send
# fixtures: pytest finds them here, by name
from minillm.tests.server import openai_client, running_port, tiny_model  # noqa: F401


def said(content):
    """A dialogue of one message."""
    return [{"role": "user", "content": content}]


TEXT, THOUGHT = {"type": "text", "text": "x"}, {"type": "thinking", "text": "y"}


@pytest.mark.parametrize("field, value, word", [
    ("model", None, "id"),
    ("model", 3, "3"),
    ("model", "", "id"),
    ("messages", None, "list"),
    ("messages", "Hello", "Hello"),
    ("messages", [], "list"),
    ("messages", ["Hello"], "message 0"),
    ("messages", [{"role": "user"}], "message 0"),
    ("messages", said(None), "NoneType"),
    ("messages", said(7), "int"),
    ("messages", said(" "), "empty"),
    ("messages", said("\ud800"), "surrogate"),
    ("messages", said([TEXT, THOUGHT]), "list"),
    ("messages", said([]), "empty"),
    ("messages", said([7]), "list"),
    ("messages", [{"role": ["user"], "content": "x"}], "role"),
    ("messages", [{"role": "system", "content": "Be brief."}, *HELLO], "system"),
    ("messages", [*HELLO, *HELLO], "alternate"),
    ("messages", [*HELLO, {"role": "assistant", "content": "x"}], "last"),
    ("stream", "yes", "true or false"),
    ("stream", 1, "1"),
    ("stream_options", {"include_usage": 1}, "usage"),
    ("stream_options", [], "usage"),
    ("max_tokens", 0, "0"),
    ("max_tokens", 1.5, "1.5"),
    ("max_tokens", True, "True"),
    ("max_tokens", "9", "'9'"),
    ("max_completion_tokens", -1, "-1"),
    ("temperature", "hot", "hot"),
    ("temperature", -0.1, "-0.1"),
    ("temperature", 2.1, "2.1"),
    ("temperature", float("nan"), "nan"),
    ("temperature", 1e-300, "1e-300"),
    ("temperature", False, "False"),
    ("top_p", 0, "0"),
    ("top_p", 1.01, "1.01"),
    ("top_p", 1e-300, "1e-300"),
    ("top_p", [1], "[1]"),
    ("seed", 2**63, "64"),
    ("seed", 1.0, "1.0"),
    ("n", 2, "2"),
    ("n", 0, "0"),
    ("n", True, "True"),
    ("stop", "", "1 to 100"),
    ("stop", ["a"] * 5, "4"),
    ("stop", [1], "[1]"),
    ("stop", "x" * 101, "100"),
    ("stop", 3, "3"),
    ("tools", [{"type": "function"}], "no effect"),
    ("frequency_penalty", 0.5, "0.5"),
    ("logprobs", True, "True"),
    ("response_format", {"type": "json_object"}, "json_object"),
    ("top_logprobs", 3, "no effect"),
    ("reasoning_effort", "high", "no effect"),
    ("modalities", ["text", "audio"], "no effect"),
    ("top_k", 0, "0"),
    ("top_k", 1.5, "1.5"),
    ("min_p", -0.1, "-0.1"),
    ("min_p", 1.1, "1.1"),
    ("repetition_penalty", 0, "0"),
    ("repetition_penalty", "high", "high"),
    ("messages", [{"role": "user", "content": "x", "audio": {"id": "1"}}], "'audio'"),
    ("messages", [{"role": "user", "content": "x"},
                  {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
                  {"role": "user", "content": "y"}], "message 1 has 'tool_calls'"),
])
def test_a_field_that_does_not_fit(port, field, value, word):
    error = error_of(send(port, body=GOOD | {field: value}), 400)
    assert error["param"] == field and word in error["message"] and error["code"] is None
    assert error["message"].startswith(field) or field == "messages"
    assert send(port, body=GOOD).status == 200


@pytest.mark.parametrize("missing", ["model", "messages"])
def test_a_field_that_is_missing(port, missing):
    body = {field: value for field, value in GOOD.items() if field != missing}
    assert error_of(send(port, body=body), 400)["param"] == missing


def test_values_that_ask_for_nothing_pass(client):
    ask(client, max_tokens=3, n=1, frequency_penalty=0, presence_penalty=0.0, logit_bias={},
        logprobs=False, response_format={"type": "text"}, stop=None, temperature=None,
        user="someone", metadata={"a": "b"}, store=False, tool_choice="auto", modalities=["text"],
        reasoning_effort="none", extra_body={"tools": [], "functions": None})


def test_null_is_not_given(port):
    """In every optional field of OpenAI's schema, and in those that are unknown here."""
    schema = typing.get_type_hints(CompletionCreateParamsNonStreaming) | {"stream": bool}
    nothing = dict.fromkeys(schema.keys() - {"model", "messages", "max_tokens"})
    assert {"seed", "tools", "web_search_options"} <= nothing.keys()
    assert send(port, body=GOOD | nothing | {"mirostat": None}).status == 200
    for options in {"include_usage": None}, {}, None:
        assert send(port, body=GOOD | {"stream": True, "stream_options": options}).status == 200


def test_every_field_of_openai_has_its_place():
    """Honored, refused, or listed as ignored: a new one in their schema has to be looked at."""
    schema = typing.get_type_hints(CompletionCreateParamsNonStreaming)
    unlisted = {"audio", "prediction", "verbosity", "web_search_options", "prompt_cache_options",
                "moderation"}                                            # refused as unknown
    assert not schema.keys() - {*server.FIELDS, *server.IGNORED, *unlisted}


@pytest.mark.parametrize("field", ["mirostat", "web_search_options", "typo" * 100])
def test_an_unknown_field_is_refused(port, field):
    error = error_of(send(port, body=GOOD | {field: {}}), 400)
    assert error["param"] == field[:40] and "unknown here" in error["message"]


def test_a_refused_prompt_leaves_nothing_in_memory(port):
    TOKENIZER.cache.clear()
    for i in range(3):
        word = f"{i}".join("abcdefghij" * 5000)
        error_of(send(port, body=GOOD | {"messages": said(word)}), 400)
    assert not TOKENIZER.cache


@pytest.mark.parametrize("body", [
    "", "{", "{'model': 1}", b"\xff\xfe\x00", '{"model": "tiny"} more', "[" * 100_000,
    b"\x00" * 99, '{"seed": ' + "9" * 5000 + "}",
])
def test_a_body_that_is_not_json(port, body):
    assert "JSON" in error_of(send(port, body=body), 400)["message"]
    assert send(port, body=GOOD).status == 200


@pytest.mark.parametrize("body", ["[]", "null", "3", '"text"'])
def test_a_body_that_is_no_object(port, body):
    assert "object" in error_of(send(port, body=body), 400)["message"]


def test_other_paths_and_methods(port):
    assert error_of(send(port, "GET", "/v1/nothing"), 404)["message"]
    assert error_of(send(port, "GET"), 405)["message"]
    asked = {"Access-Control-Request-Method": "POST"}
    assert error_of(send(port, "OPTIONS", headers=asked), 405)
    assert error_of(send(port, "GET", "/../server.py"), 404)


def test_the_client_knows_the_errors(client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt", messages=HELLO)
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    assert "'tiny'" in str(missing.value)
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, said("Where is Ida? " * 500))
    assert long.value.code == "context_length_exceeded" and str(LIMIT) in str(long.value)
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, said("Where is Ida? " * 500), stream=True)
    assert long.value.code == "context_length_exceeded"
    assert ask(client, max_tokens=3).usage.completion_tokens


def test_a_prompt_that_just_fits_and_one_that_does_not(client):
    def prompt(n):      # of n tokens
        return said("\x00" * (n - 3))

    assert len(encode_prompt(prompt(LIMIT), TOKENIZER)) == LIMIT
    assert ask(client, prompt(LIMIT - 1)).usage.total_tokens == LIMIT
    with pytest.raises(openai.BadRequestError, match=f"{LIMIT} tokens"):
        ask(client, prompt(LIMIT))


def test_a_body_too_large(port):
    text = json.dumps(GOOD | {"user": "x" * server.BODY})
    assert error_of(send(port, body=text), 413)
    chunked = iter([b"x" * 2**16] * 40)      # without a Content-Length
    assert error_of(send(port, body=chunked), 413)
    assert send(port, body=text[:server.BODY]).status == 400, "just not too large, but cut off"
    assert send(port, body=json.dumps(GOOD).ljust(server.BODY)).status == 200


@pytest.mark.parametrize("name, status", [
    ("127.0.0.1", 200), ("localhost", 200), ("LOCALHOST", 200), ("[::1]", 200),
    ("192.168.1.7", 200), ("evil.example", 403), ("", 403), ("127.0.0.1.evil.example", 403),
    ("localhost.evil.example", 403), ("[", 403), ("2130706433", 403),
])
@pytest.mark.parametrize("method, path", [("GET", "/health"), ("POST", "/v1/chat/completions")])
def test_only_its_own_name_is_served(port, name, status, method, path):
    """A name that someone else owns may lead to this machine (DNS rebinding).

    Then a page of theirs has the same origin.
    """
    for host in (name, f"{name}:{port}"):
        response = send(port, method, path, GOOD, {"Host": host})
        assert response.status == status or error_of(response, status)
        if status == 403:
            assert error_of(response, 403)["code"] == "host_not_allowed"


@pytest.mark.parametrize("origin, status", [
    ("http://127.0.0.1:{port}", 200), ("https://evil.example", 403), ("null", 403),
    ("http://127.0.0.1", 403), ("http://127.0.0.1:1", 403), ("http://localhost:{port}", 403),
    ("http://127.0.0.1:{port}.evil.example", 403),
])
def test_only_its_own_page_may_ask(port, origin, status):
    response = send(port, body=GOOD, headers={"Origin": origin.format(port=port)})
    names = [name.lower() for name, _ in response.getheaders()]
    assert not [name for name in names if name.startswith("access-control")]
    if status == 200:
        assert response.status == 200
    else:
        assert error_of(response, 403)["code"] == "origin_not_allowed"
