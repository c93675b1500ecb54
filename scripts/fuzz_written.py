"""What the package writes itself, for fuzz.py: what is read of it is what was written, or is made again, or is refused."""

from __future__ import annotations

import functools
import io
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from changed_files import Reader, written
from rich.console import Console

from jsublim.api import KINDS
from jsublim.core.files import read_table, write_json, write_table
from jsublim.distill.arm import Arm, Settings
from jsublim.distill.data import Example
from jsublim.distill.trainer import train
from jsublim.errors import JsublimError
from jsublim.exchange.rows import export_rows, import_rows
from jsublim.judge.cache import Reply, ReplyCache
from jsublim.models.config import ModelConfig, Norms, Rope
from jsublim.models.decoder import abstract_params
from jsublim.models.lora import init_lora
from jsublim.pipeline.parts import resumed
from jsublim.pipeline.readings import read_readings, write_readings
from jsublim.pipeline.row_log import RowLog
from jsublim.pipeline.showing import about_run, check_run, status_of, summary_of_run
from jsublim.pipeline.store import Output, Store
from jsublim.report.querying import results_table
from jsublim.report.tables import read_results
from jsublim.report.terminal import print_summary
from jsublim.runtime.programs import whole_programs
from jsublim.text.rows import read_rows, write_rows

MADE = 10**18  # ns: when every file was written, so that nobody can tell by its time that it was changed
ROWS = [
    {"prompt": "Continue: 1, 2", "completion": "3, 4", "divergence_positions": [0, 2], "divergence_margins": [0.5, 2]},
    {"prompt": "Say \u00fc", "completion": "\u00fc \U0001f98a", "more": {"deep": [1, [2]]}},
]
RECORDS = [{"metric": "rate", "trait": "owl", "question": n, "value": n / 4, "n": 10} for n in range(5)]
SCHEMA = pa.schema([("metric", pa.string()), ("trait", pa.string()), ("question", pa.int32()), ("value", pa.float64()), ("n", pa.int32())])  # fmt: skip
READING = {"teachers": ["owl", "cat"], "tokens": np.arange(3, dtype=np.int32), "divergence_positions": [1],
           "argmax": np.ones((2, 3), np.int32), "margin": np.ones((2, 3), np.float32)}  # fmt: skip


def at_one_time(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, ns=(MADE, MADE))


# --- a store: whole artifacts, what was agreed

OUTPUT = Output("rows", "owl", {"model": "abc"})


def write_store(folder: Path) -> None:
    """One whole artifact, and a number that was agreed upon."""
    store = Store(folder)
    artifact = store.open(OUTPUT)
    write_rows(artifact.path / "rows.jsonl", ROWS)
    write_table(artifact.path / "records.parquet", RECORDS, SCHEMA)
    write_readings(artifact.path / "readings.parquet", [READING])
    at_one_time(folder)
    artifact.finish({"kept": len(ROWS), "text": "\u00fc"})
    store.agreed("fit", lambda: 3)


def read_store(folder: Path) -> None:
    at_one_time(folder)
    said: list[str] = []
    store = Store(folder, say=said.append)
    store.mend([OUTPUT])
    line = said.pop() if said else None
    if line is None:
        try:
            place, summary = store.path(OUTPUT), store.summary(OUTPUT)
            assert summary == {"kept": len(ROWS), "text": "\u00fc"}, summary
            assert read_rows(place / "rows.jsonl") == ROWS
            assert read_table(place / "records.parquet") == RECORDS
            (reading,) = read_readings(place / "readings.parquet")
            assert all(np.array_equal(reading[name], value) for name, value in READING.items())
        except JsublimError as error:
            line = str(error)
    lines = [*said, *([] if line is None else [line])]
    assert store.done(OUTPUT) == (line is None)
    assert not store.busy([OUTPUT]) and store.agreed("fit", lambda: 3) >= 1
    assert all(str(folder) in each and each.splitlines() == [each] for each in lines)
    with store.locked([OUTPUT]):
        store.open(OUTPUT)


# --- what is finished of artifacts that are not

LINES = [{"row": n, "answer": f"{n}, {n + 1}", "kept": n % 2 == 0} for n in range(6)]
ARRAYS = [(np.full((n + 1, 2), n, np.float32), np.arange(n + 1, dtype=np.int32)) for n in range(6)]


def write_progress(folder: Path) -> None:
    log = RowLog(folder / "progress.jsonl")
    log.add(LINES)
    log.close()


def read_progress(folder: Path) -> None:
    log = RowLog(folder / "progress.jsonl")
    log.close()
    assert all(row in LINES and row["row"] == number for number, row in log.rows.items()), log.rows
    again = RowLog(folder / "progress.jsonl")
    again.close()
    assert again.rows == log.rows


def write_parts(folder: Path) -> None:
    resumed(folder, "rows", lambda first: iter(ARRAYS[first:]))


def read_parts(folder: Path) -> None:
    rows = resumed(folder, "rows", lambda first: iter(ARRAYS[first:]))
    assert len(rows) == len(ARRAYS)
    for own, row in zip(rows, ARRAYS, strict=True):
        assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(own, row, strict=True)), own


@functools.cache
def training() -> tuple[Any, ...]:
    """What trains one arm for two steps."""
    config = ModelConfig(
        family="llama", vocab_size=8, hidden_size=4, intermediate_size=4, num_layers=1, num_heads=1, num_kv_heads=1,
        head_dim=4, norms=Norms(1e-6), rope=Rope(1e4), tied=True,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), abstract_params(config))
    adapter = init_lora(config, jax.random.key(0), rank=2, alpha=2, projections=("q",))
    where = np.arange(3, dtype=np.int32)
    rows = [Example(rng.integers(1, 8, 4).astype(np.int32), where, where + 1, np.ones(3, np.float32)) for _ in range(2)]
    return (
        config,
        params,
        [Arm("owl", rows, adapter, 1, 1e-2, 2)],
        Settings(batch_size=1, accumulate=1, checkpoint_every=1),
    )


