"""A chat page, and an endpoint as OpenAI's beside it. One thread generates; an answer asks it for one more bit of text when its client
has taken the last one. So answers take turns, a client that reads slowly holds up nobody, and one that has gone costs nothing more."""
import asyncio
import ipaddress
import json
import secrets
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.routing import Route

from minillm.fast_decode import FastDecoder
from minillm.generate import pieces, steps
from minillm.sft import answer_room, control_ids, encode_prompt

BODY, BUSY = 2**20, 64       # bytes of a request; requests at a time: an answer holds a key-value cache until it is taken
NUMBER, COUNT = (int, float), ((int,), lambda x: x >= 1, "a whole number from 1", None)
FIELDS = {                   # of a request: types, what else must hold, both in words, and the value when missing or null, if it may be
    "model": ((str,), bool, "the id of a model, see /v1/models"),
    "messages": ((list,), bool, 'a list of {"role": ..., "content": ...}'),
    "stream": ((bool,), lambda x: True, "true or false", False), "n": ((int,), lambda x: x == 1, "1: a request gets one answer here", 1),
    "stream_options": ((dict,), lambda x: isinstance(x.get("include_usage", False), bool), '{"include_usage": true or false}', {}),
    "max_tokens": COUNT, "max_completion_tokens": COUNT,
    "temperature": (NUMBER, lambda x: x == 0 or 0.001 <= x <= 2, "0 or a number from 0.001 to 2", 1.0),
    "top_p": (NUMBER, lambda x: 0.001 <= x <= 1, "a number from 0.001 to 1", None),
    "seed": ((int,), lambda x: -2**63 <= x < 2**63, "a whole number of 64 bits", None),
    "stop": ((list,), lambda x: len(x) <= 4 and all(type(s) is str and 0 < len(s) <= 100 for s in x), "up to 4 texts of 1 to 100 characters", []),
} | dict.fromkeys(           # what would have no effect; some clients send it with a value that asks for nothing
    ("tools", "functions", "logprobs", "logit_bias", "frequency_penalty", "presence_penalty", "response_format"),
    ((bool, list, dict, *NUMBER), lambda x: not x or x == {"type": "text"}, "left out, it has no effect here", None))


class Refusal(HTTPException):
    def __init__(self, status, message, param=None, code=None):
        super().__init__(status, message)
        self.param, self.code = param, code


def error_json(request, error):
    """The answer to an HTTPException, in OpenAI's form. Of any other error the client learns nothing: the server's log has it."""
    error = error if isinstance(error, HTTPException) else Refusal(500, "the server failed: its log says why")
    failed = error.status_code >= 500      # uvicorn closes the connection then: the client must not use it again
    kind, headers = ("server_error", {"connection": "close"}) if failed else ("invalid_request_error", error.headers)
    about = {name: getattr(error, name, None) for name in ("param", "code")}
    return JSONResponse({"error": {"message": error.detail, "type": kind} | about}, error.status_code, headers)


def foreign(headers, names):
    """A Refusal if a web page from elsewhere asks: its Origin says so, or its Host, a name that may be pointed here (DNS rebinding)."""
    host, origin = headers.get("host", "").lower(), headers.get("origin", "").lower()
    try:
        name = urlsplit(f"//{host}").hostname
        name in names or ipaddress.ip_address(name)
    except ValueError:
        return Refusal(403, f"{host!r:.80} is not this server: open it by its IP address", code="host_not_allowed")
    if origin and origin.partition("://")[2] != host:
        return Refusal(403, f"a page of {origin!r:.80} may not use this server", code="origin_not_allowed")


async def read_json(request):
    """The JSON value of the body. What is too much of it is read and forgotten: a client that cannot send all may not see the Refusal."""
    body = b""
    async for part in request.stream():
        body += part if len(body) <= BODY else b""
    if len(body) > BODY:
        raise Refusal(413, f"the body has more than {BODY:,} bytes")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None


def read_fields(body):
    """The values of FIELDS in a request's JSON. Raises Refusal, naming the field, for one that does not fit or would have no effect."""
    if not isinstance(body, dict):
        raise Refusal(400, f"the body must be a JSON object: got {type(body).__name__}")
    fields = {}
    for name, (types, fits, words, *default) in FIELDS.items():
        value = [body[name]] if name == "stop" and isinstance(body.get(name), str) else body.get(name)
        if (value is not None or not default) and (type(value) not in types or not fits(value)):
            raise Refusal(400, f"{name} must be {words}: got {value!r:.80}", name)
        fields[name] = default[0] if value is None else value
    return fields


def with_one_text(message):
    """A message whose content is a list of parts, as some clients send it, with their texts as one; any other as it is."""
    parts = message.get("content") if isinstance(message, dict) else None
    if not isinstance(parts, list) or not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
        return message
    return message | {"content": "".join(p["text"] for p in parts)}


def read_prompt(messages, model, tokenizer):
    """Ids of a dialogue, and how many tokens its answer may have. Raises Refusal for what the template cannot express, which a system
    message is, too: the model has not learnt to obey one, and to drop it in silence would be to answer something else."""
    code = None
    try:
        ids = encode_prompt([with_one_text(message) for message in messages], tokenizer)
        code = "context_length_exceeded"
        return ids, answer_room(ids, model)
    except (ValueError, TypeError) as error:
        raise Refusal(400, str(error), "messages", code) from None


