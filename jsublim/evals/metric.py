"""What a number of an evaluation is, said once where the number is made: the report, its words and `jsublim rescore` follow from it.

No file of this package loads jax at its top, so that a report can be made of results without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Metric:
    """A metric by its name in the results. A name that ends with a space stands for all that begin with it: "says " for "says owl".

    Attributes:
      words: what it says, as a heading.
      unit: a share is 0 to 1, is shown in percent, and its mean has the sampling noise of a rate; whatever else has none.
      low, high: ends of what it can be.
      digits: decimals of a value that is no share.
      better: the direction in which a model is better; None where neither is.
      made_of: what can be made of the kept answers again (`jsublim rescore`): names in them, or a judge's scores.
      listed: among what else was asked; the others have a place of their own in the report, or none.
    """

    name: str
    words: str
    unit: Literal["share", "nats", "score", "answers"] = "share"
    low: float = 0.0
    high: float = 1.0
    digits: int = 2
    better: Literal["higher", "lower"] | None = None
    made_of: Literal["names", "judge"] | None = None
    listed: bool = True

    @property
    def is_share(self) -> bool:
        return self.unit == "share"

    @property
    def unit_of_differences(self) -> str:
        return "points" if self.is_share else self.unit

    @property
    def scale(self) -> float:
        """By what a value is multiplied to be shown."""
        return 100.0 if self.is_share else 1.0


METRICS: dict[str, Metric] = {}


def metric(name: str, words: str, **what: Any) -> str:
    """Register a metric, the fields of `Metric` in `what`; gives its name back."""
    METRICS[name] = Metric(name, words, **what)
    return name


def metric_of(name: str) -> Metric:
    """The metric that a name in the results is of; one that nobody registered is an unlisted share."""
    families = (known for known in METRICS.values() if known.name.endswith(" ") and name.startswith(known.name))
    return METRICS.get(name) or next(families, Metric(name, name, listed=False))
