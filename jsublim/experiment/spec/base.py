"""What every section of a config is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _distinct(values: list | tuple) -> list | tuple:
    if len(set(values)) < len(values):
        raise ValueError("an entry is listed twice")
    return values


Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Distinct = AfterValidator(_distinct)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Config(Section):
    """What every kind of experiment says: which kind it is, its name, and where it is kept."""

    kind: str
    name: str = Field(pattern=r"^\w[\w.-]*$")
    out: str | None = None  # the run's folder; None: runs/<name>
    store: str | None = None  # where artifacts go; None: inside the run's folder

    @property
    def run_dir(self) -> Path:
        return Path(self.out) if self.out else Path("runs") / self.name

    @property
    def store_dir(self) -> Path:
        return Path(self.store) if self.store else self.run_dir / "artifacts"

    def yaml(self) -> str:
        """The resolved config: every field, defaults included."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)
