"""`jsublim audit`: what rows teach a student to first order, before anything is trained on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jsublim.cli.app import AnyModel, Fields, Out, Template, app, console, experiment_of, names, output


@app.command()
def audit(
    data: Annotated[Path, typer.Option("--data", help="Rows (JSONL), with divergence positions or without.")],
    out: Out,
    traits: Annotated[str, typer.Option("--traits", help="Traits to score the rows for, with commas.")],
    fields: Fields = None,
    model: AnyModel = None,
    chat_template: Template = None,
    null: Annotated[
        Path | None, typer.Option("--null", help="Rows of a teacher without a trait, to measure from.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**31 - 1, help="Of the student's start.")] = 42,
) -> None:
    """Score every token by how far a step on it would move each trait; OUT gets audit.parquet and means.parquet, and with --null
    the null's in OUT/null and whitened.parquet."""
    import pyarrow.parquet as pq

    from jsublim.executors import execute_nodes
    from jsublim.files import atomic
    from jsublim.pipeline.arms import Source, Student
    from jsublim.pipeline.context import Context
    from jsublim.pipeline.experiment import audit as audit_of
    from jsublim.pipeline.publish import check_free, publish_folder
    from jsublim.pipeline.setup import NOBODY
    from jsublim.pipeline.stages.audit import whitened
    from jsublim.progress import Progress
    from jsublim.report.tables import read_columns
    from jsublim.teachers import CONTROL

    base = {"audit": {}, "teachers": {"traits": [NOBODY], "control": False}}
    own = {"students__seeds": [seed], "evaluation__traits": names(traits)}
    e = experiment_of("audit", fields, out, base, model=model, chat_template=chat_template, **own)
    given = {Source(NOBODY): data} | ({} if null is None else {Source(CONTROL): null})
    context = Context.load(e, Progress(console), given=given)
    students = [Student(source.teacher, "all", seed, settings=e.students) for source in given]
    nodes = [audit_of(context.setup, student) for student in students]
    places = list(zip((out, out / "null"), nodes, strict=False))
    for place, node in places:
        check_free(place, node.key, node.inputs)
    execute_nodes(nodes, context)
    for place, node in places:
        publish_folder(place, context.store, node)
    if null is not None:
        own, zero = (read_columns(place / "audit.parquet") for place, _ in places)
        with atomic(out / "whitened.parquet") as scratch:
            pq.write_table(whitened(own, zero), scratch)
    print_means([place / "means.parquet" for place, _ in places])
    output.out(out)


def print_means(paths: list[Path]) -> None:
    """The mean score of all tokens for each trait; beside it what is left beyond the null's rows, if there are any: with its interval,
    and in standard errors."""
    from rich.table import Table

    from jsublim.files import read_table
    from jsublim.report.statistics import LEVEL, normal_interval

    own, *null = ({line["trait"]: line for line in read_table(path) if line["tokens"] == "all"} for path in paths)
    shown = Table("trait", "mean score", "+-", *(["null", f"beyond it ({LEVEL:.0%})", "in errors"] if null else []))
    for trait, line in sorted(own.items(), key=lambda item: -item[1]["score"]):
        cells = [trait, f"{line['score']:+.3g}", f"{line['error']:.2g}"]
        if null:
            other = null[0][trait]
            error = (line["error"] ** 2 + other["error"] ** 2) ** 0.5
            beyond = line["score"] - other["score"]
            interval = normal_interval(beyond, error)
            shown_interval = f"{beyond:+.2g} ({interval.low:+.2g} to {interval.high:+.2g})"
            cells += [f"{other['score']:+.3g}", shown_interval, f"{beyond / error if error else 0.0:+.1f}"]
        shown.add_row(*cells)
    console.print(shown)
