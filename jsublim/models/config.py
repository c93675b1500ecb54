"""What a decoder is: the frozen numbers that fix its architecture, read from a checkpoint's `config.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsublim.errors import JsublimError


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of one kind of layer (global or local).

    `scaling` is "default", "linear" or "llama3" (which scales parts of the spectrum differently, as Llama 3.1 does).
    """

    theta: float
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 0.0  # this and what follows: llama3 only
    high_freq_factor: float = 0.0
    original_positions: int = 0


@dataclass(frozen=True)
class Norms:
    """The RMSNorms of a model.

    Attributes:
      eps: added to the mean square.
      offset: weights are stored around it: Gemma multiplies by 1 + w.
      on_heads: queries and keys are normed too, head by head.
      after_sublayers: so is what attention and MLP put out, before the residual sum.
    """

    eps: float
    offset: float = 0.0
    on_heads: bool = False
    after_sublayers: bool = False


@dataclass(frozen=True)
class Biases:
    """Which projections have a bias: those of queries, keys and values; attention's output; the MLP's three."""

    qkv: bool = False
    output: bool = False
    mlp: bool = False


@dataclass(frozen=True)
class Scales:
    """Numbers that some families multiply by.

    Attributes:
      embedding: embeddings are multiplied by sqrt(hidden_size), rounded to the weights' dtype.
      query: products of queries and keys are multiplied by it; 0 is head_dim ** -0.5.
      softcap: logits z become softcap * tanh(z / softcap); None leaves them.
    """

    embedding: bool = False
    query: float = 0.0
    softcap: float | None = None


@dataclass(frozen=True)
class Local:
    """Layers whose tokens see only the last `window` tokens.

    Attributes:
      layers: per layer, whether it is one of these; empty: none is.
      rope: their rotary embedding; None is that of the other layers.
    """

    layers: tuple[bool, ...] = ()
    window: int = 0
    rope: Rope | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a decoder-only transformer with gated MLPs and RMSNorm.

    Everything that a family may differ in is a field here, so that one module serves them all.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norms: Norms
    rope: Rope
    tied: bool  # the head is the embedding
    activation: str = "silu"  # or "gelu_tanh"
    biases: Biases = Biases()
    scales: Scales = Scales()
    local: Local = Local()

    @property
    def is_local(self) -> tuple[bool, ...]:
        """Per layer, whether it sees the last `window` tokens only."""
        return self.local.layers or (False,) * self.num_layers

    @property
    def softmax_scale(self) -> float:
        """What the products of queries and keys are multiplied by."""
        return self.scales.query or self.head_dim**-0.5


class HFConfig:
    """A checkpoint's `config.json`, asked key by key; an absent key is an error that names the file and the key."""

    def __init__(self, values: dict[str, Any], source: str):
        self.values, self.source = values, source

    def __getitem__(self, key: str) -> Any:
        if self.values.get(key) is None:
            raise JsublimError(f"{self.source}: key '{key}' is missing; is this a whole Hugging Face checkpoint?")
        return self.values[key]

    def get(self, key: str, default: Any) -> Any:
        """The value of a key, `default` where it is absent or null."""
        value = self.values.get(key)
        return default if value is None else value

    def rope(self, kind: str | None = None, default_theta: float | None = None) -> Rope:
        """Read the rotary numbers under their new name (`rope_parameters`, by layer type on Gemma-3) or the old ones
        (`rope_theta` and `rope_scaling`).

        Raises:
          JsublimError: no base frequency, or a scaling that we don't compute.
        """
        numbers = dict(self.get("rope_parameters", {}))
        if kind is not None and isinstance(numbers.get(kind), dict):
            numbers = dict(numbers[kind])
        if not numbers:
            numbers = dict(self.get("rope_scaling", {}))
        theta = numbers.get("rope_theta", self.get("rope_theta", default_theta))
        if theta is None:
            raise JsublimError(f"{self.source}: neither 'rope_parameters' nor 'rope_theta' is given")
        scaling = numbers.get("rope_type", numbers.get("type", "default"))
        if scaling not in ("default", "linear", "llama3"):
            raise JsublimError(
                f"{self.source}: rope scaling '{scaling}' is not supported; known: default, linear, llama3"
            )
        if scaling != "llama3":
            return Rope(float(theta), scaling, float(numbers.get("factor", 1.0)))
        absent = [key for key in ("factor", "low_freq_factor", "high_freq_factor") if key not in numbers]
        if absent:
            raise JsublimError(f"{self.source}: rope scaling 'llama3' lacks {', '.join(absent)}")
        return Rope(
            theta=float(theta),
            scaling=scaling,
            factor=float(numbers["factor"]),
            low_freq_factor=float(numbers["low_freq_factor"]),
            high_freq_factor=float(numbers["high_freq_factor"]),
            original_positions=int(
                numbers.get("original_max_position_embeddings", self.get("max_position_embeddings", 8192))
            ),
        )

    def must_be(self, key: str, *allowed: Any) -> None:
        """Refuse a value that we don't compute; an absent key is fine.

        Raises:
          JsublimError: naming key, value and what is allowed.
        """
        value = self.values.get(key)
        if value is not None and value not in allowed:
            raise JsublimError(
                f"{self.source}: {key} = {value!r} is not supported; known: {', '.join(map(str, allowed))}"
            )


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object of a checkpoint folder.

    Raises:
      JsublimError: the file is absent or is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JsublimError(f"{path}: no such file; expected a Hugging Face checkpoint folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise JsublimError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise JsublimError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
