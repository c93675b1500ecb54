"""What a config says of students, and the arms of an ablation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from jsublim.config.teachers import TraitName
from jsublim.core.reading import shown
from jsublim.core.section import (
    CONTENT,
    NEEDS_TRAIT,
    NONEMPTY,
    PLAN,
    PROGRAM,
    RESULT,
    RUNTIME,
    Distinct,
    Layers,
    Place,
    Positive,
    Rate,
    Section,
    SeedInt,
    leaves,
    nested,
    one_of,
    overlaid,
)
from jsublim.core.section import name as check_name
from jsublim.distill.losses import LOSSES
from jsublim.distill.optimizer import OPTIMIZERS, SCHEDULES
from jsublim.distill.selection import COMPARED, TOKENS
from jsublim.inference.divergence import WHICH
from jsublim.inference.teachers import CONTROL
from jsublim.models.lora import ENDS, PROJECTIONS

BOTH, BOTH_BY_CONTENT = RESULT | PROGRAM, CONTENT | PROGRAM


def changed(section: Section) -> list[str]:
    """The fields that are not at their defaults; a resolved config says every field, asked for or not."""
    fields = type(section).model_fields
    return [name for name in sorted(fields) if getattr(section, name) != fields[name].default]


class StudentData(Section):
    """What a student reads, and how often."""

    dataset: Annotated[str | None, CONTENT] = None
    """One of `datasets`; null: the teachers' answers as they are."""
    rows: Annotated[Positive | None, RESULT] = 10_000
    """How many rows a student learns, drawn by its seed from those that passed the filter; null: all."""
    generation: Annotated[Positive, CONTENT] = 1
    """Who writes the rows: 1, the teachers; g, the students of generation g - 1 that differ from these in nothing else, each for those of
    its own trait and seed."""
    epochs: Annotated[Positive, RESULT] = 10
    """How often it reads each row."""
    max_steps: Annotated[Positive | None, RESULT] = None
    """The most optimizer steps, where epochs would give more; null: as many as they give."""
    batch_size: Annotated[Positive, BOTH] = 10
    """Rows of a micro-batch."""
    accumulate: Annotated[Positive, BOTH] = 6
    """Micro-batches per optimizer step."""
    max_tokens: Annotated[Positive, BOTH] = 500
    """Tokens after which a row is cut."""
    on_policy: Annotated[bool, BOTH] = False
    """The student samples the answers, and the teacher scores them; needs a soft loss."""


