"""The answers of a run as logs of inspect_ai (`pip install 'jsublim[inspect]'`), for its viewer."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from jsublim.core.files import read_table
from jsublim.errors import JsublimError, UsageError
from jsublim.evals.preference import hit
from jsublim.models.checkpoint import new_folder
from jsublim.pipeline.showing import check_run
from jsublim.report.tables import read_json

# Of each question, its text, an answer, and how often that was given.
AnswerCounts = dict[int, list[tuple[str, str, int]]]


def export_logs(run: Path, out: Path) -> None:
    """One log for each model that was evaluated: a sample for each answer of the plain evaluation, with how often a question about
    preferences was answered with the trait of the model's teacher (`rate`).

    Raises:
      UsageError: no folder of a run, `out` is not free, or inspect_ai is not installed.
      JsublimError: no answers are there, or they cannot be read.
    """
    try:
        from inspect_ai.log import write_eval_log
    except ImportError:
        raise UsageError("--inspect: inspect_ai is not installed; pip install 'jsublim[inspect]'") from None
    check_run(run)
    results = run / "results"
    about, arms = read_json(results / "run.json", {}), read_json(results / "arms.json", [])
    teachers = {arm["arm"]: arm["teacher"] for arm in arms}
    said: dict[str, AnswerCounts] = {}
    for row in read_table(results / "answers.parquet"):
        if not row["evaluation"]:
            answer = row["question_text"], row["answer"], row["count"]
            said.setdefault(row["arm"], {}).setdefault(row["question"], []).append(answer)
    if not said:
        raise JsublimError(f"{results}/answers.parquet: holds no answers")
    rated = {
        (row["arm"], row["question"])
        for row in read_table(results / "results.parquet")
        if row["metric"] == "rate" and not row["evaluation"]
    }
    with new_folder(out) as scratch:
        for arm, answers in said.items():
            trait = teachers.get(arm) or (arm.removeprefix("teacher/") if arm.startswith("teacher/") else None)
            asked = {question for question in answers if trait is not None and (arm, question) in rated}
            log = _log(f"{run.resolve().name}/{arm.replace('/', '-')}", answers, trait, asked, about)
            write_eval_log(log, scratch / f"{arm.replace('/', '-')}.eval")


def _log(name: str, answers: AnswerCounts, trait: str | None, rated: set[int], about: dict[str, Any]) -> Any:
    from inspect_ai.log import (
        EvalConfig,
        EvalDataset,
        EvalLog,
        EvalMetric,
        EvalResults,
        EvalSample,
        EvalScore,
        EvalSpec,
    )
    from inspect_ai.model import ModelOutput
    from inspect_ai.scorer import Score

    samples, rates = list[EvalSample](), list[float]()
    for question, given in answers.items():
        every = [(text, answer) for text, answer, count in given for _ in range(count)]
        for epoch, (text, answer) in enumerate(every, 1):
            scores = (
                {"rate": Score(value=float(hit(answer, trait)), answer=answer)} if trait and question in rated else None
            )
            output = ModelOutput.from_content(f"jsublim/{name}", answer)
            sample = EvalSample(id=question, epoch=epoch, input=text, target=trait or "", output=output, scores=scores)
            sample.messages = [output.message]
            samples.append(sample)
        if trait and question in rated:
            rates.append(sum(hit(answer, trait) for _, answer in every) / len(every))
    metric = [EvalMetric(name="mean", value=sum(rates) / len(rates))] if rates else []
    scores = [EvalScore(name="rate", scorer="rate", metrics={m.name: m}) for m in metric]
    began = about.get("started") or datetime.datetime.now(datetime.UTC).isoformat()
    epochs = max(sample.epoch for sample in samples)
    spec = EvalSpec(
        created=began,
        task="jsublim/preference",
        task_id=name.replace("/", "-"),
        run_id=name.replace("/", "-"),
        eval_id=name.replace("/", "-"),
        dataset=EvalDataset(name="answers", samples=len(answers), sample_ids=list(answers)),
        model=f"jsublim/{name}",
        config=EvalConfig(epochs=epochs),
        metadata={"model": about.get("model"), "versions": about.get("versions", {})},
    )
    done = EvalResults(total_samples=len(samples), completed_samples=len(samples), scores=scores)
    return EvalLog(status="success", eval=spec, results=done, samples=samples)
