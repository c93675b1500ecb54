"""What the config of a digits experiment may say (`kind: digits`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from jsublim.config import Config
from jsublim.core.section import PLAN, RESULT, Distinct, Positive, Rate, Section, SeedInt

CLASSES = 10

Condition = Literal["same", "other", "all", "hard"]
Images = Literal["noise", "digits"]


class Network(Section):
    """Pixels to class logits and auxiliary logits, ReLU between."""

    hidden: Annotated[tuple[Positive, ...], RESULT] = (128, 128)
    """Units of each hidden layer."""
    auxiliary: Annotated[Positive, RESULT] = 10
    """Auxiliary logits, which no label is ever compared with."""


class AdamSettings(Section):
    """Adam at one learning rate."""

    steps: Annotated[Positive, RESULT] = 300
    """Optimizer steps."""
    batch_size: Annotated[Positive, RESULT] = 64
    """Images per step."""
    lr: Annotated[Rate, RESULT] = 1e-3
    """Adam's learning rate."""


class DigitsStudents(AdamSettings):
    """Distilled from the trained teacher, without a label.

    Conditions: `same` and `other` learn the teacher's distribution over its auxiliary logits, from the teacher's own
    initialisation and from another one; `all` (same initialisation) over class and auxiliary logits together; `hard`
    (same initialisation) only which auxiliary logit is the largest: like a sampled token, it tells less than a distribution.
    """

    conditions: Annotated[tuple[Condition, ...], Distinct, Field(min_length=1), RESULT] = get_args(Condition)
    """What students learn, and from which initialisation."""
    images: Annotated[tuple[Images, ...], Distinct, Field(min_length=1), RESULT] = ("noise", "digits")
    """What students are shown."""
    noise: Annotated[Rate, RESULT] = 1.0
    """Pixels of noise are uniform in [-noise, noise]; a digit's are in 0..1."""
    steps: Annotated[Positive, RESULT] = 1000
    """Optimizer steps."""
    lr: Annotated[Rate, RESULT] = 3e-3
    """Adam's learning rate."""
    measure_every: Annotated[Positive, RESULT] = 100
    """Steps between measurements of accuracy."""

    def contradictions(self) -> Iterator[tuple[Any, str]]:
        message = f"steps={self.steps} is no multiple of measure_every={self.measure_every}"
        yield self.steps % self.measure_every, message


class Digits(Config):
    """One teacher and its students per seed; seeds are what intervals are over."""

    kind: Annotated[Literal["digits"], PLAN] = "digits"
    """The experiment on digits."""
    seeds: Annotated[tuple[SeedInt, ...], Distinct, Field(min_length=1), RESULT] = tuple(range(10))
    """One teacher and its students per seed; intervals are over them."""
    test_share: Annotated[float, Field(gt=0, lt=1), RESULT] = 0.2
    """Share of the images that is held out of all training."""
    split_seed: Annotated[SeedInt, RESULT] = 0
    """Seed that decides which images are held out."""
    network: Network = Network()
    """Pixels to class logits and auxiliary logits."""
    teacher: AdamSettings = AdamSettings()
    """How the teacher is trained."""
    students: DigitsStudents = DigitsStudents()
    """How students are distilled."""
