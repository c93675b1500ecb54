"""Processes that train together, as the hosts of a pod do: two real ones here, their sums by gloo."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from command import TWO_LAYERS, ok, refused, start, stop_when
from pod import ends, errors, run_together, together, wait_for
from safetensors.numpy import load_file

from jsublim.text.rows import read_rows, write_rows

TRAIN = (
    "--model",
    TWO_LAYERS,
    "students.data.batch_size=2",
    "students.data.accumulate=1",
    "students.data.epochs=5",
    "students.optimizer.warmup=1",
    "students.optimizer.name=sgd",
)
LORA = (
    *TRAIN,
    "students.optimizer.lr=0.1",
    "students.adapter.projections=[q,v]",
    "students.adapter.rank=2",
    "students.adapter.alpha=4",
)
STEPS = 30


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    write_rows(folder / "rows.jsonl", [
        {"prompt": f"Continue: {7 * i + 100}, {31 * i + 5}.", "completion": ", ".join(str(37 * i + k) for k in range(2 + i % 3))}
        for i in range(12)
    ])  # fmt: skip
    return folder


def finetune(home: Path, name: str, *options) -> tuple:
    return ("finetune", "--data", home / "rows.jsonl", "--out", home / name, *options)


@pytest.fixture(scope="module")
def alone(home) -> Path:
    """The student of one process and one device."""
    ok(*finetune(home, "alone", *LORA))
    return home / "alone"


def lines(folder: Path) -> list[dict]:
    return read_rows(folder / "metrics.jsonl", ("step", "loss"))


def saved(folder: Path) -> list[int]:
    return [int(path.name) for path in working(folder).glob("*/state/*") if path.name.isdigit()]


def working(folder: Path) -> Path:
    """Where a student's training is kept until it is whole."""
    return folder.with_name(f"{folder.name}.artifacts") / "training"


def trained(folder: Path, steps: int = 3) -> bool:
    return any(path.read_text().count("\n") >= steps for path in working(folder).glob("*/metrics.jsonl"))


def check_close(folder: Path, other: Path, file: str = "adapter_model.safetensors") -> None:
    """Both students are the same up to the order of sums, and every step was written once."""
    a, b = load_file(folder / file), load_file(other / file)
    assert list(a) == list(b)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=1e-5)
    assert [line["step"] for line in lines(folder)] == list(range(STEPS))
    for key in ("loss", "grad_norm", "tokens"):
        np.testing.assert_allclose([x[key] for x in lines(folder)], [x[key] for x in lines(other)], rtol=1e-5)
    assert {path.name for path in folder.iterdir()} == {path.name for path in other.iterdir()}


def check_same(folder: Path, other: Path) -> None:
    """Bit for bit, but for how fast it went."""
    timeless = [[line | {"tokens_per_s": 0} for line in lines(each)] for each in (folder, other)]
    assert timeless[0] == timeless[1]
    file = "adapter_model.safetensors"
    assert (folder / file).read_bytes() == (other / file).read_bytes()


def stop_one(children: list[subprocess.Popen], which: int, out: Path) -> None:
    """SIGTERM to one of them in the middle, the other left as it is; and both end alike."""
    wait_for(children, lambda: trained(out))
    # JAX looks for the signal once a second; steps are faster than that, but none is done without the other process.
    other = children[1 - which]
    other.send_signal(signal.SIGSTOP)
    children[which].send_signal(signal.SIGTERM)
    time.sleep(1.5)
    other.send_signal(signal.SIGCONT)
    codes, said = ends(children)
    assert codes == [75, 75], said
    (step,), (folder,) = saved(out), working(out).iterdir()
    assert 3 <= step < STEPS and trained(out, step) and not trained(out, step + 1)
    line = f"{folder}: stopped by SIGTERM after step {step - 1}; run the same command again to continue"
    assert errors(said) == [f"error: {line}", f"error: process 1: {line}"]
    assert not (out / "DONE").exists()


def test_two_processes_on_a_mesh(home, alone):
    cut = finetune(home, "mesh", *LORA, "run.parallel=mesh")
    with together(1, *cut) as children:
        stop_one(children, 1, home / "mesh")
    run_together(1, *cut)
    moved, start_of = load_file(home / "mesh" / "adapter_model.safetensors"), "lora_B"
    assert all(np.abs(value).max() > 1e-3 for name, value in moved.items() if start_of in name)  # it began as zeros
    check_close(home / "mesh", alone)


def test_two_processes_under_pmap(home, alone):
    command = finetune(home, "pmap", *LORA, "run.parallel=pmap")
    with together(2, *command) as children:
        stop_one(children, 0, home / "pmap")
    run_together(2, *command)
    check_close(home / "pmap", alone)


