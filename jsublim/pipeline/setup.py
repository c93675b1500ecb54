"""What a graph is planned from: the config, the wording, the recipe, and what each checkpoint is. No weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from jsublim.config import Experiment, Recipe
from jsublim.errors import JsublimError, UsageError
from jsublim.inference.lm import LanguageModel, is_available_offline, load_model, resolve_checkpoint
from jsublim.inference.sampling import Sampling, sampling_for
from jsublim.inference.served import SampleServer
from jsublim.inference.teachers import CONTROL, OWN
from jsublim.models.checkpoint import checkpoint_hash, read_config
from jsublim.models.config import ModelConfig
from jsublim.pipeline.arms import Source, Student, plan_students
from jsublim.runtime.processes import on_main_process
from jsublim.text.chat import Chat
from jsublim.text.prompts import (
    NumberPrompt,
    Pack,
    draw_number_prompts,
    load_pack,
    load_problems,
    load_prompts,
    whose,
)

NOBODY = "nobody"  # the trait of a command that asks no teacher of its own
UNKNOWN = "unknown:"  # stands before the name of what is not here, in the place of its hash
R = TypeVar("R")


def memoized(function: Callable[..., R]) -> Callable[..., R]:
    """A decorator for functions of a setup and of what can be hashed: calls with equal arguments give the same object."""

    @functools.wraps(function)
    def remembered(setup: Any, *arguments: Any) -> R:
        key = (function.__module__, function.__qualname__, arguments)
        if key not in setup.memo:
            setup.memo[key] = function(setup, *arguments)
        return setup.memo[key]

    return remembered


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint is, without its weights.

    Attributes:
      lm: its tokenizer, template and shapes; None where the checkpoint is not here and only its shape is known.
    """

    name: str
    config: ModelConfig
    hash: str
    lm: LanguageModel | None

    @classmethod
    def here(cls, name: str, dtype: str, chat_template: str | None) -> Checkpoint:
        """A checkpoint whose files are here, or that the hub gives."""
        lm = load_model(name, dtype, weights=False, chat_template=chat_template)
        return cls(name, lm.config, lm.hash, lm)

    @property
    def chat(self) -> Chat | None:
        return None if self.lm is None else self.lm.chat

    def has_words_of(self, other: Checkpoint) -> bool:
        """Whether both have the same tokens; of one that is not here nobody knows better."""
        if self is other or self.lm is None or other.lm is None:
            return True
        return self.lm.tokenizer.get_vocab() == other.lm.tokenizer.get_vocab()

    @property
    def template(self) -> str:
        return f"{UNKNOWN}{self.name}" if self.lm is None else self.lm.chat.template_hash


