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
    """One student: what it learns from, and the numbers in which it may differ from arms trained with it.

    Attributes:
      examples: its rows; of an on-policy arm, rows that show how long the longest can be.
      seed: of its rows' order.
      lr: the highest learning rate of its schedule; steps: the schedule's length.
      weight: factor of its loss.
      terms: of what is added to it (`losses.TERMS`) the coefficient, and the share of that which is left at the end.
      noise: size of what is added to each trained array at the end, as `lora.with_noise` takes it.
      projected_directions: orthonormal directions that its gradient is kept at right angles to (`projection.py`).
      frozen_adapter: stands in its forward pass as long as it is trained.
      teacher: the adapter of its live teacher, where that has one.
      rollout: makes an on-policy arm's rows.
      fork: where it goes over to other rows, if it does.
    """

    name: str
    examples: Sequence[Example]
    adapter: Adapter
    seed: int
    lr: float
    steps: int
    weight: float = 1.0
    terms: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    noise: float = 0.0
    projected_directions: Trainable | None = None
    frozen_adapter: Adapter | None = None
    teacher: Adapter | None = None
    rollout: Rollout | None = None
    fork: Fork | None = None

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
    """What arms trained together share.

    Attributes:
      batch_size: rows of a micro-batch; accumulate: micro-batches per step.
      checkpoint_every: steps between saved states.
      parallel: none, pmap or mesh; model_axis: devices that one copy of the base is spread over.
      cache_below: keep the hidden states below one-layer arms in host memory instead of computing them each epoch.
      peak_tflops: of one device, for the ratio of what was reached to it.
      logs: where numbers go beside `metrics.jsonl`.
    """

    batch_size: int
    accumulate: int = 1
    program: Program = field(default_factory=Program)
    checkpoint_every: int = 100
    parallel: str = "none"
    model_axis: int = 1
    cache_below: bool = False
    peak_tflops: float | None = None
    logs: Logs = NOWHERE

    def caches(self, arm: Arm) -> bool:
        """Whether the hidden states below the arm's layer are kept: it trains one alone, and nothing below it changes."""
        alone = len(arm.adapter.layers) == 1 and not arm.adapter.ends and arm.frozen_adapter is None
        return self.cache_below and alone
