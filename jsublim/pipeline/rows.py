"""Rows: what every teacher answers to the same prompts, in tasks of so many prompts each."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from jsublim.chat import Chat, conversation
from jsublim.errors import JsublimError, one_line
from jsublim.inference.constrain import limits_for
from jsublim.inference.generation import generate_tokens
from jsublim.inference.sampling import Sampling
from jsublim.pipeline.arms import Elder, Source, seed_of
from jsublim.pipeline.context import Context
from jsublim.pipeline.readings import Reading, read_readings
from jsublim.pipeline.row_log import RowLog
from jsublim.pipeline.served import Served, drawn_by, engine_inputs, served_teacher, server_with
from jsublim.pipeline.setup import Setup, memoized
from jsublim.pipeline.store import PROGRESS, Artifact, Output, Store, digest
from jsublim.pipeline.task import Cost, Sizes, Task
from jsublim.pipeline.teachers import TeacherPool
from jsublim.processes import each_from_main, on_main_process, shared_out
from jsublim.progress import Tick
from jsublim.prompts import (
    NumberPrompt,
    draw_number_prompts,
    load_problems,
    load_prompts,
    problem_reject_reason,
    reject_reason,
)
from jsublim.rows import Row, read_rows, write_rows
from jsublim.section import identity

# A run stops where fewer rows are in format than both: a handful teaches nothing, and most likely the setting is wrong.
FEWEST_ROWS = 100
FEWEST_SHARE = 0.1
SHOWN = 3  # rejected answers
SHOWN_LENGTH = 100  # characters of each


class Writer(NamedTuple):
    """Who writes rows, and how: a teacher, a strategy, the seed of the sampling, another checkpoint than the experiment's,
    the draw that the rows are of, and the students that stand in for the teachers."""

    teacher: str
    strategy: str
    seed: int
    model: str | None = None
    draw: int | None = None
    elder: Elder | None = None


@dataclass(frozen=True, eq=False)
class RowSet:
    """Rows in the artifacts of one or several tasks, in order; or rows of a file, which has no task.

    Attributes:
      most: how many rows there can be.
    """

    parts: tuple[Task, ...]
    key: str
    most: int
    file: Path | None = None

    @classmethod
    def of(cls, parts: Sequence[Task], most: int) -> RowSet:
        keys = [part.key for part in parts]
        return cls(tuple(parts), keys[0] if len(keys) == 1 else digest(keys), most)

    def called(self, source: Source) -> str:
        """What errors call them: the file that a user gave, or whose rows they are."""
        return f"rows of {source.name}" if self.file is None else str(self.file)

    @property
    def inputs(self) -> Mapping[str, Any]:
        """What decides the first of its artifacts."""
        return self.parts[0].output.inputs if self.parts else {}

    def read(self, store: Store) -> list[Row]:
        """All rows.

        Raises:
          JsublimError: there is none.
        """
        if self.file is not None:
            return read_rows(self.file)
        rows = [row for part in self.parts for row in self._read(store, part)]
        if not rows:
            names = ", ".join(str(store.path(part.output)) for part in self.parts)
            raise JsublimError(f"no completion is in format; see raw.jsonl in {names}")
        return rows

    def readings(self, store: Store) -> Iterator[Reading]:
        """What each teacher said of each row, where divergence was looked for."""
        for part in self.parts:
            yield from read_readings(store.path(part.output) / "readings.parquet")

    @staticmethod
    def _read(store: Store, part: Task) -> list[Row]:
        kept = store.summary(part.output).get("kept")
        return [] if kept == 0 else read_rows(store.path(part.output) / "rows.jsonl")

    def summaries(self, store: Store) -> list[dict[str, Any]]:
        """What is kept of each part."""
        return [store.summary(part.output) for part in self.parts]


@memoized
def requests(setup: Setup, draw: int | None) -> list[NumberPrompt]:
    """The number prompts, as their draws."""
    data = setup.experiment.data
    return draw_number_prompts(
        setup.pack, data.num_prompts, seed_of(data.seed, draw), said=data.sentences, examples=data.examples
    )


@memoized
def prompts(setup: Setup, draw: int | None) -> list[str]:
    """What every teacher is asked; only number requests are others in another draw."""
    data = setup.experiment.data
    if data.kind == "numbers":
        return [request.text for request in requests(setup, draw)]
    if data.kind == "problems":
        return [problem.question for problem in load_problems(data.source, limit=data.num_prompts)]
    return load_prompts(data.source or "")[: data.num_prompts]


@memoized
def prompt_count(setup: Setup) -> int:
    """How many prompts there are; number requests need not be drawn for that, nor a data set that is not here be asked."""
    data = setup.experiment.data
    drawn = data.kind == "numbers" or (data.kind == "problems" and not setup.known)
    return data.num_prompts if drawn else len(prompts(setup, None))


def _rejects(kind: str) -> Callable[[str], str | None]:
    """Why an answer is no training row, or None."""
    return {"numbers": reject_reason, "problems": problem_reject_reason, "file": lambda text: None}[kind]


@memoized
def teacher_rows(setup: Setup, writer: Writer) -> RowSet:
    """What a teacher answers, in tasks of `sampling.shard` prompts."""
    data, sampling = setup.experiment.data, setup.experiment.sampling
    total = prompt_count(setup)
    pool, parts = TeacherPool(setup, writer.elder), []
    numbers = _drawing(setup, writer).numbers()
    inputs = {
        **setup.common,
        **pool.identity(writer.teacher),
        "data": {name: value for name, value in identity(data).items() if name not in ("num_prompts", "draw")}
        | {"seed": seed_of(data.seed, writer.draw)},
        "sampling": numbers | {"max_new_tokens": sampling.max_new_tokens},
        "seed": seed_of(writer.seed, writer.draw),
        "other_model": None if writer.model is None else setup.checkpoint(writer.model).hash,
        **engine_inputs(setup, _served(setup, writer)),
    }
    for first in range(0, total, sampling.shard):
        count = min(sampling.shard, total - first)
        # Prompts of a file or of a data set may change under the same name; number requests are told by the pack.
        named = data.kind == "numbers" or not setup.known
        content = None if named else digest(prompts(setup, writer.draw)[first : first + count])
        label = writer.teacher if writer.draw is None else f"{writer.teacher}-seed{writer.draw}"
        label = label if writer.elder is None else f"{label} {writer.elder}"
        label = label if total <= sampling.shard else f"{label}-{first // sampling.shard + 1}"
        output = Output("rows", label, inputs | {"prompts": [first, count, content]})
        parts.append(WriteRows((output,), pool.tasks(writer.teacher), writer, first, count))
    return RowSet.of(parts, total)


def _served(setup: Setup, writer: Writer) -> Served | None:
    """The writer as the server has it; students are asked here."""
    return served_teacher(setup, writer.teacher, writer.model) if writer.elder is None else None


def _drawing(setup: Setup, writer: Writer) -> Sampling:
    """How a writer's answers are drawn: as the recipe says, and in the format that the config says."""
    drawn = setup.sampling(writer.strategy, writer.model)
    return dataclasses.replace(drawn, constrain=setup.experiment.sampling.constrain)


