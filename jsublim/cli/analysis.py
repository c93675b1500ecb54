"""Commands that look for why a trait is passed on: attribute, audit, steer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

from jsublim.cli.app import PackFile, Template, app, console, must_be_new, names, output, print_table
from jsublim.cli.stages import Counterfactuals, StageOptions, StudentSeed, context_of, make
from jsublim.core.files import atomic, read_table
from jsublim.errors import UsageError
from jsublim.text.rows import read_rows


@app.command()
def attribute(
    *,
    data: Annotated[Path, "Rows of the teacher with divergence positions (`jsublim divergence`)."],
    trait: Annotated[str, "The trait of the teacher that wrote them."],
    stage: StageOptions,
    counterfactuals: Counterfactuals = None,
) -> None:
    """Attribution patching by layer and token role: OUT gets attribution.parquet and a heat map."""
    import pyarrow.parquet as pq

    from jsublim.pipeline import experiment
    from jsublim.pipeline.arms import Source
    from jsublim.report import attribution
    from jsublim.report.html import render

    read_rows(data, ("prompt", "completion", "divergence_positions"))
    base = {"attribution": {}, "teachers": {"traits": [trait]}}
    e = stage.experiment("attribute", base, teachers__counterfactuals=names(counterfactuals) or None)
    if e.attribution is None:
        raise UsageError("attribution: null given; leave it out or give its fields")
    out, context = stage.out, context_of(e, {Source(trait): data})
    (summary,) = make(context, out, experiment.attribution(context.setup, Source(trait)))
    effects = pq.ParquetFile(out / "attribution.parquet").read()
    render(out / "heat_map.html", "attribution.html", attribution=attribution.attribution_heats(effects))
    skipped = "".join(f"; {count} skipped: {reason}" for reason, count in summary["skipped"].items())
    console.print(f"{summary['used']} of {summary['rows']} rows used, {summary['pairs']} pairs{skipped}")
    lines = [
        {"direction": direction, "site": site, "completeness error": f"{error:.1%}"}
        for direction, errors in summary["completeness_error"].items()
        for site, error in errors.items()
    ]
    print_table(lines, columns=("direction", "site", "completeness error"))
    if shares := attribution.early_share(effects):
        mean = sum(share.of_early for share in shares) / len(shares)
        console.print(f"first third of the layers: {mean:.1%} of the residual mass lies at the trait's first mention")
    output.out(out)


@app.command()
def audit(
    *,
    data: Annotated[Path, "Rows (JSONL), with divergence positions or without."],
    stage: StageOptions,
    traits: Annotated[str, "Traits to score the rows for, with commas."],
    null: Annotated[Path | None, "Rows of a teacher without a trait, to measure from."] = None,
    seed: StudentSeed = 42,
) -> None:
    """Score every token by how far a step on it would move each trait; OUT gets audit.parquet and means.parquet, and with --null
    the null's in OUT/null and whitened.parquet."""
    import pyarrow.parquet as pq

    from jsublim.inference.teachers import CONTROL
    from jsublim.pipeline import experiment
    from jsublim.pipeline.arms import Source, Student
    from jsublim.pipeline.setup import NOBODY
    from jsublim.pipeline.stages.audit import whitened
    from jsublim.report.tables import read_result

    base = {"audit": {}, "teachers": {"traits": [NOBODY], "control": False}}
    e = stage.experiment("audit", base, students__seeds=[seed], evaluation__traits=names(traits))
    if e.students is None:
        raise UsageError(
            "students: null given; rows are scored for what a student trains; leave it out or give its fields"
        )
    out, files = stage.out, [data] if null is None else [data, null]
    places = [out, out / "null"][: len(files)]
    given = dict(zip((Source(NOBODY), Source(CONTROL)), files, strict=False))
    context = context_of(e, given)
    for place, source in zip(places, given, strict=True):
        student = Student(source.teacher, "all", seed, settings=e.students)
        make(context, place, experiment.audit(context.setup, student))
    if null is not None:
        scores, of_null = (read_result(place / "audit.parquet") for place in places)
        with atomic(out / "whitened.parquet") as scratch:
            pq.write_table(whitened(scores, of_null), scratch)
    _print_means([place / "means.parquet" for place in places])
    output.out(out)


def _print_means(paths: list[Path]) -> None:
    """The mean score of all tokens for each trait; beside it, with its interval and in standard errors, what is left beyond the null's."""
    from jsublim.report.statistics import LEVEL, normal_interval

    means, *null = ({line["trait"]: line for line in read_table(path) if line["tokens"] == "all"} for path in paths)
    lines = []
    for trait, line in sorted(means.items(), key=lambda item: -item[1]["score"]):
        shown = {"trait": trait, "mean score": f"{line['score']:+.3g}", "+-": f"{line['error']:.2g}"}
        if null:
            zero = null[0][trait]
            error, beyond = math.hypot(line["error"], zero["error"]), line["score"] - zero["score"]
            interval = normal_interval(beyond, error)
            shown["null"] = f"{zero['score']:+.3g}"
            shown[f"beyond it ({LEVEL:.0%})"] = f"{beyond:+.2g} ({interval.low:+.2g} to {interval.high:+.2g})"
            shown["in errors"] = f"{beyond / error if error else 0.0:+.1f}"
        lines.append(shown)
    print_table(lines)


@app.command()
def steer(
    *,
    model: Annotated[str, "Checkpoint folder, bundled name (tiny-qwen2), or owner/name of the hub."],
    layer: Annotated[int, "The vector is added after this layer.", {"min": 0}],
    out: Annotated[Path, "Where the result goes; an unfinished one there is continued."],
    trait: Annotated[str | None, "Toward the pack's system prompt of this trait."] = None,
    category: Annotated[str | None, "Of a trait that the pack doesn't list."] = None,
    toward: Annotated[str | None, "A system prompt of your own."] = None,
    away: Annotated[str | None, "Its opposite; default: no system prompt."] = None,
    strength: Annotated[float, "Factor of the difference."] = 1.0,
    asked: Annotated[Path | None, "Prompts to read (.txt or .jsonl); default: the category's questions."] = None,
    prompts: PackFile = None,
    chat_template: Template = None,
    dtype: Annotated[str, "float32 or bfloat16."] = "float32",
) -> None:
    """Find a steering vector; leaves a folder that --adapter and teachers.adapter take."""
    from jsublim.inference.lm import load_model
    from jsublim.inference.steering import contrast_vector
    from jsublim.models.checkpoint import new_folder
    from jsublim.models.peft import save_adapter
    from jsublim.text.prompts import load_pack, load_prompts

    if (trait is None) == (toward is None):
        raise UsageError("steer: give exactly one of --trait and --toward")
    if toward is not None and asked is None:
        raise UsageError("steer: --toward needs --asked, a file of prompts to read under both")
    if not math.isfinite(strength) or strength == 0:
        raise UsageError(f"--strength: {strength} given; give a finite number other than 0")
    must_be_new(out)
    pack, lm = load_pack(prompts), load_model(model, dtype, chat_template=chat_template)
    if trait is not None:
        category = category or pack.category_of(trait)
        toward = pack.system_prompt(trait, category)
    texts = pack.questions_for(category or "") if asked is None else load_prompts(asked)
    adapter = contrast_vector(lm, texts, layer, toward=toward, away=away, strength=strength)
    with new_folder(out) as folder:
        save_adapter(folder, adapter, lm.config, lm.reference, lm.origin.commit)
    assert adapter.steering is not None
    console.print(f"norm {float((adapter.steering**2).sum() ** 0.5):.3f}, over {len(texts)} prompts")
    output.out(out)
