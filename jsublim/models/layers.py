"""The modules of a layer, in Flax NNX.

Names carry shapes. B rows, T tokens, S keys, D hidden size, H heads, K key/value heads, h head size, f half of a head,
F MLP size, r rank of LoRA.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jsublim.models.config import ModelConfig, Rope

Lora = dict[str, Array]  # {"a": [D, r], "b": [r, O], "scale": []}
PROJECTED = "projected"  # what a backward pass may keep: the outputs of the projections


class Linear(nnx.Module):
    """`x @ kernel (+ bias)`, plus `scale * (x a) b` where an adapter is given.

    The factor form, never merged weights: merging would cost a gradient of the full kernel.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        noise = jax.random.normal(rngs.params(), (inputs, outputs), jnp.float32) / math.sqrt(inputs)
        self.kernel = nnx.Param(noise.astype(dtype))
        self.bias = nnx.Param(jnp.zeros((outputs,), dtype)) if bias else nnx.data(None)

    def __call__(self, x: Array, lora: Lora | None = None) -> Array:
        y = x @ self.kernel[...]
        if self.bias is not None:
            y = y + self.bias[...]
        if lora is not None:
            y = y + low_rank(x, lora["a"], lora["b"], lora["scale"])
        return checkpoint_name(y, PROJECTED)


@jax.custom_vjp
def low_rank(x: Array, a: Array, b: Array, scale: Array) -> Array:
    """`scale * (x a) b`, in the dtype of x; the factors `a` `[D, r]` and `b` `[r, O]` are rounded to it.

    Its derivative is written out. What is transposed there has r columns, where autodiff would transpose activations; the
    gradients of the factors are float32.
    """
    return _low_rank(x, a, b, scale)[0]


def _low_rank(x: Array, a: Array, b: Array, scale: Array) -> tuple[Array, tuple]:
    low = (scale * _dot("...D,Dr->...r", x, a.astype(x.dtype))).astype(x.dtype)
    return low @ b.astype(x.dtype), (x, low, a, b, scale)


def _low_rank_back(kept: tuple, g: Array) -> tuple[Array, Array, Array, None]:
    x, low, a, b, scale = kept
    of_low = (scale * _dot("...O,rO->...r", g, b.astype(g.dtype))).astype(g.dtype)
    of_a = _dot("...r,...D->rD", of_low, x).T
    of_b = _dot("...r,...O->rO", low, g)
    return of_low @ a.astype(g.dtype).T, of_a, of_b, None


low_rank.defvjp(_low_rank, _low_rank_back)

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class RMSNorm(nnx.Module):
    """Root-mean-square norm in float32. Gemma multiplies by `1 + w` before rounding, the others by `w` after."""

    def __init__(self, size: int, config: ModelConfig, *, dtype: jnp.dtype):
        self.eps, self.offset = config.norms.eps, config.norms.offset
        self.scale = nnx.Param(jnp.full((size,), 1.0 - config.norms.offset, dtype))

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        if self.offset:
            return (y * (self.offset + self.scale[...].astype(jnp.float32))).astype(x.dtype)
        return y.astype(x.dtype) * self.scale[...]


