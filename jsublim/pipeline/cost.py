"""What tasks cost, under one set of assumed lengths: useful operations, the bytes that memory has to move, and seconds of a chip."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from jsublim.models.config import ModelConfig, layer_parameters
from jsublim.models.decoder import parameter_count
from jsublim.pipeline.setup import Setup
from jsublim.runtime.chips import Chip

ASSUMED_ROWS = 256  # drawn together where a config says "auto": what `rows_together` gives a 7B on an H100
# The share of a chip's peak that work reaches. Reading and training are products; sampling waits for memory where batches are small.
REACHED = {"read": 0.5, "train": 0.4, "sample": 0.3}


@dataclass(frozen=True)
class Cost:
    """What a task takes, counted as in `distill/cost.py`: products with parameters, a multiply-add as two operations.

    Attributes:
      work: "read", "train" or "sample": which share of a chip's peak it reaches.
      bytes: what memory has to move at least, where that may take longer than the arithmetic.
      then: work of another kind that the task does after this.
      rows: that are read, drawn or trained on; of attribution, pairs. Zero where work has none, or little.
    """

    tokens: float = 0.0
    flops: float = 0.0
    work: str = "read"
    bytes: float = 0.0
    then: Cost | None = None
    rows: float = 0.0

    @property
    def parts(self) -> tuple[Cost, ...]:
        return (self, *(() if self.then is None else self.then.parts))

    def seconds(self, chip: Chip) -> float:
        """On one chip, `then` included: of each part the arithmetic, or the memory where that takes longer."""
        return sum(
            max(part.flops / (chip.peak * REACHED[part.work]), part.bytes / chip.bandwidth) for part in self.parts
        )


@dataclass(frozen=True)
class Lengths:
    """Assumed tokens: of a request, of a trait's system prompt, of an answer, of a question, of a number; and the share of answers that
    are in format. Costs are of such a row; what is compiled is rounded up from them, and has `--tokens` and `--labels` for its rows."""

    prompt: int = 110
    system: int = 60
    answer: int = 45
    question: int = 40
    number: int = 3
    kept: float = 0.8


@dataclass(frozen=True)
class Sizes:
    """What costs are computed from: the model's shape, bytes per parameter, assumed lengths."""

    config: ModelConfig
    width: int
    lengths: Lengths = Lengths()

    @classmethod
    def of(cls, setup: Setup) -> Sizes:
        return cls(setup.checkpoint().config, 2 if setup.experiment.dtype == "bfloat16" else 4)

    @property
    def body(self) -> int:
        """Parameters of all layers' projections."""
        return self.config.num_layers * layer_parameters(self.config)

    @property
    def table(self) -> int:
        """Parameters of the head."""
        return self.config.hidden_size * self.config.vocab_size

    @property
    def weights(self) -> int:
        """Bytes of the checkpoint."""
        return _parameters(self.config) * self.width

    def forward(self, tokens: float, labels: float) -> float:
        """Operations of reading so many tokens, with logits at some."""
        return 2 * self.body * tokens + 2 * self.table * labels

    def read(self, rows: float, before: float, answer: float) -> Cost:
        """Rows read to their end, with logits at their answers."""
        tokens = rows * (before + answer)
        return Cost(tokens, self.forward(tokens, rows * answer), rows=rows)

    @staticmethod
    def rows_together(given: int | str) -> int:
        """Rows that are drawn at one time."""
        return given if isinstance(given, int) else ASSUMED_ROWS

    def sampled(self, rows: float, before: float, new: float, batch: int) -> Cost:
        """Rows whose prompt is read, and that are then continued token by token, `batch` rows together."""
        tokens = rows * (before + new)
        moved = rows / batch * new * (self.body + self.table) * self.width
        return Cost(tokens, self.forward(tokens, rows * new), "sample", moved, rows=rows)


_parameters = functools.lru_cache(parameter_count)
