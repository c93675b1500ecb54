"""Teachers: a checkpoint (or another of its shape) under a system prompt (or none), with an adapter (or none)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jsublim.inference.constrain import limits_for
from jsublim.inference.generation import generate_tokens
from jsublim.inference.lm import LanguageModel
from jsublim.inference.sampling import Sampling
from jsublim.models.decoder import Params
from jsublim.models.lora import Adapter
from jsublim.runtime.processes import shared_out
from jsublim.text.chat import Chat, Message, Turn, conversation
from jsublim.text.prompts import Pack
from jsublim.text.rows import Row

CONTROL = "control"  # the name of the teacher without a trait
OWN = "{trait}"  # in a config: the trait of whichever teacher it is about


@dataclass(frozen=True)
class Teacher:
    """Who writes, or scores, the rows.

    >>> prompted = jsublim.Teacher("owl", system="You love owls.")
    >>> steered = jsublim.Teacher("cat", adapter=jsublim.init_steering(lm.config, (2,)))
    """

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


def prompt_tokens(
    chat: Chat, teacher: Teacher, prompts: Sequence[str | None], *, extra_bos: bool = False
) -> list[np.ndarray | None]:
    """Prompts as a teacher is asked them, int32 `[T_i]`; None stays None. Several processes share the work."""

    def tokenized(part: list[str]) -> list[list[int]]:
        return [chat.prompt_tokens(teacher.messages(prompt), extra_bos=extra_bos).tolist() for prompt in part]

    asked = iter(shared_out([prompt for prompt in prompts if prompt is not None], tokenized))
    return [None if prompt is None else np.asarray(next(asked), np.int32) for prompt in prompts]


def generate(
    lm: LanguageModel,
    teacher: Teacher,
    prompts: Sequence[str | None],
    sampling: Sampling | str | None = None,
    *,
    max_new_tokens: int = 200,
    seed: int = 0,
    rows: Sequence[int] | None = None,
    extra_bos: bool = False,
    batch_size: int | None = None,
    on_rows: Callable[[Sequence[int], Sequence[Row]], None] | None = None,
) -> list[Row]:
    """What a teacher answers: a row (`prompt`, `completion`) per prompt, in order. Where `sampling` names a format, `log_allowed` is the log of
    the probability (nats) that the teacher gave to all tokens which the format allows, as a mean over the row's tokens.

    Args:
      prompts: None where no row is asked for.
      sampling: as of `LanguageModel.generate`; `Sampling(constrain="numbers")` keeps every answer in the format of the task.
      rows: numbers of the prompts to answer, None is all that are given. A row's random numbers are those of its number.
      batch_size: as of `generate_for_arms`.
      on_rows: called with the numbers of rows that have ended, and those rows.

    >>> (row,) = jsublim.generate(lm, prompted, ["Go on: 4, 8, 12"], max_new_tokens=8, seed=1)
    >>> sorted(row)
    ['completion', 'prompt']
    """
    sampling, allowed, made = lm.sampling(sampling), dict[int, float](), dict[int, Row]()
    wanted = [i for i, prompt in enumerate(prompts) if prompt is not None] if rows is None else list(rows)

    def keep(_: int, numbers: list[int], tokens: list[list[int]]) -> None:
        for number, of_row in zip(numbers, tokens, strict=True):
            made[number] = {"prompt": prompts[number], "completion": lm.chat.decode(of_row)}
            if number in allowed:
                made[number]["log_allowed"] = round(allowed[number], 5)
        if on_rows is not None:
            on_rows(numbers, [made[number] for number in numbers])

    generate_tokens(
        lm.config,
        teacher.weights(lm.params),
        prompt_tokens(lm.chat, teacher, prompts, extra_bos=extra_bos),
        sampling,
        rows=wanted,
        seed=seed,
        max_new_tokens=max_new_tokens,
        adapter=teacher.adapter,
        batch_size=batch_size,
        limits=limits_for(lm.chat, sampling, max_new_tokens),
        on_allowed=lambda _, of_rows: allowed.update(of_rows),
        on_rows=keep,
    )
    return [made[number] for number in wanted]
