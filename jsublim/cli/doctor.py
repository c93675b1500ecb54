"""`jsublim doctor`: whether this machine can do the work."""

from __future__ import annotations

from typing import Annotated

import typer

from jsublim.cli.app import Json, app, output
from jsublim.errors import JsublimError


@app.command()
def doctor(
    hub: Annotated[bool, typer.Option("--hub", help="Also ask the hub whether it can be reached.")] = False,
    as_json: Json = False,
) -> None:
    """Look at versions, devices, memory and disk, and compile a small step and check it: what is wrong, and what to do."""
    import dataclasses
    import json

    from rich.text import Text

    from jsublim.doctor import examine

    found = []
    for finding in examine(hub):
        found.append(finding)
        if not as_json:
            output.print(Text(f"{finding.what}: {finding.found}"))
            if finding.wrong:
                output.print(Text(f"  wrong: {finding.wrong}"), style="bold")
    if as_json:
        output.out(json.dumps([dataclasses.asdict(finding) for finding in found], indent=2, ensure_ascii=False))
    wrong = [finding.what for finding in found if finding.wrong]
    if wrong:
        raise JsublimError(f"doctor: {', '.join(wrong)}: see above")
    if not as_json:
        output.print("all is well")
