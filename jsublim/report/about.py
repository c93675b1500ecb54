"""The shape of `results/run.json`: what was run, where and when."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


class About(BaseModel):
    """What is read of `run.json`; some of it earlier versions did not write."""

    kind: str = ""
    name: str = ""
    model: str = ""
    model_revision: str | None = None
    parameters: int | None = None
    device: str | None = None
    started: str | None = None
    config_yaml: str | None = None
    primary: str | None = None
    versions: dict[str, str] = {}
    seconds: dict[str, float] = {}
    evaluations: dict[str, dict[str, Any]] = {}
    recipe: dict[str, Any] = {}
    wording: dict[str, Any] = {}
    rescored: dict[str, Any] | None = None
