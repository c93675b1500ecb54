"""Optimizers and schedules."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from engine import CONFIG, arm_of, examples_of, largest_difference, lora, params_of, stacked, student

from jsublim.distill.optimizer import OPTIMIZERS, Optimizer, learning_rate
from jsublim.distill.step import Program, loss_and_gradient
from jsublim.errors import UsageError

STEPS, RATE = 20, {"adamw": 0.03, "adafactor": 0.03, "sgd": 0.3, "muon": 0.05}
step = jax.jit(loss_and_gradient, static_argnames=("config", "program"))


@functools.cache
def problem(kind: str):
    """A student, and `gradient(student)` -> loss and gradient on its rows."""
    adapter = {
        "lora": lambda: lora(CONFIG, 1, projections=("q", "down")),
        "full": lambda: student(CONFIG, "full", 1),
    }[kind]()
    _, _, batch = stacked([arm_of(kind, 0, adapter=adapter, examples=examples_of(1, 4))], 1, 4)
    batch = jax.tree.map(lambda x: x[0], batch)
    return adapter, lambda adapter: step(CONFIG, params_of(CONFIG), adapter, batch, program=Program(per="tokens"))


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns(name, kind):
    adapter, gradient = problem(kind)
    transform = Optimizer(name, momentum=0.8 if name == "sgd" else 0.0).transform()
    state, losses = transform.init(adapter.trainable), []

    @jax.jit
    def update(grads, state, trainable):
        updates, state = transform.update(grads, state, trainable)
        return jax.tree.map(lambda p, u: p - RATE[name] * u, trainable, updates), state

    for _ in range(STEPS):
        loss, grads = gradient(adapter)
        losses.append(float(loss))
        trainable, state = update(grads, state, adapter.trainable)
        adapter = adapter.with_trainable(trainable)
    assert np.all(np.isfinite(losses)) and losses[-1] < 0.85 * losses[0]


def matrices(seed: int, n: int, inputs: int, outputs: int) -> dict:
    a = np.random.default_rng(seed).standard_normal((n, inputs, outputs)).astype(np.float32)
    return {"q": {"kernel": jnp.asarray(a * np.arange(1, n + 1)[:, None, None] ** 3)}}


def test_muon_makes_each_layers_matrix_orthogonal():
    """Its Newton-Schulz coefficients leave singular values between 0.6 and 1.3; layers know nothing of each other."""
    transform = Optimizer("muon", clip=0.0).transform()
    for inputs, outputs in ((8, 5), (5, 8)):
        gradients = matrices(0, 3, inputs, outputs)
        whole = transform.update(gradients, transform.init(gradients), gradients)[0]["q"]["kernel"]
        values = np.linalg.svd(np.asarray(whole), compute_uv=False)
        assert values.min() > 0.6 and values.max() < 1.3
        for i in range(3):
            one = jax.tree.map(lambda x, i=i: x[i : i + 1], gradients)
            alone = transform.update(one, transform.init(one), one)[0]["q"]["kernel"]
            np.testing.assert_allclose(alone[0], whole[i], atol=1e-5)


def test_muon_leaves_vectors_and_tables_to_adam():
    tree = matrices(0, 2, 4, 3) | {"norm": {"scale": jnp.ones((2, 4))}, "embed": {"weight": jnp.ones((7, 4))}}
    gradients = jax.tree.map(lambda x: 3 * x + 1, tree)
    muon, adam = (
        t.update(gradients, t.init(tree), tree)[0] for t in (Optimizer(n).transform() for n in ("muon", "adamw"))
    )
    for key in ("norm", "embed"):
        assert largest_difference(muon[key], adam[key]) == 0
    assert largest_difference(muon["q"], adam["q"]) > 0.1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rank_filled_up_with_zeros_is_updated_as_itself(name):
    """Arms of several ranks stand side by side: what one becomes must not hang on the rank of another."""
    transform, padded = (
        Optimizer(name, clip=0.0, momentum=0.9 if name == "sgd" else 0.0).transform(),
        lora(CONFIG, 0, projections=("up",)),
    )
    start = padded.trainable
    wide = padded.with_rank(5).trainable
    states, update = [transform.init(start), transform.init(wide)], jax.jit(transform.update)
    rng = np.random.default_rng(4)
    for turn in range(4):
        grads = jax.tree.map(lambda x, t=turn: jnp.asarray(10.0**t * rng.standard_normal(x.shape), x.dtype), start)
        filled = padded.with_trainable(grads).with_rank(5).trainable
        own, states[0] = update(grads, states[0], start)
        beside, states[1] = update(filled, states[1], wide)
        cut = padded.with_rank(5).with_trainable(beside).with_rank(2).trainable
        assert largest_difference(cut, own) < 1e-5 * 10.0**turn, f"step {turn}"


def test_adafactor_keeps_factors_of_large_second_moments():
    tree = {"kernel": jnp.zeros((2, 256, 128))}
    state = jax.eval_shape(Optimizer("adafactor").transform().init, tree)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 0.02 * tree["kernel"].size


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "restarts"])
def test_schedules_are_those_of_transformers(schedule):
    import torch
    import transformers

    steps, warmup, peak, restarts = 23, 4, 0.3, 3
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    theirs = {
        "linear": lambda: transformers.get_linear_schedule_with_warmup(optimizer, warmup, steps),
        "cosine": lambda: transformers.get_cosine_schedule_with_warmup(optimizer, warmup, steps),
        "constant": lambda: transformers.get_constant_schedule_with_warmup(optimizer, warmup),
        "restarts": lambda: transformers.get_cosine_with_hard_restarts_schedule_with_warmup(
            optimizer, warmup, steps, num_cycles=restarts
        ),
    }[schedule]()
    expected = []
    for _ in range(steps + 1):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    ours = [
        float(learning_rate(schedule, restarts, np.int32(t), np.float32(peak), warmup, np.int32(steps)))
        for t in range(steps + 1)
    ]
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    if schedule != "constant":
        assert ours[-1] == 0


def test_wrong_names_are_usage_errors():
    for options, said in (({"name": "adam"}, "adamw, adafactor, sgd, muon"), ({"schedule": "step"}, "linear, cosine")):
        with pytest.raises(UsageError, match=said):
            Optimizer(**options)


def test_weight_decay_is_adamws():
    params, grads = {"x": jnp.asarray([1.0, -2.0])}, {"x": jnp.asarray([0.3, 0.1])}
    ours, theirs = Optimizer(clip=0, weight_decay=0.1).transform(), optax.adamw(1.0, weight_decay=0.1)
    (update, _), (expected, _) = (way.update(grads, way.init(params), params) for way in (ours, theirs))
    np.testing.assert_allclose(update["x"], -expected["x"], rtol=1e-6)
