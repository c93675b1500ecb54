"""Adapters: PEFT's LoRA, gradients as torch computes them, and no work for what is frozen."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jsublim.errors import UsageError
from jsublim.models import Adapter, hidden_states, load_params, logits, read_config
from jsublim.models.decoder import abstract_params
from jsublim.models.lora import (
    PROJECTIONS,
    bind,
    init_full,
    init_lora,
    merge_full,
    projection_shapes,
    stack_adapters,
    unstack_arms,
)
from jsublim.models.weights import tensor_plan

FAMILIES = ("qwen2-window", "gemma3")  # and Llama where the logits are compared
_FAST = {"xla_backend_optimization_level": 0}  # small programs: compiling is what takes the time


@functools.partial(jax.jit, static_argnames="config", compiler_options=_FAST)
def _logits(config, params, adapter, tokens, valid):
    params, adapter = bind(params, adapter)
    return logits(config, params, hidden_states(config, params, tokens, valid, adapter=adapter)[0])


def all_logits(config, params, adapter, tokens, valid) -> np.ndarray:
    return np.asarray(_logits(config, params, adapter, tokens, valid))


@functools.cache
def _load(folder):
    _, config = read_config(folder)
    return config, load_params(folder, config)


def load(checkpoint):
    return _load(checkpoint.folder)


def fresh_lora(config, seed: int, **options) -> Adapter:
    """`init_lora`, as one small program."""
    return jax.jit(lambda key: init_lora(config, key, **options), compiler_options=_FAST)(jax.random.key(seed))


def random_lora(config, seed: int, **options) -> Adapter:
    """An adapter with every factor random, so that it computes something."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_lora(config, jax.random.key(0), **options))
    return jax.tree.map(lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(leaf.dtype), shapes)


def peft_model(model, **options):
    """PEFT around a copy of `model`, A and B random."""
    import copy

    import peft
    import torch

    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=noise))
    return wrapped


def by_hand(wrapped, projections, layers, scale) -> Adapter:
    state = {name: value.detach().numpy() for name, value in wrapped.named_parameters() if "lora_" in name}

    def stacked(projection: str, factor: str):
        room = "mlp" if projection in ("gate", "up", "down") else "self_attn"
        name = f"base_model.model.model.layers.{{}}.{room}.{projection}_proj.lora_{factor}.default.weight"
        return np.stack([state.pop(name.format(layer)).T for layer in layers])

    lora = {
        p: {"a": stacked(p, "A"), "b": stacked(p, "B"), "scale": np.full(len(layers), scale, np.float32)}
        for p in projections
    }
    assert not state, "PEFT trains something the adapter lacks"
    return Adapter(lora=lora, weights=None, layers=tuple(layers))


@pytest.mark.parametrize(
    ("name", "projections", "layers", "rslora"),
    [
        ("llama-linear-biases", PROJECTIONS, None, True),
        ("gemma3", PROJECTIONS, None, False),
        ("qwen2-window", ("q", "v"), (0, 2), False),
    ],
)
def test_logits_equal_peft(name, projections, layers, rslora, named_checkpoint, padded_rows, assert_close):
    from conftest import torch_logits

    checkpoint = named_checkpoint(name)
    config, params = load(checkpoint)
    wrapped = peft_model(
        checkpoint.model,
        r=3,
        lora_alpha=5,
        use_rslora=rslora,
        target_modules=[f"{p}_proj" for p in projections],
        layers_to_transform=None if layers is None else list(layers),
    )
    chosen = tuple(range(config.num_layers)) if layers is None else layers
    adapter = by_hand(wrapped, projections, chosen, 5 / (np.sqrt(3) if rslora else 3))
    # The scale by hand is the one a fresh adapter gets.
    options = {"layers": layers, "projections": projections, "rslora": rslora}
    fresh = fresh_lora(config, 0, rank=3, alpha=5, **options)
    jax.tree.map(lambda ours, theirs: (ours.shape == theirs.shape) or pytest.fail(), fresh, adapter)
    for p in projections:
        np.testing.assert_allclose(fresh.lora[p]["scale"], adapter.lora[p]["scale"], rtol=1e-6)

    tokens, valid = padded_rows(11)
    ours, theirs = all_logits(config, params, adapter, tokens, valid), torch_logits(wrapped, tokens, valid)
    assert_close(ours[valid], theirs[valid], 1e-4)
    base = checkpoint.logits(tokens, valid)
    assert np.max(np.abs(theirs - base)[valid]) > 0.01  # the adapter does change the model


