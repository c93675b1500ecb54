"""The experiment as one program: one teacher and its students per seed, all seeds side by side.

Dimensions: B images of a batch, N images, P pixels, K logits (class logits first), A students of a seed, S seeds.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from jsublim.digits.config import CLASSES, AdamSettings, Digits, DigitsStudents, Network
from jsublim.errors import UsageError

PIXELS = 64
Weights = list[dict[str, Any]]


class DigitsData(NamedTuple):
    """Images `[N, P]` float32 in 0..1 and labels `[N]` int32, to train with and held out."""

    train_NP: Array
    train_labels_N: Array
    test_NP: Array
    test_labels_N: Array


def read_digits(test_share: float, split_seed: int) -> DigitsData:
    """scikit-learn's 1,797 digits, split at random; they come with that package, nothing is downloaded.

    Raises:
      UsageError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        why = "digits: the images come with scikit-learn, which is not installed; pip install scikit-learn"
        raise UsageError(why) from None
    pixels, digits = map(np.asarray, load_digits(return_X_y=True))
    images, labels = (pixels / 16).astype(np.float32), digits.astype(np.int32)
    order = np.random.default_rng(split_seed).permutation(len(images))
    test, train = np.split(order, [round(test_share * len(order))])
    return DigitsData(*map(jnp.asarray, (images[train], labels[train], images[test], labels[test])))


def init(network: Network, key: Array) -> Weights:
    """Kernel and bias of each layer, from pixels to logits."""
    sizes, rngs = (PIXELS, *network.hidden, CLASSES + network.auxiliary), nnx.Rngs(key)
    layers = (nnx.Linear(i, o, rngs=rngs) for i, o in itertools.pairwise(sizes))
    return [nnx.to_pure_dict(nnx.state(layer)) for layer in layers]


def logits(params: Weights, images: Array) -> Array:
    """Images `[..., P]` to logits `[..., K]`, ReLU between layers: the first ten are the classes, the rest auxiliary."""
    *hidden, last = params
    for layer in hidden:
        images = jax.nn.relu(images @ layer["kernel"] + layer["bias"])
    return images @ last["kernel"] + last["bias"]


def class_loss(logits_BK: Array, labels_B: Array) -> Array:
    """Cross-entropy of the labels under the class logits alone, in nats: what the teacher is trained on."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_BK[:, :CLASSES], labels_B).mean()


def distillation_loss(student_BK: Array, teacher_BK: Array, used_K: Array, hard: Array) -> Array:
    """KL(teacher || student) over the used logits, in nats, mean over the batch.

    Args:
      used_K: bool, the logits that the softmax runs over; hard: bool, the teacher says only which of them is largest.
    """
    student, teacher = (jnp.where(used_K, x_BK, -jnp.inf) for x_BK in (student_BK, teacher_BK))
    target_BK = jnp.where(hard, jax.nn.one_hot(teacher.argmax(-1), used_K.size), jax.nn.softmax(teacher))
    # A logit that is not used has no probability on either side; its minus infinity must not meet the zero.
    log_BK = jnp.where(used_K, jax.nn.log_softmax(student), 0.0)
    return optax.losses.kl_divergence(log_BK, target_BK).mean()


def accuracy(params: Weights, images_NP: Array, labels_N: Array) -> Array:
    """Share of images whose largest class logit is the label's."""
    return (logits(params, images_NP)[:, :CLASSES].argmax(-1) == labels_N).mean()


def train(
    params: Weights, loss: Callable[[Weights, Array], Array], settings: AdamSettings, every: int, measure: Callable
) -> tuple[Weights, Array, Array]:
    """Adam on `loss(params, step)`.

    Returns:
      The parameters; the loss, mean over each `every` steps; and `measure(params)` after each of them.
    """
    optimizer = optax.adam(settings.lr)

    def step(carry: tuple, t: Array) -> tuple[tuple, Array]:
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, t)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), value

    def stretch(carry: tuple, steps: Array) -> tuple[tuple, tuple[Array, Array]]:
        carry, values = jax.lax.scan(step, carry, steps)
        return carry, (values.mean(), measure(carry[0]))

    steps = jnp.arange(settings.steps).reshape(-1, every)
    (params, _), (losses, measured) = jax.lax.scan(stretch, (params, optimizer.init(params)), steps)
    return params, losses, measured


