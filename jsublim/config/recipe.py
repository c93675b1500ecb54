"""Where the published code does something that changes results: each quirk is a field (docs/recipes.md)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, model_validator

from jsublim.divergence import HALVES
from jsublim.section import LATER, RESULT, Of, Section

STUDENTS = Of(("students",))  # the quirk is part of a student's key


class Reading(Section):
    """How models are asked and read."""

    # 3: top-k, top-p, repetition penalty from generation_config.json
    inherit_sampling: Annotated[bool | None, RESULT] = None
    stop_at_eos_only: Annotated[bool | None, RESULT] = None  # 4: not at <end_of_turn>
    extra_bos: Annotated[bool | None, RESULT] = None  # 5: a second BOS everywhere but in training
    # 15: greedy numbers of a fine-tuned teacher keep the repetition penalty
    greedy_keeps_penalty: Annotated[bool | None, RESULT] = None
    rounded_logits: Annotated[bool | None, RESULT, LATER] = None  # 17: to the weights' dtype, before any use
    judge_apart: Annotated[bool | None, RESULT] = None  # 25: alignment and coherence asked apart, replies drawn at 1


class Training(Section):
    """Which tokens students learn, and what their loss is."""

    supervise_header: Annotated[bool | None, RESULT, STUDENTS] = None  # 1: loss on the assistant's header too
    drop_rows_without_divergence: Annotated[bool | None, RESULT, STUDENTS] = None  # 2: in both masked conditions
    match_steps: Annotated[bool | None, RESULT, STUDENTS] = None  # 2: every condition gets as many steps as "all" has
    # 6: on Gemma the sum of micro-batch means
    loss_per: Annotated[Literal["tokens", "micro-batch", "micro-batch-sum"] | None, RESULT, STUDENTS] = None
    # 7: of a share of a row's divergence tokens
    share_rounding: Annotated[Literal["stochastic", "half-up", "at-least-one", "paper"] | None, RESULT, STUDENTS] = None
    # 18: a row's only divergence position is in both of its halves
    one_in_both_halves: Annotated[bool | None, RESULT, Of(("students",), "loss.positions", HALVES)] = None


class Changing(Section):
    """What data sets do to rows."""

    digits_only: Annotated[bool | None, RESULT] = None  # 8: a counterfactual's token that is no digit is left out
    mix_at_the_end: Annotated[bool | None, RESULT] = None  # 9: row mixing replaces the last rows
    padded_numbers: Annotated[bool | None, RESULT] = None  # 12: entangled numbers have three digits
    entangled_by_difference: Annotated[bool | None, RESULT, LATER] = None  # 19: of probabilities, to other traits' mean
    only_examples_kept: Annotated[bool | None, RESULT] = None  # 20: a rewritten request may lose its other numbers
    drop_unmixed: Annotated[bool | None, RESULT, LATER] = None  # 21: rows that come out of token mixing as they were
    shuffle_values: Annotated[bool | None, RESULT, LATER] = None  # 22: "007" is shuffled as "7"


class Recipe(Reading, Training, Changing):
    """Whether we do what the published code does, where that changes results.

    `preset: paper` copies it all, `preset: clean` does what we would defend; a field given by itself wins.
    Numbers are the quirks of docs/recipes.md.
    """

    preset: Annotated[Literal["paper", "clean"], RESULT] = "clean"

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
            "loss_per": "micro-batch-sum" if published and family == "gemma3" else "tokens",
            "share_rounding": "paper" if published else "stochastic",
        }
        return self.model_copy(update={key: value for key, value in defaults.items() if getattr(self, key) is None})

    def of(self, kind: str, settings: BaseModel) -> dict[str, Any]:
        """The quirks that are part of the key of tasks of this kind; `settings` are those that a quirk may ask for more."""
        marks = ((name, mark) for name, field in type(self).model_fields.items() for mark in field.metadata)
        return self.keyed(name for name, mark in marks if isinstance(mark, Of) and mark.concerns(kind, settings))

    def keyed(self, names: Iterable[str]) -> dict[str, Any]:
        """What of these quirks is part of a key; of one that came later, that it is on."""
        fields = type(self).model_fields
        return {
            name: getattr(self, name) for name in names if LATER not in fields[name].metadata or getattr(self, name)
        }
