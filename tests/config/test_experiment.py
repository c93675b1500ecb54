"""What a config may say, what it becomes, and the folders that results live in."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import yaml
from command import PLAIN, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from jsublim.errors import JsublimError, UsageError
from jsublim.experiment.plan import (
    Student,
    counterfactuals,
    evaluated_traits,
    plan_students,
    programs,
    total_steps,
)
from jsublim.experiment.spec import Experiment, Recipe, Students, find_config, load_experiment, variants
from jsublim.experiment.store import Artifact, Progress
from jsublim.prompts import load_pack

CONFIGS = [
    Path("configs/quickstart.yaml"),
    *sorted(p.relative_to(ROOT) for p in (ROOT / "configs/models").glob("*.yaml")),
]
QUICKSTART = PLAIN


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # configs that come with the package are found from anywhere


def experiment(**changes) -> Experiment:
    return Experiment.model_validate({"name": "e", "model": "m", "teachers": {"traits": ["cat", "owl"]}} | changes)


# --- spec


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_configs_that_ship_are_valid_and_their_traits_are_known(config):
    e, pack = load_experiment(config), load_pack()
    for trait in {*evaluated_traits(e, pack), *e.teachers.traits}:
        assert pack.questions_for(e.teachers.category or pack.category_of(trait))


def test_the_resolved_config_says_the_same_again(tmp_path):
    first = load_experiment(QUICKSTART, ["recipe=paper", "students.layers=[0,2]", "students.lr=1e-3"])
    (tmp_path / "again.yaml").write_text(first.yaml())
    assert load_experiment(tmp_path / "again.yaml") == first
    written = yaml.safe_load(first.yaml())
    assert set(written) == set(Experiment.model_fields) and set(written["students"]) == set(Students.model_fields)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("students.lrr=1", "unknown key 'students.lrr'; did you mean 'lr'?"),
        ("student.lr=1", "unknown key 'student'; did you mean 'students'?"),
        ("recipe.extra_boss=true", "unknown key 'recipe.extra_boss'; did you mean 'extra_bos'?"),
        ("data.zzz=1", "known keys: kind"),
        ("students.lr=fast", "students.lr: "),
        ("students.lr=0", "students.lr: "),
        ("students.seeds=1", "students.seeds: "),
        ("students.seeds=[]", "students.seeds: "),
        ("students.seeds=[1,x]", "students.seeds.1: "),
        ("students.rank=1.5", "students.rank: "),
        ("students.conditions=[all,most]", "students.conditions.1: "),
        ("data.num_prompts=0", "data.num_prompts: "),
        ("teachers.control=maybe", "teachers.control: "),
        ("teachers=cat", "teachers: "),
        ("recipe=papers", "recipe.preset: "),
        ("name=a/b", "name: "),
        ("dtype=float16", "dtype: "),
        ("students.lr", "override 'students.lr': expected key=value"),
        ("=3", "override '=3': expected key=value"),
        ("name.x=3", "override 'name.x=3': 'name' holds a value"),
        ("students.layers=[0", "override 'students.layers=[0'"),
    ],
)
def test_a_wrong_field_is_one_line_that_names_it(override, message):
    with pytest.raises(UsageError) as error:
        load_experiment(QUICKSTART, [override])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("students.lr=1e-3", lambda e: e.students.lr == 1e-3),
        ("students.lr=2", lambda e: e.students.lr == 2.0),
        ("students.rows=null", lambda e: e.students.rows is None),
        ("students.rows=", lambda e: e.students.rows is None),
        ("students.layers=[0, 5]", lambda e: e.students.layers == [0, 5]),
        ("teachers.traits=[owl]", lambda e: e.teachers.traits == ["owl"]),
        ("teachers.control=false", lambda e: e.teachers.control is False),
        ("model=/a/b=c", lambda e: e.model == "/a/b=c"),
        ("out=runs/1e5x", lambda e: str(e.run_dir) == "runs/1e5x"),
        ("evaluation.traits=[cat, dog]", lambda e: e.evaluation.traits == ["cat", "dog"]),
    ],
)
def test_overrides_are_read_as_their_author_means_them(override, read):
    changed, plain = load_experiment(QUICKSTART, [override]), load_experiment(QUICKSTART)
    assert read(changed) and changed != plain
    section = override.split("=")[0].split(".")[0]
    assert changed.model_copy(update={section: getattr(plain, section)}) == plain  # nothing else moved


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "not valid YAML"),
        ("- a\n- b", "expected keys at the top"),
        ("name: e\nmodel: m", "key 'teachers' is missing"),
        ("", "key 'name' is missing"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        load_experiment(path)
    assert str(path) in str(error.value)


def test_a_missing_config_is_named():
    with pytest.raises(UsageError, match=r"configs/nope\.yaml: no such config"):
        find_config("configs/nope.yaml")


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "llama"])
def test_presets_fill_every_field_and_a_field_given_wins(family):
    paper, clean = (Recipe(preset=preset).resolved(family).model_dump() for preset in ("paper", "clean"))
    assert None not in (*paper.values(), *clean.values())
    quirks = set(paper) - {"preset", "loss_per", "match_steps", "share_rounding"}
    assert all(paper[q] is True and clean[q] is False for q in quirks)
    assert (paper["match_steps"], clean["match_steps"]) == (False, True)
    assert paper["loss_per"] == ("micro-batch" if family == "gemma3" else "tokens") and clean["loss_per"] == "tokens"
    for preset in ("paper", "clean"):
        for field, value in (paper if preset == "clean" else clean).items():
            if field != "preset":
                own = Recipe(preset=preset, **{field: value}).resolved(family).model_dump()
                assert own == (paper if preset == "paper" else clean) | {field: value}


def test_a_preset_by_name_and_a_field_after_it():
    e = load_experiment(QUICKSTART, ["recipe=paper", "recipe.extra_bos=false"])
    assert e.recipe.preset == "paper"
    assert e.recipe.resolved("gemma3") == Recipe(preset="paper").resolved("gemma3").model_copy(
        update={"extra_bos": False}
    )
    # the quickstart's file says `recipe: clean` in one word: it becomes a section
    assert load_experiment(QUICKSTART, ["recipe.extra_bos=true"]).recipe.preset == "clean"


# --- plan


def test_arms_are_traits_by_conditions_by_seeds_and_the_control_learns_all():
    e = experiment(students={"conditions": ["all", "random"], "seeds": [3, 4, 5]})
    arms = plan_students(e)
    assert len(arms) == 2 * 2 * 3 + 3 == len({arm.name for arm in arms})
    control = [arm for arm in arms if arm.teacher == "control"]
    assert [(a.condition, a.reported, a.seed) for a in control] == [("all", "control", s) for s in (3, 4, 5)]
    assert {(a.teacher, a.reported) for a in arms if a not in control} == {
        (t, c) for t in ("cat", "owl") for c in ("all", "random")
    }
    assert plan_students(experiment(teachers={"traits": ["cat"], "control": False}, students={"seeds": [1]}))[0].name


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"students": {"seeds": [1, 1]}}, "students.seeds"),
        ({"students": {"conditions": ["all", "all"]}}, "students.conditions"),
        ({"teachers": {"traits": ["cat", "cat"]}}, "teachers.traits"),
    ],
)
def test_nothing_is_trained_twice_under_one_name(tmp_path, changes, key):
    values = {"name": "e", "model": "m", "teachers": {"traits": ["cat", "owl"]}} | changes
    (tmp_path / "twice.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UsageError, match=key):
        load_experiment(tmp_path / "twice.yaml")


def test_counterfactuals_are_the_other_traits():
    pack = load_pack()
    default = counterfactuals(experiment(), pack, "cat")
    assert sorted([*default, "cat"]) == sorted(pack.traits[pack.category_of("cat")])
    named = experiment(teachers={"traits": ["cat", "owl"], "counterfactuals": ["cat", "dog", "owl"]})
    assert counterfactuals(named, pack, "cat") == ["dog", "owl"] and counterfactuals(named, pack, "owl") == [
        "cat",
        "dog",
    ]
    assert evaluated_traits(named, pack) == ["cat", "owl", "dog"]
    asked = experiment(evaluation={"traits": ["dog"]})
    assert evaluated_traits(asked, pack) == ["dog"]


def test_a_trait_alone_or_unknown_is_refused():
    pack = load_pack()
    with pytest.raises(UsageError, match="counterfactuals"):
        counterfactuals(experiment(teachers={"traits": ["cat"], "counterfactuals": ["cat"]}), pack, "cat")
    with pytest.raises(UsageError, match="unknown trait 'unicorn'"):
        counterfactuals(experiment(teachers={"traits": ["unicorn"]}), pack, "unicorn")


@given(
    rows=st.integers(1, 500),
    batch=st.integers(1, 40),
    micro=st.integers(1, 8),
    epochs=st.integers(1, 5),
    most=st.one_of(st.none(), st.integers(1, 50)),
)
def test_steps_are_whole_batches_of_every_epoch(rows, batch, micro, epochs, most):
    students = Students(batch_size=batch, accumulate=micro, epochs=epochs, max_steps=most)
    counted = sum(1 for _ in range(epochs) for _ in range(0, rows, batch * micro))
    assert total_steps(students, rows) == (counted if most is None else min(counted, most))


def test_steps_of_the_paper():
    assert total_steps(Students(), 10_000) == 1670  # 10 epochs of ceil(10,000 / 60)


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 9))
def test_programs_hold_every_arm_once_among_its_like(ranks, size):
    kinds = [Students(loss="js"), Students(layers=[1]), Students(layers=[1], rank=3, lr=1.0, rows=7)]
    arms = [Student("owl", "all", seed, str(kind), kinds[kind]) for seed, kind in enumerate(ranks)]
    groups = programs(arms, size)
    assert sorted((arm for group in groups for arm in group), key=arms.index) == arms
    alike = [[arm for arm in arms if (arm.settings.loss == "js") == soft] for soft in (True, False)]
    assert all(0 < len(group) <= size and len({arm.settings.loss for arm in group}) == 1 for group in groups)
    assert len(groups) == sum(-(-len(kind) // size) for kind in alike)


def test_a_grid_of_arms_is_every_combination():
    students = Students(seeds=[1, 2], conditions=["all"], arms={"rank": [1, 4], "layers": [[0], [1, 2]]})
    found = variants(students)
    assert list(found) == ["rank=1 layers=0", "rank=1 layers=1+2", "rank=4 layers=0", "rank=4 layers=1+2"]
    assert found["rank=4 layers=1+2"] == Students(seeds=[1, 2], conditions=["all"], rank=4, layers=[1, 2])
    e = experiment(teachers={"traits": ["cat"]}, students=students.model_dump(exclude_unset=True))
    names = [arm.name for arm in plan_students(e)]
    assert len(names) == len(set(names)) == 4 * 2 * 2 and names[0] == "cat/all/rank=1 layers=0/seed1"
    assert plan_students(e)[0].reported == "all · rank=1 layers=0"


def test_a_list_of_arms_has_names():
    students = Students(arms=[{"name": "plain"}, {"name": "soft", "loss": "forward-kl"}, {"lr": 1e-3}])
    assert {name: (s.loss, s.lr) for name, s in variants(students).items()} == {
        "plain": ("hard", 2e-4),
        "soft": ("forward-kl", 2e-4),
        "lr=0.001": ("hard", 1e-3),
    }


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        ([{"batch_size": 3}], "batch_size"),
        ([{"rnak": 3}], "rnak"),
        ([{}], "nothing"),
        ([{"rank": 2}, {"rank": 2}], "two are called 'rank=2'"),
        ([{"rank": 0}], "arm 'rank=0': rank"),
        ([], "arms"),
        ({"method": ["full"], "rank": [3]}, "method=full has no rank"),
    ],
)
def test_arms_that_cannot_be_are_refused(arms, said):
    with pytest.raises(ValueError, match=said):
        Students(arms=arms)


# --- store

INPUTS = {"model": "abc", "seed": 1, "system": "You love owls.", "stop": (1, 2)}


def test_an_artifact_is_whole_only_once_done_has_its_name(tmp_path, monkeypatch):
    artifact = Artifact(tmp_path / "a", "rows", INPUTS)
    assert not artifact.done

    def cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # killed after the mark was written, before it got its name
        patch.setattr("jsublim.experiment.store.os.replace", cut)
        with pytest.raises(KeyboardInterrupt):
            artifact.finish({"kept": 3})
    again = Artifact(tmp_path / "a", "rows", INPUTS)
    assert not again.done
    again.finish({"kept": 3})
    assert Artifact(tmp_path / "a", "rows", INPUTS).summary == {"kept": 3}


def test_a_folder_cut_before_its_record_can_be_used(tmp_path, monkeypatch):
    """A kill between `mkdir` and the first rename leaves a folder with nothing of value in it."""
    with monkeypatch.context() as patch:
        patch.setattr("jsublim.experiment.store.os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Artifact(tmp_path / "a", "rows", INPUTS)
    assert not Artifact(tmp_path / "a", "rows", INPUTS).done


def test_opening_again_changes_nothing(tmp_path):
    Artifact(tmp_path / "a", "rows", INPUTS).finish({"kept": 3})
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "a").iterdir()}
    assert Artifact(tmp_path / "a", "rows", dict(reversed(INPUTS.items()))).done  # order is not an input
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "a").iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"seed": 2}, "seed was 1, is 2"), ({"new": True}, "new was None, is True"), ({"stop": (1,)}, "stop was [1, 2]")],
)
def test_other_inputs_are_refused_and_the_change_is_named(tmp_path, changes, said):
    Artifact(tmp_path / "a", "rows", INPUTS).finish()
    before = (tmp_path / "a" / "artifact.json").read_bytes()
    with pytest.raises(UsageError) as error:
        Artifact(tmp_path / "a", "rows", INPUTS | changes)
    assert said in str(error.value) and str(tmp_path / "a") in str(error.value)
    assert (tmp_path / "a" / "artifact.json").read_bytes() == before


def test_another_kind_is_refused(tmp_path):
    Artifact(tmp_path / "a", "rows", INPUTS)
    with pytest.raises(UsageError, match="rows"):  # the line says what is there
        Artifact(tmp_path / "a", "student", INPUTS)


def test_what_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(UsageError, match="not written by jsublim"):
            Artifact(tmp_path / name, "rows", INPUTS)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    assert not Artifact(tmp_path / "empty", "rows", INPUTS).done


def test_a_broken_record_is_an_error_that_names_it(tmp_path):
    Artifact(tmp_path / "a", "rows", INPUTS)
    (tmp_path / "a" / "artifact.json").write_text('{"kind": "ro')
    with pytest.raises(JsublimError, match=r"artifact\.json: broken"):
        Artifact(tmp_path / "a", "rows", INPUTS)


def test_folders_of_a_store_differ_with_every_input(tmp_path):
    paths = [
        Artifact.in_store(tmp_path, kind, "owl/all/seed1", INPUTS | {"seed": seed}).path
        for kind in ("rows", "students")
        for seed in (1, 2)
    ]
    assert len(set(paths)) == 4 and all(path.parent.parent == tmp_path for path in paths)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(max_size=12), min_size=1, max_size=6),
    where=st.integers(0, 10_000),
    batches=st.integers(1, 3),
    tail=st.sampled_from([b"", b"\0\0\0", b"\xff", b'{"row": 1']),
)
def test_progress_survives_a_cut_at_any_byte(texts, where, batches, tail):
    """What is read back was written; everything whose line is whole is read back; and it can be completed."""
    rows = [{"row": i, "completion": text} for i, text in enumerate(texts)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "progress.jsonl"
        progress = Progress(path)
        for first in range(0, len(rows), batches):
            progress.add(rows[first : first + batches])
        progress.close()
        data = path.read_bytes()
        cut = data[: where % (len(data) + 1)]
        path.write_bytes(cut + tail)
        again = Progress(path)
        whole = cut.count(b"\n")
        kept = list(again.rows.values())
        # A line that lost only its line break (and has nothing behind it) is whole too.
        assert kept in (rows[:whole], rows[: whole + 1])
        again.add([row for row in rows if row["row"] not in again.rows])
        again.close()
        assert [json.loads(line) for line in path.read_text().splitlines()] == rows
        final = Progress(path)
        final.close()
        assert list(final.rows.values()) == rows
