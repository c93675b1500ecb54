"""Any server with OpenAI's chat-completions interface as a judge: vLLM, `transformers serve`, a paid service."""

from __future__ import annotations

import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from jsublim.chat import conversation
from jsublim.errors import JsublimError, UsageError
from jsublim.judge.cache import Reply, ReplyCache
from jsublim.judge.limits import Pace, Spending, Tokens, backoff, retry_after
from jsublim.section import HOW, RESULT, Section

TEMPLATE_TOKENS = 256  # more than any chat template puts around a prompt
LONGEST_HOLD_S = 600.0  # a server that asks for a longer wait than this ends the run
SHOWN = 200  # characters of a server's own words in an error


class ServerSettings(Section):
    """Where the judge is, how it is asked, and what it may cost. The key itself is never a setting."""

    # such as http://localhost:8000/v1
    base_url: Annotated[str, Field(pattern=r"^https?://[^/?#@\s]+(/[^?#@\s]*)?$"), HOW]
    model: Annotated[str, Field(min_length=1), RESULT]
    # The environment variable that holds the key; None sends none.
    key_variable: Annotated[str | None, Field(pattern=r"^[A-Z_][A-Z0-9_]*$"), HOW] = None
    system: Annotated[str | None, RESULT] = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False), RESULT] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1), RESULT] = 1.0
    max_tokens: Annotated[int, Field(ge=1), RESULT] = 32
    seed: Annotated[int | None, RESULT] = None
    timeout_s: Annotated[float, Field(gt=0), HOW] = 60.0  # without a byte from the server
    retries: Annotated[int, Field(ge=0), HOW] = 6
    concurrency: Annotated[int, Field(ge=1), HOW] = 8
    requests_per_minute: Annotated[float | None, Field(gt=0), HOW] = None
    prompt_price: Annotated[float, Field(ge=0), HOW] = 0.0  # per million tokens, in any one currency
    completion_price: Annotated[float, Field(ge=0), HOW] = 0.0
    budget: Annotated[float | None, Field(ge=0), HOW] = None  # of one judge object, in the currency of the prices

    @model_validator(mode="after")
    def _priced(self) -> ServerSettings:
        if self.budget is not None and not (self.prompt_price or self.completion_price):
            raise ValueError("a budget needs prompt_price and completion_price")
        return self


class _Retry(Exception):
    """A failure that may pass. `charged`: the server may have worked, and may charge for it."""

    def __init__(self, reason: str, *, after: float | None = None, charged: bool = False):
        super().__init__(reason)
        self.after, self.charged = after, charged


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None  # the key would go along to wherever the answer points


_OPENER = urllib.request.build_opener(_NoRedirect)


