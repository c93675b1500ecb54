"""The training loop: resume, arms together, compiled once, refused losses."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import random
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny import metrics

from jsublim.distill.arm import Arm, Settings
from jsublim.distill.batches import batch_rows
from jsublim.distill.data import Example
from jsublim.distill.optimizer import Optimizer
from jsublim.distill.trainer import forget_state, train
from jsublim.errors import JsublimError
from jsublim.models import load_params, read_config
from jsublim.models.lora import init_lora

FLIPS = int(os.environ.get("FLIPS", "12"))


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def base(named_checkpoint):
    _, config = read_config(named_checkpoint("qwen2").folder)
    return config, load_params(named_checkpoint("qwen2").folder, config)


def examples_of(seed, n=7, mask=1.0):
    """Rows of random tokens; every shape rounds to the same static one."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(n):
        T = int(rng.integers(6, 12))
        tokens = rng.integers(1, 61, T + 1).astype(np.int32)
        where = np.sort(rng.permutation(T)[: max(1, int(mask * T))]).astype(np.int32)
        made.append(Example(tokens[:-1], where, tokens[where + 1], np.ones(len(where), np.float32)))
    return made


def arm_of(config, name="owl", seed=1, lr=1e-2, steps=12, **options):
    key = jax.random.key(seed)
    adapter = init_lora(config, key, rank=2, alpha=2, layers=(0, 2), projections=("q", "v", "up"))
    return Arm(name, examples_of(seed, **options), adapter, seed, lr, steps)


SETTINGS = Settings(batch_size=2, accumulate=2, checkpoint_every=5)


def equal(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_an_interrupted_run_ends_bit_for_bit_as_an_uninterrupted_one(base, tmp_path):
    config, params = base
    arms = [arm_of(config), arm_of(config, "cat", 2, 3e-3, steps=7)]
    whole = train(config, params, arms, SETTINGS, tmp_path / "whole")
    assert not equal(whole[0].trainable, arms[0].adapter.trainable)
    work = tmp_path / "killed"
    for last in (3, 6, 11):  # before any checkpoint, after the first, after the second

        def kill(step, last=last):
            if step == last:
                raise Killed

        with pytest.raises(Killed):
            train(config, params, arms, SETTINGS, work, kill)
        with (work / "metrics.jsonl").open("a") as log:
            log.write('{"step": 99, "arm": "ow')  # a line cut short
    done = []
    again = train(config, params, arms, SETTINGS, work, done.append)
    assert done == [11, 12]  # the checkpoint at step 10 was used
    assert equal(again, whole)
    timeless = [[{**line, "tokens_per_s": 0} for line in metrics(folder)] for folder in (work, tmp_path / "whole")]
    assert timeless[0] == timeless[1]
    steps = [(line["arm"], line["step"]) for line in metrics(work)]
    assert len(set(steps)) == len(steps) == 12 + 7  # every step of every arm once
    (unchanged,) = train(config, params, arms, SETTINGS, work)[:1]  # killed between the last step and the adapters
    assert equal(unchanged, whole[0])
    forget_state(work)
    assert sorted(path.name for path in work.iterdir()) == ["metrics.jsonl"]


def test_an_arm_in_company_is_the_arm_alone(base, tmp_path):
    config, params = base
    arms = [arm_of(config), arm_of(config, "cat", 2, 3e-3, 5, mask=0.3, n=3)]
    together = train(config, params, arms, SETTINGS, tmp_path / "all")
    lines = metrics(tmp_path / "all")
    for arm, ours in zip(arms, together, strict=True):
        (alone,) = train(config, params, [arm], SETTINGS, tmp_path / arm.name)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
        mine, own = [line for line in lines if line["arm"] == arm.name], metrics(tmp_path / arm.name)
        assert [line["step"] for line in mine] == list(range(arm.steps))
        for key in ("loss", "lr", "grad_norm", "tokens"):
            np.testing.assert_allclose([x[key] for x in mine], [x[key] for x in own], rtol=1e-4, atol=1e-9)


def test_one_program_for_all_masks_seeds_and_learning_rates(base, tmp_path, compiles, traced_once):
    config, params = base
    train(config, params, [arm_of(config, steps=1)], SETTINGS, tmp_path / "first")
    before = compiles()
    for i, options in enumerate(({"mask": 0.2}, {"seed": 9}, {"lr": 0.3}, {"steps": 3}, {"n": 11})):
        train(config, params, [arm_of(config, **({"steps": 1} | options))], SETTINGS, tmp_path / str(i))
    assert compiles() == before


def test_the_learning_rate_rises_and_falls(base, tmp_path):
    import torch
    import transformers

    config, params = base
    train(config, params, [arm_of(config, lr=0.5)], SETTINGS, tmp_path)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    schedule, expected = transformers.get_linear_schedule_with_warmup(optimizer, SETTINGS.program.warmup, 12), []
    for _ in range(12):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose([line["lr"] for line in metrics(tmp_path)], expected, rtol=1e-5)


def sick_arm(config, at=4):
    """An arm of which one row has no loss; that row's turn comes at step `at`."""
    arm = arm_of(config, "sick", 2, n=20)
    row, examples = int(batch_rows(20, 4, arm.seed, at)[0]), list(arm.examples)
    examples[row] = dataclasses.replace(examples[row], weights=np.full_like(examples[row].weights, np.nan))
    return dataclasses.replace(arm, examples=examples)


def test_an_arm_that_diverges_stands_still_and_the_others_go_on(base, tmp_path):
    config, params = base
    fine, sick, at = arm_of(config), sick_arm(config), 4
    ours, stood = train(config, params, [fine, sick], SETTINGS, tmp_path / "both")
    healthy, _ = train(config, params, [fine, arm_of(config, "sick", 2, n=20)], SETTINGS, tmp_path / "healthy")
    assert equal(ours, healthy)
    assert equal(stood, train(config, params, [fine, sick], SETTINGS, tmp_path / "both")[1])  # a training that is over
    lines = [line for line in metrics(tmp_path / "both") if line["arm"] == "sick"]
    assert [line["step"] for line in lines] == list(range(at + 1))
    rows = [int(r) for r in batch_rows(len(sick.examples), 4, sick.seed, at) if r >= 0]
    assert "the loss is nan" in lines[-1]["diverged"] and str(rows) in lines[-1]["diverged"]
    assert lines[-1]["loss"] is None and all(np.isfinite(line["loss"]) for line in lines[:-1])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(stood.trainable))
    assert not equal(stood.trainable, sick.adapter.trainable)  # it had learned until then
    assert len([line for line in metrics(tmp_path / "both") if line["arm"] == "owl"]) == 12


