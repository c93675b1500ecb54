"""Losses on supervised positions, under per-token weights.

Hard: cross-entropy of the teacher's tokens. Soft: a divergence between the teacher's next-token distribution and the
student's. The head is applied to blocks of positions, and each block's gradient is made in the same pass: logits of all
positions never exist together, and none are computed twice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jsublim.core.reading import check_known
from jsublim.errors import UsageError
from jsublim.inference.scoring import top_k_log_probs
from jsublim.models import decoder
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import Params

SOFT = ("forward-kl", "reverse-kl", "js")
LOSSES = ("hard", *SOFT)
LOGIT_BYTES = 2**28  # of the logits that exist at one time, over all arms
# A loss of one's own: (what the student makes of the supervised positions, batch) -> float32 scalar. See `Loss.own`.
OwnLoss = Callable[[Array, dict[str, Array]], Array]


@dataclass(frozen=True)
class Loss:
    """A token's loss.

    Attributes:
      kind: "hard"; or with p the teacher's distribution, q the student's and m their mean: "forward-kl" KL(p | q),
        "reverse-kl" KL(q | p), "js" KL(p | m) / 2 + KL(q | m) / 2.
      temperature: logits of both are divided by it (soft kinds only); the loss is not multiplied back by its square.
      terms: names of `TERMS` that are added to it.
      own: a function in place of all of these. It is given the student's logits at the supervised positions of a micro-batch, float32 `[B, C, V]`
        (with `own_reads` "hidden" what the head reads there, `[B, C, D]`), and the micro-batch: `labels` int32 `[B, C]`; `weights`
        float32 `[B, C]`, which sum to the arm's factor over the step, so that a sum of weight times loss is a mean; `tokens` `[B, T]`, and
        `where` `[B, C]`, the positions in them. It gives a scalar; those of a step's micro-batches are added up.

    >>> def confident(logits, batch):  # the student's own entropy
    ...     return -(batch["weights"][..., None] * jax.nn.softmax(logits) * jax.nn.log_softmax(logits)).sum()
    >>> program = jsublim.Program(loss=confident, optimizer=optax.adam(1e-2))
    """

    kind: str = "hard"
    temperature: float = 1.0
    terms: tuple[str, ...] = ()
    own: OwnLoss | None = None
    own_reads: str = "logits"

    def __post_init__(self) -> None:
        check_known("loss", self.kind, LOSSES)
        check_known("own_reads", self.own_reads, ("logits", "hidden"))
        if self.own is not None and (self.soft or self.terms):
            raise UsageError("loss: one of your own stands alone; it has no kind and no terms")
        for term in self.terms:
            check_known("terms", term, TERMS)
        if not self.temperature > 0:
            raise UsageError(f"temperature: {self.temperature} given; it must be above 0")
        if self.kind == "hard" and self.temperature != 1.0:
            raise UsageError(f"temperature: {self.temperature} given, but a hard loss has none; choose a soft one")

    @property
    def soft(self) -> bool:
        """Whether it needs the teacher's distribution."""
        return self.kind != "hard"

    @property
    def reads_base(self) -> bool:
        """Whether it needs the base's distribution."""
        return any(TERMS[name].reads_base for name in self.terms)


def divergence(kind: str, logp: Array, logq: Array) -> Array:
    """A divergence (nats) of teacher `logp` and student `logq`, log-probabilities `[..., V]`, over the last axis."""
    kl = optax.losses.kl_divergence_with_log_targets  # of (logq, logp): KL(p | q)
    if kind == "forward-kl":
        return kl(logq, logp)
    if kind == "reverse-kl":
        return kl(logp, logq)
    logm = jnp.logaddexp(logp, logq) - jnp.log(2.0)
    return 0.5 * kl(logm, logp) + 0.5 * kl(logm, logq)


def _kl_to_base(config: ModelConfig, base: Params, z: Array, at: dict[str, Array]) -> Array:
    """KL(q | base), the defence that keeps a student where it started."""
    start = jax.nn.log_softmax(decoder.logits(config, base, at["base"]))
    return divergence("reverse-kl", start, jax.nn.log_softmax(z))


class LossTerm(NamedTuple):
    """An addition to a token's loss, times a coefficient of the arm."""

    # (config, the base's head, student's logits [n, V], what stands at the positions) -> [n]
    at: Callable[[ModelConfig, Params, Array, dict[str, Array]], Array]
    reads_base: bool = False  # the base's hidden states `base` [n, D] are among what stands there


TERMS = {"kl_to_base": LossTerm(_kl_to_base, reads_base=True)}  # a name is that of its coefficient in a config


