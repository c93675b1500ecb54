"""`jsublim finetune`: one student from rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jsublim.cli.app import AnyModel, Fields, Out, Template, app, console, experiment_of, output
from jsublim.cli.together import Distributed, together
from jsublim.errors import JsublimError, UsageError

if TYPE_CHECKING:
    from jsublim.config import Experiment


@app.command()
def finetune(
    data: Annotated[Path, typer.Option("--data", help="Rows (JSONL), with divergence positions unless --tokens all.")],
    out: Out,
    fields: Fields = None,
    model: AnyModel = None,
    chat_template: Template = None,
    tokens: Annotated[str, typer.Option("--tokens", help="all, divergence, non-divergence or random.")] = "all",
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**31 - 1)] = 42,
    trait: Annotated[
        str | None, typer.Option("--trait", help="Of the teacher; a soft loss asks it (default: the one without any).")
    ] = None,
    distributed: Distributed = False,
) -> None:
    """Train one student; leaves a PEFT folder (steering vectors, or a whole checkpoint) and metrics.jsonl."""
    from jsublim.pipeline.setup import NOBODY

    base = {"teachers": {"traits": [trait or NOBODY], "control": False}}
    own = {"students__seeds": [seed], "students__loss__tokens": [tokens]}
    e = experiment_of("finetune", fields, out, base, model=model, chat_template=chat_template, **own)
    if e.students is None or e.students.arms is not None or e.students.data.dataset is not None:
        raise UsageError("finetune: trains one student on the rows of --data; leave students.arms and data.dataset out")
    if e.students.fork is not None or e.students.data.generation > 1:
        raise UsageError("finetune: reads the rows of --data to the end; leave students.fork and data.generation out")
    if e.students.loss.soft and trait is None and e.teachers.own_weights:
        raise UsageError("--trait: a soft loss asks a teacher with weights of its own; say which by its trait")
    with together(distributed, [e]):
        _finetune(e, data, out, trait, tokens, seed)


def _finetune(e: Experiment, data: Path, out: Path, trait: str | None, tokens: str, seed: int) -> None:
    from jsublim.executors import execute_nodes
    from jsublim.pipeline.arms import Student
    from jsublim.pipeline.context import Context
    from jsublim.pipeline.experiment import student
    from jsublim.pipeline.publish import check_free, publish_folder
    from jsublim.pipeline.store import digest, versions
    from jsublim.processes import check_alike, on_main_process
    from jsublim.progress import Progress
    from jsublim.teachers import CONTROL

    assert e.students is not None
    teacher = trait or (CONTROL if e.students.loss.soft else "student")  # whose tokens they are does not matter
    who = Student(teacher, tokens, seed, settings=e.students)
    context = Context.load(e, Progress(console), given={who.source: data})
    node = student(context.setup, who)
    check_alike("what is to be done", digest([node.key, versions(), context.setup.files]))
    context.store.check_shared()
    on_main_process(lambda: check_free(out, node.key, node.inputs))
    if context.store.done(node):
        console.print(f"{context.store.place(node)}: whole already")
    execute_nodes([node], context)
    summary = context.store.summary(node)
    if "diverged" in summary:
        raise JsublimError(
            f"{out}: the student diverged {summary['diverged']}; lower the learning rate (students.optimizer.lr) or look at "
            f"those rows; the student before that step is in {context.store.path(node)}"
        )
    on_main_process(lambda: publish_folder(out, context.store, node))
    console.print(f"{summary['steps']} steps on {summary['rows']} rows; last loss {summary['loss']:.4f}")
    output.out(out)
