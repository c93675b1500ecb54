"""Ray: ready tasks go to workers on many machines. What they make lies in the store; the driver sees keys and outcomes only.

The driver may die at any time, and so may workers: the same command continues from the store. A local cluster listens on
127.0.0.1; one that exists is the business of whoever started it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from jsublim.config import Experiment
from jsublim.config.experiment import Devices
from jsublim.core.progress import Progress, Tick
from jsublim.errors import JsublimError, UsageError, first_line
from jsublim.executors.frontier import Frontier, Job, merged
from jsublim.executors.local import mend
from jsublim.executors.worker import TaskOutcome, Worker, seen
from jsublim.pipeline.graph import TasksFailed, Work
from jsublim.runtime.processes import heeding_signals, leave_if_asked

LOOK = 5.0  # seconds between two looks at what the cluster has
ROOM = 60.0  # seconds without any worker until that is said
OBJECTS = 128 * 2**20  # bytes of Ray's own store: only keys and outcomes travel
BEGINS = 3  # workers that may fail one after another before one has begun
QUIET = {  # before Ray is imported
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # its own lines about lost workers, which would go to standard output
}
LOCAL = {  # for a cluster that it starts
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's name for listening on 127.0.0.1 alone
    "RAY_AUTH_MODE": "token",
}

Time = tuple[Job, int, float, float]


@dataclass
class RayExecutor:
    """One worker per accelerator, or as `run.workers` and `run.resources` say; each keeps its checkpoint loaded.

    Attributes:
      address: of a cluster that exists; None starts one on this machine, for as long as the tasks take.
      times: of every task that was done: its job, the worker, and when it began and ended, in seconds of `time.monotonic`.
    """

    address: str | None = None
    times: list[Time] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, value in (QUIET if self.address else QUIET | LOCAL).items():
            os.environ.setdefault(name, value)
        try:
            import ray
        except ImportError:
            raise UsageError("--on ray: Ray is not installed; pip install ray") from None
        self._ray: Any = ray
        jax.config.update("jax_platforms", "cpu")  # accelerators are the workers'

    def execute(self, work: Sequence[Work]) -> None:
        """Return when every task is whole.

        Raises:
          UsageError: the experiments do not say the same of workers and devices.
          TasksFailed: some failed, each is named in a line of its own; those that do not need them are done.
          Preempted: SIGTERM.
        """
        work = [(list(tasks), context) for tasks, context in work]
        for tasks, context in work:
            mend(tasks, context)
        runs = [context.setup.experiment.run for _, context in work]
        if any(run != runs[0] for run in runs):
            raise UsageError(
                "run: experiments of one graph must say the same of workers and devices; give it for all of them"
            )
        jobs = {key: job for key, job in merged(work).items() if not job.done}
        if not jobs:
            return
        progress = work[0][1].progress
        with self._cluster(runs[0]) as ray, progress.stage("tasks", len(jobs)) as tick:
            driver = _Driver(ray, runs[0], Frontier(jobs), progress, tick, self.times)
            try:
                driver.run()
            finally:
                driver.stop()
        driver.raise_failures()

    @contextlib.contextmanager
    def _cluster(self, run: Devices) -> Iterator[Any]:
        ray, local = self._ray, {}
        if self.address is None:
            cores = 0 if run.workers == "auto" else int(run.workers * (run.resources or {"CPU": 1}).get("CPU", 1))
            local = {"include_dashboard": False, "num_cpus": max(cores, os.cpu_count() or 1)}
            local["object_store_memory"] = OBJECTS
        try:
            with warnings.catch_warnings():  # of JAX, about forks; Ray's processes begin by exec
                warnings.filterwarnings("ignore", message=r"os\.fork", category=RuntimeWarning)
                # "local": not one that runs on this machine already, or that RAY_ADDRESS names.
                ray.init(address=self.address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
        except Exception as error:  # of many kinds: no cluster there, another version, a wrong token
            option = f"--ray-address {self.address}" if self.address else "--on ray"
            raise JsublimError(f"{option}: cannot be reached or started: {error}") from error
        try:
            with heeding_signals():  # `ray.init` has put a handler of its own
                yield ray
        finally:
            ray.shutdown()


@dataclass
class _WorkerHandle:
    """A worker as the driver sees it."""

    number: int
    actor: Any
    checkpoint: Hashable = None
    job: Job | None = None  # that it is at


class _Driver:
    """One pass through a graph: each worker is started, gets one task after the other, and is lost or stopped."""

    def __init__(
        self, ray: Any, devices: Devices, frontier: Frontier, progress: Progress, tick: Tick, times: list[Time]
    ):
        self.ray, self.devices, self.frontier, self.progress, self.tick = ray, devices, frontier, progress, tick
        self.times = times
        self.starting: dict[Any, _WorkerHandle] = {}  # by what Ray will answer; so is `busy`
        self.busy: dict[Any, _WorkerHandle] = {}
        self.idle: list[_WorkerHandle] = []
        self.lost: Counter[str] = Counter()  # workers, by the key of their task
        self.failed: list[str] = []  # lines
        self.number = 0  # of the last worker
        self.not_begun = 0  # tasks
        self.begins = 0  # workers that failed to begin, one after another
        self.alone_since = time.monotonic()  # without any worker

    def run(self) -> None:
        while self.frontier.left:
            leave_if_asked()
            have = len(self.starting) + len(self.idle) + len(self.busy)
            for _ in range(min(self._wanted(), len(self.frontier.left)) - have):
                self.number += 1
                handle = _WorkerHandle(self.number, self._start())
                self.starting[handle.actor.where.remote()] = handle
            self._assign()
            waiting = [*self.starting, *self.busy]
            answered, _ = self.ray.wait(waiting, timeout=LOOK) if waiting else ([], [])
            if self.idle or self.busy:
                self.alone_since = time.monotonic()
            elif time.monotonic() - self.alone_since > ROOM:
                needed = ", ".join(f"{amount:g} {name}" for name, amount in self._needed().items())
                self.progress.say(f"waiting for a machine with {needed} free; the cluster has {len(self._nodes())}")
            for ref in answered:
                self._begun(ref) if ref in self.starting else self._ended(ref)

    def stop(self) -> None:
        for handle in (*self.starting.values(), *self.idle, *self.busy.values()):
            self._kill(handle)

    def _kill(self, handle: _WorkerHandle) -> None:
        with contextlib.suppress(Exception):  # it may be gone, and so may the cluster
            self.ray.kill(handle.actor)

    def raise_failures(self) -> None:
        for line in self.failed:
            self.progress.say(f"failed: {line}")
        if self.failed:
            others = f" ({self.not_begun} that need them were not begun)" if self.not_begun else ""
            raise TasksFailed(
                f"failed tasks: {len(self.failed)} of {len(self.frontier.jobs)}{others}; everything else is done. Mend "
                "what their lines say, then run the same command again"
            )

    def _nodes(self) -> list[Mapping[str, float]]:
        """Of each machine that is up, its resources."""
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]

    def _needed(self) -> dict[str, float]:
        """What one worker takes: as the config says; or the accelerators that one copy of the checkpoint is spread over (of a
        TPU all chips of a host), or one CPU."""
        if self.devices.resources is not None:
            return dict(self.devices.resources)
        nodes = self._nodes()
        hosts = [node["TPU"] for node in nodes if node.get("TPU")]
        if any(node.get("GPU") for node in nodes):
            return {"GPU": float(self.devices.least_axis)}
        return {"TPU": min(hosts)} if hosts else {"CPU": 1.0}

    def _wanted(self) -> int:
        """How many workers there should be now. With "auto", as many as the machines that are up hold: machines may come
        and go."""
        if self.devices.workers != "auto":
            return self.devices.workers
        needed, nodes = self._needed(), self._nodes()
        if self.devices.resources is None and set(needed) == {"CPU"}:
            return len(nodes)  # JAX uses all cores of a machine
        return sum(int(min(node.get(name, 0.0) / amount for name, amount in needed.items())) for node in nodes)

    def _start(self) -> Any:
        """A worker; it begins once there is room for it."""
        rest = self._needed()
        options = {"num_cpus": rest.pop("CPU", 0), "num_gpus": rest.pop("GPU", 0), "resources": rest}
        actor = self.ray.remote(Worker).options(max_restarts=0, scheduling_strategy="SPREAD", **options)
        return actor.remote(str(Path.cwd()))

    def _assign(self) -> None:
        """Give the idle workers what is ready; a judge's budget and pace are shared out among all."""
        while self.idle:
            handle = self.idle[-1]
            handle.job = self.frontier.take(lambda job, known=handle.checkpoint: job.checkpoint == known)
            if handle.job is None:
                return
            self.idle.pop()
            handle.checkpoint = handle.job.checkpoint
            experiment = one_workers_share(handle.job.context.setup.experiment, max(1, self._wanted()))
            self.busy[handle.actor.make.remote(experiment, handle.job.task.key)] = handle

    def _begun(self, ref: Any) -> None:
        handle = self.starting.pop(ref)
        try:
            self.progress.say(f"worker {handle.number}: {self.ray.get(ref)}")
        except self.ray.exceptions.RayError as error:
            self.begins += 1
            if self.begins >= BEGINS and not self.idle and not self.busy:
                raise JsublimError(f"--on ray: {BEGINS} workers could not begin: {first_line(error)}") from None
            return
        self.begins = 0
        self.idle.append(handle)

    def _ended(self, ref: Any) -> None:
        handle = self.busy.pop(ref)
        job = handle.job
        assert job is not None, "it was busy"
        try:
            outcome: TaskOutcome = self.ray.get(ref)
        except self.ray.exceptions.RayError as error:
            return self._again(job, handle, first_line(error))
        for line in outcome.lines:
            self.progress.say(line)
        if outcome.preempted:
            return self._again(job, handle, "its machine is taken away")
        self.idle.append(handle)
        if outcome.error is not None:
            self._give_up(job, outcome.error)
        elif not seen(job.task, job.context):
            store = job.context.setup.experiment.store_dir
            self._give_up(
                job, f"{store}: does not show here what worker {handle.number} made; all machines must share it"
            )
        else:
            now = time.monotonic()
            self.times.append((job, handle.number, now - outcome.seconds, now))
            job.context.progress.took(job.task.kind, outcome.seconds)
            self.frontier.finish(job.key)
            self.tick(1)

    def _again(self, job: Job, handle: _WorkerHandle, why: str) -> None:
        """A worker was lost; another one begins its task again, from what it had left in the store."""
        self._kill(handle)
        self.lost[job.key] += 1
        times, most = self.lost[job.key], self.devices.retries
        if times > most:
            self._give_up(job, f"its worker was lost {times} times, the last time because: {why} (run.retries={most})")
        else:
            self.progress.say(
                f"{job.name}: worker {handle.number} was lost ({why}); begun again, {times} of {most} times"
            )
            self.frontier.give_back(job.key)

    def _give_up(self, job: Job, error: str) -> None:
        self.failed.append(f"{job.name}: {error}")
        self.not_begun += len(self.frontier.give_up(job.key))


def one_workers_share(experiment: Experiment, workers: int) -> Experiment:
    """The experiment as one of several workers does its tasks: with its share of a judge's budget and pace."""
    judge = experiment.judge
    if judge is None or judge.server is None:
        return experiment
    limits = {name: getattr(judge.server, name) for name in ("budget", "requests_per_minute")}
    shares = {name: value / workers for name, value in limits.items() if value is not None}
    server = judge.server.model_copy(update=shares)
    return experiment.model_copy(update={"judge": judge.model_copy(update={"server": server})})
