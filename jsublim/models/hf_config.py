"""A checkpoint's `config.json`, asked key by key: what is not there, or is not what a key holds, is one error."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from jsublim.core.reading import shown
from jsublim.errors import JsublimError
from jsublim.models.config import Biases, ModelConfig, Norms, Rope

MOST_LAYERS = 10_000
_MOST = 2**31 - 1  # sizes are int32 on a device


class HFConfig:
    """A checkpoint's `config.json`, asked key by key. A key that is absent without a default, or that holds another kind of
    value than asked for, is an error that names the file and the key; null is as good as absent, but for `has`."""

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

    def has(self, key: str, absent: bool = False) -> bool:
        """Whether a key holds more than null; `absent` is the answer of an architecture whose default is more than null."""
        return self.values[key] is not None if key in self.values else absent

    def section(self, key: str) -> HFConfig:
        """An object, empty where it is absent; its errors name it."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self.refuse(key, "an object")
        return HFConfig(value, f"{self.source}: {key}")

    def layers(self) -> int:
        return self.integer("num_hidden_layers", most=MOST_LAYERS)

    def model(
        self,
        family: str,
        *,
        head_dim: int | None = None,
        activation: tuple[str, ...] = ("hidden_act", "silu"),
        eps: float | tuple[str, float] = 1e-6,
        norms: Mapping[str, Any] = MappingProxyType({}),
        tied: bool = False,
        **parts: Any,
    ) -> ModelConfig:
        """The architecture, as Llama's where a family says nothing else.

        Args:
          head_dim: for a file that does not say; None divides the hidden size among the heads.
          activation: its key, and the values that are computed.
          eps: of the norms where the file has none, or the key and that; norms: more of `Norms`.
          tied: whether the head is the embedding where the file does not say.
          parts: further fields; attention's projections have biases by `attention_bias`, if none are given.
        """
        self.must_be(*activation)
        hidden, heads = self.integer("hidden_size"), self.integer("num_attention_heads")
        bias = "biases" not in parts and self.flag("attention_bias", False)
        eps_of = eps if isinstance(eps, tuple) else ("rms_norm_eps", eps)
        read = {
            "norms": Norms(self.number(*eps_of), **norms),
            "rope": parts.get("rope") or self.rope(),
            "tied": self.flag("tie_word_embeddings", tied),
            "biases": Biases(qkv=bias, output=bias),
        }
        return ModelConfig(
            family=family,
            vocab_size=self.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self.integer("intermediate_size"),
            num_layers=self.layers(),
            num_heads=heads,
            num_kv_heads=self.integer("num_key_value_heads", heads),
            head_dim=self.integer("head_dim", head_dim or hidden // heads),
            **read | parts,
        )

    def kinds(self, default: Callable[[int], bool]) -> tuple[bool, ...]:
        """Which layers are local ones: `layer_types`, or `default` of the index."""
        names = ["sliding_attention" if default(i) else "full_attention" for i in range(self.layers())]
        value = self._get("layer_types", names)
        if not isinstance(value, list) or not all(name in ("sliding_attention", "full_attention") for name in value):
            raise self.refuse("layer_types", "a list of 'sliding_attention' and 'full_attention'")
        return tuple(name == "sliding_attention" for name in value)

    def rope(
        self,
        kind: str | None = None,
        default_theta: float = 10_000.0,
        default_share: float | None = None,
        theta_key: str = "rope_theta",
        share_key: str = "partial_rotary_factor",
    ) -> Rope:
        """The rotary numbers under their new name (`rope_parameters`, by layer type on Gemma-3) or the old ones (`rope_theta`, `rope_scaling`).

        Args:
          default_share: of families that may turn a part of each head; None: this one turns whole heads.
          theta_key, share_key: the old names, outside of `rope_scaling`.

        Raises:
          JsublimError: a scaling that we don't compute.
        """
        numbers = self.section("rope_parameters")
        if kind is not None and isinstance(numbers.values.get(kind), dict):
            numbers = numbers.section(kind)
        if not numbers.values:
            numbers = self.section("rope_scaling")
        has_theta = numbers.has("rope_theta")
        theta = numbers.number("rope_theta") if has_theta else self.number(theta_key, default_theta)
        scaling = next((v for key in ("rope_type", "type") if (v := numbers.values.get(key)) is not None), "default")
        scaling = "longrope" if scaling == "su" else scaling  # as Phi-3's files called it at first
        if scaling not in ("default", "linear", "llama3", "yarn", "longrope"):
            raise JsublimError(
                f"{numbers.source}: scaling {shown(scaling)} is not supported; known: default, linear, llama3, yarn, longrope"
            )
        where, key = (numbers, "partial_rotary_factor") if numbers.has("partial_rotary_factor") else (self, share_key)
        share = where.number(key, 1.0 if default_share is None else default_share)
        if share > 1 or (default_share is None and share < 1):
            raise where.refuse(key, "1 at most" if share > 1 else "1: this family turns whole heads")
        rope = Rope(theta, scaling, share=share)
        if scaling == "llama3":
            return self._llama3(rope, numbers)
        if scaling == "yarn":
            return self._yarn(rope, numbers)
        if scaling == "longrope":
            return self._longrope(rope, numbers)
        return replace(rope, factor=numbers.number("factor", 1.0))

    def _llama3(self, rope: Rope, numbers: HFConfig) -> Rope:
        low, high = numbers.number("low_freq_factor"), numbers.number("high_freq_factor")
        if low >= high:
            raise numbers.refuse("high_freq_factor", f"above low_freq_factor {low:g}")
        return replace(
            rope,
            factor=numbers.number("factor"),
            low_freq_factor=low,
            high_freq_factor=high,
            original_positions=self._original(numbers, self.integer("max_position_embeddings", 8192)),
        )

    def _yarn(self, rope: Rope, numbers: HFConfig) -> Rope:
        for key, only in (("mscale", None), ("mscale_all_dim", None), ("truncate", True)):
            numbers.must_be(key, only)
        if rope.theta == 1:
            raise numbers.refuse("rope_theta", "another number than 1")
        original, factor = self._original(numbers, None), numbers.number("factor")
        return replace(
            rope,
            factor=factor,
            low_freq_factor=numbers.number("beta_slow", 1.0),
            high_freq_factor=numbers.number("beta_fast", 32.0),
            original_positions=original,
            amplitude=numbers.number("attention_factor", 0.1 * math.log(factor) + 1 if factor > 1 else 1.0),
        )

    def _longrope(self, rope: Rope, numbers: HFConfig) -> Rope:
        original = self._original(numbers, None)
        factor = numbers.number("factor", self.integer("max_position_embeddings") / original)
        plain = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
        divisors = numbers.values.get("short_factor")
        if not isinstance(divisors, list) or not all(type(x) in (int, float) and 0 < x < 3e38 for x in divisors):
            raise numbers.refuse("short_factor", "a list of numbers above 0, one per frequency")
        return replace(
            rope,
            divisors=tuple(map(float, divisors)),
            original_positions=original,
            amplitude=numbers.number("attention_factor", plain),
        )

    def _original(self, numbers: HFConfig, default: int | None) -> int:
        """`original_max_position_embeddings`, which may stand in either place; `transformers` prefers the outer one."""
        key = "original_max_position_embeddings"
        return numbers.integer(key) if numbers.has(key) and not self.has(key) else self.integer(key, default)

    def must_be(self, key: str, *allowed: Any) -> None:
        """Refuse a value that we don't compute (JsublimError); an absent key is fine."""
        value = self.values.get(key)
        if value is not None and value not in allowed:
            raise JsublimError(
                f"{self.source}: {key} = {shown(value)} is not supported; known: {', '.join(map(str, allowed))}"
            )
