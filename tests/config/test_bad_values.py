"""What no config may say: each is one line that names the file and the key, before anything is computed."""

from __future__ import annotations

import pytest
from command import PLAIN

from jsublim.api import KINDS
from jsublim.config import load_experiment
from jsublim.config.figures import load_question, panel_experiment
from jsublim.config.loading import look_over
from jsublim.core.section import NAME_BYTES
from jsublim.errors import UsageError
from jsublim.inference.lm import resolve_checkpoint
from jsublim.pipeline.arms import plan_students

LONG = "x" * (NAME_BYTES + 1)
WIDE = "\u00fc" * 101  # 202 bytes
SERVER = "base_url: 'http://a/v1', model: m"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        # numbers that are none, however they are spelt
        ("students.optimizer.lr=.nan", "finite"),
        ("students.optimizer.lr=nan", "students.optimizer.lr"),
        ("students.optimizer.lr='inf'", "students.optimizer.lr"),
        ("students.optimizer.clip=1e999", "students.optimizer.clip"),
        ("students.optimizer.weight_decay='inf'", "students.optimizer.weight_decay"),
        ("students.loss.temperature=+1e400", "students.loss.temperature"),
        ("students.adapter.alpha='inf'", "students.adapter.alpha"),
        ("students.arms={optimizer.lr: ['inf']}", "optimizer.lr"),
        ("teachers.taught={method: contrast, layers: [0], strength: 'nan'}", "teachers.taught.strength"),
        ("evaluation.settings={hot: {temperature: 'inf'}}", "evaluation.settings.hot.temperature"),
        ("datasets={a: {mix: {share: 'nan'}}}", "mix.share"),
        (f"judge={{server: {{{SERVER}, timeout_s: 'inf'}}}}", "judge.server.timeout_s"),
        ("sampling.server={base_url: 'http://a/v1', timeout_s: 'inf'}", "sampling.server.timeout_s"),
        ("data.num_prompts=99999999999999999999", "data.num_prompts"),
        ("students.data.rows=true", "students.data.rows: true and false are no numbers"),
        ("students.seeds=[yes]", "students.seeds: true and false are no numbers"),
        ("students.arms={optimizer.lr: [on]}", "optimizer.lr: true and false are no numbers"),
        ("datasets={a: {mix: {share: true}}}", "mix.share: true and false are no numbers"),
        # out of range
        ("evaluation.kinds={misalignment: {aligned_from: 101}}", "misalignment.aligned_from"),
        ("evaluation.kinds={misalignment: {coherent_from: -1}}", "misalignment.coherent_from"),
        ("evaluation.kinds={misalignment: {thresholds: [30, 400]}}", "misalignment.thresholds.1"),
        ("datasets={a: {keep_aligned: 101}}", "keep_aligned"),
        ("students.adapter.alpha=0", "students.adapter.alpha"),
        ("students.adapter.layers=[-1]", "students.adapter.layers.0"),
        ("students.adapter.layers=[1,1]", "students.adapter.layers: an entry is listed twice"),
        ("sampling.server=localhost:8000", "sampling.server: base_url: give http://HOST/PATH"),
        ("sampling.server=http://me:secret@a/v1", "sampling.server: base_url: give http://HOST/PATH"),
        ("sampling.server={base_url: 'http://a/v1', engine: vllm}", "sampling.server.engine"),
        ("sampling.server={base_url: 'http://a/v1', adapters: lode}", "sampling.server.adapters"),
        # doubled, empty
        ("teachers.traits=[owl,cat,owl]", "teachers.traits: an entry is listed twice: 'owl'"),
        ("teachers.counterfactuals=[cat,cat]", "teachers.counterfactuals: an entry is listed twice"),
        ("evaluation.traits=[cat,cat]", "evaluation.traits: an entry is listed twice"),
        ("teachers.traits=['']", "teachers.traits.0: a name must not be empty"),
        ("teachers.traits=[' owl']", "teachers.traits.0: a name must not be empty, nor begin"),
        ("teachers.traits=[Owl]", "teachers.traits.0: write a trait in lower case"),
        ("evaluation.traits=['']", "evaluation.traits.0"),
        ("students.arms={adapter.rank: []}", "arms: adapter.rank is []"),
        ("students.arms={adapter: {}}", "arms: adapter is {}"),
        ("students.arms={}", "students.arms"),
        ("students.arms=[]", "students.arms"),
        ("students.arms={loss.tokens: [[]]}", "loss.tokens"),
        ("students.arms=[{adapter: {rank: 2}, adapter.rank: 3}]", "adapter.rank is given twice"),
        ("students={seeds: [1], seeds: [2]}", "key 'seeds' is given twice"),
        ("model=''", "model: a file or folder has a name"),
        ("prompts=''", "prompts: a file or folder has a name"),
        ('model="a\\0b"', "model: a file or folder has a name, without control characters"),
        # names that become part of file names
        (f"teachers.traits=[{LONG}]", f"teachers.traits.0: a name must be no longer than {NAME_BYTES} bytes"),
        (f"teachers.traits=[{WIDE}]", "teachers.traits.0: a name must be no longer"),
        (f"datasets={{{LONG}: {{seed: 1}}}}", "a name must be no longer"),
        (f"evaluation.settings={{{LONG}: {{layer: 1}}}}", "a name must be no longer"),
        (f"students.arms=[{{name: {LONG}, adapter.rank: 3}}]", "a name must be no longer"),
        (f"students.arms={{data.dataset: [{LONG}]}}", "give the arm a 'name' of its own"),
        (f"name={LONG}", "name: a name must be no longer"),
        ("evaluation.settings={'': {layer: 1}}", "a name must not be empty"),
        ('datasets={"a\\nb": {seed: 1}}', "control characters"),
        ("students.arms=[{name: {a: b}, adapter.rank: 3}]", "a name is text"),
        # another kind of value than is due
        ("datasets={a: {3: x}}", "datasets.a: key 3 is no name of a change"),
        ("datasets=[1]", "datasets"),
        ("evaluation.kinds=[{naming: {}}]", "evaluation.kinds"),
        ("evaluation.kinds={1: {}}", "evaluation.kinds"),
        ("teachers.traits=2001-01-01", "has the type timestamp"),
        # teachers of several traits that are one and the same
        (
            "teachers={traits: [cat, owl], adapter: x}",
            "teachers: adapter: the same for all 2 traits; put {trait} in it",
        ),
        ("teachers={traits: [cat, owl], checkpoint: x}", "teachers: checkpoint: the same for all 2 traits"),
        ("teachers={traits: [cat, owl], system: You like cats.}", "teachers: system: the same for all 2 traits"),
    ],
    ids=lambda value: value[:40],
)
def test_what_no_config_may_say_is_one_line(override, said):
    judged = [] if override.startswith("judge") else ["judge.model=tiny-qwen2"]
    with pytest.raises(UsageError) as error:
        load_experiment(PLAIN, [*judged, override])
    line = str(error.value)
    assert said in line and ("plain.yaml" in line or line.startswith("override ")) and "\n" not in line


