"""What a step costs: operations, arrays, state, compilations; and the formulas that metrics are held against."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine import CONFIG, STUDENTS, examples_of, largest_difference, lora, params_of, student
from products import every_equation, flops

from jsublim.distill import losses
from jsublim.distill.arm import Arm, Settings
from jsublim.distill.batches import Shape, collate
from jsublim.distill.cost import training_flops
from jsublim.distill.losses import Loss
from jsublim.distill.memory import example_like
from jsublim.distill.optimizer import Optimizer
from jsublim.distill.step import Arms, Program, init_state, train_step
from jsublim.distill.trainer import train
from jsublim.models.config import Local, layer_parameters, projection_shapes
from jsublim.models.decoder import abstract_params
from jsublim.models.lora import init_full, init_lora, init_steering, stack_adapters

# Wide, so that projections are nearly everything, and with a prime for a vocabulary, to recognise it in a shape.
# Shapes only: nothing of this size exists.
WIDE = dataclasses.replace(
    CONFIG, hidden_size=1024, intermediate_size=3072, num_layers=12, num_heads=8, num_kv_heads=8, head_dim=128,
    vocab_size=16381, local=Local(),
)  # fmt: skip
D, V, L = WIDE.hidden_size, WIDE.vocab_size, WIDE.num_layers
MAKE = {
    "lora": lambda layers: init_lora(WIDE, jax.random.key(0), rank=2, alpha=2, layers=layers),
    "full": lambda layers: init_full(WIDE, jax.tree.map(lambda x: jnp.zeros(x.shape), abstract_params(WIDE)), layers),
    "steering": lambda layers: init_steering(WIDE, layers),
}


@functools.cache
def traced(kind, layers, *, loss=None, tokens=32, labels=16, teacher=0, cached=False, arms=1, rows=2, micro=2):
    """The whole step of arms of WIDE as a closed jaxpr, and its adapter."""
    loss = loss or Loss()
    adapter = jax.eval_shape(lambda: MAKE[kind](layers))
    program = Program(loss, Optimizer("sgd"))
    state = jax.eval_shape(lambda a: init_state(stack_adapters([a] * arms), program.optimizer), adapter)
    shape = Shape.fit(micro, rows, tokens, labels, teacher)
    batch = collate([example_like(shape, soft=bool(teacher))], np.full(micro * rows, -1), shape)
    if cached:
        batch["below"] = jax.ShapeDtypeStruct((micro, rows, tokens, D), jnp.float32)
    batch = {k: jax.ShapeDtypeStruct((arms, *v.shape), v.dtype) for k, v in batch.items()}
    column = lambda kind: jax.ShapeDtypeStruct((arms,), kind)  # noqa: E731
    terms = {name: jax.ShapeDtypeStruct((arms, 2), "float32") for name in loss.terms}
    numbers = Arms(column("float32"), column("int32"), column("float32"), terms)
    arguments = (abstract_params(WIDE), state, batch, numbers, None)
    return jax.make_jaxpr(functools.partial(train_step, WIDE, program=program))(*arguments), adapter


def counted(kind, layers, **options):
    jaxpr, adapter = traced(kind, layers, **options)
    return flops(jaxpr), adapter


# --- Operations -------------------------------------------------------------------------------------------------------

ALL, MIDDLE = None, (5,)
COSTS = {
    "lora, all layers": ("lora", ALL, {}),
    "lora, layers 3 and 9": ("lora", (3, 9), {}),
    "lora, layer 0": ("lora", (0,), {}),
    "lora, layer 5": ("lora", MIDDLE, {}),
    "lora, layer 11": ("lora", (11,), {}),
    "lora, layer 5, cached": ("lora", MIDDLE, {"cached": True}),
    "full, all layers": ("full", ALL, {}),
    "full, layer 5": ("full", MIDDLE, {}),
    "steering, layer 5, cached": ("steering", MIDDLE, {"cached": True}),
    "steering, layer 11": ("steering", (11,), {}),
    "few positions": ("lora", ALL, {"tokens": 96, "labels": 16}),
    "soft, live": ("lora", ALL, {"loss": Loss("forward-kl"), "teacher": 48}),
    "soft, live, to the base": ("lora", MIDDLE, {"loss": Loss("js", terms=("kl_to_base",)), "teacher": 32}),
}


@pytest.mark.parametrize("name", COSTS)
def test_a_step_costs_what_it_should(name):
    kind, layers, options = COSTS[name]
    ours, adapter = counted(kind, layers, **options)
    rows, tokens, labels = 4, options.get("tokens", 32), options.get("labels", 16)
    expected = training_flops(
        WIDE, adapter, options.get("loss", Loss()), tokens=rows * tokens, supervised=rows * labels,
        teacher_tokens=rows * options.get("teacher", 0), cached=options.get("cached", False),
    )  # fmt: skip
    assert ours == pytest.approx(expected, rel=0.1)


def test_a_layer_below_the_one_trained_costs_a_turn_of_a_loop_forwards():
    costs = [counted("steering", (k,))[0] for k in (0, 5, 11)]
    steps = np.diff(costs) / np.diff([0, 5, 11])
    layer = 2 * 4 * 32 * layer_parameters(WIDE)  # one forward pass of 4 rows of 32 tokens
    # A layer more below the trained one is one layer less to go back through, with attention's share.
    assert np.all(-steps > layer) and np.all(-steps < 1.05 * layer)


def test_the_head_costs_a_product_each_way_at_supervised_positions_only():
    few, many = counted("lora", ALL, labels=16)[0], counted("lora", ALL, labels=32)[0]
    assert many - few == 4 * 16 * 2 * (2 * D * V)


def test_arms_cost_their_number():
    for layers in (ALL, MIDDLE):
        assert counted("lora", layers, arms=3)[0] == pytest.approx(3 * counted("lora", layers)[0], rel=1e-3)


def test_the_formulas_of_a_step():
    """Tokens x (4 N + 6 R) + supervised x 4 H, and the like; N is a model's weights, l a layer's, H the head's."""
    shapes = projection_shapes(WIDE)
    each, H = sum(i * o for i, o in shapes.values()), D * V
    assert layer_parameters(WIDE) == each == 4 * D * D + 3 * D * WIDE.intermediate_size
    N, R = L * each, 2 * L * sum(i + o for i, o in shapes.values())
    cost = functools.partial(training_flops, WIDE, tokens=100, supervised=7)
    made = {(k, layers): jax.eval_shape(lambda k=k, x=layers: MAKE[k](x)) for k in MAKE for layers in (ALL, MIDDLE)}
    assert cost(made["lora", ALL], Loss()) == 100 * (4 * N + 6 * R) + 7 * 4 * H
    assert cost(made["full", ALL], Loss()) == 100 * 6 * N + 7 * 4 * H
    assert cost(made["steering", MIDDLE], Loss()) == 100 * 2 * each * (L + L - 1 - 5) + 7 * 4 * H
    assert cost(made["steering", MIDDLE], Loss(), cached=True) == 100 * 2 * each * (L - 5 + L - 1 - 5) + 7 * 4 * H
    lora_all = made["lora", ALL]
    soft = cost(lora_all, Loss("js"), teacher_tokens=150)
    assert soft == cost(lora_all, Loss()) + 150 * 2 * N + 7 * 2 * H
    assert cost(lora_all, Loss("js"), stored=True) == cost(lora_all, Loss())
    assert cost(lora_all, Loss(terms=("kl_to_base",))) == cost(lora_all, Loss()) + 100 * 2 * N + 7 * 2 * H


