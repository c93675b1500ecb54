"""What configs find by name: the files that come with the package, and the lists of traits in one of them."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from jsublim.core.reading import near, read_yaml
from jsublim.errors import UsageError

LISTS = "configs/paper/lists.yaml"
EDITORS = "# yaml-language-server: $schema="  # before the place of a schema
SCHEMA = "jsublim.schema.json"  # what a copied config names, and has beside it


def find_config(path: str | Path) -> Path:
    """A config file: as given, or one of those that come with the package (`configs/quickstart.yaml`)."""
    path = Path(path)
    inside = _of_package(path) if path.parts[:1] == ("configs",) else []
    for candidate in (path, *inside):
        if os.path.isfile(candidate):  # of a name that is too long, too
            return candidate
    raise UsageError(f"{path}: no such config file")


def named_config(name: str) -> str:
    """The path of a config by its own name, without folder or suffix ("quickstart"); anything else as it is.

    Raises:
      UsageError: several of the package's configs have that name.
    """
    if Path(name).suffix or "/" in name or os.path.isfile(name):
        return name
    home = find_config("configs/quickstart.yaml").parent
    paths = [path for path in home.rglob("*.yaml") if path.stem == name]
    if len(paths) > 1:
        names = ", ".join(f"configs/{path.relative_to(home)}" for path in sorted(paths))
        raise UsageError(f"config '{name}': there are several: {names}; give one of them in full")
    if paths:
        return str(paths[0])
    hint = near(name, [path.stem for path in home.rglob("*.yaml")]) or "`jsublim ls configs`"
    raise UsageError(f"config '{name}': no such file; {hint}")


def copy_of(config: str, text: str | None = None) -> tuple[str, str]:
    """A config's text (`text`, if it is none of a file) for another folder, and the schema that editors check it by, which is to lie beside it
    as `SCHEMA`. Raises UsageError: as `named_config` and `find_config`."""
    text = text or find_config(named_config(config)).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines(keepends=True) if not line.startswith(EDITORS)]
    return "".join([f"{EDITORS}{SCHEMA}\n", *lines]), find_config("configs/schema.json").read_text(encoding="utf-8")


def _of_package(path: Path) -> list[Path]:
    """Where it may lie: in an installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    return [package / path, package.parent / path]


@functools.cache
def named_lists() -> dict[str, list[str]]:
    """The lists that a config may name where it could write traits out. Always those of the package: a file of the same
    name in the working directory changes no config."""
    return read_yaml(next(path for path in _of_package(Path(LISTS)) if path.is_file()))


def written_out(value: Any) -> Any:
    """The list of that name; anything but text as it is.

    Raises:
      ValueError: no list has that name.
    """
    if not isinstance(value, str):
        return value
    if value not in named_lists():
        raise ValueError(f"no list has that name (known: {', '.join(named_lists())}); write traits as [owl, cat]")
    return list(named_lists()[value])
