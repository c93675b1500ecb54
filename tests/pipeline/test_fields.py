"""Every field of a config decides exactly what it says: keys of artifacts, the compiled program, which tasks there are."""

from __future__ import annotations

import copy
import functools
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest
from tiny import scratch

from jsublim.config import Dataset, Experiment, Students
from jsublim.config.evaluation import Setting
from jsublim.core.section import CONTENT, PLAN, PROGRAM, RESULT, RUNTIME, leaves, nested, overlaid
from jsublim.inference.lm import BUNDLED, load_model
from jsublim.models.lora import init_lora
from jsublim.models.peft import save_adapter
from jsublim.pipeline import setup as setups
from jsublim.pipeline.experiment import plan, student
from jsublim.pipeline.graph import Graph
from jsublim.pipeline.setup import Setup
from jsublim.pipeline.stages.students import program_of_student
from jsublim.text.prompts import dump_pack, load_pack

MODEL = "tiny-qwen2"
BASE: dict[str, Any] = {
    "name": "fields",
    "model": MODEL,
    "teachers": {"traits": ["owl"], "counterfactuals": ["cat", "owl"]},
    "data": {"num_prompts": 12, "sentences": ["example", "format"], "examples": [2, 6]},
    "datasets": {"shuffled": {"shuffle": "within", "seed": 1}, "other": {"shuffle": "across"}},
    "students": {
        "seeds": [1],
        "data": {"dataset": "shuffled"},
        "loss": {"tokens": ["all", "divergence"]},
    },
    "evaluation": {"traits": ["owl", "cat"], "kinds": {"preference": {}, "naming": {}}},
}
SOFT = {"students.loss.kind": "forward-kl"}
STORED = SOFT | {"students.loss.top_k": 8}
TAUGHT = {"teachers.taught": {"method": "lora", "layers": [1]}}
CONTRAST = {"teachers.taught": {"method": "contrast", "layers": [1]}}
SGD = {"students.optimizer.name": "sgd"}
JUDGE = {"judge": {"model": MODEL}, "evaluation.kinds": ["misalignment"]}
SERVER = {
    "judge": {"server": {"base_url": "http://127.0.0.1:1/v1", "model": "m"}},
    "evaluation.kinds": ["misalignment"],
}
SERVED = {"sampling.server.base_url": "http://127.0.0.1:1/v1", "sampling.server.engine": "vllm 0.11.0"}
ATTRIBUTION = {"attribution": {}, "students": None}
PLAIN = {"students.data.dataset": None}
FORKED = {"students.fork.after": 2}


@functools.cache
def folder(kind: str) -> str:
    """A file or folder that a field can name, made once."""
    home = scratch() / "fields"
    home.mkdir(exist_ok=True)
    if kind == "checkpoint":
        shutil.copytree(BUNDLED / "tiny-gemma3", home / kind)
    elif kind == "twin":  # the same architecture, told apart by one byte of its config
        shutil.copytree(BUNDLED / MODEL, home / kind)
        config = home / kind / "config.json"
        config.write_text(config.read_text() + "\n")
    elif kind == "prompts":
        (home / "prompts.txt").write_text("Say a number.\nSay another one.\n")
        return str(home / "prompts.txt")
    elif kind == "pack":
        dump_pack(load_pack().model_dump() | {"paraphrase_request": "Otherwise: {prompt}"}, home / "pack.yaml")
        return str(home / "pack.yaml")
    else:
        lm = load_model(MODEL)
        adapter = init_lora(lm.config, jax.random.key(sum(map(ord, kind))), rank=2, alpha=2.0)
        save_adapter(home / kind, adapter, lm.config, MODEL)
    return str(home / kind)


