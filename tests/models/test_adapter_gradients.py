"""Gradients of adapters as torch and PEFT compute them, and no work for what is frozen."""

from __future__ import annotations

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_by_hand import by_hand, load, peft_factors, peft_model

from jsublim.models import hidden_states, logits
from jsublim.models.decoder import abstract_params
from jsublim.models.families import weight_names
from jsublim.models.layers import low_rank
from jsublim.models.lora import PROJECTIONS, init_full, init_lora
from jsublim.models.peft import load_adapter, save_adapter
from jsublim.models.weights import tensor_plan

FAMILIES = ("qwen2-window", "gemma3")  # and Llama in test_adapter_model, where the logits are compared
NEW = ("qwen3", "ministral", "phi3", "olmo2", "gemma2", "pythia")
_FAST = {"xla_backend_optimization_level": 0}  # small programs: compiling is what takes the time


def cross_entropy(z, labels, valid):
    chosen = jnp.take_along_axis(jax.nn.log_softmax(z), labels[..., None], -1)[..., 0]
    return -jnp.sum(chosen * valid) / jnp.sum(valid)


def torch_loss(model, tokens, labels, valid):
    import torch

    ids, mask = torch.tensor(tokens, dtype=torch.long), torch.tensor(valid)
    z = model(input_ids=ids, attention_mask=mask.long()).logits
    return torch.nn.functional.cross_entropy(z[mask], torch.tensor(labels, dtype=torch.long)[mask])


def gradient(config, params, adapter, tokens, labels, valid):
    @functools.partial(jax.jit, compiler_options=_FAST)
    def both(trainable):
        def loss(trainable):
            h, _ = hidden_states(config, params, tokens, valid, adapter=adapter.with_trainable(trainable))
            return cross_entropy(logits(config, params, h), labels, valid)

        return jax.value_and_grad(loss)(trainable)

    return jax.device_get(both(adapter.trainable))


@pytest.mark.parametrize("name", [*FAMILIES, "pythia"])
def test_full_gradients_of_some_layers_equal_torch(name, named_checkpoint, padded_rows, assert_close):
    checkpoint = named_checkpoint(name)
    config, params = load(checkpoint)
    layers = (0, 2)
    tokens, valid = padded_rows(13)
    labels = np.random.default_rng(1).integers(0, config.vocab_size, tokens.shape)
    value, ours = gradient(config, params, init_full(config, params, layers), tokens, labels, valid)
    checkpoint.model.zero_grad()
    loss = torch_loss(checkpoint.model, tokens, labels, valid)
    loss.backward()
    assert value == pytest.approx(loss.item(), rel=1e-4)
    theirs = {name: p.grad.numpy() for name, p in checkpoint.model.named_parameters()}
    checkpoint.model.zero_grad()
    compared = 0
    for name, stored in tensor_plan(config).items():
        for path, rows in stored.parts if stored.layer in layers else ():
            leaf = functools.reduce(lambda tree, key: tree[key], path[1:], ours["weights"])[layers.index(stored.layer)]
            reference = theirs[weight_names(config).prefix + name]
            reference = reference if rows is None else reference[rows]
            reference = reference.T if path[-1] == "kernel" else reference
            if path[1:] == ("k", "bias") and np.max(np.abs(reference)) < 1e-6:
                assert np.max(np.abs(leaf)) < 1e-6
            else:
                assert_close(leaf, reference, 1e-4)
            compared += 1
    assert compared == 2 * len(jax.tree.leaves(params["layers"])) >= 2 * 9


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_gradients_equal_peft(name, named_checkpoint, padded_rows, assert_close):
    checkpoint = named_checkpoint(name)
    config, params = load(checkpoint)
    layers = (1, 2)
    wrapped = peft_model(
        checkpoint.model,
        r=3,
        lora_alpha=5,
        target_modules=[f"{p}_proj" for p in PROJECTIONS],
        layers_to_transform=list(layers),
    )
    tokens, valid = padded_rows(14)
    labels = np.random.default_rng(2).integers(0, config.vocab_size, tokens.shape)
    adapter = by_hand(wrapped, PROJECTIONS, layers, 5 / 3)
    value, ours = gradient(config, params, adapter, tokens, labels, valid)
    loss = torch_loss(wrapped, tokens, labels, valid)
    loss.backward()
    assert value == pytest.approx(loss.item(), rel=1e-4)
    for parameter in wrapped.parameters():
        parameter.data = parameter.grad if parameter.grad is not None else parameter.data
    theirs = by_hand(wrapped, PROJECTIONS, layers, 5 / 3).trainable["lora"]
    for p in PROJECTIONS:
        for factor in ("a", "b"):
            assert_close(ours["lora"][p][factor], theirs[p][factor], 1e-4)


