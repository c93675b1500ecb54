"""What there is to name in a command: configs, figures, models, traits and runs, one row each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jsublim.config.figures import questions
from jsublim.config.shipped import find_config
from jsublim.core.reading import read_yaml
from jsublim.errors import JsublimError
from jsublim.inference.lm import BUNDLED
from jsublim.models.checkpoint import origin_of, read_config
from jsublim.models.decoder import parameter_count
from jsublim.pipeline.showing import summary_of_run
from jsublim.text.prompts import load_pack

Table = list[dict[str, Any]]
FIGURES = "paper"  # the folder of configs that are no experiments by themselves


def configs() -> Table:
    """The configs that come with the package: the name that commands take, and the first sentence of its comment."""
    home = find_config("configs/quickstart.yaml").parent
    listed = []
    for path in sorted(home.rglob("*.yaml")):
        name = path.relative_to(home)
        if name.parts[0] != FIGURES:
            model = read_yaml(path).get("model", "")
            listed.append({"config": f"configs/{name}", "model": model, "about": first_sentence(path)})
    return listed


def first_sentence(path: Path) -> str:
    """Of the comment that a file begins with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    text = " ".join(line.removeprefix("#").strip() for line in lines[:comment] if "yaml-language-server" not in line)
    return text.split(". ")[0].split(": ")[0].rstrip(".")


def figures() -> Table:
    """The figures of the paper that can be reproduced."""
    rows = [
        {"figure": f"fig{number:02}", "file": path.name, "about": question.about, "panels": list(panels)}
        for path, question in questions()
        for number, panels in question.figures.items()
    ]
    return sorted(rows, key=lambda row: row["figure"])


def models() -> Table:
    """Checkpoints that are on this machine: bundled, in ./checkpoints, in the hub's cache."""
    from huggingface_hub import constants

    places = {"bundled": (BUNDLED, "*"), "checkpoints/": (Path("checkpoints"), "*")}
    places["hub's cache"] = (Path(constants.HF_HUB_CACHE), "models--*/snapshots/*")
    listed = []
    for where, (folder, pattern) in places.items():
        for path in sorted(folder.glob(pattern)):
            if (path / "config.json").is_file():
                name = origin_of(path).name or (path.name if where == "bundled" else str(path))
                listed.append({"model": name, "where": where} | _shape(path) | {"revision": origin_of(path).commit})
    return listed


def _shape(folder: Path) -> dict[str, Any]:
    try:
        config = read_config(folder)[1]
        return {"family": config.family, "layers": config.num_layers, "parameters": parameter_count(config)}
    except JsublimError:  # of a family that is not known here
        return {"family": "unknown", "layers": None, "parameters": None}


def in_short(count: int | None) -> str | None:
    """A number of parameters as people say it: 7.62B."""
    if count is None:
        return None
    unit, name = next((scale for scale in ((1e9, "B"), (1e6, "M")) if count >= scale[0]), (1e3, "K"))
    return f"{count / unit:.3g}{name}"


def traits(pack: Path | None = None) -> Table:
    """The traits that a prompt pack lists, category by category; the package's without one."""
    wording = load_pack(pack)
    return [
        {"category": category, "traits": names, "questions": len(wording.questions_for(category))}
        for category, names in wording.traits.items()
    ]


def runs(folder: Path) -> Table:
    """The runs in a folder; those that ended last are at the end."""
    marked = [path.parent for path in folder.glob("*/config.yaml")]
    return sorted(map(summary_of_run, marked), key=lambda row: (row["started"] or "~", row["run"]))


LISTS: dict[str, Callable[..., Table]] = {
    "configs": configs,
    "figures": figures,
    "models": models,
    "traits": traits,
    "runs": runs,
}


def counts(options: Mapping[str, tuple[Any, ...]]) -> Table:
    """Every list: how much it holds, and what. `options`: of single lists."""
    about = {name: (make.__doc__ or "").split(":")[0].split("; ")[0].rstrip(".") for name, make in LISTS.items()}
    rows = [(name, len(make(*options.get(name, ())))) for name, make in LISTS.items()]
    return [{"list": f"jsublim ls {name}", "entries": count, "what": about[name]} for name, count in rows]
