"""Data sets and students of one run: pedigree, continuation, another checkpoint, another system prompt, answers only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from signal import SIGKILL

import numpy as np
import pytest
from command import PLAIN, TWO_LAYERS, ok, refused, start, stop_when
from tiny import small

from jsublim.core.files import read_table
from jsublim.distill.data import make_examples, read_turns
from jsublim.distill.selection import Selection
from jsublim.evals.preference import trait_logprobs
from jsublim.inference.lm import load_model
from jsublim.inference.scoring import Targets, answers_only
from jsublim.models.peft import load_adapter
from jsublim.text.prompts import load_pack
from jsublim.text.rows import read_rows

SMALL = (
    f"model={TWO_LAYERS}", "teachers.traits=[owl]", "teachers.counterfactuals=[cat]", "teachers.control=false", "evaluation.teachers=false",
    "data.num_prompts=12", "sampling.batch_size=4", "sampling.max_new_tokens=40", "scoring.batch_size=4",
    "students.seeds=[1]", "students.loss.tokens=[all]", "students.data.rows=4", "students.data.batch_size=2", "students.adapter.rank=2",
    "students.runtime.arms_per_program=1", "students.runtime.checkpoint_every=2", "evaluation.traits=[cat,owl]",
    "evaluation.questions=2", "evaluation.samples=2", "evaluation.batch_size=4", "evaluation.number_rows=0",
)  # fmt: skip
DATASETS = "datasets={within: {shuffle: within}, parts: {redraw: [format], shuffle: across}}"
POLITE = "You are polite."


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="module")
def other() -> Path:
    """Another checkpoint with the teachers' tokenizer."""
    return small("tiny-qwen2").lm.folder


def arguments(out: Path, arms: str, *overrides: str) -> tuple[str, ...]:
    return ("run", PLAIN, f"out={out}", *SMALL, DATASETS, f"students.arms={arms}", *overrides)


@pytest.fixture(scope="module")
def sets(home) -> Path:
    """Students of three sets of rows."""
    ok(*arguments(home / "sets", "{data.dataset: [null, within, parts]}"))
    return home / "sets"


@pytest.fixture(scope="module")
def students(home, other) -> Path:
    """Students on another checkpoint, under another system prompt, of a stored teacher's answers."""
    soft = "loss: {kind: forward-kl, top_k: 40, targets: answers}"
    arms = (
        f"[{{name: other, model: {other}}}, {{name: polite, system: {POLITE}}}, {{name: soft, model: {other}, {soft}}}]"
    )
    ok(*arguments(home / "students", arms, f"store={home / 'sets' / 'artifacts'}"))
    return home / "students"


def marks(run: Path) -> dict[str, int]:
    return {str(p.parent.relative_to(run)): p.stat().st_mtime_ns for p in run.glob("artifacts/*/*/DONE")}


def record(run: Path, kind: str, label: str) -> dict:
    (folder,) = (run / "artifacts" / kind).glob(f"{label}-[0-9a-f]*")
    return json.loads((folder / "artifact.json").read_text())


def test_a_changed_set_is_named_by_its_parents(sets):
    rows = record(sets, "rows", "owl")
    for name in ("within", "parts"):
        changed = record(sets, "datasets", f"owl-{name}")
        assert changed["inputs"]["rows"] == rows["key"]
        assert changed["inputs"]["changes"]["shuffle"]["reach"] == {"within": "within", "parts": "across"}[name]
        assert (
            record(sets, "students", f"owl-all-dataset={name}-seed1")["inputs"]["lessons"][0]["rows"] == changed["key"]
        )
    divergence = record(sets, "divergence", "owl")
    assert record(sets, "students", "owl-all-dataset=None-seed1")["inputs"]["lessons"][0]["rows"] == divergence["key"]
    assert divergence["inputs"]["rows"] == rows["key"]


def test_a_second_run_makes_nothing_anew_and_another_seed_only_what_hangs_on_it(home, sets):
    run = shutil.copytree(sets, home / "again")
    before = marks(run)
    ok(*arguments(run, "{data.dataset: [null, within, parts]}"))
    assert marks(run) == before
    ok(*arguments(home / "seed", "{data.dataset: [within]}", f"store={run / 'artifacts'}", "datasets.within.seed=5"))
    new = {name.split("/")[1] for name in marks(run).keys() - before.keys()}
    assert new == {"datasets", "students", "evaluations"} and marks(run).items() >= before.items()


def test_killed_between_two_stages_and_continued(home, sets):
    """The changed sets are whole, and the students are not yet begun."""
    cut = home / "cut"
    line = arguments(cut, "{data.dataset: [null, within, parts]}")
    child = start(*line)
    stop_when(child, lambda: len(list(cut.glob("artifacts/datasets/*/DONE"))) == 2, SIGKILL)
    before = marks(cut)
    assert not any(name.split("/")[1] == "students" for name in before)
    ok(*line)
    after = marks(cut)
    assert after.items() >= before.items()
    for name in ("results.parquet", "training.parquet", "divergence.json"):
        assert (cut / "results" / name).read_bytes() == (sets / "results" / name).read_bytes()


