"""What is printed while work is done, on a terminal and without one."""

from __future__ import annotations

import io
import re
import time

from command import wait_until
from rich.console import Console

from jsublim.core.progress import Progress, StageState
from jsublim.distill.metrics import last_loss


def test_without_a_terminal_there_is_a_line_now_and_then_even_while_nothing_is_finished():
    console = Console(file=io.StringIO(), width=300)
    progress = Progress(console, line_every=0.05)
    progress.expect({"students": 2})
    with progress.stage("students", 4, "owl") as tick:
        wait_until(lambda: "so far" in console.file.getvalue())  # compiling
        tick(2)
        progress.watch(lambda: "loss 1.2500")
        wait_until(lambda: "loss 1.2500" in console.file.getvalue())
    lines = [line for line in console.file.getvalue().splitlines() if "so far" in line]
    assert "students owl, 0% done, 0 of 2" in lines[0] and "time left unknown" in lines[0]
    lines = [line for line in lines if "loss" in line]
    assert re.search(r"25% done, 0 of 2, [\d.]+ a second, 0:\d\d so far, about \d+:\d\d left, loss 1.2500", lines[0])
    progress.close()
    ended = console.file.getvalue().count("so far")
    time.sleep(0.12)  # and no line once it is closed
    assert console.file.getvalue().count("so far") == ended


def test_on_a_terminal_a_bar_has_the_time_left_and_no_lines():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    progress = Progress(console, line_every=0.01)
    with progress.stage("rows", 2, "owl") as tick:
        tick(1)
        time.sleep(0.15)
    said = console.file.getvalue()
    assert "so far" not in said and "--:--" in said and "owl" in said


def test_a_line_knows_what_is_left():
    state = StageState("rows", 4, finished=2, label="cat", share=0.5, units=30, begun=100.0, start=1.0)
    assert state.line(400.0, "") == "rows cat, 62% done, 2 of 4, 0.1 a second, 5:00 so far, about 5:00 left"
    assert "about 1:00:00 left" in StageState("rows", 13, 1, begun=0.0).line(300.0, "")


def test_the_last_loss_is_that_of_the_last_whole_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_loss(path) is None
    lines = [{"step": 0, "loss": 9.0}, {"step": 1, "loss": 1.0}, {"step": 1, "loss": 2.0}]
    path.write_text("".join(f"{line}\n".replace("'", '"') for line in lines) + '{"step": 2, "lo')
    assert last_loss(path) == 1.5
    path.write_text('{"step": 3, "loss": null}\n')
    assert last_loss(path) is None
