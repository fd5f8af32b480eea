"""A chat page and, beside it, an endpoint like OpenAI's: `python -m minillm serve`.

One thread generates. An answer asks that thread for its next bit of text when its client has taken
the last one. So answers take turns, a client that reads slowly holds up nobody, and one that has
disconnected costs nothing more.
"""
import asyncio
import ipaddress
import json
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
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
from minillm.model import Llama
from minillm.sft import answer_room, control_ids, encode_prompt
from minillm.tokenizer import Tokenizer

BODY = 2**20       # the most bytes of a request's body
BUSY = 64          # most requests at a time: an answer holds a key-value cache until it is taken


@dataclass(frozen=True)
class Field:
    """A field of a request, and which values it may have."""
    types: tuple[type, ...]                             # exactly these, no subclasses
    words: str                                          # what it must be, for the client to read
    fits: Callable[[Any], bool] = lambda value: True    # what else must hold
    default: Any = None                                 # the value if it is missing or null
    required: bool = False                              # it must not be missing or null


def short_texts(texts: list) -> bool:
    """Are these up to 4 texts of 1 to 100 characters?"""
    return len(texts) <= 4 and all(type(s) is str and 0 < len(s) <= 100 for s in texts)


COUNT = Field((int,), "a whole number from 1", fits=lambda n: n >= 1)
# For fields that would have no effect: some clients send them, with values that ask for nothing.
NO_EFFECT = Field((bool, list, dict, int, float, str), "left out (it has no effect here)",
                  fits=lambda value: not value or value in ({"type": "text"}, ["text"], "none"))

# Every field that a request may have, except those in IGNORED. Any other is refused.
FIELDS = {
    "model": Field((str,), "the id of a model, see /v1/models", fits=bool, required=True),
    "messages": Field((list,), 'a list of {"role": ..., "content": ...}', fits=bool, required=True),
    "stream": Field((bool,), "true or false", default=False),
    "n": Field((int,), "1: a request gets one answer here", fits=lambda n: n == 1, default=1),
    "stream_options": Field(
        (dict,), '{"include_usage": true or false}',
        fits=lambda options: type(options.get("include_usage")) in (bool, type(None)), default={}),
    "max_tokens": COUNT,
    "max_completion_tokens": COUNT,
    "temperature": Field((int, float), "0 or a number from 0.001 to 2",
                         fits=lambda t: t == 0 or 0.001 <= t <= 2, default=1.0),
    "top_p": Field((int, float), "a number from 0.001 to 1", fits=lambda p: 0.001 <= p <= 1),
    # These three are not OpenAI's, but many clients send them to servers like this one.
    "top_k": COUNT,
    "min_p": Field((int, float), "a number from 0 to 1", fits=lambda p: 0 <= p <= 1),
    "repetition_penalty": Field((int, float), "a number from 0.1 to 10",
                                fits=lambda x: 0.1 <= x <= 10, default=1.0),
    "seed": Field((int,), "a 64-bit integer", fits=lambda n: -2**63 <= n < 2**63),
    "stop": Field((list,), "up to 4 texts of 1 to 100 characters", fits=short_texts, default=[]),
    "tools": NO_EFFECT,
    "functions": NO_EFFECT,
    "logprobs": NO_EFFECT,
    "top_logprobs": NO_EFFECT,
    "logit_bias": NO_EFFECT,
    "frequency_penalty": NO_EFFECT,
    "presence_penalty": NO_EFFECT,
    "response_format": NO_EFFECT,
    "modalities": NO_EFFECT,
    "reasoning_effort": NO_EFFECT,
}

# Fields that change no answer: OpenAI's bookkeeping, and choices among tools, of which there are
# none.
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
           "prompt_cache_retention", "tool_choice", "function_call", "parallel_tool_calls")
# The same in a message: several clients always send the name of the user.
IGNORED_IN_MESSAGES = ("name",)
SILENCE = "..."    # stands for an empty answer in the dialogue that follows


class Refusal(HTTPException):
    """An error for the client to read, with the field to blame and a code, as OpenAI's have."""

    def __init__(self, status: int, message: str, param: str | None = None,
                 code: str | None = None) -> None:
        super().__init__(status, message)
        self.param, self.code = param, code


def error_json(request: Request | None, error: Exception) -> JSONResponse:
    """The response to an error, in OpenAI's form.

    Unless it is an HTTPException, the client only learns that the server failed: the log says why.
    """
    if not isinstance(error, HTTPException):
        error = Refusal(500, "the server failed: its log says why")
    kind, headers = "invalid_request_error", error.headers
    if error.status_code >= 500:
        # uvicorn closes the connection after these, so the client must not use it again
        kind, headers = "server_error", {"connection": "close"}
    about = {"message": error.detail, "type": kind,
             "param": getattr(error, "param", None), "code": getattr(error, "code", None)}
    return JSONResponse({"error": about}, error.status_code, headers)


