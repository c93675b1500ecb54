"""`jsublim ls`, `cp` and `prompts show`: what there is to name in a command, and a config of one's own."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated

import typer

from jsublim.cli.app import Format, app, output, prompts_app
from jsublim.errors import UsageError


@app.command("ls")
def list_all(
    what: Annotated[str, typer.Argument(help="configs, figures, models, traits or runs.")],
    folder: Annotated[Path, typer.Option("--folder", help="Of runs: where they lie.")] = Path("runs"),
    prompts: Annotated[Path | None, typer.Option("--prompts", help="Of traits: a prompt pack of your own.")] = None,
    how: Format = "table",
) -> None:
    """List what there is: the package's configs, figures of the paper, models and runs on this machine, traits."""
    from jsublim.pipeline.listing import LISTS
    from jsublim.report.formats import check_format, print_rows

    if what not in LISTS:
        near = difflib.get_close_matches(what, LISTS, n=1)
        raise UsageError(
            f"ls: '{what}' given; {f'did you mean {near[0]!r}?' if near else 'known: ' + ', '.join(LISTS)}"
        )
    check_format(how)
    options = {"runs": (folder,), "traits": (prompts,)}.get(what, ())
    rows = LISTS[what](*options)
    if not rows and how == "table":
        output.print(f"no {what} here{f' ({folder})' if what == 'runs' else ''}")
        return
    print_rows(rows, list(rows[0]) if rows else [], how, output)


@app.command("cp")
def copy(
    config: Annotated[str, typer.Argument(help="As `ls configs` names it, a YAML, or a figure with --panel.")],
    to: Annotated[Path, typer.Argument(help="The file to write.")],
    panel: Annotated[str | None, typer.Option("--panel", help="Of a figure: the panel whose experiment it is.")] = None,
    scale: Annotated[str, typer.Option("--scale", help="Of a figure: tiny, small or paper.")] = "tiny",
) -> None:
    """Copy a config, comments and all, to change it; of a figure's panel, write it out."""
    from jsublim.config.shipped import find_config, named_config
    from jsublim.files import write_text

    if to.exists():
        raise UsageError(f"{to}: already exists; give another name or remove it first")
    if not to.parent.is_dir():
        raise UsageError(f"{to}: no such folder as {to.parent}; make it first")
    if panel is not None or config.lower().startswith("fig"):
        from jsublim.config.figures import panel_as_config

        write_text(to, panel_as_config(config, panel, scale))
    else:
        write_text(to, find_config(named_config(config)).read_text(encoding="utf-8"))
    output.out(to)


@prompts_app.command("show")
def prompts_show(
    pack: Annotated[Path | None, typer.Argument(help="A pack (YAML); default: the package's.")] = None,
    key: Annotated[
        str | None, typer.Option("--key", help="This part alone: questions, traits, system_template ...")
    ] = None,
) -> None:
    """Print a prompt pack with everything that it takes from the default one, as YAML."""
    import yaml

    from jsublim.prompts import load_pack

    values = load_pack(pack).model_dump(mode="json")
    if key is not None and key not in values:
        near = difflib.get_close_matches(key, values, n=1)
        raise UsageError(
            f"--key: '{key}' given; {f'did you mean {near[0]!r}?' if near else 'known: ' + ', '.join(values)}"
        )
    shown = values if key is None else {key: values[key]}
    output.out(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=110).rstrip("\n"))
