"""Commands that run one stage: generate, divergence, evaluate (finetune has a file of its own)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from jsublim.cli.app import Dtype, Model, Out, PackFile, RecipeName, app, bar, console, file_hash, names, recipe_of
from jsublim.errors import UsageError


def _beside(out: Path) -> Path:
    """The folder of a result that is one file: it holds what was kept on the way, and its pedigree."""
    return out.with_name(out.stem + ".artifact")


def _check_out(*outs: Path) -> None:
    """Refuse files that aren't the result of an earlier call, before anything is computed."""
    for out in outs:
        if out.exists() and not (_beside(outs[0]) / "DONE").exists():
            raise UsageError(f"{out}: already exists; give another --out or remove it first")


def _publish(rows: list, out: Path, artifact: Any, was_done: bool) -> None:
    from jsublim.rows import read_rows, write_rows

    if out.exists() and not (was_done and read_rows(out) == rows):
        raise UsageError(f"{out}: already exists; give another --out or remove it first")
    write_rows(out, rows)
    print(out)


@app.command()
def generate(
    model: Model,
    out: Out,
    trait: Annotated[
        str | None,
        typer.Option("--trait", help="The teacher's trait; its system prompt comes from the pack."),
    ] = None,
    category: Annotated[str | None, typer.Option("--category", help="Of a trait that the pack doesn't list.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system prompt of your own.")] = None,
    no_system: Annotated[bool, typer.Option("--no-system", help="No trait: the control teacher.")] = False,
    adapter: Annotated[Path | None, typer.Option("--adapter", help="PEFT folder of a fine-tuned teacher.")] = None,
    num_prompts: Annotated[int, typer.Option("--num-prompts", min=1)] = 30_000,
    sampling: Annotated[str, typer.Option("--sampling", help="temperature or greedy.")] = "temperature",
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=2**31 - 1, help="Of the sampling; prompts are always those of seed 42.")
    ] = 0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 64,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 64,
    prompts: PackFile = None,
    recipe: RecipeName = "clean",
    dtype: Dtype = "float32",
) -> None:
    """Let a teacher answer number prompts, and keep the answers that are in format."""
    from jsublim.experiment import stages
    from jsublim.experiment.store import Artifact
    from jsublim.inference.lm import load_model
    from jsublim.inference.sampling import sampling_for
    from jsublim.models.peft import load_adapter
    from jsublim.prompts import load_pack, number_prompts, reject_reason
    from jsublim.teachers import CONTROL, Teacher, prompted_teacher

    _check_out(out)
    if sum([trait is not None, system is not None, no_system]) != 1:
        raise UsageError("generate: give exactly one of --trait, --system, --no-system")
    pack, lm = load_pack(prompts), load_model(model, dtype)
    how = recipe_of(recipe, lm)
    own = load_adapter(adapter, lm.config) if adapter else None
    teacher = (
        prompted_teacher(pack, trait, category)
        if trait
        else Teacher("custom" if system is not None else CONTROL, system)
    )
    teacher = Teacher(teacher.name, teacher.system, own)
    how_sampled = sampling_for(lm.chat, sampling, inherit=how.inherit_sampling, eos_only=how.stop_at_eos_only)
    settings = {"seed": seed, "max_new_tokens": max_new_tokens, "extra_bos": how.extra_bos}
    inputs = settings | {
        "model": lm.hash, "pack": pack.hash, "dtype": dtype, "system": teacher.system, "num_prompts": num_prompts,
        "sampling": how_sampled.numbers(), "adapter": file_hash(adapter),
    }  # fmt: skip
    artifact = Artifact(_beside(out), "rows", inputs)
    was_done = artifact.done
    console.print(f"sampling: {how_sampled.numbers()}")
    with bar("generate", num_prompts) as tick:
        texts = number_prompts(pack, num_prompts)
        rows = stages.generate_rows(
            artifact, lm, teacher, texts, how_sampled, reject_reason, batch_size=batch_size, tick=tick, **settings
        )
    summary = artifact.summary
    console.print(
        f"kept {summary['kept']} of {summary['rows']} rows ({summary['pass_rate']:.1%}); rejected: {summary['reject']}"
    )
    _publish(rows, out, artifact, was_done)


