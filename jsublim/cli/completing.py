"""What a shell completes where a command takes a name: configs, figures, models, traits, runs, and files beside them.

Each function takes what was typed, and returns what it may become. Nothing is said of what cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from jsublim.errors import JsublimError


def configs(typed: str) -> list[str]:
    """The package's configs, and YAML files here."""
    return _beginning(typed, lambda: (row["config"] for row in _rows("configs")), _paths(typed, ".yaml"))


def figures(typed: str) -> list[str]:
    return _beginning(typed, lambda: (row["figure"] for row in _rows("figures")))


def models(typed: str) -> list[str]:
    """Models on this machine, and folders."""
    return _beginning(typed, lambda: (row["model"] for row in _rows("models")), _paths(typed, ""))


def traits(typed: str) -> list[str]:
    """Traits of the package's pack; of a list with commas, its last."""
    before, comma, last = typed.rpartition(",")
    every = lambda: (trait for row in _rows("traits") for trait in row["traits"])  # noqa: E731
    return [f"{before}{comma}{trait}" for trait in _beginning(last, every)]


def runs(typed: str) -> list[str]:
    """Folders of runs, in runs/ or where the typed path leads."""
    marked = (path.parent for folder in (Path("runs"), Path(typed or ".")) for path in folder.glob("*/config.yaml"))
    return _beginning(typed, lambda: map(str, marked), _paths(typed, ""))


def lists(typed: str) -> list[str]:
    from jsublim.pipeline.listing import LISTS

    return _beginning(typed, lambda: LISTS)


def chips(typed: str) -> list[str]:
    from jsublim.runtime.chips import CHIPS, HERE

    return _beginning(typed, lambda: (*HERE, *CHIPS))


def _rows(name: str) -> list[dict]:
    from jsublim.pipeline.listing import LISTS

    return LISTS[name]()


def _beginning(typed: str, *sources: Callable[[], Iterable[str]]) -> list[str]:
    names: dict[str, None] = {}
    for source in sources:
        try:
            names |= dict.fromkeys(name for name in source() if name.startswith(typed))
        except (JsublimError, OSError):
            continue
    return list(names)


def _paths(typed: str, suffix: str) -> Callable[[], Iterator[str]]:
    """Folders, which end with a slash, and files with a suffix, that a typed path begins."""

    def paths() -> Iterator[str]:
        folder = typed.rpartition("/")[0]
        for path in sorted(Path(folder or ("/" if typed.startswith("/") else ".")).iterdir()):
            if path.is_dir() and not path.name.startswith("."):
                yield f"{path}/"
            elif suffix and path.suffix == suffix:
                yield str(path)

    return paths


COMPLETED: dict[str, Callable[[str], list[str]]] = {  # by the name of a command's parameter
    "config": configs, "figure": figures, "what": lists, "chip": chips,
    "model": models, "trait": traits, "traits": traits, "counterfactuals": traits,
    "run": runs, "runs": runs, "a": runs, "b": runs,
}  # fmt: skip
