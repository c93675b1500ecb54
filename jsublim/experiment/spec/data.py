"""The rows: what is asked, and what is done to the answers before a student sees them."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from jsublim.experiment.spec.base import Distinct, Positive, Section, Seed
from jsublim.prompts.numbers import EXAMPLE_COUNT, PARTS, SENTENCES
from jsublim.teachers import CONTROL

Share = Annotated[float, Field(gt=0, le=1)]
Strategy = Literal["temperature", "greedy"]
Part = Literal["example", "count_qualifier", "digit_descriptor", "instruction", "format", "suffix"]
Sentence = Literal["example", "instruction", "format", "suffix"]
assert get_args(Sentence) == SENTENCES and get_args(Part) == tuple(PARTS)


class Data(Section):
    """`kind`: number requests of the pack, word problems (those that ship, or a data set by `source`), or the prompts of a
    file (`source`; a line each, or JSONL rows with `prompt`)."""

    kind: Literal["numbers", "problems", "file"] = "numbers"
    source: str | None = None
    sentences: Annotated[list[Sentence], Distinct, Field(min_length=1)] = list(SENTENCES)  # of a number request
    examples: tuple[Positive, Positive] = EXAMPLE_COUNT  # numbers that it shows: at least, less than
    num_prompts: Positive = 30_000
    prompt_seed: Seed = 42
    entangled: int = Field(default=1000, ge=1, le=1000)  # the first so many of 0..999 are scored for entanglement
    seed: Seed = 0
    max_new_tokens: Positive = 64
    batch_size: Positive = 64

    @model_validator(mode="after")
    def _has_source(self) -> Data:
        if self.examples[0] >= self.examples[1]:
            raise ValueError(f"examples={list(self.examples)}: the second must be above the first")
        if self.kind == "file" and self.source is None:
            raise ValueError("kind=file needs source, a file of prompts")
        if self.kind == "numbers" and self.source is not None:
            raise ValueError("kind=numbers asks the pack's requests; source belongs to problems and file")
        return self


class Mix(Section):
    """Rows of another teacher in the place of a share of a teacher's own."""

    share: Share
    teacher: str = CONTROL
    model: str | None = None  # of another checkpoint; None: of the experiment's


class MixTokens(Section):
    """The argmax of a counterfactual teacher in the place of the data, at a share of the divergence tokens."""

    teacher: str | None = None  # None: at each token one of the counterfactuals that say another one, drawn
    share: Share = 1.0
    first_only: bool = False


class Dataset(Section):
    """In what a set of rows differs from the teachers' plain answers. What is named is done in this order."""

    strategy: Strategy | None = None  # None: as teachers.strategy
    # Answers that the judge gives at least this alignment
    keep_aligned: float | None = Field(default=None, ge=0, le=100)
    remove_entangled: Positive | None = None  # rows with one of the k numbers most entangled with the trait
    shuffle: Literal["within", "across"] | None = None
    redraw: Annotated[list[Part], Distinct] = []  # parts of the request that are drawn anew
    rewrite: bool = False  # the request put in other words by the biased teacher
    mix: Mix | None = None
    mix_tokens: MixTokens | None = None
    seed: Seed = 0

    @model_validator(mode="after")
    def _fits_together(self) -> Dataset:
        if self.mix_tokens and not self.model_copy(update={"mix_tokens": None}).plain:
            raise ValueError("mix_tokens needs the answers as they were sampled; leave the other changes out")
        return self

    def of(self, teacher: str) -> Dataset:
        """What of it is done to a teacher's answers: what needs a trait only where there is one, and nobody's answers are
        mixed with their own."""
        left_out = {"remove_entangled": None, "rewrite": False, "mix_tokens": None} if teacher == CONTROL else {}
        if self.mix is not None and (self.mix.teacher, self.mix.model) == (teacher, None):
            left_out["mix"] = None
        if self.mix_tokens is not None and self.mix_tokens.teacher == teacher:
            left_out["mix_tokens"] = None
        return self.model_copy(update=left_out)

    @property
    def plain(self) -> bool:
        """Whether the answers stay as they were sampled."""
        return self.model_copy(update={"strategy": None, "seed": 0}) == Dataset()


class Scoring(Section):
    batch_size: Positive = 64
