"""A stage is one function, and its arguments are its dependencies.

Called while planning, it gives a `Node`: an artifact that is known before it is made. Its key is the hash of the stage's name and of
its arguments (nodes by their keys, values by content); its parents are the nodes among them. How something is made and never what (batch
sizes, devices) is no argument: a stage asks its context for that. A `Task` is one node, or several that one program makes together. When
a task is executed, its stage is called with the same arguments, and what the parents have made is in the store.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from pydantic import BaseModel

from jsublim.core.progress import Tick
from jsublim.core.section import identity
from jsublim.pipeline.context import Context
from jsublim.pipeline.cost import Cost, Sizes
from jsublim.pipeline.setup import Setup
from jsublim.pipeline.store import Output, Store, digest
from jsublim.runtime.processes import on_main_process

T = TypeVar("T")
P = TypeVar("P", "Node", "Task")
Save = Callable[[Path], dict[str, Any]]  # writes the files of an artifact into its folder; returns its summary


@dataclass(frozen=True, eq=False)
class Node(Output):
    """One artifact: a stage with its arguments.

    Attributes:
      arguments: by name; the same values in a namespace are `given`.
    """

    stage: Stage = field(kw_only=True)
    arguments: Mapping[str, Any] = field(kw_only=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Node) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @cached_property
    def given(self) -> Any:
        return SimpleNamespace(**self.arguments)

    @cached_property
    def parents(self) -> tuple[Node, ...]:
        return tuple(dict.fromkeys(nodes_in(self.arguments)))

    @cached_property
    def generation(self) -> int:
        """How many nodes of its own stage lie behind it, one after another: those of one generation can be made together."""
        return self._behind.get(self.kind, 0)

    @cached_property
    def _behind(self) -> dict[str, int]:
        behind: dict[str, int] = {}
        for parent in self.parents:
            for kind, count in {**parent._behind, parent.kind: parent.generation + 1}.items():
                behind[kind] = max(behind.get(kind, 0), count)
        return behind


@dataclass(frozen=True, eq=False)
class Stage:
    """A function that makes artifacts of one kind, and what must be known of that before.

    Attributes:
      cost: under assumed lengths; check: refuses, before anything is computed, what the function would refuse after hours; units: how
        many units it will tick, once its parents are there (None: that cannot be told). All take the arguments, after the setup and the
        sizes, the setup, and the context.
      together: of a stage that makes several nodes in one program, what is equal for those; it may ask for the task of a node.
      most: how many of those at one time.
    """

    kind: str
    function: Callable[..., Any]
    cost: Callable[..., Cost]
    check: Callable[..., None] | None = None
    units: Callable[..., int] | None = None
    together: Callable[[Node, Callable[[Node], Task]], Hashable] | None = None
    most: Callable[[Node], int] = lambda node: 1

    def __call__(self, label: str, **arguments: Any) -> Node:
        """The node of these arguments.

        Args:
          label: for people; no part of the key.

        Raises:
          TypeError: arguments that the function does not take.
        """
        if self.together is None:
            inspect.signature(self.function).bind(None, **arguments)
        return Node(self.kind, label, content(arguments), stage=self, arguments=arguments)


def stage(kind: str, **about: Any) -> Callable[[Callable[..., Any]], Stage]:
    """A decorator: the function as a stage whose artifacts lie in the store's folder `kind`.

    The function is called with a `Context` that has the node's `artifact` and `tick`, and returns what saves the artifact (`Save`). One
    with `together` is called with a context, the nodes to be made, and all nodes of their program, and saves what it makes itself.
    """
    return lambda function: Stage(kind, function, **about)


AS_IT_IS = (str, int, float, type(None))  # in JSON; a bool is an int


def content(value: Any) -> Any:
    """A value as it goes into a key: JSON.

    Raises:
      TypeError: a value that has no content.
    """
    if isinstance(value, AS_IT_IS):
        return value
    if isinstance(value, Mapping):
        return {str(name): content(part) for name, part in value.items()}
    if hasattr(value, "_asdict"):  # a NamedTuple
        return content(value._asdict())
    if isinstance(value, list | tuple):
        return [content(part) for part in value]
    if isinstance(value, BaseModel):
        return identity(value)
    for name in ("key", "identity"):
        if hasattr(value, name):
            return content(getattr(value, name))
    raise TypeError(f"{type(value).__name__} has no content")


def nodes_in(value: Any) -> Iterator[Node]:
    """The nodes that a value consists of."""
    if isinstance(value, Node):
        yield value
    elif isinstance(value, Mapping):
        yield from nodes_in(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from nodes_in(part)
    elif hasattr(value, "nodes"):
        yield from value.nodes


@dataclass(frozen=True, eq=False)
class Task:
    """Nodes that are made at one time, in one program; most tasks have one.

    Attributes:
      everyone: all nodes of that program, those of other tasks too.
    """

    nodes: tuple[Node, ...]
    everyone: tuple[Node, ...]
    task_of: Callable[[Node], Task] = field(repr=False)

    @property
    def stage(self) -> Stage:
        return self.nodes[0].stage

    @property
    def kind(self) -> str:
        return self.stage.kind

    @property
    def outputs(self) -> tuple[Node, ...]:
        return self.nodes

    @cached_property
    def key(self) -> str:
        """The key of its node; of several, one that they all go into."""
        keys = [node.key for node in self.nodes]
        return keys[0] if len(keys) == 1 else digest(keys)

    @cached_property
    def parents(self) -> tuple[Task, ...]:
        """The tasks that have to be done before it: a program has the shape of everyone's rows."""
        tasks = (self.task_of(parent) for node in self.everyone for parent in node.parents)
        return tuple({task.key: task for task in tasks}.values())

    @property
    def label(self) -> str:
        more = len(self.nodes) - 1
        return self.nodes[0].label + (f" and {more} more" if more else "")

    def done(self, store: Store) -> bool:
        return all(store.done(node) for node in self.nodes)

    def make(self, context: Context, tick: Tick) -> None:
        """Do it, from what is in the store to what is missing of its nodes. A task that was stopped goes on where it was.

        Args:
          tick: called with the number of units just finished, of those that `units` counts.
        """
        if self.stage.together is not None:
            return self.stage.function(context.at(None, tick), self.nodes, self.everyone)
        (node,) = self.nodes
        artifact = context.store.open(node)
        save = self.stage.function(context.at(artifact, tick), **node.arguments)
        on_main_process(lambda: artifact.finish(save(artifact.path)))

    def cost(self, setup: Setup, sizes: Sizes) -> Cost:
        """Its cost under assumed lengths."""
        return self._ask(self.stage.cost, setup, sizes)

    def check(self, setup: Setup) -> None:
        """Refuse, before anything is computed, what `make` would refuse after hours.

        Raises:
          UsageError, JsublimError: naming the field of the config.
        """
        if self.stage.check is not None:
            self._ask(self.stage.check, setup)

    def units(self, context: Context) -> int | None:
        """How many units `make` will tick, once its parents are there; None where that cannot be told."""
        return None if self.stage.units is None else self._ask(self.stage.units, context)

    def _ask(self, function: Callable[..., T], *first: Any) -> T:
        if self.stage.together is not None:
            return function(*first, self.nodes)
        return function(*first, **self.nodes[0].arguments)