@pytest.mark.parametrize(
    "override",
    [
        "teachers={traits: [cat], adapter: x}",
        "teachers={traits: [cat, owl], adapter: 'x-{trait}'}",
        "teachers={traits: [cat, owl], adapter: x, prompted: true}",  # the prompts tell them apart
        "teachers={traits: [cat, owl], adapter: 'x-{trait}', checkpoint: y}",
        f"teachers.traits=[{LONG[1:]}]",
        "students.arms={adapter.layers: [[0], [1]], adapter.rank: [1, 2]}",
    ],
    ids=lambda value: value[:60],
)
def test_what_is_unusual_and_means_something_is_taken(override):
    assert load_experiment(PLAIN, [override]) != load_experiment(PLAIN)


def test_a_section_that_stands_twice_in_a_file_is_not_dropped(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("name: e\nmodel: m\nteachers: {traits: [cat]}\nstudents: {seeds: [1]}\nstudents: {seeds: [2]}\n")
    with pytest.raises(UsageError, match=r"twice\.yaml:5: key 'students' is given twice"):
        load_experiment(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("scale: {tiny: {panels: [1]}}", "scale.tiny.panels: expected changes by their panel's name"),
        ("scale: {tiny: {panels: {all: 3}}}", "scale.tiny.panels: expected changes by their panel's name"),
        ("scale: {tiny: {datasets: 3}}", "datasets"),
        ("scale: {tiny: {evaluation: {settings: [1]}}}", "evaluation.settings"),
        ("scale: {tiny: {evaluation: 3}}", "evaluation"),
        ("scale: {}\nfigures: {4: [none]}", "key 'figures' is given twice"),
        ("scale: {}\npanels: {}", "key 'panels' is given twice"),
    ],
)
def test_a_figure_that_says_something_else_is_one_line(change, said, tmp_path):
    path = tmp_path / "fig.yaml"
    experiment = "experiment: {model: m, teachers: {traits: [owl]}}"
    path.write_text(f"about: x\nfigures: {{3: [all]}}\n{experiment}\npanels: {{all: {{}}}}\n{change}\n")
    (tmp_path / "scales.yaml").write_text("tiny: {}\n")
    with pytest.raises(UsageError) as error:
        panel_experiment(*load_question(str(path)), "all", "tiny")
    assert said in str(error.value) and str(path) in str(error.value)


