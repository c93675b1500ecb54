"""The command line, with one more line in the file that MADE names for each task that this process makes."""

from __future__ import annotations

import os
from typing import Any

import as_installed  # noqa: F401 (before jsublim)

from jsublim.cli import main
from jsublim.core.progress import Progress

stage = Progress.stage


def counted(self: Progress, kind: str, units: int | None = None, label: str = "", key: str = "") -> Any:
    if label:
        with open(os.environ["MADE"], "a", encoding="utf-8") as file:
            file.write(f"{kind} {label}\n")
    return stage(self, kind, units, label, key)


if __name__ == "__main__":
    Progress.stage = counted
    main()
