"""One student as the trainer takes it, and what students trained together share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from jsublim.distill.batches import Fork, Shape, batch_rows, forked_rows
from jsublim.distill.data import Example
from jsublim.distill.loggers import NOWHERE, Logs
from jsublim.distill.step import Program
from jsublim.models.lora import Adapter, Trainable

# An on-policy arm's rows of a step, made by the student as it stands: (adapter, row indices, step) -> examples.
Rollout = Callable[[Adapter, np.ndarray, int], list[Example]]


@dataclass(frozen=True)
class Arm:
    """One student: what it learns from, and the numbers in which it may differ from arms trained with it."""

    name: str
    examples: Sequence[Example]  # its rows; of an on-policy arm, rows that show how long the longest can be
    adapter: Adapter
    seed: int  # of its rows' order
    lr: float  # the highest of its schedule
    steps: int  # the schedule's length
    weight: float = 1.0  # factor of its loss
    # Of what is added to the loss (`losses.TERMS`) the coefficient, and the share of that which is left at the end.
    terms: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    noise: float = 0.0  # size of what is added to each trained array at the end, see `lora.with_noise`
    # Orthonormal; its gradient is kept at right angles to them (`projection.py`).
    projected_directions: Trainable | None = None
    frozen_adapter: Adapter | None = None  # stands in its forward pass as long as it is trained
    teacher: Adapter | None = None  # of its live teacher, where that has one
    rollout: Rollout | None = None  # makes an on-policy arm's rows
    fork: Fork | None = None  # where it goes over to other rows

    def rows(self, shape: Shape, step: int) -> np.ndarray:
        """Indices of the rows of a step: a function of the arm's seed and the step."""
        if self.fork is not None:
            return forked_rows(len(self.examples), shape.rows_per_step, self.seed, step, self.fork)
        return batch_rows(len(self.examples), shape.rows_per_step, self.seed, step)

    @property
    def reset_step(self) -> int:
        """The step before which the optimizer begins anew; -1, never."""
        return -1 if self.fork is None or self.fork.moments else self.fork.after


@dataclass(frozen=True)
class Settings:
    """The settings that arms trained together share."""

    batch_size: int  # rows of a micro-batch
    accumulate: int = 1  # micro-batches per step
    program: Program = field(default_factory=Program)
    checkpoint_every: int = 100  # steps between saved states
    parallel: str = "none"  # or pmap, mesh
    model_axis: int = 1  # devices that one copy of the base is spread over
    # Keep the hidden states below one-layer arms in host memory instead of computing them each epoch.
    cache_below: bool = False
    peak_tflops: float | None = None  # of one device, for the ratio of what was reached to it
    logs: Logs = NOWHERE  # where numbers go beside `metrics.jsonl`

    def caches(self, arm: Arm) -> bool:
        """Whether the hidden states below the arm's layer are kept: it trains one alone, and nothing below it changes."""
        alone = len(arm.adapter.layers) == 1 and not arm.adapter.ends and arm.frozen_adapter is None
        return self.cache_below and alone
