"""Whole experiments on hosts of different boots that share no disk: what they have in common is a bucket, and it is enough."""

from __future__ import annotations

import os
import random
from pathlib import Path

import fsspec
import numpy as np
import pytest
from command import TWO_LAYERS, ok
from fake_hub import Hub
from pod import ends, run_together, together, wait_for
from safetensors.numpy import load_file
from test_pods import check_same, command

from jsublim.text.rows import write_rows


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """What one process leaves, in a folder."""
    out = tmp_path_factory.mktemp("hosts") / "alone"
    ok(*command(out))
    return out


def as_left(url: str, results: Path, target: Path) -> Path:
    """A run with its store in a bucket as if that were a folder of the run."""
    bucket = fsspec.filesystem("s3")
    for path in bucket.find(url):
        name = path.removeprefix(url.removeprefix("s3://") + "/")
        if not name.startswith("programs/"):
            (target / "artifacts" / name).parent.mkdir(parents=True, exist_ok=True)
            bucket.get_file(path, str(target / "artifacts" / name))
    for path in (path for path in results.rglob("*") if path.is_file()):
        (target / path.relative_to(results)).parent.mkdir(parents=True, exist_ok=True)
        (target / path.relative_to(results)).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("mode", ["mesh", "pmap"])
def test_hosts_that_share_a_bucket(alone, s3, tmp_path, mode):
    """One of them is killed at a moment, both drawn anew; the same command ends with what one process leaves."""
    url, hosts, seed = s3(), tmp_path / "hosts", random.randrange(10**6)
    both, draw = command(Path("run"), f"run.parallel={mode}", f"store={url}", "run.time_out=10"), random.Random(seed)
    print(f"seed {seed}")
    whole = len([path for path in (alone / "artifacts").rglob("*") if path.name == "DONE"])

    def finished() -> int:
        return sum(path.endswith("/DONE") for path in fsspec.filesystem("s3", use_listings_cache=False).find(url))

    which, moment = draw.randrange(2), draw.randrange(1, whole - 1)
    with together(1, *both, hosts=hosts) as children:
        wait_for(children, lambda: finished() >= moment)
        children[which].kill()
        (code,), (heard,) = ends([children[1 - which]])
    assert code == 1 and "Traceback" not in heard, heard
    assert f"process {which} gives no sign of life" in heard.splitlines()[-1]
    run_together(1, *both, hosts=hosts)
    check_same(as_left(url, hosts / "0" / "run", tmp_path / "left"), alone)
    unfinished = [path for path in fsspec.filesystem("s3").find(url) if "/progress/" in path or "/training/" in path]
    assert all(path.endswith(".json") for path in unfinished), unfinished
    assert not (hosts / "1" / "run").exists() and os.listdir(hosts / "1" / "tmp") == []


@pytest.mark.parametrize("place", ["hub", "bucket"])
def test_one_host_fetches_the_weights(s3, tmp_path, monkeypatch, place):
    url, hosts = s3(), tmp_path / "hosts"
    files = {path.name: path.read_bytes() for path in Path(TWO_LAYERS).iterdir()}
    rows = [{"prompt": f"Continue: {100 + i}.", "completion": f"{7 * i}, {9 * i}"} for i in range(8)]
    write_rows(tmp_path / "rows.jsonl", rows)
    options = ("--data", tmp_path / "rows.jsonl", "students.data={batch_size: 2, accumulate: 1, epochs: 1}")
    with Hub({"models/owner/tiny": files}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        model = "owner/tiny"
        if place == "bucket":
            model = f"{url.rsplit('/', 1)[0]}/models/tiny"
            for name, content in files.items():
                fsspec.filesystem("s3").pipe_file(f"{model}/{name}", content)
        together = ("--out", "student", f"store={url}", "run.parallel=mesh")
        run_together(1, "finetune", "--model", model, *options, *together, hosts=hosts)
        fetched = [path for method, path in hub.asked if method == "GET" and path.endswith(".safetensors")]
    assert len(fetched) == (place == "hub")
    weights = [{path.name for path in hosts.glob(f"{host}/.cache/**/*.safetensors")} for host in "01"]
    assert "model.safetensors" in weights[0] and "model.safetensors" not in weights[1]
    ok("finetune", "--model", TWO_LAYERS, *options, "--out", tmp_path / "alone")
    names = [path.name for path in (tmp_path / "alone").iterdir()]
    assert sorted(path.name for path in (hosts / "0" / "student").iterdir()) == sorted(names)
    a, b = (load_file(each / "adapter_model.safetensors") for each in (tmp_path / "alone", hosts / "0" / "student"))
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=1e-5)