def foreign(headers: Mapping[str, str], names: Iterable[str]) -> Refusal | None:
    """A Refusal if the request comes from a web page of another site, else None.

    Its Origin shows that, or its Host: a name that is not in `names`, and is not an IP address, may
    have been pointed at this machine by that site (DNS rebinding).
    """
    host, origin = headers.get("host", "").lower(), headers.get("origin", "").lower()
    try:
        name = urlsplit(f"//{host}").hostname
        if name not in names:
            ipaddress.ip_address(name)      # ValueError if it is not an address either
    except ValueError:
        return Refusal(403, f"{host!r:.80} is not a name of this server: open it by its IP address",
                       code="host_not_allowed")
    if origin and origin.partition("://")[2] != host:
        return Refusal(403, f"a page of {origin!r:.80} may not use this server",
                       code="origin_not_allowed")


async def read_json(request: Request) -> Any:
    """The JSON value of the body.

    The rest of a body that is too long is read and discarded, because a client that cannot send all
    of it may not see the Refusal. Raises Refusal for such a body, and for one that is not JSON.
    """
    body = b""
    async for part in request.stream():
        body += part if len(body) <= BODY else b""
    if len(body) > BODY:
        raise Refusal(413, f"the body has more than {BODY:,} bytes")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None


def read_fields(body: Any) -> dict[str, Any]:
    """The values of FIELDS in a request's JSON.

    Null counts as not given. Raises Refusal, naming the field, for one that does not fit or would
    have no effect.
    """
    if not isinstance(body, dict):
        raise Refusal(400, f"the body must be a JSON object: got {type(body).__name__}")
    for name, value in body.items():
        if value is not None and name not in FIELDS and name not in IGNORED:
            raise Refusal(400, f"{name[:40]!r} is unknown here: leave it out", name[:40])
    values = {}
    for name, field in FIELDS.items():
        value = body.get(name)
        if name == "stop" and isinstance(value, str):
            value = [value]
        if value is None and not field.required:
            values[name] = field.default
        elif type(value) in field.types and field.fits(value):
            values[name] = value
        else:
            raise Refusal(400, f"{name} must be {field.words}: got {value!r:.80}", name)
    return values


def is_text_part(part: Any) -> bool:
    """Is this {"type": "text", "text": ...}, a part of a message's content?"""
    return (isinstance(part, dict) and part.get("type") == "text"
            and isinstance(part.get("text"), str))