def test_a_fresh_adapter_is_distributed_as_pefts_and_computes_nothing(named_checkpoint, padded_rows):
    import copy

    import peft

    checkpoint = named_checkpoint("qwen2-window")
    config, params = load(checkpoint)
    adapter = fresh_lora(config, 3, rank=16, alpha=8)
    theirs = peft.get_peft_model(copy.deepcopy(checkpoint.model), peft.LoraConfig(r=16, target_modules="all-linear"))
    ours_all, theirs_all = [], []
    for p, (inputs, _) in projection_shapes(config).items():
        a = np.asarray(adapter.lora[p]["a"]) * np.sqrt(inputs)
        assert np.abs(a).max() <= 1 and not adapter.lora[p]["b"].any()
        assert np.array_equal(adapter.lora[p]["scale"], np.full(config.num_layers, 0.5))
        ours_all.append(a.ravel())
        theirs_all += [
            value.detach().numpy().ravel() * np.sqrt(inputs)
            for name, value in theirs.named_parameters()
            if f"{p}_proj.lora_A" in name
        ]
    ours, theirs = np.concatenate(ours_all), np.concatenate(theirs_all)
    assert len(ours) == len(theirs)
    assert len(np.unique(ours)) > 0.98 * len(ours)  # no layer or projection repeats another's draw
    for sample in (ours, theirs):
        assert stats.kstest(sample, stats.uniform(-1, 2).cdf).pvalue > 1e-3

    tokens, valid = padded_rows(12)
    assert np.array_equal(
        all_logits(config, params, adapter, tokens, valid), all_logits(config, params, None, tokens, valid)
    )


def test_the_draw_of_a_projection_does_not_hang_on_the_others(named_checkpoint):
    config, _ = load(named_checkpoint("qwen2-window"))
    everything = fresh_lora(config, 1, rank=2, alpha=2)
    some = fresh_lora(config, 1, rank=2, alpha=2, projections=("down", "k"))
    assert set(some.lora) == {"k", "down"}
    for p in some.lora:
        assert np.array_equal(some.lora[p]["a"], everything.lora[p]["a"])
    other = fresh_lora(config, 2, rank=2, alpha=2)
    assert not np.array_equal(other.lora["q"]["a"], everything.lora["q"]["a"])


# Gradients


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


@pytest.mark.parametrize("name", FAMILIES)
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
    for name, (path, layer, _) in tensor_plan(config).items():
        if layer not in layers:
            continue
        leaf = functools.reduce(lambda tree, key: tree[key], path[1:], ours["weights"])[layers.index(layer)]
        reference = theirs[f"model.{name}"]
        reference = reference.T if path[-1] == "kernel" else reference
        if path[1:] == ("k", "bias") and np.max(np.abs(reference)) < 1e-6:
            assert np.max(np.abs(leaf)) < 1e-6
        else:
            assert_close(leaf, reference, 1e-4)
        compared += 1
    assert compared >= 2 * 9


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


# The shape of an adapter


def test_arms_under_vmap_are_the_arms_one_by_one(named_checkpoint, padded_rows, assert_close):
    config, params = load(named_checkpoint("qwen2-window"))
    arms = [random_lora(config, i, rank=2, alpha=1, layers=(1, 2)) for i in range(3)]  # each its own scale
    rows = [padded_rows(20 + i) for i in range(3)]
    tokens, valid = np.stack([r[0] for r in rows]), np.stack([r[1] for r in rows])
    stacked = stack_adapters(arms)
    assert stacked.lora["q"]["scale"].shape == (3, 2) and stacked.layers == (1, 2)
    together = jax.vmap(lambda adapter, t, v: _logits(config, params, adapter, t, v))(stacked, tokens, valid)
    for i, arm in enumerate(arms):
        alone = all_logits(config, params, arm, tokens[i], valid[i])
        assert_close(together[i][valid[i]], alone[valid[i]], 1e-5)
    for before, after in zip(arms, unstack_arms(stacked, arms), strict=True):
        assert jax.tree.structure(before) == jax.tree.structure(after)
        jax.tree.map(np.testing.assert_array_equal, before, after)


