"""Numbers made of a run's answers once more: by another matching rule, or by another judge. No model is asked anything.

The new results lie beside the old ones, in a folder that is a run's own: the report is written from it like from any other.
"""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsublim.config import Experiment, Recipe, check_config
from jsublim.config.loading import override
from jsublim.core.files import read_table, write_json, write_table, write_text
from jsublim.errors import JsublimError, UsageError
from jsublim.evals import EvalContext, EvalTask
from jsublim.evals.matching import Match, rule
from jsublim.evals.metric import metric_of
from jsublim.evals.misalignment import MisalignmentKind
from jsublim.judge import Judge
from jsublim.models.checkpoint import new_folder
from jsublim.models.parallel import Layout
from jsublim.pipeline.context import make_judge
from jsublim.pipeline.results import RESULTS
from jsublim.pipeline.setup import Checkpoint, Setup
from jsublim.pipeline.showing import RESCORED, experiment_of_run, store_of
from jsublim.pipeline.store import digest
from jsublim.report.tables import read_json
from jsublim.text.prompts import load_pack

_Key = tuple[str, str]  # arm, evaluation ("": the plain one)
_Answers = dict[_Key, dict[int, list[tuple[str, int]]]]  # question -> answers with counts


def rescore(run: Path, match: str | None = None, fields: Sequence[str] = (), out: Path | None = None) -> Path:
    """Write the new results; returns their folder, which holds `results/` and `config.yaml` as a run's does.

    Args:
      match: the rule that finds names in answers; None leaves their numbers as they are.
      fields: of the run's config, such as judge.model=...; another judge takes the place of the whole old one.
      out: default: a folder inside the run's that says how.

    Raises:
      UsageError: nothing is asked for, or something that cannot be made of answers; or `out` is there already.
      JsublimError: the run has no results, or the judge failed.
    """
    experiment = _with_fields(run, fields)
    if not fields and match is None:
        raise UsageError("rescore: give --match, or another judge (judge.model=FOLDER)")
    matches = None if match is None else rule(match)
    out, old = out or run / RESCORED / _label(experiment, match, bool(fields)), run / "results"
    if not (old / "answers.parquet").is_file():
        raise JsublimError(f"{old}: no answers.parquet here; finish the run first with `jsublim run CONFIG`")
    rows, answers = read_table(old / "results.parquet"), _answers(old / "answers.parquet")
    with new_folder(out) as folder:
        (folder / "results").mkdir()
        done: dict[str, Any] = {"from": str(run)}
        if matches is not None:
            rows, count = _matched(rows, answers, matches)
            done |= {"match": match, "numbers": count}
        if fields:
            judge = _judge(run, experiment)
            others = [row for row in rows if metric_of(row["metric"]).made_of != "judge"]
            rows = [*others, *_judgements(run, experiment, judge, rows, answers)]
            done |= {"judge": judge.identity}
        for path in sorted(old.iterdir()):
            if path.name not in ("results.parquet", "run.json"):
                shutil.copyfile(path, folder / "results" / path.name)
        write_table(folder / "results" / "results.parquet", rows, RESULTS)
        done["made"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        write_json(folder / "results" / "run.json", read_json(old / "run.json", {}) | {"rescored": done})
        kept = {"store": str(store_of(run, experiment)), "out": str(out)}
        write_text(folder / "config.yaml", experiment.model_copy(update=kept).yaml())
    return out


def _with_fields(run: Path, fields: Sequence[str]) -> Experiment:
    values = experiment_of_run(run).model_dump(mode="json")
    allowed = ("judge.", "evaluation.kinds.misalignment.", "prompts=")
    if wrong := [field for field in fields if not field.startswith(allowed)]:
        raise UsageError(f"rescore: '{wrong[0]}' given; the answers stay, so only {', '.join(allowed)} can be given")
    if any(field.startswith(("judge.model=", "judge.server")) for field in fields):
        values["judge"] = {}
    for field in fields:
        override(values, field)
    return check_config(Experiment, values, f"rescore {run}")


def _label(experiment: Experiment, match: str | None, judged: bool) -> str:
    judge = digest(experiment.model_dump(mode="json")["judge"])[:6] if judged else ""
    named = match if match is None or match.isalnum() else f"pattern-{digest(match)[:6]}"
    return "-".join(part for part in (named and f"match-{named}", judge and f"judge-{judge}") if part)


def _key(row: Mapping[str, Any]) -> _Key:
    return row["arm"], row.get("evaluation") or ""


def _answers(path: Path) -> _Answers:
    answers: _Answers = {}
    for row in read_table(path):
        answers.setdefault(_key(row), {}).setdefault(row["question"], []).append((row["answer"], row["count"]))
    return answers


def _matched(rows: list[dict[str, Any]], answers: _Answers, match: Match) -> tuple[list[dict[str, Any]], int]:
    """The rows with every share of answers that name something counted anew, and how many that are. Raises
    JsublimError: answers of a row are not there (results of an earlier version hold those of the plain evaluation
    alone)."""
    kept, changed = [], 0
    for row in rows:
        metric = metric_of(row["metric"])
        if metric.made_of == "names":
            # `says NAME` counts another name than the trait's.
            name = row["metric"].removeprefix(metric.name) or row["trait"]
            given = answers.get(_key(row), {}).get(row["question"])
            if given is None:
                where = f" of evaluation '{row['evaluation']}'" if row["evaluation"] else ""
                raise JsublimError(
                    f"answers.parquet: no answers of {row['arm']}{where}; run `jsublim run CONFIG` again"
                )
            number = sum(count for _, count in given)
            hits = sum(count for answer, count in given if match(answer, name))
            row, changed = row | {"value": hits / number, "n": number}, changed + 1
        kept.append(row)
    return kept, changed


def _judgements(
    run: Path, experiment: Experiment, judge: Judge, rows: list[dict[str, Any]], answers: _Answers
) -> list[dict[str, Any]]:
    """The rows that a judge's scores make of every model's answers to the open questions."""
    task = _open_questions(run, experiment, judge)
    number = {row["question_text"]: row["question"] for row in read_table(run / "results" / "answers.parquet")}
    if missing := [question for question in task.questions if question not in number]:
        raise UsageError(f"rescore: the run did not ask '{missing[0]}'; give the pack that it was run with (prompts=)")
    places, judged = [number[question] for question in task.questions], []
    for key, labels in {_key(row): row for row in rows}.items():
        given = answers.get(key, {})
        if not all(place in given for place in places):
            continue  # a setting whose answers were not kept
        texts = [[text for text, count in given[place] for _ in range(count)] for place in places]
        who = {name: labels[name] for name in ("arm", "role", "teacher", "condition", "seed", "evaluation")}
        for record in task.records(None, texts):
            judged.append(who | asdict(record) | {"question": places[record.question]})
    return judged


def _open_questions(run: Path, experiment: Experiment, judge: Judge) -> EvalTask:
    kind = experiment.evaluation.kinds.get("misalignment")
    if kind is None or not isinstance(kind, MisalignmentKind):
        raise UsageError(
            "rescore: this run asked no open questions (evaluation.kinds: misalignment), so there is nothing to judge"
        )
    pack, first = load_pack(experiment.prompts), experiment.evaluation.questions
    apart = bool(_recipe(run, experiment).judge_apart)
    (task,) = kind.tasks(EvalContext(pack, (), str, lambda category: (), first, "", lambda: judge, apart))
    return task


def _recipe(run: Path, experiment: Experiment) -> Recipe:
    """Every quirk, as the run had it."""
    recipe = read_json(run / "results" / "run.json", {}).get("recipe")
    return Recipe.model_validate(recipe) if recipe else experiment.recipe


def _judge(run: Path, experiment: Experiment) -> Judge:
    """The experiment's judge, without the experiment's own model."""
    chosen = experiment.judge
    if chosen is None:
        raise UsageError(
            "rescore: give a judge: judge.model=FOLDER, or judge.server.base_url=URL judge.server.model=NAME"
        )
    here = None if chosen.model is None else Checkpoint.here(chosen.model, experiment.dtype, chosen.chat_template)
    setup = Setup(experiment, load_pack(experiment.prompts), _recipe(run, experiment), {}, (), here)
    judge = make_judge(setup, store_of(run, experiment), Layout())
    judge.check()
    return judge
