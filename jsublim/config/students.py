"""What a config says of students, and the arms of an ablation."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

import pydantic
from pydantic import Field, model_validator

from jsublim.distill.losses import LOSSES
from jsublim.distill.optimizer import OPTIMIZERS, SCHEDULES
from jsublim.distill.selection import TOKENS
from jsublim.divergence import WHICH
from jsublim.models.lora import ENDS, PROJECTIONS
from jsublim.reading import shown
from jsublim.section import (
    CONTENT,
    HOW,
    LATER,
    NEEDS_TRAIT,
    PLAN,
    PROGRAM,
    RESULT,
    Distinct,
    Layers,
    Place,
    Positive,
    Rate,
    Section,
    Seed,
    leaves,
    nested,
    overlaid,
)
from jsublim.section import name as check_name

Tokens = Literal["all", "divergence", "non-divergence", "random"]
Positions = Literal["all", "first", "first-half", "second-half"]
Projection = Literal["q", "k", "v", "o", "gate", "up", "down"]
End = Literal["embed", "norm", "head"]
LossKind = Literal["hard", "forward-kl", "reverse-kl", "js"]
OptimizerName = Literal["adamw", "adafactor", "sgd", "muon"]
Schedule = Literal["linear", "cosine", "constant", "restarts"]
for _kind, _known in (
    (Tokens, TOKENS),
    (Positions, WHICH),
    (Projection, PROJECTIONS),
    (End, ENDS),
    (LossKind, LOSSES),
    (OptimizerName, OPTIMIZERS),
    (Schedule, SCHEDULES),
):
    assert set(get_args(_kind)) == set(_known)

BOTH = RESULT | PROGRAM


class StudentData(Section):
    """What a student reads, and how often."""

    dataset: Annotated[str | None, CONTENT] = None  # one of `datasets`; None: the teachers' answers as they are
    rows: Annotated[Positive | None, RESULT] = 10_000  # drawn of those that passed the filter; None: all
    epochs: Annotated[Positive, RESULT] = 10
    max_steps: Annotated[Positive | None, RESULT] = None  # a lower limit than the epochs give
    batch_size: Annotated[Positive, BOTH] = 10  # rows of a micro-batch
    accumulate: Annotated[Positive, BOTH] = 6  # micro-batches per step
    max_tokens: Annotated[Positive, BOTH] = 500
    on_policy: Annotated[bool, BOTH] = False  # the student samples the rows, the teacher scores them


class StudentLoss(Section):
    """What is learned, the teacher's tokens or its distribution at them, and on which tokens."""

    kind: Annotated[LossKind, BOTH] = "hard"
    tokens: Annotated[list[Tokens], Distinct, Field(min_length=1), PLAN, NEEDS_TRAIT] = [
        "all",
        "divergence",
        "non-divergence",
        "random",
    ]
    # Which divergence positions count as such, whatever `tokens` makes of them
    positions: Annotated[Positions, RESULT, NEEDS_TRAIT] = "all"
    positions_share: Annotated[float, Field(gt=0, le=1), RESULT, NEEDS_TRAIT] = 1.0  # of each row's, drawn at random
    by_margin: Annotated[bool, RESULT, NEEDS_TRAIT] = False  # under "divergence": weigh them by how clear they are
    temperature: Annotated[float, Field(gt=0), BOTH] = 1.0  # of both distributions of a soft loss
    # Soft targets stored: the k best tokens, and the rest as one; None: a live teacher
    top_k: Annotated[Positive | None, BOTH] = None
    # answers: stored targets cut to the tokens that answers consist of
    targets: Annotated[Literal["vocabulary", "answers"], RESULT] = "vocabulary"
    weight: Annotated[float, Field(gt=0), RESULT] = 1.0
    kl_to_base: Annotated[float, Field(ge=0), BOTH] = 0.0  # the defence that keeps a student near its start

    @model_validator(mode="after")
    def _fits_together(self) -> StudentLoss:
        soft = [
            name
            for name in ("top_k", "temperature", "targets")
            if getattr(self, name) != type(self).model_fields[name].default
        ]
        if self.kind == "hard" and soft:
            raise ValueError(f"{', '.join(soft)} needs a soft loss (forward-kl, reverse-kl, js)")
        if self.by_margin and self.tokens != ["divergence"]:
            raise ValueError("by_margin weighs divergence tokens; it needs tokens=[divergence]")
        if self.targets == "answers" and self.top_k is None:
            raise ValueError("targets=answers cuts stored distributions; give top_k too")
        if self.targets == "answers" and self.kind == "reverse-kl":
            raise ValueError("targets=answers gives most tokens no probability; use forward-kl or js")
        return self

    @property
    def soft(self) -> bool:
        return self.kind != "hard"

    @property
    def live(self) -> bool:
        """Whether a teacher is asked at every step."""
        return self.soft and self.top_k is None


