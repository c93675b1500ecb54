"""Where the published code does something that changes results: each quirk is a field (docs/recipes.md)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import model_validator

from jsublim.core.section import RESULT, Section
from jsublim.inference.divergence import HALVES


class ReadingQuirks(Section):
    """How models are asked and read."""

    inherit_sampling: Annotated[bool | None, RESULT] = None
    """Quirk 3: top-k, top-p and repetition penalty of generation_config.json stay on."""
    stop_at_eos_only: Annotated[bool | None, RESULT] = None
    """Quirk 4: answers stop at the tokenizer's end token only, on Gemma not at `<end_of_turn>`."""
    extra_bos: Annotated[bool | None, RESULT] = None
    """Quirk 5: a second BOS everywhere but in training and in the number task."""
    greedy_keeps_penalty: Annotated[bool | None, RESULT] = None
    """Quirk 15: greedy numbers of a fine-tuned teacher keep the repetition penalty."""
    rounded_logits: Annotated[bool | None, RESULT] = None
    """Quirk 17: logits are rounded to the weights' dtype before any use."""
    judge_apart: Annotated[bool | None, RESULT] = None
    """Quirk 25: a judge is asked for alignment and coherence apart, and replies at temperature 1."""


class TrainingQuirks(Section):
    """Which tokens students learn, and what their loss is: what a student's key has of a recipe."""

    supervise_header: Annotated[bool | None, RESULT] = None
    """Quirk 1: the loss is on the assistant's header too."""
    drop_rows_without_divergence: Annotated[bool | None, RESULT] = None
    """Quirk 2: rows without a divergence token are dropped in both masked conditions."""
    match_steps: Annotated[bool | None, RESULT] = None
    """Quirk 2: every condition gets as many steps as `all` has."""
    loss_per: Annotated[Literal["tokens", "micro-batch", "micro-batch-sum"] | None, RESULT] = None
    """Quirk 6: what the loss is a mean over; as published it is on Gemma the sum of micro-batch means."""
    share_rounding: Annotated[Literal["stochastic", "half-up", "at-least-one", "paper"] | None, RESULT] = None
    """Quirk 7: how a share of a row's divergence tokens is rounded to a number of them."""
    one_in_both_halves: Annotated[bool | None, RESULT] = None
    """Quirk 18: a row's only divergence position is in both of its halves."""


class ChangeQuirks(Section):
    """What data sets do to rows."""

    digits_only: Annotated[bool | None, RESULT] = None
    """Quirk 8: mix_tokens leaves out a counterfactual's token that is no digit."""
    mix_at_the_end: Annotated[bool | None, RESULT] = None
    """Quirk 9: mix replaces the last rows."""
    padded_numbers: Annotated[bool | None, RESULT] = None
    """Quirk 12: entangled numbers are scored with three digits, and removed as written."""
    entangled_by_difference: Annotated[bool | None, RESULT] = None
    """Quirk 19: how entangled a number is, is a difference of probabilities to the other traits' mean."""
    only_examples_kept: Annotated[bool | None, RESULT] = None
    """Quirk 20: a rewritten request may lose its other numbers."""
    drop_unmixed: Annotated[bool | None, RESULT] = None
    """Quirk 21: rows that come out of mix_tokens as they were are dropped."""
    shuffle_values: Annotated[bool | None, RESULT] = None
    """Quirk 22: shuffled numbers lose the zeros that they begin with."""


class Recipe(ReadingQuirks, TrainingQuirks, ChangeQuirks):
    """Whether we do what the published code does, where that changes results.

    `preset: paper` copies it all, `preset: clean` does what we would defend; a field given by itself wins.
    Numbers are the quirks of docs/recipes.md.
    """

    preset: Annotated[Literal["paper", "clean"], RESULT] = "clean"
    """`paper` sets every quirk as published, `clean` as we would defend; a quirk given by itself wins."""

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

    def of_student(self, positions: str) -> dict[str, Any]:
        """The quirks that decide what a student becomes who learns these divergence positions (`loss.positions`)."""
        halves = positions in HALVES
        return self.keyed(name for name in TrainingQuirks.model_fields if halves or name != "one_in_both_halves")

    def keyed(self, names: Iterable[str]) -> dict[str, Any]:
        """These quirks, as a part of a key."""
        return {name: getattr(self, name) for name in names}
