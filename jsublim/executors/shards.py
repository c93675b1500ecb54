"""Shards: the same command on several machines, each with a number, over one store. Arrays of Slurm and indexed jobs of
Kubernetes need nothing else.

Which shard a task belongs to follows from the graph alone: of each kind, the longest tasks are dealt first, each to the
shard that has least of that kind. A shard does its own tasks; where their parents are another shard's, it waits. Whoever finds
every task done at its end writes the report.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from jsublim.errors import UsageError
from jsublim.executors.frontier import Frontier, Job, checkpoint_of, in_one_line, merged
from jsublim.executors.local import execute, mend
from jsublim.pipeline.context import Context
from jsublim.pipeline.graph import TasksFailed, Work, expected
from jsublim.pipeline.stage import with_parents
from jsublim.runtime.processes import Preempted, heeding_signals, leave_if_asked

LOOK = 5.0  # seconds between two looks at what others have finished


@dataclass(frozen=True)
class Shard:
    """Shard `index` of `count`, from 0."""

    index: int
    count: int

    @classmethod
    def of(cls, text: str) -> Shard:
        """From "2/8". What is no shard is a UsageError."""
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise UsageError(f"--shard: '{text}' given; write i/n with i from 0 to n-1, such as 0/8")
        return cls(int(index), int(count))

    def __str__(self) -> str:
        return f"shard {self.index}/{self.count}"

    @heeding_signals()
    def execute(self, work: Sequence[Work]) -> None:
        """Return when every task of this shard is whole.

        Raises:
          TasksFailed: some of them failed; those that do not need them are done.
          Preempted: a signal; what was finished is kept.
        """
        first: dict[Hashable, Context] = {}  # experiments of one checkpoint share its weights
        for _, context in work:
            first.setdefault(checkpoint_of(context.setup.experiment), context)
        work = [(list(tasks), one.sharing(first[checkpoint_of(one.setup.experiment)])) for tasks, one in work]
        for tasks, context in work:
            mend(tasks, context)
        jobs = merged(work)
        keys = {key for key, shard in dealt(jobs, self.count).items() if shard == self.index}
        progress = work[0][1].progress
        for job in (job for key, job in jobs.items() if key in keys and not job.done):
            progress.left.expect(expected([job.task], job.context.setup))
        failed = self._do(Frontier(jobs), keys)
        if failed:
            raise TasksFailed(
                f"{self}: failed tasks: {failed}; everything else of its own that does not need them is done. Mend what their "
                "lines say, then run the same command again"
            )
        others = sum(not job.done for job in jobs.values())
        missing = f"; {others} of others are not, and whoever ends last writes the report" if others else ""
        progress.say(f"{self}: its {len(keys)} of {len(jobs)} tasks are done{missing}")

    def _do(self, frontier: Frontier, keys: set[str]) -> int:
        """Do these tasks, as they become ready. Returns how many failed."""
        failed, last = 0, None
        while True:
            leave_if_asked()
            frontier.see()
            if not keys & frontier.left:
                return failed
            ready = [job for job in frontier.ready if job.key in keys]
            if not ready:
                self._wait(frontier, keys)
                continue
            job = next((job for job in ready if last is not None and job.checkpoint == last.checkpoint), ready[0])
            if last is not None and job.checkpoint != last.checkpoint:
                last.context.let_go()
            last = job
            try:
                execute(job.task, job.context)
            except Preempted:
                raise
            except Exception as error:
                failed += 1
                frontier.give_up(job.key)
                job.context.progress.say(f"failed: {job.name}: {in_one_line(error)}")
            else:
                frontier.finish(job.key)

    def _wait(self, frontier: Frontier, keys: set[str]) -> None:
        needed = with_parents(frontier.jobs[key].task for key in keys & frontier.left)
        jobs = [job for job in frontier.ready if job.task.key in needed]
        more = f" and {len(jobs) - 3} more" if len(jobs) > 3 else ""
        names = ", ".join(job.name for job in jobs[:3])
        jobs[0].context.progress.say(f"{self}: waits for {names}{more} of other shards")
        time.sleep(LOOK)


def dealt(jobs: Mapping[str, Job], count: int) -> dict[str, int]:
    """The shard of each task."""
    load: dict[str, list[float]] = defaultdict(lambda: [0.0] * count)  # of each kind, shard by shard
    shards: dict[str, int] = {}
    for job in sorted(jobs.values(), key=lambda job: (-job.cost, job.task.key)):
        kind = load[job.task.kind]
        shards[job.key] = kind.index(min(kind))
        kind[shards[job.key]] += job.cost
    return shards
