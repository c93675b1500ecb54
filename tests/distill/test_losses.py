"""Losses against torch in float64 on full logits, in value and gradient; and the layer as data."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from engine import CONFIG, arm_of, examples_of, lora, params_of, stacked, student

from jsublim.distill import losses
from jsublim.distill.batches import Shape
from jsublim.distill.losses import Loss, blockwise, divergence
from jsublim.distill.step import Program, loss_and_gradient
from jsublim.errors import UsageError
from jsublim.inference.scoring import top_k_log_probs
from jsublim.models import decoder
from jsublim.models.decoder import hidden_below, hidden_states
from jsublim.models.lora import init_full, init_lora, init_steering, stack_adapters

PARAMS = params_of(CONFIG)
SHAPE = Shape(1, 1, 16, 16)
FEW = ("q", "down")
V = CONFIG.vocab_size


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of the fewest positions (8): every loss below is summed over several."""
    monkeypatch.setattr(losses, "LOGIT_BYTES", 1)


# --- Every loss against torch -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss, who the teacher is ("adapter", "prompt", "steering", "stored"), and the flavour of the mean."""

    loss: Loss
    teacher: str = "prompt"
    per: str = "tokens"
    k: int = 4


CASES = {
    "hard": Case(Loss("hard")),
    "hard, KL to the base": Case(Loss("hard", terms=("kl_to_base",)), per="micro-batch"),
    "forward, adapter": Case(Loss("forward-kl", 2.0), "adapter", "micro-batch"),
    "reverse, steering": Case(Loss("reverse-kl", 0.7, terms=("kl_to_base",)), "steering"),
    "js, prompt": Case(Loss("js", 1.5)),
    "forward, stored": Case(Loss("forward-kl", 2.0), "stored", "micro-batch"),
    "js, stored, all but one": Case(Loss("js"), "stored", k=V - 1),
}


def torch_divergence(kind, logp, logq):
    kl = lambda log_of, other: torch.sum(torch.exp(log_of) * (log_of - other), dim=-1)  # noqa: E731
    if kind == "forward-kl":
        return kl(logp, logq)
    if kind == "reverse-kl":
        return kl(logq, logp)
    logm = torch.log((torch.exp(logp) + torch.exp(logq)) / 2)
    return (kl(logp, logm) + kl(logq, logm)) / 2


def torch_loss(case, arm, student_z, teacher_z, base_z):
    """Loss of an arm's step from full logits `[M, B, C, V]`, rows in order; float64."""
    loss = case.loss
    each = torch.zeros(student_z.shape[:3], dtype=torch.float64)
    weights = torch.zeros_like(each)
    M, B = each.shape[:2]
    for slot, e in enumerate(arm.examples):
        m, b, n = slot // B, slot % B, len(e.labels)
        z = student_z[m, b, :n]
        weights[m, b, :n] = torch.tensor(e.weights.astype(np.float64))
        if loss.kind == "hard":
            value = torch.nn.functional.cross_entropy(z, torch.tensor(e.labels.astype(np.int64)), reduction="none")
        elif e.ids is not None:
            q = torch.softmax(z / loss.temperature, dim=-1)
            best = torch.gather(q, 1, torch.tensor(e.ids.astype(np.int64)))
            rest = torch.ones_like(q).scatter(1, torch.tensor(e.ids.astype(np.int64)), 0.0)
            logq = torch.log(torch.cat([best, (q * rest).sum(dim=1, keepdim=True)], dim=1))
            value = torch_divergence(loss.kind, torch.tensor(e.logp.astype(np.float64)), logq)
        else:
            logp = torch.log_softmax(teacher_z[m, b, :n] / loss.temperature, dim=-1)
            value = torch_divergence(loss.kind, logp, torch.log_softmax(z / loss.temperature, dim=-1))
        if loss.terms:
            kl_to_base = torch_divergence(
                "reverse-kl", torch.log_softmax(base_z[m, b, :n], -1), torch.log_softmax(z, dim=-1)
            )
            value = value + arm.terms["kl_to_base"][0] * kl_to_base
        each[m, b, :n] = value
    if case.per == "tokens":
        return arm.weight * (weights * each).sum() / weights.sum()
    means = [(weights[m] * each[m]).sum() / weights[m].sum() for m in range(M) if weights[m].sum() > 0]
    return arm.weight * sum(means) / len(means)


@jax.jit
def full_logits(params, trainable, adapter, tokens, valid, where):
    """Float32 `[M, B, C, V]`: the logits of every position exist here, before some are picked."""
    used = adapter.with_trainable(trainable)

    def row_block(tokens, valid, where):
        h, _ = hidden_states(CONFIG, params, tokens, valid, adapter=used)
        z = decoder.logits(CONFIG, params, h)
        return jnp.take_along_axis(z, where[..., None], axis=1)

    return jax.vmap(row_block)(tokens, valid, where)


