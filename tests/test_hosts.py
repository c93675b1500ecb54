"""Whole experiments on hosts of different boots that share no disk: what they have in common is a bucket, and it is enough."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import fsspec
import pytest
from command import TWO_LAYERS, ok
from fake_hub import COMMIT, Hub
from pod import ends, run_together, together, wait_for
from test_pods import check_same, command


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


@pytest.mark.parametrize(("mode", "place"), [("mesh", "hub"), ("pmap", "bucket")])
def test_hosts_that_share_a_bucket(alone, s3, tmp_path, monkeypatch, mode, place):
    """One of them is killed at a moment, both drawn anew; the same command ends with what one process leaves. The first alone fetches the weights."""
    url, hosts, seed = s3(), tmp_path / "hosts", random.randrange(10**6)
    draw = random.Random(seed)
    print(f"seed {seed}")
    whole = len([path for path in (alone / "artifacts").rglob("*") if path.name == "DONE"])

    def finished() -> int:
        return sum(path.endswith("/DONE") for path in fsspec.filesystem("s3", use_listings_cache=False).find(url))

    which, moment = draw.randrange(2), draw.randrange(1, whole - 1)
    files = {path.name: path.read_bytes() for path in Path(TWO_LAYERS).iterdir()}
    with Hub({"models/owner/tiny": files}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        model = "owner/tiny"
        if place == "bucket":
            model = f"{url.rsplit('/', 1)[0]}/models/tiny"
            for name, content in files.items():
                fsspec.filesystem("s3").pipe_file(f"{model}/{name}", content)
        both = command(Path("run"), f"run.parallel={mode}", f"store={url}", "run.time_out=10", f"model={model}")
        with together(1, *both, hosts=hosts) as children:
            wait_for(children, lambda: finished() >= moment)
            children[which].kill()
            (code,), (heard,) = ends([children[1 - which]])
        assert code == 1 and "Traceback" not in heard, heard
        assert f"process {which} gives no sign of life" in heard.splitlines()[-1]
        run_together(1, *both, hosts=hosts)
        fetched = [path for method, path in hub.asked if method == "GET" and path.endswith(".safetensors")]
    for path in (left := as_left(url, hosts / "0" / "run", tmp_path / "left")).rglob("adapter_config.json"):
        said = json.loads(path.read_text())
        assert place == "bucket" or (said["base_model_name_or_path"], said["revision"]) == (model, COMMIT)
        path.write_text(json.dumps(said | {"base_model_name_or_path": TWO_LAYERS, "revision": None}))
    check_same(left, alone)
    unfinished = [path for path in fsspec.filesystem("s3").find(url) if "/progress/" in path or "/training/" in path]
    assert all(path.endswith(".json") for path in unfinished), unfinished
    assert not (hosts / "1" / "run").exists() and os.listdir(hosts / "1" / "tmp") == []
    assert len(fetched) == (place == "hub")
    weights = [{path.name for path in hosts.glob(f"{host}/.cache/**/*.safetensors")} for host in "01"]
    assert "model.safetensors" in weights[0] and "model.safetensors" not in weights[1]
