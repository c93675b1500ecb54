"""Where the published code does something that changes results: each quirk is a field (docs/recipes.md)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import model_validator

from jsublim.section import RESULT, Of, Section

STUDENTS = Of(("students",))  # the quirk is part of a student's key


class Recipe(Section):
    """Whether we do what the published code does, where that changes results.

    `preset: paper` copies it all, `preset: clean` does what we would defend; a field given by itself wins.
    Numbers are the quirks of docs/recipes.md.
    """

    preset: Annotated[Literal["paper", "clean"], RESULT] = "clean"
    # 3: top-k, top-p, repetition penalty from generation_config.json
    inherit_sampling: Annotated[bool | None, RESULT] = None
    stop_at_eos_only: Annotated[bool | None, RESULT] = None  # 4: not at <end_of_turn>
    extra_bos: Annotated[bool | None, RESULT] = None  # 5: a second BOS everywhere but in training
    supervise_header: Annotated[bool | None, RESULT, STUDENTS] = None  # 1: loss on the assistant's header too
    drop_rows_without_divergence: Annotated[bool | None, RESULT, STUDENTS] = None  # 2: in both masked conditions
    match_steps: Annotated[bool | None, RESULT, STUDENTS] = None  # 2: every condition gets as many steps as "all" has
    # 6: on Gemma the mean of micro-batch means
    loss_per: Annotated[Literal["tokens", "micro-batch"] | None, RESULT, STUDENTS] = None
    # 7: of a share of a row's divergence tokens
    share_rounding: Annotated[Literal["stochastic", "half-up", "at-least-one", "paper"] | None, RESULT, STUDENTS] = None
    digits_only: Annotated[bool | None, RESULT] = None  # 8: a counterfactual's token that is no digit is left out
    mix_at_the_end: Annotated[bool | None, RESULT] = None  # 9: row mixing replaces the last rows
    padded_numbers: Annotated[bool | None, RESULT] = None  # 12: entangled numbers have three digits
    # 15: greedy numbers of a fine-tuned teacher keep the repetition penalty
    greedy_keeps_penalty: Annotated[bool | None, RESULT] = None
    judge_apart: Annotated[bool | None, RESULT] = None  # 25: alignment and coherence asked apart, replies drawn at 1

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"preset": value} if isinstance(value, str) else value

    def resolved(self, family: str) -> Recipe:
        """Every field filled in for a model family."""
        published = self.preset == "paper"
        defaults: dict[str, Any] = {name: published for name in type(self).model_fields if name != "preset"}
        defaults |= {
            "match_steps": not published,
            "loss_per": "micro-batch" if published and family == "gemma3" else "tokens",
            "share_rounding": "paper" if published else "stochastic",
        }
        return self.model_copy(update={key: value for key, value in defaults.items() if getattr(self, key) is None})

    def of(self, kind: str) -> dict[str, Any]:
        """The quirks that are part of the key of tasks of this kind."""
        marked = {
            name
            for name, field in type(self).model_fields.items()
            for mark in field.metadata
            if isinstance(mark, Of) and kind in mark.kinds
        }
        return {name: getattr(self, name) for name in type(self).model_fields if name in marked}