@jax.jit
def pull_back(params, trainable, adapter, tokens, valid, where, cotangent):
    return jax.vjp(lambda t: full_logits(params, t, adapter, tokens, valid, where), trainable)[1](cotangent)[0]


@pytest.mark.parametrize("name", CASES)
def test_a_loss_and_its_gradient_equal_torch(name, assert_close):
    case, M, B = CASES[name], 3, 2
    soft = None if not case.loss.soft else "stored" if case.teacher == "stored" else "live"
    arms = [
        arm_of(
            "lora",
            seed,
            adapter=lora(CONFIG, seed, projections=FEW),
            examples=examples_of(10 + seed, 5, soft=soft, k=case.k),
        )
        for seed in (0, 1)
    ]
    teachers = {
        "adapter": [lora(CONFIG, 7 + i, rank=3, layers=(0, 2), projections=FEW) for i in range(2)],
        "steering": [student(CONFIG, "steering", 8 + i) for i in range(2)],
    }.get(case.teacher)
    adapter, numbers, batch = stacked(arms, M, B)
    orders = [arm.rows(dataclasses.replace(SHAPE, accumulate=M, batch_size=B), 0) for arm in arms]
    assert all(sorted(order)[1:] == list(range(5)) for order in orders)  # one slot of six stays empty
    one = functools.partial(loss_and_gradient, CONFIG, program=Program(case.loss, per=case.per), arms=2)
    own = {"weight": numbers.weight, "coefficients": numbers.coefficients(np.int32(0))}
    own["teacher"] = teachers and stack_adapters(teachers)
    values, gradients = jax.jit(jax.vmap(functools.partial(one, PARAMS)))(adapter, batch, **own)
    for i, (arm, order) in enumerate(zip(arms, orders, strict=True)):
        own = {key: value[i] for key, value in batch.items()}
        read = own["tokens"], own["valid"], own["where"]
        z = torch.tensor(
            np.asarray(full_logits(PARAMS, arm.adapter.trainable, arm.adapter, *read)), dtype=torch.float64
        )
        silent = jax.tree.map(np.zeros_like, arm.adapter)
        base = torch.tensor(np.asarray(full_logits(PARAMS, silent.trainable, silent, *read)), dtype=torch.float64)
        theirs = None
        if soft == "live":
            teacher = teachers[i] if teachers else silent
            read_by_it = own["teacher_tokens"], own["teacher_valid"], own["teacher_where"]
            theirs = torch.tensor(
                np.asarray(full_logits(PARAMS, teacher.trainable, teacher, *read_by_it)), dtype=torch.float64
            )
        z.requires_grad_()
        in_order = dataclasses.replace(arm, examples=[arm.examples[j] for j in order if j >= 0])
        expected = torch_loss(case, in_order, z, theirs, base)
        (of_z,) = torch.autograd.grad(expected, z)
        assert float(values[i]) == pytest.approx(expected.item(), rel=1e-4)
        of_lora = pull_back(PARAMS, arm.adapter.trainable, arm.adapter, *read, of_z.numpy().astype(np.float32))
        ours = jax.tree.map(lambda leaf, i=i: leaf[i], gradients)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(of_lora), strict=True):
            assert np.abs(b).max() > 1e-5
            assert_close(a, b, 1e-4)


# --- The parts of a loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", losses.SOFT)
@pytest.mark.parametrize("extreme", [False, True], ids=["usual", "extreme"])
def test_a_divergence_is_torchs_and_never_below_zero(kind, extreme, assert_close):
    z = np.random.default_rng(1).standard_normal((2, 9, V)) * (60 if extreme else 2)
    logp, logq = jax.nn.log_softmax(jnp.asarray(z, jnp.float32))
    ours = np.asarray(divergence(kind, logp, logq))
    theirs = torch_divergence(kind, *torch.log_softmax(torch.tensor(z), dim=-1)).numpy()
    assert np.all(ours > 0) and (kind != "js" or np.all(ours <= np.log(2) + 1e-6))
    assert_close(ours, theirs, 1e-4)
    assert np.abs(divergence(kind, logp, logp)).max() < 1e-6
    of_q = jax.grad(lambda z: divergence(kind, logp, jax.nn.log_softmax(z)).sum())(jnp.asarray(z[1], jnp.float32))
    assert np.all(np.isfinite(of_q))


def test_the_lumped_tail_holds_all_others():
    z = jnp.asarray(np.random.default_rng(2).standard_normal((5, V)), jnp.float32)
    for k in (1, 7, V - 1):
        ids = jax.lax.top_k(z, k)[1]
        logp = np.asarray(top_k_log_probs(z, ids))
        whole = np.asarray(jax.nn.softmax(z))
        np.testing.assert_allclose(np.exp(logp).sum(-1), 1, rtol=1e-5)
        np.testing.assert_allclose(np.exp(logp[:, -1]), 1 - np.take_along_axis(whole, ids, 1).sum(-1), atol=1e-6)


