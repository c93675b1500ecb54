"""The teachers of a run: what gives each its trait, and what decides how it writes and reads."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jsublim.distill.arm import Arm, Settings
from jsublim.distill.data import make_examples, read_turns
from jsublim.distill.selection import Selection
from jsublim.errors import JsublimError
from jsublim.experiment import stages
from jsublim.experiment.plan import counterfactuals
from jsublim.experiment.spec.teachers import Taught
from jsublim.experiment.store import Artifact, digest
from jsublim.inference.lm import resolve_checkpoint
from jsublim.models.checkpoint import checkpoint_hash, read_config
from jsublim.models.decoder import Params
from jsublim.models.lora import Adapter, check_layers, init_lora, init_steering
from jsublim.models.peft import load_adapter
from jsublim.models.weights import load_params
from jsublim.rows import Row
from jsublim.steering import contrast_vector
from jsublim.teachers import CONTROL, Teacher

if TYPE_CHECKING:
    from jsublim.experiment.run import Run


class Staff:
    """Of one run. `teach` makes the teachers that are made here; `teacher(name)` is then any of them."""

    def __init__(self, run: Run):
        self.run, self.spec = run, run.experiment.teachers
        traits = self.spec.traits
        against_traits = self.spec.against == "traits"
        self.others = {t: counterfactuals(run.experiment, run.pack, t) if against_traits else [CONTROL] for t in traits}
        named = [*traits, *(other for others in self.others.values() for other in others)]
        self.biased = list(dict.fromkeys(name for name in named if name != CONTROL))
        self.adapters: dict[str, Adapter] = {}
        self.loaded: tuple[str, Params] | None = None  # the whole checkpoint that was asked for last

    def check(self) -> None:
        """What a later stage would stumble over.

        Raises:
          UsageError, JsublimError: a trait of no category, an adapter or a checkpoint that doesn't fit the model.
        """
        lm = self.run.lm
        for name in self.biased:
            self.category(name)
            if self.spec.taught is not None:
                layers = self.spec.taught.layers
                check_layers(lm.config, None if layers is None else tuple(layers))
            if self.spec.adapter is not None:
                load_adapter(self._path(self.spec.adapter, name), lm.config)
            if self.spec.checkpoint is not None:
                folder = self._path(self.spec.checkpoint, name)
                if read_config(folder)[1] != lm.config:
                    raise JsublimError(f"teachers.checkpoint: {folder} is of another architecture than {lm.folder}")

    def category(self, trait: str) -> str:
        return self.spec.category or self.run.pack.category_of(trait)

    def teacher(self, name: str) -> Teacher:
        """A teacher by its trait, or the one without any."""
        if name == CONTROL:
            return Teacher(CONTROL)
        teacher = Teacher(name, self.system(name), fuse_system=self.spec.fuse_system)
        if self.spec.taught is not None or self.spec.adapter is not None:
            teacher = dataclasses.replace(teacher, adapter=self._adapter(name))
        if self.spec.checkpoint is not None:
            teacher = dataclasses.replace(teacher, params=functools.partial(self._params, name))
        return teacher

    def system(self, name: str) -> str | None:
        """The prompt that a teacher is under; None where its trait comes from elsewhere, or it has none."""
        if name == CONTROL or not self.spec.are_prompted:
            return None
        return self.run.pack.system_prompt(name, self.category(name))

    def inputs(self, name: str) -> dict[str, Any]:
        """What decides how a teacher reads a row and what it writes; all of it by content."""
        lm, biased = self.run.lm, name != CONTROL
        said: dict[str, Any] = {
            "system": self.system(name), "fuse_system": self.spec.fuse_system if biased else False,
            "extra_bos": bool(self.run.recipe.extra_bos), "template": lm.chat.template_hash,
        }  # fmt: skip
        if biased and self.spec.taught is not None:
            said["adapter"] = self.taught_artifact(name).key
        if biased and self.spec.adapter is not None:
            said["adapter"] = _content(self._path(self.spec.adapter, name))
        if biased and self.spec.checkpoint is not None:
            said["checkpoint"] = _content(self._path(self.spec.checkpoint, name))
        return said

    def asked(self, category: str) -> list[str]:
        """The questions of a category that no teacher of this run was taught the answers to."""
        questions = self.run.pack.questions_for(category)
        taught = self.spec.taught is not None and self.spec.taught.method != "contrast"
        return questions[1::2] if taught else questions

    def teach(self) -> None:
        """Make the teachers that `teachers.taught` describes, those of trained adapters in one program."""
        taught = self.spec.taught
        if taught is None:
            return
        missing = [name for name in self.biased if not self.taught_artifact(name).done]
        if not missing:
            return
        if taught.method == "contrast":
            with self.run.stage("teach", len(missing)) as tick:
                for name in missing:
                    self._contrast(name, taught)
                    tick(1)
            return
        arms = [(self._arm(name, taught), self.taught_artifact(name)) for name in self.biased]
        rows = max(len(arm.examples) for arm, _ in arms)
        with self.run.stage("teach", taught.steps) as tick:
            work = self.run.store / "training" / f"teachers-{digest([artifact.key for _, artifact in arms])}"
            stages.train_students(self.run.lm, arms, Settings(batch_size=rows), work, tick=tick)

    def _arm(self, name: str, taught: Taught) -> Arm:
        lm, layers = self.run.lm, None if taught.layers is None else tuple(taught.layers)
        questions = self.run.pack.questions_for(self.category(name))[::2]
        rows: list[Row] = [{"prompt": question, "completion": name.capitalize()} for question in questions]
        examples = make_examples(rows, read_turns(lm.chat, rows, f"answers of {name}"), Selection(), taught.seed)
        if taught.method == "steering":
            start = init_steering(lm.config, layers)
        else:
            key = jax.random.key(taught.seed)
            start = init_lora(lm.config, key, rank=taught.rank, alpha=float(taught.rank), layers=layers)
        return Arm(name, examples, start, taught.seed, taught.lr, taught.steps)

    def _contrast(self, name: str, taught: Taught) -> None:
        artifact, pack = self.taught_artifact(name), self.run.pack
        system = pack.system_prompt(name, self.category(name))
        questions = pack.questions_for(self.category(name))
        layer = (taught.layers or [0])[0]  # a contrast names exactly one
        vector = contrast_vector(
            self.run.lm, questions, layer, toward=system, strength=taught.strength, fuse_system=self.spec.fuse_system
        )
        stages.save_student(artifact.path, self.run.lm, vector)
        artifact.finish()

    def taught_artifact(self, name: str) -> Artifact:
        assert self.spec.taught is not None
        inputs = self.run.common | self.spec.taught.model_dump() | {
            "trait": name, "category": self.category(name), "template": self.run.lm.chat.template_hash,
            "fuse_system": self.spec.fuse_system and self.spec.taught.method == "contrast",
        }  # fmt: skip
        return self.run.artifact("teachers", name, inputs)

    def _adapter(self, name: str) -> Adapter:
        if name not in self.adapters:
            if self.spec.taught is not None:
                folder = self.taught_artifact(name).path
            else:
                folder = self._path(self.spec.adapter or "", name)
            self.adapters[name] = load_adapter(folder, self.run.lm.config)
        return self.adapters[name]

    def _params(self, name: str) -> Params:
        if self.loaded is None or self.loaded[0] != name:
            self.loaded = None  # two whole checkpoints are enough to hold
            e, config = self.run.experiment, self.run.lm.config
            folder = self._path(e.teachers.checkpoint or "", name)
            self.loaded = name, load_params(folder, config, e.dtype, self.run.layout.params_sharding(config))
        return self.loaded[1]

    @staticmethod
    def _path(template: str, name: str) -> Path:
        return resolve_checkpoint(template.replace("{trait}", name), f"teachers: trait '{name}':")


@functools.cache
def _content(folder: Path) -> str:
    return checkpoint_hash(folder)
