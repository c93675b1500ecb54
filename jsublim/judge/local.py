"""A checkpoint as a judge, through our own sampler."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jsublim.chat import conversation
from jsublim.inference.lm import LanguageModel
from jsublim.inference.sampling import Sampling


@dataclass
class LocalJudge:
    """A checkpoint that answers, greedily unless told otherwise. Without `stop` tokens, a reply ends with its turn.

    Attributes:
      load: gives `lm` with its weights, where it has none; called for the first prompt, and again after
        `release_memory`.
    """

    lm: LanguageModel
    sampling: Sampling = Sampling(temperature=0.0)
    max_new_tokens: int = 32
    seed: int = 0
    batch_size: int = 64
    load: Callable[[], LanguageModel] | None = None
    _awake: LanguageModel | None = field(default=None, init=False)

    @property
    def identity(self) -> dict[str, Any]:
        numbers = dataclasses.asdict(self.sampling) | {"max_new_tokens": self.max_new_tokens, "seed": self.seed}
        dtype = str(self.lm.params["embed"]["weight"].dtype)
        return {"judge": self.lm.hash, "dtype": dtype, "template": self.lm.chat.template_hash, "sampling": numbers}

    def ask(self, prompts: Sequence[str]) -> list[str]:
        unique = list(dict.fromkeys(prompts))
        if self._awake is None:
            self._awake = self.lm if self.load is None else self.load()
        replies = self._awake.generate(
            [conversation(prompt) for prompt in unique],
            self.max_new_tokens,
            self.sampling,
            self.seed,
            batch_size=self.batch_size,
        )
        found = dict(zip(unique, replies, strict=True))
        return [found[prompt] for prompt in prompts]

    def check(self) -> None:
        pass

    def release_memory(self) -> None:
        self._awake = None
