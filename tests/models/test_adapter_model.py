"""Adapters: logits as PEFT computes them, fresh ones as PEFT draws them, and the shape of one."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from peft_by_hand import by_hand, load, peft_model
from scipy import stats

from jsublim.errors import UsageError
from jsublim.models import Adapter, hidden_states, logits
from jsublim.models.config import projection_shapes
from jsublim.models.lora import PROJECTIONS, bind, init_full, init_lora, merge_full, stack_adapters, unstack_adapters

_FAST = {"xla_backend_optimization_level": 0}  # small programs: compiling is what takes the time


@functools.partial(jax.jit, static_argnames="config", compiler_options=_FAST)
def _logits(config, params, adapter, tokens, valid):
    params, adapter = bind(params, adapter)
    return logits(config, params, hidden_states(config, params, tokens, valid, adapter=adapter)[0])


def all_logits(config, params, adapter, tokens, valid) -> np.ndarray:
    return np.asarray(_logits(config, params, adapter, tokens, valid))


def fresh_lora(config, seed: int, **options) -> Adapter:
    """`init_lora`, as one small program."""
    return jax.jit(lambda key: init_lora(config, key, **options), compiler_options=_FAST)(jax.random.key(seed))


def random_lora(config, seed: int, **options) -> Adapter:
    """An adapter with every factor random, so that it computes something."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_lora(config, jax.random.key(0), **options))
    return jax.tree.map(lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(leaf.dtype), shapes)


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
    for before, after in zip(arms, unstack_adapters(stacked, arms), strict=True):
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
