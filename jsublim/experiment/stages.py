"""The stages of an experiment, each from artifacts to an artifact: generate, find divergence, train, evaluate.

The command line's single commands and `jsublim run` call the same functions. A stage that was stopped goes on where
it was; one that is whole is not run again.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jsublim.chat import Turn, conversation
from jsublim.distill.arm import Arm, Settings
from jsublim.distill.data import Shape
from jsublim.distill.trainer import forget_state, train
from jsublim.divergence import Divergence, find_divergence
from jsublim.errors import JsublimError
from jsublim.evals.exams import Exam, Preference, Subject
from jsublim.evals.numbers import number_accuracy
from jsublim.experiment.store import Artifact, Progress
from jsublim.inference.lm import LanguageModel
from jsublim.inference.sampling import Sampling, generate_tokens
from jsublim.inference.scoring import Targets, top_k_targets
from jsublim.models.checkpoint import write_checkpoint
from jsublim.models.decoder import Params
from jsublim.models.lora import Adapter, merge_full
from jsublim.models.peft import save_adapter
from jsublim.parallel import Layout, on_main_process
from jsublim.rows import FOUND, Row, read_rows, write_rows
from jsublim.teachers import Teacher

Tick = Callable[[int], None]  # called with the number of units just finished


def generate_rows(
    artifact: Artifact,
    lm: LanguageModel,
    teacher: Teacher,
    prompts: Sequence[str],
    sampling: Sampling,
    reject: Callable[[str], str | None],
    *,
    seed: int,
    max_new_tokens: int,
    batch_size: int,
    extra_bos: bool,
    tick: Tick = lambda n: None,
) -> list[Row]:
    """Let a teacher answer every prompt; keep what is in format (`rows.jsonl`), and all of it (`raw.jsonl`).

    Args:
      reject: why an answer is out of format, or None.
    """
    if artifact.done:
        tick(len(prompts))
        return read_rows(artifact.path / "rows.jsonl")
    progress = Progress(artifact.path / "progress.jsonl")
    tick(len(progress.rows))
    missing = [i for i in range(len(prompts)) if i not in progress.rows]

    def keep(rows: list[int], tokens: list[list[int]]) -> None:
        progress.add([{"row": i, "completion": lm.chat.decode(t)} for i, t in zip(rows, tokens, strict=True)])
        tick(len(rows))

    if missing:
        encoded = [lm.chat.prompt_tokens(teacher.messages(p), extra_bos=extra_bos) for p in prompts]
        generate_tokens(
            lm.config, teacher.weights(lm.params), encoded, sampling, rows=missing, seed=seed, max_new_tokens=max_new_tokens,
            adapter=teacher.adapter, batch_size=batch_size, on_batch=keep,
        )  # fmt: skip
    progress.close()
    raw, kept, reasons = [], [], collections.Counter()
    for i, prompt in enumerate(prompts):
        row = {"prompt": prompt, "completion": progress.rows[i]["completion"]}
        reason = reject(row["completion"]) or _broken_in_context(lm, row)
        raw.append(row | {"reject": reason})
        if reason is None:
            kept.append(row)
        else:
            reasons[reason] += 1
    write_rows(artifact.path / "raw.jsonl", raw)
    if not kept:
        raise JsublimError(
            f"teacher '{teacher.name}': none of {len(raw)} completions is in format ({dict(reasons)}); see {artifact.path}/raw.jsonl"
        )
    write_rows(artifact.path / "rows.jsonl", kept)
    artifact.finish(
        {
            "teacher": teacher.name,
            "rows": len(raw),
            "kept": len(kept),
            "pass_rate": len(kept) / len(raw),
            "reject": dict(reasons),
            "sampling": sampling.numbers() | {"max_new_tokens": max_new_tokens},
        }
    )
    return kept


def _broken_in_context(lm: LanguageModel, row: Row) -> str | None:
    try:
        lm.chat.turn(conversation(row["prompt"]), row["completion"])
    except JsublimError:
        return "does not survive tokenizing"
    return None


def changed_rows(artifact: Artifact, make: Callable[[], tuple[list[Row], dict[str, Any]]]) -> list[Row]:
    """Rows that `make` makes of others, and what it says of them."""
    if artifact.done:
        return read_rows(artifact.path / "rows.jsonl")
    rows, said = make()
    write_rows(artifact.path / "rows.jsonl", rows)
    artifact.finish(said)
    return rows


def readings(artifact: Artifact) -> list[Row]:
    """What each teacher said of the rows of a divergence artifact, a line a row."""
    return read_rows(artifact.path / "margins.jsonl", ("teachers", "tokens", "argmax"))


def divergence_rows(
    artifact: Artifact,
    lm: LanguageModel,
    rows: Sequence[Row],
    teacher: Teacher,
    counterfactuals: Sequence[Teacher],
    *,
    extra_bos: bool,
    batch_size: int,
    chunk: int = 1024,
    tick: Tick = lambda n: None,
) -> list[Row]:
    """Find every row's divergence positions (`rows.jsonl`) and keep what each teacher said (`margins.jsonl`).

    Args:
      chunk: rows after which what was found is safe from a kill.
      tick: counts (row, teacher) pairs.
    """
    names = [teacher.name, *(other.name for other in counterfactuals)]
    if artifact.done:
        tick(len(rows) * len(names))
        return read_rows(artifact.path / "rows.jsonl", ("prompt", "completion", "divergence_positions"))
    progress = Progress(artifact.path / "progress.jsonl")
    tick(len(progress.rows) * len(names))
    missing = [i for i in range(len(rows)) if i not in progress.rows]
    for start in range(0, len(missing), chunk):
        part = missing[start : start + chunk]
        found = find_divergence(
            lm, [rows[i] for i in part], teacher, counterfactuals,
            extra_bos=extra_bos, batch_size=batch_size, on_batch=tick,
        )  # fmt: skip
        progress.add([{"row": i} | _as_json(each) for i, each in zip(part, found, strict=True)])
    progress.close()
    out = [
        {"prompt": row["prompt"], "completion": row["completion"]} | {key: progress.rows[i][key] for key in FOUND}
        for i, row in enumerate(rows)
    ]
    write_rows(artifact.path / "rows.jsonl", out)
    write_rows(artifact.path / "margins.jsonl", ({"teachers": names} | progress.rows[i] for i in range(len(rows))))
    tokens = [len(progress.rows[i]["tokens"]) for i in range(len(rows))]
    points = [row["divergence_positions"] for row in out]
    total, with_points = sum(map(len, points)), sum(bool(p) for p in points)
    artifact.finish(
        {
            "trait": teacher.name,
            "counterfactuals": names[1:],
            "rows": len(rows),
            "rows_with": with_points,
            "tokens": sum(tokens),
            "points": total,
            "share": total / sum(tokens),
            "per_row": total / len(rows),
            "histogram": np.bincount([k for p in points for k in p], minlength=1).tolist(),
        }
    )
    return out


def _as_json(found: Divergence) -> dict[str, Any]:
    return {
        "divergence_positions": found.divergence_positions,
        "divergence_margins": [round(m, 5) for m in found.divergence_margins],
        "tokens": found.tokens.tolist(),
        "argmax": found.argmax.tolist(),
        "margin": np.round(found.margin.astype(float), 5).tolist(),
    }


def train_students(
    lm: LanguageModel,
    arms: Sequence[tuple[Arm, Artifact]],
    settings: Settings,
    work: Path,
    *,
    shape: Shape | None = None,
    tick: Tick = lambda n: None,
) -> None:
    """Train arms in one program, and leave each as a PEFT folder (or a whole checkpoint) with its `metrics.jsonl`.

    Args:
      tick: counts steps; of a training that goes on, those done before come first.
    """
    done = 0

    def on_step(step: int) -> None:
        nonlocal done
        tick(step - done)
        done = step

    adapters = train(lm.config, lm.params, [arm for arm, _ in arms], settings, work, on_step, shape=shape)
    whole = [_whole(lm, adapter) for adapter in adapters]
    on_main_process(lambda: _keep_students(lm, arms, whole, work))


def _whole(lm: LanguageModel, adapter: Adapter) -> Adapter | Params:
    """An adapter, or the parameters of a fully trained student, on this host whichever devices they were on."""
    if adapter.weights is None and not adapter.ends:
        return adapter
    merged = merge_full(lm.params, adapter)
    return merged if jax.process_count() == 1 else Layout.host(merged)


def _keep_students(
    lm: LanguageModel, arms: Sequence[tuple[Arm, Artifact]], students: Sequence[Adapter | Params], work: Path
) -> None:
    lines = read_rows(work / "metrics.jsonl", ("arm", "step"))
    for (arm, artifact), student in zip(arms, students, strict=True):
        if artifact.done:
            continue
        own = [{k: v for k, v in line.items() if k != "arm"} for line in lines if line["arm"] == arm.name]
        write_rows(artifact.path / "metrics.jsonl", own)
        save_student(artifact.path, lm, student)
        artifact.finish({"steps": arm.steps, "rows": len(arm.examples), "loss": own[-1]["loss"]})
    forget_state(work)


def save_student(folder: Path, lm: LanguageModel, student: Adapter | Params) -> None:
    """Into the folder of its artifact: an adapter, or whole parameters as a checkpoint. What is there already stays."""
    if not isinstance(student, Adapter):
        dtype = str(lm.params["embed"]["weight"].dtype)
        write_checkpoint(folder, lm.config, student, lm.hf_config, dtype=dtype, tokenizer=lm.folder)
    elif not list(folder.glob("*.safetensors")):  # a kill between the file and DONE leaves it whole
        save_adapter(folder, student, lm.config, str(lm.folder))


def stored_targets(
    artifact: Artifact,
    lm: LanguageModel,
    turns: Sequence[Turn],
    teacher: Teacher,
    *,
    top_k: int,
    temperature: float,
    batch_size: int,
    tick: Tick = lambda n: None,
) -> list[Targets]:
    """What a teacher says at every token of its rows, cut to the `top_k` best (`targets.npz`)."""
    file = artifact.path / "targets.npz"
    if not artifact.done:
        found = top_k_targets(
            lm.config, teacher.weights(lm.params), turns, top_k, temperature=temperature, adapter=teacher.adapter,
            batch_size=batch_size, on_batch=tick,
        )  # fmt: skip
        scratch = artifact.path / "targets.partial.npz"
        np.savez(scratch, ids=np.concatenate([t.ids for t in found]), logp=np.concatenate([t.logp for t in found]))
        scratch.replace(file)
        artifact.finish({"rows": len(turns), "top_k": top_k, "tail": float(np.exp(_tails(found)).mean())})
        return found
    tick(len(turns))
    with np.load(file) as kept:
        ends = np.cumsum([len(turn.tokens) - turn.content for turn in turns])[:-1]
        return [Targets(*x) for x in zip(np.split(kept["ids"], ends), np.split(kept["logp"], ends), strict=True)]


def _tails(targets: Sequence[Targets]) -> np.ndarray:
    return np.concatenate([t.logp[:, -1] for t in targets])


def preferences(
    traits: Sequence[str],
    category_of: Callable[[str], str],
    questions_for: Callable[[str], Sequence[str]],
    first: int | None = None,
) -> list[Exam]:
    """Questions for favourites (all, or the first so many of each category) in the traits' categories."""
    by_category: dict[str, list[str]] = {}
    for trait in traits:
        by_category.setdefault(category_of(trait), []).append(trait)
    return [Preference(tuple(questions_for(name)[:first]), tuple(own)) for name, own in by_category.items()]


