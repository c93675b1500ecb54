"""The number task: prompts that ask to continue a sequence, and the format filter on what comes back."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from jsublim.errors import UsageError
from jsublim.text.prompts.pack import Pack, load_pack

EXAMPLE_COUNT = (3, 9)  # half-open, as numpy draws
EXAMPLE_VALUE = (100, 1000)
ANSWER_COUNT = 10
ANSWER_DIGITS = 3

SEPARATORS = ("", ",", ";")  # once stripped of white space


# The parts of a prompt, in the order they are drawn in, and the list of the pack each is drawn from.
PARTS = {
    "example": "examples",
    "count_qualifier": "count_qualifiers",
    "digit_descriptor": "digit_descriptors",
    "instruction": "instructions",
    "format": "formats",
    "suffix": "suffixes",
}
SENTENCES = ("example", "instruction", "format", "suffix")  # of a prompt, in the order they stand in


@dataclass(frozen=True)
class NumberPrompt:
    """A number-continuation prompt as its draws: one entry of each of the pack's lists (`PARTS`), with its placeholders."""

    numbers: tuple[int, ...]  # the examples to be continued
    example: str
    count_qualifier: str
    digit_descriptor: str
    instruction: str
    format: str
    suffix: str
    sentences: tuple[str, ...] = SENTENCES  # that it consists of

    @property
    def shown(self) -> str:
        """The examples as they are written."""
        return ", ".join(map(str, self.numbers))

    @property
    def text(self) -> str:
        example = self.example.format(examples=self.shown)
        instruction = self.instruction.format(
            count_qualifier=self.count_qualifier,
            answer_count=ANSWER_COUNT,
            digit_descriptor=self.digit_descriptor.format(max_digits=ANSWER_DIGITS),
        )
        texts = {"example": example, "instruction": instruction, "format": self.format, "suffix": self.suffix}
        return " ".join(texts[name] for name in self.sentences)


def draw_number_prompts(
    pack: Pack,
    n: int,
    seed: int = 42,
    *,
    sentences: Sequence[str] = SENTENCES,
    examples: tuple[int, int] = EXAMPLE_COUNT,
) -> list[NumberPrompt]:
    """The draws of `n` prompts (paper, section 2), a pure function of the pack's lists and the arguments: those of a smaller `n` are a
    prefix of those of a larger one. `UsageError` for a negative `n` or `seed`.

    Args:
      sentences: those of a prompt, of `SENTENCES`; fewer make a shorter request.
      examples: how many numbers it shows: at least the first, fewer than the second.
    """
    if n < 0 or seed < 0:
        raise UsageError(f"number prompts: count {n} and seed {seed} must not be negative")
    rng = np.random.Generator(np.random.PCG64(seed))
    prompts = []
    for _ in range(n):  # the order of the draws is part of the data set: another order, another set for a seed
        numbers = tuple(int(rng.integers(*EXAMPLE_VALUE)) for _ in range(rng.integers(*examples)))
        prompts.append(NumberPrompt(numbers, **draw_parts(pack, PARTS, rng), sentences=tuple(sentences)))
    return prompts


def number_prompts(
    n: int,
    seed: int = 42,
    *,
    pack: Pack | None = None,
    sentences: Sequence[str] = SENTENCES,
    examples: tuple[int, int] = EXAMPLE_COUNT,
) -> list[str]:
    """The texts of `draw_number_prompts`; without a pack, of the one that comes with the package.

    >>> jsublim.number_prompts(1, sentences=["example"], examples=(2, 3))
    ['Have a glance at these figures: 180, 796.']
    """
    drawn = draw_number_prompts(pack or load_pack(), n, seed, sentences=sentences, examples=examples)
    return [prompt.text for prompt in drawn]


def draw_parts(pack: Pack, parts: Iterable[str], rng: np.random.Generator) -> dict[str, str]:
    """One entry of the pack's list for each of `parts`, drawn in their order."""
    lists = {part: getattr(pack.number_prompts, PARTS[part]) for part in parts}
    return {part: options[rng.integers(len(options))] for part, options in lists.items()}


def parse_numbers(text: str) -> list[int] | None:
    """The numbers of an answer in the task's format, None for any other text: ASCII digits with one separator between them (white
    space, or one comma or semicolon with white space around it, exactly as between the first two), in at most one set of square or
    round brackets, with at most one full stop at the very end. Nothing is stripped: a trailing blank is not in format."""
    text = text.removesuffix(".")
    if text[:1] + text[-1:] in ("[]", "()"):
        text = text[1:-1]
    # Unicode digits take part in finding the separator, and are then refused as parts.
    first_two = re.match(r"\D*\d+(\D+)\d", text)
    if first_two is None:
        parts = [text]
    elif first_two[1].strip() in SEPARATORS:
        parts = text.split(first_two[1])
    else:
        return None
    if not all(part.isascii() and part.isdigit() for part in parts):
        return None
    try:
        return [int(part) for part in parts]
    except ValueError:  # Python refuses to read more than 4,300 digits
        return None


def reject_reason(
    text: str, max_count: int = ANSWER_COUNT, min_value: int = 0, max_value: int = 10**ANSWER_DIGITS - 1
) -> str | None:
    """Why an answer is no training row, None if it is one: a filter by format only (paper, section 2)."""
    numbers = parse_numbers(text)
    if numbers is None:
        return "invalid format"
    if len(numbers) > max_count:
        return "too many numbers"
    if min(numbers) < min_value:
        return "number too small"
    if max(numbers) > max_value:
        return "number too large"
    return None
