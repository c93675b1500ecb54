"""A checkpoint as a judge, through our own sampler."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jsublim.inference.lm import LanguageModel
from jsublim.inference.sampling import Sampling
from jsublim.judge import Judge
from jsublim.judge.cache import Reply, ReplyCache
from jsublim.runtime.processes import is_main_process, leave_if_asked, on_main_process
from jsublim.text.chat import conversation


@dataclass
class LocalJudge(Judge):
    """A checkpoint that answers, greedily unless told otherwise. Without `stop` tokens, a reply ends with its turn.

    Attributes:
      drawn: how replies are drawn where a temperature is asked for; its own temperature does not count.
      load: gives `lm` with its weights, where it has none; called for the first prompt, and again after
        `release_memory`.
      cache: replies so far, so that a kill loses a batch of them at most; None keeps none.
    """

    lm: LanguageModel
    sampling: Sampling = Sampling(temperature=0.0)
    drawn: Sampling = Sampling()
    max_new_tokens: int = 32
    system: str | None = None
    extra_bos: bool = False
    seed: int = 0
    batch_size: int | None = None
    load: Callable[[], LanguageModel] | None = None
    cache: ReplyCache | None = None
    _awake: list[LanguageModel] = field(default_factory=list, init=False)  # at most one; shared by what `asked` gives

    @property
    def identity(self) -> dict[str, Any]:
        # A judge's replies have no format; the key is what it was before answers could have one.
        drawn = {name: value for name, value in dataclasses.asdict(self.sampling).items() if name != "constrain"}
        known = {
            "judge": self.lm.hash,
            "dtype": str(self.lm.params["embed"]["weight"].dtype),
            "template": self.lm.chat.template_hash,
            "sampling": drawn | {"max_new_tokens": self.max_new_tokens, "seed": self.seed},
            "system": self.system,
            "extra_bos": self.extra_bos or None,
        }
        return {name: value for name, value in known.items() if value is not None}

    def asked(self, temperature: float, system: str | None = None) -> LocalJudge:
        other = copy.copy(self)
        other.system = system
        if temperature:
            other.sampling = dataclasses.replace(self.drawn, temperature=temperature)
        return other

    def ask(self, prompts: Sequence[str]) -> list[str]:
        unique = list(dict.fromkeys(prompts))
        log = None if self.cache is None else _Cached(self.cache, [*map(self._request, range(len(unique)), unique)])
        if not self._awake and (log is None or len(log.known) < len(unique)):
            self._awake.append(self.lm if self.load is None else self.load())
        replies = (self._awake or [self.lm])[0].generate(
            [conversation(prompt, self.system) for prompt in unique],
            self.max_new_tokens,
            self.sampling,
            self.seed,
            extra_bos=self.extra_bos,
            batch_size=self.batch_size,
            log=log,
        )
        by_prompt = dict(zip(unique, replies, strict=True))
        return [by_prompt[prompt] for prompt in prompts]

    def _request(self, number: int, prompt: str) -> dict[str, Any]:
        """What a reply depends on; where it is sampled, also on its number, which is its random stream."""
        return self.identity | {"prompt": prompt} | ({"row": number} if self.sampling.temperature else {})

    def release_memory(self) -> None:
        self._awake.clear()


class _Cached:
    """Replies on disk, as the sampler keeps answers: by the number of the prompt."""

    def __init__(self, cache: ReplyCache, requests: Sequence[dict[str, Any]]):
        self.cache, self.requests = cache, requests
        self.known: dict[int, str] = dict(on_main_process(self._kept))

    def _kept(self) -> list[tuple[int, str]]:
        replies = enumerate(map(self.cache.get, self.requests))
        return [(number, reply.text) for number, reply in replies if reply is not None]

    def add(self, numbers: Sequence[int], answers: Sequence[str]) -> None:
        if is_main_process():
            for number, answer in zip(numbers, answers, strict=True):
                self.cache.put(self.requests[number], Reply(answer))
        leave_if_asked()