class StudentAdapter(Section):
    """What is trained."""

    method: Annotated[Literal["lora", "full", "steering"], BOTH] = "lora"
    rank: Annotated[Positive, RESULT] = 8
    alpha: Annotated[float, Field(gt=0), RESULT] = 8.0
    rslora: Annotated[bool, RESULT] = False
    layers: Annotated[Layers | None, BOTH] = None  # None: all; [] with full: none but the ends
    projections: Annotated[list[Projection], Distinct, BOTH] = list(PROJECTIONS)
    ends: Annotated[list[End], Distinct, BOTH] = []  # with full: what is trained beside the layers
    init: Annotated[Place | None, CONTENT] = None  # an adapter to start from

    @model_validator(mode="after")
    def _fits_together(self) -> StudentAdapter:
        # A resolved config says every field: what stands at its default was not asked for.
        fields = type(self).model_fields
        said = [name for name in sorted(fields) if getattr(self, name) != fields[name].default]
        if self.init is not None and said != ["init"]:
            said.remove("init")
            raise ValueError(f"init brings its own {', '.join(said)}; leave them out")
        said = [name for name in said if name in ("rank", "alpha", "rslora", "projections")]
        if self.method != "lora" and said:
            raise ValueError(f"method={self.method} has no {', '.join(said)}; leave them out")
        if self.ends and self.method != "full":
            raise ValueError(f"ends are trained with method=full, not with {self.method}")
        return self


class StudentOptimizer(Section):
    """Steps: how gradients become updates."""

    name: Annotated[OptimizerName, BOTH] = "adamw"
    lr: Annotated[Rate, RESULT] = 2e-4
    schedule: Annotated[Schedule, BOTH] = "linear"
    restarts: Annotated[Positive, BOTH] = 4
    warmup: Annotated[int, Field(ge=0), BOTH] = 5  # steps
    clip: Annotated[float, Field(ge=0), BOTH] = 1.0  # largest global norm of a gradient; 0 is no clipping
    weight_decay: Annotated[float, Field(ge=0), BOTH] = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1), BOTH] = 0.0  # of sgd


class StudentRuntime(Section):
    """What decides speed and memory, not results."""

    arms_per_program: Annotated[Positive | Literal["auto"], HOW] = 16  # "auto": as many as the device's memory holds
    checkpoint_every: Annotated[Positive, HOW] = 100  # steps
    # Where the loss is a mean over tokens, a step's rows may be computed in any pieces: how many at one time
    rows_at_once: Annotated[Positive | Literal["auto"], HOW] = "auto"
    remat: Annotated[bool, PROGRAM] = False  # recompute layers in the backward pass
    # Of one-layer students: keep the hidden states below the layer in host memory. "auto": from the middle layer on, up to 4 GiB
    cache_below: Annotated[bool | Literal["auto"], PROGRAM] = "auto"
    peak_tflops: Annotated[float | None, Field(gt=0), HOW] = None  # of one device
    tensorboard: Annotated[bool, HOW] = False


