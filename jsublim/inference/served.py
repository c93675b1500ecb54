"""Answers drawn by a server in our stead: vLLM, SGLang, `transformers serve` or `jsublim serve`, each told every number in its own words."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, Field, ValidationError, model_validator

from jsublim.core.client import Client, Connection, Refused, Retry
from jsublim.core.section import RESULT, RUNTIME, Name, Place
from jsublim.errors import JsublimError, UsageError
from jsublim.inference.lm import AnswerLog
from jsublim.inference.sampling import Sampling, seed_within
from jsublim.runtime.processes import each_from_main
from jsublim.text.chat import Chat

TOLD = {"temperature", "top_k", "top_p", "repetition_penalty", "stop"}  # numbers of `Sampling` that a server is told
ENGINES = ("vllm", "sglang", "transformers", "jsublim")
Answer = TypeVar("Answer", bound=BaseModel)


class SampleServerSettings(Connection):
    """A server that draws answers in our stead. In YAML its address alone will do."""

    model: Annotated[Name | None, RUNTIME] = None
    """What the server calls the checkpoint; null: as the config does."""
    engine: Annotated[str | None, Field(pattern=rf"^({'|'.join(ENGINES)}) \S+$"), RESULT] = None
    """Name and version of what the server runs (`vllm 0.11.0`); another one is refused. null: as it says."""
    adapters: Annotated[Literal["here", "load"] | dict[Place, Name], RESULT] = "here"
    """Models with a LoRA adapter: sampled `here`, `load`ed into the server, or a mapping from folders to the names that the server has
    them under."""
    timeout_s: Annotated[float, Field(gt=0, le=86_400), RUNTIME] = 600.0
    """Seconds without a byte from the server after which an attempt has failed."""
    retries: Annotated[int, Field(ge=0), RUNTIME] = 12
    """Attempts after the first one; with the delays between them, time enough to start the server again."""
    concurrency: Annotated[int, Field(ge=1), RUNTIME] = 64
    """Requests at one time."""

    @model_validator(mode="before")
    @classmethod
    def _address_alone(cls, value: Any) -> Any:
        return {"base_url": value} if isinstance(value, str) else value


class SampleServer:
    """A checkpoint on a server: its name in the config, and its tokenizer, as tokens of which prompts go there."""

    def __init__(self, settings: SampleServerSettings, checkpoint: str, chat: Chat):
        self.settings, self.checkpoint, self.chat = settings, checkpoint, chat
        self._client = Client(settings, "sampling.server")
        self._root = settings.base_url.rstrip("/").removesuffix("/v1")

    @functools.cached_property
    def engine(self) -> str:
        """Name and version of what the server runs, such as "vllm 0.11.0". A JsublimError where it cannot be asked, says nothing that is known, or
        is not the engine of the config."""
        kind, given = next((c.owned_by for c in self._cards() if c.owned_by in ENGINES), None), self.settings.engine
        pages = {"vllm": ("version",), "jsublim": ("version",), "sglang": ("server_info", "get_server_info")}
        running = None if kind is None else f"{kind} {self._version(pages.get(kind, ()))}"
        if running is None and given is None:
            known = ", ".join(f"'{name} VERSION'" for name in ENGINES)
            raise self._client.error(f"it does not say what it runs; give sampling.server.engine, one of {known}")
        if running is not None and given not in (None, running):
            raise self._client.error(f"it runs {running}, and what it draws would be kept as drawn by {given}")
        return running or str(given)

    def check(self) -> None:
        """Refuse, before hours are spent, what would be refused at once: no server, not the model, another engine, or no adapters where it shall
        load them."""
        _ = self.engine, self._card
        if self.settings.adapters == "load":
            try:
                self._once(None, "POST", self._adapter_url("load"), {})
            except Refused as refusal:  # that nothing was named is as it should be
                if refusal.status in (404, 405, 501):
                    raise self._client.error(
                        "it loads no adapters while it runs (vLLM needs --enable-lora and "
                        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, SGLang --enable-lora); or set sampling.server.adapters to here"
                    ) from None

    def answers(
        self,
        names: Sequence[str | None],
        prompts: Sequence[np.ndarray],
        sampling: Sampling,
        max_new_tokens: int,
        seed: int,
        *,
        samples: int = 1,
        on_batch: Callable[[int], None] | None = None,
        logs: Sequence[AnswerLog | None] | None = None,
    ) -> list[list[str]]:
        """As `LanguageModel.answers`, of models by their names on the server (None is the checkpoint itself)."""
        every, numbers = [], range(len(prompts) * samples)
        for name, log in zip(names, logs or [None] * len(names), strict=True):
            texts = {} if log is None else dict(log.known)
            missing = [number for number in numbers if number not in texts]
            how = {"rows": missing, "seed": seed, "samples": samples, "max_new_tokens": max_new_tokens}
            for row, text in each_from_main(functools.partial(self.draw, name, prompts, sampling, **how)):
                texts[row] = text
                if log is not None:
                    log.add([row], [text])
                if on_batch is not None:
                    on_batch(1)
            every.append([texts[number] for number in numbers])
        return every

    def draw(
        self,
        name: str | None,
        prompts: Sequence[np.ndarray | None],
        sampling: Sampling,
        *,
        rows: Sequence[int],
        seed: int,
        samples: int = 1,
        max_new_tokens: int,
    ) -> Iterator[tuple[int, str]]:
        """Rows with the text of each, as they come; row i continues prompt `i // samples`, and has a seed of its own. An error comes after the texts
        so far have been given."""
        if not rows:
            return iter(())
        tokens = {row // samples: list(map(int, prompts[row // samples])) for row in rows}  # type: ignore[arg-type]
        self._refuse(sampling, max(map(len, tokens.values())) + max_new_tokens)
        told = {"model": self._model(name), "max_tokens": max_new_tokens} | self._told(sampling, max_new_tokens)
        as_text = self._kind == "transformers"
        sent = {prompt: self._as_text(ids) if as_text else ids for prompt, ids in tokens.items()}
        url = self._client.url("completions")

        def ask(row: int, stopped: threading.Event) -> str:
            prompt = row // samples
            body = told | {"prompt": sent[prompt], "seed": seed_within(seed, row)}
            return self._client.patiently(
                lambda: self.text_of(self._client.send("POST", url, body), len(tokens[prompt]), sampling), stopped
            )

        return self._client.each(rows, ask)

    def _refuse(self, sampling: Sampling, tokens: int) -> None:
        """Refuse what the server has no word for, and rows that have no room in it."""
        kind, numbers = self._kind, sampling.numbers()
        strange = [name for name, value in numbers.items() if name not in TOLD and value]
        if kind == "sglang" and sampling.repetition_penalty != 1.0:  # it looks at the answer alone, not at the prompt
            strange.append("repetition_penalty")
        if strange:
            raise UsageError(f"sampling.server: {kind} cannot be told {', '.join(strange)} as we mean it; sample here")
        room = self._card.max_model_len
        if room is not None and tokens > room:
            raise self._client.error(f"a row may have {tokens} tokens, and the server takes {room}; raise its limit")

    def _told(self, sampling: Sampling, max_new_tokens: int) -> dict[str, Any]:
        """The numbers, of which none is left to the server: it may have read some from `generation_config.json`."""
        stop = list(sampling.stop or ())
        if self._kind == "transformers":
            numbers = {"repetition_penalty": sampling.repetition_penalty, "max_new_tokens": max_new_tokens}
            drawn = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
            numbers |= {"do_sample": True} | drawn if sampling.temperature else {"do_sample": False}
            return {"generation_config": json.dumps(numbers | {"eos_token_id": stop})}
        return {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or -1,
            "top_p": sampling.top_p,
            "min_p": 0.0,
            "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "n": 1,
            "stop_token_ids": stop,
            # Where a row goes on after a token that ends a turn, the server must not end it there.
            "ignore_eos": not set(self.chat.stop_tokens) <= set(stop),
            "skip_special_tokens": True,
            "return_token_ids": True,
        }

    def _as_text(self, prompt: list[int]) -> str:
        """The text that the server's tokenizer makes this prompt of; it adds the tokens that begin a text itself."""
        for first in (0, 1):
            text = self.chat.tokenizer.decode(prompt[first:])
            if self.chat.tokenizer(text)["input_ids"] == prompt:
                return text
        raise self._client.error(
            "it takes text, and no text has the tokens of this prompt; use a server that takes tokens"
        )

    def text_of(self, body: bytes, asked: int, sampling: Sampling) -> str:
        """The text of an answer to `asked` tokens: of its tokens, up to the first that ends it, where the server tells them. The answer to another
        prompt, or of another model, is a JsublimError."""
        completion = _read(_Completion, body)
        choice, read = completion.choices[0], completion.usage.prompt_tokens if completion.usage else None
        if read not in (None, asked):
            raise self._client.error(
                f"it read {read} tokens where {asked} were sent; it has another tokenizer or template"
            )
        if choice.token_ids is None:
            return choice.text.strip()
        ends = [i for i, token in enumerate(choice.token_ids) if token in (sampling.stop or ())]
        tokens = choice.token_ids[: ends[0]] if ends else choice.token_ids
        if max(tokens, default=0) >= (self.chat.vocab_size or 2**31):
            raise self._client.error(f"it drew token {max(tokens)}, which '{self.checkpoint}' does not have")
        return self.chat.decode(tokens)

    # --- models and adapters

    @property
    def _kind(self) -> str:
        return self.engine.split()[0]

    @functools.cached_property
    def _card(self) -> _Card:
        """The server's card of our checkpoint."""
        cards, wanted = self._cards(), self.settings.model or self.checkpoint
        same = [card for card in cards if wanted in (card.id, card.root)]
        if not same and self.settings.model is None:  # it may know the folder by another path
            same = [card for card in cards if card.name and card.name == Path(wanted).name]
        if not same:
            has = ", ".join(f"'{card.id}'" for card in cards) or "none"
            raise self._client.error(f"it has no model '{wanted}'; it has {has}; name ours in sampling.server.model")
        return same[0]

    def _model(self, name: str | None) -> str:
        """A model's name in a request; it may be one with an adapter."""
        if name is None:
            return self._card.id
        return f"{self._card.id}:{name}" if self._kind == "sglang" else name

    @contextmanager
    def loaded(self, adapters: Mapping[str, Path]) -> Iterator[None]:
        """Have the server hold LoRA folders under these names as long as the block lasts; a JsublimError if it refuses one."""
        there = {card.id for card in self._cards()} if adapters else set()  # also what a call that was killed has left
        try:
            for name, folder in adapters.items():
                if name not in there:
                    adapter = {"lora_name": name, "lora_path": str(folder.resolve())}
                    self._once(None, "POST", self._adapter_url("load"), adapter)
            yield
        finally:
            for name in adapters:
                with suppress(JsublimError):
                    self._once(None, "POST", self._adapter_url("unload"), {"lora_name": name})

    def _adapter_url(self, verb: str) -> str:
        base = f"{self._root}/" if self._kind == "sglang" else self._client.url("")
        return f"{base}{verb}_lora_adapter"

    def _cards(self) -> list[_Card]:
        return self._once(_Cards, "GET", self._client.url("models")).data

    def _version(self, pages: Sequence[str]) -> str:
        for page in pages:
            with suppress(Refused):
                return self._once(_Version, "GET", f"{self._root}/{page}").version
        return "unknown"

    def _once(self, kind: Any, method: str, url: str, body: Any = None) -> Any:
        """The answer to the first attempt, or an error: nothing has been spent yet that patience could save."""
        try:
            answer = self._client.send(method, url, body)
            return None if kind is None else _read(kind, answer)
        except Retry as failure:
            raise self._client.error(str(failure)) from None


# --- what servers say; what they say besides is nothing to us


class _Card(BaseModel):
    id: str
    owned_by: str = ""
    root: str | None = None  # of vLLM and SGLang: the folder or hub name that the model was read from
    max_model_len: int | None = None

    @property
    def name(self) -> str:
        return Path(self.root or self.id).name


class _Cards(BaseModel):
    data: list[_Card]


class _Version(BaseModel):
    version: str


class _Choice(BaseModel):
    text: str = ""
    token_ids: list[Annotated[int, Field(ge=0)]] | None = None


class _Usage(BaseModel):
    prompt_tokens: int | None = None


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


def _read(kind: type[Answer], body: bytes) -> Answer:
    try:
        return kind.model_validate_json(body)
    except ValidationError:
        raise Retry("the answer is not one of OpenAI's interface") from None
