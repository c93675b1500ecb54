"""Commands that read what runs have left: show, results, compare, rescore, verify. They need no model, but for a judge's scores."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table
from rich.text import Text

from jsublim.cli.app import Format, Json, RunFolder, app, console, kinds, output, print_json
from jsublim.core.progress import clock
from jsublim.errors import JsublimError, UsageError
from jsublim.report.formats import check_format, print_rows, rounded

SHOWN = ("run", "name", "status", "model", "model_revision", "device", "started", "report", "store", "no_verdicts")


@app.command()
def show(run: RunFolder, as_json: Json = False) -> None:
    """What was run and what came of it: status, config, times, verdicts, artifacts."""
    from jsublim.pipeline.showing import about_run

    about = about_run(run, kinds())
    if about["kind"] == "digits":
        from jsublim.digits.report import findings, read_lines

        about["findings"] = findings(read_lines(run))
    if as_json:
        print_json(about)
    else:
        print_about(about)


def say_result(report: Path, as_json: bool) -> None:
    """Print where a run's report is, or what `jsublim show` says, as JSON."""
    if as_json:
        show(report.parent, as_json=True)
    else:
        output.out(report)


def in_words(device: str | None) -> str | None:
    """Devices as people say it: a single one without its number, and "CPU" for "cpu"."""
    return device and re.sub(r"\b1 x ", "", device).replace("cpu", "CPU")


def print_about(about: dict[str, Any]) -> None:

    from jsublim.pipeline.showing import when
    from jsublim.report.words import p_value

    about = about | {"started": when(about["started"]), "device": in_words(about["device"])}
    facts = Table("", "", show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.columns[1].overflow = "fold"
    lines = [(key.replace("_", " "), str(about[key])) for key in SHOWN if about.get(key) is not None]
    seconds = about["seconds"]
    if seconds:
        lines.append(("took", ", ".join(f"{kind} {clock(value)}" for kind, value in seconds.items())))
        lines.append(("in all", clock(sum(seconds.values()))))
    for kind, count in about["artifacts"].items():
        others = {"damaged": count["damaged"], "unfinished": count["there"] - count["whole"] - count["damaged"]}
        rest = "".join(f", {number} {what}" for what, number in others.items() if number)
        lines.append((f"artifacts: {kind}", f"{count['whole']}{rest}, {count['bytes'] / 1e6:.3g} MB"))
    lines += [("rescored", place) for place in about["rescored_as"]]
    if about.get("rescored"):
        lines.append(("rescored by", ", ".join(f"{key} {rounded(value)}" for key, value in about["rescored"].items())))
    for name, text in lines:
        facts.add_row(name, Text(text))
    output.print(facts)
    config = [{"field": key, "value": json.dumps(value, ensure_ascii=False)} for key, value in about["config"].items()]
    if config:
        print_rows(config, ["field", "value"], "table", output, "config, where it differs from the defaults")
    if about["verdicts"]:
        rows = [
            v | {"p": p_value(v["corrected"]), "primary": "primary" if v["primary"] else ""} for v in about["verdicts"]
        ]
        print_rows(rows, ["claim", "text", "verdict", "p", "primary"], "table", output, "verdicts")
    for sentence in about.get("findings", []):
        output.print(sentence)


@app.command()
def results(
    runs: Annotated[list[Path], "Folders of runs.", {"metavar": "RUN..."}],
    *,
    where: Annotated[str | None, "A condition in SQL: \"metric = 'rate' and teacher = trait\"."] = None,
    questions: Annotated[bool, "A row for each question; default: means over questions."] = False,
    how: Format = "table",
) -> None:
    """Print the results of runs: a row for each model, trait and metric."""
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
    a: Annotated[Path, "A run's folder.", {"metavar": "A"}],
    b: Annotated[Path, "Another run's folder.", {"metavar": "B"}],
    how: Format = "table",
) -> None:
    """Lay two runs beside one another: differences of their configs, their results, and B minus A with intervals."""
    from jsublim.report.comparing import compare as compared
    from jsublim.report.comparing import verdicts
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
def rescore(
    run: RunFolder,
    fields: Annotated[
        list[str] | None, "Another judge: judge.model=FOLDER, or judge.server.base_url=URL judge.server.model=NAME."
    ] = None,
    *,
    match: Annotated[
        str | None, "When an answer names a trait: substring, word, first, exact, or a regex with {name}."
    ] = None,
    out: Annotated[Path | None, "Default: a folder of its own in RUN/rescored."] = None,
) -> None:
    """Make new results of a run's answers, by another matching rule or judge. The old ones stay; no model is asked."""
    from jsublim.pipeline import rescoring
    from jsublim.report.html import write_report
    from jsublim.report.terminal import print_summary

    made = rescoring.rescore(run, match, fields or (), out)
    report = write_report(made)
    print_summary(made, console)
    output.out(report)


@app.command()
def verify(store: Annotated[str, "A folder (RUN/artifacts) or a URL.", {"metavar": "STORE"}]) -> None:
    """Read every artifact of a store, and name those that are not what was written. Nothing is changed."""
    from jsublim.pipeline import verifying

    count, read, damaged = 0, 0, 0
    for artifact in verifying.verify(store):
        count, read = count + 1, read + artifact.bytes
        if artifact.damage is not None:
            damaged += 1
            output.print(artifact.damage, soft_wrap=True)
    output.print(f"{count} artifacts, {read:,} bytes read; {damaged} damaged", soft_wrap=True)
    if damaged:
        raise JsublimError(
            f"{store}: {damaged} of {count} artifacts are damaged; remove DONE from those, and the commands that made them make "
            "them again"
        )
