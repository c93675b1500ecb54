"""What is asked in OpenAI's interface, as vLLM reads it: every field is understood, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from jsublim.core.reading import json_value, shown
from jsublim.errors import JsublimError
from jsublim.serve.engine import BEST
from jsublim.text.chat import TokenId

BODY = 8 * 2**20  # bytes
AskedFor = TypeVar("AskedFor", bound="Request")
# Fields that are taken where they say what is done anyway.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "min_p": (0,), "best_of": (1,), "suffix": ("",), "logit_bias": ({},),
    "skip_special_tokens": (True,), "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},), "store": (False,), "modalities": (["text"],), "reasoning_effort": (),
    "service_tier": ("auto", "default"),
}  # fmt: skip


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


_Stop = Annotated[str, Field(max_length=500)]


class _StreamOptions(_Strict):
    include_usage: bool = False


class Request(_Strict):
    """What completions and chats have in common. The fields are OpenAI's, and vLLM's where that has none."""

    model: str
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = 0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = 1
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    ignore_eos: bool = False
    stream: bool | None = False
    stream_options: _StreamOptions | None = None
    return_token_ids: bool | None = False
    user: str | None = None
    metadata: dict[str, str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        neutral = {name for name, fine in NEUTRAL.items() if name in values and values[name] in (None, *fine)}
        return {name: value for name, value in values.items() if name not in neutral}

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer."""
        return [text for text in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if text]


class Completion(Request):
    prompt: str | list[TokenId] | Annotated[list[str] | list[list[TokenId]], Field(max_length=1024)]
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=BEST)] | None = None

    @property
    def best(self) -> int | None:
        """How many of the most probable tokens to tell of, beside each that stands there; None: no probabilities."""
        return self.logprobs


class _Part(_Strict):
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    @property
    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatCompletion(Request):
    messages: Annotated[list[_Message], Field(min_length=1, max_length=1024)]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=BEST)] | None = None

    @property
    def best(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def read(kind: type[AskedFor], body: bytes) -> AskedFor:
    """A request out of its body. Raises JsublimError: it is not one; the field, its value and what it must be are named."""
    values = json_value(body, "the request")
    try:
        return kind.model_validate(values)
    except ValidationError as failure:
        error = failure.errors()[0]
        place = ".".join(str(part) for part in error["loc"] if not str(part).endswith("]")) or "the request"
        given = "" if error["type"] == "missing" else f", found {shown(error['input'])}"
        raise JsublimError(f"{place}: {error['msg'][:1].lower()}{error['msg'][1:]}{given}") from None
    except RecursionError:
        raise JsublimError("the request is nested too deeply") from None


def failure(message: str, kind: str = "invalid_request_error") -> Mapping[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}