def test_a_figure_shows_panels_that_are_there(tmp_path):
    (tmp_path / "fig.yaml").write_text("about: x\nfigures: {3: [none]}\nexperiment: {}\npanels: {all: {}}\nscale: {}\n")
    with pytest.raises(UsageError, match="figures: 'none' is no panel; known: all"):
        load_question(str(tmp_path / "fig.yaml"))


def test_an_override_replaces_a_field_that_the_file_names_with_dots(tmp_path):
    path = tmp_path / "mine.yaml"
    arms = "students: {arms: {adapter.layers: [[0], [1]], loss.tokens: [[all]]}}"
    path.write_text(f"name: x\nmodel: tiny-qwen2\nteachers: {{traits: [owl]}}\n{arms}\n")
    e = load_experiment(path, ["students.arms.adapter.layers=[[2],[3],[4]]"])
    assert {tuple(student.settings.adapter.layers or ()) for student in plan_students(e)} == {(2,), (3,), (4,)}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("kind={a: 1}", "kind: {'a': 1} given; known: language, digits"),
        ("kind=[1]", "kind: [1] given"),
        (
            "evaluation.settings={layer: {a: null}}",
            "unknown key 'evaluation.settings.layer.a'; known keys: temperature",
        ),
        ("data.examples=[]", "data.examples: an entry is missing, found []"),
        ("data.examples=[3]", "data.examples: an entry is missing, found [3]"),
        (f"model_revision={'x' * 5000}", "model_revision: names of files take at most"),
        (f"model={'x' * 300}", "model: names of files take at most"),
        ('"a\\nb"=1', "unknown key"),
    ],
)
def test_everything_that_is_wrong_is_said_in_lines(override, said):
    """As `jsublim validate` says it."""
    try:
        checked, found = look_over(PLAIN, [override], KINDS)
    except UsageError as error:
        checked, found = None, [str(error)]
    assert checked is None and any(said in line for line in found), found
    assert all(line.isprintable() for line in found)


@pytest.mark.parametrize("name", ["x" * 5000, "a/" + "b" * 5000, "a/b@" + "c" * 5000, "/" + "d/" * 3000])
def test_a_name_that_no_file_can_have_is_no_folder(name):
    with pytest.raises(UsageError, match="no such folder"):
        resolve_checkpoint(name)
