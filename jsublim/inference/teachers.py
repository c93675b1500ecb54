"""Teachers: a checkpoint (or another of its shape) under a system prompt (or none), with an adapter (or none)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jsublim.models.decoder import Params
from jsublim.models.lora import Adapter
from jsublim.text.chat import Chat, Message, Turn, conversation
from jsublim.text.prompts import Pack
from jsublim.text.rows import Row

CONTROL = "control"  # the name of the teacher without a trait
OWN = "{trait}"  # in a config: the trait of whichever teacher it is about


@dataclass(frozen=True)
class Teacher:
    """Who writes, or scores, the rows."""

    name: str  # the trait, or "control"
    system: str | None = None  # None leaves it to the chat template (which may insert a default), "" is an empty one
    adapter: Adapter | None = None  # LoRA, steering vectors or whole layers that it carries
    fuse_system: bool = False
    # Reads weights of its own, where it is another checkpoint of the same architecture and tokenizer. They are read only when
    # the teacher is asked, so one that waits holds no memory.
    params: Callable[[], Params] | None = None

    def weights(self, base: Params) -> Params:
        """Its own weights, or those of `base`."""
        return base if self.params is None else self.params()

    def messages(self, prompt: str) -> list[Message]:
        return conversation(prompt, self.system, fuse_system=self.fuse_system)


def prompted_teacher(pack: Pack, trait: str, category: str | None = None, *, fuse_system: bool = False) -> Teacher:
    """The teacher whose system prompt gives it `trait` (section 2 of the paper); a UsageError where no category is given, and the pack knows none."""
    system = pack.system_prompt(trait, category or pack.category_of(trait))
    return Teacher(trait, system, fuse_system=fuse_system)


def read_as(
    chat: Chat, teacher: Teacher, rows: Sequence[Row], source: str = "", *, extra_bos: bool = False
) -> list[Turn]:
    """Rows tokenized as a teacher reads them; a row that doesn't survive that is a JsublimError which names it and `source`."""
    where = f"{source}: " if source else ""
    exchanges = ((teacher.messages(row["prompt"]), row["completion"]) for row in rows)
    return chat.turns(
        exchanges, lambda number: f"{where}row {number} under teacher '{teacher.name}'", extra_bos=extra_bos
    )
