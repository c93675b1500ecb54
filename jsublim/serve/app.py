"""The server: OpenAI's paths, each request to rows of the engine, and back to one answer or a stream of its parts."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect

from jsublim.core.reading import shown
from jsublim.errors import JsublimError, UsageError, one_line
from jsublim.inference.sampling import Sampling
from jsublim.serve import wire
from jsublim.serve.answers import AnswerText, chat_logprobs, completion_logprobs
from jsublim.serve.catalogue import Catalogue
from jsublim.serve.engine import AnswerJob, Engine, Reading
from jsublim.serve.wire import ChatCompletion, Completion, failure

KEY = "JSUBLIM_API_KEY"  # of the environment; clients send it as their API key
MOST_WAITING = 4096  # rows; who comes then is asked to come again
LOOK = 0.5  # seconds between looks at whether a client is still there
SEEDS = 2**31


@dataclass
class ServeLimits:
    """What one request may take."""

    slots: int = 32  # rows that are decoded at one time
    length: int = 1024  # tokens of a prompt and its answer
    seconds: float = 600.0


class BadRequest(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass
class Asked:
    """A request, and its answers as they come."""

    body: Completion | ChatCompletion
    prompts: list[np.ndarray]
    jobs: list[AnswerJob]
    events: asyncio.Queue[tuple[int, list[int], str | JsublimError | None]]
    texts: list[AnswerText]
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def chat(self) -> bool:
        return isinstance(self.body, ChatCompletion)

    @property
    def echo(self) -> bool:
        return isinstance(self.body, Completion) and bool(self.body.echo)

    @property
    def samples(self) -> int:
        return self.body.n or 1

    def usage(self) -> dict[str, int]:
        read, drawn = sum(map(len, self.prompts)), sum(len(text.tokens) for text in self.texts)
        return {"prompt_tokens": read, "completion_tokens": drawn, "total_tokens": read + drawn}

    def wrapped(self, choices: list[dict[str, Any]], *, part: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if part else "chat.completion") if self.chat else "text_completion"
        about = {"id": self.id, "object": kind, "created": self.created, "model": self.body.model}
        return about | {"choices": choices}


def make_app(catalogue: Catalogue, limits: ServeLimits, say: Callable[[str], None]) -> Any:
    """The ASGI application; `say` is told a line about each request. The key is that of the environment (`KEY`), if there is one."""
    service = Service(catalogue, limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.engine.close)

    app = FastAPI(title="jsublim", version=version("jsublim"), lifespan=lifespan, docs_url=None, redoc_url=None)
    key = os.environ.get(KEY)

    def answered(handle: Callable[[Request], Any]) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            try:
                given = request.headers.get("authorization", "").removeprefix("Bearer ")
                if key and not hmac.compare_digest(given.encode(), key.encode()):
                    raise BadRequest(401, f"wrong or no API key; it is {KEY} of the server's environment")
                return await handle(request)
            except BadRequest as refusal:
                return JSONResponse(failure(str(refusal)), refusal.status)
            except JsublimError as error:
                return JSONResponse(failure(one_line(str(error))), 400)
            except ClientDisconnect:  # before it had sent all of its request
                return Response(status_code=499)
            except Exception as error:
                message = f"{type(error).__name__}: {one_line(str(error))}"
                request.scope["about"] = message
                return JSONResponse(failure(message, "server_error"), 500)

        return answer

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [service.card(name) for name in catalogue.names]})

    async def model(request: Request) -> Response:
        return JSONResponse(service.card(service.known(request.path_params["name"])))

    async def about(_: Request) -> Response:
        return JSONResponse({"version": version("jsublim")})

    async def chat(request: Request) -> Response:
        return await service.answer(request, ChatCompletion)

    async def complete(request: Request) -> Response:
        return await service.answer(request, Completion)

    for path, handle, method in (
        ("/v1/models", models, "GET"), ("/v1/models/{name:path}", model, "GET"), ("/version", about, "GET"), ("/health", about, "GET"),
        ("/v1/chat/completions", chat, "POST"), ("/v1/completions", complete, "POST"),
    ):  # fmt: skip
        app.add_route(path, answered(handle), methods=[method])
    return logged(app, say)


def logged(app: Any, say: Callable[[str], None]) -> Any:
    """The application, with a line about each request once it is over, however it ends."""

    async def told(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        began, ended = time.monotonic(), {"status": 0, "whole": False}

        async def sent(message: Any) -> None:
            await send(message)
            ended["status"] = message.get("status", ended["status"])
            ended["whole"] = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await app(scope, receive, sent)
        finally:
            cut = "" if ended["whole"] and not scope.get("gone") else ", the client left"
            about = f" {scope['about']}" if "about" in scope else ""
            path = ascii(scope["path"])[1:-1][:100]
            say(f"{ended['status'] or 499} {scope['method']} {path}{about}, {time.monotonic() - began:.2f} s{cut}")

    return told


class Service:
    """Requests to a catalogue's models."""

    def __init__(self, catalogue: Catalogue, limits: ServeLimits):
        self.catalogue, self.limits, self.lm = catalogue, limits, catalogue.lm
        self.engine = Engine(self.lm, catalogue.adapter, slots=limits.slots, length=limits.length)

    def card(self, name: str) -> dict[str, Any]:
        card = {"id": name, "object": "model", "created": 0, "owned_by": "jsublim", "root": self.catalogue.root(name)}
        return card | {"max_model_len": self.limits.length}

    def known(self, name: str) -> str:
        if name not in self.catalogue.names:
            raise BadRequest(404, f"the model {shown(name)} does not exist; /v1/models lists those that do")
        return name

    async def answer(self, request: Request, kind: type[Completion] | type[ChatCompletion]) -> Response:
        body = wire.read(kind, await _body(request))
        request.scope["about"] = f"'{self.known(body.model)}'"
        asked = self.asked(body)
        if self.engine.waiting + len(asked.jobs) > MOST_WAITING:
            raise BadRequest(429, "too many requests wait; ask again later")
        for job in asked.jobs:
            self.engine.add(job)
        if body.stream:
            return StreamingResponse(self.stream(request, asked), media_type="text/event-stream")
        try:
            return JSONResponse(await self.whole(request, asked))
        finally:
            _over(request, asked)

    # --- what is asked for

    def asked(self, body: Completion | ChatCompletion) -> Asked:
        """Rows for the engine. Raises JsublimError, BadRequest: tokens that the model does not have, or rows that are too long."""
        prompts = self.prompts(body)
        room = self.limits.length - max(map(len, prompts))
        given = body.max_tokens if isinstance(body, Completion) else body.max_completion_tokens or body.max_tokens
        most = (16 if isinstance(body, Completion) else room) if given is None else given
        if min(map(len, prompts)) < 1 or most > room or (most < 1 and not (isinstance(body, Completion) and body.echo)):
            longest = max(map(len, prompts))
            raise BadRequest(
                400,
                f"max_tokens: {most} given, after a prompt of {longest} tokens; the server has {self.limits.length} for both",
            )
        seed = secrets.randbelow(SEEDS) if body.seed is None else body.seed % SEEDS
        events, loop = asyncio.Queue[Any](), asyncio.get_running_loop()
        sampling, deadline = self.sampling(body), time.monotonic() + self.limits.seconds

        def told(number: int) -> Callable[[list[int], str | JsublimError | None], None]:
            return lambda tokens, why: _call(loop, events.put_nowait, (number, tokens, why))

        samples = body.n or 1
        rows = range(len(prompts) * samples if most else 0)
        jobs = [AnswerJob(body.model, prompts[i // samples], sampling, most, seed, i, deadline, told(i)) for i in rows]
        texts = [AnswerText(self.lm.tokenizer, body.stops) for _ in range(len(prompts) * samples)]
        return Asked(body, prompts, jobs, events, texts)

    def prompts(self, body: Completion | ChatCompletion) -> list[np.ndarray]:
        if isinstance(body, ChatCompletion):
            return [self.lm.chat.prompt_tokens([message.plain for message in body.messages])]
        several = isinstance(body.prompt, list) and body.prompt and not isinstance(body.prompt[0], int)
        prompts = []
        for prompt in body.prompt if several else [body.prompt]:
            if isinstance(prompt, str) and len(prompt) > 64 * self.limits.length:
                raise BadRequest(400, f"prompt: {len(prompt)} characters are more than {self.limits.length} tokens")
            ids = self.lm.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
            tokens = np.asarray(ids, np.int32)
            if len(tokens) and tokens.max() >= self.lm.config.vocab_size:
                raise BadRequest(400, f"prompt: token {tokens.max()}; the model has {self.lm.config.vocab_size}")
            prompts.append(tokens)
        if not prompts:
            raise BadRequest(400, "prompt: it is empty")
        return prompts

    def sampling(self, body: Completion | ChatCompletion) -> Sampling:
        stop = () if body.ignore_eos else self.lm.chat.stop_tokens
        return Sampling(
            1.0 if body.temperature is None else body.temperature,
            max(body.top_k or 0, 0),
            1.0 if body.top_p is None else body.top_p,
            1.0 if body.repetition_penalty is None else body.repetition_penalty,
            (*stop, *(body.stop_token_ids or ())),
        )

    # --- what is answered

    async def parts(self, request: Request, asked: Asked) -> AsyncIterator[tuple[int, str, str | None]]:
        """The text that is added to each answer, by its number, and with the last part why it has ended. A client that has gone ends all."""
        going = {job.row for job in asked.jobs}
        try:
            while going:
                try:
                    number, tokens, why = await asyncio.wait_for(asked.events.get(), LOOK)
                except TimeoutError:
                    if await request.is_disconnected():
                        request.scope["gone"] = True
                        return
                    continue
                if isinstance(why, JsublimError):
                    raise BadRequest(503, str(why))
                if number not in going:
                    continue  # ended by a text, while more was drawn
                text = asked.texts[number]
                new = text.add(tokens, last=why is not None)
                if text.stopped:
                    why, asked.jobs[number].cancelled = "stop", True
                if why is not None:
                    going.discard(number)
                yield number, new, "length" if why == "time" else why
        finally:
            for job in asked.jobs:
                job.cancelled = True

    async def whole(self, request: Request, asked: Asked) -> dict[str, Any]:
        ended: dict[int, str | None] = {}
        async for number, _, why in self.parts(request, asked):
            if why is not None:
                ended[number] = why
        choices = []
        for number, text in enumerate(asked.texts):
            prompt = asked.prompts[number // asked.samples].tolist()
            choice: dict[str, Any] = {"index": number, "finish_reason": ended.get(number, "length"), "logprobs": None}
            if asked.chat:
                choice["message"] = {"role": "assistant", "content": text.whole, "refusal": None}
            else:
                shown = self.lm.tokenizer.decode(prompt, skip_special_tokens=True) if asked.echo else ""
                choice["text"] = shown + text.whole
            if asked.body.best is not None and not request.scope.get("gone"):
                choice["logprobs"] = await self.logprobs(asked, prompt, text.tokens, 0 if asked.echo else len(prompt))
            if asked.body.return_token_ids:
                choice["token_ids"] = text.tokens
            choices.append(choice)
        return asked.wrapped(choices, part=False) | {"usage": asked.usage()}

    async def stream(self, request: Request, asked: Asked) -> AsyncIterator[str]:
        """Server-sent events: a part of one answer each."""
        try:
            if asked.chat:
                for number in range(len(asked.texts)):
                    yield _event(asked.wrapped([_delta(number, {"role": "assistant", "content": ""})], part=True))
            elif asked.echo:
                for number in range(len(asked.texts)):
                    prompt = asked.prompts[number // asked.samples].tolist()
                    text = self.lm.tokenizer.decode(prompt, skip_special_tokens=True)
                    logprobs = None if asked.body.best is None else await self.logprobs(asked, prompt, [], 0)
                    ended = None if asked.jobs else "length"
                    choice = {"index": number, "text": text, "logprobs": logprobs, "finish_reason": ended}
                    yield _event(asked.wrapped([choice], part=True))
            told = [0] * len(asked.texts)
            async for number, new, why in self.parts(request, asked):
                tokens, logprobs = asked.texts[number].tokens, None
                if asked.body.best is not None and len(tokens) > told[number]:
                    prompt = asked.prompts[number // asked.samples].tolist()
                    logprobs = await self.logprobs(asked, prompt, tokens, len(prompt) + told[number])
                if new or why or logprobs:
                    choice = {"index": number, "text": new, "logprobs": logprobs, "finish_reason": why}
                    if asked.chat:
                        choice = _delta(number, {"content": new} if new else {}, why) | {"logprobs": logprobs}
                    if asked.body.return_token_ids:
                        choice["token_ids"] = tokens[told[number] :]
                    told[number] = len(tokens)
                    yield _event(asked.wrapped([choice], part=True))
            if asked.body.stream_options is not None and asked.body.stream_options.include_usage:
                yield _event(asked.wrapped([], part=True) | {"usage": asked.usage()})
            yield "data: [DONE]\n\n"
        except (BadRequest, JsublimError) as error:  # the status was sent long ago
            yield _event(failure(one_line(str(error)), "server_error"))
        finally:
            _over(request, asked)

    async def logprobs(self, asked: Asked, prompt: list[int], drawn: Sequence[int], first: int) -> dict[str, Any]:
        """The probabilities of an answer's tokens, and of its prompt's if they are asked for: those from number `first` on."""
        tokens, read = [*prompt, *drawn], None
        if len(tokens) > max(first, 1):
            future, loop = asyncio.get_running_loop().create_future(), asyncio.get_running_loop()
            ids = np.asarray(tokens, np.int32)
            self.engine.add(Reading(asked.body.model, ids, lambda x: _call(loop, _settle, future, x)))
            read = await future
            if isinstance(read, JsublimError):
                raise BadRequest(503, str(read))
        write = chat_logprobs if asked.chat else completion_logprobs
        return write(self.lm.tokenizer, tokens, read, asked.body.best or 0, first=first)


def _over(request: Request, asked: Asked) -> None:
    """Nothing more is wanted of a request; what is said of it in the log."""
    for job in asked.jobs:
        job.cancelled = True
    usage = asked.usage()
    request.scope["about"] += f" {usage['prompt_tokens']}+{usage['completion_tokens']} tokens"


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., Any], *given: Any) -> None:
    """Have the server's thread call something; a loop that has ended wants nothing."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *given)


def _settle(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():  # of a client that left
        future.set_result(value)


def _delta(number: int, delta: dict[str, Any], why: str | None = None) -> dict[str, Any]:
    return {"index": number, "delta": delta, "finish_reason": why}


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _body(request: Request) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > wire.BODY:
            raise BadRequest(413, f"the request is larger than {wire.BODY >> 20} MiB")
    return b"".join(parts)


def check_address(host: str) -> None:
    """Refuse to be open to a network without a key (UsageError)."""
    if host not in ("127.0.0.1", "::1", "localhost") and not os.environ.get(KEY):
        raise UsageError(
            f"--host: {host} can be reached by others; set {KEY} in the environment, and give it to clients"
        )
