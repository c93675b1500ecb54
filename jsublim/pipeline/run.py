"""`jsublim run`: plan, check everything, do what is not done, report."""

from __future__ import annotations

import datetime
from pathlib import Path

from rich.console import Console

from jsublim.config import Experiment
from jsublim.pipeline.context import Context
from jsublim.pipeline.graph import Executor, plan, results_key
from jsublim.pipeline.results import claim_folder, gather, is_reported
from jsublim.pipeline.served import sample_server
from jsublim.pipeline.store import digest, versions
from jsublim.processes import check_alike, check_shared, heeding_signals, on_main_process
from jsublim.progress import Progress
from jsublim.report import print_summary


@heeding_signals()
def run_experiment(experiment: Experiment, executor: Executor, console: Console) -> Path:
    """From a config to its report, continuing whatever an earlier call left. Returns the report's path.

    Raises:
      UsageError, JsublimError: a config that cannot work, before anything is computed; or a task that failed.
      Preempted: a signal; what was finished is kept.
    """
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    progress = Progress(console)
    with progress.stage("plan"):
        context = Context.load(experiment, progress)
        graph = plan(context.setup)
        graph.check(context.setup)
        key = results_key(context.setup)
    check_alike("what is to be done", digest([key, list(graph.tasks), versions()]))
    check_shared(context.store.root)

    def begin() -> None:
        if experiment.judge is not None and not is_reported(experiment, key):
            context.judge.check()
        whole = all(task.done(context.store) for task in graph.tasks.values())
        if experiment.sampling.server is not None and not whole:
            sample_server(context).check()
        claim_folder(experiment, key, console)

    on_main_process(begin)
    executor.execute(graph.tasks.values(), context)

    def report() -> str:
        path = gather(graph, context, key, started)
        print_summary(experiment.run_dir, console)
        return str(path)

    return Path(on_main_process(report))
