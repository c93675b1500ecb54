"""Everything that is wrong with an experiment and that its fields alone do not tell: checkpoints, packs, traits, tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from jsublim.config import Experiment, variants
from jsublim.errors import JsublimError
from jsublim.inference.lm import is_available_offline
from jsublim.models.checkpoint import read_config
from jsublim.pipeline.arguments import category
from jsublim.pipeline.arms import plan_students
from jsublim.pipeline.experiment import plan
from jsublim.pipeline.graph import Graph
from jsublim.pipeline.setup import Checkpoint, Setup, models_of
from jsublim.pipeline.training import check_start
from jsublim.text.prompts import load_pack


def look_through(experiment: Experiment, shape: Callable[[str], Path]) -> tuple[Setup | None, Graph | None, list[str]]:
    """What would be done, as far as it can be planned, and what is wrong, in one line each. `shape`: as of `Setup.of`.
    What is not here is not looked at: nothing is asked of the hub."""
    try:
        setup = Setup.of(experiment, shape)
    except JsublimError:
        return None, None, _refused(_readings(experiment, shape))
    mistakes = _refused((lambda trait=trait: category(setup, trait)) for trait in experiment.teachers.traits)
    try:
        graph = plan(setup)
    except JsublimError as error:
        return setup, None, [*(mistakes or [str(error)]), *_refused(_starts(setup) if setup.known else ())]
    if setup.known:
        mistakes = _refused(graph.checks(setup))
    return setup, graph, mistakes


def _readings(experiment: Experiment, shape: Callable[[str], Path]) -> Iterator[Callable[[], Any]]:
    """What `Setup.of` reads, each by itself."""
    yield lambda: load_pack(experiment.prompts)
    students = tuple(plan_students(experiment))
    judge = None if experiment.judge is None else experiment.judge.model
    for name in dict.fromkeys((*models_of(experiment, students), judge)):
        if name is not None and is_available_offline(name):
            template = (
                experiment.chat_template if name != judge else experiment.judge and experiment.judge.chat_template
            )
            yield lambda name=name, template=template: Checkpoint.here(name, experiment.dtype, template)
        elif name is not None and name != judge:
            yield lambda name=name: read_config(shape(name))
    yield lambda: Setup.of(experiment, shape)


def _starts(setup: Setup) -> Iterator[Callable[[], Any]]:
    """What can be checked of students where no plan can be made."""
    for students in ({} if setup.experiment.students is None else variants(setup.experiment.students)).values():
        config, dtype = setup.checkpoint(students.model).config, setup.experiment.dtype
        yield lambda config=config, dtype=dtype, students=students: check_start(config, dtype, students)


def _refused(checks: Iterable[Callable[[], Any]]) -> list[str]:
    """What each of them refuses, each line once."""
    lines: dict[str, None] = {}
    for check in checks:
        try:
            check()
        except JsublimError as error:
            lines[str(error)] = None
    return list(lines)
