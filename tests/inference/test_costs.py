"""What decoding, reading and attribution cost, counted in traced programs: products with parameters, and nothing twice."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine import CONFIG
from jax.interpreters import partial_eval
from products import every_equation, flops, operations

from jsublim.attribution import patching
from jsublim.inference import decoding, scoring
from jsublim.inference.constrain import number_limits
from jsublim.inference.decoding import Begun, Prompts
from jsublim.models.config import Local, layer_parameters, projection_shapes
from jsublim.models.decoder import Branches, abstract_params
from jsublim.models.lora import init_lora, init_steering, stack_adapters

# Wide, so that projections are nearly everything. Shapes only: nothing of this size exists.
WIDE = dataclasses.replace(
    CONFIG, hidden_size=1024, intermediate_size=3072, num_layers=6, num_heads=8, num_kv_heads=8, head_dim=128,
    vocab_size=16381, local=Local(),
)  # fmt: skip
PARAMS = abstract_params(WIDE)
BASE = stack_adapters([init_steering(WIDE)])
BODY, HEAD = WIDE.num_layers * layer_parameters(WIDE), WIDE.hidden_size * WIDE.vocab_size


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def bools(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bool_)


def empty(rows: int, slots: int = 64, limited: bool = False):
    return jax.eval_shape(lambda: decoding.empty(WIDE, 1, rows, slots, "float32", limited))


def prefix(tokens: int, lead: tuple[int, ...] = ()):
    shape = (*lead, WIDE.num_layers, 1, WIDE.num_kv_heads, tokens, WIDE.head_dim)
    return (jax.ShapeDtypeStruct(shape, jnp.float32),) * 2


@pytest.mark.parametrize("begun", [0, 48])
def test_a_prompt_is_read_once_and_what_all_begin_with_not_at_all(begun):
    lines, n, T, B = 2, 5, 32, 8
    branches = Branches(ints(1, lines, T), ints(1, lines, T))
    read = Prompts(ints(1, lines, T), branches, *(ints(1, count) for count in (n, n, B, B)))
    earlier = Begun(ints(1, begun), prefix(begun, (1,))) if begun else None
    jaxpr = jax.make_jaxpr(lambda p, e, b, r: decoding.fill(WIDE, p, BASE, e, b, r, np.zeros(2, "u4")))(
        PARAMS, earlier, empty(B), read
    )
    assert flops(jaxpr) == pytest.approx(2 * lines * T * BODY + 2 * n * HEAD, rel=0.05)


@pytest.mark.parametrize("limits", [None, number_limits(dict(enumerate("0123456789, ")), [16000])])
def test_a_token_costs_a_product_with_every_weight_and_a_format_none(limits):
    B = 8
    how = {
        k: np.ones(B, v)
        for k, v in (("temperature", "f4"), ("top_k", "i4"), ("top_p", "f4"), ("repetition_penalty", "f4"))
    }
    jaxpr = jax.make_jaxpr(
        lambda p, b: decoding.advance(WIDE, p, BASE, b, how, np.full(8, -2), np.ones(1, int), 8, limits)
    )(PARAMS, empty(B, limited=limits is not None))
    (loop,) = [e for e in every_equation(jaxpr.jaxpr) if e.primitive.name == "while" and "dot_general" in str(e)]
    products = [e for e in every_equation(loop.params["body_jaxpr"].jaxpr) if e.primitive.name == "dot_general"]
    assert sum(map(operations, products)) == pytest.approx(2 * B * (BODY + HEAD), rel=0.05)
    # No scan over layers: it would copy the caches at each of them.
    scans = [e for e in every_equation(loop.params["body_jaxpr"].jaxpr) if e.primitive.name == "scan"]
    assert not any("dot_general" in str(scan) for scan in scans)


def test_arms_share_the_weights_they_decode_with():
    B, arms = 4, 3
    how = {"temperature": "f4", "top_k": "i4", "top_p": "f4", "repetition_penalty": "f4"}
    numbers = {name: np.ones(B, kind) for name, kind in how.items()}
    adapter = jax.eval_shape(lambda: stack_adapters([init_lora(WIDE, jax.random.key(0), rank=2, alpha=2)] * arms))
    batch = jax.eval_shape(lambda: decoding.empty(WIDE, arms, B, 64, "float32"))
    jaxpr = jax.make_jaxpr(
        lambda p, a, b: decoding.advance(WIDE, p, a, b, numbers, np.full(8, -2), np.ones(arms, int), 8)
    )(PARAMS, adapter, batch)
    kernels = {tuple(sorted(shape)) for shape in projection_shapes(WIDE).values()}
    products = [e for e in every_equation(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    shapes = [v.aval.shape for e in products for v in e.invars if tuple(sorted(v.aval.shape[-2:])) in kernels]
    assert len(shapes) == 7 * WIDE.num_layers and all(len(shape) == 2 for shape in shapes)


@pytest.mark.parametrize("shared", [0, 40])
def test_a_conversation_is_read_once_with_logits_at_its_answer_only(shared):
    B, T, C = 4, 64, 16
    earlier = prefix(shared) if shared else None
    jaxpr = jax.make_jaxpr(lambda p, e, *rows: scoring.read_batch(WIDE, p, None, e, *rows, scoring.best_token))(
        PARAMS, earlier, ints(B, T), bools(B, T), ints(B, C), ints(B, C)
    )
    assert flops(jaxpr) == pytest.approx(2 * B * T * BODY + 2 * B * C * HEAD, rel=0.05)


def test_attribution_costs_two_passes_through_what_is_above_a_site_per_step_but_the_first():
    B, T, steps, L = 2, 32, 10, WIDE.num_layers
    batch = patching.PairBatch(ints(B, T), ints(B, T), bools(B, T), ints(B), ints(B, 2))
    jaxpr = jax.make_jaxpr(
        lambda p, b: patching.at_sites(patching.integrated, WIDE, ("residual",), p, None, b, jnp.int32(steps))
    )(PARAMS, batch)
    each = layer_parameters(WIDE)
    above = L * (L - 1) / 2
    captured = 2 * B * T * 2 * each * 2 * L  # both runs, forwards and back
    expected = captured + B * T * (steps - 1) * 4 * each * above
    assert flops(jaxpr) == pytest.approx(expected, rel=0.1)
    integral, whole = patching.patching_flops(WIDE, 1, steps)
    assert B * T * integral == expected
    jaxpr = jax.make_jaxpr(
        lambda p, b: patching.at_sites(patching.all_positions, WIDE, ("residual",), p, None, b, jnp.int32(steps))
    )(PARAMS, batch)
    # XLA leaves out what nothing hangs on: here the way back.
    left, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True])
    assert flops(jaxpr.replace(jaxpr=left)) == pytest.approx(B * T * whole, rel=0.05)