def positions_loss(
    config: ModelConfig,
    loss: Loss,
    coefficients: dict[str, Array],
    params: Params,
    base: Params,
    h_nD: Array,
    at: dict[str, Array],
) -> Array:
    """Weighted loss of n positions, float32 scalar.

    Args:
      coefficients: of the loss's terms, float32 scalars.
      params: the student's; base: the frozen ones, whose head a live teacher has too. Of both, the head only is read.
      h_nD: the student's hidden states; at: what stands at the positions: `labels`, `weights`, and with a soft loss the
        teacher's hidden states `teacher` `[n, D]`, or its stored `ids` `[n, k]` and `logp` `[n, k + 1]`.
    """
    z = decoder.logits(config, params, h_nD)
    if not loss.soft:
        nats = jax.nn.logsumexp(z, axis=-1) - jnp.take_along_axis(z, at["labels"][:, None], axis=-1)[:, 0]
    elif "ids" in at:
        nats = divergence(loss.kind, at["logp"], top_k_log_probs(z / loss.temperature, at["ids"]))
    else:
        theirs = decoder.logits(config, base, at["teacher"]) / loss.temperature
        nats = divergence(loss.kind, jax.nn.log_softmax(theirs), jax.nn.log_softmax(z / loss.temperature))
    for name in loss.terms:
        nats = nats + coefficients[name] * TERMS[name].at(config, base, z, at)
    return jnp.sum(at["weights"] * nats)


BlockLoss = Callable[..., Array]  # (trained, fixed, h_nD, at) -> scalar


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def blockwise(of: BlockLoss, size: int, trained: Any, fixed: Any, h_ND: Array, at: dict[str, Array]) -> Array:
    """The sum of `of(trained, fixed, h_nD, at)` over blocks of at most `size` positions. Differentiable in `trained` and `h_ND`: their gradients
    are made block by block beside the value, so the head costs one product forwards and one backwards, and nothing of it is kept or
    recomputed (Hsu et al. 2024, arXiv 2410.10989, do so in one GPU kernel)."""
    return jax.lax.scan(
        lambda total, xs: (total + of(trained, fixed, *xs), None), jnp.float32(0), _blocks(size, h_ND, at)
    )[0]


def _forward(of: BlockLoss, size: int, trained: Any, fixed: Any, h_ND: Array, at: dict[str, Array]):
    def block(sums: tuple, xs: tuple):
        value, (of_trained, of_h) = jax.value_and_grad(of, argnums=(0, 2))(trained, fixed, *xs)
        return jax.tree.map(jnp.add, sums, (value, of_trained)), of_h

    start = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trained))
    (value, of_trained), of_h = jax.lax.scan(block, start, _blocks(size, h_ND, at))
    return value, (of_trained, of_h.swapaxes(0, 1).reshape(-1, h_ND.shape[-1])[: h_ND.shape[0]])


def _backward(of: BlockLoss, size: int, kept: tuple, g: Array):
    of_trained, of_h = jax.tree.map(lambda x: (g * x).astype(x.dtype), kept)
    return of_trained, None, of_h, None


blockwise.defvjp(_forward, _backward)


def _blocks(size: int, h_ND: Array, at: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """Positions in blocks of equal size; what is added to fill the last one weighs nothing. Block i has every position whose index is i modulo
    their number: where devices share the rows, each then has its part of every block, and the head's products are shared too."""
    N = h_ND.shape[0]
    fewest = math.ceil(N / size)
    count = next((c for c in range(fewest, 2 * fewest) if N % c == 0), fewest)  # with nothing to add, if there is one
    size = math.ceil(N / count)

    def deal(x: Array) -> Array:
        x = jnp.pad(x, [(0, count * size - N)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(size, count, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(deal, (h_ND, at))


def block_size(config: ModelConfig, arms: int, tables: int) -> int:
    """Positions whose logits exist at one time, when `arms` are computed together under `tables` heads each."""
    return max(8, LOGIT_BYTES // (4 * config.vocab_size * arms * tables))


def normalise(weights_MBC: Array, per: str, total: Callable[[Array], Array] = lambda x: x) -> Array:
    """Weights that sum the micro-batches' losses to the loss of the step (docs/recipes.md, quirk 6).

    Args:
      per: "tokens", the sum over the whole step divided by its supervised tokens; "micro-batch", the mean of the
        micro-batches' own means (those without any supervised token left out); "micro-batch-sum", the sum of those means.
      total: sums over the devices that share the rows.
    """
    totals = total(weights_MBC.sum(axis=(1, 2), keepdims=True))
    if per == "tokens":
        return weights_MBC / jnp.maximum(totals.sum(), 1e-9)
    busy = jnp.maximum((totals > 0).sum(), 1) if per == "micro-batch" else 1
    return weights_MBC / jnp.maximum(totals, 1e-9) / busy