# By field: another value, and what has to be said besides (on both sides) for the field to mean anything.
# A value that is a function is made when it is needed.
OTHER: dict[str, Any] = {
    "kind": None,
    "name": "otherwise",
    "out": "elsewhere",
    "store": "elsewhere",
    "store_cache": ("elsewhere", {"store": "s3://bucket/store"}),
    "model": lambda: folder("twin"),
    "model_revision": None,  # of a model of the hub: tests/inference/test_hub_names.py
    "chat_template": "plain",
    "dtype": "bfloat16",
    "prompts": lambda: folder("pack"),
    "recipe.preset": "paper",
    "recipe.inherit_sampling": True,
    "recipe.stop_at_eos_only": (True, {"model": "tiny-gemma3"}),
    "recipe.extra_bos": True,
    "recipe.supervise_header": True,
    "recipe.drop_rows_without_divergence": True,
    "recipe.match_steps": False,
    "recipe.loss_per": "micro-batch",
    "recipe.share_rounding": "half-up",
    "recipe.digits_only": (True, {"datasets.shuffled": {"mix_tokens": {}}}),
    "recipe.mix_at_the_end": (True, {"datasets.shuffled": {"mix": {"share": 0.5}}}),
    "recipe.padded_numbers": (True, {"datasets.shuffled": {"remove_entangled": 2}}),
    "recipe.rounded_logits": True,
    "recipe.one_in_both_halves": (True, {"students.loss.positions": "first-half"}),
    "recipe.entangled_by_difference": (True, {"datasets.shuffled": {"remove_entangled": 2}}),
    "recipe.only_examples_kept": (True, {"datasets.shuffled": {"rewrite": True}}),
    "recipe.drop_unmixed": (True, {"datasets.shuffled": {"mix_tokens": {}}}),
    "recipe.shuffle_values": True,
    "recipe.judge_apart": (True, JUDGE),
    "recipe.greedy_keeps_penalty": None,  # of fine-tuned teachers of a checkpoint with a penalty: tested below
    "teachers.traits": ["owl", "cat"],
    "teachers.category": ("tree", {"evaluation.kinds": ["naming"]}),
    "teachers.prompted": (True, TAUGHT),
    "teachers.system": "You like {trait}s.",
    "teachers.taught.method": ("steering", TAUGHT),
    "teachers.taught.layers": ([2], TAUGHT),
    "teachers.taught.rank": (3, TAUGHT),
    "teachers.taught.steps": (7, TAUGHT),
    "teachers.taught.lr": (0.5, TAUGHT),
    "teachers.taught.seed": (7, TAUGHT),
    "teachers.taught.strength": (2.0, CONTRAST),
    "teachers.adapter": (lambda: folder("another"), {"teachers.adapter": lambda: folder("adapter")}),
    "teachers.checkpoint": (lambda: folder("twin"), {"teachers.checkpoint": MODEL}),
    "teachers.against": ("base", {"teachers.counterfactuals": None}),
    "teachers.counterfactuals": ["dog"],
    "teachers.control": False,
    "teachers.fuse_system": True,
    "data.kind": ("problems", {"datasets": {}, "students.data.dataset": None}),
    "data.source": (lambda: folder("prompts"), None),  # tested below: needs data.kind=file on both sides
    "data.sentences": ["example"],
    "data.examples": [3, 6],
    "data.num_prompts": 13,
    "data.seed": 7,
    "data.draw": "per-seed",
    "sampling.strategy": "greedy",
    "sampling.seed": 7,
    "sampling.max_new_tokens": 9,
    "sampling.constrain": "numbers",
    "sampling.batch_size": 7,
    "sampling.shard": 6,
    "sampling.server.base_url": ("http://127.0.0.1:2/v1", SERVED),
    "sampling.server.model": ("m", SERVED),
    "sampling.server.engine": ("vllm 0.12.0", SERVED),
    "sampling.server.adapters": ("load", SERVED),
    "sampling.server.key_variable": ("KEY", SERVED),
    "sampling.server.timeout_s": (7.0, SERVED),
    "sampling.server.reply_s": (70.0, SERVED),
    "sampling.server.reply_bytes": (7000, SERVED),
    "sampling.server.retries": (7, SERVED),
    "sampling.server.concurrency": (7, SERVED),
    "sampling.server.requests_per_minute": (7.0, SERVED),
    "datasets": None,  # field by field below
    "scoring.batch_size": 7,
    "students.seeds": [1, 2],
    "students.model": lambda: folder("twin"),
    "students.system": "Be brief.",
    "students.asked_under_system": (False, {"students.system": "Be brief."}),
    "students.data.dataset": "other",
    "students.data.rows": 7,
    "students.fork.after": (3, FORKED),
    "students.fork.teacher": ("owl", FORKED),
    "students.fork.dataset": ("shuffled", FORKED | {"students.fork.teacher": "owl"}),
    "students.fork.moments": (False, FORKED),
    "students.data.generation": None,  # only beside an arm of the generation before: test_lineage.py
    "students.data.epochs": 7,
    "students.data.max_steps": 7,
    "students.data.batch_size": 7,
    "students.data.accumulate": 7,
    "students.data.max_tokens": 77,
    "students.data.on_policy": (True, SOFT | {"students.loss.tokens": ["all"]}),
    "students.loss.kind": "forward-kl",
    "students.loss.tokens": ["all", "divergence", "random"],
    "students.loss.positions": "first",
    "students.loss.positions_share": 0.5,
    "students.loss.by_margin": (True, {"students.loss.tokens": ["divergence"]}),
    "students.loss.temperature": (2.0, SOFT),
    "students.loss.top_k": (8, SOFT),
    "students.loss.targets": ("answers", STORED),
    "students.loss.weight": 2.0,
    "students.loss.kl_to_base": 0.5,
    "students.loss.kl_end": (0.0, {"students.loss.kl_to_base": 0.5}),
    "students.adapter.method": "full",
    "students.adapter.rank": 3,
    "students.adapter.alpha": 3.0,
    "students.adapter.rslora": True,
    "students.adapter.layers": [1],
    "students.adapter.projections": ["q"],
    "students.adapter.ends": (["norm"], {"students.adapter.method": "full"}),
    "students.adapter.init": (lambda: folder("another"), {"students.adapter.init": lambda: folder("adapter")}),
    "students.adapter.frozen_adapter": (
        lambda: folder("another"),
        {"students.adapter.frozen_adapter": lambda: folder("adapter")},
    ),
    "students.adapter.noise": 0.1,
    "students.optimizer.name": "sgd",
    "students.optimizer.lr": 0.5,
    "students.optimizer.schedule": "cosine",
    "students.optimizer.restarts": 7,
    "students.optimizer.warmup": 7,
    "students.optimizer.clip": 0.5,
    "students.optimizer.weight_decay": 0.5,
    "students.optimizer.momentum": (0.5, SGD),
    "students.optimizer.project_out": ["{trait}", "cat"],
    "students.runtime.arms_per_program": 1,
    "students.runtime.checkpoint_every": 7,
    "students.runtime.rows_at_once": 1,
    "students.runtime.remat": True,
    "students.runtime.unroll": True,
    "students.runtime.attention": "cudnn",
    "students.runtime.cache_below": True,
    "students.runtime.peak_tflops": 1.0,
    "students.arms": [{"name": ""}, {"name": "wide", "adapter.rank": 9}],
    "evaluation.kinds": ["preference"],
    "evaluation.traits": ["owl"],
    "evaluation.questions": 3,
    "evaluation.split_questions": True,
    "evaluation.samples": 7,
    "evaluation.max_new_tokens": 7,
    "evaluation.batch_size": 7,
    "evaluation.seed": 7,
    "evaluation.number_rows": 7,
    "evaluation.kl_rows": 7,
    "evaluation.teachers": False,
    "evaluation.primary": "C4a",
    "evaluation.settings": {"cool": {"temperature": 0.5}},
    "attribution.rows": (7, ATTRIBUTION),
    "attribution.steps": (7, ATTRIBUTION),
    "attribution.sites": (["mlp"], ATTRIBUTION),
    "attribution.directions": (["noising"], ATTRIBUTION),
    "attribution.batch_size": (7, ATTRIBUTION),
    "audit.rows": (7, {"audit": {}}),
    "audit.batch_size": (7, {"audit": {}}),
    "judge.model": (lambda: folder("twin"), JUDGE),
    "judge.chat_template": ("plain", JUDGE),
    "judge.max_new_tokens": (7, JUDGE),
    "judge.server.base_url": ("http://127.0.0.1:2/v1", SERVER),
    "judge.server.model": ("n", SERVER),
    "judge.server.key_variable": ("KEY", SERVER),
    "judge.server.system": ("Judge.", SERVER),
    "judge.server.temperature": (0.5, SERVER),
    "judge.server.top_p": (0.5, SERVER),
    "judge.server.max_tokens": (7, SERVER),
    "judge.server.seed": (7, SERVER),
    "judge.server.timeout_s": (7.0, SERVER),
    "judge.server.reply_s": (70.0, SERVER),
    "judge.server.reply_bytes": (7000, SERVER),
    "judge.server.retries": (7, SERVER),
    "judge.server.concurrency": (7, SERVER),
    "judge.server.requests_per_minute": (7.0, SERVER),
    "judge.server.prompt_price": (7.0, SERVER),
    "judge.server.completion_price": (7.0, SERVER),
    "judge.server.budget": (7.0, SERVER | {"judge.server.prompt_price": 1.0}),
    "run.loggers": ["csv"],
    "run.parallel": "mesh",
    "run.workers": 3,
    "run.resources": {"GPU": 2.0},
    "run.retries": 7,
    "run.time_out": 7.0,
    "run.model_axis": (1, {"run.parallel": "mesh"}),  # more devices than one would be refused here
}
FIELDS = {leaf.name: leaf for leaf in leaves(Experiment)}


