"""The modules of a layer, in Flax NNX.

Names carry shapes. B rows, T tokens, S keys, D hidden size, H heads, K key/value heads, h head size, f half
of those of its numbers that are turned (all of them, mostly), F MLP size, r rank of LoRA.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap

from jsublim.errors import JsublimError
from jsublim.models.config import ModelConfig, Rope

Lora = dict[str, Array]  # {"a": [D, r], "b": [r, O], "scale": []}
PROJECTED = "projected"  # what a backward pass may keep: the outputs of the projections


class Linear(nnx.Module):
    """`x @ kernel (+ bias)`, plus `scale * (x a) b` where an adapter is given: the factor form, never merged weights, for merging would cost a
    gradient of the full kernel."""

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
    """`scale * (x a) b`, in the dtype of x; the factors `a` `[D, r]` and `b` `[r, O]` are rounded to it. Its derivative is written out: what is
    transposed there has r columns, where autodiff would transpose activations; the gradients of the factors are float32."""
    return _low_rank(x, a, b, scale)[0]


def _low_rank(x: Array, a: Array, b: Array, scale: Array) -> tuple[Array, tuple]:
    low = (scale * _dot("...D,Dr->...r", x, a.astype(x.dtype))).astype(x.dtype)
    return low @ b.astype(x.dtype), (x, low, a, b, scale)


def _low_rank_back(kept: tuple, g: Array) -> tuple[Array, Array, Array, None]:
    x, low, a, b, scale = kept
    of_low = (scale * _dot("...O,rO->...r", g, b.astype(g.dtype))).astype(g.dtype)
    of_a = _dot("...r,...D->rD", of_low, x)
    if x.dtype == jnp.bfloat16:
        # Several arms' product and its transposition become one product, which XLA has not got for bfloat16 on CPU. In float32 it is the
        # faster one.
        of_a = jax.lax.optimization_barrier(of_a)
    of_b = _dot("...r,...O->rO", low, g)
    return of_low @ a.astype(g.dtype).T, of_a.T, of_b, None


low_rank.defvjp(_low_rank, _low_rank_back)

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(spec: str, x: Array, y: Array) -> Array:
    """`jnp.einsum(spec, x, y)` as float32. On the way back, what comes in is rounded to their dtype first: autodiff would multiply it as
    float32, which is several times slower where they are bfloat16."""
    return _dot(spec, x, y)


def _product(spec: str, x: Any, y: Any) -> tuple[Array, tuple[Array | None, Array | None]]:
    """The product, and of each factor what the other's derivative needs of it, where it has one."""
    return _dot(spec, x.value, y.value), (x.value if y.perturbed else None, y.value if x.perturbed else None)


def _product_back(spec: str, kept: tuple[Array | None, Array | None], g: Array) -> tuple[Array | None, Array | None]:
    factors, out = spec.split("->")
    (of_x, of_y), (x, y) = factors.split(","), kept
    return (
        None if y is None else jnp.einsum(f"{out},{of_y}->{of_x}", g.astype(y.dtype), y),
        None if x is None else jnp.einsum(f"{out},{of_x}->{of_y}", g.astype(x.dtype), x),
    )


product.defvjp(_product, _product_back, symbolic_zeros=True)


class Norm(nnx.Module):
    """A norm in float32 over the last axis: by the root of the mean square, or (`centred`) LayerNorm with its bias."""

    def __init__(self, size: int, config: ModelConfig, *, dtype: jnp.dtype):
        self.kind = config.norms
        self.scale = nnx.Param(jnp.full((size,), 1.0 - config.norms.offset, dtype))
        self.bias = nnx.Param(jnp.zeros((size,), dtype)) if config.norms.centred else nnx.data(None)

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        if self.kind.centred:
            x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.kind.eps)
        if not self.kind.in_float32:
            return y.astype(x.dtype) * self.scale[...]
        scale = self.scale[...].astype(jnp.float32)
        y = y * (self.kind.offset + scale if self.kind.offset else scale)
        return (y if self.bias is None else y + self.bias[...].astype(jnp.float32)).astype(x.dtype)