class ServerJudge:
    """Asks a server from several threads, within a rate and a budget. Every reply is kept in the folder `cache` at once;
    a reply that is there costs nothing, and needs neither network nor key.

    `spending` counts tokens and cost.
    """

    def __init__(self, settings: ServerSettings, cache: Path):
        self.settings = settings
        self.spending = Spending(settings.prompt_price, settings.completion_price, settings.budget)
        self._cache, self._pace = ReplyCache(cache), Pace(settings.requests_per_minute)

    @property
    def identity(self) -> dict[str, Any]:
        """Model, system prompt and sampling numbers: a reply does not depend on the address that serves it."""
        return self._request("{prompt}")

    def check(self) -> None:
        """Raises `UsageError` where a key is wanted and none is usable."""
        self._key()

    def release_memory(self) -> None:
        pass

    def ask(self, prompts: Sequence[str]) -> list[str]:
        """One reply per prompt, in order. A prompt that occurs twice is asked once.

        Raises:
          UsageError: no usable key.
          JsublimError: the server refuses, keeps failing, or the budget could be exceeded. Replies so far are kept.
        """
        stopped, unique = threading.Event(), list(dict.fromkeys(prompts))
        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            pending = [pool.submit(self._reply, prompt, stopped) for prompt in unique]
            try:
                done, _ = wait(pending, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            finally:  # on an error or an interrupt: no new requests, those under way are kept
                stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
        found = {prompt: future.result() for prompt, future in zip(unique, pending, strict=True)}
        return [found[prompt] for prompt in prompts]

    def _request(self, prompt: str) -> dict[str, Any]:
        """The body of a request, which is also what its reply is kept under."""
        s = self.settings
        seed = {} if s.seed is None else {"seed": s.seed}
        numbers = {"temperature": s.temperature, "top_p": s.top_p, "max_tokens": s.max_tokens} | seed
        return {"model": s.model, "messages": conversation(prompt, s.system)} | numbers

    def _reply(self, prompt: str, stopped: threading.Event) -> str:
        request = self._request(prompt)
        reply = self._cache.get(request)
        if reply is None:
            reply = self._patiently(request, stopped)
            self._cache.put(request, reply)
        return reply.text

    def _patiently(self, request: dict[str, Any], stopped: threading.Event) -> Reply:
        """The server's reply; after a failure that may pass, it is asked for again."""
        key, reason = self._key(), ""
        for attempt in range(self.settings.retries + 1):
            self._pace.wait(stopped)
            if stopped.is_set():
                raise CancelledError
            try:
                return self._charged(request, key)
            except _Retry as failure:
                reason = str(failure)
                if failure.after is not None and failure.after > LONGEST_HOLD_S:
                    raise self._error(f"{reason}, and it asks to wait for {failure.after:.0f} s") from None
                if failure.after is not None:
                    self._pace.hold(failure.after)
                elif attempt < self.settings.retries:
                    stopped.wait(backoff(attempt))
        raise self._error(f"{reason} ({self.settings.retries + 1} attempts; run again to go on)")

    def _charged(self, request: dict[str, Any], key: str | None) -> Reply:
        """One attempt, within the budget. If the server may have charged for a failure, its highest possible cost is counted."""
        size = sum(len(message["content"].encode("utf-8", "replace")) for message in request["messages"])
        most: Tokens = (size + TEMPLATE_TOKENS, self.settings.max_tokens)  # a token is at least a byte
        self.spending.reserve(most)
        used: Tokens = (0, 0)
        try:
            reply = self._post(request, key)
            used = (
                most[0] if reply.prompt_tokens is None else reply.prompt_tokens,
                most[1] if reply.completion_tokens is None else reply.completion_tokens,
            )
            return reply
        except _Retry as failure:
            used = most if failure.charged else used
            raise
        finally:
            self.spending.settle(most, used)

    def _post(self, request: dict[str, Any], key: str | None) -> Reply:
        headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
        url = f"{self.settings.base_url.rstrip('/')}/chat/completions"
        post = urllib.request.Request(url, json.dumps(request).encode(), headers)
        try:
            with _OPENER.open(post, timeout=self.settings.timeout_s) as response:
                return _read(response.read())
        except urllib.error.HTTPError as refusal:
            with refusal:
                raise self._refusal(refusal, key) from None
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            late = isinstance(reason, TimeoutError)
            what = f"no answer within {self.settings.timeout_s:g} s" if late else f"the connection failed ({reason})"
            # A URLError means that nothing was sent, unless it is a time-out.
            raise _Retry(what, charged=late or not isinstance(error, urllib.error.URLError)) from None

    def _refusal(self, refusal: urllib.error.HTTPError, key: str | None) -> Exception:
        """What an HTTP status other than success means. A body that may quote the refused key is not shown."""
        status = f"HTTP {refusal.code}"
        if refusal.code in (408, 429) or refusal.code >= 500:
            return _Retry(status, after=retry_after(refusal.headers.get("Retry-After")))
        if refusal.code in (401, 403):
            variable = self.settings.key_variable
            fix = f"set the right key in {variable}" if variable else "name the key's variable in 'key_variable'"
            return self._error(f"{status}: it does not let us in; {fix}")
        words = _words(refusal)
        return self._error(f"{status}: {(words if key is None else words.replace(key, '***'))[:SHOWN]}")

    def _key(self) -> str | None:
        name = self.settings.key_variable
        if name is None:
            return None
        key = os.environ.get(name, "").strip()
        if not key:
            raise UsageError(f"judge: environment variable {name} is not set; it must hold the server's key")
        if not (key.isascii() and key.isprintable() and " " not in key):  # http.client would quote it in its error
            raise UsageError(f"judge: environment variable {name} holds characters that no key can have")
        return key

    def _error(self, reason: str) -> JsublimError:
        return JsublimError(f"judge '{self.settings.model}' at {self.settings.base_url}: {reason}")


def _words(refusal: urllib.error.HTTPError) -> str:
    """What a server says beside its status, in one line."""
    try:
        return " ".join(refusal.read().decode("utf-8", "replace").split())
    except (OSError, http.client.HTTPException):
        return "(its text could not be read)"


class _Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Message(BaseModel):
    content: str | None = None  # a model that ended before its first word has none


class _Choice(BaseModel):
    message: _Message


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


def _read(body: bytes) -> Reply:
    try:
        value = _Completion.model_validate_json(body)
    except ValidationError:
        raise _Retry("the response is not a chat completion", charged=True) from None
    usage = value.usage or _Usage()
    return Reply(value.choices[0].message.content or "", usage.prompt_tokens, usage.completion_tokens)
