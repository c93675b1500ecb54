"""Shards: the same command on several machines, each with a number, over one store. Arrays of Slurm and indexed jobs of
Kubernetes need nothing else.

Which shard a task belongs to follows from the graph alone: of each kind, the longest tasks are dealt first, each to the
shard that has least of that kind. A shard does its own tasks; where their parents are another shard's, it waits. After
`HELP_AFTER` seconds it helps: it does what is ready and claimed by nobody, so that a shard that died, or has no machine yet,
holds nobody back for good. Whoever finds every task done at its end writes the report.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from jsublim.errors import UsageError
from jsublim.executors.frontier import Frontier, Node, Work, checkpoint_of, in_one_line, merged
from jsublim.executors.local import execute, mend
from jsublim.pipeline.context import Context
from jsublim.pipeline.graph import TasksFailed, with_parents
from jsublim.processes import Preempted, heeding_signals, leave_if_asked
from jsublim.progress import Progress

LOOK = 5.0  # seconds between two looks at what others have finished
HELP_AFTER = 60.0  # seconds without a task of one's own that could be done


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
        nodes, progress = merged(work), work[0][1].progress
        own = {key for key, shard in dealt(nodes, self.count).items() if shard == self.index}
        _Pass(self, Frontier(nodes), own, progress).run()
        others = sum(not node.done for node in nodes.values())
        said = f"; {others} of others are not, and whoever ends last writes the report" if others else ""
        progress.say(f"shard {self.index}/{self.count}: its {len(own)} of {len(nodes)} tasks are done{said}")


def dealt(nodes: Mapping[str, Node], count: int) -> dict[str, int]:
    """The shard of each task."""
    kinds: dict[str, list[Node]] = defaultdict(list)
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


@dataclass
class _Pass:
    """One shard's way through the graph.

    Attributes:
      own: keys of its tasks.
    """

    shard: ShardExecutor
    frontier: Frontier
    own: set[str]
    progress: Progress
    failed: int = 0
    _idle_since: float | None = None
    _at: Node | None = None  # the last task that was done: its checkpoint is loaded

    def run(self) -> None:
        while True:
            leave_if_asked()
            self._see()
            if not self.own & self.frontier.left:
                break
            node = self._next()
            if node is None:
                self._wait()
            else:
                self._do(node)
        if self.failed:
            raise TasksFailed(
                f"shard {self.shard.index}/{self.shard.count}: failed tasks: {self.failed}; everything else of its own that does "
                "not need them is done. Mend what their lines say, then run the same command again"
            )

    def _see(self) -> None:
        """Take note of everything that is done by now, whoever did it."""
        while found := [node for node in self.frontier.ready if node.done]:  # what becomes ready may be done already
            for node in found:
                self.frontier.remove(node.key)
                self.frontier.finish(node.key)

    def _next(self) -> Node | None:
        """A ready task of its own that nobody is at; after a while without any, one of another shard."""
        ready = [node for node in self.frontier.ready if node.context.store.holder(node.task.outputs) is None]
        own = [node for node in ready if node.key in self.own]
        if own:
            self._idle_since = None
            return next((node for node in own if self._loaded(node)), own[0])
        self._idle_since = self._idle_since or time.monotonic()
        return ready[0] if ready and time.monotonic() - self._idle_since >= HELP_AFTER else None

    def _loaded(self, node: Node) -> bool:
        return self._at is not None and _checkpoint(node) == _checkpoint(self._at)

    def _wait(self) -> None:
        needed = with_parents(node.task for node in self.frontier.nodes.values() if node.key in self.own)
        names = [f"{node.task.kind} {node.task.label}" for node in self.frontier.ready if node.task.key in needed]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        self.progress.say(
            f"shard {self.shard.index}/{self.shard.count}: waits for {', '.join(names[:3])}{more}; looks every {LOOK:.0f} s, "
            f"and helps after {HELP_AFTER:.0f} s"
        )
        time.sleep(LOOK)

    def _do(self, node: Node) -> None:
        if self._at is not None and not self._loaded(node):
            self._at.context.let_go()
        self._at = node
        self.frontier.remove(node.key)
        try:
            execute(node.task, node.context)
        except Preempted:
            raise
        except Exception as error:
            self.failed += 1
            self.frontier.give_up(node.key)
            self.progress.say(f"failed: {node.name}: {in_one_line(error)}")
        else:
            self.frontier.finish(node.key)


def _checkpoint(node: Node) -> Hashable:
    return checkpoint_of(node.context.setup.experiment)
