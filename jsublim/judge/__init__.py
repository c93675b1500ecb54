"""Judges: models that are asked to score texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Judge(Protocol):
    """Anything that answers prompts, such as `LocalJudge` and `ServerJudge`."""

    @property
    def identity(self) -> dict[str, Any]:
        """All that its replies depend on, as JSON: part of the key of every artifact that is made from them."""
        ...

    def ask(self, prompts: Sequence[str]) -> list[str]:
        """One reply per prompt, in order. A prompt that occurs twice is asked once."""
        ...

    def asked(self, temperature: float, system: str | None = None) -> Judge:
        """The same judge with replies drawn at this temperature (0: greedily), under this system prompt (None: its own, or none)."""
        ...

    def check(self) -> None:
        """Refuse, before hours are spent, what `ask` would refuse at once. By default nothing is."""

    def release_memory(self) -> None:
        """Give back the memory that the next questions can do without. By default there is none."""
