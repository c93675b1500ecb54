"""The single commands, on the bundled checkpoint: one after another, again, and where something is already."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import made_by_commands
import numpy as np
import pytest
from command import ROOT, TWO_LAYERS, contents, ok, refused
from made_by_commands import DIVERGENCE, FINETUNE, GENERATE, LAYER0, artifact_of, finetune

from jsublim.core.files import read_table
from jsublim.inference.lm import load_model
from jsublim.text.prompts import load_pack
from jsublim.text.rows import read_rows

KINDS = ("all", "divergence", "non-divergence", "random", "matched")


@pytest.fixture(scope="module")
def home() -> Path:
    return made_by_commands.home()


@pytest.fixture(scope="module")
def rows() -> Path:
    return made_by_commands.cat_rows()


@pytest.fixture(scope="module")
def divergent() -> Path:
    return made_by_commands.cat_divergence()


@pytest.fixture(scope="module")
def student() -> Path:
    return made_by_commands.layer0()


def changed(home: Path) -> dict[Path, tuple[int, int]]:
    """Every result's size and time of change."""
    return {
        path: (path.stat().st_size, path.stat().st_mtime_ns)
        for path in home.rglob("*")
        if path.is_file() and "programs" not in path.parts
    }


def test_prompts_sample(home):
    out = home / "prompts.jsonl"
    ok("prompts", "sample", "--num-prompts", 5, "--seed", 7, "--out", out)
    ok("prompts", "sample", "--num-prompts", 5, "--seed", 7, "--out", home / "same.jsonl")
    ok("prompts", "sample", "--num-prompts", 5, "--seed", 8, "--out", home / "other.jsonl")
    sampled = read_rows(out, ("prompt",))
    assert len(sampled) == 5 and all(list(row) == ["prompt"] for row in sampled)
    assert out.read_bytes() == (home / "same.jsonl").read_bytes() != (home / "other.jsonl").read_bytes()
    before = out.read_bytes()
    assert str(out) in refused(2, "prompts", "sample", "--num-prompts", 5, "--out", out)
    assert out.read_bytes() == before


def test_generate(home, rows):
    made = read_rows(rows)
    assert 0 < len(made) <= 16 and all(list(row) == ["prompt", "completion"] for row in made)
    raw = read_rows(artifact_of(home / "cat", "rows") / "raw.jsonl")
    assert [{k: row[k] for k in ("prompt", "completion")} for row in raw if row["reject"] is None] == made
    ok("prompts", "sample", "--num-prompts", 16, "--out", home / "cat-prompts.jsonl")
    assert [row["prompt"] for row in raw] == [r["prompt"] for r in read_rows(home / "cat-prompts.jsonl", ("prompt",))]
    assert str(rows) in ok(*GENERATE, "--trait", "cat", "data.num_prompts=16", "--out", rows).out


def test_generate_from_other_teachers(home, rows):
    pack = load_pack()
    own = pack.system_prompt("cat", pack.category_of("cat"))
    ok(*GENERATE, "--trait", "cat", f"teachers.system={own}", "data.num_prompts=16", "--out", home / "own.jsonl")
    assert (home / "own.jsonl").read_bytes() == rows.read_bytes()  # the same teacher by other words
    for name, how in {"control": (), "greedy": ("sampling.strategy=greedy",)}.items():
        ok(*GENERATE, "--control", *how, "data.num_prompts=8", "--out", home / f"{name}.jsonl")
        inputs = json.loads((artifact_of(home / name, "rows") / "artifact.json").read_text())["inputs"]
        assert inputs["teacher"]["system"] is None
        assert inputs["sampling"]["temperature"] == (0.0 if name == "greedy" else 1.0)
    ok(
        *GENERATE,
        "--control",
        "sampling.strategy=greedy",
        "sampling.seed=9",
        "data.num_prompts=8",
        "--out",
        home / "g9.jsonl",
    )
    ok(*GENERATE, "--control", "sampling.seed=9", "data.num_prompts=8", "--out", home / "c9.jsonl")
    read = lambda name: (artifact_of(home / name, "rows") / "raw.jsonl").read_bytes()  # noqa: E731
    assert read("g9") == read("greedy")  # a greedy answer has no randomness
    assert read("c9") != read("control")