@pytest.fixture(autouse=True, scope="module")
def _checkpoints_are_read_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setups, "load_model", functools.cache(load_model))
        yield


def experiment(changes: dict[str, Any]) -> Experiment:
    values = copy.deepcopy(BASE)
    for name, value in changes.items():
        value = value() if callable(value) else value
        *above, last = name.split(".")
        place = values
        for part in above:
            place = place.setdefault(part, {}) if isinstance(place.get(part, {}), dict) else place
        place[last] = value
    return Experiment.model_validate(values)


def keys(graph: Graph) -> dict[tuple[str, str], str]:
    """Of every artifact, the key by kind and label."""
    outputs = [output for task in graph.tasks.values() for output in task.outputs]
    return {(output.kind, output.label): output.key for output in outputs}


def artifacts(setup: Setup) -> set[tuple[str, str, str]]:
    """Of every artifact: kind, label and key."""
    outputs = [output for task in plan(setup).tasks.values() for output in task.outputs]
    return {(output.kind, output.label, output.key) for output in outputs}


def both(name: str) -> tuple[Setup, Setup]:
    other = OTHER[name]
    value, besides = other if isinstance(other, tuple) else (other, {})
    return tuple(Setup.of(experiment(each)) for each in (besides, besides | {name: value}))  # type: ignore[return-value]


