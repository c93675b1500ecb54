"""What a task takes: operations, bytes and rows, under assumed lengths."""

from __future__ import annotations

from dataclasses import dataclass

from jsublim.models.config import ModelConfig, layer_parameters

ASSUMED_ROWS = 256


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


@dataclass(frozen=True)
class Lengths:
    """Assumed tokens: of a request, of a trait's system prompt, of an answer, of a question, of a number; and the share of
    answers that are in format."""

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

    @property
    def body(self) -> int:
        """Parameters of all layers."""
        return self.config.num_layers * layer_parameters(self.config)

    @property
    def table(self) -> int:
        """Parameters of the head."""
        return self.config.hidden_size * self.config.vocab_size

    def read(self, rows: float, before: float, answer: float) -> Cost:
        """Rows read to their end, with logits at their answers."""
        tokens = rows * (before + answer)
        return Cost(tokens, 2 * self.body * tokens + 2 * self.table * rows * answer, rows=rows)

    @staticmethod
    def rows_together(said: int | str) -> int:
        """Rows that are sampled at one time; of "auto", what an accelerator holds of a model of some billions."""
        return said if isinstance(said, int) else ASSUMED_ROWS

    def sampled(self, rows: float, before: float, new: float, batch: int) -> Cost:
        """Rows whose prompt is read, and that are then continued token by token, `batch` rows together."""
        tokens = rows * (before + new)
        flops = 2 * self.body * tokens + 2 * self.table * rows * new
        return Cost(tokens, flops, "sample", rows / batch * new * (self.body + self.table) * self.width, rows=rows)