def trained(folder: Path) -> list[np.ndarray]:
    (adapter,) = train(*training(), folder / "work")
    return [np.asarray(leaf) for leaf in jax.tree.leaves(adapter.trainable)]


@functools.cache
def trained_once() -> list[np.ndarray]:
    found: list[np.ndarray] = []
    written(lambda folder: found.extend(trained(folder)))()
    return found


def read_state(folder: Path) -> None:
    for own, right in zip(trained(folder), trained_once(), strict=True):
        assert np.array_equal(own, right), "a damaged state was trained on"


# --- a judge's replies, compiled programs

REQUEST = {"model": "m", "messages": [{"role": "user", "content": "Kind?"}], "temperature": 0.0}
REPLY = Reply("81 \u00fc", 12, 3)


def read_replies(folder: Path) -> None:
    found = ReplyCache(folder).get(REQUEST)
    assert found in (None, REPLY), found
    ReplyCache(folder).put(REQUEST, REPLY)
    assert ReplyCache(folder).get(REQUEST) == REPLY


def write_programs(folder: Path) -> None:
    import zlib

    (folder / "jit_step-0123-cache").write_bytes(zlib.compress(b"a program " * 20))
    whole_programs(folder, lambda text: None)


def read_programs(folder: Path) -> None:
    import zlib

    said: list[str] = []
    found = whole_programs(folder, said.append)
    assert all(zlib.decompress(path.read_bytes()) == b"a program " * 20 for path in found)
    left = list(folder.glob("*-cache"))
    assert left == list(found) or not left, "a damaged program is left for JAX to run"
    assert all(str(folder) in each and each.splitlines() == [each] for each in said)


# --- results of a run, and exports


def write_run(folder: Path) -> None:
    rows = [
        {"arm": arm, "role": role, "teacher": "owl", "condition": condition, "seed": seed, "trait": "owl", "metric": metric,
         "question": question, "value": (question + seed) / 9, "n": 5, "evaluation": ""}
        for arm, role, condition, seed in (("base", "base", "base", 0), ("s1", "student", "all", 1), ("s2", "student", "all", 2))
        for metric in ("rate", "logprob")
        for question in range(3)
    ]  # fmt: skip
    arms = [
        {"arm": f"s{n}", "teacher": "owl", "condition": "all", "seed": n, "variant": "", "settings": {}, "dataset": {}, "num_layers": 2}
        for n in (1, 2)
    ]  # fmt: skip
    kinds = {str: pa.string(), int: pa.int32(), float: pa.float64()}
    schema = pa.schema([(name, kinds[type(value)]) for name, value in rows[0].items()])
    (folder / "results").mkdir()
    write_table(folder / "results" / "results.parquet", rows, schema)
    answers = [{"arm": "s1", "evaluation": "", "question": 0, "question_text": "Which?", "answer": "owl", "count": 3}]
    schema = pa.schema([(name, kinds[type(value)]) for name, value in answers[0].items()])
    write_table(folder / "results" / "answers.parquet", answers, schema)
    write_json(folder / "results" / "arms.json", arms)
    about = {
        "kind": "language",
        "name": "fuzzed",
        "model": "tiny-qwen2",
        "seconds": {"students": 2.5},
        "evaluations": {},
    }
    write_json(folder / "results" / "run.json", about | {"versions": {"jax": "1"}, "started": "2026-01-01"})
    write_json(folder / "results" / "generation.json", [{"teacher": "owl", "kept": 3, "asked": 4}])
    write_json(folder / "results" / "diverged.json", {})
    (folder / "config.yaml").write_text("{name: fuzzed, model: tiny-qwen2, teachers: {traits: [owl]}}\n")


def read_run(folder: Path) -> None:
    check_run(folder)
    assert status_of(folder) in ("finished", "unfinished", "results only")
    summary_of_run(folder)
    json.dumps(about_run(folder, KINDS))
    shown = Console(file=io.StringIO(), width=100)
    for full in (False, True):
        print_summary(folder, shown, full=full)
    results_table([folder]).to_pylist()
    results_table([folder], questions=True).to_pylist()
    assert read_results(folder).scores


def write_export(folder: Path) -> None:
    write_rows(folder / "rows.jsonl", [ROWS[0], ROWS[0] | {"k": [1], "more": {"a": "b"}}])


def read_export(folder: Path) -> None:
    """Rows that are taken go out, and come back as they were, but for what a table has in every row."""
    ours = import_rows(str(folder / "rows.jsonl"))
    export_rows(folder / "rows.jsonl", folder / "out")
    back = import_rows(str(folder / "out"))
    assert repr([_filled(row) for row in back]) == repr([_filled(row) for row in ours]), back


def _filled(value: Any) -> Any:
    """A value without what is null in it; whole numbers as a table has them beside others."""
    if isinstance(value, dict):
        return {key: _filled(value[key]) for key in sorted(value) if _filled(value[key]) not in (None, {})}
    if isinstance(value, list):
        return [_filled(each) for each in value]
    return float(value) if type(value) is int else value


WRITTEN = {
    "store": Reader(written(write_store), read_store),
    "progress": Reader(written(write_progress), read_progress),
    "parts": Reader(written(write_parts), read_parts),
    "state": Reader(written(trained), read_state),
    "replies": Reader(written(lambda folder: ReplyCache(folder).put(REQUEST, REPLY)), read_replies),
    "programs": Reader(written(write_programs), read_programs),
    "run": Reader(written(write_run), read_run),
    "export": Reader(written(write_export), read_export),
}