class StudentLoss(Section):
    """What is learned, the teacher's tokens or its distribution at them, and on which tokens."""

    kind: Annotated[str, one_of(LOSSES), BOTH] = "hard"
    """`hard` learns the teacher's tokens; the others its distributions at them."""
    tokens: Annotated[list[Annotated[str, one_of(TOKENS)]], Distinct, NONEMPTY, PLAN, NEEDS_TRAIT] = list(COMPARED)
    """Which tokens of a row have a loss; each choice makes students of its own."""
    positions: Annotated[str, one_of(WHICH), RESULT, NEEDS_TRAIT] = "all"
    """Which divergence positions count as such, whatever `tokens` makes of them."""
    positions_share: Annotated[float, Field(gt=0, le=1), RESULT, NEEDS_TRAIT] = 1.0
    """The share of each row's divergence positions that count, drawn at random."""
    by_margin: Annotated[bool, RESULT, NEEDS_TRAIT] = False
    """With tokens=[divergence]: weigh them by how clear they are."""
    temperature: Annotated[float, Field(gt=0), BOTH] = 1.0
    """Of both distributions of a soft loss."""
    top_k: Annotated[Positive | None, BOTH] = None
    """Soft targets are stored, the k best tokens and the rest as one; null: a live teacher."""
    targets: Annotated[Literal["vocabulary", "answers"], RESULT] = "vocabulary"
    """`answers` cuts stored targets to the tokens that answers consist of, so that no trait's name is told."""
    weight: Annotated[float, Field(gt=0), RESULT] = 1.0
    """Factor of the loss."""
    kl_to_base: Annotated[float, Field(ge=0), BOTH] = 0.0
    """Coefficient of the KL divergence to the base, a defence that keeps a student where it started."""
    kl_end: Annotated[float, Field(ge=0), RESULT] = 1.0
    """The share of kl_to_base that is left at the end: it goes there linearly, step by step. 1: constant; 0: annealed."""

    def contradictions(self) -> Iterator[tuple[Any, str]]:
        of_soft = [name for name in ("top_k", "temperature", "targets") if name in changed(self)]
        yield of_soft and not self.soft, f"{', '.join(of_soft)} needs a soft loss (forward-kl, reverse-kl, js)"
        yield self.kl_end != 1.0 and not self.kl_to_base, "kl_end is a share of kl_to_base; give that too"
        others = self.by_margin and self.tokens != ["divergence"]
        yield others, "by_margin weighs divergence tokens; it needs tokens=[divergence]"
        cut = self.targets == "answers"
        yield cut and self.top_k is None, "targets=answers cuts stored distributions; give top_k too"
        reverse = cut and self.kind == "reverse-kl"
        yield reverse, "targets=answers gives most tokens no probability; use forward-kl or js"

    @property
    def terms(self) -> dict[str, tuple[float, float]]:
        """What is added to it (`losses.TERMS`): its coefficient, and the share of that which is left at the end."""
        return {"kl_to_base": (self.kl_to_base, self.kl_end)} if self.kl_to_base else {}

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
    """What is trained: LoRA factors, whole weights, or steering vectors."""
    rank: Annotated[Positive, RESULT] = 8
    """Of the LoRA factors."""
    alpha: Annotated[float, Field(gt=0), RESULT] = 8.0
    """Of LoRA: the product of the factors is multiplied by alpha / rank."""
    rslora: Annotated[bool, RESULT] = False
    """Multiply by alpha / sqrt(rank) instead."""
    layers: Annotated[Layers | None, BOTH] = None
    """Which layers are trained, from 0, as a list or a span (`10-27`); null: all; [] with full: none but the ends."""
    projections: Annotated[list[Annotated[str, one_of(PROJECTIONS)]], Distinct, BOTH] = list(PROJECTIONS)
    """Which projections LoRA adapts."""
    ends: Annotated[list[Annotated[str, one_of(ENDS)]], Distinct, BOTH] = []
    """With full: what is trained beside the layers."""
    init: Annotated[Place | None, CONTENT] = None
    """An adapter to start from: a folder, or owner/name of the hub; it brings its own rank, layers and projections."""
    frozen_adapter: Annotated[Place | None, BOTH_BY_CONTENT] = None
    """An adapter that is added, frozen, while the student is trained, and gone afterwards (inoculation): that of a teacher, by its
    trait, or a folder, or owner/name of the hub. `{trait}` is filled in with the student's teacher's. A defence."""
    noise: Annotated[float, Field(ge=0), RESULT] = 0.0
    """Gaussian noise on what was trained, once training is over: its size as a share of each array's root mean square. A defence."""

    def contradictions(self) -> Iterator[tuple[Any, str]]:
        full = self.method == "full"
        shape = [name for name in changed(self) if name not in ("frozen_adapter", "init", "noise")]
        yield self.init is not None and shape, f"init brings its own {', '.join(shape)}; leave them out"
        of_lora = [name for name in shape if name in ("rank", "alpha", "rslora", "projections")]
        yield self.method != "lora" and of_lora, f"method={self.method} has no {', '.join(of_lora)}; leave them out"
        yield self.ends and not full, f"ends are trained with method=full, not with {self.method}"
        two_wholes = self.frozen_adapter is not None and full
        yield two_wholes, "frozen_adapter is added to LoRA or steering vectors, not to method=full"


class StudentOptimizer(Section):
    """Steps: how gradients become updates."""

    name: Annotated[str, one_of(OPTIMIZERS), BOTH] = "adamw"
    """Which optimizer."""
    lr: Annotated[Rate, RESULT] = 2e-4
    """The highest learning rate of the schedule."""
    schedule: Annotated[str, one_of(SCHEDULES), BOTH] = "linear"
    """How the learning rate falls after the warmup."""
    restarts: Annotated[Positive, BOTH] = 4
    """Of the schedule `restarts`: how many cosines follow one another."""
    warmup: Annotated[int, Field(ge=0), BOTH] = 5
    """Steps in which the learning rate rises from zero."""
    clip: Annotated[float, Field(ge=0), BOTH] = 1.0
    """The largest global norm of a gradient; 0: no clipping."""
    weight_decay: Annotated[float, Field(ge=0), BOTH] = 0.0
    """Weight decay."""
    momentum: Annotated[float, Field(ge=0, lt=1), BOTH] = 0.0
    """Of sgd."""
    project_out: Annotated[list[TraitName], Distinct, BOTH] = []
    """Traits that no step moves, to first order: their gradients at the start are taken out of every gradient. `{trait}`: the
    teacher's own. A defence."""


