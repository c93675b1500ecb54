"""The figures of the paper as experiments: a file answers one question, for as many figures as show it.

A file of `configs/paper/` holds what all its panels share (`experiment`), what each panel changes (`panels`), which panels a
figure shows (`figures`), the claims it can check (`claims`), and what a scale changes (`scale`, of single panels in its `panels`); `scales.yaml` beside them
holds what a scale changes in every file, and which checkpoint it puts in the place of which.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import Field, model_validator

from jsublim.config.differences import shortest
from jsublim.config.experiment import Experiment
from jsublim.config.loading import check_config, override, read_config
from jsublim.config.shipped import find_config
from jsublim.core.reading import shown
from jsublim.core.section import Section, overlaid
from jsublim.errors import UsageError

ScaleName = Literal["tiny", "small", "paper"]
SCALES = get_args(ScaleName)
Values = dict[str, Any]


class Question(Section):
    """One file."""

    about: str
    figures: dict[int, Annotated[list[str], Field(min_length=1)]]
    claims: list[str] = []  # that its students can be asked about (docs/paper_map.md)
    experiment: Values
    panels: Annotated[dict[str, Values], Field(min_length=1)]
    scale: dict[ScaleName, Values]

    @model_validator(mode="after")
    def _panels_are_there(self) -> Question:
        absent = [panel for panels in self.figures.values() for panel in panels if panel not in self.panels]
        if absent:
            raise ValueError(f"figures: '{absent[0]}' is no panel; known: {', '.join(self.panels)}")
        for scale, values in self.scale.items():
            panels = values.get("panels", {})
            if not isinstance(panels, dict) or not all(isinstance(changes, dict) for changes in panels.values()):
                raise ValueError(f"scale.{scale}.panels: expected changes by their panel's name, found {shown(panels)}")
        return self


class ScaleValues(Section):
    """What a scale changes in every file: values, and checkpoints by name."""

    experiment: Values = {}
    models: dict[str, str] = {}


class ScaleFile(Section):
    tiny: ScaleValues = ScaleValues()
    small: ScaleValues = ScaleValues()
    paper: ScaleValues = ScaleValues()


def questions() -> tuple[tuple[Path, Question], ...]:
    """Every file of `configs/paper/`."""
    return _questions(find_config("configs/paper/scales.yaml").parent)


@functools.cache
def _questions(folder: Path) -> tuple[tuple[Path, Question], ...]:
    return tuple((path, check_config(Question, read_config(path), path)) for path in sorted(folder.glob("fig*.yaml")))


def load_question(figure: str) -> tuple[Path, Question]:
    """The file that a figure is in, by "fig03", "3" or a path.

    Raises:
      UsageError: a figure that no file has; a file that says something wrong.
    """
    if figure.endswith(".yaml"):
        path = find_config(figure)
        return path, check_config(Question, read_config(path), path)
    known = {number: file for file in questions() for number in file[1].figures}
    number = _number(figure)
    if number not in known:
        listed = ", ".join(map(str, sorted(known)))
        raise UsageError(f"figure '{figure}': not among those that are reproduced ({listed})")
    return known[number]


def panels_of(question: Question, figure: str) -> list[str]:
    """The panels of a figure; of a file given by its path, all."""
    number = _number(figure)
    return list(question.panels) if number is None else question.figures[number]


def _number(figure: str) -> int | None:
    number = figure.lower().removeprefix("figure").removeprefix("fig").strip()
    return int(number) if number.isdecimal() else None


def panel_experiment(
    path: Path, question: Question, panel: str, scale: str, overrides: list[str] | None = None
) -> Experiment:
    """One panel at a scale.

    Raises:
      UsageError: an unknown panel or scale, or the first field that is wrong.
    """
    if panel not in question.panels:
        raise UsageError(f"{path}: panel '{panel}' is not there; known: {', '.join(question.panels)}")
    if scale not in SCALES:
        raise UsageError(f"--scale: '{scale}' given; known: {', '.join(SCALES)}")
    scales = path.parent / "scales.yaml"
    common: ScaleValues = getattr(check_config(ScaleFile, read_config(scales), scales), scale)
    at_scale = dict(question.scale.get(scale, {}))  # type: ignore[call-overload]
    of_panel = at_scale.pop("panels", {}).get(panel, {})
    values: Values = {"name": f"{path.stem}-{panel}-{scale}"}
    for layer in (question.experiment, question.panels[panel], common.experiment, at_scale, of_panel):
        values = overlaid(values, layer)
    values = _with_models(values, common.models)
    evaluation = values.get("evaluation")
    for section, key in ((values, "datasets"), (evaluation, "settings")):
        if isinstance(section, dict) and isinstance(section.get(key), dict):  # a layer takes one out by null
            section[key] = {name: value for name, value in section[key].items() if value is not None}
    for text in overrides or []:
        override(values, text)
    return check_config(Experiment, values, f"{path}: panel '{panel}' at scale {scale}")


def panel_as_config(figure: str, panel: str | None, scale: str) -> str:
    """A panel at a scale as a YAML of its own, which says only what differs from the defaults.

    Raises:
      UsageError: as `panel_experiment`; or no panel is named, and the figure has several.
    """
    path, question = load_question(figure)
    panels = panels_of(question, figure)
    if panel is None and len(panels) > 1:
        raise UsageError(f"{figure}: has {len(panels)} panels; give one of them by --panel: {', '.join(panels)}")
    name = panel or panels[0]
    experiment = panel_experiment(path, question, name, scale)
    smallest = Experiment.model_validate({"name": "x", "model": "x", "teachers": {"traits": ["x"]}})
    values = yaml.safe_dump(shortest(experiment, smallest), sort_keys=False, allow_unicode=True, width=110)
    return f"# {question.about} ({path.name}, panel {name}, scale {scale}; docs/paper_map.md)\n{values}"


def _with_models(values: Any, models: Mapping[str, str]) -> Any:
    """Every checkpoint's name that the scale knows, replaced."""
    if isinstance(values, Mapping):
        return {key: _with_models(value, models) for key, value in values.items()}
    if isinstance(values, list):
        return [_with_models(value, models) for value in values]
    return models.get(values, values) if isinstance(values, str) else values
