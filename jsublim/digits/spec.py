"""What the config of a digits experiment may say (`kind: digits`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from jsublim.experiment.spec.base import Config, Distinct, Positive, Section, Seed

CLASSES = 10

Condition = Literal["same", "other", "all", "hard"]
Images = Literal["noise", "digits"]


class Network(Section):
    """Pixels to class logits and auxiliary logits, ReLU between."""

    hidden: tuple[Positive, ...] = (128, 128)
    auxiliary: Positive = 10  # logits that no label is ever compared with


class Training(Section):
    """Adam at one learning rate."""

    steps: Positive = 300
    batch_size: Positive = 64
    lr: float = Field(default=1e-3, gt=0, allow_inf_nan=False)


class Students(Training):
    """Distilled from the trained teacher, without a label.

    Conditions: `same` and `other` learn the teacher's distribution over its auxiliary logits, from the teacher's own
    initialisation and from another one; `all` (same initialisation) over class and auxiliary logits together; `hard`
    (same initialisation) only which auxiliary logit is the largest, as a sampled token tells less than a distribution.
    """

    conditions: Annotated[tuple[Condition, ...], Distinct] = Field(
        default=("same", "other", "all", "hard"), min_length=1
    )
    images: Annotated[tuple[Images, ...], Distinct] = Field(default=("noise", "digits"), min_length=1)
    noise: float = Field(
        default=1.0, gt=0, allow_inf_nan=False
    )  # pixels uniform in [-noise, noise]; a digit's are in 0..1
    steps: Positive = 1000
    lr: float = Field(default=3e-3, gt=0, allow_inf_nan=False)
    measure_every: Positive = 100  # steps

    @model_validator(mode="after")
    def _whole_stretches(self) -> Students:
        if self.steps % self.measure_every:
            raise ValueError(f"steps={self.steps} is no multiple of measure_every={self.measure_every}")
        return self


class Digits(Config):
    """One teacher and its students a seed; seeds are what intervals are over."""

    kind: Literal["digits"] = "digits"
    seeds: Annotated[tuple[Seed, ...], Distinct] = Field(default=tuple(range(10)), min_length=1)
    test_share: float = Field(default=0.2, gt=0, lt=1)  # of the images, held out of all training
    split_seed: Seed = 0
    network: Network = Network()
    teacher: Training = Training()
    students: Students = Students()