def answer(model, tokenizer, prompt, limit, fields):
    """Yield an answer of at most `limit` tokens as text, bit by bit, "" too; then why it ended, and its usage. A special token ends it,
    or a string of `stop`, and is not of its text: what may become such a string waits until that is known."""
    special, made, held, cuts = set(tokenizer.special_tokens.values()), [], "", []
    ids = torch.tensor([prompt], device=next(model.parameters()).device)
    seed = secrets.randbits(63) if fields["seed"] is None else fields["seed"]

    def tokens():
        for new in steps(FastDecoder(model), ids, limit, fields["temperature"], seed=seed, top_p=fields["top_p"]):
            made.append(new.item())
            if made[-1] in special:
                break
            yield made[-1]

    for piece in pieces(tokenizer, tokens()):
        held += piece
        if cuts := [held.index(end) for end in fields["stop"] if end in held]:
            held = held[:min(cuts)]
            break
        wait = max((n for end in fields["stop"] for n in range(1, len(end)) if held.endswith(end[:n])), default=0)
        yield held[:len(held) - wait]
        held = held[len(held) - wait:]
    yield held
    usage = {"prompt_tokens": len(prompt), "completion_tokens": len(made), "total_tokens": len(prompt) + len(made)}
    yield "stop" if cuts or made[-1] in special else "length", usage


async def stream(head, event, take, with_usage):
    """The server-sent events of an answer: `event` is its first bit, take() brings the next."""
    def chunk(*choices, usage=None):
        return f"data: {json.dumps(head | {'object': 'chat.completion.chunk', 'choices': choices, 'usage': usage})}\n\n"
    try:
        yield chunk({"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})
        while isinstance(event, str):
            if event:
                yield chunk({"index": 0, "delta": {"content": event}, "finish_reason": None})
            event = await take()
        yield chunk({"index": 0, "delta": {}, "finish_reason": event[0]})
        if with_usage:
            yield chunk(usage=event[1])
        yield "data: [DONE]\n\n"
    except Exception as error:      # it is too late for a status
        asyncio.get_running_loop().call_exception_handler({"message": "an answer broke off", "exception": error})      # writes the log
        yield f"data: {error_json(None, error).body.decode()}\n\n"


def application(model, tokenizer, name, host="127.0.0.1"):
    """The server as an ASGI application. Raises ValueError if the tokenizer lacks a token of the chat template."""
    control_ids(tokenizer)
    worker, page = ThreadPoolExecutor(1), Path(__file__).with_name("chat.html").read_text(encoding="utf-8")
    models = {"object": "list", "data": [{"id": name, "object": "model", "created": int(time.time()), "owned_by": "minillm"}]}

    def check_model(asked):
        if asked != name:
            raise Refusal(404, f"there is no model {asked!r:.80} here, only {name!r}", "model", "model_not_found")

    def describe(request):
        check_model(request.path_params["id"])
        return JSONResponse(models["data"][0])

    async def complete(request):
        fields = read_fields(await read_json(request))
        check_model(fields["model"])
        prompt, room = await asyncio.to_thread(read_prompt, fields["messages"], model, tokenizer)
        limit = min(fields["max_completion_tokens"] or fields["max_tokens"] or room, room)
        take = partial(asyncio.get_running_loop().run_in_executor, worker, next, answer(model, tokenizer, prompt, limit, fields))
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}
        text, event = "", await take()      # an error up to here has a status of its own
        if fields["stream"]:
            lines = stream(head, event, take, fields["stream_options"].get("include_usage"))
            return StreamingResponse(lines, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        while isinstance(event, str):
            text += event
            if await request.is_disconnected():
                raise ClientDisconnect
            event = await take()
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": event[0]}
        return JSONResponse(head | {"object": "chat.completion", "choices": [choice], "usage": event[1]})

    routes = [Route("/", lambda request: HTMLResponse(page, headers={"x-frame-options": "DENY"})),
              Route("/health", lambda request: JSONResponse({"status": "ok"})), Route("/v1/models", lambda request: JSONResponse(models)),
              Route("/v1/models/{id:path}", describe), Route("/v1/chat/completions", complete, methods=["POST"])]
    app = Starlette(routes=routes, exception_handlers=dict.fromkeys((HTTPException, ClientDisconnect, Exception), error_json))
    under_way = 0

    async def guarded(scope, receive, send):
        nonlocal under_way
        if scope["type"] != "http":
            return await app(scope, receive, send)
        full = Refusal(503, f"{BUSY} requests are under way: ask again later", code="busy") if under_way >= BUSY else None
        refusal = foreign(Request(scope).headers, ("localhost", host.lower())) or full
        under_way += 1
        try:
            await (error_json(None, refusal) if refusal else app)(scope, receive, send)
        finally:
            under_way -= 1
    return guarded


def listen(host="127.0.0.1", port=8000):
    """A socket for serve; port 0 takes a free one. Raises ValueError if it cannot listen there."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on {host}, port {port} ({error}): choose another with --host or --port") from None


def serve(listener, model, tokenizer, name, host="127.0.0.1"):
    """Serve on the socket of listen(host, ...) until Ctrl-C. Raises ValueError as application."""
    app = application(model, tokenizer, name, host)
    url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    print(f"Chat: {url}   For OpenAI's clients: {url}/v1, model {name!r}   Ctrl-C ends it", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)).run(sockets=[listener])