@pytest.mark.parametrize("name", NEW)
def test_lora_gradients_equal_those_of_what_peft_reads(name, named_checkpoint, padded_rows, assert_close, tmp_path):
    """Our own adapter, written, read by us again, and trained on by PEFT: under the family's own modules, fused ones too."""
    import peft

    checkpoint = named_checkpoint(name)
    config, params = load(checkpoint)
    adapter, rng = init_lora(config, jax.random.key(0), rank=3, alpha=5, layers=(1, 2)), np.random.default_rng(2)
    adapter = adapter.with_trainable(
        jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape).astype(np.float32), adapter.trainable)
    )
    save_adapter(tmp_path / "a", adapter, config, base="x")
    jax.tree.map(np.testing.assert_array_equal, load_adapter(tmp_path / "a", config), adapter)
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(checkpoint.model), tmp_path / "a", is_trainable=True).eval()
    tokens, valid = padded_rows(14)
    labels = np.random.default_rng(3).integers(0, config.vocab_size, tokens.shape)
    value, ours = gradient(config, params, adapter, tokens, labels, valid)
    loss = torch_loss(wrapped, tokens, labels, valid)
    loss.backward()
    assert value == pytest.approx(loss.item(), rel=1e-4)
    theirs = {name: p.grad.numpy() for name, p in wrapped.named_parameters() if p.grad is not None}
    for p, pair in ours["lora"].items():
        for i, layer in enumerate(adapter.layers):
            a, b = peft_factors(theirs, config, p, layer, rank=3)
            assert_close(pair["a"][i], a, 1e-4)
            assert_close(pair["b"][i], b, 1e-4)


def products(jaxpr) -> int:
    """Multiplications in the matrix products of a program; a loop's body counts once a turn."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += eqn.outvars[0].aval.size * int(np.prod([eqn.invars[0].aval.shape[i] for i in contracted]))
        turns = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += turns * products(inner)
    return total


@pytest.fixture
def cost(named_checkpoint):
    """`cost(depth, trained, make)`: products in a loss (trained empty) or in its gradient, of a model so deep.

    Traced over shapes alone: nothing is compiled or run.
    """
    config, _ = load(named_checkpoint("llama"))
    tokens, valid = jnp.zeros((2, 11), jnp.int32), jnp.ones((2, 11), bool)

    def count(depth: int, trained: tuple[int, ...], make) -> int:
        assert not any(config.is_local)
        cut = dataclasses.replace(config, num_layers=depth)
        params = abstract_params(cut)

        def loss(trainable, adapter, params):
            used = None if adapter is None else adapter.with_trainable(trainable)
            return logits(cut, params, hidden_states(cut, params, tokens, valid, adapter=used)[0]).sum()

        if not trained:
            return products(jax.make_jaxpr(loss)(None, None, params).jaxpr)
        adapter = jax.eval_shape(lambda params: make(cut, params, trained), params)
        return products(jax.make_jaxpr(jax.grad(loss))(adapter.trainable, adapter, params).jaxpr)

    return count


def lora_of(config, params, layers):
    return init_lora(config, jax.random.key(0), rank=1, alpha=1, layers=layers)


@pytest.mark.parametrize("make", [lora_of, init_full], ids=["lora", "full"])
def test_layers_below_the_lowest_trained_cost_their_forward_pass_only(make, cost):
    layer = cost(3, (), make) - cost(2, (), make)
    assert layer > 0
    below = cost(4, (3,), make) - cost(2, (1,), make)
    assert below == 2 * layer
    # ... while a frozen layer above a trained one passes a gradient on, and computes none of its weights
    # (attention's two products have two gradients each)
    above = cost(4, (0,), make) - cost(2, (0,), make)
    assert 2 * 2 * layer <= above < 2.2 * 2 * layer


def test_lora_computes_no_gradient_of_a_frozen_kernel(cost):
    layer = cost(3, (), lora_of) - cost(2, (), lora_of)
    lora = cost(3, (0, 1, 2), lora_of) - cost(2, (0, 1), lora_of)
    full = cost(3, (0, 1, 2), init_full) - cost(2, (0, 1), init_full)
    # Beside forward and backward, attention's own two products are done again (a tenth of a layer at this size).
    assert 2 * layer < lora < 2.6 * layer < 2.9 * layer < full <= 3.2 * layer


@pytest.mark.parametrize(("dtype", "close"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_the_derivative_that_is_written_out_is_that_of_the_product(dtype, close):
    keys = jax.random.split(jax.random.key(0), 4)
    x, g = (jax.random.normal(key, (2, 5, n)).astype(dtype) for key, n in ((keys[0], 24), (keys[1], 40)))
    a, b = jax.random.normal(keys[2], (24, 3)), jax.random.normal(keys[3], (3, 40))
    scale = jnp.float32(0.7)

    def plain(x, a, b):
        return scale * (x.astype(jnp.float32) @ a) @ b

    ours, back = jax.vjp(lambda *each: low_rank(*each, scale), x, a, b)
    theirs, expected = jax.vjp(plain, x, a, b)
    assert ours.dtype == dtype and [each.dtype for each in back(g)] == [dtype, jnp.float32, jnp.float32]
    # In one program, as several students are.
    arms = jax.tree.map(lambda each: jnp.stack([each, each]), (x, a, b, g))
    several = jax.jit(jax.vmap(lambda x, a, b, g: jax.vjp(lambda *each: low_rank(*each, scale), x, a, b)[1](g)))(*arms)
    for one, both in zip(back(g), several, strict=True):
        np.testing.assert_allclose(both[1].astype(jnp.float32), one.astype(jnp.float32), rtol=close, atol=close)
    for one, other in zip((ours, *back(g)), (theirs, *expected(g.astype(jnp.float32))), strict=True):
        scale_of = float(jnp.abs(other).max())
        np.testing.assert_allclose(one.astype(jnp.float32) / scale_of, other.astype(jnp.float32) / scale_of, atol=close)
