"""What is asked of every model, and how."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from jsublim.experiment.spec.base import Distinct, Positive, Section, Seed


class Setting(Section):
    """In what an evaluation differs from the plain one."""

    temperature: float | None = Field(default=None, gt=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    system: str | None = None  # a system prompt that students and base are asked under; "" is an empty one
    layer: Annotated[int, Field(ge=0)] | None = None  # as if the model ended behind this layer (logit lens)


class Evaluation(Section):
    traits: Annotated[list[str], Distinct, Field(min_length=1)] | None = (
        None  # None: the teachers' traits and their counterfactuals
    )
    questions: Positive | None = None  # the first so many of a category; None: all
    samples: Positive = 200
    max_new_tokens: Positive = 10
    batch_size: Positive = 256
    seed: Seed = 0
    number_rows: int = Field(default=200, ge=0)
    teachers: bool = True  # evaluate the teachers too
    settings: dict[str, Setting] = {}  # further evaluations by name