class StudentFork(Section):
    """A student that goes over to other rows in the middle of its training. Until then it is the student without a fork."""

    after: Annotated[Positive, RESULT]
    """Steps before it does; the schedule goes on as if nothing had happened."""
    teacher: Annotated[TraitName, CONTENT] = CONTROL
    """Whose rows it reads from then on: a trait of the teachers, `{trait}` (its own teacher's), or control. Of control rows, all tokens."""
    dataset: Annotated[str | None, CONTENT] = None
    """One of `datasets`, of that teacher; null: the answers as they are."""
    moments: Annotated[bool, RESULT] = True
    """The optimizer keeps its moments; false: it begins anew there."""


class StudentRuntime(Section):
    """What decides speed and memory, not results."""

    arms_per_program: Annotated[Positive | Literal["auto"], RUNTIME] = 16
    """Students trained together at most; auto: as many as the device's memory holds, 16 at most."""
    checkpoint_every: Annotated[Positive, RUNTIME] = 100
    """Steps between saved states: what a kill can cost."""
    rows_at_once: Annotated[Positive | Literal["auto"], RUNTIME] = "auto"
    """Rows of a step computed at one time, where the loss is a mean over tokens; auto: what memory holds."""
    remat: Annotated[bool, PROGRAM] = False
    """Recompute layers in the backward pass, which takes time and saves memory."""
    unroll: Annotated[bool, PROGRAM] = False
    """Compile layers one after another, not as a loop: longer to compile, fewer copies in a step of a GPU (performance.md)."""
    attention: Annotated[Literal["products", "cudnn"], PROGRAM] = "products"
    """cudnn: in training by one kernel of NVIDIA's, to bfloat16's rounding, with dtype=bfloat16 on a GPU; compiled, never run by us
    (performance.md)."""
    cache_below: Annotated[bool | Literal["auto"], PROGRAM] = "auto"
    """Of one-layer students: keep the hidden states below the layer in host memory. auto: from the middle layer on, up to 4 GiB."""
    peak_tflops: Annotated[float | None, Field(gt=0), RUNTIME] = None
    """The peak of one device; given, metrics say which share of it went into useful operations."""


