"""Defences as a config names them: what each does to a student, and to its rows."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from command import TWO_LAYERS

from jsublim.config import Experiment
from jsublim.config.evaluation import Setting
from jsublim.errors import UsageError
from jsublim.executors import execute_nodes
from jsublim.models.lora import Adapter, init_steering
from jsublim.models.peft import load_adapter
from jsublim.pipeline import arguments, evaluated
from jsublim.pipeline import experiment as page
from jsublim.pipeline.arms import Source
from jsublim.pipeline.context import Context
from jsublim.pipeline.experiment import plan, training_rows
from jsublim.pipeline.setup import Setup
from jsublim.pipeline.stages.starts import directions_of, read_influence
from jsublim.transforms.audited import without_highest

CONFIG: dict[str, Any] = {
    "name": "defences",
    "model": TWO_LAYERS,
    "teachers": {
        "traits": ["owl"],
        "counterfactuals": ["cat", "owl"],
        "taught": {"method": "steering", "layers": [1], "steps": 10, "lr": 0.2},
    },
    "data": {"num_prompts": 12, "sentences": ["example", "format"], "examples": [2, 6]},
    "sampling": {"max_new_tokens": 32, "batch_size": 12},
    "datasets": {"filtered": {"drop_audited": {"share": 0.25, "traits": ["{trait}"]}}},
    "students": {
        "seeds": [1],
        "data": {"rows": 4, "epochs": 1, "batch_size": 2, "accumulate": 1},
        "loss": {"tokens": ["all"]},
        "adapter": {"method": "steering", "layers": [1]},
        "optimizer": {"name": "sgd", "lr": 1.0, "warmup": 0, "clip": 0},
        "arms": [
            {"name": "plain"},
            {"name": "frozen", "adapter.frozen_adapter": "{trait}"},
            {"name": "projected", "optimizer.project_out": ["{trait}", "cat"]},
            {"name": "filtered", "data.dataset": "filtered"},
        ],
    },
    "evaluation": {"traits": ["owl", "cat"]},
}


def experiment(store: Any, **changes: Any) -> Experiment:
    return Experiment.model_validate(CONFIG | {"store": str(store)} | changes)


@pytest.fixture(scope="module")
def context(tmp_path_factory) -> Context:
    context = Context.load(experiment(tmp_path_factory.mktemp("defences")))
    execute_nodes(plan(context.setup).students.values(), context)
    return context


def student(context: Context, arm: str, teacher: str = "owl") -> Adapter:
    (found,) = [each for each in context.setup.students if (each.arm, each.teacher) == (arm, teacher)]
    return load_adapter(context.store.path(page.student(context.setup, found)))


def test_a_student_beside_its_teachers_vector_is_saved_without_it(context):
    plain, inoculated = (student(context, arm).steering for arm in ("plain", "frozen"))
    teacher = page.teacher(context.setup, "owl").teacher(context).adapter
    assert plain is not None and inoculated is not None and teacher is not None and teacher.steering is not None
    moved = float(np.linalg.norm(inoculated))
    assert 0 < moved < 0.5 * float(np.linalg.norm(teacher.steering))
    # With the trait there already, the rows have less to teach.
    assert np.vdot(inoculated, teacher.steering) < np.vdot(plain, teacher.steering)


def test_control_students_are_inoculated_against_nothing(context):
    controls = [each for each in context.setup.students if each.teacher == "control"]
    keys = {each.arm: page.student(context.setup, each).key for each in controls}
    assert keys["plain"] == keys["frozen"] == keys["filtered"] != keys["projected"]  # from the cat alone


def test_a_student_does_not_move_along_projected_traits(context):
    setup, lm = context.setup, context.lm()
    start, settings = init_steering(lm.config, (1,)), setup.students[0].settings
    toward = directions_of(
        lm,
        start,
        arguments.start(setup, settings, 1).model,
        arguments.questions_about(setup, ["owl", "cat"]),
        ["owl", "cat"],
    )
    (directions_KD,) = (leaf[:, 0] for leaf in jax.tree.leaves(toward))
    along = [np.abs(directions_KD @ np.ravel(student(context, arm).steering)) for arm in ("plain", "projected")]
    assert np.all(along[1] < 1e-3 * along[0].max())


def test_the_rows_with_the_highest_scores_are_left_out(context):
    setup, store = context.setup, context.store
    source = Source("owl", "filtered")
    node = page.changed(setup, source).nodes[0].given.influence
    scores, rows = read_influence(store, node), training_rows(setup, Source("owl")).read(store)
    (worst,) = scores.values()
    kept = [row["prompt"] for row in training_rows(setup, source).read(store)]
    assert len(kept) == len(rows) - round(0.25 * len(rows))
    left = np.asarray([row["prompt"] in kept for row in rows])
    assert worst[left].max() <= worst[~left].min()


def asked(setup: Setup, name: str = "") -> tuple[str, ...]:
    (task,) = evaluated.questions(setup, name).planned
    return task.questions


def test_what_is_fitted_is_fitted_to_questions_that_nobody_is_asked(tmp_path):
    setup = Setup.of(experiment(tmp_path))
    ((fitted, _),) = arguments.questions_about(setup, ["owl", "cat"])
    both, taught = arguments.open_questions(setup, "animal"), arguments.taught_questions(setup, "owl")
    assert fitted and not set(fitted) & set(asked(setup)) and sorted([*fitted, *asked(setup)]) == sorted(both)
    assert abs(len(fitted) - len(asked(setup))) <= 1 and not set(taught) & set(both)
    projected = [node for who, node in plan(setup).students.items() if who.arm == "projected"]
    influence = page.changed(setup, Source("owl", "filtered")).nodes[0].given.influence
    for node in (*projected, influence):
        assert [texts for texts, _ in node.given.questions] == [fitted]


@pytest.mark.parametrize(
    ("changes", "split"),
    [
        ({"students": CONFIG["students"] | {"arms": [{"name": "plain"}]}}, False),  # the data set is nobody's
        ({"students": CONFIG["students"] | {"arms": [{"name": "f", "data.dataset": "filtered"}]}}, True),
        ({"students": CONFIG["students"] | {"arms": [{"name": "p", "optimizer.project_out": ["cat"]}]}}, True),
        ({"students": CONFIG["students"] | {"arms": [{"name": "plain"}]}, "audit": {}}, True),
        ({"evaluation": {"traits": ["owl", "cat"], "split_questions": False}}, False),
    ],
    ids=str,
)  # fmt: skip
def test_questions_are_split_where_anything_is_fitted_unless_the_config_says_otherwise(changes, split, tmp_path):
    setup = Setup.of(experiment(tmp_path, **changes))
    ((fitted, _),), every = arguments.questions_about(setup, ["owl"]), arguments.open_questions(setup, "animal")
    assert setup.splits_questions == split
    assert not split or not set(fitted) & set(asked(setup))
    assert split or fitted == list(asked(setup)) == every


def test_the_same_questions_are_asked_in_other_words(tmp_path):
    settings = {"settings": {"other": {"wording": "Say: {question} Please."}, "cool": {"temperature": 0.5}}}
    setup = Setup.of(experiment(tmp_path, evaluation=CONFIG["evaluation"] | settings))
    assert asked(setup, "other") == tuple(f"Say: {text} Please." for text in asked(setup))
    assert asked(setup, "cool") == asked(setup)
    with pytest.raises(ValueError, match=r"wording='Say it' has no place for the question; write \{question\} there"):
        Setting(wording="Say it")


def test_of_equal_rows_the_first_go():
    rows = [{"prompt": str(i)} for i in range(5)]
    left = without_highest(rows, np.asarray([1.0, 3.0, 2.0, 3.0, 3.0]), 0.4)
    assert [row["prompt"] for row in left] == ["0", "2", "4"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teachers": {"traits": ["owl"]}}, "teacher 'owl' has no adapter"),
        ({"audit": {}}, "audit: scores are those of a student without a frozen adapter"),
        ({"students": None, "datasets": {"f": {"drop_audited": 0.5, "divergence": True}}}, "there are none; leave it out"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_made(changes, said, tmp_path):
    setup = Setup.of(experiment(tmp_path, **changes))
    with pytest.raises(UsageError, match=said):
        for check in plan(setup).checks(setup):
            check()
