"""Rows: what a teacher answers to some of the prompts."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsublim.errors import JsublimError, one_line
from jsublim.inference.constrain import limits_for
from jsublim.inference.sampling import Sampling
from jsublim.inference.teachers import generate, prompt_tokens
from jsublim.pipeline.context import Context
from jsublim.pipeline.cost import Cost, Sizes
from jsublim.pipeline.row_log import RowLog
from jsublim.pipeline.served import Served, drawn_by, served, server_with
from jsublim.pipeline.setup import Setup, prompts
from jsublim.pipeline.stage import Save, stage
from jsublim.pipeline.store import PROGRESS
from jsublim.pipeline.values import Model
from jsublim.runtime.processes import each_from_main, shared_out
from jsublim.text.chat import Chat, conversation
from jsublim.text.prompts import problem_reject_reason, reject_reason
from jsublim.text.rows import Row, write_rows

# A run stops where fewer rows are in format than both: a handful teaches nothing, and most likely the setting is wrong.
FEWEST_ROWS = 100
FEWEST_SHARE = 0.1
SHOWN = 3  # rejected answers
SHOWN_ROW = 40  # characters of the first row
SHOWN_LENGTH = 100  # characters of each
REJECTS: dict[str, Callable[[str], str | None]] = {  # why an answer is no training row, or None
    "numbers": reject_reason,
    "problems": problem_reject_reason,
    "file": lambda text: None,
}


def _cost(
    setup: Setup, sizes: Sizes, span: tuple[int, int], data: Mapping[str, Any], max_new_tokens: int, **_: Any
) -> Cost:
    lengths, batch_size = sizes.lengths, setup.experiment.sampling.batch_size
    answer = min(lengths.answer, max_new_tokens) if data["kind"] == "numbers" else max_new_tokens
    return sizes.sampled(span[1], lengths.prompt + lengths.system, answer, sizes.rows_together(batch_size))


def _check(setup: Setup, teacher: Model, sampling: Sampling, max_new_tokens: int, **_: Any) -> None:
    if teacher.checkpoint.chat is not None:
        limits_for(teacher.checkpoint.chat, sampling, max_new_tokens)


@stage("rows", cost=_cost, check=_check, units=lambda ctx, span, **_: span[1])
def sample_rows(
    ctx: Context,
    teacher: Model,
    data: Mapping[str, Any],
    span: tuple[int, int],
    texts: str | None,
    sampling: Sampling,
    max_new_tokens: int,
    seed: int,
    engine: str | None,
) -> Save:
    """A teacher answers some of the prompts: what is in format is kept in `rows.jsonl`, all of it in `raw.jsonl`.

    Args:
      data: what the prompts are drawn from; texts: the digest of those that the data does not tell.
      span: the first prompt, and how many.
      engine: the server's that draws the answers; None: they are drawn here.
    """
    chat, every, numbers = teacher.checkpoint.chat, prompts(ctx.setup, data["seed"]), range(span[0], sum(span))
    assert chat is not None, "a run has its checkpoint"
    log = RowLog(ctx.artifact.path / PROGRESS, ctx.say)
    ctx.tick(len(log.rows))

    def keep(numbers: Sequence[int], rows: Sequence[Row]) -> None:
        log.add(
            [{"row": i} | {k: v for k, v in row.items() if k != "prompt"} for i, row in zip(numbers, rows, strict=True)]
        )
        ctx.tick(len(numbers))

    missing = [i for i in numbers if i not in log.rows]
    if missing:
        on_server = None if engine is None else served(ctx.setup, teacher)
        ctx.say(f"rows are drawn {sampling.words}{drawn_by(ctx, on_server)}")
        writer = teacher.teacher(ctx)
        # A row's random numbers are those of its place among all prompts, whatever the task it is in; and the shapes
        # are those of all the task's prompts, whatever is left of them.
        asked = [text if i in numbers else None for i, text in enumerate(every)]
        drawn: dict[str, Any] = {"rows": missing, "seed": seed, "max_new_tokens": max_new_tokens}
        if on_server is not None:
            tokens = prompt_tokens(chat, writer, asked, extra_bos=teacher.extra_bos)
            _draw_by_server(ctx, on_server, tokens, sampling, drawn, keep)
        else:
            lm, batch_size = ctx.lm(teacher.checkpoint.name), ctx.setup.experiment.sampling.batch_size
            drawn["batch_size"] = ctx.rows_together(batch_size, model=teacher.checkpoint.name)
            generate(lm, writer, asked, sampling, extra_bos=teacher.extra_bos, on_rows=keep, **drawn)
    log.close()
    raw = [{"prompt": every[i]} | {k: v for k, v in log.rows[i].items() if k != "row"} for i in numbers]
    why = lambda part: [_reject_reason(chat, data["kind"], row) for row in part]  # noqa: E731
    raw = [row | {"reject": reason} for row, reason in zip(raw, shared_out(raw, why), strict=True)]
    how = sampling.numbers() | {"max_new_tokens": max_new_tokens}
    about = len(raw) == len(every), how, _remedy(data, sampling, max_new_tokens)
    return functools.partial(_save, ctx, teacher.name, raw, *about)


def _draw_by_server(
    ctx: Context,
    on_server: Served,
    tokens: Sequence[Any],
    sampling: Sampling,
    drawn: dict[str, Any],
    keep: Callable[..., None],
) -> None:
    """Of several processes the first one alone talks to the server, and tells the others."""

    def answers() -> Iterator[tuple[int, str]]:
        with server_with(ctx, [(ctx.artifact.key, on_server)]) as (server, [name]):
            yield from server.draw(name, tokens, sampling, **drawn)

    for row, text in each_from_main(answers):
        keep([row], [{"completion": text}])


def _save(
    ctx: Context, teacher: str, raw: list[Row], whole: bool, sampling: dict[str, Any], remedy: str, folder: Path
) -> dict[str, Any]:
    """Keep what is in format.

    Args:
      whole: these are the answers to all prompts.

    Raises:
      JsublimError: too few are.
    """
    kept = [{key: row[key] for key in ("prompt", "completion")} for row in raw if row["reject"] is None]
    reasons = collections.Counter(row["reject"] for row in raw if row["reject"] is not None)
    write_rows(folder / "raw.jsonl", raw)
    if 2 * len(kept) < len(raw):
        _warn(ctx, teacher, raw, reasons, remedy)
    if len(kept) < min(FEWEST_ROWS, FEWEST_SHARE * len(raw)) and (whole or len(raw) >= FEWEST_ROWS):
        raise JsublimError(
            f"teacher '{teacher}': {len(kept)} of {len(raw)} answers are in format, too few to learn from (fewer than "
            f"{FEWEST_SHARE:.0%} and than {FEWEST_ROWS}); {remedy}; all answers are in {folder}/raw.jsonl"
        )
    if whole:
        first = one_line(kept[0]["completion"])[:SHOWN_ROW]
        ctx.say(f"teacher {teacher} writes {len(kept)} rows, the first: {first}")
    write_rows(folder / "rows.jsonl", kept)
    logs = [row["log_allowed"] for row in raw if "log_allowed" in row]
    share = {"pass_rate": len(kept) / len(raw), "log_allowed": sum(logs) / len(logs) if logs else None}
    counts = {"teacher": teacher, "rows": len(raw), "kept": len(kept), "reject": dict(reasons)}
    return counts | share | {"sampling": sampling}


def _remedy(data: Mapping[str, Any], sampling: Sampling, max_new_tokens: int) -> str:
    if data["kind"] == "numbers" and sampling.constrain is None:
        return "sampling.constrain=numbers keeps every answer in format"
    return f"look for another prompt pack or chat_template, or more than sampling.max_new_tokens={max_new_tokens}"


def _warn(ctx: Context, teacher: str, raw: list[Row], reasons: Mapping[str, int], remedy: str) -> None:
    """Say that most answers are not in format, with some of them and what can be done."""
    rejected = [row for row in raw if row["reject"] is not None]
    why = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    kept = f"{len(raw) - len(rejected)} of {len(raw)} answers are in format ({why})"
    ctx.say(f"teacher '{teacher}': only {kept}; {remedy}. Rejected:")
    for row in rejected[:SHOWN]:
        text = one_line(row["completion"])
        ctx.say(f"  {text[:SHOWN_LENGTH]}{'...' if len(text) > SHOWN_LENGTH else ''}")


def _reject_reason(chat: Chat, kind: str, row: Row) -> str | None:
    if (reason := REJECTS[kind](row["completion"])) is not None:
        return reason
    try:
        chat.turn(conversation(row["prompt"]), row["completion"])
    except JsublimError:
        return "does not survive tokenizing"
    return None
