"""Commands that do one stage of an experiment: generate, divergence, evaluate (finetune and attribute have their own files).

Each takes the fields of `jsublim run`, plans the tasks that `run` would, and publishes what comes of them at `--out`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from jsublim.cli.app import AnyModel, Fields, Out, Template, app, console, experiment_of, names, output
from jsublim.errors import UsageError


def _context(experiment: Any) -> Any:
    from jsublim.pipeline.context import Context
    from jsublim.progress import Progress

    return Context.load(experiment, Progress(console))


def _execute(nodes: Any, context: Any) -> None:
    from jsublim.executors import execute_nodes

    execute_nodes(nodes, context)


@app.command()
def generate(
    out: Out,
    fields: Fields = None,
    model: AnyModel = None,
    chat_template: Template = None,
    trait: Annotated[
        str | None, typer.Option("--trait", help="The teacher's trait; its system prompt comes from the pack.")
    ] = None,
    control: Annotated[bool, typer.Option("--control", help="The teacher without a trait.")] = False,
) -> None:
    """Let a teacher answer the prompts, and keep the answers that are in format (OUT, JSONL)."""
    from jsublim.pipeline.arguments import category
    from jsublim.pipeline.arms import Source
    from jsublim.pipeline.experiment import answers
    from jsublim.pipeline.origins import writer
    from jsublim.pipeline.publish import check_free, publish_rows
    from jsublim.pipeline.setup import NOBODY
    from jsublim.teachers import CONTROL

    if (trait is not None) == control:
        raise UsageError("generate: give exactly one of --trait and --control")
    # Whose rows they are is what matters here; against which others they are read is a later command's.
    e = experiment_of(
        "generate", fields, out, {"teachers": {"traits": [trait or NOBODY]}}, model=model, chat_template=chat_template
    )
    context = _context(e)
    if trait is not None:
        category(context.setup, trait)
    rows = answers(context.setup, writer(context.setup, Source(trait or CONTROL)))
    check_free(out, rows.key, rows.inputs)
    _execute(rows.nodes, context)
    parts = rows.summaries(context.store)
    asked, kept = (sum(part[key] for part in parts) for key in ("rows", "kept"))
    rejected = {
        reason: sum(part["reject"].get(reason, 0) for part in parts) for part in parts for reason in part["reject"]
    }
    console.print(f"sampling: {parts[0]['sampling']}")
    console.print(f"kept {kept} of {asked} rows ({kept / asked:.1%}); rejected: {rejected}")
    publish_rows(out, rows.read(context.store), rows)
    output.out(out)


@app.command()
def divergence(
    data: Annotated[Path, typer.Option("--data", help="Rows of the teacher (JSONL).")],
    trait: Annotated[str, typer.Option("--trait", help="The trait of the teacher that wrote them.")],
    out: Out,
    fields: Fields = None,
    model: AnyModel = None,
    chat_template: Template = None,
    counterfactuals: Annotated[
        str | None, typer.Option("--counterfactuals", help="Other traits, with commas; default: as `run`.")
    ] = None,
) -> None:
    """Find the divergence tokens of rows; what each teacher said of them goes beside OUT, with .readings.parquet."""
    from jsublim.pipeline.arguments import rows_of_file
    from jsublim.pipeline.arms import Source
    from jsublim.pipeline.experiment import read
    from jsublim.pipeline.publish import check_free, publish_rows
    from jsublim.pipeline.readings import write_readings
    from jsublim.pipeline.stages.divergence import merged

    others = names(counterfactuals) or None
    if others is not None and trait in others:
        raise UsageError(f"--counterfactuals: '{trait}' is the teacher's own trait; leave it out")
    base = {"teachers": {"traits": [trait]}}
    e = experiment_of(
        "divergence", fields, out, base, model=model, chat_template=chat_template, teachers__counterfactuals=others
    )
    context, sidecar = _context(e), out.with_name(f"{out.stem}.readings.parquet")
    found = read(context.setup, Source(trait), rows_of_file(context.setup, data))
    check_free(out, found.key, found.inputs)
    if sidecar.exists() and not out.exists():
        raise UsageError(f"{sidecar}: already exists; give another --out or move it away")
    _execute(found.nodes, context)
    summary = merged(found.summaries(context.store))
    console.print(
        f"{summary['divergence_tokens']} divergence tokens of {summary['tokens']} ({summary['share']:.2%}); "
        f"{summary['rows_with']} of {summary['rows']} rows have one"
    )
    publish_rows(out, found.read(context.store), found)
    write_readings(sidecar, found.readings(context.store))  # second: without OUT it would be taken for somebody else's
    output.out(out)


@app.command()
def evaluate(
    out: Out,
    fields: Fields = None,
    model: AnyModel = None,
    chat_template: Template = None,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="PEFT folder of a student; default: the base.")
    ] = None,
    traits: Annotated[str | None, typer.Option("--traits", help="As evaluation.traits=, with commas.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Rows to do the number task on too.")] = None,
    setting: Annotated[str, typer.Option("--setting", help="One of evaluation.settings; default: the plain one.")] = "",
) -> None:
    """Ask a model for its favourites (and whatever else evaluation.kinds names): OUT gets records and answers."""
    from jsublim.files import read_table, write_json
    from jsublim.pipeline.evaluated import Evaluated, eval_settings
    from jsublim.pipeline.experiment import evaluation
    from jsublim.pipeline.publish import check_free, publish_folder
    from jsublim.pipeline.setup import NOBODY
    from jsublim.teachers import CONTROL

    wanted = None if traits is None else names(traits)
    if wanted == []:
        raise UsageError("--traits: give at least one trait")
    base = {"teachers": {"traits": wanted or [NOBODY]}}
    e = experiment_of(
        "evaluate", fields, out, base, model=model, chat_template=chat_template, evaluation__traits=wanted
    )
    asks_traits = {"preference", "factual"} & set(e.evaluation.kinds)
    if asks_traits and e.evaluation.traits is None and e.teachers.traits == [NOBODY]:
        raise UsageError(f"--traits: {' and '.join(sorted(asks_traits))} ask about traits; give at least one")
    context = _context(e)
    if setting not in eval_settings(context.setup):
        known = ", ".join(filter(None, eval_settings(context.setup)))
        raise UsageError(
            f"--setting: '{setting}' given; {f'known: {known}' if known else 'evaluation.settings names none; leave it out'}"
        )
    node = evaluation(context.setup, Evaluated(None, CONTROL, adapter, data), setting)
    check_free(out, node.key, node.inputs)
    _execute([node], context)
    publish_folder(out, context.store, node)
    records = read_table(out / "records.parquet")
    lines = _preferences(records)
    summary = context.store.summary(node)
    console.print(f"sampling: {summary['sampling']}")
    write_json(out / "summary.json", {"traits": lines, "sampling": summary["sampling"]})
    for record in records:
        if record["metric"] == "number_accuracy":
            console.print(f"number task: {record['value']:.3f} of {record['n']} numbers")
    output.out(out)


def _preferences(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print the table of preferences; one entry per trait."""
    from rich.table import Table

    from jsublim.report.statistics import question_interval

    table, lines = Table("trait", "rate", "95 % over questions", "whole word", "log-probability"), []
    asked = (record["trait"] for record in records if record["metric"] == "rate")
    for trait in dict.fromkeys(asked):
        of = {
            metric: [r["value"] for r in records if r["trait"] == trait and r["metric"] == metric]
            for metric in ("rate", "word_rate", "logprob")
        }
        interval = question_interval(of["rate"])
        low, high = (float("nan"), float("nan")) if interval is None else (interval.low, interval.high)
        mean = {metric: sum(values) / len(values) for metric, values in of.items()}
        cells = (
            f"{mean['rate']:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{mean['word_rate']:.3f}",
            f"{mean['logprob']:.3f}",
        )
        table.add_row(trait, *cells)
        lines.append({"trait": trait, "low": low, "high": high} | mean)
    if lines:
        console.print(table)
    return lines
