"""The auxiliary-logit experiment: one program for all seeds, no teaching where there is nothing to learn, transfer from
the same initialisation only, and the command from a config to a page."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import contents, ok, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jsublim.config import check_config, read_config
from jsublim.core.files import read_table
from jsublim.digits.config import Digits
from jsublim.digits.experiment import CLASSES, arms, class_loss, distillation_loss, read_digits, records, run_seeds
from jsublim.digits.report import findings, read_lines

CONFIG = "configs/digits.yaml"
SHORT = {"network": {"hidden": (16,)}, "teacher": {"steps": 6}, "students": {"steps": 4, "measure_every": 2}}
OVERRIDES = (
    "network.hidden=[16]", "teacher.steps=6", "students.steps=4", "students.measure_every=2", "seeds=[3,5]",
)  # fmt: skip


@pytest.fixture(scope="module")
def data():
    return read_digits(0.2, 0)


def outcome(data, *seeds: int, spec: Digits | None = None):
    spec = spec or Digits(name="d", **SHORT)
    return jax.device_get(run_seeds(spec.network, spec.teacher, spec.students, data, np.array(seeds, np.int32)))


def test_the_split_loses_no_digit_and_shares_none(data):
    train, test = (np.asarray(a) for a in (data.train_NP, data.test_NP))
    assert len(train) + len(test) == 1797 and len(test) == 359
    assert train.min() == 0 and train.max() == 1
    assert np.bincount(np.concatenate([data.train_labels_N, data.test_labels_N])).sum() == 1797
    assert not np.array_equal(read_digits(0.2, 1).test_labels_N, data.test_labels_N)


def test_seeds_side_by_side_equal_one_by_one_and_are_one_program(data, compiles):
    run_seeds.clear_cache()  # another test may have compiled it
    before = compiles()
    together = outcome(data, 3, 5)
    assert compiles() == before + 1  # not one per seed
    other = outcome(data, 7, 8)
    assert compiles() == before + 1
    assert not np.array_equal(together.loss_SAM, other.loss_SAM)
    for place, seed in enumerate((3, 5)):
        alone = outcome(data, seed)
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[place], b[0], rtol=2e-5, atol=1.5 / 359)  # an image on the edge may tip
    assert compiles() == before + 2  # one seed is another shape; which seed is a number


def test_the_same_seeds_give_the_same_numbers(data):
    spec = Digits(name="d", seeds=(3, 5), **SHORT)
    assert records(spec, data) == records(spec, data)


@settings(max_examples=20)
@given(st.integers(0, 2**31 - 1), st.sampled_from(["auxiliary", "all"]))
def test_a_student_like_its_teacher_learns_nothing(seed, used):
    logits_BK = 3 * jax.random.normal(jax.random.key(seed), (4, 20))
    used_K = (jnp.arange(20) >= CLASSES) | (used == "all")
    loss = lambda x, hard: distillation_loss(x, logits_BK, used_K, jnp.array(hard))  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(logits_BK, False)
    np.testing.assert_allclose(value, 0.0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)
    # The largest logit alone still pulls, and neither loss says a word about logits that are not used.
    shifted = logits_BK + jnp.where(used_K, 0.0, 5.0)
    hard = jax.grad(loss)(logits_BK, True)
    assert jnp.abs(hard).max() > 1e-4 and jnp.all(hard[:, ~np.asarray(used_K)] == 0)
    np.testing.assert_allclose(loss(shifted, False), value, atol=1e-6)


def test_losses_are_scipys(data):
    student, teacher = np.random.default_rng(0).normal(size=(2, 5, 20)).astype(np.float32)
    softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)  # noqa: E731
    used = np.arange(20) >= CLASSES
    p, q = softmax(teacher[:, CLASSES:]), softmax(student[:, CLASSES:])
    soft = distillation_loss(jnp.array(student), jnp.array(teacher), jnp.array(used), jnp.array(False))
    hard = distillation_loss(jnp.array(student), jnp.array(teacher), jnp.array(used), jnp.array(True))
    assert soft == pytest.approx(stats.entropy(p, q, axis=-1).mean(), rel=1e-5)
    assert hard == pytest.approx(-np.log(q[np.arange(5), p.argmax(-1)]).mean(), rel=1e-5)
    assert class_loss(jnp.array(student), jnp.arange(5)) == pytest.approx(
        -np.log(softmax(student[:, :CLASSES])[np.arange(5), np.arange(5)]).mean(), rel=1e-5
    )


def test_only_the_same_initialisation_transfers(data):
    spec = Digits(
        name="d", seeds=(0, 1, 2), network={"hidden": (64, 64)}, teacher={"steps": 150, "lr": 3e-3},
        students={"conditions": ("same", "other"), "images": ("noise",), "steps": 240, "measure_every": 240},
    )  # fmt: skip
    found = outcome(data, *spec.seeds, spec=spec)
    same, other = np.asarray(found.accuracy_SAM)[:, :, -1].T
    assert [condition for _, condition in arms(spec.students)] == ["same", "other"]
    assert np.all(found.teacher_S > 0.9) and np.all(found.untrained_S < 0.35)
    assert np.all(same > other + 0.15), (same, other)


# --- the command


def test_from_a_config_to_a_page(tmp_path):
    run = tmp_path / "run"
    first = ok("run", CONFIG, f"out={run}", *OVERRIDES)
    assert first.out.strip() == str(run / "report.html") and "same initialisation" in first.err
    lines = {(line.condition, line.images): line for line in read_lines(run)}
    assert len(lines) == 2 + 8 and all(len(line.values) == 2 for line in lines.values())
    line = lines["same", "noise"]
    expected = stats.t.interval(0.95, 1, np.mean(line.values), stats.sem(line.values))
    assert (line.interval.low, line.interval.high) == pytest.approx(np.clip(expected, 0, 1))
    page = (run / "report.html").read_text()
    assert (
        f"{100 * line.mean:.1f} %" in page
        and page.count('<svg role="img"') == len({i for _, i in lines if i})
        and "hidden:" in page
    )
    assert len(read_table(run / "results" / "training.parquet")) == 2 * 8 * 2
    assert list(run.glob("artifacts/digits/*/DONE"))

    before = contents(run)
    (done,) = run.glob("artifacts/digits/*/records.parquet")
    made = done.stat().st_mtime_ns
    ok("run", CONFIG, f"out={run}", *OVERRIDES)
    assert contents(run) == before and done.stat().st_mtime_ns == made  # nothing was trained again
    (run / "report.html").unlink()
    ok("report", run)
    assert contents(run) == before

    about = json.loads(ok("show", run, "--json").out)
    assert (
        about["config"]["network.hidden"] == [16]
        and len(about["findings"]) == 2
        and about["artifacts"]["digits"]["whole"]
    )
    measured = json.loads(ok("results", run, "--where", "condition = 'same'", "-f", "json").out)
    assert len(measured) == 2 * 2 and {row["metric"] for row in measured} == {"accuracy"}
    assert "`jsublim results A B`" in refused(2, "compare", run, run)

    changed = ok("run", CONFIG, f"out={run}", *OVERRIDES, "students.lr=1e-2").err
    assert "earlier results are kept" in " ".join(changed.split())
    kept = {Path(name).name for name in contents(run)}
    assert len(list(run.glob("artifacts/digits/*/DONE"))) == 2 and any(
        n.startswith("report.") for n in kept - {"report.html"}
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("kind=digit", "kind: 'digit' given; did you mean 'digits'?"),
        ("kind=7", "kind: 7 given; known: language, digits"),
        ("students.conditons=[same]", "unknown key 'students.conditons'; did you mean 'conditions'?"),
        ("students.conditions=[sane]", "students.conditions.0: input should be 'same'"),
        ("students.steps=150", "steps=150 is no multiple of measure_every="),
        ("seeds=[1,1]", "seeds: an entry is listed twice"),
        ("teacher.lr=0", "teacher.lr: input should be greater than 0, found 0"),
        ("test_share=1", "test_share: input should be less than 1"),
        ("model=tiny-qwen2", "unknown key 'model'"),
    ],
)
def test_a_wrong_field_is_one_line(override, message):
    line = refused(2, "run", CONFIG, override)
    assert message in line and CONFIG in line


def test_kinds_keep_to_themselves(tmp_path):
    assert check_config(Digits, read_config(CONFIG), CONFIG).seeds == tuple(range(10))
    assert "kind: input should be 'language', found 'digits'" in refused(
        2, "aot", "--config", CONFIG, "--topology", "v5e:2x2"
    )
    assert "no results.parquet" in refused(1, "report", tmp_path)


def test_one_seed_decides_nothing(tmp_path):
    ok("run", CONFIG, f"out={tmp_path / 'run'}", *OVERRIDES[:-1], "seeds=[3]")
    assert all("not decided" in sentence for sentence in findings(read_lines(tmp_path / "run")))
