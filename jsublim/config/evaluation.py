"""What is asked of every model, and how; who judges."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, field_validator

from jsublim.config.teachers import Traits
from jsublim.core.reading import shown
from jsublim.core.section import CONTENT, PLAN, RESULT, RUNTIME, Name, Place, Positive, Section, SeedInt, distinct
from jsublim.evals import EVAL_KINDS, EvalKind
from jsublim.judge.server import ServerSettings

QUESTION = "{question}"
PRIMARY = r"^C\d+[a-z]?( \S.*)?$"  # a claim of the report, and the name of an arm


class Setting(Section):
    """In what an evaluation differs from the plain one."""

    temperature: Annotated[float | None, Field(gt=0), RESULT] = None
    """Of the answers; null: as the plain evaluation."""
    top_p: Annotated[float | None, Field(gt=0, le=1), RESULT] = None
    """Answers are drawn from the most probable tokens that together have this probability; null: as the plain evaluation."""
    system: Annotated[str | None, RESULT] = None
    """A system prompt for the base and the students, "" an empty one; null: as the plain evaluation."""
    wording: Annotated[str | None, RESULT] = None
    """The questions of preference in other words: a text in which `{question}` stands for each; null: as the plain evaluation."""
    layer: Annotated[int | None, Field(ge=0), RESULT] = None
    """The model is read as if it ended after this layer (logit lens); null: whole."""

    def contradictions(self) -> Iterator[tuple[Any, str]]:
        lost = self.wording is not None and QUESTION not in self.wording
        yield lost, f"wording={shown(self.wording)} has no place for the question; write {QUESTION} there"


class JudgeChoice(Section):
    """A checkpoint, or a server with OpenAI's interface."""

    model: Annotated[Place | None, CONTENT] = None
    """A checkpoint that judges, on this machine."""
    chat_template: Annotated[Place | None, CONTENT] = None
    """Of that checkpoint, as the experiment's chat_template."""
    server: ServerSettings | None = None
    """A server with OpenAI's chat-completions interface that judges."""
    max_new_tokens: Annotated[Positive, RESULT] = 32
    """Tokens of a checkpoint's reply."""

    def contradictions(self) -> Iterator[tuple[Any, str]]:
        yield (self.model is None) == (self.server is None), "give exactly one of model (a checkpoint) and server"
        yield self.chat_template and not self.model, "chat_template: a server has its own; leave it out"


class Evaluation(Section):
    """`kinds` is a list of names, or a mapping from names to the options of each."""

    kinds: Annotated[dict[str, SerializeAsAny[EvalKind]], Field(min_length=1), RESULT] = Field(
        default={"preference": {}}, validate_default=True
    )
    """What models are asked: a list of names, or a mapping from names to the options of each."""
    traits: Annotated[Traits | None, Field(min_length=1), RESULT] = None
    """Traits that preference and factual look for; null: the teachers' and their counterfactuals'."""
    questions: Annotated[Positive | None, RESULT] = None
    """How many questions of a kind are asked, the first ones (preference: of each category); null: all."""
    split_questions: Annotated[bool | None, RESULT] = None
    """Traits' directions (project_out, drop_audited, audit) are fitted to every other question of preference, and models are asked the others.
    null: in experiments that fit any; false: fitted to the questions asked, which flatters what is fitted."""
    samples: Annotated[Positive, RESULT] = 200
    """Answers to each question."""
    max_new_tokens: Annotated[Positive, RESULT] = 10
    """Tokens after which an answer ends."""
    batch_size: Annotated[Positive | Literal["auto"], RUNTIME] = "auto"
    """Answers drawn together; auto: as many as memory holds (on a CPU 256)."""
    seed: Annotated[SeedInt, RESULT] = 0
    """Of the answers' random numbers."""
    number_rows: Annotated[int, Field(ge=0), RESULT] = 200
    """Rows on which students continue numbers, of those they were trained on and of others; 0: none."""
    kl_rows: Annotated[int, Field(ge=0), RESULT] = 0
    """Rows on which a student's KL divergence from its teacher is measured, of those it did not learn (where none are left, of those it did); 0: none."""
    teachers: Annotated[bool, PLAN] = True
    """Evaluate the teachers too."""
    settings: Annotated[dict[Name, Setting], PLAN] = {}
    """Further evaluations of the same models, by name."""
    primary: Annotated[Annotated[str, Field(pattern=PRIMARY)] | None, RUNTIME] = None
    """The one comparison that the run is made for, by its claim (`C4a`), and by its arm where it comes with several (`C6a layers=0`);
    null: what the students differ in says which (docs/statistics.md). No artifact hangs on it."""

    @field_validator("primary")
    @classmethod
    def _is_a_claim(cls, value: str | None) -> str | None:
        from jsublim.report.claims import CLAIMS  # where it is needed: the report's libraries take a second to load

        if value is not None and value.split(" ")[0] not in CLAIMS:
            raise ValueError(f"no claim is called {shown(value)}; there are {', '.join(CLAIMS)}")
        return value

    @field_validator("kinds", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if isinstance(value, list):
            for name in value:
                if not isinstance(name, str):
                    raise ValueError(f"{shown(name)} is no name; give options of a kind as `name: {{option: ...}}`")
            value = dict.fromkeys(distinct(value), None)
        if not isinstance(value, dict):
            return value
        return {name: EVAL_KINDS.parse(name, {} if options is None else options) for name, options in value.items()}
