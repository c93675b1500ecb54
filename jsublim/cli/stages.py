"""Commands that do one stage of an experiment: generate, divergence, finetune, evaluate.

Each takes the fields of `jsublim run`, plans the tasks that `run` would, and publishes what comes of them at `--out`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from jsublim.cli.app import Template, app, console, names, output, print_table
from jsublim.cli.together import Distributed, together
from jsublim.core.files import read_table, write_json
from jsublim.core.progress import Progress
from jsublim.core.section import nested, overlaid
from jsublim.errors import JsublimError, UsageError

if TYPE_CHECKING:
    from jsublim.config import Experiment
    from jsublim.pipeline.context import Context
    from jsublim.pipeline.stage import Node
    from jsublim.pipeline.values import Rows

StudentSeed = Annotated[int, "The student's: its rows, their order, its start.", {"min": 0, "max": 2**31 - 1}]
Counterfactuals = Annotated[str | None, "Other traits, with commas; default: as `run`."]


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """Options of every one of these commands."""

    fields: Annotated[
        list[str] | None,
        "A config, and any fields of `jsublim run`: recipe=paper sampling.strategy=greedy store=runs/store.",
        {"metavar": "[CONFIG] [a.b=c]..."},
    ] = None
    out: Annotated[Path, "Where the result goes; an unfinished one there is continued."]
    model: Annotated[str | None, "As model=: a folder, a bundled name, or owner/name."] = None
    chat_template: Template = None

    def experiment(self, command: str, base: dict[str, Any], **options: Any) -> Experiment:
        """The experiment that the command is a part of: what the command assumes (`base`), a config or none, what options say (dotted
        names with "__" for the dot; None is not given), and fields laid over it. Its artifacts lie in the config's store; without a
        config in a folder beside `out`."""
        from jsublim.config import Experiment, check_config, read_config
        from jsublim.config.loading import override

        fields = list(self.fields or [])
        config = fields.pop(0) if fields and ("=" not in fields[0] or Path(fields[0]).is_file()) else None
        below = {} if config else {"store": str(self.out.with_name(f"{self.out.stem}.artifacts"))}
        options |= {"model": self.model, "chat_template": self.chat_template}
        given = {key.replace("__", "."): value for key, value in options.items() if value is not None}
        values: dict[str, Any] = {"name": command} | base | below
        for layer in (read_config(config) if config else {}, nested(given)):
            values = overlaid(values, layer)
        for field in fields:
            override(values, field)
        if "model" not in values:
            raise UsageError(f"{command}: give --model (or model=, or a config that names one)")
        return check_config(Experiment, values, config or command)


def context_of(experiment: Experiment, given: Mapping[Any, Path] | None = None) -> Context:
    from jsublim.pipeline.context import Context

    return Context.load(experiment, Progress(console), given=given)


def make(context: Context, place: Path, made: Node | Rows) -> list[dict[str, Any]]:
    """Make what a place is to hold, and publish it there; what each of its artifacts keeps of itself."""
    from jsublim.executors import execute_nodes
    from jsublim.pipeline import publish
    from jsublim.pipeline.values import Rows
    from jsublim.runtime.processes import on_main_process

    store, nodes = context.store, made.nodes if isinstance(made, Rows) else (made,)
    on_main_process(lambda: publish.check_free(place, made.key, made.inputs))
    execute_nodes(nodes, context)
    summaries = [store.summary(node) for node in nodes]
    for node, summary in zip(nodes, summaries, strict=True):
        if "diverged" in summary:
            raise JsublimError(
                f"{place}: the student diverged {summary['diverged']}; lower the learning rate (students.optimizer.lr) or look "
                f"at those rows; the student before that step is in {store.path(node)}"
            )
    if isinstance(made, Rows):
        on_main_process(lambda: publish.publish_rows(place, made.read(store), made))
    else:
        on_main_process(lambda: publish.publish_folder(place, store, made))
    return summaries


@app.command()
def generate(
    *,
    stage: StageOptions,
    trait: Annotated[str | None, "The teacher's trait; its system prompt comes from the pack."] = None,
    control: Annotated[bool, "The teacher without a trait."] = False,
) -> None:
    """Let a teacher answer the prompts, and keep the answers that are in format (OUT, JSONL)."""
    from jsublim.inference.teachers import CONTROL
    from jsublim.pipeline import arguments, experiment, origins
    from jsublim.pipeline.arms import Source
    from jsublim.pipeline.setup import NOBODY

    if (trait is not None) == control:
        raise UsageError("generate: give exactly one of --trait and --control")
    # Whose rows they are is what matters here; against which others they are read is a later command's.
    context = context_of(stage.experiment("generate", {"teachers": {"traits": [trait or NOBODY]}}))
    if trait is not None:
        arguments.category(context.setup, trait)
    writer = origins.writer(context.setup, Source(trait or CONTROL))
    parts = make(context, stage.out, experiment.answers(context.setup, writer))
    asked, kept, rejected = 0, 0, Counter[str]()
    for part in parts:
        asked, kept = asked + part["rows"], kept + part["kept"]
        rejected.update(part["reject"])
    why = ", ".join(f"{count} {reason}" for reason, count in rejected.items())
    console.print(f"kept {kept} of {asked} rows ({kept / asked:.1%})" + (f"; rejected: {why}" if why else ""))
    output.out(stage.out)


@app.command()
def divergence(
    *,
    data: Annotated[Path, "Rows of the teacher (JSONL)."],
    trait: Annotated[str, "The trait of the teacher that wrote them."],
    stage: StageOptions,
    counterfactuals: Counterfactuals = None,
) -> None:
    """Find the divergence tokens of rows; what each teacher said of them goes beside OUT, with .readings.parquet."""
    from jsublim.pipeline import arguments, experiment, readings
    from jsublim.pipeline.arms import Source
    from jsublim.pipeline.stages.divergence import merged

    others = names(counterfactuals) or None
    if others is not None and trait in others:
        raise UsageError(f"--counterfactuals: '{trait}' is the teacher's own trait; leave it out")
    e = stage.experiment("divergence", {"teachers": {"traits": [trait]}}, teachers__counterfactuals=others)
    out, context = stage.out, context_of(e)
    sidecar = out.with_name(f"{out.stem}.readings.parquet")
    if sidecar.exists() and not out.exists():
        raise UsageError(f"{sidecar}: already exists; give another --out or move it away")
    rows = experiment.read(context.setup, Source(trait), arguments.rows_of_file(context.setup, data))
    summary = merged(make(context, out, rows))
    # Second, for without OUT it would be taken for somebody else's.
    readings.write_readings(sidecar, rows.readings(context.store))
    console.print(
        f"{summary['divergence_tokens']} divergence tokens of {summary['tokens']} ({summary['share']:.2%}); "
        f"{summary['rows_with']} of {summary['rows']} rows have one"
    )
    output.out(out)


@app.command()
def finetune(
    *,
    data: Annotated[Path, "Rows (JSONL), with divergence positions unless --tokens all."],
    stage: StageOptions,
    tokens: Annotated[str, "all, divergence, non-divergence or random."] = "all",
    seed: StudentSeed = 42,
    trait: Annotated[str | None, "Of the teacher; a soft loss asks it (default: the one without any)."] = None,
    distributed: Distributed = False,
) -> None:
    """Train one student; leaves a PEFT folder (steering vectors, or a whole checkpoint) and metrics.jsonl."""
    from jsublim.inference.teachers import CONTROL
    from jsublim.pipeline import experiment
    from jsublim.pipeline.arms import Student
    from jsublim.pipeline.setup import NOBODY
    from jsublim.pipeline.store import digest, versions
    from jsublim.runtime.processes import check_alike, check_shared

    base = {"teachers": {"traits": [trait or NOBODY], "control": False}}
    e = stage.experiment("finetune", base, students__seeds=[seed], students__loss__tokens=[tokens])
    if e.students is None or e.students.arms is not None or e.students.data.dataset is not None:
        raise UsageError("finetune: trains one student on the rows of --data; leave students.arms and data.dataset out")
    if e.students.fork is not None or e.students.data.generation > 1:
        raise UsageError("finetune: reads the rows of --data to the end; leave students.fork and data.generation out")
    if e.students.loss.soft and trait is None and e.teachers.own_weights:
        raise UsageError("--trait: a soft loss asks a teacher with weights of its own; say which by its trait")
    teacher = trait or (CONTROL if e.students.loss.soft else "student")  # whose tokens they are does not matter
    who = Student(teacher, tokens, seed, settings=e.students)
    with together(distributed, [e]):
        context = context_of(e, {who.source: data})
        node = experiment.student(context.setup, who)
        check_alike("what is to be done", digest([node.key, versions(), context.setup.files]))
        check_shared(context.store.bucket)
        if context.store.done(node):
            console.print(f"{context.store.place(node)}: whole already")
        (summary,) = make(context, stage.out, node)
        console.print(f"{summary['steps']} steps on {summary['rows']} rows; last loss {summary['loss']:.4f}")
        output.out(stage.out)


@app.command()
def evaluate(
    *,
    stage: StageOptions,
    adapter: Annotated[Path | None, "PEFT folder of a student; default: the base."] = None,
    traits: Annotated[str | None, "As evaluation.traits=, with commas."] = None,
    data: Annotated[Path | None, "Rows to do the number task on too."] = None,
    setting: Annotated[str, "One of evaluation.settings; default: the plain one."] = "",
) -> None:
    """Ask a model for its favourites (and whatever else evaluation.kinds names): OUT gets records and answers."""
    from jsublim.inference.teachers import CONTROL
    from jsublim.pipeline.evaluated import Evaluated, eval_settings
    from jsublim.pipeline.experiment import evaluation
    from jsublim.pipeline.setup import NOBODY

    wanted = None if traits is None else names(traits)
    if wanted == []:
        raise UsageError("--traits: give at least one trait")
    e = stage.experiment("evaluate", {"teachers": {"traits": wanted or [NOBODY]}}, evaluation__traits=wanted)
    asks_traits = {"preference", "factual"} & set(e.evaluation.kinds)
    if asks_traits and e.evaluation.traits is None and e.teachers.traits == [NOBODY]:
        raise UsageError(f"--traits: {' and '.join(sorted(asks_traits))} ask about traits; give at least one")
    context = context_of(e)
    known = eval_settings(context.setup)
    if setting not in known:
        listed = ", ".join(filter(None, known))
        fix = f"known: {listed}" if listed else "evaluation.settings names none; leave it out"
        raise UsageError(f"--setting: '{setting}' given; {fix}")
    out, node = stage.out, evaluation(context.setup, Evaluated(None, CONTROL, adapter, data), setting)
    sampling = make(context, out, node)[0]["sampling"]
    records = read_table(out / "records.parquet")
    rates, lines = _preferences(records)
    if lines:
        print_table(lines)
    write_json(out / "summary.json", {"traits": rates, "sampling": sampling})
    for record in records:
        if record["metric"] == "number_accuracy":
            console.print(f"number task: {record['value']:.3f} of {record['n']} numbers")
    output.out(out)


def _preferences(records: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """How often each trait is named, mean over questions with its 95 % interval: as numbers, and as lines of a table."""
    from jsublim.report.statistics import question_interval

    rates, lines = [], []
    for trait in dict.fromkeys(record["trait"] for record in records if record["metric"] == "rate"):
        values = {
            metric: [r["value"] for r in records if r["trait"] == trait and r["metric"] == metric]
            for metric in ("rate", "word_rate", "logprob")
        }
        mean = {metric: sum(of_questions) / len(of_questions) for metric, of_questions in values.items()}
        interval = question_interval(values["rate"])
        low, high = (math.nan, math.nan) if interval is None else (interval.low, interval.high)
        rates.append({"trait": trait, "low": low, "high": high} | mean)
        rate, word, logprob = (f"{value:.3f}" for value in mean.values())
        line = {"trait": trait, "rate": rate, "95 % over questions": f"{low:.3f} to {high:.3f}", "whole word": word}
        lines.append(line | {"log-probability": logprob})
    return rates, lines
