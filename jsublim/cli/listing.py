"""Commands before a run: names that commands take (`ls`), a config of one's own (`cp`), whether this machine can do the work (`doctor`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from jsublim.cli.app import Format, Json, app, must_be_new, output, print_json
from jsublim.core.files import write_text
from jsublim.core.reading import near_or_all
from jsublim.errors import JsublimError, UsageError
from jsublim.report.formats import check_format, print_rows


@app.command()
def ls(
    what: Annotated[str, "configs, figures, models, traits or runs."],
    *,
    folder: Annotated[Path, "Of runs: where they lie."] = Path("runs"),
    prompts: Annotated[Path | None, "Of traits: a prompt pack of your own."] = None,
    how: Format = "table",
) -> None:
    """List what there is: the package's configs, figures of the paper, models and runs on this machine, traits."""
    from jsublim.pipeline.listing import LISTS

    if what not in LISTS:
        raise UsageError(f"ls: '{what}' given; {near_or_all(what, LISTS)}")
    check_format(how)
    options = {"runs": (folder,), "traits": (prompts,)}.get(what, ())
    rows = LISTS[what](*options)
    if not rows and how == "table":
        output.print(f"no {what} here{f' ({folder})' if what == 'runs' else ''}")
        return
    print_rows(rows, list(rows[0]) if rows else [], how, output)


@app.command()
def cp(
    config: Annotated[str, "As `ls configs` names it, a YAML, or a figure with --panel."],
    to: Annotated[Path, "The file to write."],
    *,
    panel: Annotated[str | None, "Of a figure: the panel whose experiment it is."] = None,
    scale: Annotated[str, "Of a figure: tiny, small or paper."] = "tiny",
) -> None:
    """Copy a config, comments and all, to change it; of a figure's panel, write it out."""
    from jsublim.config.figures import panel_as_config
    from jsublim.config.shipped import find_config, named_config

    must_be_new(to, "give another name or remove it first")
    if not to.parent.is_dir():
        raise UsageError(f"{to}: no such folder as {to.parent}; make it first")
    is_figure = panel is not None or config.lower().startswith("fig")
    text = panel_as_config(config, panel, scale) if is_figure else None
    write_text(to, text or find_config(named_config(config)).read_text(encoding="utf-8"))
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