def with_parents(ends: Iterable[P]) -> dict[str, P]:
    """Nodes, or tasks, and everything they need, by key, as they were planned: parents first."""
    every: dict[str, P] = {}

    def add(node: Any) -> None:
        if node.key not in every:
            for parent in node.parents:
                add(parent)
            every[node.key] = node

    for end in ends:
        add(end)
    return every


def tasks_of(ends: Iterable[Node]) -> dict[str, Task]:
    """The tasks that make nodes and everything they need, by key, parents first."""
    every, made = with_parents(ends), dict[str, Task]()

    def task_of(node: Node) -> Task:
        if node.key not in made:
            group(node.stage)
        return made[node.key]

    def group(stage: Stage) -> None:
        programs: dict[Hashable, list[Node]] = {}
        for node in every.values():
            if node.stage is stage:
                program = node.key if stage.together is None else stage.together(node, task_of)
                programs.setdefault((node.generation, program), []).append(node)
        for members in programs.values():
            for part in split_evenly(members, stage.most(members[0])):
                task = Task(tuple(part), tuple(members), task_of)
                made.update({node.key: task for node in part})

    return with_parents(task_of(node) for node in every.values())


def split_evenly(members: Sequence[T], most: int) -> list[list[T]]:
    """Parts of at most `most` members, as few and as even as can be."""
    size = -(-len(members) // -(-len(members) // most))
    return [list(members[i : i + size]) for i in range(0, len(members), size)]
