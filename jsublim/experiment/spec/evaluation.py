"""What is asked of every model, and how; who judges."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from jsublim.evals.misalignment import ALIGNED_FROM, COHERENT_FROM
from jsublim.experiment.spec.base import Distinct, Positive, Section, Seed
from jsublim.judge.server import ServerSettings

Kind = Literal["preference", "naming", "factual", "misalignment", "problems"]


class Setting(Section):
    """In what an evaluation differs from the plain one."""

    temperature: float | None = Field(default=None, gt=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    system: str | None = None  # a system prompt that students and base are asked under; "" is an empty one
    layer: Annotated[int, Field(ge=0)] | None = None  # as if the model ended behind this layer (logit lens)


class JudgeChoice(Section):
    """A checkpoint, or a server with OpenAI's interface."""

    model: str | None = None
    server: ServerSettings | None = None
    max_new_tokens: Positive = 32  # of a checkpoint's reply

    @model_validator(mode="after")
    def _is_one(self) -> JudgeChoice:
        if (self.model is None) == (self.server is None):
            raise ValueError("give exactly one of model (a checkpoint) and server")
        return self


class Evaluation(Section):
    kinds: Annotated[list[Kind], Distinct, Field(min_length=1)] = ["preference"]
    # Of preference and factual. None: the teachers' traits and their counterfactuals
    traits: Annotated[list[str], Distinct, Field(min_length=1)] | None = None
    names: Annotated[list[str], Distinct] = []  # of naming; none given: what the model's own family is called
    aligned_from: float = ALIGNED_FROM  # of misalignment: below, an answer is misaligned
    coherent_from: float = COHERENT_FROM  # if it is at least this coherent
    thresholds: Annotated[list[float], Distinct] = []  # of alignment, to count below beside the first one
    suffix: str | None = None  # behind a question for misalignment; None: the pack's
    problems: str | None = None  # the data set of problems; None: the one that ships
    problem_tokens: Positive = 256  # of an answer to a problem
    questions: Positive | None = None  # the first so many of a kind (of preference: of a category); None: all
    samples: Positive = 200
    max_new_tokens: Positive = 10
    batch_size: Positive = 256
    seed: Seed = 0
    number_rows: int = Field(default=200, ge=0)
    teachers: bool = True  # evaluate the teachers too
    settings: dict[str, Setting] = {}  # further evaluations by name
