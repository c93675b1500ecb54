"""`jsublim attribute`: at which layers and tokens the divergence of a teacher's rows comes about."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from jsublim.cli.app import Dtype, Model, Out, PackFile, RecipeName, app, bar, console, file_hash, names, recipe_of


@app.command()
def attribute(
    model: Model,
    data: Annotated[
        Path, typer.Option("--data", help="Rows of the teacher with divergence positions (`jsublim divergence`).")
    ],
    trait: Annotated[str, typer.Option("--trait", help="The trait of the teacher that wrote them.")],
    counterfactuals: Annotated[str, typer.Option("--counterfactuals", help="Other traits, with commas.")],
    out: Out,
    num_rows: Annotated[int, typer.Option("--num-rows", min=1, help="The first so many rows.")] = 100,
    sites: Annotated[str, typer.Option("--sites", help="Of residual, attention, mlp.")] = "residual,attention,mlp",
    directions: Annotated[str, typer.Option("--directions", help="noising, denoising or both.")] = "noising,denoising",
    steps: Annotated[
        int, typer.Option("--steps", min=1, help="Of the integrated gradients; 1 is the plain gradient.")
    ] = 10,
    adapter: Annotated[Path | None, typer.Option("--adapter", help="PEFT folder that all the teachers carry.")] = None,
    category: Annotated[str | None, typer.Option("--category", help="Of traits that the pack doesn't list.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="(row, counterfactual) pairs at a time.")] = 8,
    prompts: PackFile = None,
    recipe: RecipeName = "clean",
    dtype: Dtype = "float32",
) -> None:
    """Attribution patching by layer and token role: OUT gets attribution.parquet and a heat map."""
    import pyarrow.parquet as pq
    from rich.table import Table

    from jsublim.experiment.attribution import attribute_rows
    from jsublim.experiment.store import Artifact, digest
    from jsublim.inference.lm import load_model
    from jsublim.models.peft import load_adapter
    from jsublim.prompts import load_pack
    from jsublim.report.attribution import attribution_heat_map, early_share
    from jsublim.rows import read_rows
    from jsublim.teachers import prompted_teacher

    rows = read_rows(data, ("prompt", "completion", "divergence_positions"))[:num_rows]
    pack, lm = load_pack(prompts), load_model(model, dtype)
    how = recipe_of(recipe, lm)
    own = load_adapter(adapter, lm.config) if adapter else None
    teacher, *rest = (
        dataclasses.replace(prompted_teacher(pack, name, category), adapter=own)
        for name in (trait, *names(counterfactuals))
    )
    settings = {
        "sites": names(sites), "directions": names(directions), "steps": steps, "extra_bos": bool(how.extra_bos),
    }  # fmt: skip
    inputs = settings | {
        "model": lm.hash, "pack": pack.hash, "dtype": dtype, "rows": digest(rows), "system": teacher.system,
        "counterfactuals": {other.name: other.system for other in rest}, "adapter": file_hash(adapter),
    }  # fmt: skip
    artifact = Artifact(out, "attribution", inputs)
    with bar("attribute", len(rows)) as tick:
        attribute_rows(
            artifact, lm, rows, teacher, rest, batch_size=batch_size, source=str(data), tick=tick, **settings
        )
    summary, table = artifact.summary, pq.read_table(out / "attribution.parquet")
    attribution_heat_map(table).savefig(out / "heat_map.png", dpi=150)
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
    print(out)