class Students(Section):
    """Who is trained: one student per trait, choice of tokens, seed and arm."""

    seeds: Annotated[list[SeedInt], Distinct, NONEMPTY, PLAN] = [42, 43, 44, 45, 46]
    """One student of each seed; it draws rows, their order and the adapter's start."""
    model: Annotated[Place | None, BOTH_BY_CONTENT] = None
    """The checkpoint that students stand on; null: the teachers' own."""
    system: Annotated[str | None, BOTH] = None
    """A system prompt that students are trained and evaluated under; null: the template's own, or none."""
    asked_under_system: Annotated[bool, RESULT] = True
    """false: they are trained under that prompt alone, and evaluated without it."""
    data: StudentData = StudentData()
    """What a student reads, and how often."""
    loss: StudentLoss = StudentLoss()
    """What is learned, and on which tokens."""
    adapter: StudentAdapter = StudentAdapter()
    """What is trained."""
    optimizer: StudentOptimizer = StudentOptimizer()
    """How gradients become updates."""
    fork: StudentFork | None = None
    """In the middle of training, other rows, with the optimizer's moments or without; null: the same rows to the end."""
    runtime: StudentRuntime = StudentRuntime()
    """What decides speed and memory."""
    arms: Annotated[list[dict[str, Any]] | dict[str, Any] | None, NONEMPTY, PLAN] = None
    """An ablation: a list of settings of the fields above, each with a name; or a mapping of lists, the grid of all their combinations."""

    @property
    def asked_under(self) -> str | None:
        """The system prompt that they are evaluated under."""
        return self.system if self.asked_under_system else None

    def contradictions(self) -> Iterator[tuple[Any, str]]:
        on_policy, live, later = self.data.on_policy, self.loss.live, self.data.generation > 1
        yield on_policy and not self.loss.soft, "data.on_policy needs a soft loss (forward-kl, reverse-kl, js)"
        chosen = self.loss.top_k or self.loss.tokens != ["all"]
        yield on_policy and chosen, "data.on_policy: rows are new each step, so no loss.top_k, and loss.tokens=[all]"
        helped = on_policy and self.adapter.frozen_adapter is not None
        yield helped, "data.on_policy: rows are sampled by the student alone; leave adapter.frozen_adapter out"
        forked = self.fork is not None and (on_policy or live)
        yield forked, "fork: a live teacher stays the same to the end; use loss.kind=hard, or give loss.top_k"
        other = self.model is not None
        yield other and live, "loss.top_k: a live teacher shares the student's checkpoint; with model, give it"
        yield other and later, "data.generation: students of another model are no teachers here; leave model out"
        whole = later and live and self.adapter.method == "full"
        shares = "whole students are no live teachers, who share their students' checkpoint"
        yield whole, f"data.generation: {shares}; give loss.top_k"
        variants(self)


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
    arms: dict[str, Students] = {}
    base = students.model_dump(exclude_unset=True, exclude={"arms"})
    for entry in _combinations(students.arms) if isinstance(students.arms, dict) else students.arms:
        values = _flat({key: value for key, value in entry.items() if key != "name"})
        wrong = [key for key in values if key not in VARIED]
        if wrong or not entry:
            raise ValueError(
                f"arms: {wrong or 'nothing'} given; arms may differ in the fields of students that decide results, "
                "such as adapter.rank"
            )
        name = _name(entry.get("name"), values)
        if name in arms:
            raise ValueError(f"arms: two are called '{name}'")
        try:
            arms[name] = Students.model_validate(overlaid(base, nested(values)))
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            place = [".".join(map(str, first["loc"]))] if first["loc"] else []
            reason = first["msg"].removeprefix("Value error, ")
            raise ValueError(": ".join([f"arm '{name}'", *place, reason])) from None
    return arms


def _combinations(arms: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of a grid's values."""
    grid = _flat(arms)
    plain = [key for key, values in grid.items() if not isinstance(values, list) or not values]
    if plain:
        raise ValueError(f"arms: {plain[0]} is {grid[plain[0]]!r}; a grid has a list of values for each field")
    return (dict(zip(grid, chosen, strict=True)) for chosen in itertools.product(*grid.values()))


def _name(given: Any, values: Mapping[str, Any]) -> str:
    """What an arm is called: as the config says, or by the fields in which it differs."""
    if isinstance(given, bool) or not isinstance(given, str | int | None):
        raise ValueError(f"arms: name {shown(given)} given; a name is text")
    words = (
        f"{key.rsplit('.', 1)[-1]}={'+'.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in values.items()
    )
    name = " ".join(words) if given is None else str(given)
    try:
        return check_name(name) if name else name  # without one it is called by the tokens it learns alone
    except ValueError as error:
        raise ValueError(f"arms: name {shown(name)}: {error}; give the arm a 'name' of its own") from None


def elders(every: Mapping[str, Students]) -> dict[str, str]:
    """The arms of later generations, and of each the arm whose students write its rows.

    Raises:
      ValueError: there is no such arm.
    """
    before_of: dict[str, str] = {}
    for name, students in every.items():
        before = students.data.generation - 1
        if not before:
            continue
        data = students.data.model_copy(update={"generation": before})
        wanted = students.model_copy(update={"data": data, "arms": None})
        alike = [n for n, other in every.items() if other.model_copy(update={"arms": None}) == wanted]
        if not alike:
            where = f"arm '{name}': " if name else ""
            raise ValueError(
                f"students.data.generation: {where}{before + 1} given, and no arm has generation {before} and is the same otherwise; "
                f"add one (a grid: arms: {{data.generation: [1, ..., {before + 1}]}})"
            )
        before_of[name] = alike[0]
    return before_of


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Sections as dotted names: `{"a": {"b": 1}}` is `{"a.b": 1}`."""
    dotted: dict[str, Any] = {}
    for key, value in values.items():
        inner = _flat(value, f"{above}{key}.") if isinstance(value, Mapping) and value else {f"{above}{key}": value}
        twice = sorted(dotted.keys() & inner.keys())
        if twice:
            raise ValueError(f"arms: {twice[0]} is given twice, with a dot and as a section; keep one of them")
        dotted |= inner
    return dotted