def read_message(message: Any, place: str) -> Any:
    """A message as our template takes it.

    Several texts, as some clients send them, become one; an answer that was empty becomes SILENCE,
    so that a client may send back whatever it got. Other faults are left to the template. Raises
    ValueError, naming the place, for a key that would have no effect.
    """
    if not isinstance(message, dict):
        return message
    for key, value in message.items():
        known = key in ("role", "content", *IGNORED_IN_MESSAGES)
        if not known and value not in (None, [], ""):
            raise ValueError(f"{place} has {key[:40]!r}, which has no effect here: leave it out")
    content = message.get("content")
    if isinstance(content, list) and all(is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    if message.get("role") == "assistant":
        empty = content is None or isinstance(content, str) and not content.strip()
        content = SILENCE if empty else content
    return message | {"content": content}


def read_prompt(messages: list, model: Llama, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """Ids of a dialogue, and how many tokens its answer may have.

    Raises Refusal for what the template cannot express. A system message is refused, too: the model
    has not learned to obey one, and dropping it silently would answer a different dialogue.
    """
    code = None
    try:
        read = [read_message(message, f"message {i}") for i, message in enumerate(messages)]
        ids = encode_prompt(read, tokenizer)
        code = "context_length_exceeded"
        return ids, answer_room(ids, model)
    except (ValueError, TypeError) as error:
        tokenizer.cache.clear()        # otherwise, refused long words would fill the memory
        raise Refusal(400, str(error), "messages", code) from None


def begun(text: str, stops: list[str]) -> int:
    """How many characters at the end of a text may be the beginning of a string in `stops`."""
    lengths = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return max(lengths, default=0)


def answer(model: Llama, tokenizer: Tokenizer, prompt: list[int], limit: int,
           fields: dict[str, Any]) -> Iterator[str | tuple[str, dict[str, int]]]:
    """Yield an answer of at most `limit` tokens as text, bit by bit (a bit may be "").

    The last item is (finish_reason, usage). A special token ends the answer, or a string of `stop`,
    which is not part of its text: what may become such a string waits until that is known.
    """
    special = set(tokenizer.special_tokens.values())
    ids = torch.tensor([prompt], device=next(model.parameters()).device)
    seed = secrets.randbits(63) if fields["seed"] is None else fields["seed"]
    made = []               # ids so far

    def tokens():
        for new in steps(FastDecoder(model), ids, limit, fields["temperature"],
                         fields["repetition_penalty"], seed, top_k=fields["top_k"],
                         top_p=fields["top_p"], min_p=fields["min_p"]):
            made.append(new.item())
            if made[-1] in special:
                break
            yield made[-1]

    held, cuts = "", []     # text that waits, and where strings of `stop` begin in it
    for piece in pieces(tokenizer, tokens()):
        held += piece
        if cuts := [held.index(stop) for stop in fields["stop"] if stop in held]:
            held = held[:min(cuts)]
            break
        sure = len(held) - begun(held, fields["stop"])
        yield held[:sure]
        held = held[sure:]
    yield held
    reason = "stop" if cuts or made[-1] in special else "length"
    yield reason, {"prompt_tokens": len(prompt), "completion_tokens": len(made),
                   "total_tokens": len(prompt) + len(made)}


async def stream(head: dict, event: str | tuple, take: Callable[[], Awaitable],
                 with_usage: bool | None) -> AsyncIterator[str]:
    """The server-sent events of an answer: `event` is its first bit, and take() brings the next."""
    def chunk(*choices, usage=None):
        data = head | {"object": "chat.completion.chunk", "choices": choices, "usage": usage}
        return f"data: {json.dumps(data)}\n\n"

    def part(delta, reason=None):
        return chunk({"index": 0, "delta": delta, "finish_reason": reason})

    try:
        yield part({"role": "assistant", "content": ""})
        while isinstance(event, str):
            if event:
                yield part({"content": event})
            event = await take()
        reason, usage = event
        yield part({}, reason)
        if with_usage:
            yield chunk(usage=usage)
        yield "data: [DONE]\n\n"
    except Exception as error:      # it is too late for an error status; this handler logs it
        asyncio.get_running_loop().call_exception_handler(
            {"message": "an answer broke off", "exception": error})
        yield f"data: {error_json(None, error).body.decode()}\n\n"


def application(model: Llama, tokenizer: Tokenizer, name: str,
                host: str = "127.0.0.1") -> Callable[..., Awaitable[None]]:
    """The server as an ASGI application.

    name: the id of the model. host: the name by which requests may reach the server, besides
    localhost and IP addresses. Raises ValueError if the tokenizer lacks a token of the chat
    template.
    """
    control_ids(tokenizer)
    worker = ThreadPoolExecutor(1)
    page = Path(__file__).with_name("chat.html").read_text(encoding="utf-8")
    about = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "minillm"}

    def check_model(asked):
        if asked != name:
            raise Refusal(404, f"there is no model {asked!r:.80} here, only {name!r}", "model",
                          "model_not_found")

    def show_page(request):
        return HTMLResponse(page, headers={"x-frame-options": "DENY"})

    def health(request):
        return JSONResponse({"status": "ok"})

    def list_models(request):
        return JSONResponse({"object": "list", "data": [about]})

    def describe(request):
        check_model(request.path_params["id"])
        return JSONResponse(about)

    async def complete(request):
        fields = read_fields(await read_json(request))
        check_model(fields["model"])
        prompt, room = await asyncio.to_thread(read_prompt, fields["messages"], model, tokenizer)
        limit = min(fields["max_completion_tokens"] or fields["max_tokens"] or room, room)
        bits = answer(model, tokenizer, prompt, limit, fields)
        take = partial(asyncio.get_running_loop().run_in_executor, worker, next, bits)
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()),
                "model": name}
        event = await take()      # an error up to here still gets a status of its own
        if fields["stream"]:
            lines = stream(head, event, take, fields["stream_options"].get("include_usage"))
            return StreamingResponse(lines, media_type="text/event-stream",
                                     headers={"cache-control": "no-cache"})
        text = ""
        while isinstance(event, str):
            text += event
            if await request.is_disconnected():
                raise ClientDisconnect
            event = await take()
        reason, usage = event
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": reason}
        return JSONResponse(
            head | {"object": "chat.completion", "choices": [choice], "usage": usage})

    routes = [
        Route("/", show_page),
        Route("/health", health),
        Route("/v1/models", list_models),
        Route("/v1/models/{id:path}", describe),
        Route("/v1/chat/completions", complete, methods=["POST"]),
    ]
    handlers = dict.fromkeys((HTTPException, ClientDisconnect, Exception), error_json)
    app = Starlette(routes=routes, exception_handlers=handlers)
    under_way = 0

    async def guarded(scope, receive, send):
        nonlocal under_way
        if scope["type"] != "http":
            return await app(scope, receive, send)
        refusal = foreign(Request(scope).headers, ("localhost", host.lower()))
        if not refusal and under_way >= BUSY:
            refusal = Refusal(503, f"{BUSY} requests are under way: ask again later", code="busy")
        respond = error_json(None, refusal) if refusal else app
        under_way += 1
        try:
            await respond(scope, receive, send)
        finally:
            under_way -= 1
    return guarded


def listen(host: str = "127.0.0.1", port: int = 8000) -> socket.socket:
    """A socket for serve; port 0 takes a free one. Raises ValueError if it cannot listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on {host}, port {port} ({error}): "
                         "choose another with --host or --port") from None


def serve(listener: socket.socket, model: Llama, tokenizer: Tokenizer, name: str,
          host: str = "127.0.0.1") -> None:
    """Serve on the socket of listen(host, ...) until Ctrl-C.

    Raises ValueError as application does.
    """
    app = application(model, tokenizer, name, host)
    place = f"[{host}]" if ":" in host else host
    url = f"http://{place}:{listener.getsockname()[1]}"
    print(f"Chat: {url}   For OpenAI's clients: {url}/v1, model {name!r}   Ctrl-C stops it",
          flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
    uvicorn.Server(config).run(sockets=[listener])
