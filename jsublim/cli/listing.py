"""Commands before a run: names that commands take (`ls`), a config of one's own (`cp`), whether this machine can do the work (`doctor`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.padding import Padding

from jsublim.cli.app import Format, Json, app, console, must_be_new, output, print_json
from jsublim.core.files import write_text
from jsublim.core.reading import near_or_all
from jsublim.errors import JsublimError, UsageError
from jsublim.report.formats import check_format, print_rows


@app.command()
def ls(
    what: Annotated[
        str | None, "configs, figures, models, traits or runs; default: how many there are of each."
    ] = None,
    *,
    folder: Annotated[Path, "Of runs: where they lie."] = Path("runs"),
    prompts: Annotated[Path | None, "Of traits: a prompt pack of your own."] = None,
    how: Format = "table",
    as_json: Json = False,
) -> None:
    """List what there is: the package's configs, figures of the paper, models and runs on this machine, traits."""
    from jsublim.pipeline.listing import LISTS, counts, in_short
    from jsublim.pipeline.showing import when

    if what is not None and what not in LISTS:
        raise UsageError(f"ls: '{what}' given; {near_or_all(what, LISTS)}")
    how = "json" if as_json else check_format(how)
    options = {"runs": (folder,), "traits": (prompts,)}
    rows = counts(options) if what is None else LISTS[what](*options.get(what, ()))
    if how == "table" and not rows:
        output.print(f"no {what} here{f' ({folder})' if what == 'runs' else ''}")
    elif how == "table" and what == "configs":  # too long for columns
        for row in rows:
            model = f" ({row['model']})" if row["model"] else ""
            output.print(f"{row['config']}{model}", soft_wrap=True)
            output.print(Padding(row["about"], (0, 0, 0, 4)))
    else:
        if how == "table" and what in ("models", "runs"):
            shorter = {"parameters": in_short, "started": when}
            rows = [{key: shorter.get(key, lambda same: same)(value) for key, value in row.items()} for row in rows]
        print_rows(rows, list(rows[0]) if rows else [], how, output)


@app.command()
def cp(
    config: Annotated[str, "As `ls configs` names it, a YAML, or a figure with --panel."],
    to: Annotated[Path, "The file to write."],
    *,
    panel: Annotated[str | None, "Of a figure: the panel whose experiment it is."] = None,
    scale: Annotated[str, "Of a figure: tiny, small or paper."] = "tiny",
) -> None:
    """Copy a config, comments and all, to change it; of a figure's panel, write it out. Editors get the schema beside it."""
    from jsublim.config.figures import panel_as_config
    from jsublim.config.shipped import SCHEMA, copy_of

    must_be_new(to, "give another name or remove it first")
    if not to.parent.is_dir():
        raise UsageError(f"{to}: no such folder as {to.parent}; make it first")
    is_figure = panel is not None or config.lower().startswith("fig")
    text = panel_as_config(config, panel, scale) if is_figure else None
    text, schema, place = *copy_of(config, text), to.with_name(SCHEMA)
    if place.exists() and place.read_text(encoding="utf-8") != schema:
        console.print(
            f"{place}: is of another version, and stays; remove it, and `jsublim cp` writes it anew", soft_wrap=True
        )
    elif not place.exists():
        write_text(place, schema)
    write_text(to, text)
    output.out(to)


@app.command()
def doctor(
    *, hub: Annotated[bool, "Also ask the hub whether it can be reached."] = False, as_json: Json = False
) -> None:
    """Look at versions, devices, memory and disk, and compile a small step and check it: what is wrong, and what to do."""
    import dataclasses

    from jsublim.cli.doctor import examine

    findings = []
    for finding in examine(hub):
        findings.append(finding)
        if not as_json:
            output.print(f"{finding.what}: {finding.found}")
            if finding.wrong:
                output.print(f"  wrong: {finding.wrong}", style="bold")
    if as_json:
        print_json([dataclasses.asdict(finding) for finding in findings])
    wrong = [finding.what for finding in findings if finding.wrong]
    if wrong:
        raise JsublimError(f"doctor: {', '.join(wrong)}: see above")
    if not as_json:
        output.print("all is well")
