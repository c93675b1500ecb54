"""What a training step should cost in useful floating-point operations, to compare a measured speed with a device's peak.

Products with parameters only, a multiply-add counted as two; attention's own products and anything recomputed are not
useful work.
"""

from __future__ import annotations

import jax

from jsublim.distill.losses import Loss
from jsublim.models.config import ModelConfig, layer_parameters
from jsublim.models.lora import Adapter


def training_flops(
    config: ModelConfig,
    adapter: Adapter,
    loss: Loss,
    *,
    tokens: int,
    supervised: int,
    teacher_tokens: int = 0,
    stored: bool = False,
    cached: bool = False,
) -> float:
    """Useful operations of one arm's step.

    Forward through every layer; backward through the lowest trained one and those above it (where only one layer is
    trained, through those above it: the way back inside that layer is left out); a gradient of weights for what is
    trained. A frozen head costs one product forwards and one backwards at supervised positions, a teacher's or the
    base's one product forwards.

    Args:
      adapter: without an arm axis. Shapes only.
      tokens, teacher_tokens: read by the student, and by a live teacher.
      supervised: positions the loss is on.
      stored: the teacher's distribution is stored, so it is not computed.
      cached: so is the hidden state below the one trained layer.
    """
    L, layer = config.num_layers, layer_parameters(config)
    table = config.hidden_size * config.vocab_size
    lowest = 0 if "embed" in adapter.ends else min(adapter.layers, default=L)
    one = len(adapter.layers) == 1 and not adapter.ends
    forward = L - lowest if cached and one else L
    backward = max(L - lowest - (1 if one else 0), 0)
    factors = sum(leaf.size for pair in adapter.trainable["lora"].values() for leaf in pair.values())
    weights = layer * len(adapter.layers) if adapter.weights is not None else 0
    body = tokens * (2 * layer * (forward + backward) + 6 * factors + 2 * weights)
    reads_back = 2 if jax.tree.leaves(adapter.trainable) else 1
    trained_head = 1 if ("embed" if config.tied else "head") in adapter.ends else 0
    heads = reads_back + trained_head + (1 if loss.soft and not stored else 0) + (1 if loss.reads_base else 0)
    others = teacher_tokens * 2 * layer * L + (tokens * 2 * layer * L if loss.reads_base else 0)
    return float(body + others + supervised * 2 * table * heads)
