"""What can be done now, and who does what: invariants on random graphs and on a planned one."""

from __future__ import annotations

import random
from typing import Any

import pytest
from command import PLAIN

from jsublim.config import load_experiment
from jsublim.core.progress import Progress
from jsublim.executors.frontier import Frontier, Job, merged
from jsublim.executors.shards import dealt
from jsublim.models.parallel import Layout
from jsublim.pipeline.context import Context
from jsublim.pipeline.experiment import plan
from jsublim.pipeline.setup import Setup
from jsublim.pipeline.store import Store

NOTHING: Any = None  # a frontier asks a node for its key, its parents and its cost only


def graph(dice: random.Random) -> dict[str, Job]:
    """Up to a dozen tasks, parents first."""
    nodes: dict[str, Job] = {}
    for i in range(dice.randint(1, 12)):
        parents = tuple(key for key in nodes if dice.random() < 0.4)
        nodes[str(i)] = Job(str(i), NOTHING, NOTHING, parents, dice.uniform(0.1, 10))
    return nodes


@pytest.mark.parametrize("seed", range(40))
def test_every_task_is_taken_once_after_its_parents_or_given_up_with_what_it_needs(seed):
    dice = random.Random(seed)
    nodes = graph(dice)
    frontier, done, lost, taken = Frontier(nodes), set(), set(), []
    while frontier.left:
        best = max(frontier.way[node.key] for node in frontier.ready)
        node = frontier.take()
        assert frontier.way[node.key] == best  # the longest way first
        assert set(node.parents) <= done
        what = dice.random()
        if what < 0.2:
            frontier.give_back(node.key)
            continue
        taken.append(node.key)
        if what < 0.4:
            needing = {each.key for each in frontier.give_up(node.key)}
            assert needing.isdisjoint(taken)
            lost |= {node.key} | needing
        else:
            done.add(node.key)
            frontier.finish(node.key)
    assert len(taken) == len(set(taken)) and done | lost == set(nodes) and not done & lost
    # Given up are exactly those that need, at any distance, what failed.
    failed = lost & set(taken)
    for key, node in nodes.items():
        assert (key in lost) == (key in failed or bool(lost & set(node.parents)))
    assert not list(frontier.ready)


@pytest.fixture(scope="module")
def planned() -> tuple[list, Context]:
    """The graph of a small experiment, and what it is done with."""
    experiment = load_experiment(PLAIN, ["store=no-such-store", "sampling.shard=50"])
    setup = Setup.of(experiment)
    return list(plan(setup).tasks.values()), Context(setup, Store(experiment.store_dir), Layout(), Progress())


@pytest.fixture(scope="module")
def nodes(planned) -> dict[str, Job]:
    return merged([planned])


def test_experiments_that_share_a_store_share_their_tasks(planned, nodes):
    tasks, context = planned
    assert len(nodes) == len(tasks)
    assert list(merged([planned, planned])) == list(nodes)
    other = context.setup.experiment.model_copy(update={"store": "another"})
    elsewhere = Context(Setup.of(other), Store(other.store_dir), Layout(), Progress())
    assert len(merged([planned, (plan(elsewhere.setup).tasks.values(), elsewhere)])) == 2 * len(nodes)
    assert all(set(node.parents) <= set(nodes) for node in nodes.values())


@pytest.mark.parametrize("count", [1, 3, 8, 200])
def test_each_task_has_one_shard_and_no_shard_has_much_more_than_others(nodes, count):
    shards = dealt(nodes, count)
    assert shards == dealt(dict(reversed(nodes.items())), count)  # whoever deals, and in whichever order
    assert set(shards) == set(nodes) and set(shards.values()) <= set(range(count))
    for kind in {node.task.kind for node in nodes.values()}:
        costs = {key: node.cost for key, node in nodes.items() if node.task.kind == kind}
        load = [sum(cost for key, cost in costs.items() if shards[key] == shard) for shard in range(count)]
        assert max(load) <= sum(costs.values()) / count + max(costs.values()) + 1e-9
