"""A graph on machines that are not there: bounds that hold for any schedule, machines taken away, and what is printed."""

from __future__ import annotations

import math

import pytest
from command import PLAIN, ok, refused

from jsublim.config import load_experiment
from jsublim.config.figures import load_question, panel_experiment
from jsublim.core.progress import Progress
from jsublim.executors.frontier import Job, merged
from jsublim.forecast.fleet import Assumptions, Machines, simulate, simulate_experiments
from jsublim.models.parallel import Layout
from jsublim.pipeline.context import Context
from jsublim.pipeline.experiment import plan
from jsublim.pipeline.setup import Setup
from jsublim.pipeline.store import Store

BIG = "model=Qwen/Qwen2.5-32B-Instruct"


@pytest.fixture(scope="module")
def nodes() -> dict[str, Job]:
    """The graph of a small experiment."""
    experiment = load_experiment(PLAIN, ["store=no-such-store", "sampling.shard=50"])
    setup = Setup.of(experiment)
    return merged([(plan(setup).tasks.values(), Context(setup, Store(experiment.store_dir), Layout(), Progress()))])


# Nothing but the tasks themselves takes time.
PLAINLY = Assumptions(
    start=0, replaced=0, read=math.inf, compiles=0, cached=0, spread=0, slow=0, store=math.inf, latency=0
)


def test_one_machine_takes_the_sum_and_any_number_the_longest_way(nodes):
    total = sum(node.cost for node in nodes.values())
    alone = simulate(nodes, Machines(1, "h100"), PLAINLY)
    assert alone.makespan == pytest.approx(total) and alone.idle == pytest.approx(0, abs=1e-9)
    many = simulate(nodes, Machines(500, "h100"), PLAINLY)
    assert many.makespan == pytest.approx(many.critical) and many.critical < total
    for workers in (2, 3, 7):
        some = simulate(nodes, Machines(workers, "h100"), PLAINLY)
        # Graham's bound for any schedule that leaves nobody idle while something is ready.
        assert max(total / workers, many.critical) - 1e-9 <= some.makespan <= total / workers + many.critical
        assert some.chip_hours == pytest.approx(workers * some.makespan / 3600)
    slices = simulate(nodes, Machines(1, "h100", 8), PLAINLY)
    assert slices.makespan == pytest.approx(total / (8 * PLAINLY.doubled**3))
    given = {key: 1.0 for key in nodes}
    assert simulate(nodes, Machines(1, "h100"), PLAINLY, given=given).makespan == pytest.approx(len(nodes))


def test_every_task_is_done_after_its_parents_whatever_is_taken_away(nodes):
    hours = {key: Job(key, node.task, node.context, node.parents, 600.0) for key, node in nodes.items()}
    quiet = simulate(hours, Machines(4, "h100"))
    played = simulate(hours, Machines(4, "h100"), preempt_per_hour=2.0, seed=1)
    assert played.ends == simulate(hours, Machines(4, "h100"), preempt_per_hour=2.0, seed=1).ends
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
    played = simulate_experiments([panel_experiment(path, question, "qwen", "paper", few)], Machines(3, "h100"))
    assert f"{played.makespan / 60:.1f} min" in said and f"{2 * played.chip_hours:.4g}" in said
    assert "token_bytes 12" in said and "arms_per_program" in said
    assert "4xl4-4" in refused(2, "reproduce", "fig05", "--panel", "qwen", BIG, *options, "4xl4")
    assert "--simulate: '0xh100' given" in refused(2, "run", PLAIN, "--simulate", "0xh100")
    assert "--simulate: 'h1' given" in refused(2, "run", PLAIN, "--simulate", "4xh1")
    assert not list(tmp_path.iterdir())