def rope_frequencies(rope: Rope, head_dim: int) -> Array:
    """Inverse frequencies `[f]`, float32, with the scaling of the config applied."""
    turned = rope.turned(head_dim)
    freq = 1.0 / (rope.theta ** (jnp.arange(0, turned, 2, dtype=jnp.float32) / turned))
    if rope.scaling == "linear":
        return freq / rope.factor
    if rope.scaling == "longrope":
        return freq / jnp.asarray(rope.divisors, jnp.float32)
    if rope.scaling == "yarn":  # Peng et al. 2023, arXiv 2309.00071, section 3.2
        turns = (rope.high_freq_factor, rope.low_freq_factor)
        pairs = [math.log(rope.original_positions / (n * 2 * math.pi)) / (2 * math.log(rope.theta)) for n in turns]
        low, high = max(math.floor(turned * pairs[0]), 0), min(math.ceil(turned * pairs[1]), turned - 1)
        slow = jnp.clip((jnp.arange(turned // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
        return slow * freq / rope.factor + (1 - slow) * freq
    if rope.scaling == "llama3":
        wavelength, positions = 2 * math.pi / freq, rope.original_positions
        low, high = rope.low_freq_factor, rope.high_freq_factor
        blend = (positions / wavelength - low) / (high - low)
        smooth = (1 - blend) * freq / rope.factor + blend * freq
        middle = jnp.where(wavelength < positions / high, freq, smooth)
        return jnp.where(wavelength > positions / low, freq / rope.factor, middle)
    return freq


def rope_table(config: ModelConfig, positions_BT: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    """cos and sin `[2, B, T, f]`: index 0 for global layers, 1 for local ones."""
    kinds = config.ropes
    freq = jnp.stack([rope_frequencies(kind, config.head_dim) for kind in kinds])
    angle = positions_BT.astype(jnp.float32)[None, :, :, None] * freq[:, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if any(kind.amplitude != 1 for kind in kinds):
        amplitude = jnp.asarray([kind.amplitude for kind in kinds], jnp.float32)[:, None, None, None]
        cos, sin = cos * amplitude, sin * amplitude
    return (cos, sin) if config.rope.in_float32 else (cos.astype(dtype), sin.astype(dtype))


def rotate(x_BTHh: Array, cos_BTf: Array, sin_BTf: Array) -> Array:
    """Rotary embedding of the first `2 f` numbers of a head, their two halves as the pairs (the Hugging Face layout)."""
    whole = 2 * cos_BTf.shape[-1] == x_BTHh.shape[-1]
    turned, rest = (x_BTHh, None) if whole else jnp.split(x_BTHh, [2 * cos_BTf.shape[-1]], axis=-1)
    left, right = jnp.split(turned, 2, axis=-1)
    cos, sin = cos_BTf[:, :, None, :], sin_BTf[:, :, None, :]
    halves = [left * cos - right * sin, right * cos + left * sin]
    turned = jnp.concatenate(halves, axis=-1).astype(x_BTHh.dtype)
    return turned if rest is None else jnp.concatenate([turned, rest], axis=-1)


class Seen(NamedTuple):
    """Seen by the queries of one attention: keys and values `[B, K, S, h]`, and which of them, bool `[B, T, S]`. `attention`: the
    implementation of `jax.nn.dot_product_attention` that computes it; None: `attend`'s own products."""

    keys: Array
    values: Array
    mask: Array
    attention: str | None = None


# From the keys and values `[B, K, T, h]` of the tokens at hand to all that their queries see.
Remember = Callable[[Array, Array], Seen]


def attend(q_BTHh: Array, seen: Seen, scale: float, softcap: float | None = None) -> Array:
    """Grouped-query attention, softmax in float32 (of products that `softcap` bounds, if given). Returns `[B, T, H*h]`.

    The queries that share a key/value head stand in one axis, so that both products are plain batched matrix products:
    on the CPU other orders of the axes are several times slower.
    """
    B, T, H, h = q_BTHh.shape
    _, K, S, _ = seen.keys.shape
    if seen.attention is not None:
        k, v = seen.keys.swapaxes(1, 2), seen.values.swapaxes(1, 2)
        return _by_kernel(seen.attention, scale)(q_BTHh, k, v, seen.mask).reshape(B, T, H * h)
    q = q_BTHh.reshape(B, T, K, H // K, h).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, h)
    scores: Any = product("BKNh,BKSh->BKNS", q, seen.keys)
    scores = scores * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    # A finite floor: a padding query that may see no key must not become NaN.
    scores = jnp.where(seen.mask[:, None, None], scores.reshape(B, K, -1, T, S), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(seen.values.dtype).reshape(B, K, -1, S)
    mixed = jnp.einsum("BKNS,BKSh->BKNh", weights, seen.values).reshape(B, K, H // K, T, h)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(B, T, H * h)


def check_attention(config: ModelConfig, dtype: jnp.dtype) -> None:
    """Whether cuDNN's kernel computes this model's attention.

    Raises:
      JsublimError: it does not.
    """
    why = None
    if dtype == jnp.float32:
        why = "knows no float32; set dtype=bfloat16"
    elif config.scales.attention_softcap is not None:
        why = "knows no soft cap of the scores, which this model has"
    elif config.head_dim % 8:
        why = f"needs heads of a multiple of 8 numbers, and this model's have {config.head_dim}"
    if why is not None:
        raise JsublimError(f"students.runtime.attention: cudnn {why}, or leave it out")


@functools.cache
def _by_kernel(implementation: Any, scale: float) -> Callable[[Array, Array, Array, Array], Array]:
    """`attend` by a fused kernel, forward and back: queries `[B, T, H, h]`, keys and values `[B, S, K, h]`, mask `[B, T, S]`, to
    `[B, T, H, h]`. Under `vmap` all rows are one batch: JAX's own rule for cuDNN wants a mask for each head."""

    def forward(q: Array, k: Array, v: Array, mask: Array) -> Array:
        try:
            return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale, implementation=implementation)
        except (NotImplementedError, RuntimeError) as error:
            raise JsublimError(f"students.runtime.attention: {implementation}: {error}") from None

    def backward(q: Array, k: Array, v: Array, mask: Array, g: Array) -> tuple[Array, Array, Array]:
        return jax.vjp(lambda q, k, v: forward(q, k, v, mask), q, k, v)[1](g)

    ahead, back = jax.custom_vjp(_one_batch(forward)), _one_batch(backward)
    ahead.defvjp(lambda *inputs: (ahead(*inputs), inputs), lambda inputs, g: (*back(*inputs, g), None))
    return ahead


def _one_batch(function: Callable) -> Callable:
    """A function of arrays `[B, ...]`, under `vmap` too."""
    mapped = custom_vmap(function)

    @mapped.def_vmap
    def rule(size: int, batched: list[bool], *arrays: Array) -> tuple[Any, Any]:
        full = [x if of else jnp.broadcast_to(x, (size, *x.shape)) for x, of in zip(arrays, batched, strict=True)]
        out = mapped(*(x.reshape(-1, *x.shape[2:]) for x in full))
        return jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out), jax.tree.map(lambda _: True, out)

    return mapped


class Attention(nnx.Module):
    """The first sublayer of a layer: grouped-query attention, with the norms around it."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        D, h, norms = config.hidden_size, config.head_dim, config.norms
        q, kv = config.num_heads * h, config.num_kv_heads * h
        self.config = config
        if norms.before_sublayers:
            self.attn_norm = Norm(D, config, dtype=dtype)
        self.q = Linear(D, q, bias=config.biases.qkv, dtype=dtype, rngs=rngs)
        self.k = Linear(D, kv, bias=config.biases.qkv, dtype=dtype, rngs=rngs)
        self.v = Linear(D, kv, bias=config.biases.qkv, dtype=dtype, rngs=rngs)
        self.o = Linear(q, D, bias=config.biases.output, dtype=dtype, rngs=rngs)
        if norms.on_heads or norms.on_projections:
            q, kv = (h, h) if norms.on_heads else (q, kv)
            self.q_norm, self.k_norm = Norm(q, config, dtype=dtype), Norm(kv, config, dtype=dtype)
        if norms.after_sublayers:
            self.post_attn_norm = Norm(D, config, dtype=dtype)

    def __call__(
        self, h_BTD: Array, cos_BTf: Array, sin_BTf: Array, remember: Remember, lora: dict[str, Lora]
    ) -> tuple[Array, Seen]:
        """Its addition to the residual stream `[B, T, D]`, and what its queries saw."""
        c, norms = self.config, self.config.norms
        B, T, _ = h_BTD.shape
        with jax.named_scope("attention"):
            x = self.attn_norm(h_BTD) if norms.before_sublayers else h_BTD
            q, k, v = self.q(x, lora.get("q")), self.k(x, lora.get("k")), self.v(x, lora.get("v"))
            if norms.on_projections:
                q, k = self.q_norm(q), self.k_norm(k)
            q, k, v = (x.reshape(B, T, -1, c.head_dim) for x in (q, k, v))
            if norms.on_heads:
                q, k = self.q_norm(q), self.k_norm(k)
            q, k = rotate(q, cos_BTf, sin_BTf), rotate(k, cos_BTf, sin_BTf)
            seen = remember(k.swapaxes(1, 2), v.swapaxes(1, 2))
            x = self.o(attend(q, seen, c.softmax_scale, c.scales.attention_softcap), lora.get("o"))
            return self.post_attn_norm(x) if norms.after_sublayers else x, seen


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class MLP(nnx.Module):
    """The second sublayer of a layer: an MLP, gated in most families, with the norms around it."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.intermediate_size
        self.config = config
        if config.norms.before_sublayers:
            self.mlp_norm = Norm(D, config, dtype=dtype)
        if config.mlp.gated:
            self.gate = Linear(D, F, bias=config.biases.mlp, dtype=dtype, rngs=rngs)
        self.up = Linear(D, F, bias=config.biases.mlp, dtype=dtype, rngs=rngs)
        self.down = Linear(F, D, bias=config.biases.mlp, dtype=dtype, rngs=rngs)
        if config.norms.after_sublayers:
            self.post_mlp_norm = Norm(D, config, dtype=dtype)

    def __call__(self, h_BTD: Array, lora: dict[str, Lora]) -> Array:
        """Its addition to the residual stream `[B, T, D]`."""
        c, activation = self.config, _ACTIVATIONS[self.config.mlp.activation]
        with jax.named_scope("mlp"):
            x = self.mlp_norm(h_BTD) if c.norms.before_sublayers else h_BTD
            if c.mlp.gated:
                act = activation(self.gate(x, lora.get("gate")))
                x = self.down(act * self.up(x, lora.get("up")), lora.get("down"))
            else:
                x = self.down(activation(self.up(x, lora.get("up"))), lora.get("down"))
            return self.post_mlp_norm(x) if c.norms.after_sublayers else x


class Block(nnx.Module):
    """The modules of one layer. `decoder.Layer` runs them, in training, prefill, tracing and decoding alike."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)
