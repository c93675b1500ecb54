"""Rounded logits (quirk 17): those of a bfloat16 head in torch, ties included."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from tiny import small

from jsublim.inference.sampling import argmax
from jsublim.models.decoder import logits


def test_rounded_logits_and_their_argmax_are_torchs():
    import torch

    config, rng = small("tiny-qwen2").lm.config, np.random.default_rng(0)
    rounding = dataclasses.replace(config, scales=dataclasses.replace(config.scales, rounded=True))
    h, table = (torch.tensor(rng.normal(size=shape), dtype=torch.bfloat16) for shape in ((512, 64), (4096, 64)))
    theirs = (h @ table.T).float().numpy()
    h_BD, head = (jnp.asarray(x.float().numpy(), jnp.bfloat16) for x in (h, table))
    read = jax.jit(lambda config, weight, h: logits(config, {"head": {"weight": weight}}, h), static_argnums=0)
    exact, rounded = (np.asarray(read(each, head, h_BD)) for each in (config, rounding))
    assert (rounded == theirs).mean() > 0.9999  # sums in another order: one in a hundred thousand is rounded otherwise
    same = (rounded == theirs).all(axis=1)
    ties = (theirs == theirs.max(axis=1, keepdims=True)).sum(axis=1) > 1
    assert (ties & same).sum() > 5 and not ((exact == exact.max(axis=1, keepdims=True)).sum(axis=1) > 1).any()
    own = np.asarray(argmax(jnp.asarray(rounded)))
    assert (own == torch.tensor(theirs).bfloat16().argmax(dim=-1).numpy())[same].all()
    assert (own != exact.argmax(axis=1)).any()
    np.testing.assert_array_equal(
        read(rounding, head.astype(jnp.float32), h_BD.astype(jnp.float32)),
        read(config, head.astype(jnp.float32), h_BD.astype(jnp.float32)),
    )
