"""Any server with OpenAI's chat-completions interface as a judge: vLLM, `transformers serve`, a paid service."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasPath, BaseModel, Field, ValidationError

from jsublim.core.bucket import Bucket
from jsublim.core.client import Client, Connection, Retry
from jsublim.core.section import RESULT, RUNTIME
from jsublim.errors import JsublimError
from jsublim.judge import Judge
from jsublim.judge.cache import Reply, ReplyCache
from jsublim.runtime.processes import each_from_main, leave_if_asked
from jsublim.text.chat import conversation

TEMPLATE_TOKENS = 256  # more than any chat template puts around a prompt
MOST_TOKENS = 10**9  # of one request: a larger number in a reply is a mistake
Tokens = tuple[int, int]  # of a prompt, of its completion


class ServerSettings(Connection):
    """Where the judge is, how it is asked, and what it may cost."""

    model: Annotated[str, Field(min_length=1), RESULT]
    """What the server calls the judge."""
    system: Annotated[str | None, RESULT] = None
    """A system prompt for the judge; null: none."""
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False), RESULT] = 0.0
    """Temperature at which replies are drawn."""
    top_p: Annotated[float, Field(gt=0, le=1), RESULT] = 1.0
    """The share of probability from which replies are drawn."""
    max_tokens: Annotated[int, Field(ge=1), RESULT] = 32
    """Tokens of a reply at most."""
    seed: Annotated[int | None, RESULT] = None
    """Seed of the replies, where the server takes one; null: none is sent."""
    prompt_price: Annotated[float, Field(ge=0, allow_inf_nan=False), RUNTIME] = 0.0
    """Per million tokens that it reads, in any currency."""
    completion_price: Annotated[float, Field(ge=0, allow_inf_nan=False), RUNTIME] = 0.0
    """Per million tokens that it writes."""
    budget: Annotated[float | None, Field(ge=0), RUNTIME] = None
    """The most that one call of the command may cost, in the currency of the prices; null: no limit."""

    def contradictions(self) -> Iterator[tuple[Any, str]]:
        free = not (self.prompt_price or self.completion_price)
        yield self.budget is not None and free, "a budget needs prompt_price and completion_price"


class Spending:
    """Tokens paid for and their cost, in the currency of the prices, by all requests of one judge.

    A request first reserves the most it can cost, so the budget is never exceeded by requests that are under way
    together.
    """

    def __init__(self, prompt_price: float, completion_price: float, budget: float | None):
        """Prices are per million tokens."""
        self._prices, self._budget = (prompt_price / 1e6, completion_price / 1e6), budget
        self.prompt_tokens = self.completion_tokens = 0
        self._reserved, self._lock = (0, 0), threading.Lock()

    @property
    def cost(self) -> float:
        return self._price(self.prompt_tokens, self.completion_tokens)

    def _price(self, prompt: int, completion: int) -> float:
        return prompt * self._prices[0] + completion * self._prices[1]

    def reserve(self, most: Tokens) -> None:
        """Set tokens aside for a request.

        Raises:
          JsublimError: they could exceed the budget.
        """
        with self._lock:
            total = self.cost + self._price(*self._reserved) + self._price(*most)
            if self._budget is not None and total > self._budget:
                raise JsublimError(
                    f"judge: budget {self._budget:g}: {self.cost:.6g} is spent, and the next request could exceed it; "
                    "raise 'budget' to go on (replies so far are kept)"
                )
            self._reserved = (self._reserved[0] + most[0], self._reserved[1] + most[1])

    def settle(self, most: Tokens, used: Tokens) -> None:
        """Give a reservation back, and count what was used instead."""
        with self._lock:
            self._reserved = (self._reserved[0] - most[0], self._reserved[1] - most[1])
            self.prompt_tokens += used[0]
            self.completion_tokens += used[1]


class ServerJudge(Judge):
    """Asks a server from several threads, within a rate and a budget. Every reply is kept in the folder `cache` at once (and
    in the bucket, if there is one); a reply that is there costs nothing, and needs neither server nor key.

    `spending` counts tokens and cost.
    """

    def __init__(self, settings: ServerSettings, cache: Path, bucket: Bucket | None = None):
        self.settings = settings
        self.spending = Spending(settings.prompt_price, settings.completion_price, settings.budget)
        self._cache, self._client = ReplyCache(cache, bucket), Client(settings, f"judge '{settings.model}'")

    @property
    def identity(self) -> dict[str, Any]:
        """Model, system prompt and sampling numbers: a reply does not depend on the address that serves it."""
        return self._request("{prompt}")

    def asked(self, temperature: float, system: str | None = None) -> ServerJudge:
        """The same server, rate and budget; a system prompt of its settings stays where none is given."""
        other = copy.copy(self)
        changed = {"temperature": temperature, "system": self.settings.system if system is None else system}
        other.settings = self.settings.model_copy(update=changed)
        return other

    def check(self) -> None:
        """Raises `UsageError` where a key is wanted and none is usable."""
        self._client.key()

    def ask(self, prompts: Sequence[str]) -> list[str]:
        """One reply per prompt, in order. A prompt that occurs twice is asked once.

        An error waits for the requests under way, whose replies are kept; Ctrl-C does not.

        Raises:
          UsageError: no usable key.
          JsublimError: the server refuses, keeps failing, or the budget could be exceeded. Replies so far are kept.
          Preempted: as `leave_if_asked`.
        """
        replies: dict[str, str] = {}
        for prompt, reply in each_from_main(lambda: self._client.each(dict.fromkeys(prompts), self._reply)):
            replies[prompt] = reply
            leave_if_asked()
        return [replies[prompt] for prompt in prompts]

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
            reply = self._client.patiently(lambda: self._charged(request), stopped)
            self._cache.put(request, reply)
        return reply.text

    def _charged(self, request: dict[str, Any]) -> Reply:
        """One attempt, within the budget. If the server may have charged for a failure, its highest possible cost is counted."""
        size = sum(len(message["content"].encode("utf-8", "replace")) for message in request["messages"])
        most: Tokens = (size + TEMPLATE_TOKENS, self.settings.max_tokens)  # a token is at least a byte
        self.spending.reserve(most)
        used: Tokens = (0, 0)
        try:
            reply = read_reply(self._client.send("POST", self._client.url("chat/completions"), request))
            counts = zip(most, (reply.prompt_tokens, reply.completion_tokens), strict=True)
            prompt, completion = (largest if count is None else count for largest, count in counts)
            used = (prompt, completion)
            return reply
        except Retry as failure:
            used = most if failure.charged else used
            raise
        finally:
            self.spending.settle(most, used)


class _Message(BaseModel):
    content: str | None = None  # a model that ended before its first word has none


class _Completion(BaseModel):
    message: _Message = Field(validation_alias=AliasPath("choices", 0, "message"))
    usage: Any = None


def read_reply(body: bytes) -> Reply:
    """The first choice of a chat completion, from a response's body. A reply with odd usage is still a reply."""
    try:
        value = _Completion.model_validate_json(body)
    except ValidationError:
        raise Retry("the response is not a chat completion", charged=True) from None
    usage = value.usage if isinstance(value.usage, dict) else {}
    used = [_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens")]
    return Reply(value.message.content or "", *used)


def _count(reported: Any) -> int | None:
    """A number of tokens as a server says it; None for anything that is none, such as one below zero."""
    return reported if type(reported) is int and 0 <= reported <= MOST_TOKENS else None
