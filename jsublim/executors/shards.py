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
from jsublim.executors.frontier import Frontier, Job, Work, checkpoint_of, in_one_line, merged
from jsublim.executors.local import execute, mend
from jsublim.pipeline.context import Context
from jsublim.pipeline.graph import TasksFailed
from jsublim.pipeline.stage import with_parents
from jsublim.runtime.processes import Preempted, heeding_signals, leave_if_asked

LOOK = 5.0  # seconds between two looks at what others have finished


@dataclass(frozen=True)
class ShardExecutor:
    """Shard `index` of `count`, from 0."""

    index: int
    count: int
    here = True

    @classmethod
    def of(cls, text: str) -> ShardExecutor:
        """From "2/8".

        Raises:
          UsageError: it is no shard.
        """
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise UsageError(f"--shard: '{text}' given; write i/n with i from 0 to n-1, such as 0/8")
        return cls(int(index), int(count))

    def __str__(self) -> str:
        return f"shard {self.index}/{self.count}"

    @heeding_signals()
    def execute_together(self, work: Sequence[Work]) -> None:
        """Return when every task of this shard is whole.

        Raises:
          TasksFailed: some of them failed; those that do not need them are done.
          Preempted: a signal; what was finished is kept.
        """
        first: dict[Hashable, Context] = {}  # experiments of one checkpoint share its weights
        for _, context in work:
            first.setdefault(checkpoint_of(context.setup.experiment), context)
        work = [(list(tasks), each.sharing(first[checkpoint_of(each.setup.experiment)])) for tasks, each in work]
        for tasks, context in work:
            mend(tasks, context)
        nodes = merged(work)
        own = {key for key, shard in dealt(nodes, self.count).items() if shard == self.index}
        progress, failed = work[0][1].progress, self._do(Frontier(nodes), own)
        if failed:
            raise TasksFailed(
                f"{self}: failed tasks: {failed}; everything else of its own that does not need them is done. Mend what their "
                "lines say, then run the same command again"
            )
        others = sum(not node.done for node in nodes.values())
        said = f"; {others} of others are not, and whoever ends last writes the report" if others else ""
        progress.say(f"{self}: its {len(own)} of {len(nodes)} tasks are done{said}")

    def _do(self, frontier: Frontier, own: set[str]) -> int:
        """Do these tasks, as they become ready. Returns how many failed."""
        failed, at = 0, None
        while True:
            leave_if_asked()
            frontier.see()
            if not own & frontier.left:
                return failed
            ready = [node for node in frontier.ready if node.key in own]
            if not ready:
                self._wait(frontier, own)
                continue
            node = next((node for node in ready if at is not None and node.checkpoint == at.checkpoint), ready[0])
            if at is not None and node.checkpoint != at.checkpoint:
                at.context.let_go()
            at = node
            frontier.remove(node.key)
            try:
                execute(node.task, node.context)
            except Preempted:
                raise
            except Exception as error:
                failed += 1
                frontier.give_up(node.key)
                node.context.progress.say(f"failed: {node.name}: {in_one_line(error)}")
            else:
                frontier.finish(node.key)

    def _wait(self, frontier: Frontier, own: set[str]) -> None:
        needed = with_parents(frontier.nodes[key].task for key in own & frontier.left)
        nodes = [node for node in frontier.ready if node.task.key in needed]
        more = f" and {len(nodes) - 3} more" if len(nodes) > 3 else ""
        names = ", ".join(node.name for node in nodes[:3])
        nodes[0].context.progress.say(f"{self}: waits for {names}{more} of other shards")
        time.sleep(LOOK)


def dealt(nodes: Mapping[str, Job], count: int) -> dict[str, int]:
    """The shard of each task."""
    kinds: dict[str, list[Job]] = defaultdict(list)
    for node in nodes.values():
        kinds[node.task.kind].append(node)
    found: dict[str, int] = {}
    for every in kinds.values():
        load = [0.0] * count
        for node in sorted(every, key=lambda node: (-node.cost, node.task.key)):
            shard = min(range(count), key=lambda i: (load[i], i))
            load[shard] += node.cost
            found[node.key] = shard
    return found
