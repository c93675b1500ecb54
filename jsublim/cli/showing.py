"""Commands that read what runs have left: show, results, compare, verify. They compute nothing, and need no model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from jsublim.cli.app import Format, Json, app, kinds, output
from jsublim.errors import JsublimError, UsageError

Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")]


@app.command()
def show(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")], as_json: Json = False) -> None:
    """What was run and what came of it: status, config, times, verdicts, artifacts."""
    about = about_any_run(run)
    if as_json:
        output.out(json.dumps(about, indent=2, ensure_ascii=False))
        return
    print_about(about)


def about_any_run(run: Path) -> dict[str, Any]:
    """As `about_run`, with the findings of a digits run too."""
    from jsublim.pipeline.showing import about_run

    about = about_run(run, kinds())
    if about["kind"] == "digits":
        from jsublim.digits.report import findings, read_lines

        about["findings"] = findings(read_lines(run))
    return about


def print_about(about: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from jsublim.report.formats import rounded, table
    from jsublim.report.words import p_value

    facts = Table("", "", show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.columns[1].overflow = "fold"
    for key in (
        "run",
        "name",
        "status",
        "model",
        "model_revision",
        "device",
        "started",
        "report",
        "store",
        "no_verdicts",
    ):
        if about.get(key) is not None:
            facts.add_row(key.replace("_", " "), Text(str(about[key])))
    seconds = about["seconds"]
    if seconds:
        facts.add_row("seconds", ", ".join(f"{kind} {value:g}" for kind, value in seconds.items()))
        facts.add_row("in all", f"{sum(seconds.values()) / 60:.1f} minutes")
    for kind, found in about["artifacts"].items():
        others = {"damaged": found["damaged"], "unfinished": found["there"] - found["whole"] - found["damaged"]}
        rest = "".join(f", {count} {what}" for what, count in others.items() if count)
        facts.add_row(f"artifacts: {kind}", f"{found['whole']}{rest}, {found['bytes'] / 1e6:.3g} MB")
    for place in about["rescored_as"]:
        facts.add_row("rescored", Text(place))
    if about.get("rescored"):
        facts.add_row(
            "rescored by", Text(", ".join(f"{key} {rounded(value)}" for key, value in about["rescored"].items()))
        )
    output.print(facts)
    config = [
        {"field": name, "value": json.dumps(value, ensure_ascii=False)} for name, value in about["config"].items()
    ]
    if config:
        output.print(table(config, ["field", "value"], "config, where it differs from the defaults"))
    if about["verdicts"]:
        rows = [v | {"p": p_value(v["p"]), "primary": "primary" if v["primary"] else ""} for v in about["verdicts"]]
        output.print(table(rows, ["claim", "text", "verdict", "p", "primary"], "verdicts"))
    for sentence in about.get("findings", []):
        output.print(sentence)


@app.command()
def results(
    runs: Runs,
    where: Annotated[
        str | None, typer.Option("--where", help="A condition in SQL: \"metric = 'rate' and teacher = trait\".")
    ] = None,
    questions: Annotated[
        bool, typer.Option("--questions", help="A row for each question; default: means over questions.")
    ] = False,
    how: Format = "table",
) -> None:
    """Print the results of runs: a row for each model, trait and metric."""
    from jsublim.report.formats import check_format, print_rows
    from jsublim.report.querying import results_table, rows_of

    check_format(how)
    table = results_table(runs, where=where, questions=questions)
    rows = rows_of(table)
    if not rows and how == "table":
        raise UsageError("--where: no row is like that; leave it out to see all of them")
    columns = list(rows[0]) if rows else list(table.column_names)
    if how == "table":  # what is the same in every row is said once, above; who "arm" is, the other columns say
        same = [name for name in columns if len(rows) > 1 and len({row[name] for row in rows}) == 1]
        output.print(", ".join(f"{name}: {rows[0][name]}" for name in same))
        columns = [name for name in ("condition", *columns) if name in columns and name not in (*same, "arm", "role")]
    print_rows(rows, list(dict.fromkeys(columns)), how, output)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A run's folder.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another run's folder.")],
    how: Format = "table",
) -> None:
    """Lay two runs beside one another: differences of their configs, their results, and B minus A with intervals."""
    from jsublim.report.comparing import compare as compared
    from jsublim.report.comparing import verdicts
    from jsublim.report.formats import check_format, print_rows
    from jsublim.report.tables import read_results, run_kind

    check_format(how)
    if "digits" in (run_kind(a), run_kind(b)):
        raise UsageError("compare: lays runs on language models beside one another; of digits, `jsublim results A B`")
    first, second = read_results(a), read_results(b)
    rows = compared(first, second)
    if how != "table":
        print_rows(rows, list(rows[0]) if rows else [], how, output)
        return
    output.print(f"a: {a}\nb: {b}", soft_wrap=True)
    print_differences(a, b)
    for metric in dict.fromkeys(row["metric"] for row in rows):
        lines = [_in_words(row) for row in rows if row["metric"] == metric]
        print_rows(lines, list(lines[0]), how, output, f"{metric}: b - a with its interval over students")
    print_rows(verdicts(first, second), ["claim", "a", "b"], how, output, "verdicts")


def print_differences(a: Path, b: Path) -> None:
    """The fields in which the configs of two runs differ, if both can be read."""
    from jsublim.config.differences import between
    from jsublim.pipeline.showing import full_config
    from jsublim.report.formats import print_rows

    try:
        fields = between(full_config(a, kinds()), full_config(b, kinds()))
    except UsageError as error:
        output.print(str(error))
        return
    rows = [{name: value if name == "field" else json.dumps(value) for name, value in row.items()} for row in fields]
    if rows:
        print_rows(rows, ["field", "a", "b"], "table", output, "config")
    else:
        output.print("Their configs say the same.")


def _in_words(row: dict[str, Any]) -> dict[str, Any]:
    from jsublim.report import words
    from jsublim.report.statistics import Interval

    metric = row["metric"]
    shown = {key: words.number(row[key], metric, signed=key == "b - a") for key in ("a", "b", "b - a")}
    bounds = words.MISSING if row["low"] is None else words.interval(Interval(row["low"], row["high"]), metric, True)
    return {"condition": row["condition"], "trait": row["trait"]} | shown | {"95 %": bounds}


@app.command()
def verify(store: Annotated[str, typer.Argument(metavar="STORE", help="A folder (RUN/artifacts) or a URL.")]) -> None:
    """Read every artifact of a store, and name those that are not what was written. Nothing is changed."""
    from jsublim.pipeline import verifying

    count, read, damaged = 0, 0, 0
    for found in verifying.verify(store):
        count, read = count + 1, read + found.bytes
        if found.damage is not None:
            damaged += 1
            output.print(found.damage, soft_wrap=True)
    output.print(f"{count} artifacts, {read:,} bytes read; {damaged} damaged", soft_wrap=True)
    if damaged:
        raise JsublimError(
            f"{store}: {damaged} of {count} artifacts are damaged; remove DONE from those, and the commands that made them make "
            "them again"
        )


def say_result(report: Path, as_json: bool) -> None:
    """What a run has come to: where its report is, or what `jsublim show` says, as JSON."""
    if not as_json:
        output.out(report)
        return
    output.out(json.dumps(about_any_run(report.parent), indent=2, ensure_ascii=False))
