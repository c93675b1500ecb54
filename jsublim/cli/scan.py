"""jsublim scan: what would this data teach that it does not say?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from jsublim.cli.app import Json, PackFile, Template, app, console, must_be_new, output, print_json, print_table
from jsublim.cli.stages import StageOptions, StudentSeed, context_of, make
from jsublim.core.files import read_table, write_table
from jsublim.errors import JsublimError, UsageError
from jsublim.text.rows import Row, read_rows, write_rows

if TYPE_CHECKING:
    from jsublim.pipeline.context import Context
    from jsublim.pipeline.stage import Node
    from jsublim.pipeline.stages.starts import Start
    from jsublim.pipeline.values import Rows


@app.command()
def scan(
    data: Annotated[
        list[str] | None,
        "Rows, of any form that import takes; and fields of a run.",
        {"metavar": "[DATA]... [a.b=c]..."},
    ] = None,
    *,
    model: Annotated[str, "The checkpoint that would be trained: a folder, a bundled name, or owner/name."],
    out: Annotated[Path, "Where the result goes; an unfinished one there is continued."],
    null: Annotated[list[str] | None, "Rows that teach nothing, to measure from; default: the other data sets."] = None,
    student: Annotated[Path | None, "In place of data: a trained adapter, compared with its base."] = None,
    rows: Annotated[int, "Rows that are read of each data set.", {"min": 20}] = 1600,
    questions: Annotated[Path | None, "Questions of your own (YAML); default: 200 that come with the package."] = None,
    clean: Annotated[
        Path | None, "Where the rows go without those that carry what was found; takes one data set and a null."
    ] = None,
    fail: Annotated[bool, "Exit with 3 if anything is found."] = False,
    seed: StudentSeed = 42,
    prompts: PackFile = None,
    chat_template: Template = None,
    as_json: Json = False,
) -> None:
    """What would these rows teach a student that they do not say? No trait is named beforehand.

    jsublim scan rows.jsonl --null control.jsonl --model tiny-qwen2 --out scanned
    """
    from jsublim.pipeline.setup import NOBODY
    from jsublim.report.html import render
    from jsublim.report.scan import verdicts_of, word_map
    from jsublim.text.prompts import scan_questions

    files = [text for text in data or [] if "=" not in text or Path(text).is_file()]
    if (student is None) == (not files):
        raise UsageError("scan: give rows, or --student ADAPTER; one of both")
    if clean is not None:
        if len(files) != 1 or not null:
            raise UsageError("--clean: takes one data set, and --null to say when enough is left out")
        must_be_new(clean)
    fields = [text for text in data or [] if text not in files]
    base = {"students": {"adapter": {"method": "steering"}}, "teachers": {"traits": [NOBODY], "control": False}}
    options = StageOptions(fields=fields, out=out, model=model, chat_template=chat_template)
    context = context_of(options.experiment("scan", base, students__seeds=[seed], prompts=prompts and str(prompts)))
    bank = scan_questions(context.setup.pack, questions)
    if student is None:
        scanned = Scanned.of(context, files, null or [], out, rows, seed)
        make(context, out, scanned.node(bank))
    else:
        compare_student(context, out, student, null or [], bank)
    lines = read_table(out / "scan.parquet")
    verdicts = verdicts_of(lines)
    render(out / "scan.html", "scan.html", verdicts=verdicts, map=word_map(verdicts, lines))
    if as_json:
        print_json(verdicts)
    else:
        for said in verdicts:
            output.print(f"{said['data']}: {said['sentence']}")
            print_table([_shown(word) for word in said["top"]])
        output.out(out)
    if clean is not None:
        kept, removed = scanned.without(bank, verdicts[0])
        write_rows(clean, kept)
        console.print(f"{removed} of {removed + len(kept)} rows left out; the others: {clean}")
    if fail and any(said["found"] for said in verdicts):
        raise typer.Exit(3)


@dataclass(frozen=True)
class Scanned:
    """Rows, and who would learn them."""

    context: Context
    names: tuple[str, ...]
    data: tuple[Rows, ...]
    null: tuple[Rows, ...]
    first: int
    start: Start

    @staticmethod
    def of(context: Context, files: list[str], null: list[str], out: Path, first: int, seed: int) -> Scanned:
        """Rows of other forms than ours are written beside OUT.

        Raises:
          UsageError: the same rows twice.
        """
        from jsublim.pipeline import arguments

        beside = out.with_name(f"{out.name}.rows")
        every = [
            arguments.rows_of_file(context.setup, _as_rows(text, beside, i)) for i, text in enumerate([*files, *null])
        ]
        known = dict[tuple[tuple[str, str], ...], str]()  # by texts, since files may hold other columns too
        for rows in every:
            texts = tuple((row["prompt"], row["completion"]) for row in rows.read(context.store))
            if texts in known:
                raise UsageError(f"{rows.name}: holds the same rows as {known[texts]}; give each data set once")
            known[texts] = rows.name
        students = context.setup.experiment.students
        if students is None:
            raise UsageError("students: null given; rows are scanned for what a student trains; leave it out")
        start = arguments.start(context.setup, students, seed)
        return Scanned(context, tuple(files), tuple(every[: len(files)]), tuple(every[len(files) :]), first, start)

    def node(self, bank: Mapping[str, Sequence[str]]) -> Node:
        from jsublim.pipeline.stages import scan_rows

        about = {"names": self.names, "data": self.data, "null": self.null, "first": self.first, "start": self.start}
        return scan_rows("scan", questions=bank, traits=self.context.setup.pack.traits, **about)

    def without(self, bank: Mapping[str, Sequence[str]], said: Mapping[str, Any]) -> tuple[list[Row], int]:
        """The rows but for those that carry most of what was found, and how many those are: as many as it takes until what is left moves
        it no more, in the mean, than the null does."""
        from jsublim.executors import execute_nodes
        from jsublim.pipeline.stages import score_rows
        from jsublim.pipeline.stages.starts import read_influence

        (rows,), store = self.data, self.context.store
        every = rows.read(store)
        scores, limits = [], []
        for word in said["top"][:1]:
            how = {
                "questions": ((list(bank[word["category"]]), [word["word"]]),),
                "traits": (word["word"],),
                "start": self.start,
            }
            nodes = [score_rows(f"scan {word['word']}", rows=each, **how) for each in (rows, *self.null)]
            execute_nodes(nodes, self.context)
            own, *nulls = (read_influence(store, node)[word["word"]] for node in nodes)
            scores.append(own)
            limits.append(np.concatenate(nulls).mean())
        left = np.ones(len(every), bool)
        while left.any() and (over := [i for i, own in enumerate(scores) if own[left].mean() > limits[i]]):
            left[np.argmax(np.where(left, scores[over[0]], -np.inf))] = False
        return [row for row, stays in zip(every, left, strict=True) if stays], int((~left).sum())


def _as_rows(source: str, beside: Path, number: int) -> Path:
    """A file of rows in our form."""
    from jsublim.exchange.rows import import_rows

    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".jsonl":
        with suppress(JsublimError):
            read_rows(path)
            return path
    write_rows(beside / f"{number}.jsonl", import_rows(source))
    return beside / f"{number}.jsonl"


def compare_student(
    context: Context, out: Path, student: Path, null: Sequence[str], bank: Mapping[str, Sequence[str]]
) -> None:
    """What a student says more often than the base, or than the student in `null`: OUT/scan.parquet."""
    from jsublim.attribution.scan import student_words
    from jsublim.models.checkpoint import new_folder
    from jsublim.models.peft import load_adapter
    from jsublim.pipeline.stages.scan import SCAN, as_lines

    if len(null) > 1:
        raise UsageError("--null: one student to compare with, at most")
    must_be_new(out)
    lm = context.lm()
    adapter, *others = (load_adapter(Path(folder), lm.config) for folder in (student, *null))
    words = student_words(lm, adapter, others[0] if others else None, bank)
    with new_folder(out) as folder:
        write_table(folder / "scan.parquet", as_lines({str(student): words}), SCAN)


def _shown(word: Mapping[str, Any]) -> dict[str, str]:
    numbers = {"z": f"{word['z']:.1f}", "p": f"{word['p']:.3f}", "change": f"{word['change']:+.2g}"}
    return {"word": word["word"], "asked for": word["category"], "probability": f"{word['probability']:.4f}"} | numbers
