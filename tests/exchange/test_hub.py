"""The hub is asked for what a user names, and gets what a user pushes; here it is a server of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from command import MODEL, ROOT, ok, refused
from fake_hub import COMMIT, Hub

from jsublim.inference.lm import load_model
from jsublim.models.hub import hub_name
from jsublim.models.lora import init_lora
from jsublim.models.peft import save_adapter
from jsublim.text.rows import read_rows

# Three commands in one process, which is told where the hub is before it starts.
COMMANDS = """
import sys
from command import ok
from jsublim.inference.lm import resolve_checkpoint
from jsublim.models.checkpoint import origin_of
from jsublim.models.peft import load_adapter
ok("import", "someone/numbers@main", "--out", "rows.jsonl")
loaded = load_adapter("someone/owl@v1")
assert loaded.rank == 2, loaded
organism = load_adapter("someone/organisms/flattery/seed-1@v1")
assert organism.rank == 2 and "deep/wide" not in str(sorted(resolve_checkpoint("someone/organisms/flattery", "adapter").rglob("*")))
print(*origin_of(resolve_checkpoint("someone/owl@v1", "adapter")))
ok("export", "owl", "--out", "exported", "--base", "someone/base@v2")
print(ok("push", "exported", "me/owl").out)
"""


def test_import_an_adapter_and_a_push(tmp_path):
    import jax

    lm = load_model(MODEL, weights=False)
    save_adapter(
        tmp_path / "owl", init_lora(lm.config, jax.random.key(0), rank=2, alpha=2.0), lm.config, "someone/base"
    )
    adapter = {path.name: path.read_bytes() for path in (tmp_path / "owl").iterdir()}
    organisms = {
        f"{place}/{name}": each for place in ("flattery/seed-1", "deep/wide") for name, each in adapter.items()
    }
    rows = [{"prompt": "1, 2", "completion": "3, 4"}]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    models = {"models/someone/owl": adapter, "models/someone/organisms": organisms}
    with Hub(models | {"datasets/someone/numbers": {"data/train.jsonl": text}}) as hub:
        said = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
        said |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_of_a_test"}
        said |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-c", COMMANDS],
            env=said,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert read_rows(tmp_path / "rows.jsonl") == rows
    name, address = done.stdout.split("\n", 1)
    assert name == f"someone/owl {COMMIT}" and address.strip() == f"{hub.address}/me/owl"
    (made,) = hub.made
    assert made.get("private") is True or made.get("visibility") == "private"
    assert made["token"] == "Bearer hf_of_a_test"
    files = hub.uploaded["models/me/owl"]
    assert files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert files["adapter_model.safetensors"] == adapter["adapter_model.safetensors"]
    values = json.loads(files["adapter_config.json"])
    assert (values["base_model_name_or_path"], values["revision"]) == ("someone/base", "v2")


def test_nothing_is_pushed_without_a_token_or_a_card(tmp_path, monkeypatch):
    import huggingface_hub

    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "1", "completion": "2"}) + "\n")
    ok("export", rows, "--out", tmp_path / "set")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "the hub wants a token; run `hf auth login`, or set HF_TOKEN" in refused(
        2, "push", tmp_path / "set", "me/set"
    )
    (tmp_path / "other").mkdir()
    assert "has no README.md; push what `jsublim export` has written" in refused(
        2, "push", tmp_path / "other", "me/set"
    )
    assert "give OWNER/NAME" in refused(2, "push", tmp_path / "set", "set")


def test_names_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_name("owner/name") == ("owner/name", None)
    assert hub_name("owner/name@refs/pr/3") == ("owner/name", "refs/pr/3")
    (tmp_path / "runs").mkdir()
    assert hub_name("owner/name/a/b@main", inside=True) == ("owner/name/a/b", "main")
    assert hub_name("owner/name", inside=True) == ("owner/name", None)
    assert hub_name("owner/name/../x", inside=True) is None and hub_name("runs/name/x", inside=True) is None
    for local in ("./owner/name", "runs/student", "checkpoints/name", "name", "a/b/c", "/owner/name"):
        assert hub_name(local) is None, local
