"""Every launch file as far as it goes on one machine: what it says is valid where it is read, and what it runs is run, by two
processes under the variables of its launcher. Clouds, schedulers and installers are stand-ins that write down what they are
told and run the command that they are given; jsublim and Ray are real, jsublim as a fork that has its imports (`imported`)."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imported
import pytest
import yaml
from command import AS_INSTALLED, PLAIN, ROOT, TWO_LAYERS, ok

# Nobody is trained: what processes do together in training has tests of its own.
FIELDS = (
    f"model={TWO_LAYERS}", "students=null", "teachers.traits=[cat]", "teachers.counterfactuals=[owl]", "teachers.control=false", "data.num_prompts=4",
    "sampling.batch_size=2", "sampling.max_new_tokens=40", "scoring.batch_size=4", "evaluation.traits=[cat]", "evaluation.questions=1",
    "evaluation.samples=2", "evaluation.batch_size=2", "evaluation.number_rows=0", "evaluation.teachers=false",
)  # fmt: skip
BOTH = """code=0 children=()
for i in 0 1; do {} & children+=($!); done
for child in "${{children[@]}}"; do wait "$child" || code=$?; done
exit "$code"
"""
END = "--end-of-call"
UV = 'if [ "$1" = venv ]; then mkdir -p "${*: -1}/bin" && ln -sf ~/jsublim.sh "${*: -1}/bin/jsublim"; fi'
HOSTS = BOTH.format('JAX_PROCESS_ID=$i bash -c "${*: -1}"')  # of a slice; the command is the last word
STANDS_IN = {
    "curl": "echo 'mkdir -p ~/.local/bin && ln -sf ~/uv.sh ~/.local/bin/uv'",  # for a shell: uv's installer
    "nvidia-smi": "echo 'GPU 0'; echo 'GPU 1'",
    "scontrol": "",
    "srun": "shift # its option\n"
    + BOTH.format(
        "SLURM_PROCID=$i SLURM_NODEID=$i SLURM_LOCALID=0 SLURM_NTASKS=2 SLURM_STEP_NUM_NODES=2 "
        "SLURM_STEP_NODELIST=127.0.0.1,127.0.0.2 SLURM_STEP_TASKS_PER_NODE='1(x2)' \"$@\""
    ),
    "gcluster": HOSTS,
    "gcloud": f"""case " $* " in
