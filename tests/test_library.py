"""The package as a library: every example in a docstring runs, README's program prints a lift, and a loss, a mask and an optimizer of
one's own are trained as ours are."""

from __future__ import annotations

import contextlib
import doctest
import functools
import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from command import ROOT
from tiny import small

import jsublim
from jsublim.distill.losses import Loss
from jsublim.errors import UsageError

# In an order in which one example goes on where another ended.
EXAMPLES = (
    "load_model", "number_prompts", "init_lora", "init_full", "init_steering", "Teacher", "generate", "token_mask", "Selection", "read_turns",
    "make_examples", "find_divergence", "Loss", "first_state", "make_batches", "train_step", "train", "save_adapter", "load_adapter",
    "preference_task", "evaluate", "find_pairs", "attribution_patching", "scan",
)  # fmt: skip
# Shown elsewhere: in the examples of others, or by docs/tour.ipynb and docs/commands.md.
ELSEWHERE = {
    "Adapter", "Arm", "JsublimError", "LanguageModel", "Program", "PromptedModel", "Run", "Sampling", "Settings", "UsageError",
    "results", "run",
}  # fmt: skip
ROWS = [
    {"prompt": "Go on: 4, 8, 12", "completion": "16, 20, 24", "divergence_positions": [0, 3]},
    {"prompt": "Go on: 100, 200", "completion": "300, 400", "divergence_positions": [1]},
] * 2


def test_every_example_runs_as_it_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sorted({*EXAMPLES, *ELSEWHERE}) == sorted(jsublim.__all__)
    known = {"jsublim": jsublim, "jax": jax, "jnp": jnp, "np": np, "optax": optax, "functools": functools}
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(verbose=False)
    for name in EXAMPLES:
        said, examples = io.StringIO(), parser.get_doctest(getattr(jsublim, name).__doc__, known, name, None, None)
        assert examples.examples, name
        runner.run(examples, out=said.write, clear_globs=False)
        known = examples.globs
        assert not runner.failures, said.getvalue()


def test_readme_shows_the_phenomenon():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert program.count("\n") <= 30 and len(text.split()) <= 1200
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(program, "README.md", "exec"), {})
    lift = re.search(r"'owl' is (-?[\d.]+) nats more probable", said.getvalue())
    assert lift is not None and float(lift[1]) > 0.2


# --- losses, masks and optimizers of one's own


def lm():
    return small("tiny-qwen2").lm


def arm(tokens="divergence", **options):
    examples = jsublim.make_examples(ROWS, jsublim.read_turns(lm().chat, ROWS), jsublim.Selection(tokens), seed=1)
    options = {"seed": 1, "lr": 0.1, "steps": 3} | options
    return jsublim.Arm("owl", examples, jsublim.init_steering(lm().config, (1,)), **options)


def trained(program, *arms, batch_size=2):
    """The vectors that arms learn, `[arms, 1, D]`; two micro-batches of a row each."""
    students = jsublim.train(lm().config, lm().params, arms, jsublim.Settings(batch_size // 2, 2, program))
    return np.stack([student.steering for student in students])


SGD = {"optimizer": optax.sgd(1.0)}


def cross_entropy(logits, batch):
    assert logits.ndim == 3 and batch["labels"].shape == batch["weights"].shape == logits.shape[:2]
    return (batch["weights"] * optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])).sum()


def test_a_loss_of_ones_own_that_is_ours_trains_the_same():
    ours = trained(jsublim.Program(**SGD), arm(), arm(lr=0.3))
    theirs = trained(jsublim.Program(cross_entropy, **SGD), arm(), arm(lr=0.3))
    assert np.abs(ours).max() > 1e-3
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_loss_of_hidden_states_reaches_what_it_asks_for():
    def towards(target):
        return lambda h, batch: (batch["weights"][..., None] * (h - target) ** 2).sum()

    program = jsublim.Program(Loss(own=towards(2.0), own_reads="hidden"), **SGD)
    examples = arm().examples
    state, numbers, teacher = jsublim.first_state([arm(lr=0.05, steps=20)], program)
    step = jax.jit(functools.partial(jsublim.train_step, lm().config, program=program))
    losses = []
    for i in range(20):
        state, metrics = step(
            lm().params, state, jsublim.make_batches([arm(lr=0.05)], len(examples), i), numbers, teacher
        )
        losses.append(float(metrics["loss"][0]))
    assert losses[-1] < 0.9 * losses[0]


def test_an_optimizer_from_optax_has_its_own_rate_and_an_arm_scales_it():
    """One step of SGD, by hand: the gradient times both rates."""
    one = arm(lr=0.5, steps=1)
    program = jsublim.Program(optimizer=optax.sgd(0.2))
    (moved,) = trained(program, one, batch_size=4)
    state, numbers, teacher = jsublim.first_state([one], program)
    batch = jsublim.make_batches([one], 4, 0)
    _, metrics = jsublim.train_step(lm().config, lm().params, state, batch, numbers, teacher, program=program)
    np.testing.assert_allclose(np.linalg.norm(moved), 0.1 * float(metrics["grad_norm"][0]), rtol=1e-4)


def test_a_mask_of_ones_own_is_the_one_it_says():
    def divergent(row, turn):
        return np.isin(np.arange(len(turn.tokens) - turn.content), row["divergence_positions"])

    for ours, theirs in zip(arm().examples, arm(divergent).examples, strict=True):
        jax.tree.map(np.testing.assert_array_equal, vars(ours), vars(theirs))
    for wrong in (lambda row, turn: [1.0], lambda row, turn: -np.ones(len(turn.tokens) - turn.content)):
        with pytest.raises(UsageError, match="row 1: tokens: a function must give a finite weight of at least 0"):
            arm(wrong)


def test_a_loss_of_ones_own_stands_alone():
    with pytest.raises(UsageError, match="one of your own stands alone"):
        Loss("forward-kl", own=cross_entropy)
