"""`jsublim rescore`: a run's answers counted or judged again, without its model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jsublim.cli.app import app, console, named, output


@app.command()
def rescore(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    fields: Annotated[
        list[str] | None,
        typer.Argument(help="Another judge: judge.model=FOLDER, or judge.server.base_url=URL judge.server.model=NAME."),
    ] = None,
    match: Annotated[
        str | None,
        typer.Option(
            "--match", help="When an answer names a trait: substring, word, first, exact, or a regex with {name}."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", callback=named, help="Default: a folder of its own in RUN/rescored.")
    ] = None,
) -> None:
    """Make new results of a run's answers, by another matching rule or judge. The old ones stay; no model is asked."""
    from jsublim.pipeline.rescoring import rescore as make
    from jsublim.report.html import write_report
    from jsublim.report.terminal import print_summary

    made = make(run, match, fields or (), out)
    report = write_report(made)
    print_summary(made, console)
    output.out(report)