*" describe "*) cat "$HOME/slice" ;;
*" create "*) echo ACTIVE > "$HOME/slice" ;;
*" delete "*) rm "$HOME/slice" ;;
*" get-value project "*) echo tests ;;
*" ssh "*) {HOSTS} ;;
esac""",
}


@dataclass(frozen=True)
class Machine:
    """A folder as the home of a machine that has stand-ins, and nothing else but what every machine has."""

    home: Path

    @classmethod
    def at(cls, home: Path, *installed: str) -> Machine:
        """With some of jsublim, ray and uv on its PATH."""
        (home / "bin").mkdir(parents=True)
        for place, does in {**{f"bin/{name}": does for name, does in STANDS_IN.items()}, "uv.sh": UV}.items():
            script(home / place, f'printf \'%s\\0\' "${{0##*/}}" "$@" {END} >> ~/told\n{does}')
        script(
            home / "jsublim.sh",
            f'exec {sys.executable} -S {ROOT}/tests/imported.py {imported.server()} {AS_INSTALLED} "$@"',
        )
        script(home / "ray.sh", f'exec {sys.executable} -m ray.scripts.scripts "$@"')
        for name in installed:
            (home / "bin" / name).symlink_to(home / f"{name}.sh")
        return cls(home)

    def run(self, text: str, **variables: str) -> subprocess.Popen:
        """A shell of this machine."""
        path = os.pathsep.join([str(self.home / "bin"), "/usr/local/bin", "/usr/bin", "/bin"])
        own = {"HOME": str(self.home), "PATH": path, "PYTHONPATH": str(ROOT)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(["bash", "-c", text], cwd=self.home, env=os.environ | own | variables, **pipes)

    def told(self, name: str) -> list[list[str]]:
        """What a stand-in was called with."""
        text = (self.home / "told").read_text() if (self.home / "told").exists() else ""
        calls = [call.split("\0")[:-1] for call in text.split(f"{END}\0")[:-1]]
        return [words for first, *words in calls if first.removesuffix(".sh") == name]


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def filled_in(kind: str, store: str | Path) -> str:
    """For a run of seconds. What an earlier kind has made in the same store is not made again."""
    return ok("launch", kind, PLAIN, f"store={store}", "out=run", *FIELDS, "--workers", 2).out


def check_ended(children: list[subprocess.Popen], *homes: Path) -> None:
    """Well, with a report in one of the homes."""
    said = [child.communicate(timeout=400)[0] for child in children]
    assert [child.returncode for child in children] == [0] * len(children), said
    assert any((home / "run" / "report.html").is_file() for home in homes), said


def check_clean(text: str) -> None:
    """What is a script within a file."""
    if shutil.which("shellcheck") is not None:
        checked = subprocess.run(["shellcheck", "-s", "bash", "-"], input=text, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


def free_port(*among: int) -> int:
    for port in [*among, 0]:
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return free.getsockname()[1]
    raise OSError("no port is free")


def slice_of_two() -> dict[str, str]:
    """What a TPU's own variables would say. Nobody listens outside."""
    address = f"127.0.0.1:{free_port()}"
    return {"JAX_COORDINATOR_ADDRESS": address, "JAX_COORDINATOR_BIND_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}


# --- shards


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A store that shards fill."""
    return tmp_path_factory.mktemp("parts") / "store"


def test_slurm_array(parts, tmp_path):
    text, node = filled_in("slurm-array", parts), Machine.at(tmp_path, "jsublim")
    elements = [node.run(text, SLURM_ARRAY_TASK_ID=str(i), SLURM_ARRAY_JOB_ID="7") for i in range(2)]
    check_ended(elements, tmp_path)
    assert node.told("scontrol") == []  # nothing to queue again


def test_kubernetes(parts, tmp_path):
    job, node = yaml.safe_load(filled_in("kubernetes", parts)), Machine.at(tmp_path, "jsublim")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (job["apiVersion"], job["kind"], spec["completionMode"]) == ("batch/v1", "Job", "Indexed")
    assert spec["completions"] == spec["parallelism"] == spec["maxFailedIndexes"] == 2
    check_volumes(pod)
    (container,) = pod["containers"]
    assert spec["podFailurePolicy"]["rules"][1]["onExitCodes"]["containerName"] == container["name"]
    assert container["command"] == ["bash", "-c"] and pod["restartPolicy"] == "Never"
    (text,) = container["args"]
    check_clean(text)
    check_ended([node.run(text, JOB_COMPLETION_INDEX=str(i)) for i in range(2)], tmp_path)


def check_volumes(pod: dict[str, Any]) -> None:
    """Each is one that the image's user may write into."""
    assert pod["securityContext"] == {"fsGroup": 1000} and "--uid 1000" in (ROOT / "Dockerfile").read_text()
    (container,) = pod["containers"]
    assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"] for volume in pod["volumes"]]


def sky(text: str) -> dict[str, Any]:
    """A task of SkyPilot, which knows these fields."""
    task = yaml.safe_load(text)
    assert task.keys() <= {"name", "num_nodes", "resources", "workdir", "setup", "run"} and task["workdir"] == "."
    known = {"infra", "accelerators", "accelerator_args", "use_spot", "disk_size", "job_recovery"}
    assert task["resources"].keys() <= known and task["resources"]["job_recovery"]["strategy"] == "EAGER_NEXT_REGION"
    for part in ("setup", "run"):
        check_clean(task[part])
    return task


def test_skypilot_gpu(s3, tmp_path):
    task = sky(filled_in("skypilot-gpu", s3()))
    assert task["num_nodes"] == 2
    nodes = [Machine.at(tmp_path / str(i), "uv") for i in range(2)]  # no disk is shared
    text = f"set -e\n{task['setup']}\n{task['run']}"
    children = [node.run(text, SKYPILOT_NODE_RANK=str(i), SKYPILOT_NUM_NODES="2") for i, node in enumerate(nodes)]
    check_ended(children, *(node.home for node in nodes))


# --- several hosts as one


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder that processes fill together."""
    return tmp_path_factory.mktemp("whole") / "store"


@pytest.fixture(scope="module")
def bucket(s3) -> str:
    """A bucket that hosts fill together which share no disk."""
    return s3()


def test_slurm_multinode(whole, tmp_path):
    text, node = filled_in("slurm-multinode", whole), Machine.at(tmp_path, "jsublim")
    port = free_port(*random.sample(range(61440, 65536), 20))  # JAX takes one of these by the job's number
    bind = {"JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}"}
    check_ended([node.run(text, SLURM_JOB_ID=str(port - 61440), **bind)], tmp_path)
    assert len(node.told("srun")) == 1 and node.told("scontrol") == []


def test_gcluster(bucket, tmp_path):
    text, node = filled_in("gcluster", bucket), Machine.at(tmp_path, "jsublim")
    check_ended([node.run(text, CLUSTER="tests", IMAGE="image:1", **slice_of_two())], tmp_path)
    (words,) = node.told("gcluster")
    assert words[:2] == ["job", "submit"]
    told = dict(zip(words[2::2], words[3::2], strict=True))
    assert told.pop("--command").endswith("--distributed run.parallel=mesh")
    assert told == {
        "--project": "tests", "--location": "us-west4-a", "--cluster": "tests", "--name": "plain", "--image": "image:1",
        "--compute-type": "v5litepod-16", "--num-slices": "2", "--restarts": "50", "--grace-period": "2m",
    }  # fmt: skip


def test_tpu_queued(bucket, tmp_path):
    text, node = filled_in("tpu-queued", bucket), Machine.at(tmp_path)
    check_ended([node.run(text, WHEEL="https://127.0.0.1/jsublim.whl", **slice_of_two())], tmp_path)
    calls = [words[2:4] if "ssh" in words else words[3] for words in node.told("gcloud")]
    assert calls == ["describe", "create", "describe", ["tpu-vm", "ssh"], "delete"]
    ssh = node.told("gcloud")[3]
    assert ssh[ssh.index("--worker") + 1] == "all"
    check_clean(ssh[-1])
    assert len(node.told("uv")) == 4  # both hosts have made an environment, and installed into it
    assert node.told("uv")[-1][-1] == "jsublim[tpu,gcs] @ https://127.0.0.1/jsublim.whl"


def test_skypilot_tpu(bucket, tmp_path):
    task, shared = sky(filled_in("skypilot-tpu", bucket)), slice_of_two()
    hosts = [Machine.at(tmp_path / str(i), "uv") for i in range(2)]
    text = f"set -e\n{task['setup']}\n{task['run']}"
    children = [host.run(text, JAX_PROCESS_ID=str(i), **shared) for i, host in enumerate(hosts)]
    check_ended(children, *(host.home for host in hosts))


# --- Ray

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Machine]:
    """A machine on which Ray runs, with two GPUs by name."""
    machine = Machine.at(tmp_path_factory.mktemp("cluster"), "jsublim", "ray")
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as last:
        # A cluster that a command started in this process left RAY_AUTH_MODE behind: this one asks for no tokens.
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # In /tmp, as Ray has it by itself: paths of sockets may have 107 bytes.
        folder = Path(
            last.enter_context(tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True))
        )
        for attempt in range(3):
            temp, port = folder / str(attempt), ray_port()
            node = head(machine, temp, port)
            last.callback(end, node)
            patch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
            if answers(machine, node, port):
                break
            end(node)
        else:
            pytest.fail("Ray's head did not come up\n" + "\n".join(map(said_below, sorted(folder.iterdir()))))
        yield machine


def ray_port() -> int:
    """Below those that the system gives to whoever asks for any: the head takes seconds to begin, and others begin meanwhile."""
    return free_port(*random.sample(range(20000, 32000), 20))


def head(machine: Machine, temp: Path, port: int) -> subprocess.Popen:
    """Ray's head. Its output goes to a file: of a pipe that nobody reads it might wait for ever."""
    temp.mkdir()
    # The agent takes any port; Ray's client server has a fixed one, where there is such a server.
    ports = f"--port={port} --dashboard-agent-listen-port=0"
    if importlib.util.find_spec("grpc") is not None:
        ports += f" --ray-client-server-port={ray_port()}"
    return machine.run(
        f"exec ray start --head --block --node-ip-address=127.0.0.1 {ports} --temp-dir={temp} --include-dashboard=false "
        f"--num-cpus=2 --num-gpus=2 --object-store-memory=134217728 > {temp}/head.log 2>&1"
    )


def answers(machine: Machine, node: subprocess.Popen, port: int) -> bool:
    """Whether a head does so within a minute. `ray status` alone would wait for minutes if it does not listen."""
    deadline = time.monotonic() + 60
    while node.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            if machine.run("exec timeout 30 ray status > status.log 2>&1").wait() == 0:
                return True
        time.sleep(0.5)
    return False


def end(node: subprocess.Popen) -> None:
    node.terminate()
    try:
        node.wait(timeout=60)
    except subprocess.TimeoutExpired:
        node.kill()  # what it has started ends with it


def said_below(temp: Path) -> str:
    """The head's output, and the last lines of Ray's logs."""
    logs = sorted(path for path in (temp / "session_latest" / "logs").glob("*") if path.is_file())
    return "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-2000:]}" for path in [temp / "head.log", *logs])