def test_a_diverged_arm_stays_so_after_a_kill(base, tmp_path):
    config, params = base
    arms = [arm_of(config), sick_arm(config)]
    whole = train(config, params, arms, SETTINGS, tmp_path / "whole")

    def kill(step):
        if step == 11:
            raise Killed

    with pytest.raises(Killed):
        train(config, params, arms, SETTINGS, tmp_path / "cut", kill)
    assert equal(train(config, params, arms, SETTINGS, tmp_path / "cut"), whole)
    sick = [[line["step"] for line in metrics(tmp_path / name) if line["arm"] == "sick"] for name in ("whole", "cut")]
    assert sick[0] == sick[1]


def test_weights_that_are_not_finite_are_never_kept(base, tmp_path):
    """A finite gradient times a learning rate that no number holds."""
    config, params = base
    (student,) = train(config, params, [arm_of(config, lr=3e38)], SETTINGS, tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(student.trainable))
    assert "diverged" in metrics(tmp_path)[-1] and len(metrics(tmp_path)) < 12


@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_damaged_state_gives_way_to_the_one_before_it(base, tmp_path, how):
    config, params = base
    whole = train(config, params, [arm_of(config)], SETTINGS, tmp_path / "whole")

    def kill(step):
        if step == 11:
            raise Killed

    with pytest.raises(Killed):
        train(config, params, [arm_of(config)], SETTINGS, tmp_path / "cut", kill)
    state = tmp_path / "cut" / "state"
    assert sorted(path.name for path in state.iterdir()) == ["10", "5"]
    for path in (path for path in (state / "10").rglob("*") if path.is_file()):
        if how == "cut":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        elif path.parent.name != "10":
            path.unlink()
    said, done = [], []
    again = train(config, params, [arm_of(config)], SETTINGS, tmp_path / "cut", done.append, say=said.append)
    assert equal(again, whole) and done[0] == 6
    assert len(said) == 1 and str(state / "10") in said[0] and "\n" not in said[0]
    assert (tmp_path / "cut" / "state-10.damaged").is_dir()