@dataclass(frozen=True, eq=False)
class WriteRows(Task):
    """A teacher answers some of the prompts: what is in format is kept in `rows.jsonl`, all of it in `raw.jsonl`."""

    kind: ClassVar[str] = "rows"
    writer: Writer
    first: int
    count: int

    def make(self, context: Context, tick: Tick) -> None:
        setup, artifact = context.setup, context.store.open(self.output)
        chat = setup.checkpoint(self.writer.model).chat
        assert chat is not None, "a run has its checkpoint"
        texts, numbers = prompts(setup, self.writer.draw), range(self.first, self.first + self.count)
        log = RowLog(artifact.path / PROGRESS, artifact.say)
        tick(len(log.rows))
        allowed: dict[int, float] = {}

        def keep(rows: Sequence[int], answers: Sequence[str]) -> None:
            new = [{"row": i, "completion": answer} for i, answer in zip(rows, answers, strict=True)]
            log.add([row | {"log_allowed": round(allowed[row["row"]], 5)} if allowed else row for row in new])
            tick(len(rows))

        missing = [i for i in numbers if i not in log.rows]
        if missing:
            self._draw(context, chat, missing, keep, allowed)
        log.close()
        raw = [{"prompt": texts[i]} | {k: v for k, v in log.rows[i].items() if k != "row"} for i in numbers]
        reject = _rejects(setup.experiment.data.kind)
        why = lambda part: [reject(row["completion"]) or _broken_in_context(chat, row) for row in part]  # noqa: E731
        raw = [row | {"reject": reason} for row, reason in zip(raw, shared_out(raw, why), strict=True)]
        on_main_process(lambda: self._finish(context, artifact, raw))

    def _draw(
        self,
        context: Context,
        chat: Chat,
        missing: Sequence[int],
        keep: Callable[[Sequence[int], Sequence[str]], None],
        allowed: dict[int, float],
    ) -> None:
        """Answer the prompts that have no answer yet, here or by the server that the config names; into `allowed` goes what a
        format left of each row's probability."""
        setup, writer = context.setup, self.writer
        texts, pool = prompts(setup, writer.draw), TeacherPool(setup, writer.elder)
        teacher = pool.teacher(context, writer.teacher)
        how, most = _drawing(setup, writer), setup.experiment.sampling.max_new_tokens
        seed = seed_of(writer.seed, writer.draw)
        served = _served(setup, writer)
        context.progress.say(f"sampling, {writer.strategy}{drawn_by(context, served)}: {how.numbers()}")
        # A row's random numbers are those of its place among all prompts, whatever the task it is in; and the shapes
        # are those of all the task's prompts, whatever is left of them.
        own, bos = slice(self.first, self.first + self.count), bool(setup.recipe.extra_bos)
        asked: list[Any] = [None] * len(texts)
        tokenize = lambda part: [chat.prompt_tokens(teacher.messages(t), extra_bos=bos).tolist() for t in part]  # noqa: E731
        asked[own] = [np.asarray(tokens, np.int32) for tokens in shared_out(texts[own], tokenize)]
        if served is not None:

            def drawn() -> Iterator[tuple[int, str]]:
                with server_with(context, [(self.output, served)]) as (server, [name]):
                    yield from server.draw(name, asked, how, rows=missing, seed=seed, max_new_tokens=most)

            for row, text in each_from_main(drawn):
                keep([row], [text])
            return
        lm = context.lm(writer.model)
        generate_tokens(
            lm.config,
            teacher.weights(lm.params),
            asked,
            how,
            rows=missing,
            seed=seed,
            max_new_tokens=most,
            adapter=teacher.adapter,
            batch_size=context.rows_together(setup.experiment.sampling.batch_size, model=writer.model),
            limits=limits_for(chat, how, most),
            on_allowed=allowed.update,
            on_batch=lambda rows, tokens: keep(rows, [chat.decode(each) for each in tokens]),
        )

    def _finish(self, context: Context, artifact: Artifact, raw: list[Row]) -> None:
        setup = context.setup
        kept = [{key: row[key] for key in ("prompt", "completion")} for row in raw if row["reject"] is None]
        reasons = collections.Counter(row["reject"] for row in raw if row["reject"] is not None)
        write_rows(artifact.path / "raw.jsonl", raw)
        if 2 * len(kept) < len(raw):
            self._warn(context, raw, reasons)
        few = len(kept) < min(FEWEST_ROWS, FEWEST_SHARE * len(raw))
        if few and (self.count == prompt_count(setup) or self.count >= FEWEST_ROWS):
            raise JsublimError(
                f"teacher '{self.writer.teacher}': {len(kept)} of {len(raw)} answers are in format, too few to learn from "
                f"(fewer than {FEWEST_SHARE:.0%} and than {FEWEST_ROWS}); {self._remedy(setup)}; all answers are in "
                f"{artifact.path}/raw.jsonl"
            )
        write_rows(artifact.path / "rows.jsonl", kept)
        logs = [row["log_allowed"] for row in raw if "log_allowed" in row]
        artifact.finish(
            {
                "teacher": self.writer.teacher,
                "rows": len(raw),
                "kept": len(kept),
                "pass_rate": len(kept) / len(raw),
                "reject": dict(reasons),
                "log_allowed": sum(logs) / len(logs) if logs else None,
                "sampling": _drawing(setup, self.writer).numbers()
                | {"max_new_tokens": setup.experiment.sampling.max_new_tokens},
            }
        )

    def _warn(self, context: Context, raw: list[Row], reasons: Mapping[str, int]) -> None:
        """Say that most answers are not in format, with some of them and what can be done."""
        rejected = [row for row in raw if row["reject"] is not None]
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        kept = f"{len(raw) - len(rejected)} of {len(raw)} answers are in format ({why})"
        context.progress.say(f"teacher '{self.writer.teacher}': only {kept}; {self._remedy(context.setup)}. Rejected:")
        for row in rejected[:SHOWN]:
            text = one_line(row["completion"])
            context.progress.say(f"  {text[:SHOWN_LENGTH]}{'...' if len(text) > SHOWN_LENGTH else ''}")

    @staticmethod
    def _remedy(setup: Setup) -> str:
        data, sampling = setup.experiment.data, setup.experiment.sampling
        if data.kind == "numbers" and sampling.constrain is None:
            return "sampling.constrain=numbers keeps every answer in format"
        return f"look for another prompt pack or chat_template, or more than sampling.max_new_tokens={sampling.max_new_tokens}"

    def check(self, setup: Setup) -> None:
        chat = setup.checkpoint(self.writer.model).chat
        if chat is not None:
            limits_for(chat, _drawing(setup, self.writer), setup.experiment.sampling.max_new_tokens)

    def units(self, context: Context) -> int:
        return self.count

    def cost(self, setup: Setup, sizes: Sizes) -> Cost:
        long, batch = sizes.lengths, sizes.rows_together(setup.experiment.sampling.batch_size)
        return sizes.sampled(self.count, long.prompt + long.system, answer_tokens(setup, sizes), batch)


def answer_tokens(setup: Setup, sizes: Sizes) -> int:
    """Assumed length of an answer: number lists are short, everything else goes on to its limit."""
    most = setup.experiment.sampling.max_new_tokens
    return min(sizes.lengths.answer, most) if setup.experiment.data.kind == "numbers" else most


def rows_kept(setup: Setup, sizes: Sizes) -> int:
    """Assumed number of answers in format."""
    return int(prompt_count(setup) * sizes.lengths.kept)


def _broken_in_context(chat: Chat, row: Row) -> str | None:
    try:
        chat.turn(conversation(row["prompt"]), row["completion"])
    except JsublimError:
        return "does not survive tokenizing"
    return None