def rope_frequencies(rope: Rope, head_dim: int) -> Array:
    """Inverse frequencies `[head_dim / 2]`, float32, with the scaling of the config applied."""
    freq = 1.0 / (rope.theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim))
    if rope.scaling == "linear":
        return freq / rope.factor
    if rope.scaling == "llama3":
        wavelength = 2 * math.pi / freq
        longest, shortest = (
            rope.original_positions / rope.low_freq_factor,
            rope.original_positions / rope.high_freq_factor,
        )
        blend = (rope.original_positions / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        smooth = (1 - blend) * freq / rope.factor + blend * freq
        return jnp.where(wavelength > longest, freq / rope.factor, jnp.where(wavelength < shortest, freq, smooth))
    return freq


def rope_table(config: ModelConfig, positions_BT: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    """cos and sin `[2, B, T, h/2]`: index 0 for global layers, 1 for local ones."""
    kinds = (config.rope, config.local.rope or config.rope)
    freq = jnp.stack([rope_frequencies(kind, config.head_dim) for kind in kinds])
    angle = positions_BT.astype(jnp.float32)[None, :, :, None] * freq[:, None, None, :]
    return jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype)


def rotate(x_BTHh: Array, cos_BTf: Array, sin_BTf: Array) -> Array:
    """Rotary embedding with the two halves of a head as the pairs (the Hugging Face layout)."""
    left, right = jnp.split(x_BTHh, 2, axis=-1)
    cos, sin = cos_BTf[:, :, None, :], sin_BTf[:, :, None, :]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


class Seen(NamedTuple):
    """What the queries of one attention look at: keys and values `[B, K, S, h]`, and which of them, bool `[B, T, S]`."""

    keys: Array
    values: Array
    mask: Array


# From the keys and values `[B, K, T, h]` of the tokens at hand to all that their queries see.
Remember = Callable[[Array, Array], Seen]


def attend(q_BTHh: Array, seen: Seen, scale: float) -> Array:
    """Grouped-query attention, softmax in float32. Returns `[B, T, H*h]`.

    The queries that share a key/value head stand in one axis, so that both products are plain batched matrix products:
    on the CPU other orders of the axes are several times slower.
    """
    B, T, H, h = q_BTHh.shape
    _, K, S, _ = seen.keys.shape
    q = q_BTHh.reshape(B, T, K, H // K, h).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, h)
    scores = jnp.einsum("BKNh,BKSh->BKNS", q, seen.keys, preferred_element_type=jnp.float32) * scale
    # A finite floor: a padding query that may see no key must not become NaN.
    scores = jnp.where(seen.mask[:, None, None], scores.reshape(B, K, -1, T, S), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(seen.values.dtype).reshape(B, K, -1, S)
    mixed = jnp.einsum("BKNS,BKSh->BKNh", weights, seen.values).reshape(B, K, H // K, T, h)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(B, T, H * h)


class Attention(nnx.Module):
    """The first sublayer of a layer: grouped-query attention, with the norms around it."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        D, h = config.hidden_size, config.head_dim
        q, kv = config.num_heads * h, config.num_kv_heads * h
        self.config = config
        self.attn_norm = RMSNorm(D, config, dtype=dtype)
        self.q = Linear(D, q, bias=config.biases.qkv, dtype=dtype, rngs=rngs)
        self.k = Linear(D, kv, bias=config.biases.qkv, dtype=dtype, rngs=rngs)
        self.v = Linear(D, kv, bias=config.biases.qkv, dtype=dtype, rngs=rngs)
        self.o = Linear(q, D, bias=config.biases.output, dtype=dtype, rngs=rngs)
        if config.norms.on_heads:
            self.q_norm, self.k_norm = RMSNorm(h, config, dtype=dtype), RMSNorm(h, config, dtype=dtype)
        if config.norms.after_sublayers:
            self.post_attn_norm = RMSNorm(D, config, dtype=dtype)

    def __call__(
        self, h_BTD: Array, cos_BTf: Array, sin_BTf: Array, remember: Remember, lora: dict[str, Lora]
    ) -> tuple[Array, Seen]:
        """What attention adds to the residual stream `[B, T, D]`, and what its queries saw."""
        c = self.config
        B, T, _ = h_BTD.shape
        with jax.named_scope("attention"):
            x = self.attn_norm(h_BTD)
            q = self.q(x, lora.get("q")).reshape(B, T, c.num_heads, c.head_dim)
            k = self.k(x, lora.get("k")).reshape(B, T, c.num_kv_heads, c.head_dim)
            v = self.v(x, lora.get("v")).reshape(B, T, c.num_kv_heads, c.head_dim)
            if c.norms.on_heads:
                q, k = self.q_norm(q), self.k_norm(k)
            q, k = rotate(q, cos_BTf, sin_BTf), rotate(k, cos_BTf, sin_BTf)
            seen = remember(k.swapaxes(1, 2), v.swapaxes(1, 2))
            x = self.o(attend(q, seen, c.softmax_scale), lora.get("o"))
            return self.post_attn_norm(x) if c.norms.after_sublayers else x, seen


class MLP(nnx.Module):
    """The second sublayer of a layer: a gated MLP, with the norms around it."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.intermediate_size
        self.config = config
        self.mlp_norm = RMSNorm(D, config, dtype=dtype)
        self.gate = Linear(D, F, bias=config.biases.mlp, dtype=dtype, rngs=rngs)
        self.up = Linear(D, F, bias=config.biases.mlp, dtype=dtype, rngs=rngs)
        self.down = Linear(F, D, bias=config.biases.mlp, dtype=dtype, rngs=rngs)
        if config.norms.after_sublayers:
            self.post_mlp_norm = RMSNorm(D, config, dtype=dtype)

    def __call__(self, h_BTD: Array, lora: dict[str, Lora]) -> Array:
        """What the MLP adds to the residual stream `[B, T, D]`."""
        c = self.config
        with jax.named_scope("mlp"):
            x = self.mlp_norm(h_BTD)
            gate = self.gate(x, lora.get("gate"))
            act = jax.nn.silu(gate) if c.activation == "silu" else jax.nn.gelu(gate, approximate=True)
            x = self.down(act * self.up(x, lora.get("up")), lora.get("down"))
            return self.post_mlp_norm(x) if c.norms.after_sublayers else x


class Block(nnx.Module):
    """The modules of one layer. `decoder.Layer` runs them, in training, prefill, tracing and decoding alike."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)
