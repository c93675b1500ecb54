"""What an experiment's YAML may say. Every quirk of the published code is a field of `Recipe`."""

from __future__ import annotations

import difflib
import itertools
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import pydantic
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from jsublim.distill.losses import LOSSES
from jsublim.distill.masks import CONDITIONS
from jsublim.distill.optimizer import OPTIMIZERS, SCHEDULES
from jsublim.errors import UsageError
from jsublim.models.lora import PROJECTIONS
from jsublim.teachers import CONTROL

Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Condition = Literal["all", "divergence", "non-divergence", "random"]
Projection = Literal["q", "k", "v", "o", "gate", "up", "down"]
LossKind = Literal["hard", "forward-kl", "reverse-kl", "js"]
OptimizerName = Literal["adamw", "adafactor", "sgd", "muon"]
Schedule = Literal["linear", "cosine", "constant", "restarts"]
for _kind, _known in (
    (Condition, CONDITIONS), (Projection, PROJECTIONS), (LossKind, LOSSES), (OptimizerName, OPTIMIZERS), (Schedule, SCHEDULES)
):  # fmt: skip
    assert set(get_args(_kind)) == set(_known)


def _distinct(values: list | tuple) -> list | tuple:
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
    # What is learnt: the teacher's tokens, or its distribution at them
    loss: LossKind = "hard"
    temperature: float = Field(default=1.0, gt=0)  # of both distributions
    top_k: Positive | None = None  # soft targets stored: the k best tokens and the rest as one; None: a live teacher
    on_policy: bool = False  # the student samples the rows, the teacher scores them
    loss_weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    kl_to_base: float = Field(default=0.0, ge=0, allow_inf_nan=False)  # the defence that keeps a student near its start
    # What is trained
    method: Literal["lora", "full", "steering"] = "lora"
    rank: Positive = 8
    alpha: float = Field(default=8.0, gt=0)
    rslora: bool = False
    layers: list[int] | None = None  # None: all; [] with full: none but the ends
    projections: list[Projection] = list(PROJECTIONS)
    ends: list[Literal["embed", "norm", "head"]] = []  # with full: what is trained beside the layers
    init_adapter: str | None = None
    # How
    optimizer: OptimizerName = "adamw"
    momentum: float = Field(default=0.0, ge=0, lt=1)  # of sgd
    lr: float = Field(default=2e-4, gt=0, allow_inf_nan=False)
    schedule: Schedule = "linear"
    restarts: Positive = 4
    warmup: int = Field(default=5, ge=0)
    clip: float = Field(default=1.0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_tokens: Positive = 500
    # An ablation: each entry is a set of the fields above; a mapping of lists is the grid of all their combinations
    arms: Annotated[list[dict[str, Any]], Field(min_length=1)] | dict[str, list[Any]] | None = None
    # What decides speed and memory, not results
    remat: bool = False
    cache_below: bool = False  # of one-layer students: keep the hidden states below in host memory
    arms_per_program: Positive | Literal["auto"] = 16  # "auto": as many as the device's memory holds
    checkpoint_every: Positive = 100
    peak_tflops: float | None = Field(default=None, gt=0)  # of one device, to state what share of it was reached
    tensorboard: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> Students:
        said = sorted({"method", "rank", "alpha", "rslora", "layers", "projections", "ends"} & self.model_fields_set)
        if self.init_adapter is not None and said:
            raise ValueError(f"init_adapter brings its own {', '.join(said)}; leave them out")
        said = sorted({"rank", "alpha", "rslora", "projections"} & self.model_fields_set)
        if self.method != "lora" and said:
            raise ValueError(f"method={self.method} has no {', '.join(said)}; leave them out")
        if self.ends and self.method != "full":
            raise ValueError(f"ends are trained with method=full, not with {self.method}")
        soft = [name for name in ("top_k", "on_policy") if getattr(self, name)]
        if self.loss == "hard" and (soft or self.temperature != 1.0):
            raise ValueError(f"{', '.join(soft) or 'temperature'} needs a soft loss (forward-kl, reverse-kl, js)")
        if self.on_policy and (self.top_k or self.conditions != ["all"]):
            raise ValueError("on_policy rows are new each step: no top_k, and conditions=[all]")
        variants(self)
        return self


_SHARED = {
    "arms", "remat", "cache_below", "arms_per_program", "checkpoint_every", "peak_tflops", "tensorboard", "batch_size",
    "accumulate",
}  # fmt: skip


def variants(students: Students) -> dict[str, Students]:
    """The settings of an ablation's arms by name; without `arms`, the one setting there is, under "".

    Raises:
      ValueError: a field that arms cannot differ in, or two arms of one name.
    """
    if students.arms is None:
        return {"": students}
    if isinstance(students.arms, dict):
        choices = [[(key, value) for value in values] for key, values in students.arms.items()]
        entries = [dict(chosen) for chosen in itertools.product(*choices)]
    else:
        entries = students.arms
    found: dict[str, Students] = {}
    base = students.model_dump(exclude_unset=True, exclude={"arms"})
    for entry in entries:
        values = {key: value for key, value in entry.items() if key != "name"}
        wrong = [key for key in values if key in _SHARED or key not in Students.model_fields]
        if wrong or not entry:
            raise ValueError(
                f"arms: {wrong or 'nothing'} given; arms may differ in the fields of students that decide results"
            )
        name = str(entry.get("name") or " ".join(f"{key}={_short(value)}" for key, value in values.items()))
        if name in found:
            raise ValueError(f"arms: two are called '{name}'")
        try:
            found[name] = Students.model_validate(base | values)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"arm '{name}': {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return found


def _short(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


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


class Experiment(Config):
    """A whole experiment: one checkpoint, teachers, students, evaluations, a report."""

    kind: Literal["language"] = "language"
    model: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    parallel: Literal["none", "pmap", "mesh"] = "none"  # how training is spread over the devices
    model_axis: Positive = 1  # with mesh: devices that one copy of the checkpoint is spread over
    prompts: str | None = None  # a prompt pack; None: the default one
    recipe: Recipe = Recipe()
    teachers: Teachers
    data: Data = Data()
    divergence: Scoring = Scoring()
    students: Students = Students()
    evaluation: Evaluation = Evaluation()


Kind = TypeVar("Kind", bound=Config)


def read_config(path: str | Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """Read a YAML config and lay `a.b=c` overrides over it.

    Raises:
      UsageError: an unreadable file or a malformed override.
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
    return values


def check_config(kind: type[Kind], values: dict[str, Any], path: str | Path) -> Kind:
    """The values of a config as an experiment of its kind.

    Raises:
      UsageError: the first field that is wrong (unknown keys get a "did you mean").
    """
    try:
        return kind.model_validate(values)
    except pydantic.ValidationError as error:
        raise UsageError(f"{path}: {_first_problem(error, kind)}") from None


def load_experiment(path: str | Path, overrides: list[str] | None = None) -> Experiment:
    """Read and check the config of an experiment on a language model.

    Raises:
      UsageError: as `read_config` and `check_config`.
    """
    return check_config(Experiment, read_config(path, overrides), find_config(path))


def read_students(values: dict[str, Any]) -> Students:
    """Students as single options gave them.

    Raises:
      UsageError: the first that is wrong.
    """
    try:
        return Students.model_validate(values)
    except pydantic.ValidationError as error:
        problem = _first_problem(error, Students).replace("conditions.0:", "tokens:")
        raise UsageError(f"finetune: {problem}") from None


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


def _first_problem(error: pydantic.ValidationError, section: Any) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] != "extra_forbidden":
        return (
            f"{key}: {first['msg'].lower()}, found {first['input']!r}"
            if first["type"] != "missing"
            else f"key '{key}' is missing"
        )
    for part in first["loc"][:-1]:
        section = section.model_fields[part].annotation
    near = difflib.get_close_matches(str(first["loc"][-1]), section.model_fields, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(section.model_fields)}"
    return f"unknown key '{key}'; {hint}"
