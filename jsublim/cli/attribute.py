"""`jsublim attribute`: at which layers and tokens the divergence of a teacher's rows comes about."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jsublim.cli.app import AnyModel, Fields, Out, Template, app, console, experiment_of, names, output


@app.command()
def attribute(
    data: Annotated[
        Path, typer.Option("--data", help="Rows of the teacher with divergence positions (`jsublim divergence`).")
    ],
    trait: Annotated[str, typer.Option("--trait", help="The trait of the teacher that wrote them.")],
    out: Out,
    fields: Fields = None,
    model: AnyModel = None,
    chat_template: Template = None,
    counterfactuals: Annotated[
        str | None, typer.Option("--counterfactuals", help="Other traits, with commas; default: as `run`.")
    ] = None,
) -> None:
    """Attribution patching by layer and token role: OUT gets attribution.parquet and a heat map."""
    import pyarrow.parquet as pq
    from rich.table import Table

    from jsublim.errors import UsageError
    from jsublim.executors import execute_nodes
    from jsublim.pipeline.arms import Source
    from jsublim.pipeline.context import Context
    from jsublim.pipeline.experiment import attribution
    from jsublim.pipeline.publish import check_free, publish_folder
    from jsublim.progress import Progress
    from jsublim.report.attribution import attribution_heats, early_share
    from jsublim.report.html import render
    from jsublim.rows import read_rows

    read_rows(data, ("prompt", "completion", "divergence_positions"))
    others = names(counterfactuals) or None
    base = {"attribution": {}, "teachers": {"traits": [trait]}}
    e = experiment_of(
        "attribute", fields, out, base, model=model, chat_template=chat_template, teachers__counterfactuals=others
    )
    if e.attribution is None:
        raise UsageError("attribution: null given; leave it out or give its fields")
    context = Context.load(e, Progress(console), given={Source(trait): data})
    node = attribution(context.setup, Source(trait))
    check_free(out, node.key, node.inputs)
    execute_nodes([node], context)
    publish_folder(out, context.store, node)
    summary, table = context.store.summary(node), pq.ParquetFile(out / "attribution.parquet").read()
    render(out / "heat_map.html", "attribution.html", attribution=attribution_heats(table))
    skipped = "".join(f"; {count} skipped: {reason}" for reason, count in summary["skipped"].items())
    console.print(f"{summary['used']} of {summary['rows']} rows used, {summary['pairs']} pairs{skipped}")
    shown = Table("direction", "site", "completeness error")
    for direction, errors in summary["completeness_error"].items():
        for site, error in errors.items():
            shown.add_row(direction, site, f"{error:.1%}")
    console.print(shown)
    shares = early_share(table)
    if shares:
        mean = sum(share.of_early for share in shares) / len(shares)
        console.print(f"first third of the layers: {mean:.1%} of the residual mass lies at the trait's first mention")
    output.out(out)
