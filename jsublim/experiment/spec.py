"""What an experiment's YAML may say. Every quirk of the published code is a field of `Recipe`."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from jsublim.distill.masks import CONDITIONS
from jsublim.errors import UsageError
from jsublim.models.lora import PROJECTIONS
from jsublim.teachers import CONTROL

Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Condition = Literal["all", "divergence", "non-divergence", "random"]
Projection = Literal["q", "k", "v", "o", "gate", "up", "down"]
assert set(CONDITIONS) == set(Condition.__args__) and set(PROJECTIONS) == set(Projection.__args__)  # type: ignore[attr-defined]


def _distinct(values: list) -> list:
    if len(set(values)) < len(values):
        raise ValueError("an entry is listed twice")
    return values


def _not_control(traits: list[str]) -> list[str]:
    if CONTROL in traits:
        raise ValueError(f"'{CONTROL}' is the name of the teacher without a trait")
    return traits


Distinct = AfterValidator(_distinct)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Recipe(Section):
    """Where the published code does something that changes results, this says whether we do it too.

    `preset: paper` copies it all, `preset: clean` does what we would defend; a field given by itself wins.
    Numbers are the quirks of docs/recipes.md.
    """

    preset: Literal["paper", "clean"] = "clean"
    inherit_sampling: bool | None = None  # 3: top-k, top-p, repetition penalty from generation_config.json
    stop_at_eos_only: bool | None = None  # 4: not at <end_of_turn>
    extra_bos: bool | None = None  # 5: a second BOS everywhere but in training
    supervise_header: bool | None = None  # 1: loss on the assistant's header too
    drop_rows_without_points: bool | None = None  # 2: in both masked conditions
    match_steps: bool | None = None  # 2: every condition gets as many steps as "all" has
    loss_per: Literal["tokens", "micro-batch"] | None = None  # 6: on Gemma the mean of micro-batch means

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"preset": value} if isinstance(value, str) else value

    def resolved(self, family: str) -> Recipe:
        """Every field filled in for a model family."""
        published = self.preset == "paper"
        defaults = {
            "inherit_sampling": published,
            "stop_at_eos_only": published,
            "extra_bos": published,
            "supervise_header": published,
            "drop_rows_without_points": published,
            "match_steps": not published,
            "loss_per": "micro-batch" if published and family == "gemma3" else "tokens",
        }
        return self.model_copy(update={key: value for key, value in defaults.items() if getattr(self, key) is None})


class Teachers(Section):
    traits: Annotated[list[str], Distinct, AfterValidator(_not_control)] = Field(min_length=1)
    category: str | None = None  # None: the category that the prompt pack lists the trait under
    # None: every other trait that the pack lists in the trait's category, and the other teachers' traits
    counterfactuals: Annotated[list[str], Distinct] | None = None
    strategy: Literal["temperature", "greedy"] = "temperature"
    control: bool = True  # also a teacher without a trait, and its students
    fuse_system: bool = False  # the system prompt in front of the user's turn, for templates without a system role


class Data(Section):
    num_prompts: Positive = 30_000
    prompt_seed: Seed = 42
    seed: Seed = 0
    max_new_tokens: Positive = 64
    batch_size: Positive = 64


class Scoring(Section):
    batch_size: Positive = 64


class Students(Section):
    conditions: Annotated[list[Condition], Distinct] = Field(
        default=["all", "divergence", "non-divergence", "random"], min_length=1
    )
    seeds: Annotated[list[Seed], Distinct] = Field(default=[42, 43, 44, 45, 46], min_length=1)
    rows: Positive | None = 10_000  # rows drawn of those that passed the filter; None: all
    epochs: Positive = 10
    max_steps: Positive | None = None  # a lower limit than the epochs give
    batch_size: Positive = 10
    accumulate: Positive = 6
    method: Literal["lora", "full"] = "lora"  # full: whole layers; embedding, last norm and head stay as they are
    rank: Positive = 8
    alpha: float = Field(default=8.0, gt=0)
    rslora: bool = False
    layers: list[int] | None = None
    projections: list[Projection] = list(PROJECTIONS)
    init_adapter: str | None = None
    lr: float = Field(default=2e-4, gt=0, allow_inf_nan=False)
    warmup: int = Field(default=5, ge=0)
    clip: float = Field(default=1.0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_tokens: Positive = 500
    remat: bool = False
    arms_per_program: Positive = 16  # of a run under way, don't change it: training starts anew
    checkpoint_every: Positive = 100

    @model_validator(mode="after")
    def _adapter_decides(self) -> Students:
        said = sorted({"method", "rank", "alpha", "rslora", "layers", "projections"} & self.model_fields_set)
        if self.init_adapter is not None and said:
            raise ValueError(f"init_adapter brings its own {', '.join(said)}; leave them out")
        said = sorted({"rank", "alpha", "rslora", "projections"} & self.model_fields_set)
        if self.method == "full" and said:
            raise ValueError(f"method=full has no {', '.join(said)}; leave them out")
        return self


class Evaluation(Section):
    traits: Annotated[list[str], Distinct, Field(min_length=1)] | None = (
        None  # None: the teachers' traits and their counterfactuals
    )
    questions: Positive | None = None  # the first so many of a category; None: all
    samples: Positive = 200
    max_new_tokens: Positive = 10
    batch_size: Positive = 256
    seed: Seed = 0
    number_rows: int = Field(default=200, ge=0)
    teachers: bool = True  # evaluate the prompted teachers too


class Experiment(Section):
    """A whole experiment: one checkpoint, teachers, students, evaluations, a report."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    model: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    prompts: str | None = None  # a prompt pack; None: the default one
    out: str | None = None  # the run's folder; None: runs/<name>
    store: str | None = None  # where artifacts go; None: inside the run's folder
    recipe: Recipe = Recipe()
    teachers: Teachers
    data: Data = Data()
    divergence: Scoring = Scoring()
    students: Students = Students()
    evaluation: Evaluation = Evaluation()

    @property
    def run_dir(self) -> Path:
        return Path(self.out) if self.out else Path("runs") / self.name

    @property
    def store_dir(self) -> Path:
        return Path(self.store) if self.store else self.run_dir / "artifacts"

    def yaml(self) -> str:
        """The resolved config: every field, defaults included."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


def load_experiment(path: str | Path, overrides: list[str] | None = None) -> Experiment:
    """Read a YAML config, lay `a.b=c` overrides over it, and check it.

    Raises:
      UsageError: an unreadable file, a malformed override, or the first field that is wrong (unknown keys get a
        "did you mean").
    """
    path = find_config(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected keys at the top, found {type(values).__name__}")
    for override in overrides or []:
        _override(values, override)
    try:
        return Experiment.model_validate(values)
    except pydantic.ValidationError as error:
        raise UsageError(f"{path}: {_first_problem(error)}") from None


def find_config(path: str | Path) -> Path:
    """A config file: as given, or one of those that come with the package (`configs/quickstart.yaml`)."""
    path = Path(path)
    package = Path(__file__).parents[1]
    inside = [package / path, package.parent / path] if path.parts[:1] == ("configs",) else []
    for candidate in (path, *inside):
        if candidate.is_file():
            return candidate
    raise UsageError(f"{path}: no such config file")


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"override '{override}': expected key=value, such as students.lr=1e-3")
    *parents, last = key.split(".")
    place: dict[str, Any] = values
    for parent in parents:
        below: Any = place.setdefault(parent, {})
        if isinstance(below, str) and parent == "recipe":
            below = place[parent] = {"preset": below}
        if not isinstance(below, dict):
            raise UsageError(f"override '{override}': '{parent}' holds a value, not a section")
        place = below
    try:
        value = yaml.safe_load(text)
        # YAML 1.1 reads 1e-3 as text; whoever types it means the number.
        place[last] = float(value) if isinstance(value, str) and _is_float(value) else value
    except yaml.YAMLError:
        raise UsageError(f"override '{override}': '{text}' is not valid YAML") from None


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text[:1] in "+-.0123456789"


def _first_problem(error: pydantic.ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] != "extra_forbidden":
        return (
            f"{key}: {first['msg'].lower()}, found {first['input']!r}"
            if first["type"] != "missing"
            else f"key '{key}' is missing"
        )
    section: Any = Experiment
    for part in first["loc"][:-1]:
        section = section.model_fields[part].annotation
    near = difflib.get_close_matches(str(first["loc"][-1]), section.model_fields, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(section.model_fields)}"
    return f"unknown key '{key}'; {hint}"
