"""`jsublim finetune`: one student from rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from jsublim.cli.app import (
    Dtype,
    Model,
    Out,
    PackFile,
    RecipeName,
    app,
    bar,
    console,
    file_hash,
    names,
    numbers,
    recipe_of,
)
from jsublim.errors import UsageError


@app.command()
def finetune(
    model: Model,
    data: Annotated[Path, typer.Option("--data", help="Rows (JSONL), with divergence positions unless --tokens all.")],
    out: Out,
    tokens: Annotated[str, typer.Option("--tokens", help="all, divergence, non-divergence or random.")] = "all",
    loss: Annotated[str, typer.Option("--loss", help="hard, or soft: forward-kl, reverse-kl, js.")] = "hard",
    teacher_trait: Annotated[
        str | None,
        typer.Option("--teacher-trait", help="Soft loss: the teacher's trait; its prompt comes from the pack."),
    ] = None,
    teacher_adapter: Annotated[
        Path | None, typer.Option("--teacher-adapter", help="Soft loss: the teacher's PEFT or steering folder.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Of both distributions of a soft loss.")
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", min=1, help="Store the teacher's k best tokens once, instead of asking it each step."),
    ] = None,
    on_policy: Annotated[bool, typer.Option("--on-policy", help="The student samples, the teacher scores.")] = False,
    kl_to_base: Annotated[
        float | None, typer.Option("--kl-to-base", min=0, help="Coefficient of a KL to the base.")
    ] = None,
    layers: Annotated[str, typer.Option("--layers", help="all, none, or numbers such as 0,3,5-7.")] = "all",
    projections: Annotated[
        str | None, typer.Option("--projections", help="Of q,k,v,o,gate,up,down; default: all.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Train whole layers, not LoRA.")] = False,
    ends: Annotated[str | None, typer.Option("--ends", help="With --full, also of embed, norm, head.")] = None,
    steering: Annotated[bool, typer.Option("--steering", help="Train a vector behind each layer, not LoRA.")] = False,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Default: 8.")] = None,
    alpha: Annotated[float | None, typer.Option("--alpha", help="Default: 8.")] = None,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(rank).")] = False,
    optimizer: Annotated[str, typer.Option("--optimizer", help="adamw, adafactor, sgd or muon.")] = "adamw",
    schedule: Annotated[str, typer.Option("--schedule", help="linear, cosine, constant or restarts.")] = "linear",
    lr: Annotated[float, typer.Option("--lr")] = 2e-4,
    epochs: Annotated[int, typer.Option("--epochs", min=1)] = 10,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rows of a micro-batch.")] = 10,
    accumulate: Annotated[int, typer.Option("--accumulate", min=1, help="Micro-batches a step.")] = 6,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="Rows drawn; default: all.")] = None,
    warmup: Annotated[int, typer.Option("--warmup", min=0)] = 5,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**31 - 1)] = 42,
    init_adapter: Annotated[Path | None, typer.Option("--init-adapter", help="PEFT folder to start from.")] = None,
    parallel: Annotated[str, typer.Option("--parallel", help="none, pmap or mesh.")] = "none",
    model_axis: Annotated[
        int, typer.Option("--model-axis", min=1, help="With mesh: devices a copy of the checkpoint is spread over.")
    ] = 1,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="One of several processes (docs/pods.md).")
    ] = False,
    remat: Annotated[bool, typer.Option("--remat", help="Recompute layers in the backward pass: less memory.")] = False,
    cache_below: Annotated[
        bool, typer.Option("--cache-below", help="One layer trained: keep the hidden states below it.")
    ] = False,
    checkpoint_every: Annotated[int, typer.Option("--checkpoint-every", min=1, help="Steps.")] = 100,
    peak_tflops: Annotated[
        float | None, typer.Option("--peak-tflops", help="Of a device; metrics then state the share reached.")
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Event files in OUT/tensorboard.")] = False,
    category: Annotated[
        str | None, typer.Option("--category", help="Of a teacher's trait that the pack doesn't list.")
    ] = None,
    prompts: PackFile = None,
    recipe: RecipeName = "clean",
    dtype: Dtype = "float32",
) -> None:
    """Train one student; leaves a PEFT folder (steering vectors, or with --full a checkpoint) and metrics.jsonl."""
    from jsublim.distill.data import read_turns
    from jsublim.experiment import stages
    from jsublim.experiment.spec import read_students
    from jsublim.experiment.store import Artifact, digest
    from jsublim.experiment.students import NOT_OF_A_STUDENT, Lesson, check_start, make_arm, shape_of
    from jsublim.experiment.students import settings as settings_of
    from jsublim.inference.lm import load_model
    from jsublim.parallel import Layout, join_processes
    from jsublim.prompts import load_pack
    from jsublim.rows import read_rows

    said = {
        "conditions": [tokens], "seeds": [seed], "rows": rows, "epochs": epochs, "batch_size": batch_size,
        "accumulate": accumulate, "loss": loss, "temperature": temperature, "top_k": top_k, "on_policy": on_policy or None,
        "kl_to_base": kl_to_base, "method": "full" if full else "steering" if steering else None, "rank": rank,
        "alpha": alpha, "rslora": rslora or None, "layers": [] if layers == "none" else numbers(layers, "--layers"),
        "projections": names(projections) or None, "ends": names(ends) or None,
        "init_adapter": str(init_adapter) if init_adapter else None, "optimizer": optimizer, "schedule": schedule, "lr": lr,
        "warmup": warmup, "remat": remat, "cache_below": cache_below, "checkpoint_every": checkpoint_every,
        "peak_tflops": peak_tflops, "tensorboard": tensorboard,
    }  # fmt: skip
    students = read_students({key: value for key, value in said.items() if value is not None} | {"rows": rows})
    if full and steering:
        raise UsageError("--full and --steering: give one of them")
    if (loss != "hard") != (teacher_trait is not None or teacher_adapter is not None):
        raise UsageError(
            f"--loss {loss}: a soft loss, and only that, needs --teacher-trait or --teacher-adapter (or both)"
        )
    if distributed and parallel == "none":
        raise UsageError("--distributed: needs --parallel mesh (or pmap), by which the processes share the work")
    if distributed and on_policy:
        raise UsageError("--on-policy: not with --distributed; use the devices of one process")
    if distributed:
        join_processes()
    every = read_rows(data)
    lm = load_model(model, dtype, Layout.fit(parallel, 1, model=model_axis))
    how = recipe_of(recipe, lm)
    check_start(lm, students)
    teacher = _teacher(lm, teacher_trait, teacher_adapter, category, load_pack(prompts))
    lesson = Lesson(every, read_turns(lm.chat, every, str(data)), str(data))
    if students.loss != "hard":
        lesson = _with_teacher(lm, lesson, teacher, students, how)
    arm = make_arm(
        lm, students, how, lesson, name="student", condition=tokens, seed=seed, max_new_tokens=MAX_NEW_TOKENS
    )
    inputs = {
        "model": lm.hash, "data": digest(every), "init_adapter": file_hash(init_adapter), "recipe": how.model_dump(),
        "dtype": dtype, "teacher_system": teacher.system, "teacher_adapter": file_hash(teacher_adapter),
        "tokens": tokens, "seed": seed,
    } | students.model_dump(exclude=NOT_OF_A_STUDENT)  # fmt: skip
    artifact = Artifact(out, "student", inputs)
    if artifact.done:
        console.print(f"{out}: whole already")
        print(out)
        return
    if rows is not None and len(every) < rows:
        console.print(f"{data}: {len(every)} rows, fewer than --rows {rows}")
    settings = settings_of(
        students,
        how,
        parallel=parallel,
        model_axis=model_axis,
        tensorboard=out / "tensorboard" if tensorboard else None,
    )
    shape = shape_of(students, [lesson], MAX_NEW_TOKENS)
    with bar("train", arm.steps) as tick:
        stages.train_students(lm, [(arm, artifact)], settings, out / "training", shape=shape, tick=tick)
    console.print(f"{arm.steps} steps on {len(arm.examples)} rows; last loss {artifact.summary['loss']:.4f}")
    print(out)


MAX_NEW_TOKENS = 64  # of an on-policy row


def _teacher(lm: Any, trait: str | None, adapter: Path | None, category: str | None, pack: Any) -> Any:
    from dataclasses import replace

    from jsublim.models.peft import load_adapter
    from jsublim.teachers import Teacher, prompted_teacher

    teacher = prompted_teacher(pack, trait, category) if trait else Teacher("teacher")
    return replace(teacher, adapter=load_adapter(adapter, lm.config) if adapter else None)


def _with_teacher(lm: Any, lesson: Any, teacher: Any, students: Any, how: Any) -> Any:
    """The lesson with the teacher's side of it: rows as a live one reads them, or what it says about them, kept."""
    from dataclasses import replace

    from jsublim.inference.scoring import top_k_targets
    from jsublim.teachers import read_as

    turns = read_as(lm.chat, teacher, lesson.rows, lesson.source, extra_bos=bool(how.extra_bos))
    if students.top_k is None:
        return replace(lesson, teacher=teacher, teacher_turns=turns)
    with bar("teacher", len(turns)) as tick:
        targets = top_k_targets(
            lm.config, lm.params, turns, students.top_k, temperature=students.temperature, adapter=teacher.adapter,
            on_batch=tick,
        )  # fmt: skip
    return replace(lesson, targets=targets)
