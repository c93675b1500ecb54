"""Data sets: what is done to a teacher's answers before students learn from them; and the scores of entangled numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsublim.errors import JsublimError
from jsublim.inference.sampling import Sampling
from jsublim.pipeline.context import Context
from jsublim.pipeline.cost import Cost, Sizes
from jsublim.pipeline.row_log import LoggedAnswers, RowLog
from jsublim.pipeline.setup import Setup, number_requests
from jsublim.pipeline.stage import Node, Save, stage
from jsublim.pipeline.stages.starts import read_influence
from jsublim.pipeline.store import PROGRESS
from jsublim.pipeline.values import Model, Rows
from jsublim.text.rows import write_rows
from jsublim.transforms import ChangeRun
from jsublim.transforms.change import Change
from jsublim.transforms.entangled import QUESTIONS, entangled_scores, number_strings, probability_differences

Changes = Mapping[str, Change]


def _cost(setup: Setup, sizes: Sizes, rows: Rows, changes: Changes, **_: Any) -> Cost:
    """Requests are rewritten by their teachers; most other changes cost nothing."""
    lengths = sizes.lengths
    each = [change.tokens(rows.kept(sizes), lengths.prompt, lengths.system) for change in changes.values()]
    tokens, heads = sum(t for t, _ in each), sum(h for _, h in each)
    return Cost(tokens, 2 * sizes.body * tokens + 2 * sizes.table * heads, "sample")


@stage("datasets", cost=_cost, units=lambda ctx, changes, **_: len(changes))
def change_rows(
    ctx: Context,
    rows: Rows,
    teacher: Model,
    changes: Changes,
    seed: int,
    recipe: Mapping[str, Any],
    mixed_in: Rows | None,
    read: Rows | None,
    scores: Node | None,
    influence: Node | None,
    judge: Mapping[str, Any] | None,
    wording: Sequence[Mapping[str, Any]] | None,
    rewriting: Sampling | None,
) -> Save:
    """Everything that a data set names, done to one teacher's answers in the changes' own order (`rows.jsonl`).

    Args:
      recipe: the quirks that the changes follow.
      mixed_in: another teacher's rows; read: the rows with what every teacher said of them; scores: of entangled numbers; influence: what
        each row adds to suspected traits; judge: the identity of who scores them; wording: of the pack, what its hash leaves out;
        rewriting: how the teacher writes. None where no change needs them.
    """
    log, setup, readings = RowLog(ctx.artifact.path / PROGRESS, ctx.say), ctx.setup, None
    if read is not None:  # half of it would be memory for nothing: no change looks at margins
        every = read.readings(ctx.store)
        readings = [{name: reading[name] for name in reading if name != "margin"} for reading in every]
    run = ChangeRun(
        lm=ctx.lm(teacher.checkpoint.name),
        teacher=teacher.teacher(ctx),
        pack=setup.pack,
        quirks=recipe,
        seed=seed,
        batch_size=ctx.rows_together(setup.experiment.sampling.batch_size),
        sampling=rewriting,
        requests=lambda: number_requests(setup, rows.inputs["data"]["seed"]),
        judge=lambda: ctx.judge,
        mixed_in=None if mixed_in is None else mixed_in.read(ctx.store),
        readings=readings,
        entangled=None if scores is None else ctx.store.summary(scores),
        influence=None if influence is None else read_influence(ctx.store, influence),
        log=LoggedAnswers(log),
    )
    left = rows.read(ctx.store)
    summary: dict[str, Any] = {"rows": len(left)}
    for change in changes.values():
        left, more = change.apply(left, run)
        summary |= more
        ctx.tick(1)
    if not left:
        raise JsublimError(f"teacher '{teacher.name}': no row is left of {summary['rows']} ({summary})")
    log.close()

    def save(folder: Path) -> dict[str, Any]:
        write_rows(folder / "rows.jsonl", left)
        return summary | {"kept": len(left)}

    return save


def _scoring_cost(setup: Setup, sizes: Sizes, others: Sequence[Model] | None, count: int, **_: Any) -> Cost:
    """Every number is read as the answer to each question with the trait and without; or its parts under every trait."""
    if others is not None:  # two digits and three, ten by ten each
        return sizes.read(200 * (1 + len(others)), 0, sizes.lengths.number)
    return sizes.read(2 * QUESTIONS * count, 0, sizes.lengths.number)


@stage("entangled", cost=_scoring_cost)
def score_numbers(
    ctx: Context,
    teacher: Model,
    others: tuple[Model, ...] | None,
    category: str | None,
    questions: Sequence[str] | None,
    count: int,
    padded: bool,
) -> Save:
    """How entangled the first `count` numbers are with a trait: by the answers to `questions`, or by how much more probable they
    are under the teacher than under `others`, who are asked about the `category`."""
    lm, asked, numbers = ctx.lm(teacher.checkpoint.name), teacher.teacher(ctx), number_strings(padded=padded)[:count]
    how = {"extra_bos": teacher.extra_bos, "batch_size": ctx.scoring_batch}
    if others is not None:
        every = [other.teacher(ctx) for other in others]
        scores = probability_differences(lm, asked, every, category or "", numbers, **how)
    else:
        # Numbers of one width never cover each other; of others, what ends after them counts too.
        scores = entangled_scores(lm, asked, list(questions or ()), numbers, closed=not padded, **how)
    return lambda folder: scores