@pytest.mark.parametrize("per", ["tokens", "micro-batch", "micro-batch-sum"])
def test_a_micro_batch_without_a_supervised_token_counts_in_no_mean(per):
    weights = np.random.default_rng(0).uniform(0.5, 2, (3, 2, 4)).astype(np.float32)
    weights[1] = 0  # an epoch's last batch may leave a micro-batch empty
    ours = np.asarray(losses.normalise(jnp.asarray(weights), per))
    sums = weights.sum(axis=(1, 2), keepdims=True)[[0, 2]]
    total = {"tokens": sums.sum(), "micro-batch": 2 * sums, "micro-batch-sum": sums}[per]
    np.testing.assert_allclose(ours[[0, 2]], weights[[0, 2]] / total, rtol=1e-6)
    assert not ours[1].any()


def test_wrong_losses_are_usage_errors():
    for options, said in (({"kind": "kl"}, "forward-kl"), ({"kind": "js", "temperature": 0}, "temperature: 0")):
        with pytest.raises(UsageError, match=said):
            Loss(**options)
    with pytest.raises(UsageError, match="hard loss has none"):
        Loss("hard", temperature=2.0)


@pytest.mark.parametrize("positions", [37, 64])
def test_blocks_of_any_size_are_one_block(positions, assert_close):
    """Under vmap and jit, in the hidden states and in a trained head."""
    rng = np.random.default_rng(3)
    h = rng.standard_normal((2, positions, 6)).astype(np.float32)
    head = rng.standard_normal((2, 11, 6)).astype(np.float32)
    fixed = jnp.asarray(rng.standard_normal(11), jnp.float32)
    at = {"labels": rng.integers(0, 11, (2, positions)), "weights": rng.random((2, positions)).astype(np.float32)}

    def of(head, fixed, h, at):
        z = jnp.tanh(h @ head.T) + fixed
        return jnp.sum(at["weights"] * jnp.take_along_axis(jax.nn.log_softmax(z), at["labels"][:, None], 1)[:, 0])

    def gradients(loss):
        whole = lambda head, h: jnp.vdot(loss(head, h, at["labels"], at["weights"]), jnp.asarray([2.0, -0.3]))  # noqa: E731
        return jax.jit(jax.value_and_grad(whole, argnums=(0, 1)))(head, h)

    def plain(head, h, labels, weights):
        return jax.vmap(lambda *x: of(x[0], fixed, x[1], {"labels": x[2], "weights": x[3]}))(head, h, labels, weights)

    expected = gradients(plain)
    for size in (1, 5, positions - 1, positions, 1000):

        def blocks(head, h, labels, weights, size=size):
            one = lambda *x: blockwise(of, size, x[0], fixed, x[1], {"labels": x[2], "weights": x[3]})  # noqa: E731
            return jax.vmap(one)(head, h, labels, weights)

        for ours, theirs in zip(jax.tree.leaves(gradients(blocks)), jax.tree.leaves(expected), strict=True):
            assert_close(ours, theirs, 1e-5)


# --- One layer -----------------------------------------------------------------------------------------------------------


def everywhere(kind: str, adapter, layer: int):
    """The same student as one of all layers: silent in all others."""
    start = {
        "lora": lambda: init_lora(CONFIG, jax.random.key(0), rank=2, alpha=4.0),
        "full": lambda: init_full(CONFIG, PARAMS),
        "steering": lambda: init_steering(CONFIG),
    }[kind]()
    put = lambda whole, own: jnp.asarray(whole).at[layer].set(own[0])  # noqa: E731
    return start.with_trainable(jax.tree.map(put, start.trainable, adapter.trainable))


@pytest.mark.parametrize("kind", ["lora", "full", "steering"])
def test_a_layer_alone_has_its_part_of_the_gradient_of_all(kind, assert_close):
    """Also where what lies below it is known already."""
    arms = [arm_of(kind, 1, adapter=student(CONFIG, kind, 3, layer=k)) for k in range(3)]
    step = jax.jit(loss_and_gradient, static_argnames=("config", "program"))
    below = jax.jit(hidden_below, static_argnames="config")
    for k, arm in enumerate(arms):
        _, _, batch = stacked([arm], 1, 3)
        batch = jax.tree.map(lambda x: x[0], batch)
        run = functools.partial(step, CONFIG, PARAMS, program=Program())
        value, gradient = run(everywhere(kind, arm.adapter, k), batch)
        expected = jax.tree.map(lambda leaf, k=k: leaf[k : k + 1], gradient)
        h = below(CONFIG, PARAMS, batch["tokens"][0], batch["valid"][0], np.int32(k))[None]
        for given in (batch, batch | {"below": h}):
            ours, of_own = run(arm.adapter, given)
            assert float(ours) == pytest.approx(float(value), rel=1e-5)
            for a, b in zip(jax.tree.leaves(of_own), jax.tree.leaves(expected), strict=True):
                assert_close(a, b, 1e-4)