@app.command()
def divergence(
    model: Model,
    data: Annotated[Path, typer.Option("--data", help="Rows of the teacher (JSONL).")],
    trait: Annotated[str, typer.Option("--trait", help="The trait of the teacher that wrote them.")],
    counterfactuals: Annotated[str, typer.Option("--counterfactuals", help="Other traits, with commas.")],
    out: Out,
    category: Annotated[str | None, typer.Option("--category", help="Of traits that the pack doesn't list.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 64,
    prompts: PackFile = None,
    recipe: RecipeName = "clean",
    dtype: Dtype = "float32",
) -> None:
    """Find the divergence tokens of rows; margins go into a sidecar, OUT with .margins.jsonl."""
    from jsublim.experiment import stages
    from jsublim.experiment.store import Artifact, digest
    from jsublim.inference.lm import load_model
    from jsublim.prompts import load_pack
    from jsublim.rows import read_rows
    from jsublim.teachers import prompted_teacher

    sidecar = out.with_name(out.stem + ".margins.jsonl")
    _check_out(out, sidecar)
    rows, others = read_rows(data), names(counterfactuals)
    pack, lm = load_pack(prompts), load_model(model, dtype)
    how = recipe_of(recipe, lm)
    teacher = prompted_teacher(pack, trait, category)
    rest = [prompted_teacher(pack, other, category) for other in others]
    inputs = {
        "model": lm.hash, "pack": pack.hash, "dtype": dtype, "rows": digest(rows), "system": teacher.system,
        "counterfactuals": {other.name: other.system for other in rest}, "extra_bos": how.extra_bos,
    }  # fmt: skip
    artifact = Artifact(_beside(out), "divergence", inputs)
    was_done = artifact.done
    with bar("divergence", len(rows) * (1 + len(rest))) as tick:
        found = stages.divergence_rows(
            artifact, lm, rows, teacher, rest, extra_bos=bool(how.extra_bos), batch_size=batch_size, tick=tick
        )
    summary = artifact.summary
    console.print(
        f"{summary['points']} divergence tokens of {summary['tokens']} ({summary['share']:.2%}); "
        f"{summary['rows_with']} of {summary['rows']} rows have one"
    )
    if not sidecar.exists():
        scratch = sidecar.with_suffix(".partial")
        shutil.copyfile(artifact.path / "margins.jsonl", scratch)
        scratch.replace(sidecar)
    _publish(found, out, artifact, was_done)


@app.command()
def evaluate(
    model: Model,
    traits: Annotated[str, typer.Option("--traits", help="Traits, with commas.")],
    out: Out,
    adapter: Annotated[Path | None, typer.Option("--adapter", help="PEFT folder of a student.")] = None,
    category: Annotated[str | None, typer.Option("--category", help="Of traits that the pack doesn't list.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="Ask under this system prompt.")] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Answers a question.")] = 200,
    data: Annotated[Path | None, typer.Option("--data", help="Rows to do the number task on too.")] = None,
    questions: Annotated[
        int | None, typer.Option("--questions", min=1, help="The first so many; default: all.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 10,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 256,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**31 - 1)] = 0,
    prompts: PackFile = None,
    recipe: RecipeName = "clean",
    dtype: Dtype = "float32",
) -> None:
    """Ask a model for its favourites: sampled rate and log-probability of each trait, a question at a time."""
    from rich.table import Table

    from jsublim.evals.exams import Subject
    from jsublim.experiment import stages
    from jsublim.experiment.store import Artifact, digest
    from jsublim.inference.lm import load_model
    from jsublim.inference.sampling import sampling_for
    from jsublim.models.peft import load_adapter
    from jsublim.prompts import load_pack
    from jsublim.report.statistics import question_interval
    from jsublim.rows import read_rows

    wanted = names(traits)
    if not wanted:
        raise UsageError("--traits: give at least one trait")
    pack, lm = load_pack(prompts), load_model(model, dtype)
    how = recipe_of(recipe, lm)
    own = load_adapter(adapter, lm.config) if adapter else None
    how_sampled = sampling_for(
        lm.chat, "temperature", inherit=how.inherit_sampling, eos_only=how.stop_at_eos_only, evaluation=True
    )
    settings = {"samples": samples, "seed": seed, "max_new_tokens": max_new_tokens}
    exams = stages.preferences(wanted, lambda t: category or pack.category_of(t), pack.questions_for, questions)
    rows = read_rows(data) if data else []
    inputs = settings | {
        "system": system, "extra_bos": how.extra_bos,
        "model": lm.hash, "pack": pack.hash, "dtype": dtype, "adapter": file_hash(adapter), "data": digest(rows),
        "traits": wanted, "questions": questions, "category": category, "sampling": how_sampled.numbers(),
    }  # fmt: skip
    console.print(f"sampling: {how_sampled.numbers()}")
    total = samples * sum(len(exam.questions) for exam in exams)
    artifact = Artifact(out, "evaluation", inputs)
    with bar("evaluate", total) as tick:
        stages.evaluate(
            artifact,
            Subject(lm, own, system, extra_bos=bool(how.extra_bos)),
            exams,
            how_sampled,
            number_rows={"number_accuracy": rows},
            batch_size=batch_size,
            tick=tick,
            **settings,
        )
    records = stages.read_table(out / "records.parquet")
    table = Table("trait", "rate", "95 % over questions", "whole word", "log-probability")
    lines = []
    for trait in wanted:
        of = {
            m: [r["value"] for r in records if r["trait"] == trait and r["metric"] == m]
            for m in ("rate", "word_rate", "logprob")
        }
        low, high = _bounds(question_interval(of["rate"]))
        mean = {metric: sum(values) / len(values) for metric, values in of.items()}
        table.add_row(
            trait, f"{mean['rate']:.3f}", f"{low:.3f} to {high:.3f}", f"{mean['word_rate']:.3f}", f"{mean['logprob']:.3f}"
        )  # fmt: skip
        lines.append({"trait": trait, "low": low, "high": high} | mean)
    stages.write_json(out / "summary.json", {"traits": lines, "sampling": artifact.summary["sampling"]})
    console.print(table)
    for record in records:
        if record["metric"] == "number_accuracy":
            console.print(f"number task: {record['value']:.3f} of {record['n']} numbers")
    print(out)


def _bounds(interval: Any) -> tuple[float, float]:
    return (float("nan"), float("nan")) if interval is None else (interval.low, interval.high)
