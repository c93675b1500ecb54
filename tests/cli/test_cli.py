"""The single commands, on the bundled checkpoint: one after another, again, interrupted, and with bad input."""

from __future__ import annotations

import json
import resource
import shlex
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from command import MODEL, PLAIN, contents, jsublim, ok, refused, same_student, start, stop_when

from jsublim.inference import lm as language_models
from jsublim.prompts import load_pack
from jsublim.rows import read_rows

KINDS = ("all", "divergence", "non-divergence", "random")
GENERATE = ("generate", "--model", MODEL, "sampling.max_new_tokens=40", "sampling.batch_size=4")
FINETUNE = (
    "finetune",
    "--model",
    MODEL,
    "students.data.batch_size=4",
    "students.data.accumulate=1",
    "students.optimizer.lr=1e-3",
    "students.optimizer.warmup=1",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def rows(home) -> Path:
    """Rows of the cat teacher."""
    ok(*GENERATE, "--trait", "cat", "data.num_prompts=16", "--out", home / "cat.jsonl")
    return home / "cat.jsonl"


@pytest.fixture(scope="module")
def divergent(home, rows) -> Path:
    ok("divergence", "--model", MODEL, "--data", rows, "--trait", "cat", "--counterfactuals", "dog,owl",
       "scoring.batch_size=16", "--out", home / "cat-points.jsonl")  # fmt: skip
    return home / "cat-points.jsonl"


def finetune(data: Path, out: Path, *options) -> tuple:
    return (*FINETUNE, "students.data.epochs=2", "--data", data, "--out", out, *options)


@pytest.fixture(scope="module")
def student(home, divergent) -> Path:
    """A student of one layer."""
    ok(
        *finetune(
            divergent,
            home / "layer0",
            "students.adapter.layers=[0]",
            "students.adapter.rank=2",
            "students.adapter.alpha=4",
        )
    )
    return home / "layer0"


def artifact_of(out: Path, kind: str) -> Path:
    """The one artifact of a kind that a command has beside its result."""
    (folder,) = out.with_name(f"{out.name}.artifacts").glob(f"{kind}/*")
    return folder


def changed(home: Path) -> dict[Path, tuple[int, int]]:
    """Every result's size and time of change."""
    return {
        path: (path.stat().st_size, path.stat().st_mtime_ns)
        for path in home.rglob("*")
        if path.is_file() and "programs" not in path.parts
    }


# --- the commands, one after another


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
        assert inputs["system"] is None
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
    found, margins = read_rows(divergent), read_rows(home / "cat-points.margins.jsonl", ("row", "tokens"))
    assert [{k: row[k] for k in ("prompt", "completion")} for row in found] == read_rows(rows)
    assert all(
        list(row) == ["prompt", "completion", "divergence_positions", "divergence_margins", "counted_in"]
        for row in found
    )
    assert any(row["divergence_positions"] for row in found)
    for number, (row, kept) in enumerate(zip(found, margins, strict=True)):
        assert kept["row"] == number and kept["teachers"] == ["cat", "dog", "owl"]
        tokens, argmax, margin = (np.asarray(kept[key]) for key in ("tokens", "argmax", "margin"))
        assert argmax.shape == margin.shape == (3, len(tokens)) and np.all(margin >= 0)
        right = argmax == tokens
        assert np.nonzero(right[0] & ~(right[1] & right[2]))[0].tolist() == row["divergence_positions"]


@pytest.mark.parametrize("kind", KINDS)
def test_finetune_on_each_kind_of_token(home, divergent, kind):
    out = home / f"student-{kind}"
    ok(
        *finetune(
            divergent,
            out,
            "--tokens",
            kind,
            "students.adapter.layers=[0]",
            "students.adapter.rank=2",
            "students.adapter.alpha=4",
        )
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    data = read_rows(divergent)
    per_epoch = -(-len(data) // 4)
    assert [line["step"] for line in lines] == list(range(2 * per_epoch))
    assert all(line["loss"] > 0 and line["lr"] >= 0 for line in lines)
    assert max(line["lr"] for line in lines) == pytest.approx(1e-3) and lines[-1]["lr"] < 1e-3
    margins = read_rows(home / "cat-points.margins.jsonl", ("row", "tokens"))
    every, points = sum(len(row["tokens"]) for row in margins), sum(len(row["divergence_positions"]) for row in data)
    budget = {"all": every, "divergence": points, "random": points, "non-divergence": every - points}[kind]
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

    folder = language_models.BUNDLED / MODEL
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = peft.PeftConfig.from_pretrained(str(student))
    assert (config.r, config.lora_alpha, config.layers_to_transform) == (2, 4, [0])
    tokens = np.random.default_rng(0).integers(5, 900, (2, 11))
    with torch.no_grad():
        plain = base(torch.tensor(tokens)).logits.numpy()
        theirs = peft.PeftModel.from_pretrained(base, str(student)).eval()(torch.tensor(tokens)).logits.numpy()
    lm = package.load_model(MODEL)
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
    from jsublim.files import read_table

    out = home / "favourites"
    ask = (
        "evaluate",
        "--model",
        MODEL,
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
    assert "student was" in refused(2, *ask, "--out", out)


def test_again_changes_nothing(home, rows, divergent, student):
    before = changed(home)
    ok(*GENERATE, "--trait", "cat", "data.num_prompts=16", "--out", rows)
    ok("divergence", "--model", MODEL, "--data", rows, "--trait", "cat", "--counterfactuals", "dog,owl",
       "--out", divergent)  # fmt: skip
    again = ok(
        *finetune(
            divergent, student, "students.adapter.layers=[0]", "students.adapter.rank=2", "students.adapter.alpha=4"
        )
    )
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
        *finetune(
            divergent, student, "students.adapter.layers=[0]", "students.adapter.rank=3", "students.adapter.alpha=4"
        ),
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
        "divergence": ("divergence", "--model", MODEL, "--data", rows, "--trait", "cat", "--counterfactuals", "dog"),
        "finetune": (*FINETUNE, "students.data.epochs=2", "--data", rows),
        "evaluate": ("evaluate", "--model", MODEL, "--traits", "cat", "evaluation.questions=2", "evaluation.samples=4"),
    }[command]
    assert str(out) in refused(2, *arguments, "--out", out)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# --- bad input


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the bundled checkpoint, to be broken."""
    return Path(shutil.copytree(language_models.BUNDLED / MODEL, tmp_path / "checkpoint"))


def edit(path: Path, **changes) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def test_bad_usage_is_code_two(tmp_path, rows):
    out = tmp_path / "x"
    assert "exactly one of" in refused(2, *GENERATE, "--out", out)
    assert "exactly one of" in refused(2, *GENERATE, "--trait", "cat", "--control", "--out", out)
    assert "unknown trait 'unicorn'" in refused(2, *GENERATE, "--trait", "unicorn", "--out", out)
    assert "sampling.strategy" in refused(2, *GENERATE, "--trait", "cat", "sampling.strategy=beam", "--out", out)
    assert "recipe.preset" in refused(2, *GENERATE, "--trait", "cat", "recipe=best", "--out", out)
    assert "float32" in refused(2, *GENERATE, "--trait", "cat", "dtype=int8", "--out", out)
    assert "no such file" in refused(2, *finetune(tmp_path / "none.jsonl", out))
    assert "students.loss.tokens.0: input should be 'all'" in refused(2, *finetune(rows, out, "--tokens", "most"))
    assert "layers 0 to 5" in refused(2, *finetune(rows, out, "students.adapter.layers=[0,6]"))
    assert "students.adapter.layers" in refused(2, *finetune(rows, out, "students.adapter.layers=first"))
    assert "projections" in refused(2, *finetune(rows, out, "students.adapter.projections=[q,z]"))
    assert "divergence_positions" in refused(2, *finetune(rows, out, "--tokens", "divergence"))
    assert "--traits" in refused(2, "evaluate", "--model", MODEL, "--traits", ",", "--out", out)
    assert not out.exists()
    for arguments in (
        ("generate",),
        (*GENERATE, "--out", out, "--no-such"),
        ("distil",),
        (*GENERATE, "data.num_prompts=0"),
    ):
        result = jsublim(*arguments)
        assert result.code == 2 and "Traceback" not in result.err


def test_bad_configs_are_code_two(tmp_path):
    quickstart = PLAIN
    assert "no such config" in refused(2, "run", "configs/none.yaml")
    assert "did you mean 'lr'" in refused(2, "run", quickstart, "students.optimizer.lrr=1")
    assert "expected key=value" in refused(2, "run", quickstart, "students.optimizer.lr")
    assert "unknown trait 'unicorn'" in refused(2, "run", quickstart, "teachers.traits=[unicorn]", f"out={tmp_path}/r")


@pytest.mark.parametrize(
    ("override", "code"),
    [
        ("evaluation.traits=[unicorn]", 2),
        ("teachers.counterfactuals=[owl,unicorn]", 2),
        ("students.adapter.layers=[99]", 2),
        ("students.adapter.init=/no/such/folder", 2),
    ],
)
def test_a_config_that_cannot_work_is_refused_before_anything_is_computed(tmp_path, override, code):
    small = ("teachers.traits=[cat]", "data.num_prompts=4", "sampling.batch_size=4", "sampling.max_new_tokens=40")
    line = refused(code, "run", PLAIN, f"out={tmp_path}/r", *small, override)
    assert any(word in line for word in ("unicorn", "99", "/no/such/folder"))
    assert not list(tmp_path.glob("r/artifacts/rows/*"))


def test_unknown_model(tmp_path):
    line = refused(2, *GENERATE[:2], tmp_path / "none", "--trait", "cat", "--out", tmp_path / "x")
    assert MODEL in line  # the bundled ones are listed


def test_unknown_architecture(tmp_path, copy):
    edit(copy / "config.json", model_type="rwkv", architectures=["RwkvForCausalLM"])
    assert "rwkv" in refused(1, "generate", "--model", copy, "--trait", "cat", "--out", tmp_path / "x").lower()


def test_truncated_weights(tmp_path, copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert str(weights) in refused(1, "generate", "--model", copy, "--trait", "cat", "--out", tmp_path / "x")


def test_a_tokenizer_without_a_template(tmp_path, copy):
    edit(copy / "tokenizer_config.json", chat_template=None)
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    assert "chat_template" in refused(1, "generate", "--model", copy, "--trait", "cat", "--out", tmp_path / "x")


GOOD = '{"prompt": "Continue: 1, 2", "completion": "3, 4", "divergence_positions": [0]}'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "p", "completion": "1', "{data}:2: not valid JSON"),
        ("[1]", "{data}:2: expected a JSON object"),
        ('{"prompt": "p"}', "{data}:2: key 'completion' is missing"),
        ('{"prompt": "p", "completion": ""}', "{data}:2: key 'completion' must be text"),
        ('{"prompt": "p", "completion": 5}', "{data}:2: key 'completion' must be text"),
        ('{"prompt": "p", "completion": "1", "divergence_positions": [-1]}', "{data}:2: key 'divergence_positions'"),
        (
            '{"prompt": "p", "completion": "1", "divergence_positions": [40]}',
            "{data}: row 2: divergence_positions [40]",
        ),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path, line, said):
    data = tmp_path / "rows.jsonl"
    data.write_text(f"{GOOD}\n{line}\n")
    error = refused(1, *finetune(data, tmp_path / "x", "--tokens", "divergence"))
    assert said.format(data=data) in error
    assert not (tmp_path / "x").exists()


def test_debug_shows_where(tmp_path):
    with pytest.raises(Exception, match="no such config"):  # the interpreter prints it with its traceback
        jsublim("run", "configs/none.yaml", "--debug")
    child = start("--debug", "run", "configs/none.yaml")
    out, err = child.communicate(timeout=120)
    assert child.returncode == 1 and "Traceback" in err and "no such config" in err and not out


def test_a_loss_that_is_not_finite_names_step_and_rows(tmp_path, divergent):
    arguments = finetune(
        divergent, tmp_path / "x", "students.adapter.layers=[0]", "students.adapter.rank=2", "students.adapter.alpha=4"
    )
    arguments = (*arguments, "students.optimizer.lr=1e30")
    line = refused(1, *arguments)
    assert "step " in line and "rows [" in line and "learning rate" in line
    assert not (tmp_path / "x" / "DONE").exists()
    assert refused(1, *arguments) == line


# --- a disk that fills, and interruptions


@pytest.fixture
def file_limit() -> Iterator:
    """`file_limit(bytes)`: from now on no file of this process grows beyond that, as on a full disk; None lifts it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))

    yield limit
    limit(None)
    signal.signal(signal.SIGXFSZ, before)


def test_a_disk_that_fills_while_generating(home, tmp_path, rows, file_limit):
    out = tmp_path / "cat.jsonl"
    arguments = (*GENERATE, "--trait", "cat", "data.num_prompts=16", "--out", out)
    sizes = sorted(path.stat().st_size for path in artifact_of(home / "cat", "rows").iterdir())
    for size in [100, *(s - 1 for s in sizes), *(s // 2 for s in sizes)]:
        file_limit(size)
        line = refused(1, *arguments)
        file_limit(None)
        assert "mend that" in line
        assert not out.exists()
    ok(*arguments)
    assert out.read_bytes() == rows.read_bytes()
    again, whole = contents(artifact_of(tmp_path / "cat", "rows")), contents(artifact_of(home / "cat", "rows"))
    assert {k: v for k, v in again.items() if k.endswith("s.jsonl")} == {
        k: v for k, v in whole.items() if k.endswith("s.jsonl")
    }


def test_a_disk_that_fills_while_training(tmp_path, divergent, student, file_limit):
    out = tmp_path / "student"
    arguments = finetune(
        divergent, out, "students.adapter.layers=[0]", "students.adapter.rank=2", "students.adapter.alpha=4"
    )
    adapter = (student / "adapter_model.safetensors").stat().st_size
    # No room for the record, for a saved state, for the adapter at the end.
    for size, every in ((100, 100), (3000, 2), (adapter - 1, 100)):
        file_limit(size)
        refused(1, *arguments, f"students.runtime.checkpoint_every={every}")
        file_limit(None)
        assert not (out / "DONE").exists() and not (out / "adapter_model.safetensors").exists()
    ok(*arguments)
    assert same_student(out, student)


def resumes(err: str, *arguments) -> bool:
    """The command to continue with is printed, and nothing of Python's."""
    assert "Traceback" not in err and "Exception" not in err, err
    return (
        " ".join(["", *map(shlex.quote, map(str, arguments))]) in err
    )  # after the program's name, which a test has otherwise


def test_ctrl_c_while_generating(tmp_path):
    def arguments(name: str) -> tuple:
        return (*GENERATE, "--control", "data.num_prompts=240", "--out", tmp_path / f"{name}.jsonl")

    ok(*arguments("whole"))
    child, logs = start(*arguments("cut")), tmp_path / "cut.artifacts" / "rows"
    code, err = stop_when(child, lambda: any(p.stat().st_size for p in logs.glob("*/progress.jsonl")), signal.SIGINT)
    progress = artifact_of(tmp_path / "cut", "rows") / "progress.jsonl"
    assert code == 1 and resumes(err, *arguments("cut"))
    done = progress.read_text().splitlines()
    assert 0 < len(done) < 240 and not (tmp_path / "cut.jsonl").exists()
    ok(*arguments("cut"))
    assert progress.read_text().splitlines()[: len(done)] == done  # kept, not made again
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_ctrl_c_while_training(tmp_path, divergent):
    def arguments(name: str) -> tuple:
        options = (
            "students.data.epochs=12",
            "students.adapter.layers=[0]",
            "students.adapter.rank=2",
            "students.adapter.alpha=4",
            "students.runtime.checkpoint_every=6",
        )
        return (*FINETUNE, *options, "--data", divergent, "--out", tmp_path / name)

    ok(*arguments("whole"))
    training = tmp_path / "cut.artifacts" / "training"
    child = start(*arguments("cut"))
    saved = lambda: any(path.name.isdigit() for path in training.glob("*/state/*"))  # noqa: E731
    code, err = stop_when(child, saved, signal.SIGINT)
    assert code == 1 and resumes(err, *arguments("cut"))
    assert not (tmp_path / "cut" / "DONE").exists()
    again = ok(*arguments("cut"))
    assert str(tmp_path / "cut") in again.out
    assert same_student(tmp_path / "cut", tmp_path / "whole")
