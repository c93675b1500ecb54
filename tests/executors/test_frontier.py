"""What can be done now, who does what, and a simulation of it: invariants on random graphs and on a planned one."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from command import PLAIN, ok, refused

from jsublim.cli.simulate import simulated
from jsublim.config import load_experiment
from jsublim.config.figures import load_question, panel_experiment
from jsublim.executors.frontier import Frontier, Node, merged
from jsublim.executors.shards import dealt
from jsublim.executors.simulation import Assumptions, Machines, play
from jsublim.parallel import Layout
from jsublim.pipeline.context import Context
from jsublim.pipeline.experiment import plan
from jsublim.pipeline.setup import Setup
from jsublim.pipeline.store import Store
from jsublim.progress import Progress

BIG = "model=Qwen/Qwen2.5-32B-Instruct"
NOTHING: Any = None  # a frontier asks a node for its key, its parents and its cost only


def graph(dice: random.Random) -> dict[str, Node]:
    """Up to a dozen tasks, parents first."""
    nodes: dict[str, Node] = {}
    for i in range(dice.randint(1, 12)):
        parents = tuple(key for key in nodes if dice.random() < 0.4)
        nodes[str(i)] = Node(str(i), NOTHING, NOTHING, parents, dice.uniform(0.1, 10))
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
def nodes(planned) -> dict[str, Node]:
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


# Nothing but the tasks themselves takes time.
PLAINLY = Assumptions(
    start=0, replaced=0, read=math.inf, compiles=0, cached=0, spread=0, slow=0, store=math.inf, latency=0
)


def test_one_machine_takes_the_sum_and_any_number_the_longest_way(nodes):
    total = sum(node.cost for node in nodes.values())
    alone = play(nodes, Machines(1, "h100"), PLAINLY)
    assert alone.makespan == pytest.approx(total) and alone.idle == pytest.approx(0, abs=1e-9)
    many = play(nodes, Machines(500, "h100"), PLAINLY)
    assert many.makespan == pytest.approx(many.critical) and many.critical < total
    for workers in (2, 3, 7):
        some = play(nodes, Machines(workers, "h100"), PLAINLY)
        # Graham's bound for any schedule that leaves nobody idle while something is ready.
        assert max(total / workers, many.critical) - 1e-9 <= some.makespan <= total / workers + many.critical
        assert some.chip_hours == pytest.approx(workers * some.makespan / 3600)
    slices = play(nodes, Machines(1, "h100", 8), PLAINLY)
    assert slices.makespan == pytest.approx(total / (8 * PLAINLY.doubled**3))
    given = {key: 1.0 for key in nodes}
    assert play(nodes, Machines(1, "h100"), PLAINLY, given=given).makespan == pytest.approx(len(nodes))


def test_every_task_is_done_after_its_parents_whatever_is_taken_away(nodes):
    hours = {key: Node(key, node.task, node.context, node.parents, 600.0) for key, node in nodes.items()}
    quiet = play(hours, Machines(4, "h100"))
    played = play(hours, Machines(4, "h100"), preempt_per_hour=2.0, seed=1)
    assert played.ends == play(hours, Machines(4, "h100"), preempt_per_hour=2.0, seed=1).ends
    assert played.preempted > 3 and played.makespan > quiet.makespan and quiet.preempted == 0
    ended = {node.key: end for node, _, _, end in played.ends}
    began = {node.key: begin for node, _, begin, _ in played.ends}
    assert len(played.ends) == len(nodes) == len(ended)
    assert all(ended[parent] <= began[key] + 1e-6 for key, node in nodes.items() for parent in node.parents)
    # What was kept was not done again: the work is that of the tasks, within their spread.
    worked = sum(seconds for what, seconds in played.seconds.items() if what in {n.task.kind for n in nodes.values()})
    assert worked == pytest.approx(600 * len(nodes), rel=0.15) and 0 <= played.idle < 1


def test_what_is_printed_is_what_was_played(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = ["students.seeds=[1]", "teachers.traits=[owl]", "data.num_prompts=9000"]
    options = ("--scale", "paper", *few, "--simulate")
    said = ok("reproduce", "fig05", "--panel", "qwen", *options, "3xh100", "--price", "2").err
    path, question = load_question("fig05")
    played = simulated([panel_experiment(path, question, "qwen", "paper", few)], Machines(3, "h100"))
    assert f"{played.makespan / 60:.1f} min" in said and f"{2 * played.chip_hours:.4g}" in said
    assert "token_bytes 12" in said and "arms_per_program" in said
    assert "4xl4-4" in refused(2, "reproduce", "fig05", "--panel", "qwen", BIG, *options, "4xl4")
    assert "--simulate: '0xh100' given" in refused(2, "run", PLAIN, "--simulate", "0xh100")
    assert "--simulate: 'h1' given" in refused(2, "run", PLAIN, "--simulate", "4xh1")
    assert not list(tmp_path.iterdir())