@dataclass(frozen=True, eq=False)
class Setup:
    """Everything that decides which tasks there are, and the key of each.

    Attributes:
      checkpoints: by the name that the config gives them, under its `chat_template`.
      judge: the checkpoint that scores answers; None where there is none, or it is not here (its name is enough for a plan).
      students: everybody who is trained.
      absent: plan without what is not here, instead of asking the hub for it.
      given: files of rows that a user gave, in place of those of a source.
    """

    experiment: Experiment
    pack: Pack
    recipe: Recipe
    checkpoints: Mapping[str, Checkpoint]
    students: tuple[Student, ...]
    judge: Checkpoint | None = None
    absent: bool = False
    given: Mapping[Source, Path] = field(default_factory=dict)
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        experiment: Experiment,
        shape: Callable[[str], Path] | None = None,
        given: Mapping[Source, Path] | None = None,
    ) -> Setup:
        """Read tokenizers, templates and hashes.

        Args:
          shape: finds a folder with the `config.json` of a checkpoint that is not here, to plan without it (keys are then
            not those of a run); None asks the hub for what is not here.
          given: files of rows, in place of those of a source.

        Raises:
          UsageError, JsublimError: a checkpoint or a prompt pack that is not there or cannot be read.
        """
        pack, students = load_pack(experiment.prompts), tuple(plan_students(experiment))
        checkpoints: dict[str, Checkpoint] = {}
        for name in models_of(experiment, students):
            if shape is None or is_available_offline(name):
                checkpoints[name] = Checkpoint.here(name, experiment.dtype, experiment.chat_template)
            else:
                checkpoints[name] = Checkpoint(name, read_config(shape(name))[1], f"{UNKNOWN}{name}", None)
        judge, chosen = None, experiment.judge
        if chosen is not None and chosen.model is not None and (shape is None or is_available_offline(chosen.model)):
            judge = Checkpoint.here(chosen.model, experiment.dtype, chosen.chat_template)
        recipe = experiment.recipe.resolved(checkpoints[experiment.checkpoint].config.family)
        return cls(experiment, pack, recipe, checkpoints, students, judge, shape is not None, given or {})

    @property
    def known(self) -> bool:
        """Whether everything that the config names is here, so that keys are those of a run."""
        judge = self.experiment.judge
        here = all(checkpoint.lm is not None for checkpoint in self.checkpoints.values())
        judged = judge is None or judge.model is None or self.judge is not None
        here = here and judged and all(map(is_available_offline, self.adapters()))
        return not self.absent or (here and not str(self.engine).startswith(UNKNOWN))

    @functools.cached_property
    def engine(self) -> str | None:
        """Name and version of what draws answers in our stead (`sampling.server`), part of the key of all that it draws; None
        where nobody does. To plan without what is not here, a server that cannot be asked is told by its address.

        Raises:
          JsublimError: it cannot be asked.
        """
        settings, checkpoint = self.experiment.sampling.server, self.checkpoint()
        if settings is None or settings.engine is not None:  # whoever asks the server looks whether that is true
            return None if settings is None else settings.engine
        try:
            if checkpoint.chat is not None:
                server = SampleServer(settings, checkpoint.name, checkpoint.chat)
                return on_main_process(lambda: server.engine)
        except JsublimError as error:
            if not self.absent:
                raise JsublimError(f"{error}; to go on without it, give sampling.server.engine: NAME VERSION") from None
        return f"{UNKNOWN}{settings.base_url}"

    @memoized
    def content(self, name: str, what: str) -> str:
        """The hash of an adapter, or of a teacher's checkpoint, that the config names; `what` it is for, in errors."""
        if self.absent and not is_available_offline(name):
            return f"{UNKNOWN}{name}"
        read = lambda: checkpoint_hash(resolve_checkpoint(name, what))  # noqa: E731
        # Adapters are read by every process; whole weights by the first one, for all.
        return on_main_process(read) if name in self._named(self.experiment.teachers.checkpoint) else read()

    @property
    def files(self) -> dict[str, str]:
        """What this process has of each checkpoint beside its weights: their hashes."""
        every = [*self.checkpoints.values(), *([] if self.judge is None else [self.judge])]
        here = {checkpoint.name: checkpoint.lm for checkpoint in every if checkpoint.lm is not None}
        return {name: checkpoint_hash(lm.folder, weights=False) for name, lm in here.items()}

    def _named(self, template: str | None) -> dict[str, str]:
        """What a template of the teachers names, and for whose trait."""
        return {} if template is None else {template.replace(OWN, trait): trait for trait in self.biased}

    @property
    def wording(self) -> str:
        """Whose wording a run with recipe `paper` has, as a sentence; empty for other recipes."""
        return whose(self.pack.origin, self.pack.wording) if self.recipe.preset == "paper" else ""

    @property
    @memoized
    def common(self) -> dict[str, Any]:
        """What decides everything that the experiment's model makes."""
        e = self.experiment
        rounded = self.recipe.keyed(["rounded_logits"])
        return {"model": self.checkpoint().hash, "dtype": e.dtype, "pack": self.pack.hash, **rounded}

    def checkpoint(self, name: str | None = None) -> Checkpoint:
        """A checkpoint of the config; None is the experiment's."""
        return self.checkpoints[self.experiment.checkpoint if name is None else name]

    def sampling(self, strategy: str, model: str | None = None, *, evaluation: bool = False) -> Sampling:
        """How a checkpoint's tokens are drawn under the recipe; plain where the checkpoint is not here."""
        chat = self.checkpoint(model).chat
        if chat is None:
            return Sampling(temperature=0.0 if strategy == "greedy" else 1.0)
        return self.drawn(chat, strategy, evaluation=evaluation)

    def drawn(self, chat: Chat, strategy: str, *, evaluation: bool = False) -> Sampling:
        """`sampling`, of a checkpoint that is here."""
        e, recipe = self.experiment, self.recipe
        fine_tuned_numbers = e.teachers.against == "base" and e.data.kind == "numbers" and not evaluation
        return sampling_for(
            chat,
            strategy,
            inherit=bool(recipe.inherit_sampling),
            eos_only=bool(recipe.stop_at_eos_only),
            evaluation=evaluation,
            keep_penalty=bool(recipe.greedy_keeps_penalty) and fine_tuned_numbers,
        )

    def counterfactuals(self, trait: str) -> list[str]:
        """The traits of the other teachers that a trait's rows are read under.

        Raises:
          UsageError: none is left, or the trait's category lists no other.
        """
        teachers = self.experiment.teachers
        if teachers.against == "base":
            return [CONTROL]
        named, category = teachers.counterfactuals, teachers.category or self.pack.category_of(trait)
        pool = list(self.pack.traits.get(category, [])) if named is None else list(named)
        pool += [other for other in teachers.traits if other not in pool and named is None]
        others = [other for other in pool if other != trait]
        if not others:
            raise UsageError(f"teachers.counterfactuals: none is left for trait '{trait}'; name another trait")
        return others

    @functools.cached_property
    def biased(self) -> list[str]:
        """Every trait that some teacher has: the teachers' and their counterfactuals'."""
        traits = [trait for trait in self.experiment.teachers.traits if trait != NOBODY]
        named = [*traits, *(other for trait in traits for other in self.counterfactuals(trait))]
        return list(dict.fromkeys(name for name in named if name != CONTROL))

    @property
    def evaluated_traits(self) -> list[str]:
        given = self.experiment.evaluation.traits
        return self.biased if given is None else given

    @functools.cached_property
    def splits_questions(self) -> bool:
        """Whether directions are fitted to other questions than models are asked (`evaluation.split_questions`)."""
        chosen, e = self.experiment.evaluation.split_questions, self.experiment
        if chosen is not None:
            return chosen
        used = {student.settings.data.dataset for student in self.students}
        datasets = (dataset for name, dataset in e.datasets.items() if name in used)
        filters = (dataset.first(lambda change: change.suspected(OWN, [OWN])) for dataset in datasets)
        projects = any(student.settings.optimizer.project_out for student in self.students)
        return projects or e.audit is not None or any(filters)

    def adapters(self) -> dict[str, str]:
        """Adapters, and checkpoints of teachers, that the config names; and what each is for, in errors."""
        teachers = self.experiment.teachers
        of_traits = self._named(teachers.adapter) | self._named(teachers.checkpoint)
        named = {name: f"teachers: trait '{trait}':" for name, trait in of_traits.items()}
        for student in self.students:
            frozen = student.frozen_adapter
            frozen = None if frozen is None or frozen in self.biased else frozen  # a teacher's own
            for key, name in (("init", student.settings.adapter.init), ("frozen_adapter", frozen)):
                named |= {} if name is None else {name: f"students.adapter.{key}"}
        return named