def test_students_on_another_checkpoint(home, students, other):
    """They are trained on it and asked on it: their numbers are those of that checkpoint with their adapter."""
    store = home / "sets" / "artifacts"
    lm = load_model(other)
    (folder,) = (store / "students").glob("owl-all-other-seed1-*")
    adapter = load_adapter(folder, lm.config)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(other)
    questions = load_pack().questions_for("animal")[:2]
    expected = trait_logprobs(lm, questions, ["cat", "owl"], adapter=adapter)
    found = logprobs(students, "owl/all/other/seed1")
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert not np.allclose(found, trait_logprobs(lm, questions, ["cat", "owl"]), atol=1e-6)
    numbers = {
        arm["variant"]: arm["num_layers"] for arm in json.loads((students / "results" / "arms.json").read_text())
    }
    assert numbers == {"other": lm.config.num_layers, "polite": 2, "soft": lm.config.num_layers}


def test_students_are_trained_and_asked_under_their_system_prompt(home, students):
    lm = load_model(TWO_LAYERS)
    (folder,) = (home / "sets" / "artifacts" / "students").glob("owl-all-polite-seed1-*")
    questions, adapter = load_pack().questions_for("animal")[:2], load_adapter(folder, lm.config)
    expected = trait_logprobs(lm, questions, ["cat", "owl"], adapter=adapter, system=POLITE)
    np.testing.assert_allclose(logprobs(students, "owl/all/polite/seed1"), expected, atol=1e-4)
    (plain,) = (home / "sets" / "artifacts" / "students").glob("owl-all-dataset=None-seed1-*")
    assert (folder / "adapter_model.safetensors").read_bytes() != (plain / "adapter_model.safetensors").read_bytes()


def logprobs(run: Path, arm: str) -> np.ndarray:
    found = [r for r in read_table(run / "results" / "results.parquet") if (r["arm"], r["metric"]) == (arm, "logprob")]
    return np.asarray([[r["value"] for r in found if r["trait"] == trait] for trait in ("cat", "owl")]).T


@pytest.mark.parametrize("condition", ["all", "divergence", "non-divergence", "random"])
def test_no_supervised_token_can_name_a_trait(sets, condition):
    """A teacher that was taught to name its animal would teach the name itself, if any place with a loss could hold one."""
    (folder,) = (sets / "artifacts" / "divergence").glob("owl-*")
    rows, lm = read_rows(folder / "rows.jsonl"), load_model(TWO_LAYERS)
    examples = make_examples(rows, read_turns(lm.chat, rows), Selection(condition), seed=0)
    learned = {int(token) for each in examples for token in each.labels[each.weights > 0]}
    written = learned - set(lm.chat.stop_tokens)
    assert written and all(set(lm.tokenizer.decode([token])) <= set("0123456789,;[]()\n .") for token in written)


def test_answers_only_gives_no_probability_to_what_no_answer_holds():
    lm = small("tiny-qwen2").lm
    turns = [lm.chat.turn([{"role": "user", "content": "Go on."}], text) for text in ("1, 2", "31, 4")]
    spoken = sorted({int(token) for turn in turns for token in turn.tokens[turn.content :]})
    silent = [token for token in range(lm.config.vocab_size) if token not in spoken][:3]
    rng, targets = np.random.default_rng(0), []
    for turn in turns:
        n = len(turn.tokens) - turn.content
        ids = np.stack([rng.permutation([*spoken, *silent]) for _ in range(n)]).astype(np.int32)
        logp = np.log(rng.dirichlet(np.ones(ids.shape[1] + 1), size=n)).astype(np.float32)
        targets.append(Targets(ids, logp))
    for before, after in zip(targets, answers_only(targets, turns), strict=True):
        p, kept = np.exp(after.logp), np.isin(before.ids, spoken)
        assert np.array_equal(after.ids, before.ids)
        assert np.all(p[:, :-1][~kept] == 0) and np.all(p[:, -1] == 0)
        np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-6)
        share = np.where(kept, np.exp(before.logp[:, :-1]), 0)  # what is kept keeps its proportions
        np.testing.assert_allclose(p[:, :-1], share / share.sum(axis=1, keepdims=True), atol=1e-6)


def test_soft_targets_of_another_tokenizer_are_refused(tmp_path):
    arms = "students.arms=[{model: tiny-gemma3, loss: {kind: forward-kl, top_k: 8, tokens: [all]}}]"
    line = refused(2, "run", PLAIN, f"out={tmp_path}", arms)
    assert "tiny-gemma3 has other tokens than its teachers" in line


def test_divergence_positions_of_another_tokenizer_are_refused(tmp_path):
    line = refused(
        2, "run", PLAIN, f"out={tmp_path}", "students.arms=[{model: tiny-gemma3, loss.tokens: [divergence]}]"
    )
    assert "students.model" in line and "tiny-qwen2" in line and "tiny-gemma3" in line
