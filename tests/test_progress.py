"""What is printed while work is done, on a terminal and without one."""

from __future__ import annotations

import io
import re
import time
from itertools import pairwise

import numpy as np
import pytest
from command import wait_until
from rich.console import Console

from jsublim.core.progress import Progress
from jsublim.core.timeleft import Expected, TimeLeft
from jsublim.distill.metrics import last_loss


def test_without_a_terminal_there_is_a_line_now_and_then_even_while_nothing_is_finished():
    console, compiled = Console(file=io.StringIO(), width=300), ["step"]
    progress = Progress(console, line_every=0.05, compiling=lambda: next(iter(compiled), None))
    progress.expect({key: Expected("students", 1.0, "a program") for key in "ab"})
    with progress.stage("students", 4, "owl", "a") as tick:
        wait_until(lambda: "so far" in console.file.getvalue())
        compiled.clear()
        tick(2)
        progress.watch(lambda: "loss 1.2500")
        wait_until(lambda: "loss 1.2500" in console.file.getvalue())
    lines = [line for line in console.file.getvalue().splitlines() if "so far" in line]
    assert re.fullmatch(
        r"\d+%, 0:\d\d so far, about \d:\d\d left; students 0 of 2, owl, compiling step \(1 of 1\)", lines[0]
    )
    lines = [line for line in lines if "loss" in line]
    assert re.search(r"students 0 of 2, owl, 50%, [\d.]+ a second, loss 1.2500", lines[0])
    progress.close()
    assert re.search(r"^students: 1 of 2, 0:\d\d$", console.file.getvalue(), re.MULTILINE)
    ended = console.file.getvalue().count("so far")
    time.sleep(0.12)  # and no line once it is closed
    assert console.file.getvalue().count("so far") == ended


def test_on_a_terminal_there_is_a_bar_for_the_run_and_one_for_the_stage():
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    progress = Progress(console, line_every=0.01)
    progress.expect({"a": Expected("rows", 100.0, None), "b": Expected("students", 100.0, None)})
    with progress.stage("rows", 2, "owl", "a") as tick:
        tick(1)
        wait_until(lambda: "owl, 50%" in console.file.getvalue())
    said = console.file.getvalue()
    assert re.search(r"whole run +\S+.*\d+%, 0:\d\d so far, about \d+:\d\d left", said)
    assert "rows: done, 0:0" in said  # in place of the bars


SECONDS = {"rows": 30.0, "divergence": 5.0, "students": 60.0, "evaluations": 20.0}


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("compiling", [0.0, 0.5, 20.0])
def test_after_the_first_fifth_the_estimate_is_within_a_factor_of_one_and_a_half(seed, compiling):
    """Of a machine three times as slow as thought, whose kinds of work are up to a third faster or slower than one another."""
    rng, now, compiled, looks = np.random.default_rng(seed), [0.0], [0.0], []
    left = TimeLeft(lambda: compiled[0], lambda: now[0])
    slow = {kind: 3 * rng.uniform(0.75, 1.33) for kind in SECONDS}
    tasks = {f"{kind}{i}": Expected(kind, s / 5, (kind, i % 2)) for kind, s in SECONDS.items() for i in range(5)}
    left.expect(tasks)

    def pass_by(seconds):
        now[0] += seconds
        looks.append((now[0], left.seconds()))

    for i, (key, task) in enumerate(tasks.items()):
        left.begin(key)
        left.seconds()
        for _ in range(10 if i % 5 < 2 else 0):
            compiled[0] += compiling / 10
            pass_by(compiling / 10)
        for step in range(1, 11):
            pass_by(task.seconds * slow[task.kind] / 10)
            if task.kind != "rows":  # which are drawn in one batch, and say nothing before that
                left.tell(step / 10)
                assert left.seconds() >= 0  # when all of it is done, too
        left.end()
    late = [(at, said) for at, said in looks if 0.2 * now[0] < at < now[0]]
    assert late and all(1 / 1.5 < (at + said) / now[0] < 1.5 for at, said in late)
    assert left.seconds() is None and left.programs == (8, 8)


def test_a_task_that_says_nothing_gets_longer_when_it_takes_longer():
    now = [0.0]
    left = TimeLeft(clock=lambda: now[0])
    left.expect({"a": Expected("rows", 1.0, None), "b": Expected("rows", 1.0, None)})
    left.begin("a")
    said = []
    for now[0] in (1.0, 10.0, 100.0):
        said.append(left.seconds())
    assert all(later > 2 * before for before, later in pairwise(said)) and said[-1] == pytest.approx(100, rel=0.3)


def test_the_last_loss_is_that_of_the_last_whole_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_loss(path) is None
    lines = [{"step": 0, "loss": 9.0}, {"step": 1, "loss": 1.0}, {"step": 1, "loss": 2.0}]
    path.write_text("".join(f"{line}\n".replace("'", '"') for line in lines) + '{"step": 2, "lo')
    assert last_loss(path) == 1.5
    path.write_text('{"step": 3, "loss": null}\n')
    assert last_loss(path) is None
