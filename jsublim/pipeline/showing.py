"""What a run's folder holds, as JSON: what was run, how far it is, what came of it. Nothing is computed, no model is read."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsublim.config import Config, Experiment, check_config
from jsublim.config.differences import flat, from_defaults
from jsublim.core.reading import read_yaml
from jsublim.errors import JsublimError, UsageError
from jsublim.pipeline.artifact import damage_in
from jsublim.pipeline.results import MARK
from jsublim.pipeline.store import DONE, RECORD
from jsublim.report.cautions import warnings
from jsublim.report.comparisons import comparisons
from jsublim.report.tables import read_json, read_results
from jsublim.report.words import findings

CONFIG = "config.yaml"  # resolved, in a run's folder
RESCORED = "rescored"  # results of a run that were made of its answers again
SMALLEST: dict[str, dict[str, Any]] = {
    "language": {"name": "run", "model": "model", "teachers": {"traits": ["trait"]}},
    "digits": {"kind": "digits", "name": "run"},
}


def check_run(folder: Path) -> None:
    """Raises:
    UsageError: the folder is none of a run.
    """
    if not (folder / CONFIG).is_file() and not (folder / "results").is_dir():
        hint = "no such folder" if not folder.exists() else f"holds neither {CONFIG} nor results/"
        raise UsageError(f"{folder}: {hint}; give the folder of a run (`jsublim ls runs` lists them)")


def status_of(folder: Path) -> str:
    """Whether a run has come to its end."""
    if (folder / "report.html").is_file() and (folder / "results" / "run.json").is_file():
        return "finished"
    return "unfinished" if (folder / MARK).is_file() else "results only"


def summary_of_run(folder: Path) -> dict[str, Any]:
    """One row for a list of runs."""
    run = read_json(folder / "results" / "run.json", {})
    values = {} if run else read_yaml(folder / CONFIG)
    seconds = sum(run.get("seconds", {}).values())
    return {
        "run": str(folder),
        "status": status_of(folder),
        "model": run.get("model", values.get("model", "")),
        "students": len(read_json(folder / "results" / "arms.json", [])) or None,
        "started": run.get("started"),
        "minutes": round(seconds / 60, 1) if seconds else None,
    }


def when(started: str | None) -> str | None:
    """A time in ISO's form as people read it: "2026-12-01 00:17 UTC"."""
    try:
        return started and f"{datetime.datetime.fromisoformat(started).astimezone(datetime.UTC):%Y-%m-%d %H:%M} UTC"
    except ValueError:  # another program's results
        return started


def config_of(folder: Path, kinds: Mapping[str, type[Config]]) -> Config | None:
    """The resolved config of a run; None where its folder has none, or one of another version."""
    path = folder / CONFIG
    if not path.is_file():
        return None
    values = read_yaml(path)
    kind = kinds.get(values.get("kind", "language")) if isinstance(values, dict) else None
    try:
        return None if kind is None else check_config(kind, values, path)
    except UsageError:
        return None


def about_run(folder: Path, kinds: Mapping[str, type[Config]]) -> dict[str, Any]:
    """Everything that `jsublim show` prints. `kinds`: of configs, by the name that a config says. Raises UsageError,
    JsublimError: no run's folder, or results that cannot be read."""
    check_run(folder)
    run, config = read_json(folder / "results" / "run.json", {}), config_of(folder, kinds)
    kind = run.get("kind", config.kind if config else "language")
    came_out = _result(folder) if run.get("kind", "language") == "language" else {"verdicts": []}
    about = {
        "run": str(folder),
        "name": run.get("name", config.name if config else folder.name),
        "kind": kind,
        "status": status_of(folder),
        "report": str(folder / "report.html") if (folder / "report.html").is_file() else None,
        **{key: run.get(key) for key in ("model", "model_revision", "device", "started", "rescored")},
        "config": {},
        "seconds": run.get("seconds", {}),
        "no_verdicts": None,
        **came_out,
        "store": None,
        "artifacts": {},
        "rescored_as": [str(path.parent) for path in sorted(folder.glob(f"{RESCORED}/*/results"))],
        "versions": run.get("versions", {}),
    }
    if config is not None:
        store, smallest = store_of(folder, config), type(config).model_validate(SMALLEST[config.kind])
        about |= {"config": from_defaults(config, smallest), "store": str(store), "artifacts": artifacts_in(store)}
    return about


def _result(folder: Path) -> dict[str, Any]:
    """What came out, in words and claim by claim; and why there is nothing, if there is nothing."""
    try:
        results = read_results(folder)
    except JsublimError as error:
        return {"verdicts": [], "no_verdicts": str(error)}
    compared, verdicts = comparisons(results), []
    for claim in compared.claims:
        result, interval = claim.result, claim.result.interval
        verdict = {
            "claim": result.name,
            "verdict": claim.verdict,
            "primary": claim.primary,
            "p": claim.p,
            "corrected": claim.corrected,
        }
        verdict |= {name: getattr(result, name) for name in ("text", "effect", "unit", "students", "reason")}
        verdicts.append(verdict | {"interval": None if interval is None else [interval.low, interval.high]})
    return {"verdicts": verdicts, "findings": [*warnings(results), *findings(results, compared)]}


def store_of(folder: Path, config: Config) -> Path:
    return Path(config.store) if config.store else folder / "artifacts"


def artifacts_in(store: Path) -> dict[str, dict[str, int]]:
    """By kind: how many there are, how many of those are whole, how many are damaged as far as marks and sizes tell, and their
    bytes."""
    kinds: dict[str, dict[str, int]] = {}
    for record in sorted(store.glob(f"*/*/{RECORD}")):
        folder = record.parent
        kind = kinds.setdefault(folder.parent.name, {"there": 0, "whole": 0, "damaged": 0, "bytes": 0})
        kind["there"] += 1
        if (folder / DONE).is_file():
            kind["damaged" if damage_in(folder, read=False) else "whole"] += 1
        kind["bytes"] += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return kinds


def full_config(folder: Path, kinds: Mapping[str, type[Config]]) -> dict[str, Any]:
    """Every field of a run's config, by dotted name. Raises UsageError: the folder has none that can be read."""
    check_run(folder)
    config = config_of(folder, kinds)
    if config is None:
        raise UsageError(f"{folder / CONFIG}: no config of this version of jsublim; write it with `jsublim run CONFIG`")
    return flat(config)


def experiment_of_run(folder: Path) -> Experiment:
    """The config of a run on a language model. Raises UsageError: the folder has none that can be read."""
    check_run(folder)
    config = config_of(folder, {"language": Experiment})
    if not isinstance(config, Experiment):
        raise UsageError(f"{folder}: no config of an experiment on a language model; give the folder of such a run")
    return config
