"""What a config says of students, and the arms of an ablation."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal, get_args

import pydantic
from pydantic import Field, model_validator

from jsublim.distill.losses import LOSSES
from jsublim.distill.optimizer import OPTIMIZERS, SCHEDULES
from jsublim.distill.selection import TOKENS
from jsublim.experiment.spec.base import Distinct, Positive, Rate, Section, Seed
from jsublim.models.lora import PROJECTIONS

Condition = Literal["all", "divergence", "non-divergence", "random"]
Projection = Literal["q", "k", "v", "o", "gate", "up", "down"]
LossKind = Literal["hard", "forward-kl", "reverse-kl", "js"]
OptimizerName = Literal["adamw", "adafactor", "sgd", "muon"]
Schedule = Literal["linear", "cosine", "constant", "restarts"]
for _kind, _known in (
    (Condition, TOKENS), (Projection, PROJECTIONS), (LossKind, LOSSES), (OptimizerName, OPTIMIZERS), (Schedule, SCHEDULES)
):  # fmt: skip
    assert set(get_args(_kind)) == set(_known)


class Students(Section):
    data: str | None = None  # one of `datasets`; None: the teachers' answers as they are
    system: str | None = None  # a system prompt it is trained and evaluated under; None: the template's own, or none
    model: str | None = None  # the checkpoint it stands on; None: the teachers' own
    conditions: Annotated[list[Condition], Distinct] = Field(
        default=["all", "divergence", "non-divergence", "random"], min_length=1
    )
    seeds: Annotated[list[Seed], Distinct] = Field(default=[42, 43, 44, 45, 46], min_length=1)
    rows: Positive | None = 10_000  # rows drawn of those that passed the filter; None: all
    epochs: Positive = 10
    max_steps: Positive | None = None  # a lower limit than the epochs give
    batch_size: Positive = 10
    accumulate: Positive = 6
    # Which divergence tokens count as such, whatever the condition makes of them
    points: Literal["all", "first", "first-half", "second-half"] = "all"
    points_share: float = Field(default=1.0, gt=0, le=1)  # of each row's, drawn at random
    by_margin: bool = False  # under "divergence": weigh them by how clear they are
    # What is learnt: the teacher's tokens, or its distribution at them
    loss: LossKind = "hard"
    temperature: float = Field(default=1.0, gt=0)  # of both distributions
    top_k: Positive | None = None  # soft targets stored: the k best tokens and the rest as one; None: a live teacher
    targets: Literal["vocabulary", "answers"] = "vocabulary"  # answers: cut to the tokens that answers consist of
    on_policy: bool = False  # the student samples the rows, the teacher scores them
    loss_weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    kl_to_base: float = Field(default=0.0, ge=0, allow_inf_nan=False)  # the defence that keeps a student near its start
    # What is trained
    method: Literal["lora", "full", "steering"] = "lora"
    rank: Positive = 8
    alpha: float = Field(default=8.0, gt=0)
    rslora: bool = False
    layers: list[int] | None = None  # None: all; [] with full: none but the ends
    projections: list[Projection] = list(PROJECTIONS)
    ends: list[Literal["embed", "norm", "head"]] = []  # with full: what is trained beside the layers
    init_adapter: str | None = None
    # How
    optimizer: OptimizerName = "adamw"
    momentum: float = Field(default=0.0, ge=0, lt=1)  # of sgd
    lr: Rate = 2e-4
    schedule: Schedule = "linear"
    restarts: Positive = 4
    warmup: int = Field(default=5, ge=0)
    clip: float = Field(default=1.0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_tokens: Positive = 500
    # An ablation: each entry is a set of the fields above; a mapping of lists is the grid of all their combinations
    arms: Annotated[list[dict[str, Any]], Field(min_length=1)] | dict[str, list[Any]] | None = None
    # What decides speed and memory, not results
    remat: bool = False
    cache_below: bool = False  # of one-layer students: keep the hidden states below in host memory
    arms_per_program: Positive | Literal["auto"] = 16  # "auto": as many as the device's memory holds
    checkpoint_every: Positive = 100
    peak_tflops: float | None = Field(default=None, gt=0)  # of one device, to state what share of it was reached
    tensorboard: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> Students:
        said = sorted({"method", "rank", "alpha", "rslora", "layers", "projections", "ends"} & self.model_fields_set)
        if self.init_adapter is not None and said:
            raise ValueError(f"init_adapter brings its own {', '.join(said)}; leave them out")
        said = sorted({"rank", "alpha", "rslora", "projections"} & self.model_fields_set)
        if self.method != "lora" and said:
            raise ValueError(f"method={self.method} has no {', '.join(said)}; leave them out")
        if self.ends and self.method != "full":
            raise ValueError(f"ends are trained with method=full, not with {self.method}")
        soft = [name for name in ("top_k", "on_policy", "temperature", "targets") if name in self.model_fields_set]
        soft = [name for name in soft if getattr(self, name) != Students.model_fields[name].default]
        if self.loss == "hard" and soft:
            raise ValueError(f"{', '.join(soft)} needs a soft loss (forward-kl, reverse-kl, js)")
        if self.on_policy and (self.top_k or self.conditions != ["all"]):
            raise ValueError("on_policy rows are new each step: no top_k, and conditions=[all]")
        if self.by_margin and self.conditions != ["divergence"]:
            raise ValueError("by_margin weighs divergence tokens; it needs conditions=[divergence]")
        if self.targets == "answers" and self.top_k is None:
            raise ValueError("targets=answers cuts stored distributions; give top_k too")
        if self.targets == "answers" and self.loss == "reverse-kl":
            raise ValueError("targets=answers gives most tokens no probability; use forward-kl or js")
        if self.model is not None and self.loss != "hard" and self.top_k is None:
            raise ValueError("a live teacher shares the student's checkpoint; with model, give top_k too")
        variants(self)
        return self


_SHARED = {
    "arms", "remat", "cache_below", "arms_per_program", "checkpoint_every", "peak_tflops", "tensorboard", "batch_size",
    "accumulate",
}  # fmt: skip


def variants(students: Students) -> dict[str, Students]:
    """The settings of an ablation's arms by name; without `arms`, the one setting there is, under "".

    Raises:
      ValueError: a field that arms cannot differ in, or two arms of one name.
    """
    if students.arms is None:
        return {"": students}
    if isinstance(students.arms, dict):
        choices = [[(key, value) for value in values] for key, values in students.arms.items()]
        entries = [dict(chosen) for chosen in itertools.product(*choices)]
    else:
        entries = students.arms
    found: dict[str, Students] = {}
    base = students.model_dump(exclude_unset=True, exclude={"arms"})
    for entry in entries:
        values = {key: value for key, value in entry.items() if key != "name"}
        wrong = [key for key in values if key in _SHARED or key not in Students.model_fields]
        if wrong or not entry:
            raise ValueError(
                f"arms: {wrong or 'nothing'} given; arms may differ in the fields of students that decide results"
            )
        name = str(entry.get("name") or " ".join(f"{key}={_short(value)}" for key, value in values.items()))
        if name in found:
            raise ValueError(f"arms: two are called '{name}'")
        try:
            found[name] = Students.model_validate(base | values)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"arm '{name}': {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return found


def _short(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)
