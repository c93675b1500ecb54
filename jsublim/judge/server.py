"""Any server with OpenAI's chat-completions interface as a judge: vLLM, `transformers serve`, a paid service."""

from __future__ import annotations

import copy
import http.client
import json
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, wait
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from jsublim.chat import conversation
from jsublim.errors import JsublimError, UsageError
from jsublim.judge.cache import Reply, ReplyCache
from jsublim.judge.limits import Pace, Spending, Tokens, backoff, retry_after
from jsublim.section import HOW, RESULT, Section

TEMPLATE_TOKENS = 256  # more than any chat template puts around a prompt
LONGEST_HOLD_S = 600.0  # a server that asks for a longer wait than this ends the run
SHOWN = 200  # characters of a server's own words in an error
MOST_TOKENS = 10**9  # of one request: a larger number in a reply is a mistake
ADDRESS = re.compile(r"https?://[^/?#@\s]+(/[^?#@\s]*)?")
VARIABLE = re.compile(r"(?!(?=.*\d)[A-Z0-9]{16,}$)[A-Z_][A-Z0-9_]*")  # some services' keys are capitals and digits too


class ServerSettings(Section):
    """Where the judge is, how it is asked, and what it may cost. The key itself is never a setting."""

    model_config = ConfigDict(hide_input_in_errors=True)

    base_url: Annotated[str, HOW]  # such as http://localhost:8000/v1
    model: Annotated[str, Field(min_length=1), RESULT]
    key_variable: Annotated[str | None, HOW] = None  # the environment variable that holds the key; None sends none
    system: Annotated[str | None, RESULT] = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False), RESULT] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1), RESULT] = 1.0
    max_tokens: Annotated[int, Field(ge=1), RESULT] = 32
    seed: Annotated[int | None, RESULT] = None
    timeout_s: Annotated[float, Field(gt=0, le=86_400), HOW] = 60.0  # without a byte from the server
    retries: Annotated[int, Field(ge=0), HOW] = 6
    concurrency: Annotated[int, Field(ge=1), HOW] = 8
    requests_per_minute: Annotated[float | None, Field(gt=0), HOW] = None
    prompt_price: Annotated[float, Field(ge=0, allow_inf_nan=False), HOW] = 0.0  # per million tokens, in any currency
    completion_price: Annotated[float, Field(ge=0, allow_inf_nan=False), HOW] = 0.0
    budget: Annotated[float | None, Field(ge=0), HOW] = None  # of one judge object, in the currency of the prices

    @model_validator(mode="before")
    @classmethod
    def _shows_no_key(cls, values: Any) -> Any:
        """Where a key may have been given by mistake, what is wrong is said without the value; pydantic would quote it."""
        name, address = (
            (values.get(field) for field in ("key_variable", "base_url")) if isinstance(values, dict) else (None, None)
        )
        if name is not None and not (isinstance(name, str) and VARIABLE.fullmatch(name)):
            raise ValueError(
                "key_variable: give the NAME of the environment variable that holds the key, such as JUDGE_API_KEY, "
                "never the key (what was given is not shown)"
            )
        if address is not None and not (isinstance(address, str) and ADDRESS.fullmatch(address)):
            raise ValueError(
                "base_url: give http://HOST/PATH or https://HOST/PATH, without a user, a key or a query "
                "(what was given is not shown)"
            )
        return values

    @model_validator(mode="after")
    def _priced(self) -> ServerSettings:
        if self.budget is not None and not (self.prompt_price or self.completion_price):
            raise ValueError("a budget needs prompt_price and completion_price")
        return self


class _Retry(Exception):
    """A failure that may pass. `after`: the seconds that the server asks to wait; `charged`: it may have worked, and may
    charge for it."""

    def __init__(self, reason: str, *, after: float = 0.0, charged: bool = False):
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

    def asked(self, temperature: float, system: str | None = None) -> ServerJudge:
        """The same server, rate and budget; a system prompt of its settings stays where none is given."""
        other = copy.copy(self)
        said = {"temperature": temperature, "system": self.settings.system if system is None else system}
        other.settings = self.settings.model_copy(update=said)
        return other

    def check(self) -> None:
        """Raises `UsageError` where a key is wanted and none is usable."""
        self._key()

    def release_memory(self) -> None:
        pass

    def ask(self, prompts: Sequence[str]) -> list[str]:
        """One reply per prompt, in order. A prompt that occurs twice is asked once.

        An error waits for the requests under way, whose replies are kept; Ctrl-C does not.

        Raises:
          UsageError: no usable key.
          JsublimError: the server refuses, keeps failing, or the budget could be exceeded. Replies so far are kept.
        """
        stopped, replies = threading.Event(), {prompt: Future[str]() for prompt in prompts}
        left = iter(list(replies))

        def work() -> None:
            for prompt in left:  # the threads share it: each prompt is taken once
                if stopped.is_set():
                    return
                try:
                    replies[prompt].set_result(self._reply(prompt, stopped))
                except BaseException as error:
                    replies[prompt].set_exception(error)

        # The threads of a `ThreadPoolExecutor` would be waited for at the end of the process, whatever ended it.
        threads = [
            threading.Thread(target=work, daemon=True) for _ in range(min(self.settings.concurrency, len(replies)))
        ]
        for thread in threads:
            thread.start()
        try:
            done, _ = wait(replies.values(), return_when=FIRST_EXCEPTION)
            for reply in done:
                reply.result()
        except Exception:
            stopped.set()
            for thread in threads:
                thread.join()
            raise
        finally:
            stopped.set()
        return [replies[prompt].result() for prompt in prompts]

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
                if failure.after > LONGEST_HOLD_S:
                    raise self._error(f"{reason}, and it asks to wait for {failure.after:.0f} s") from None
                self._pace.hold(failure.after)
                if not failure.after and attempt < self.settings.retries:
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
                return read_reply(response.read())
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


class _Message(BaseModel):
    content: str | None = None  # a model that ended before its first word has none


class _Choice(BaseModel):
    message: _Message


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    usage: Any = None


def read_reply(body: bytes) -> Reply:
    """The first choice of a chat completion, from a response's body. A reply with odd usage is still a reply."""
    try:
        value = _Completion.model_validate_json(body)
    except ValidationError:
        raise _Retry("the response is not a chat completion", charged=True) from None
    usage = value.usage if isinstance(value.usage, dict) else {}
    used = [_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens")]
    return Reply(value.choices[0].message.content or "", *used)


def _count(said: Any) -> int | None:
    """A number of tokens as a server says it; None for anything that is none, such as one below zero."""
    return said if type(said) is int and 0 <= said <= MOST_TOKENS else None