class Students(Section):
    seeds: Annotated[list[Seed], Distinct, Field(min_length=1), PLAN] = [42, 43, 44, 45, 46]
    model: Annotated[Place | None, CONTENT | PROGRAM] = None  # the checkpoint it stands on; None: the teachers' own
    # A system prompt that it is trained and evaluated under; None: the template's own, or none
    system: Annotated[str | None, BOTH] = None
    asked_under_system: Annotated[bool, RESULT, LATER] = True  # false: it is trained under that prompt alone
    data: StudentData = StudentData()
    loss: StudentLoss = StudentLoss()
    adapter: StudentAdapter = StudentAdapter()
    optimizer: StudentOptimizer = StudentOptimizer()
    runtime: StudentRuntime = StudentRuntime()
    # An ablation: each entry is a set of the fields above; a mapping of lists is the grid of all their combinations
    arms: Annotated[list[dict[str, Any]] | dict[str, Any] | None, Field(min_length=1), PLAN] = None

    @model_validator(mode="after")
    def _fits_together(self) -> Students:
        if self.data.on_policy and not self.loss.soft:
            raise ValueError("data.on_policy needs a soft loss (forward-kl, reverse-kl, js)")
        if self.data.on_policy and (self.loss.top_k or self.loss.tokens != ["all"]):
            raise ValueError("data.on_policy: rows are new each step, so no loss.top_k, and loss.tokens=[all]")
        if self.model is not None and self.loss.live:
            raise ValueError("loss.top_k: a live teacher shares the student's checkpoint; with model, give it")
        variants(self)
        return self


# What arms can differ in: everything that decides what a student becomes, and which students there are.
VARIED = {
    leaf.name
    for leaf in leaves(Students)
    if leaf.decides is not None and leaf.decides & (RESULT | CONTENT | PLAN) and leaf.name != "arms"
}


def variants(students: Students) -> dict[str, Students]:
    """The settings of an ablation's arms by name; without `arms`, the one setting there is, under "".

    Raises:
      ValueError: a field that arms cannot differ in, or two arms of one name.
    """
    if students.arms is None:
        return {"": students}
    if isinstance(students.arms, dict):
        grid = _flat(students.arms)
        plain = [key for key, values in grid.items() if not isinstance(values, list) or not values]
        if plain:
            raise ValueError(f"arms: {plain[0]} is {grid[plain[0]]!r}; a grid has a list of values for each field")
        choices = [[(key, value) for value in values] for key, values in grid.items()]
        entries = [dict(chosen) for chosen in itertools.product(*choices)]
    else:
        entries = students.arms
    found: dict[str, Students] = {}
    base = students.model_dump(exclude_unset=True, exclude={"arms"})
    for entry in entries:
        values = _flat({key: value for key, value in entry.items() if key != "name"})
        wrong = [key for key in values if key not in VARIED]
        if wrong or not entry:
            raise ValueError(
                f"arms: {wrong or 'nothing'} given; arms may differ in the fields of students that decide results, "
                "such as adapter.rank"
            )
        said = entry.get("name")
        if isinstance(said, bool) or not isinstance(said, str | int | None):
            raise ValueError(f"arms: name {shown(said)} given; a name is text")
        name = " ".join(f"{_last(key)}={_short(value)}" for key, value in values.items()) if said is None else str(said)
        try:
            if name:  # an arm may have none: it is called by the tokens it learns alone
                check_name(name)
        except ValueError as error:
            raise ValueError(f"arms: name {shown(name)}: {error}; give the arm a 'name' of its own") from None
        if name in found:
            raise ValueError(f"arms: two are called '{name}'")
        try:
            found[name] = Students.model_validate(overlaid(base, nested(values)))
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            place = "".join(f"{part}." for part in first["loc"]).rstrip(".")
            said = first["msg"].removeprefix("Value error, ")
            raise ValueError(f"arm '{name}': {place}: {said}" if place else f"arm '{name}': {said}") from None
    return found


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Sections as dotted names: `{"a": {"b": 1}}` is `{"a.b": 1}`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = _flat(value, f"{above}{key}.") if isinstance(value, Mapping) and value else {f"{above}{key}": value}
        twice = sorted(found.keys() & inner.keys())
        if twice:
            raise ValueError(f"arms: {twice[0]} is given twice, with a dot and as a section; keep one of them")
        found |= inner
    return found


def _last(key: str) -> str:
    return key.rsplit(".", 1)[-1]


def _short(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)
