"""Where the published code does something that changes results: each quirk is a field."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from jsublim.experiment.spec.base import Section


class Recipe(Section):
    """Where the published code does something that changes results, this says whether we do it too.

    `preset: paper` copies it all, `preset: clean` does what we would defend; a field given by itself wins.
    Numbers are the quirks of docs/recipes.md.
    """

    preset: Literal["paper", "clean"] = "clean"
    inherit_sampling: bool | None = None  # 3: top-k, top-p, repetition penalty from generation_config.json
    stop_at_eos_only: bool | None = None  # 4: not at <end_of_turn>
    extra_bos: bool | None = None  # 5: a second BOS everywhere but in training
    supervise_header: bool | None = None  # 1: loss on the assistant's header too
    drop_rows_without_divergence: bool | None = None  # 2: in both masked conditions
    match_steps: bool | None = None  # 2: every condition gets as many steps as "all" has
    loss_per: Literal["tokens", "micro-batch"] | None = None  # 6: on Gemma the mean of micro-batch means
    # 7: of a share of a row's divergence tokens
    share_rounding: Literal["stochastic", "half-up", "at-least-one", "paper"] | None = None
    digits_only: bool | None = None  # 8: in token mixing, a counterfactual's token that is no digit is left out
    mix_at_the_end: bool | None = None  # 9: row mixing replaces the last rows
    padded_numbers: bool | None = None  # 12: entangled numbers have three digits
    greedy_keeps_penalty: bool | None = None  # 15: greedy numbers of a fine-tuned teacher keep the repetition penalty

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"preset": value} if isinstance(value, str) else value

    def resolved(self, family: str) -> Recipe:
        """Every field filled in for a model family."""
        published = self.preset == "paper"
        defaults = {
            "inherit_sampling": published,
            "stop_at_eos_only": published,
            "extra_bos": published,
            "supervise_header": published,
            "drop_rows_without_divergence": published,
            "match_steps": not published,
            "loss_per": "micro-batch" if published and family == "gemma3" else "tokens",
        }
        alike = ("digits_only", "mix_at_the_end", "padded_numbers", "greedy_keeps_penalty")
        defaults |= {name: published for name in alike}
        defaults["share_rounding"] = "paper" if published else "stochastic"
        return self.model_copy(update={key: value for key, value in defaults.items() if getattr(self, key) is None})