@needs_ray
def test_kuberay(cluster):
    job = yaml.safe_load(filled_in("kuberay", cluster.home / "store"))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    of_cluster = job["spec"]["rayClusterSpec"]
    (group,) = of_cluster["workerGroupSpecs"]
    assert group["replicas"] == group["maxReplicas"] == 2
    for pods in (of_cluster["headGroupSpec"], group):
        check_volumes(pods["template"]["spec"])
    check_ended([cluster.run(job["spec"]["entrypoint"])], cluster.home)


@needs_ray
def test_ray_up(cluster):
    import jsonschema

    text = filled_in("ray-up", cluster.home / "store")
    (cluster.home / "ray.yaml").write_text(text)
    said = yaml.safe_load(text)
    # Without an import of Ray: a later test in this process has it read its settings then.
    schema = Path(str(importlib.metadata.distribution("ray").locate_file("ray/autoscaler/ray-schema.json")))
    jsonschema.validate(said, json.loads(schema.read_text()))
    for commands in ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        check_clean("export RAY_HEAD_IP=1\n" + "\n".join(said[commands]))
    setup = "\n".join(["set -e", *said["setup_commands"], "bash -ic 'command -v jsublim'"])
    machine = Machine.at(cluster.home / "worker")
    child = machine.run(setup)
    assert child.communicate()[0].strip().endswith(str(machine.home / "venv" / "bin" / "jsublim"))
    (line,) = (line for line in text.splitlines() if "ray exec" in line)
    asked = line[line.index("$(") : line.rindex('"')]
    shutil.rmtree(cluster.home / "run", ignore_errors=True)
    check_ended([cluster.run(f"eval {asked}")], cluster.home)


@needs_ray
def test_machine(cluster, tmp_path):
    text, rented = filled_in("machine", cluster.home / "store"), Machine.at(tmp_path)
    child = rented.run(text, HOME_OF_RUN=str(rented.home), JSUBLIM="/workspace/jsublim")
    check_ended([child], rented.home)
    assert len(rented.told("nvidia-smi")) == 1 and rented.told("uv")[-1][-1] == "/workspace/jsublim[cuda12,ray]"