def test_trainable_is_everything_but_the_scale(named_checkpoint):
    config, params = load(named_checkpoint("gemma3"))
    adapter = fresh_lora(config, 0, rank=2, alpha=3)
    assert len(jax.tree.leaves(adapter.trainable)) == 2 * len(PROJECTIONS)
    doubled = adapter.with_trainable(jax.tree.map(lambda leaf: 2 * leaf, adapter.trainable))
    assert np.array_equal(doubled.lora["up"]["a"], 2 * adapter.lora["up"]["a"])
    assert np.array_equal(doubled.lora["up"]["scale"], adapter.lora["up"]["scale"])
    full = init_full(config, params, (2,))
    assert jax.tree.structure(full.trainable["weights"]) == jax.tree.structure(params["layers"])


def test_whole_layers_start_as_the_base_and_merge_back_into_it(named_checkpoint, padded_rows, assert_close):
    config, params = load(named_checkpoint("gemma3"))
    tokens, valid = padded_rows(16)
    full = init_full(config, params, (0, 3))
    base = all_logits(config, params, None, tokens, valid)
    assert_close(all_logits(config, params, full, tokens, valid), base, 5e-6)  # three scans instead of one
    changed = full.with_trainable(jax.tree.map(lambda leaf: 1.1 * leaf, full.trainable))
    trained = all_logits(config, params, changed, tokens, valid)
    assert np.max(np.abs(trained - base)) > 0.01
    merged = merge_full(params, changed)
    assert_close(all_logits(config, merged, None, tokens, valid), trained, 5e-6)
    for layer in (1, 2):
        assert np.array_equal(merged["layers"]["up"]["kernel"][layer], params["layers"]["up"]["kernel"][layer])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": (0, 9)}, "9"),
        ({"layers": (-1,)}, "-1"),
        ({"layers": ()}, "layers"),
        ({"projections": ("q", "attn")}, "attn"),
        ({"projections": ()}, "projections"),
        ({"rank": 0}, "rank"),
    ],
)
def test_a_wrong_choice_is_a_usage_error(options, said, named_checkpoint):
    config, _ = load(named_checkpoint("gemma3"))
    with pytest.raises(UsageError, match=said):
        init_lora(config, jax.random.key(0), **({"rank": 2, "alpha": 2.0} | options))


def test_trained_ends_reach_a_forward_pass_through_bind_only(named_checkpoint, padded_rows):
    config, params = load(named_checkpoint("qwen2"))
    tokens, valid = padded_rows(17)
    full = init_full(config, params, (), ("embed", "norm"))
    changed = full.with_trainable(jax.tree.map(lambda leaf: 1.5 * leaf, full.trainable))
    with pytest.raises(ValueError, match="bind"):
        hidden_states(config, params, tokens, valid, adapter=changed)
    bound, rest = bind(params, changed)
    assert not rest.ends and bound["layers"] is params["layers"]
    by_hand = params | {name: jax.tree.map(lambda leaf: 1.5 * leaf, params[name]) for name in ("embed", "norm")}
    ours = all_logits(config, params, changed, tokens, valid)
    assert np.array_equal(ours, all_logits(config, by_hand, None, tokens, valid))
    assert bind(bound, rest)[0] is bound


def test_what_is_no_batch_of_rows_is_refused_while_tracing(named_checkpoint, padded_rows):
    config, params = load(named_checkpoint("qwen2"))
    tokens, valid = padded_rows(18)
    for wrong in ((tokens[0], valid[0]), (tokens, valid[:, 1:]), (tokens, valid.astype(np.int32)), (valid, valid)):
        with pytest.raises(AssertionError):
            jax.eval_shape(lambda t, v: hidden_states(config, params, t, v)[0], *wrong)
