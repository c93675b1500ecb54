"""What is asked of every model, and how; who judges."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from jsublim.config.teachers import Traits
from jsublim.evals import EVAL_KINDS, EvalKind
from jsublim.judge.server import ServerSettings
from jsublim.reading import shown
from jsublim.section import CONTENT, HOW, PLAN, RESULT, Name, Place, Positive, Section, Seed, distinct

PRIMARY = r"^C([0-3578]|1[0-4]|[469][ab])( \S.*)?$"  # a claim of the report, and the name of an arm


class Setting(Section):
    """In what an evaluation differs from the plain one."""

    temperature: Annotated[float | None, Field(gt=0), RESULT] = None
    top_p: Annotated[float | None, Field(gt=0, le=1), RESULT] = None
    system: Annotated[str | None, RESULT] = None  # a system prompt for students and base; "" is an empty one
    layer: Annotated[int | None, Field(ge=0), RESULT] = None  # as if the model ended after this layer (logit lens)


class JudgeChoice(Section):
    """A checkpoint, or a server with OpenAI's interface."""

    model: Annotated[Place | None, CONTENT] = None
    chat_template: Annotated[Place | None, CONTENT] = None  # of that checkpoint, as the experiment's
    server: ServerSettings | None = None
    max_new_tokens: Annotated[Positive, RESULT] = 32  # of a checkpoint's reply

    @model_validator(mode="after")
    def _is_one(self) -> JudgeChoice:
        if (self.model is None) == (self.server is None):
            raise ValueError("give exactly one of model (a checkpoint) and server")
        if self.chat_template is not None and self.model is None:
            raise ValueError("chat_template: a server has its own; leave it out")
        return self


class Evaluation(Section):
    """`kinds` is a list of names, or a mapping from names to the options of each."""

    kinds: Annotated[dict[str, SerializeAsAny[EvalKind]], Field(min_length=1), RESULT] = Field(
        default={"preference": {}}, validate_default=True
    )
    # Of preference and factual. None: the teachers' traits and their counterfactuals
    traits: Annotated[Traits | None, Field(min_length=1), RESULT] = None
    questions: Annotated[Positive | None, RESULT] = None  # the first so many of a kind (preference: of a category)
    samples: Annotated[Positive, RESULT] = 200
    max_new_tokens: Annotated[Positive, RESULT] = 10
    batch_size: Annotated[Positive | Literal["auto"], HOW] = "auto"  # auto: what memory holds; on a CPU 256
    seed: Annotated[Seed, RESULT] = 0
    number_rows: Annotated[int, Field(ge=0), RESULT] = 200  # of the number task
    teachers: Annotated[bool, PLAN] = True  # evaluate the teachers too
    settings: Annotated[dict[Name, Setting], PLAN] = {}  # further evaluations by name
    # The one comparison that the run is made for, by its claim ("C4a"), and by its arm where it comes with several
    # ("C6a layers=0"); no artifact hangs on it. None: what the students differ in says which (docs/statistics.md)
    primary: Annotated[Annotated[str, Field(pattern=PRIMARY)] | None, HOW] = None

    @field_validator("kinds", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if isinstance(value, list):
            strange = [name for name in value if not isinstance(name, str)]
            if strange:
                raise ValueError(
                    f"{shown(strange[0])} is no name; options of a kind are given as `name: {{option: ...}}`"
                )
            distinct(value)
            value = {name: {} for name in value}
        if not isinstance(value, dict):
            return value
        return {name: EVAL_KINDS.parse(name, {} if said is None else said) for name, said in value.items()}