def test_divergence(home, rows, divergent):
    found, readings = read_rows(divergent), read_table(home / "cat-divergence.readings.parquet")
    assert [{k: row[k] for k in ("prompt", "completion")} for row in found] == read_rows(rows)
    assert all(
        list(row)
        == ["prompt", "completion", "divergence_positions", "divergence_margins", "matched_positions", "counted_in"]
        for row in found
    )
    assert any(row["divergence_positions"] for row in found)
    for number, (row, kept) in enumerate(zip(found, readings, strict=True)):
        assert kept["row"] == number and kept["teachers"] == ["cat", "dog", "owl"]
        tokens, argmax, margin = (np.asarray(kept[key]) for key in ("tokens", "argmax", "margin"))
        assert argmax.shape == margin.shape == (3, len(tokens)) and np.all(margin >= 0)
        right = argmax == tokens
        assert np.nonzero(right[0] & ~(right[1] & right[2]))[0].tolist() == row["divergence_positions"]


def test_the_tutorials_own_mask_is_learned(home, divergent, tmp_path, monkeypatch):
    """What docs/tutorial.md writes over the divergence tokens of a file is what a student learns: one token of each row."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(), re.DOTALL)
    shutil.copy(divergent, tmp_path / "cat-divergence.jsonl")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    ok(
        *finetune(
            tmp_path / "cat-first.jsonl", tmp_path / "first", "--tokens", "divergence", "students.adapter.layers=[0]"
        )
    )
    lines = read_rows(tmp_path / "first" / "metrics.jsonl", ("step",))
    marked = [row for row in read_rows(tmp_path / "cat-first.jsonl") if row["divergence_positions"]]
    rows_of_steps = [len(marked[i : i + 4]) for i in range(0, len(marked), 4)]
    assert [line["tokens"] for line in lines] == 2 * rows_of_steps and rows_of_steps[0] == 4  # in two epochs


@pytest.mark.parametrize("kind", KINDS)
def test_finetune_on_each_kind_of_token(home, divergent, kind):
    out = home / f"student-{kind}"
    ok(*finetune(divergent, out, "--tokens", kind, *LAYER0))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    data = read_rows(divergent)
    per_epoch = -(-len(data) // 4)
    assert [line["step"] for line in lines] == list(range(2 * per_epoch))
    assert all(line["loss"] > 0 and line["lr"] >= 0 for line in lines)
    assert max(line["lr"] for line in lines) == pytest.approx(1e-3) and lines[-1]["lr"] < 1e-3
    readings = read_table(home / "cat-divergence.readings.parquet")
    every, points = sum(len(row["tokens"]) for row in readings), sum(len(row["divergence_positions"]) for row in data)
    budget = {
        "all": every,
        "divergence": points,
        "random": points,
        "matched": points,
        "non-divergence": every - points,
    }[kind]
    if kind in ("all", "non-divergence"):  # no row is left without a token, so two epochs read each of them twice
        assert sum(line["tokens"] for line in lines) == 2 * budget
    else:
        rows_with = sum(bool(row["divergence_positions"]) for row in data)
        seen, rest = divmod(len(lines), -(-rows_with // 4))
        assert seen * budget <= sum(line["tokens"] for line in lines) <= (seen + (rest > 0)) * budget


def test_an_adapter_is_one_of_peft(student):
    """`peft` puts it on the transformers model, and that computes what we compute."""
    import peft
    import torch
    import transformers

    import jsublim as package

    folder = Path(TWO_LAYERS)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = peft.PeftConfig.from_pretrained(str(student))
    assert (config.r, config.lora_alpha, config.layers_to_transform) == (2, 4, [0])
    tokens = np.random.default_rng(0).integers(5, 900, (2, 11))
    with torch.no_grad():
        plain = base(torch.tensor(tokens)).logits.numpy()
        theirs = peft.PeftModel.from_pretrained(base, str(student)).eval()(torch.tensor(tokens)).logits.numpy()
    lm = package.load_model(TWO_LAYERS)
    ours = np.asarray(lm.logits(tokens, adapter=package.load_adapter(student)))
    scale = np.abs(theirs).max()
    assert np.abs(ours - theirs).max() < 1e-4 * scale < np.abs(plain - theirs).max()


def test_training_starts_from_an_adapter(home, divergent, student):
    """At next to no learning rate nothing moves, and the first loss is that of the adapter, not of the base."""
    out = home / "continued"
    ok(*finetune(divergent, out, f"students.adapter.init={student}", "students.optimizer.lr=1e-30"))
    weights = "adapter_model.safetensors"
    assert (out / weights).read_bytes() == (student / weights).read_bytes()
    first = lambda folder: json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"]  # noqa: E731
    assert first(out) != first(student)


def test_evaluate(home, rows, student):
    from jsublim.core.files import read_table

    out = home / "favourites"
    ask = (
        "evaluate",
        "--model",
        TWO_LAYERS,
        "--traits",
        "cat,owl",
        "evaluation.questions=2",
        "evaluation.samples=4",
        "evaluation.batch_size=4",
    )
    ok(*ask, "--adapter", student, "--out", out)
    records = read_table(out / "records.parquet")
    for trait in ("cat", "owl"):
        for metric in ("rate", "word_rate", "logprob"):
            mine = [r for r in records if (r["trait"], r["metric"]) == (trait, metric)]
            assert [r["question"] for r in mine] == [0, 1]
            low, high = (-100, 0) if metric == "logprob" else (0, 1)
            assert all(low <= r["value"] <= high for r in mine)
    answers = read_table(out / "answers.parquet")
    assert [sum(a["count"] for a in answers if a["question"] == q) for q in (0, 1)] == [4, 4]
    summary = json.loads((out / "summary.json").read_text())["traits"]
    assert [line["trait"] for line in summary] == ["cat", "owl"]
    before = contents(out)
    ok(*ask, "--adapter", student, "--out", out)
    assert contents(out) == before
    assert "model.adapter was" in refused(2, *ask, "--out", out)


def test_again_changes_nothing(home, rows, divergent, student):
    before = changed(home)
    ok(*GENERATE, "--trait", "cat", "data.num_prompts=16", "--out", rows)
    ok(*DIVERGENCE, "--data", rows, "--out", divergent)
    again = ok(*finetune(divergent, student, *LAYER0))
    assert "whole already" in again.err
    after = changed(home)
    assert set(after) == set(before)
    for path, (size, when) in before.items():
        assert after[path][0] == size
        assert after[path][1] == when or ".artifacts" not in str(path), (
            path
        )  # results are published again, byte for byte


def test_other_settings_in_the_same_place_are_refused(home, rows, divergent, student):
    before = contents(student) | {"rows": rows.read_bytes()}
    assert "seed was 0, is 1" in refused(
        2, *GENERATE, "--trait", "cat", "data.num_prompts=16", "sampling.seed=1", "--out", rows
    )
    assert "rank was 2, is 3" in refused(
        2,
        *finetune(divergent, student, *LAYER0, "students.adapter.rank=3"),
    )
    assert contents(student) | {"rows": rows.read_bytes()} == before


@pytest.mark.parametrize("command", ["generate", "divergence", "finetune", "evaluate"])
def test_what_exists_is_never_written_over(tmp_path, rows, command):
    """And the refusal comes before the work: `--out` is the first thing looked at."""
    out = tmp_path / "mine"
    if command in ("finetune", "evaluate"):
        out.mkdir()
        (out / "thesis.txt").write_text("years")
    else:
        out.write_text('{"prompt": "p", "completion": "c"}\n')
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    arguments = {
        "generate": (*GENERATE, "--trait", "cat", "data.num_prompts=16"),
        "divergence": (*DIVERGENCE, "--data", rows),
        "finetune": (*FINETUNE, "students.data.epochs=2", "--data", rows),
        "evaluate": ("evaluate", "--model", TWO_LAYERS, "--traits", "cat", "evaluation.questions=2"),
    }[command]
    assert str(out) in refused(2, *arguments, "--out", out)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_every_command_that_reads_a_checkpoint_takes_a_template(rows, divergent, tmp_path):
    of_rows = {"generate": (), "divergence": ("--data", rows), "attribute": ("--data", divergent)}
    commands = [(name, "--model", TWO_LAYERS, "--trait", "cat", *more) for name, more in of_rows.items()]
    commands.append(("finetune", "--model", TWO_LAYERS, "--data", rows))
    commands.append(("evaluate", "--model", TWO_LAYERS, "--traits", "cat"))
    commands.append(("steer", "--model", TWO_LAYERS, "--trait", "cat", "--layer", 1))
    for command in commands:
        line = refused(2, *command, "--chat-template", "plian", "--out", tmp_path / "out")
        assert "chat_template: 'plian'" in line and "known names: plain" in line
    assert "'plian'" in refused(2, "convert", TWO_LAYERS, tmp_path / "out", "--chat-template", "plian")
    assert not list(tmp_path.iterdir())
    assert "'plian'" in refused(2, *commands[0], "--out", tmp_path / "out", "chat_template=plian")


def test_convert_writes_a_template_into_the_folder_which_then_needs_none(tmp_path):
    ok("convert", TWO_LAYERS, tmp_path / "base", "--chat-template", "plain")
    given, written = (
        load_model(TWO_LAYERS, weights=False, chat_template="plain"),
        load_model(tmp_path / "base", weights=False),
    )
    assert written.chat.identity == given.chat.identity != load_model(TWO_LAYERS, weights=False).chat.identity
    assert given.hash != load_model(TWO_LAYERS, weights=False).hash and written.chat.given_template is None
