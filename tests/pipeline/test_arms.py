"""The students of an experiment: who there is, who is one and the same, how many steps each takes."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from jsublim.config import Experiment, Students, load_experiment
from jsublim.errors import UsageError
from jsublim.pipeline.arms import plan_students, total_steps
from jsublim.pipeline.experiment import plan
from jsublim.pipeline.setup import Setup
from jsublim.pipeline.stage import split_evenly


def experiment(**changes) -> Experiment:
    return Experiment.model_validate({"name": "e", "model": "m", "teachers": {"traits": ["cat", "owl"]}} | changes)


def test_students_are_traits_by_tokens_by_seeds_and_the_control_learns_all():
    e = experiment(students={"loss": {"tokens": ["all", "random"]}, "seeds": [3, 4, 5]})
    students = plan_students(e)
    assert len(students) == 2 * 2 * 3 + 3 == len({student.name for student in students})
    control = [student for student in students if student.teacher == "control"]
    assert [(s.tokens, s.condition, s.seed) for s in control] == [("all", "control", n) for n in (3, 4, 5)]
    assert {(s.teacher, s.condition) for s in students if s not in control} == {
        (t, c) for t in ("cat", "owl") for c in ("all", "random")
    }
    alone = experiment(teachers={"traits": ["cat"], "control": False}, students={"seeds": [1]})
    assert {student.teacher for student in plan_students(alone)} == {"cat"}


def test_arms_name_their_students():
    e = experiment(
        teachers={"traits": ["cat"]},
        students={
            "seeds": [1, 2],
            "loss": {"tokens": ["all"]},
            "arms": {"adapter.rank": [1, 4], "adapter.layers": [[0], [1, 2]]},
        },
    )
    names = [student.name for student in plan_students(e)]
    assert len(names) == len(set(names)) == 4 * 2 * 2 and names[0] == "cat/all/rank=1 layers=0/seed1"
    assert plan_students(e)[0].condition == "all · rank=1 layers=0"


@pytest.mark.parametrize(
    ("arms", "kinds"),
    [
        ([{"name": "a", "loss.positions": "first"}, {"name": "b", "loss.positions_share": 0.5}], 1),
        (
            [
                {"name": "a", "loss.tokens": ["all"]},
                {"name": "b", "loss.by_margin": True, "loss.tokens": ["divergence"]},
            ],
            1,
        ),
        ([{"name": "a", "adapter.frozen_adapter": "vectors/{trait}"}, {"name": "b"}], 1),
        ([{"name": "a", "adapter.frozen_adapter": "cat"}, {"name": "b"}], 2),
        ([{"name": "a", "optimizer.project_out": ["{trait}"]}, {"name": "b"}], 1),
        ([{"name": "a", "optimizer.project_out": ["{trait}", "cat"]}, {"name": "b"}], 2),
        ([{"name": "a", "data.dataset": "greedy"}, {"name": "b"}], 2),
        ([{"name": "a", "data.dataset": "alone"}, {"name": "b"}], 1),
        ([{"name": "a", "adapter.rank": 2}, {"name": "b"}], 2),
    ],
)
def test_there_is_one_control_where_arms_change_nothing_for_it(arms, kinds):
    datasets = {"greedy": {"sampling": {"strategy": "greedy"}}, "alone": {"rewrite": True}}
    e = experiment(students={"seeds": [1], "arms": arms}, datasets=datasets)
    control = [student for student in plan_students(e) if student.teacher == "control"]
    assert len(control) == len({repr(student.settings) for student in control}) == kinds


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"students": {"seeds": [1, 1]}}, "students.seeds"),
        ({"students": {"loss": {"tokens": ["all", "all"]}}}, "students.loss.tokens"),
        ({"teachers": {"traits": ["cat", "cat"]}}, "teachers.traits"),
        ({"teachers": {"traits": ["cat"], "counterfactuals": ["owl", "owl"]}}, "counterfactuals"),
    ],
)
def test_nothing_is_trained_twice_under_one_name(tmp_path, changes, key):
    values = {"name": "e", "model": "m", "teachers": {"traits": ["cat", "owl"]}} | changes
    (tmp_path / "twice.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UsageError, match=key):
        load_experiment(tmp_path / "twice.yaml")


@given(
    rows=st.integers(1, 500),
    batch=st.integers(1, 40),
    accumulate=st.integers(1, 8),
    epochs=st.integers(1, 5),
    most=st.one_of(st.none(), st.integers(1, 50)),
)
def test_steps_are_whole_batches_of_every_epoch(rows, batch, accumulate, epochs, most):
    data = {"batch_size": batch, "accumulate": accumulate, "epochs": epochs, "max_steps": most}
    counted = sum(1 for _ in range(epochs) for _ in range(0, rows, batch * accumulate))
    assert total_steps(Students(data=data), rows) == (counted if most is None else min(counted, most))


def test_steps_of_the_paper():
    assert total_steps(Students(), 10_000) == 1670  # 10 epochs of ceil(10,000 / 60)


@given(members=st.lists(st.integers(), min_size=1, max_size=60), most=st.integers(1, 9))
def test_parts_are_few_and_even(members, most):
    parts = split_evenly(members, most)
    assert [member for part in parts for member in part] == members
    assert len(parts) == -(-len(members) // most)
    assert all(0 < len(part) <= most for part in parts) and len(parts[0]) - len(parts[-1]) <= len(parts)


def test_pieces_that_no_step_can_be_cut_into_are_refused_before_anything_is_made():
    values = {
        "name": "x",
        "model": "tiny-qwen2",
        "teachers": {"traits": ["owl"]},
        "students": {"runtime": {"rows_at_once": 7}},
    }
    setup = Setup.of(Experiment.model_validate(values))
    with pytest.raises(
        UsageError, match=r"students.runtime.rows_at_once: 7 given; it must divide the 60 rows of a step"
    ):
        for task in plan(setup).tasks.values():
            task.check(setup)