# --- Memory -----------------------------------------------------------------------------------------------------------


def shapes_of(jaxpr, primitives=None) -> set[tuple[int, ...]]:
    return {
        tuple(out.aval.shape)
        for eqn in every_equation(jaxpr.jaxpr)
        if primitives is None or eqn.primitive.name in primitives
        for out in eqn.outvars
        if hasattr(out.aval, "shape")
    }


@pytest.mark.parametrize("loss", ["hard", "js"])
def test_no_logits_of_all_positions(loss, monkeypatch):
    """The table is [V, D]; everything else that has a V in its shape is a block of positions."""
    teacher, positions = 0 if loss == "hard" else 32, 2 * 2 * 16
    options = {"loss": Loss(loss), "teacher": teacher, "arms": 2}

    def most_rows() -> int:
        shapes = shapes_of(traced.__wrapped__("lora", MIDDLE, **options)[0])
        return max(int(np.prod(shape)) // V for shape in shapes if V in shape and shape[-2:] != (V, D))

    assert most_rows() == positions  # of a micro-batch of two arms, where they are few
    tables = 1 if loss == "hard" else 2
    monkeypatch.setattr(losses, "LOGIT_BYTES", 4 * V * 2 * tables * 8)
    assert most_rows() == 2 * 8


def kernel_products(jaxpr) -> set[tuple[int, ...]]:
    """Shapes of a frozen kernel, or of a stack of them, that some operation other than a look-up puts out."""
    kernels = {tuple(sorted(shape)) for shape in projection_shapes(WIDE).values()} | {(D, V)}
    looks = {"dynamic_slice", "gather", "squeeze", "slice", "reshape", "broadcast_in_dim", "jit", "pjit", "checkpoint"}
    looks |= {"scan", "while", "cond", "remat2", "custom_vjp_call", "custom_jvp_call", "stop_gradient", "select_n"}
    names = {eqn.primitive.name for eqn in every_equation(jaxpr.jaxpr)} - looks
    found = {shape for shape in shapes_of(jaxpr, names) if tuple(sorted(shape[-2:])) in kernels}
    stacks = {shape for shape in shapes_of(jaxpr, {"scan", "while", "cond"}) if shape[-3:-2] in ((L,), (L - 1,))}
    return found | {shape for shape in stacks if tuple(sorted(shape[-2:])) in kernels}


@pytest.mark.parametrize("layers", [ALL, MIDDLE], ids=["all layers", "one layer"])
@pytest.mark.parametrize("kind", MAKE)
def test_a_frozen_kernel_has_no_gradient(kind, layers):
    found = kernel_products(traced(kind, layers)[0])
    assert bool(found) == (kind == "full"), found


@pytest.mark.parametrize("kind", STUDENTS)
def test_frozen_weights_have_no_optimizer_state(kind):
    adapter = student(CONFIG, kind, 0)
    trained = sum(leaf.size for leaf in jax.tree.leaves(adapter.trainable))
    sizes = {"adamw": 2 * trained, "sgd": 0}
    for name, size in sizes.items():
        state = jax.tree.leaves(init_state(stack_adapters([adapter] * 2), Optimizer(name)).optimizer)
        counts = [leaf for leaf in state if leaf.dtype.kind == "i"]
        assert sum(leaf.size for leaf in state if leaf.dtype.kind == "f") == 2 * size
        assert all(leaf.shape == (2,) for leaf in counts)


# --- Compilations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True], ids=["", "cached"])
def test_one_program_serves_every_mask_seed_rate_and_alpha_of_a_layer(cached, tmp_path, compiles, traced_once):
    """... and what it trains is each time something else."""
    settings = Settings(batch_size=2, accumulate=2, program=Program(warmup=0), cache_below=cached)

    def trained(name: str, seed: int, rows: int, alpha: float, rate: float, steps: int) -> jax.Array:
        start = lora(CONFIG, seed, layers=(1,), alpha=alpha, projections=("q", "down"))
        arm = Arm("a", examples_of(seed, rows), start, seed, rate, steps)
        (student,) = train(CONFIG, params_of(CONFIG), [arm], settings, tmp_path / name)
        assert student.layers == (1,)
        return student.lora["q"]["a"]

    before = compiles()
    trained("first", 5, 5, 2.0, 1e-2, 1)
    warm = compiles()
    students = [trained(f"{i}", i, 5 + i % 2, 2.0 + i, 1e-2 * (1 + i), 1 + i % 2) for i in range(4)]
    assert warm > before and compiles() == warm
    assert all(largest_difference(a, b) > 1e-6 for i, a in enumerate(students) for b in students[:i])