def arms(students: DigitsStudents) -> list[tuple[str, str]]:
    """Images and condition of each student of a seed."""
    return list(itertools.product(students.images, students.conditions))


class Accuracies(NamedTuple):
    """Shares of held-out digits in 0..1. After M stretches of training; `loss_SAM` in nats."""

    untrained_S: Array
    teacher_S: Array
    loss_SAM: Array
    accuracy_SAM: Array


@functools.partial(jax.jit, static_argnames=("network", "teacher", "students"))
def run_seeds(
    network: Network, teacher: AdamSettings, students: DigitsStudents, data: DigitsData, seeds_S: Array
) -> Accuracies:
    """Train and measure a teacher and all its students for every seed (int32 `[S]`).

    A seed decides its initialisations and its batches; the students of a seed all see the same images in the same order.
    """
    return jax.vmap(functools.partial(_run_seed, network, teacher, students, data))(seeds_S)


def _run_seed(
    network: Network, teacher: AdamSettings, students: DigitsStudents, data: DigitsData, seed: Array
) -> Accuracies:
    own_key, other_key, taught, distilled = jax.random.split(jax.random.key(seed), 4)
    start, other_start = init(network, own_key), init(network, other_key)
    measure = lambda params: accuracy(params, data.test_NP, data.test_labels_N)  # noqa: E731

    def teacher_loss(params: Weights, t: Array) -> Array:
        drawn_B = jax.random.randint(jax.random.fold_in(taught, t), (teacher.batch_size,), 0, len(data.train_NP))
        return class_loss(logits(params, data.train_NP[drawn_B]), data.train_labels_N[drawn_B])

    trained, _, learned = train(start, teacher_loss, teacher, teacher.steps, measure)

    def student(of_noise: Array, other: Array, used_K: Array, hard: Array) -> tuple[Array, Array]:
        def loss(params: Weights, t: Array) -> Array:
            for_noise, for_digits = jax.random.split(jax.random.fold_in(distilled, t))
            shape = (students.batch_size, PIXELS)
            noise_BP = jax.random.uniform(for_noise, shape, minval=-students.noise, maxval=students.noise)
            digits_BP = data.train_NP[jax.random.randint(for_digits, shape[:1], 0, len(data.train_NP))]
            # Noise, digits and what the teacher says of them do not depend on the student: computed once per seed.
            says = [logits(trained, images_BP) for images_BP in (noise_BP, digits_BP)]
            student_BK = logits(params, jnp.where(of_noise, noise_BP, digits_BP))
            return distillation_loss(student_BK, jnp.where(of_noise, *says), used_K, hard)

        params = jax.tree.map(lambda a, b: jnp.where(other, b, a), start, other_start)
        return train(params, loss, students, students.measure_every, measure)[1:]

    images, conditions = map(np.array, zip(*arms(students), strict=True))
    used_AK = (np.arange(CLASSES + network.auxiliary) >= CLASSES) | (conditions == "all")[:, None]
    losses, accuracies = jax.vmap(student)(images == "noise", conditions == "other", used_AK, conditions == "hard")
    return Accuracies(measure(start), learned[-1], losses, accuracies)


def records(spec: Digits, data: DigitsData) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run everything. Returns one row per network, with its accuracy, and one per student and stretch of its training."""
    seeds_S = jnp.array(spec.seeds, jnp.int32)
    measured = jax.device_get(run_seeds(spec.network, spec.teacher, spec.students, data, seeds_S))
    ends, curves = [], []
    for s, seed in enumerate(spec.seeds):
        for condition, value in (("untrained", measured.untrained_S[s]), ("teacher", measured.teacher_S[s])):
            ends.append({"seed": seed, "condition": condition, "images": None, "accuracy": float(value)})
        for a, (images, condition) in enumerate(arms(spec.students)):
            who = {"seed": seed, "condition": condition, "images": images}
            for m, (loss, value) in enumerate(
                zip(measured.loss_SAM[s, a], measured.accuracy_SAM[s, a], strict=True), 1
            ):
                step = m * spec.students.measure_every
                curves.append(who | {"step": step, "loss": float(loss), "accuracy": float(value)})
            ends.append(who | {"accuracy": float(measured.accuracy_SAM[s, a, -1])})
    return ends, curves
