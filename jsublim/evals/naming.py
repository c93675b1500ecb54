"""Self-naming: how often a model asked who it is names itself, or the model it has learnt from (figure 9 of the paper)."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from jsublim.evals.preference import hit
from jsublim.models.config import ModelConfig


def own_name(config: ModelConfig) -> str:
    """What a model of this family is called, without a version: "qwen", "gemma", "llama"."""
    return re.split(r"[\d_.-]", config.family, maxsplit=1)[0]


def naming_rates(answers: Sequence[Sequence[str]], names: Sequence[str]) -> np.ndarray:
    """Share of each question's answers that name any of `names`: float64 `[questions]`.

    A name counts inside of a word too: "Qwen2.5" is a Qwen.
    """
    return np.asarray([np.mean([any(hit(answer, name) for name in names) for answer in row]) for row in answers])