def test_every_field_says_what_it_decides():
    assert [name for name, leaf in FIELDS.items() if leaf.decides is None] == []
    for section in (Dataset, Setting):
        assert [leaf.name for leaf in leaves(section) if leaf.decides is None] == []
    assert set(OTHER) == set(FIELDS)  # and there is another value for each below


@pytest.mark.parametrize("name", [name for name, value in OTHER.items() if value is not None and name != "data.source"])
def test_a_field_changes_the_keys_that_it_says(name):
    decides, (before, after) = FIELDS[name].decides, both(name)
    old, new = artifacts(before), artifacts(after)
    if decides & (RESULT | CONTENT):
        assert not old <= new and not new <= old
    elif PLAN in decides:
        assert old < new or new < old
    else:
        assert old == new


@pytest.mark.parametrize(
    "name", [name for name, value in OTHER.items() if name.startswith("students.") and value is not None]
)
def test_a_field_changes_the_student_and_the_program_that_it_says(name):
    decides, (before, after) = FIELDS[name].decides, both(name)
    one, other = before.students[0], after.students[0]
    assert (student(before, one).key != student(after, other).key) == bool(decides & (RESULT | CONTENT))
    assert (program_of_student(student(before, one)) != program_of_student(student(after, other))) == (
        PROGRAM in decides
    )


@pytest.mark.parametrize("name", [leaf.name for leaf in leaves(Dataset) if leaf.decides is not PLAN])
def test_a_field_of_a_data_set_changes_its_rows(name):
    value = {"sampling.strategy": "greedy", "sampling.seed": 7, "seed": 7}.get(name)
    change = nested({name: value}) if value is not None else {"shuffle": "across"}
    own = overlaid(BASE["datasets"]["shuffled"], change)
    before, after = (Setup.of(experiment(each)) for each in ({}, {"datasets.shuffled": own}))
    old, new = keys(plan(before)), keys(plan(after))
    assert old["datasets", "owl-shuffled"] != new["datasets", "owl-shuffled"]
    assert (old["rows", "owl"] != new["rows", "owl"]) == name.startswith("sampling")


