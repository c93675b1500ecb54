"""What a server has: a checkpoint, and by name the adapters and steering vectors of runs, read when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jsublim.config import Experiment
from jsublim.errors import UsageError
from jsublim.exchange.students import is_adapter
from jsublim.inference.lm import LanguageModel, load_model
from jsublim.models.lora import Adapter
from jsublim.models.peft import load_adapter
from jsublim.pipeline.showing import CONFIG, experiment_of_run, store_of
from jsublim.pipeline.store import DONE
from jsublim.report.tables import read_json


@dataclass(frozen=True)
class Catalogue:
    """A checkpoint under its name, and folders of adapters on it by theirs."""

    lm: LanguageModel
    adapters: dict[str, Path] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Of all models, the checkpoint first."""
        return [self.lm.name, *self.adapters]

    def root(self, name: str) -> str:
        """The folder, or the name on the hub, that a model is read from."""
        return str(self.adapters[name].resolve()) if name in self.adapters else self.lm.reference

    def adapter(self, name: str) -> Adapter | None:
        """Read an adapter; None is the checkpoint itself. Raises JsublimError: it cannot be read, or is of another model."""
        return None if name == self.lm.name else load_adapter(self.adapters[name], self.lm.config)


def catalogue(places: Sequence[str], *, dtype: str | None = None, chat_template: str | None = None) -> Catalogue:
    """What some places hold together: folders of runs (a run's students and taught teachers), of adapters, and a checkpoint by its
    name, which may be left out where a run says it.

    Raises:
      UsageError: no checkpoint, or two; or two models of one name.
    """
    bases: dict[str, tuple[str, str | None]] = {}  # checkpoint -> dtype and template of the run that named it
    adapters: dict[str, Path] = {}
    for place in places:
        folder = Path(place).expanduser()
        if (folder / CONFIG).is_file():
            experiment = experiment_of_run(folder)
            base = _other_model(experiment) or experiment.checkpoint
            bases.setdefault(base, (experiment.dtype, experiment.chat_template))
            new = of_run(folder, experiment)
        elif is_adapter(folder):
            new = {folder.resolve().name: folder}
        else:
            bases.setdefault(place, ("float32", None))
            new = {}
        if twice := sorted(adapters.keys() & new.keys()):
            raise UsageError(f"serve: two models are called '{twice[0]}'; serve one of them, or rename its folder")
        adapters |= new
    if len(bases) != 1:
        given = f"{len(bases)} checkpoints ({', '.join(bases)})" if bases else "no checkpoint"
        raise UsageError(f"serve: {given} given; name one, and runs and adapters that stand on it")
    ((base, (recorded, template)),) = bases.items()
    lm = load_model(base, dtype or recorded, chat_template=chat_template or template)
    if lm.name in adapters:
        raise UsageError(f"serve: an adapter is called '{lm.name}' as its checkpoint is; rename its folder")
    return Catalogue(lm, adapters)


def _other_model(experiment: Experiment) -> str | None:
    """The checkpoint of students that do not stand on their teachers'."""
    return None if experiment.students is None else experiment.students.model


def of_run(run: Path, experiment: Experiment) -> dict[str, Path]:
    """A run's adapters that are whole, by the names `RUN/STUDENT` and `RUN/teachers/TRAIT`. Students whose whole weights were trained are
    checkpoints, and are served as such."""
    store, name = store_of(run, experiment), run.resolve().name
    arms = run / "results" / "arms.json"
    # A store may be shared with other runs: a finished run says which students are its own.
    own = {arm["artifact"] for arm in read_json(arms, [])} if arms.is_file() else None
    kinds = {"students": ""} | ({"teachers": "teachers/"} if _other_model(experiment) is None else {})
    found: dict[str, Path] = {}
    for kind, prefix in kinds.items():
        for folder in sorted((store / kind).glob("*")):
            label, _, key = folder.name.rpartition("-")
            mine = own is None or kind != "students" or key in own
            if mine and (folder / DONE).is_file() and is_adapter(folder):
                id = f"{name}/{prefix}{label}"
                found[id if id not in found else f"{name}/{prefix}{folder.name}"] = folder
    return found