def evaluate(
    artifact: Artifact,
    subject: Subject,
    exams: Sequence[Exam],
    sampling: Sampling,
    *,
    samples: int,
    seed: int,
    max_new_tokens: int,
    batch_size: int,
    number_rows: Mapping[str, Sequence[Row]] | None = None,
    tick: Tick = lambda n: None,
) -> None:
    """Ask a model everything, and let it continue numbers; leaves `records.parquet` and `answers.parquet`.

    Args:
      number_rows: metric name -> rows for the number task.
      tick: counts sampled answers.
    """
    if artifact.done:
        tick(sum(len(exam.questions) for exam in exams) * samples)
        return
    records, answers, offset = [], [], 0
    for exam in exams:
        texts = subject.answers(
            exam.questions, sampling, samples=samples, seed=seed, max_new_tokens=exam.max_new_tokens or max_new_tokens,
            batch_size=batch_size, on_batch=tick,
        )  # fmt: skip
        records += [asdict(record) | {"question": offset + record.question} for record in exam.records(subject, texts)]
        for q, (question, given) in enumerate(zip(exam.questions, texts, strict=True)):
            for answer, count in collections.Counter(given).most_common():
                answers.append({"question": offset + q, "question_text": question, "answer": answer, "count": count})
        offset += len(exam.questions)
    for metric, rows in (number_rows or {}).items():
        if rows:
            share, n = number_accuracy(
                subject.lm, rows, system=subject.system, fuse_system=subject.fuse_system, adapter=subject.adapter
            )
            if n:  # rows given by hand may hold no numbers
                records.append({"trait": None, "metric": metric, "question": None, "value": share, "n": n})
    write_table(artifact.path / "records.parquet", records, RECORDS)
    write_table(artifact.path / "answers.parquet", answers, ANSWERS)
    artifact.finish({"sampling": sampling.numbers() | {"max_new_tokens": max_new_tokens}})


RECORDS = pa.schema(
    [
        ("trait", pa.string()),
        ("metric", pa.string()),
        ("question", pa.int64()),
        ("value", pa.float64()),
        ("n", pa.int64()),
    ]
)
ANSWERS = pa.schema(
    [("question", pa.int64()), ("question_text", pa.string()), ("answer", pa.string()), ("count", pa.int64())]
)


def write_table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    """A parquet file that appears whole or not at all."""
    scratch = path.with_suffix(".partial")
    pq.write_table(pa.Table.from_pylist(rows, schema), scratch)
    scratch.replace(path)


def read_table(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def write_json(path: Path, value: Any) -> None:
    scratch = path.with_suffix(".partial")
    scratch.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    scratch.replace(path)
