"""Commands that bring rows in, and take rows, students and results out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jsublim.cli.app import Template, app, console, named, output
from jsublim.errors import UsageError


@app.command()
def export(
    what: Annotated[
        Path, typer.Argument(metavar="WHAT", help="A student or another adapter, rows (.jsonl), or a run's folder.")
    ],
    out: Annotated[Path, typer.Option("--out", callback=named, help="The folder to write.")],
    merged: Annotated[
        bool, typer.Option("--merged", help="Of an adapter: a whole checkpoint, the adapter written into its base.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option("--base", help="The adapter's base, as others find it; default: as the adapter says."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="With --merged: float32 or bfloat16; default: the base's.")
    ] = None,
    chat_template: Template = None,
) -> None:
    """Write a result for others: adapter or checkpoint with a model card, rows as a data set, results as CSV."""
    from jsublim.exchange import results, rows, students

    adapter = what.is_dir() and students.is_adapter(what)
    if merged and not adapter:
        raise UsageError(f"--merged: {what} is no adapter")
    if not what.exists():
        raise UsageError(f"{what}: no such file or folder")
    if rows.is_rows(what):
        rows.export_rows(what, out)
    elif merged:
        students.export_merged(what, out, base, dtype, chat_template)
    elif adapter:
        students.export_adapter(what, out, base)
    elif what.is_dir() and students.is_checkpoint(what):
        students.export_checkpoint(what, out, base)
    elif what.is_dir() and results.tables_of(what):
        results.export_results(what, out)
    else:
        raise UsageError(f"{what}: holds no rows, no adapter, no checkpoint and no results")
    output.out(out)


@app.command("import")
def import_rows(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="JSONL, JSON, parquet, CSV, a `datasets` folder, or owner/name of the hub."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", callback=named, help="JSONL to write.")],
    subset: Annotated[str | None, typer.Option("--subset", help="Of a data set with several.")] = None,
    split: Annotated[str, typer.Option("--split", help="Of a data set.")] = "train",
    prompt_column: Annotated[str | None, typer.Option("--prompt-column", help="What the prompt is called.")] = None,
    completion_column: Annotated[
        str | None, typer.Option("--completion-column", help="What the completion is called.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="The checkpoint in whose tokens divergence positions were counted."),
    ] = None,
    chat_template: Template = None,
) -> None:
    """Bring rows in from elsewhere (OUT, JSONL): prompt and completion, `messages`, the published code's rows."""
    from jsublim.exchange.rows import Wanted, import_rows, known_columns
    from jsublim.inference.lm import load_model
    from jsublim.rows import write_rows

    if out.exists():
        raise UsageError(f"{out}: already exists; give another --out or remove it first")
    if (prompt_column is None) != (completion_column is None):
        raise UsageError("--prompt-column and --completion-column go together")
    columns = None if prompt_column is None or completion_column is None else (prompt_column, completion_column)
    chat = None if model is None else load_model(model, weights=False, chat_template=chat_template).chat
    rows = import_rows(source, Wanted(subset, split, columns), chat)
    write_rows(out, rows)
    console.print(f"{len(rows)} rows; kept beside prompt and completion: {', '.join(known_columns(rows)) or 'nothing'}")
    if chat is None and any("divergence_positions" in row for row in rows):
        console.print("divergence positions are taken as they are; --model says in whose tokens they were counted")
    output.out(out)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What `jsublim export` has written.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="On the hub.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public; default: private.")] = False,
) -> None:
    """Upload an exported folder to the hub. Nothing else of jsublim sends anything there."""
    from jsublim.exchange.hub import push as upload

    if repository.count("/") != 1:
        raise UsageError(f"'{repository}': give OWNER/NAME")
    output.out(upload(folder, repository, public=public))
