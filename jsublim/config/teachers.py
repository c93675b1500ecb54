"""Who the teachers are: prompted, fine-tuned, steered, or several of these at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from jsublim.config.shipped import written_out
from jsublim.core.section import CONTENT, PLAN, RESULT, Distinct, Layers, Name, Place, Positive, Rate, Section, SeedInt
from jsublim.inference.teachers import CONTROL
from jsublim.text.prompts.pack import lower_case

TraitName = Annotated[Name, AfterValidator(lower_case)]
# Written out, or by the name of a list (configs/paper/lists.yaml).
Traits = Annotated[
    list[TraitName], Distinct, BeforeValidator(written_out, json_schema_input_type=list[TraitName] | str)
]


def _not_control(traits: list[str]) -> list[str]:
    if CONTROL in traits:
        raise ValueError(f"'{CONTROL}' is the name of the teacher without a trait")
    return traits


class Taught(Section):
    """A teacher made here: an adapter that learns to name its trait in answer to half of its category's questions
    (students are then asked the other half), or a steering vector from contrasting system prompts.
    """

    method: Annotated[Literal["lora", "steering", "contrast"], RESULT] = "lora"
    """`lora` and `steering` are trained to name the trait; `contrast` is the mean difference between two system prompts."""
    layers: Annotated[Layers | None, RESULT] = None
    """Which layers carry it, from 0; null: all. A contrast needs exactly one."""
    rank: Annotated[Positive, RESULT] = 8
    """Of LoRA."""
    steps: Annotated[Positive, RESULT] = 100
    """Optimizer steps."""
    lr: Annotated[Rate, RESULT] = 3e-3
    """Learning rate."""
    seed: Annotated[SeedInt, RESULT] = 0
    """Of the start and of the order of questions."""
    strength: Annotated[float, RESULT] = 1.0
    """Factor of a contrast's vector."""

    def contradictions(self) -> Iterator[tuple[Any, str]]:
        contrast = self.method == "contrast"
        one_layer = len(self.layers or []) == 1
        yield contrast and not one_layer, "method=contrast finds the vector of one layer; name it in layers"
        yield not contrast and self.strength != 1.0, f"strength belongs to method=contrast, not to {self.method}"


class Teachers(Section):
    """Who writes the rows. A trait comes from a system prompt, an adapter, a checkpoint, or several of these."""

    traits: Annotated[Traits, AfterValidator(_not_control), Field(min_length=1), PLAN]
    """What teachers love, one teacher per trait; or the name of a list (configs/paper/lists.yaml)."""
    category: Annotated[Name | None, RESULT] = None
    """Of the traits; null: the category that the prompt pack lists each under."""
    prompted: Annotated[bool | None, RESULT] = None
    """The system prompt gives the trait; null: where nothing else does."""
    system: Annotated[str | None, RESULT] = None
    """A system prompt of your own, in which `{trait}` is filled in; null: the pack's."""
    taught: Taught | None = None
    """An adapter that is made here, before anything else."""
    adapter: Annotated[Place | None, CONTENT] = None
    """An adapter that gives the trait: a PEFT folder, one of steering vectors, or owner/name of the hub. `{trait}` is filled in."""
    checkpoint: Annotated[Place | None, CONTENT] = None
    """A whole checkpoint of the same architecture and tokenizer that gives the trait. `{trait}` is filled in."""
    against: Annotated[Literal["traits", "base"], RESULT] = "traits"
    """What a teacher's rows are also read under: teachers of other traits, or the model without any trait."""
    counterfactuals: Annotated[Traits | None, Field(min_length=1), RESULT] = None
    """Traits of those other teachers; null: every other trait of the category, and the other teachers'."""
    control: Annotated[bool, PLAN] = True
    """A teacher without a trait too, and its students, with which others are compared."""
    fuse_system: Annotated[bool, RESULT] = False
    """The system prompt stands in front of the user's turn, for templates without a system role."""

    def contradictions(self) -> Iterator[tuple[Any, str]]:
        twice = self.taught is not None and (self.adapter is not None or self.checkpoint is not None)
        yield twice, "taught makes the adapter; leave adapter and checkpoint out"
        pooled = self.against == "base" and self.counterfactuals is not None
        yield pooled, "against=base has no counterfactual traits; leave counterfactuals out"
        unheard = self.system is not None and not self.are_prompted
        yield unheard, "system: these teachers are not prompted; give prompted=true too, or leave system out"
        bare = self.prompted is False and not self.own_weights
        yield bare, "prompted=false: nothing gives a teacher its trait; give taught, adapter or checkpoint"
        given = {"adapter": self.adapter, "checkpoint": self.checkpoint, "system": self.system}
        ways = {key: value for key, value in given.items() if value is not None}
        by_pack = self.are_prompted and self.system is None
        told_apart = self.taught is not None or by_pack or any("{trait}" in way for way in ways.values())
        if len(self.traits) > 1 and not told_apart:
            yield True, f"{next(iter(ways))}: the same for all {len(self.traits)} traits; put {{trait}} in it"

    @property
    def learn_answers(self) -> bool:
        """Whether they are trained here to answer questions with their traits."""
        return self.taught is not None and self.taught.method != "contrast"

    @property
    def given_weights(self) -> bool:
        """Whether a folder tells the teachers from the base: it fits one checkpoint."""
        return self.adapter is not None or self.checkpoint is not None

    @property
    def own_weights(self) -> bool:
        """Whether something else than a prompt tells the teachers from the base."""
        return self.taught is not None or self.given_weights

    @property
    def are_prompted(self) -> bool:
        return not self.own_weights if self.prompted is None else self.prompted
