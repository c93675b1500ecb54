"""What a decoder is: the frozen numbers that fix its architecture, read from a checkpoint's `config.json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jsublim.errors import JsublimError
from jsublim.reading import shown

MOST_LAYERS = 10_000
_MOST = 2**31 - 1  # sizes are int32 on a device


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
      rounded: logits are rounded to the weights' dtype, as torch leaves them (docs/recipes.md, quirk 17).
    """

    embedding: bool = False
    query: float = 0.0
    softcap: float | None = None
    rounded: bool = False


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
    """A checkpoint's `config.json`, asked key by key. A key that is absent without a default, or that holds another kind of
    value than asked for, is an error that names the file and the key; null is as good as absent."""

    def __init__(self, values: dict[str, Any], source: str):
        self.values, self.source = values, source

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise JsublimError(f"{self.source}: key '{key}' is missing; is this a whole Hugging Face checkpoint?")
        return value

    def refuse(self, key: str, expected: str) -> JsublimError:
        return JsublimError(f"{self.source}: key '{key}' must be {expected}, found {shown(self.values.get(key))}")

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = _MOST) -> int:
        """A whole number from `least` to `most`."""
        value = self._get(key, default)
        if type(value) is not int or not least <= value <= most:
            raise self.refuse(key, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0 that float32 holds."""
        value = self._get(key, default)
        if type(value) not in (int, float) or not 0 < value < 3e38:
            raise self.refuse(key, "a number above 0 that float32 holds")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if type(value) is not bool:
            raise self.refuse(key, "true or false")
        return value

    def section(self, key: str) -> HFConfig:
        """An object, empty where it is absent; its errors name it."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self.refuse(key, "an object")
        return HFConfig(value, f"{self.source}: {key}")

    def kinds(self, default: list[str]) -> tuple[bool, ...]:
        """Of each layer, whether it is a local one: `layer_types`."""
        value = self._get("layer_types", default)
        if not isinstance(value, list) or not all(each in ("sliding_attention", "full_attention") for each in value):
            raise self.refuse("layer_types", "a list of 'sliding_attention' and 'full_attention'")
        return tuple(each == "sliding_attention" for each in value)

    def rope(self, kind: str | None = None, default_theta: float | None = None) -> Rope:
        """Read the rotary numbers under their new name (`rope_parameters`, by layer type on Gemma-3) or the old ones
        (`rope_theta` and `rope_scaling`).

        Raises:
          JsublimError: no base frequency, or a scaling that we don't compute.
        """
        numbers = self.section("rope_parameters")
        if kind is not None and isinstance(numbers.values.get(kind), dict):
            numbers = numbers.section(kind)
        if not numbers.values:
            numbers = self.section("rope_scaling")
        own = numbers.values.get("rope_theta") is not None
        theta = numbers.number("rope_theta") if own else self.number("rope_theta", default_theta)
        scaling = next((v for key in ("rope_type", "type") if (v := numbers.values.get(key)) is not None), "default")
        if scaling not in ("default", "linear", "llama3"):
            raise JsublimError(
                f"{numbers.source}: scaling {shown(scaling)} is not supported; known: default, linear, llama3"
            )
        if scaling != "llama3":
            return Rope(theta, scaling, numbers.number("factor", 1.0))
        low, high = numbers.number("low_freq_factor"), numbers.number("high_freq_factor")
        if low >= high:
            raise numbers.refuse("high_freq_factor", f"above low_freq_factor {low:g}")
        original = self.integer("max_position_embeddings", 8192)
        return Rope(
            theta=theta,
            scaling=scaling,
            factor=numbers.number("factor"),
            low_freq_factor=low,
            high_freq_factor=high,
            original_positions=numbers.integer("original_max_position_embeddings", original),
        )

    def must_be(self, key: str, *allowed: Any) -> None:
        """Refuse a value that we don't compute; an absent key is fine.

        Raises:
          JsublimError: naming key, value and what is allowed.
        """
        value = self.values.get(key)
        if value is not None and value not in allowed:
            raise JsublimError(
                f"{self.source}: {key} = {shown(value)} is not supported; known: {', '.join(map(str, allowed))}"
            )
