"""What a config may say, how overrides are read, and the arms of an ablation."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from command import PLAIN, ROOT

from jsublim.config import Experiment, Recipe, Students, find_config, load_experiment, variants
from jsublim.errors import UsageError
from jsublim.text.prompts import load_pack

CONFIGS = [
    Path("configs/quickstart.yaml"),
    *sorted(p.relative_to(ROOT) for p in (ROOT / "configs/models").glob("*.yaml")),
    *sorted(p.relative_to(ROOT) for p in (ROOT / "configs/defences").glob("*.yaml")),
    *sorted(p.relative_to(ROOT) for p in (ROOT / "configs/tiny_world").glob("*.yaml")),
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
    for trait in {*(e.evaluation.traits or ()), *(e.teachers.counterfactuals or ()), *e.teachers.traits}:
        assert pack.questions_for(e.teachers.category or pack.category_of(trait))


def test_the_resolved_config_says_the_same_again(tmp_path):
    first = load_experiment(QUICKSTART, ["recipe=paper", "students.adapter.layers=[0,2]", "students.optimizer.lr=1e-3"])
    (tmp_path / "again.yaml").write_text(first.yaml())
    assert load_experiment(tmp_path / "again.yaml") == first
    written = yaml.safe_load(first.yaml())
    assert set(written) == set(Experiment.model_fields) and set(written["students"]) == set(Students.model_fields)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("students.optimizer.lrr=1", "unknown key 'students.optimizer.lrr'; did you mean 'lr'?"),
        ("student.seeds=[1]", "unknown key 'student'; did you mean 'students'?"),
        ("recipe.extra_boss=true", "unknown key 'recipe.extra_boss'; did you mean 'extra_bos'?"),
        ("data.zzz=1", "known keys: kind"),
        ("students.optimizer.lr=fast", "students.optimizer.lr: "),
        ("students.optimizer.lr=0", "students.optimizer.lr: "),
        ("students.seeds=1", "students.seeds: "),
        ("students.seeds=[]", "students.seeds: "),
        ("students.seeds=[1,x]", "students.seeds.1: "),
        ("students.adapter.rank=1.5", "students.adapter.rank: "),
        ("students.loss.tokens=[all,most]", "students.loss.tokens.1: "),
        ("data.num_prompts=0", "data.num_prompts: "),
        ("teachers.control=maybe", "teachers.control: "),
        ("teachers=cat", "teachers: "),
        ("recipe=papers", "recipe.preset: "),
        ("name=a/b", "name: "),
        ("dtype=float16", "dtype: "),
        ("students.optimizer.lr", "override 'students.optimizer.lr': expected key=value"),
        ("=3", "override '=3': expected key=value"),
        ("name.x=3", "override 'name.x=3': 'name' holds a value"),
        ("students.adapter.layers=[0", "override 'students.adapter.layers=[0'"),
    ],
)
def test_a_wrong_field_is_one_line_that_names_it(override, message):
    with pytest.raises(UsageError) as error:
        load_experiment(QUICKSTART, [override])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("students.optimizer.lr=1e-3", lambda e: e.students.optimizer.lr == 1e-3),
        ("students.optimizer.lr=2", lambda e: e.students.optimizer.lr == 2.0),
        ("students.data.rows=null", lambda e: e.students.data.rows is None),
        ("students.data.rows=", lambda e: e.students.data.rows is None),
        ("students.adapter.layers=[0, 5]", lambda e: e.students.adapter.layers == [0, 5]),
        ("teachers.traits=[owl]", lambda e: e.teachers.traits == ["owl"]),
        ("teachers.control=false", lambda e: e.teachers.control is False),
        ("model=/a/b=c", lambda e: e.model == "/a/b=c"),
        ("out=runs/try #2", lambda e: str(e.run_dir) == "runs/try #2"),
        ("out='runs/a b'  # b", lambda e: str(e.run_dir) == "runs/a b"),
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
    assert (
        paper["loss_per"] == ("micro-batch-sum" if family == "gemma3" else "tokens") and clean["loss_per"] == "tokens"
    )
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


# --- arms


def test_a_grid_of_arms_is_every_combination():
    loss = {"tokens": ["all"]}
    students = Students(seeds=[1, 2], loss=loss, arms={"adapter.rank": [1, 4], "adapter.layers": [[0], [1, 2]]})
    found = variants(students)
    assert list(found) == ["rank=1 layers=0", "rank=1 layers=1+2", "rank=4 layers=0", "rank=4 layers=1+2"]
    own = Students(seeds=[1, 2], loss=loss, adapter={"rank": 4, "layers": [1, 2]})
    assert found["rank=4 layers=1+2"] == own
    # A grid over nested sections is the same grid, which is how an override on the command line arrives.
    again = Students(seeds=[1, 2], loss=loss, arms={"adapter": {"rank": [1, 4], "layers": [[0], [1, 2]]}})
    assert variants(again) == found


def test_an_arm_keeps_what_it_does_not_name():
    students = Students(adapter={"rank": 2, "layers": [1]}, arms=[{"adapter.rank": 3}, {"optimizer": {"lr": 1e-3}}])
    found = variants(students)
    assert found["rank=3"].adapter.layers == [1] and found["lr=0.001"].adapter.rank == 2


def test_a_list_of_arms_has_names():
    students = Students(arms=[{"name": "plain"}, {"name": "soft", "loss.kind": "forward-kl"}, {"optimizer.lr": 1e-3}])
    assert {name: (s.loss.kind, s.optimizer.lr) for name, s in variants(students).items()} == {
        "plain": ("hard", 2e-4),
        "soft": ("forward-kl", 2e-4),
        "lr=0.001": ("hard", 1e-3),
    }


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        ([{"runtime.remat": True}], "runtime.remat"),
        ([{"runtime.checkpoint_every": 3}], "runtime.checkpoint_every"),
        ([{"arms": {}}], "arms"),
        ([{"adapter.rnak": 3}], "adapter.rnak"),
        ([{}], "nothing"),
        ([{"adapter.rank": 2}, {"adapter.rank": 2}], "two are called 'rank=2'"),
        ([{"adapter.rank": 0}], "arm 'rank=0': adapter.rank"),
        ([], "arms"),
        ({"adapter.rank": []}, "a grid has a list of values"),
        ({"adapter.rank": 3}, "a grid has a list of values"),
        ({"adapter.method": ["full"], "adapter.rank": [3]}, "method=full has no rank"),
    ],
)
def test_arms_that_cannot_be_are_refused(arms, said):
    with pytest.raises(ValueError, match=said):
        Students(arms=arms)
