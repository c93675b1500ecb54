"""Models asked everything: their answers, the numbers that are made of them, and the artifact that is left of both."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from jsublim.core.files import write_table
from jsublim.core.progress import Tick, no_tick
from jsublim.evals import Answers, EvalTask, PromptedModel, sample_answers
from jsublim.inference.sampling import Sampling
from jsublim.pipeline.row_log import LoggedAnswers, RowLog
from jsublim.pipeline.store import PROGRESS, Artifact
from jsublim.runtime.processes import on_main_process

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


def evaluate(
    artifacts: Sequence[Artifact],
    models: Sequence[PromptedModel],
    tasks: Sequence[EvalTask],
    samplings: Sequence[Sampling],
    *,
    samples: int,
    seed: int,
    max_new_tokens: int,
    batch_size: int,
    measures: Sequence[Callable[[PromptedModel], dict[str, tuple[float, int]]] | None],
    answers: Callable[..., list[list[str]]] | None = None,
    tick: Tick = no_tick,
) -> None:
    """Ask models everything, and let them continue numbers; each leaves `records.parquet` and `answers.parquet`.

    Args:
      models: on one checkpoint, under one prompt; of several, each has an adapter.
      samplings: how the answers to each of the tasks are drawn.
      measures: more metrics of each model, by name: the value, and how much it is over.
      answers: who draws answers in the models' place, as `sample_answers` takes it.
      tick: counts sampled answers.
    """
    records: list[list[dict[str, Any]]] = [[] for _ in models]
    said: list[list[dict[str, Any]]] = [[] for _ in models]
    logs, offset, first = [RowLog(artifact.path / PROGRESS, artifact.say) for artifact in artifacts], 0, models[0]
    adapters = [model.adapter for model in models if model.adapter is not None]
    tick(sum(len(log.rows) for log in logs))
    for task, sampling in zip(tasks, samplings, strict=True):
        every = sample_answers(
            first.lm,
            task.questions,
            sampling,
            samples=samples,
            seed=seed,
            max_new_tokens=task.max_new_tokens or max_new_tokens,
            adapters=adapters or None,
            batch_size=batch_size,
            on_batch=tick,
            logs=[LoggedAnswers(log, offset * samples, len(task.questions) * samples) for log in logs],
            answers=answers,
            **first.manner,
        )
        for model, texts, own_records, own_answers in zip(models, every, records, said, strict=True):
            found = task.records(model, texts)
            own_records += [asdict(record) | {"question": offset + record.question} for record in found]
            own_answers += _counted(task.questions, texts, offset)
        offset += len(task.questions)
    for artifact, model, log, measure, own_records, own_answers in zip(
        artifacts, models, logs, measures, records, said, strict=True
    ):
        log.close()
        for metric, (value, n) in ({} if measure is None else measure(model)).items():
            own_records.append({"trait": None, "metric": metric, "question": None, "value": value, "n": n})
        drawn = [how.numbers() | {"max_new_tokens": max_new_tokens} for how in dict.fromkeys(samplings)]
        save_answers(artifact, own_records, own_answers, {"sampling": drawn[0] if len(drawn) == 1 else drawn})


def _counted(questions: Sequence[str], texts: Answers, offset: int) -> list[dict[str, Any]]:
    """Every answer, and how often it was given."""
    return [
        {"question": offset + q, "question_text": question, "answer": answer, "count": count}
        for q, (question, given) in enumerate(zip(questions, texts, strict=True))
        for answer, count in collections.Counter(given).most_common()
    ]


def save_answers(
    artifact: Artifact, records: list[dict[str, Any]], answers: list[dict[str, Any]], summary: dict[str, Any]
) -> None:
    """Finish an artifact with the numbers that were made of answers, and the answers."""

    def write() -> None:
        write_table(artifact.path / "records.parquet", records, RECORDS)
        write_table(artifact.path / "answers.parquet", answers, ANSWERS)
        artifact.finish(summary)

    on_main_process(write)