def test_a_checkpoint_spread_over_two_processes(home):
    full = (*TRAIN, "students.optimizer.lr=0.01", "students.adapter.method=full")
    ok(*finetune(home, "full", *full))
    run_together(1, *finetune(home, "spread", *full, "run.parallel=mesh", "run.model_axis=2"))
    check_close(home / "spread", home / "full", "model.safetensors")


def test_sigterm_to_a_process_alone(home, alone):
    command, out = finetune(home, "cut", *LORA), home / "cut"
    code, err = stop_when(start(*command), lambda: trained(out), signal.SIGTERM)
    (step,), (folder,) = saved(out), working(out).iterdir()
    assert code == 75 and trained(out, step) and not trained(out, step + 1) and not (out / "DONE").exists()
    assert err.splitlines()[-1] == (
        f"error: {folder}: stopped by SIGTERM after step {step - 1}; run the same command again to continue"
    )
    ok(*command)
    check_same(out, alone)


def test_what_the_first_process_cannot_do_ends_the_others(home):
    taken = home / "taken"
    write_rows(taken / "rows.jsonl", [])
    with together(1, *finetune(home, "taken", *LORA, "run.parallel=mesh")) as children:
        codes, said = ends(children)
    assert codes == [2, 2]
    first, other = errors(said)
    assert first.startswith(f"error: {taken}: already exists") and other.startswith("error: process 1: ")
    assert [path.name for path in taken.iterdir()] == ["rows.jsonl"]


def test_processes_that_cannot_train_together(home, monkeypatch):
    def command(*options) -> tuple:
        return (*finetune(home, "refused", *LORA), "--distributed", *options)

    assert "run.parallel=mesh" in refused(2, *command())
    monkeypatch.setenv("JAX_PROCESS_ID", "first")
    child = start(*command("run.parallel=mesh"))
    _, said = child.communicate(timeout=100)
    assert child.returncode == 2 and said.count("\n") == 1 and "JAX_PROCESS_ID" in said
    assert not (home / "refused").exists()


SEEN = """
import jax
from jsublim.runtime.processes import process_count
from jsublim.runtime.watch import join_processes
join_processes(60)
print(jax.config.read("jax_cuda_visible_devices"), process_count())
"""
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "127.0.0.1,127.0.0.2"}
OPEN_MPI = {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:34911"}


def joined(shared: dict[str, str], *own: dict[str, str]) -> list[str]:
    """Which of the GPUs that it sees each process takes, and of how many processes it is one. (There are none here: JAX says it
    to CUDA as soon as CUDA is there.)"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared |= {"JAX_COORDINATOR_PORT": port, "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}"}
    children = []
    for each in own:
        with mock.patch.dict(os.environ, shared | each):
            children.append(start(program=("-c", SEEN)))
    codes, said = zip(*((child.wait(120), child.communicate()) for child in children), strict=True)
    assert set(codes) == {0}, said
    return [out.strip() for out, _ in said]


def slurm(tasks: str, count: int, **more: str) -> list[str]:
    """What srun sets: processes by number, and how many of them each node has."""
    where = [(0, 0), (1, 0)] if tasks == "1(x2)" else [(0, place) for place in range(count)]
    shared = SLURM | {"SLURM_NTASKS": str(count), "SLURM_STEP_TASKS_PER_NODE": tasks} | more
    numbers = [
        {"SLURM_PROCID": str(i), "SLURM_NODEID": str(node), "SLURM_LOCALID": str(place)}
        for i, (node, place) in enumerate(where)
    ]
    return joined(shared, *numbers)


def open_mpi(beside: int, **more: str) -> list[str]:
    shared = OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    return joined(shared | {"OMPI_COMM_WORLD_LOCAL_SIZE": str(beside)} | more, {})


def test_a_process_alone_on_its_node_takes_all_gpus_that_it_sees():
    assert slurm("1(x2)", 2, CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7") == ["all 2", "all 2"]
    # What a step has of a node that it shares: CUDA numbers those from 0.
    assert slurm("1", 1, CUDA_VISIBLE_DEVICES="2,3", SLURM_STEP_GPUS="2,3") == ["all 1"]
    assert open_mpi(1) == ["all 1"]


def test_processes_that_share_a_node_take_one_gpu_each():
    assert slurm("2", 2, SLURM_NTASKS_PER_NODE="2") == ["0 2", "1 2"]
    assert slurm("2", 2, SLURM_GPUS_PER_TASK="4") == ["all 2", "all 2"]  # of those that Slurm bound to it
    assert open_mpi(8, SLURM_STEP_TASKS_PER_NODE="1(x2)") == ["0 1"]  # Open MPI's helpers are Slurm's tasks
    assert slurm("1", 1, JAX_LOCAL_DEVICE_IDS="1,2") == ["1,2 1"]