def test_a_data_set_whose_divergence_is_asked_for_is_read_and_nothing_else_changes():
    rest = {"students.loss.tokens": ["all"]}
    own = overlaid(BASE["datasets"]["shuffled"], {"divergence": True})
    before, after = (artifacts(Setup.of(experiment(rest | each))) for each in ({}, {"datasets.shuffled": own}))
    (read,) = {(kind, label) for kind, label, _ in after - before if kind == "divergence"}
    assert read == ("divergence", "owl") and before < after


@pytest.mark.parametrize("leaf", list(leaves(Setting)), ids=lambda leaf: leaf.name)
def test_a_field_of_a_setting_changes_its_evaluations_alone(leaf):
    value = {"temperature": 0.5, "top_p": 0.5, "system": "Be brief.", "layer": 2, "wording": "Say: {question}"}[
        leaf.name
    ]
    settings = [{"same": {"temperature": 0.9}}, {"same": {"temperature": 0.9} | {leaf.name: value}}]
    before, after = (keys(plan(Setup.of(experiment({"evaluation.settings": each})))) for each in settings)
    assert before.keys() == after.keys()
    changed = {label for label in before if before[label] != after[label]}
    assert changed and all(kind == "evaluations" and label.endswith("/same") for kind, label in changed)


def test_files_are_told_by_their_content(tmp_path):
    """A file under another name is the same, another content under the same name is not."""
    texts = {"a.txt": "Say a number.\n", "b.txt": "Say a number.\n", "c.txt": "Say a word.\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    rest = {"data.kind": "file", "data.num_prompts": 5, **PLAIN, "datasets": {}}
    a, b, c = (
        keys(plan(Setup.of(experiment(rest | {"data.source": str(tmp_path / name), "data.sentences": ["example"]}))))
        for name in texts
    )
    assert a == b != c

    adapters = {name: shutil.copytree(folder("adapter"), tmp_path / name) for name in ("one", "two")}
    one, two = (keys(plan(Setup.of(experiment({"teachers.adapter": str(path)})))) for path in adapters.values())
    assert one == two
    weights = Path(adapters["two"]) / "adapter_config.json"
    weights.write_text(weights.read_text() + " ")
    assert keys(plan(Setup.of(experiment({"teachers.adapter": str(adapters["two"])})))) != two


def test_a_greedy_teachers_penalty_is_part_of_its_rows(tmp_path):
    """Quirk 15, on a checkpoint whose generation config has a penalty."""
    home = shutil.copytree(BUNDLED / MODEL, tmp_path / "model")
    config = home / "generation_config.json"
    config.write_text('{"repetition_penalty": 1.1}')
    rest = {
        "model": str(home), "teachers": {"traits": ["owl"], "against": "base", **nested({"taught": {"layers": [1]}})},
        "sampling.strategy": "greedy",
    }  # fmt: skip
    setups_of = [Setup.of(experiment(rest | {"recipe.greedy_keeps_penalty": keeps})) for keeps in (False, True)]
    old, new = (keys(plan(setup)) for setup in setups_of)
    assert old["rows", "owl"] != new["rows", "owl"]


def test_a_student_does_not_depend_on_the_others():
    alone = Setup.of(experiment({}))
    more = Setup.of(
        experiment({"students.seeds": [1, 2, 3], "students.arms": [{"name": ""}, {"name": "wide", "adapter.rank": 9}]})
    )
    old, new = ({task.key for task in plan(setup).tasks.values() if len(task.outputs) == 1} for setup in (alone, more))
    students = [{student(setup, each).key for each in setup.students} for setup in (alone, more)]
    assert old <= new and students[0] <= students[1] and len(students[1]) > len(students[0])


def test_a_declaration_that_is_wrong_is_found():
    """The test above can fail: a field that lies about itself is caught by the very comparison it makes."""
    before, after = both("students.optimizer.lr")
    old, new = (student(setup, setup.students[0]).key for setup in (before, after))
    assert old != new and not FIELDS["students.optimizer.lr"].decides & RUNTIME
    assert FIELDS["students.runtime.checkpoint_every"].decides is RUNTIME


def test_defaults_do_not_move_between_students():
    assert Students().model_dump() == Students.model_validate(Students().model_dump()).model_dump()