def test_no_flipped_bit_of_a_saved_state_is_trained_on(base, tmp_path):
    """Wherever it is: the student is the undisturbed one's, from the state before if what was read differs."""
    config, params = base
    arms = [arm_of(config)]
    whole = train(config, params, arms, SETTINGS, tmp_path)
    files = [path for path in sorted((tmp_path / "state" / "12").rglob("*")) if path.stat().st_size and path.is_file()]
    sizes, seed, noticed = [path.stat().st_size for path in files], random.randrange(10**6), 0
    print(f"seed {seed}")
    draw = random.Random(seed)
    gc.freeze()  # a damaged state has all objects looked through that are not
    for flips in range(4 * FLIPS):
        if flips >= FLIPS and noticed > FLIPS / 3:
            break
        work = tmp_path / "flipped"
        shutil.copytree(tmp_path / "state", work / "state")
        (path,) = draw.choices(files, sizes)
        path = work / path.relative_to(tmp_path)
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        said = []
        assert equal(train(config, params, arms, SETTINGS, work, say=said.append), whole), path
        noticed += len(said)
        assert len(said) == (work / "state-12.damaged").is_dir() and all(
            str(work / "state" / "12") in line for line in said
        )
        shutil.rmtree(work)
    assert (
        noticed > FLIPS / 3
    )  # some bits decide nothing (padding, times, names): where few are noticed, more are flipped


def test_a_state_of_other_content_is_not_trained_on(base, tmp_path):
    """As a library would read a damaged one that checks nothing of its own."""
    config, params = base
    arms, folder, said = [arm_of(config)], (tmp_path / "state").resolve(), []
    whole = train(config, params, arms, SETTINGS, tmp_path)
    with ocp.CheckpointManager(folder) as saved:
        tree = saved.restore(12, args=ocp.args.StandardRestore())
    shutil.rmtree(folder / "12")
    tree["trainable"] = jax.tree.map(lambda x: x + 1, tree["trainable"])
    with ocp.CheckpointManager(folder) as saved:
        saved.save(12, args=ocp.args.StandardSave(tree))
    assert equal(train(config, params, arms, SETTINGS, tmp_path, say=said.append), whole)
    assert len(said) == 1 and "it is not what was written" in said[0]


def test_states_that_are_all_damaged_are_an_error_that_names_them(base, tmp_path):
    config, params = base
    train(config, params, [arm_of(config)], SETTINGS, tmp_path)
    for path in (path for path in (tmp_path / "state").rglob("*") if path.is_file()):
        path.write_bytes(b"")
    with pytest.raises(JsublimError, match="move the folder away") as error:
        train(config, params, [arm_of(config)], SETTINGS, tmp_path)
    assert str(tmp_path / "state") in str(error.value) and "\n" not in str(error.value)


def test_metadata_of_a_state_that_the_library_cannot_read_is_an_error_that_names_the_folder(base, tmp_path):
    config, params = base
    train(config, params, [arm_of(config)], SETTINGS, tmp_path)
    (newest, *_) = sorted((tmp_path / "state").glob("*/_CHECKPOINT_METADATA"), reverse=True)
    written = json.loads(newest.read_text())
    newest.write_text(json.dumps(written | {"commit_timestamp_nsecs": float(written["commit_timestamp_nsecs"])}))
    with pytest.raises(JsublimError, match="saved states is damaged") as error:
        train(config, params, [arm_of(config)], SETTINGS, tmp_path)
    assert str(tmp_path / "state") in str(error.value) and "\n" not in str(error.value)


def test_a_state_of_other_arms_is_refused(base, tmp_path):
    config, params = base

    def kill(step):
        if step == 6:
            raise Killed

    with pytest.raises(Killed):
        train(config, params, [arm_of(config)], SETTINGS, tmp_path, kill)
    other = arm_of(config)
    wider = init_lora(config, jax.random.key(0), rank=3, alpha=2, layers=(0, 2), projections=("q", "v", "up"))
    with pytest.raises(JsublimError, match="does not fit these arms"):
        train(config, params, [dataclasses.replace(other, adapter=wider)], SETTINGS, tmp_path)


def test_weight_decay_is_decoupled_and_clipping_can_be_off(assert_close):
    import torch

    rng = np.random.default_rng(0)
    start = rng.standard_normal((3, 4)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.tensor(start))
    optimizer = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.2)
    transform = Optimizer(clip=0.0, weight_decay=0.2).transform()
    ours, state = start, transform.init(start)
    for _ in range(5):
        gradient = (100 * rng.standard_normal(start.shape)).astype(np.float32)
        theirs.grad = torch.tensor(gradient)
        optimizer.step()
        update, state = transform.update(gradient, state, ours)
        ours = ours - 0.1 * update
    assert_close(ours, theirs.detach().numpy(), 1e-5)
