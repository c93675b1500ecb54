"""`jsublim run`: plan, check everything, do what is not done, report. Several experiments may be one graph."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from jsublim.config import Experiment
from jsublim.core.progress import Progress
from jsublim.core.timeleft import TimeLeft
from jsublim.pipeline.context import Context
from jsublim.pipeline.experiment import plan
from jsublim.pipeline.graph import Graph, TasksFailed, Work, expected, results_key
from jsublim.pipeline.results import check_folder, claim_folder, gather, is_reported, note_seconds, run_folder
from jsublim.pipeline.served import sample_server
from jsublim.pipeline.stage import Task
from jsublim.pipeline.store import digest, versions
from jsublim.runtime.processes import check_alike, check_shared, heeding_signals, on_main_process
from jsublim.runtime.programs import compile_clock, counting_programs


@dataclass(frozen=True)
class PlannedRun:
    """An experiment that was planned and checked.

    Attributes:
      key: what its results hang on; started: when.
    """

    graph: Graph
    context: Context
    key: str
    started: str
    console: Console

    @classmethod
    def of(
        cls, experiment: Experiment, console: Console, left: TimeLeft | None = None, *, devices: bool = True
    ) -> PlannedRun:
        """Plan, check, and put the config into the run's folder.

        Args:
          left: the estimate that its tasks are a part of.
          devices: False where other processes do the tasks.

        Raises:
          UsageError, JsublimError: a config that cannot work.
        """
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        clock = compile_clock()
        progress = Progress(console, left=left, compiling=lambda: clock.name)
        with progress.stage("plan"):
            context = Context.load(experiment, progress, devices=devices)
            graph = plan(context.setup)
            for check in graph.checks(context.setup):
                check()
            key = results_key(context.setup)
        check_alike("what is to be done", digest([key, list(graph.tasks), versions(), context.setup.files]))
        on_main_process(lambda: check_folder(experiment))
        check_shared(context.store.bucket)
        run = cls(graph, context, key, started, console)
        on_main_process(run._begin)
        return run

    def _begin(self) -> None:
        experiment, context = self.context.setup.experiment, self.context
        if experiment.judge is not None and not is_reported(experiment, self.key):
            context.judge.check()
        if experiment.sampling.server is not None and not self.whole:
            sample_server(context).check()
        with context.store.locked([run_folder(experiment)], self._wait):
            claim_folder(experiment, self.key, self.console)
        note = functools.partial(note_seconds, experiment.run_dir, self.key, self.started)
        for kind, seconds in context.progress.seconds.items():
            note(kind, seconds)
        context.progress.note = note

    @property
    def work(self) -> Work:
        return self.graph.tasks.values(), self.context

    @property
    def missing(self) -> list[Task]:
        """The tasks that are not done."""
        return [task for task in self.graph.tasks.values() if not task.done(self.context.store)]

    @property
    def whole(self) -> bool:
        """Whether every task is done."""
        return not self.missing

    def report(self) -> Path:
        """Gather the results of a run that is whole, and write its report; returns the report's path."""

        from jsublim.report.terminal import print_summary  # only who writes a report loads what draws it

        experiment = self.context.setup.experiment

        def write() -> str:
            with self.context.store.locked([run_folder(experiment)], self._wait):
                path = gather(self.graph, self.context, self.key, self.started)
            print_summary(experiment.run_dir, self.console)
            return str(path)

        return Path(on_main_process(write))

    def _wait(self) -> None:
        self.context.progress.say(f"{self.context.setup.experiment.run_dir}: another process is writing there; waiting")


def run_experiments(
    experiments: Sequence[Experiment],
    execute: Callable[[Sequence[Work]], None],
    console: Console,
    *,
    devices: bool = True,
    together: bool = False,
    on_report: Callable[[Path], object] = lambda report: None,
) -> list[Path]:
    """From configs to reports, continuing whatever an earlier call left. Returns the reports of those that are whole.

    Args:
      execute: does the tasks, or its part of them, and returns when they are whole.
      devices: False where it does none of them in this process.
      together: it does the tasks of all experiments as one graph; else one experiment after another, each with its report.
      on_report: called with each report as soon as it is there.

    Raises:
      UsageError, JsublimError: a config that cannot work, before anything is computed; or a task that failed.
      TasksFailed: what does not need them is reported all the same.
      Preempted: a signal; what was finished is kept.
    """
    failed: TasksFailed | None = None
    clock, reports = compile_clock(), list[Path]()
    left = TimeLeft(lambda: clock.seconds)  # of all of them
    with ExitStack() as stack:
        if devices:
            stack.enter_context(counting_programs(console.print))
            stack.enter_context(heeding_signals())
        runs = [PlannedRun.of(experiment, console, left, devices=devices) for experiment in experiments]
        for run in () if together else runs:
            left.expect(expected(run.missing, run.context.setup))
        parts = [runs] if together else [[run] for run in runs]
        for number, part in enumerate(parts, 1):
            if len(parts) > 1:
                name = part[0].context.setup.experiment.name
                console.print(f"{name} ({number} of {len(parts)})", highlight=False)
            try:
                execute([run.work for run in part])
            except TasksFailed as error:
                failed = error
            for run in part:
                if run.whole:
                    reports.append(run.report())
                    on_report(reports[-1])
                run.context.let_go()
    if failed is not None:
        for report in reports:
            console.print(f"{report}: written, as nothing that failed is part of it")
        raise failed
    return reports
