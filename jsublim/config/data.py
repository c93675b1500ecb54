"""The rows: what is asked, how the answers are drawn, and what is done to them before a student sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, SerializeAsAny, model_serializer, model_validator

from jsublim.core.reading import near_or_all
from jsublim.core.section import CONTENT, PLAN, RESULT, RUNTIME, Distinct, Place, Positive, Section, SeedInt, one_of
from jsublim.inference.served import SampleServerSettings
from jsublim.text.prompts.numbers import EXAMPLE_COUNT, SENTENCES
from jsublim.transforms import CHANGES, Change

Strategy = Literal["temperature", "greedy"]
T = TypeVar("T")


class RowSampling(Section):
    """How teachers' answers are drawn. What of a checkpoint's own sampling numbers counts is the recipe's."""

    strategy: Annotated[Strategy, RESULT] = "temperature"
    """`temperature` draws at temperature 1, `greedy` takes the most probable token."""
    seed: Annotated[SeedInt, RESULT] = 0
    """Of the answers' random numbers, which are keyed by row and token."""
    max_new_tokens: Annotated[Positive, RESULT] = 64
    """Tokens after which an answer ends, whatever it says."""
    constrain: Annotated[Literal["numbers"] | None, RESULT] = None
    """`numbers` keeps every answer in the number task's format, token by token; null: answers are free."""
    batch_size: Annotated[Positive | Literal["auto"], RUNTIME] = "auto"
    """Answers drawn together; auto: as many as memory holds (on a CPU 64)."""
    shard: Annotated[Positive, RESULT] = 4096
    """Prompts that one task answers: what a kill can cost at most, and what machines share."""
    server: SampleServerSettings | None = None
    """A server (vLLM, SGLang) that draws answers, the evaluations' too; null: all are drawn here."""

    def contradictions(self) -> Iterator[tuple[Any, str]]:
        both = self.server is not None and self.constrain is not None
        yield both, "constrain: a server does not know our formats; leave out server, or constrain"


class Data(Section):
    """`kind`: number requests of the pack, word problems (those that ship, or a data set by `source`), or the prompts of a
    file (`source`; one prompt per line, or JSONL rows with `prompt`)."""

    kind: Annotated[Literal["numbers", "problems", "file"], RESULT] = "numbers"
    """What teachers are asked: requests to continue a list of numbers, word problems, or the prompts of a file."""
    source: Annotated[Place | None, CONTENT] = None
    """The file of prompts, or the data set of word problems; null: the word problems of the package."""
    sentences: Annotated[list[Annotated[str, one_of(SENTENCES)]], Distinct, Field(min_length=1), RESULT] = list(
        SENTENCES
    )
    """The sentences that a number request consists of."""
    examples: Annotated[tuple[Positive, Positive], RESULT] = EXAMPLE_COUNT
    """How many numbers a request shows: at least the first, fewer than the second."""
    num_prompts: Annotated[Positive, RESULT] = 30_000
    """How many prompts each teacher answers."""
    seed: Annotated[SeedInt, RESULT] = 42
    """Of the number requests."""
    draw: Annotated[Literal["shared", "per-seed"], RESULT] = "shared"
    """`shared`: one draw of rows for all students of a teacher; `per-seed`: another one for each of students.seeds."""

    def contradictions(self) -> Iterator[tuple[Any, str]]:
        first, second = self.examples
        yield first >= second, f"examples={[first, second]}: the second must be above the first"
        yield self.kind == "file" and self.source is None, "kind=file needs source, a file of prompts"
        asks_pack = self.kind == "numbers" and self.source is not None
        yield asks_pack, "kind=numbers asks the pack's requests; source belongs to problems and file"


class Resampling(Section):
    """In what the answers of a data set are drawn otherwise; None is as `sampling` says."""

    strategy: Annotated[Strategy | None, RESULT] = None
    """How this data set's answers are drawn; null: as sampling.strategy says."""
    seed: Annotated[SeedInt | None, RESULT] = None
    """Of this data set's answers; null: sampling.seed."""


class Dataset(Section):
    """In what a set of rows differs from the teachers' plain answers. In YAML, changes stand beside the other fields
    (`{shuffle: within, seed: 3}`); they are done in their own order, whatever theirs is there."""

    sampling: Resampling = Resampling()
    """In what its answers are drawn otherwise than the plain ones."""
    seed: Annotated[SeedInt, RESULT] = 0
    """Of the changes of rows."""
    divergence: Annotated[bool | None, PLAN] = None
    """Look for divergence tokens in these rows (true), or only where a student needs them (false); null: in plain answers always, in
    changed ones where a student needs them."""
    changes: Annotated[dict[str, SerializeAsAny[Change]], RESULT] = {}
    """What is done to the answers. In YAML each change stands beside the other fields, by its name."""

    @model_validator(mode="before")
    @classmethod
    def _changes_by_name(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        fields = {key: given for key, given in value.items() if key in cls.model_fields and key != "changes"}
        changes = {}
        for name, options in value.items():
            if not isinstance(name, str):
                raise ValueError(f"key {name!r} is no name of a change; known: {', '.join(CHANGES.known)}")
            if name in fields or options is None or options is False or options == []:
                continue
            if name not in CHANGES.known:
                known = [*(key for key in cls.model_fields if key != "changes"), *CHANGES.known]
                raise ValueError(f"unknown key '{name}'; {near_or_all(name, known, 'known keys')}")
            changes[name] = CHANGES.parse(name, options)
        return fields | {"changes": dict(sorted(changes.items(), key=lambda given: given[1].order))}

    @model_serializer(mode="wrap")
    def _flat(self, handler: Any) -> dict[str, Any]:
        values = handler(self)
        return {key: value for key, value in values.items() if key != "changes"} | values.get("changes", {})

    def contradictions(self) -> Iterator[tuple[Any, str]]:
        for name, change in self.changes.items():
            beside_others = change.alone and len(self.changes) > 1
            yield beside_others, f"{name} needs the answers as they were sampled; leave the other changes out"

    def of(self, teacher: str) -> Dataset:
        """What of it is done to a teacher's answers."""
        filled = {name: change.of(teacher) for name, change in self.changes.items()}
        changes = {name: change for name, change in filled.items() if change.applies_to(teacher)}
        return self.model_copy(update={"changes": changes})

    def first(self, told: Callable[[Change], T | None]) -> T | None:
        """What the first of its changes says that says anything."""
        return next((value for change in self.changes.values() if (value := told(change))), None)

    @property
    def needs(self) -> set[str]:
        return {need for change in self.changes.values() for need in change.needs}

    @property
    def quirks(self) -> list[str]:
        """Those of the recipe that decide what its changes make."""
        return sorted({quirk for change in self.changes.values() for quirk in change.quirks})

    @property
    def plain(self) -> bool:
        """Whether the answers stay as they were sampled."""
        return not self.changes

    def facts(self) -> dict[str, Any]:
        """What a report compares: every known change with its options, or None."""
        dumped = self.model_dump(mode="json")
        changes = {name: dumped.get(name) for name in CHANGES.known}
        return {"seed": self.seed, "sampling_seed": self.sampling.seed} | changes


class Scoring(Section):
    """Teacher-forced reading: divergence, stored targets, entangled numbers."""

    batch_size: Annotated[Positive | Literal["auto"], RUNTIME] = "auto"
    """Rows read together, of the longest; short ones share a line, so there are more of them. auto: as many as memory holds (on a CPU 64)."""