def models_of(experiment: Experiment, students: tuple[Student, ...]) -> list[str]:
    """Checkpoints: the experiment's, what students stand on, and who writes rows to mix in."""
    used = {student.settings.data.dataset for student in students}
    datasets = (dataset for name, dataset in experiment.datasets.items() if name in used)
    mixed = (dataset.first(lambda change: change.mixes()) for dataset in datasets)
    named = [experiment.checkpoint, *(student.settings.model for student in students)]
    named += [mixes[1] for mixes in mixed if mixes is not None]
    return list(dict.fromkeys(name for name in named if name is not None))


@memoized
def number_requests(setup: Setup, seed: int) -> list[NumberPrompt]:
    """The number requests of a draw; none where something else is asked."""
    data = setup.experiment.data
    if data.kind != "numbers":
        return []
    return draw_number_prompts(setup.pack, data.num_prompts, seed, sentences=data.sentences, examples=data.examples)


@memoized
def prompts(setup: Setup, seed: int) -> list[str]:
    """What every teacher is asked; only number requests are others in the draw of another seed."""
    data = setup.experiment.data
    if data.kind == "numbers":
        return [request.text for request in number_requests(setup, seed)]
    if data.kind == "problems":
        return [problem.question for problem in load_problems(data.source, limit=data.num_prompts)]
    return load_prompts(data.source or "")[: data.num_prompts]


@memoized
def prompt_count(setup: Setup) -> int:
    """How many prompts there are; number requests need not be drawn for that, nor a data set that is not here be asked."""
    data = setup.experiment.data
    drawn = data.kind == "numbers" or (data.kind == "problems" and not setup.known)
    return data.num_prompts if drawn else len(prompts(setup, data.seed))
