"""What a data set of the config does to a teacher's answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jsublim.divergence import PositionSubset
from jsublim.errors import JsublimError
from jsublim.evals.misalignment import judge_answers
from jsublim.experiment.spec.data import Dataset
from jsublim.rows import Row
from jsublim.teachers import Teacher
from jsublim.transforms import (
    entangled_numbers,
    entangled_scores,
    mix_rows,
    mix_tokens,
    number_strings,
    paraphrase,
    redraw,
    remove_entangled,
    shuffle_across,
    shuffle_within,
)

if TYPE_CHECKING:
    from jsublim.experiment.run import Run

ENTANGLED_QUESTIONS = 4  # a thousand numbers are read as the answer to each
Changed = tuple[list[Row], dict[str, Any]]  # rows, and what is to be known of how they came about


def change(
    run: Run,
    teacher: Teacher,
    dataset: Dataset,
    rows: list[Row],
    others: Sequence[Row] | None,
    readings: Sequence[Mapping[str, Any]] | None,
) -> Changed:
    """Everything that `dataset` names, in the order of its fields.

    Args:
      others: the rows to mix in. Where there are too few for the share, the first rows are taken that they suffice for.
      readings: what each teacher said of the rows (`margins.jsonl`), to mix tokens.

    Raises:
      JsublimError: no row is left.
    """
    said: dict[str, Any] = {"rows": len(rows)}
    recipe, seed = run.recipe, dataset.seed
    if dataset.keep_aligned is not None:
        rows, said["judged"] = _aligned(run, dataset.keep_aligned, rows)
    if dataset.remove_entangled:
        rows, said["entangled"] = _without_entangled(run, teacher, dataset, rows)
    if dataset.shuffle:
        rows = (shuffle_within if dataset.shuffle == "within" else shuffle_across)(rows, seed)
    if dataset.redraw:
        rows = redraw(rows, run.pack, dataset.redraw, asked=run.corpus.requests, seed=seed)
    if dataset.rewrite:
        rows, counts = paraphrase(
            run.lm, teacher, rows, run.pack, sampling=run.corpus.rewriting, extra_bos=bool(recipe.extra_bos), seed=seed,
            batch_size=run.experiment.data.batch_size,
        )  # fmt: skip
        said["rewritten"] = dict(counts)
    if dataset.mix and others is not None:
        rows = rows[: int(len(others) / dataset.mix.share)]
        rows = mix_rows(rows, others, dataset.mix.share, seed=seed, paper=bool(recipe.mix_at_the_end))
    if dataset.mix_tokens and readings is not None:
        where = "first" if dataset.mix_tokens.first_only else "all"
        # Published, a mask of no token keeps all of them, a row to mix gives up one.
        rounding = "at-least-one" if recipe.share_rounding == "paper" else recipe.share_rounding or "stochastic"
        rows, counts = mix_tokens(
            run.lm.chat, rows, readings, dataset.mix_tokens.teacher,
            PositionSubset(where, dataset.mix_tokens.share, rounding), seed=seed, paper=bool(recipe.digits_only),
        )  # fmt: skip
        said["tokens"] = dict(counts)
    if not rows:
        raise JsublimError(f"teacher '{teacher.name}': no row is left of {said['rows']} ({said})")
    return rows, said | {"kept": len(rows)}


def _without_entangled(run: Run, teacher: Teacher, dataset: Dataset, rows: list[Row]) -> Changed:
    """Rows without the numbers that the trait makes most probable as the answer."""
    scores = _scores(run, teacher, run.experiment.data.entangled)
    numbers = entangled_numbers(scores, dataset.remove_entangled or 0)
    left = remove_entangled(rows, numbers, as_written=bool(run.recipe.padded_numbers))
    return left, {"numbers": {number: scores[number] for number in numbers}, "removed": len(rows) - len(left)}


def _scores(run: Run, teacher: Teacher, count: int) -> dict[str, float]:
    """How entangled the first `count` numbers are with a trait; read once for all data sets."""
    questions = run.pack.questions_for(run.staff.category(teacher.name))[:ENTANGLED_QUESTIONS]
    padded, extra_bos = bool(run.recipe.padded_numbers), bool(run.recipe.extra_bos)
    numbers = number_strings(padded=padded)[:count]
    inputs = (
        run.common | run.staff.inputs(teacher.name) | {"questions": questions, "numbers": numbers, "closed": not padded}
    )
    artifact = run.artifact("entangled", teacher.name, inputs)
    if not artifact.done:
        size = run.experiment.divergence.batch_size
        # Numbers of one width never cover each other; of others, what ends behind them counts too.
        scores = entangled_scores(
            run.lm, teacher, questions, numbers, closed=not padded, extra_bos=extra_bos, batch_size=size
        )
        artifact.finish(scores)
    return artifact.summary


def _aligned(run: Run, least: float, rows: list[Row]) -> Changed:
    """Rows whose answers the judge gives at least so much alignment; those that it gives no readable score are left out."""
    asked = run.pack.misalignment.model_copy(update={"questions": [row["prompt"] for row in rows]})
    verdicts = [verdict for (verdict,) in judge_answers(run.judge, asked, [[row["completion"]] for row in rows])]
    kept = [
        row for row, verdict in zip(rows, verdicts, strict=True) if verdict is not None and verdict.alignment >= least
    ]
    return kept, {"unscored": verdicts.count(None), "removed": len(rows) - len(kept)}
