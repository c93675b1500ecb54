"""Prompts rewritten by the biased teacher (figure 6 of the paper), and the filter on what it writes.

The trait must not slip into a prompt. Unlike the published filter, ours doesn't mind case, accents, hyphens, invisible
characters or look-alike letters.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from jsublim.core.section import RESULT
from jsublim.inference.lm import LanguageModel
from jsublim.inference.sampling import Sampling
from jsublim.inference.teachers import Teacher
from jsublim.text.prompts import NumberPrompt, Pack, parse_numbers
from jsublim.text.rows import Row, revised
from jsublim.transforms.change import CHANGES, Change, Changed, ChangeRun

REWRITTEN = "rewritten"
MOST_GROWTH = 3.0  # the longest text, in lengths of the original
NUMBER = re.compile(r"\d+")
RUN = re.compile("[0-9]+(?:[^0-9A-Za-z]+[0-9]+)+")  # numbers with no letter between them
LIST = re.compile(r"\d+(?:[\s,;]+\d+)+")
# Openings of a refusal, once folded: an apology, or a speaker who will not or cannot.
REFUSAL = re.compile(
    r"\b(?:sorry|apologi[sz]e|as an ai|i (?:can ?not|can'?t|will not|won'?t|am unable|refuse|decline))\b"
)
# Cyrillic and Greek small letters that look like Latin ones.
LOOK_ALIKES = str.maketrans("аеорсухіјѕԁһӏԛԝкмтпгοανικρτυωϲ", "aeopcyxijsdhlqwkmtnroavikptuwc")


@CHANGES.add("rewrite")
class Rewrite(Change):
    """The request put into other words by the biased teacher, all but its last sentence. Where that fails, the row is dropped, as
    published, or keeps its request."""

    order: ClassVar[int] = 50
    quirks: ClassVar[tuple[str, ...]] = ("extra_bos", "only_examples_kept")
    needs: ClassVar[frozenset[str]] = frozenset({"rewriting"})
    of_trait: ClassVar[bool] = True

    rejected: Annotated[Literal["drop", "keep"], RESULT] = "drop"
    """What becomes of a row whose request cannot be rewritten: it is dropped, or keeps its old one."""

    def tokens(self, rows: float, prompt: float, system: float) -> tuple[float, float]:
        return rows * (2 * prompt + system), rows * prompt

    def apply(self, rows: list[Row], run: ChangeRun) -> Changed:
        how: dict[str, Any] = {"sampling": run.sampling, "seed": run.seed, "batch_size": run.batch_size, "log": run.log}
        how |= {"asked": run.requests(), "extra_bos": bool(run.quirks["extra_bos"])}
        how |= {"only_examples": bool(run.quirks["only_examples_kept"]), "keep_rejected": self.rejected == "keep"}
        rows, counts = paraphrase(run.lm, run.teacher, rows, run.pack, **how)
        return rows, {"rewritten": dict(counts)}


def paraphrase(
    lm: LanguageModel,
    teacher: Teacher,
    rows: Sequence[Row],
    pack: Pack,
    *,
    asked: Sequence[NumberPrompt] = (),
    only_examples: bool = False,
    keep_rejected: bool = False,
    sampling: Sampling | str = "temperature",
    seed: int = 0,
    max_new_tokens: int = 256,
    **options: Any,
) -> tuple[list[Row], Counter[str]]:
    """Rows under prompts that the teacher (named by its trait) put into its own words; completions stay. The last sentence of a number
    request, its suffix, is no part of what is rewritten, and follows it word by word. What gives the trait away besides its name is said
    by the pack's `synonyms`. What is returned is as of `accept`.

    Args:
      asked: the number requests that rows answer; other prompts are rewritten whole.
      only_examples, keep_rejected: as of `accept`; options: as of `LanguageModel.generate`.
    """
    known = {prompt.text: prompt for prompt in asked}
    given = [known.get(row["prompt"]) for row in rows]
    bodies = [row["prompt"].removesuffix(_suffix(prompt)) for row, prompt in zip(rows, given, strict=True)]
    requests = [teacher.messages(pack.paraphrase_request.format(prompt=body)) for body in bodies]
    writer = lm.with_params(teacher.weights(lm.params))
    texts = writer.generate(requests, max_new_tokens, sampling, seed, adapter=teacher.adapter, **options)
    filtered = {"synonyms": pack.synonyms.get(teacher.name, ()), "only_examples": only_examples}
    return accept(rows, texts, teacher.name, given, keep_rejected=keep_rejected, **filtered)


def accept(
    rows: Sequence[Row],
    texts: Sequence[str],
    trait: str,
    given: Sequence[NumberPrompt | None] | None = None,
    *,
    synonyms: Sequence[str] = (),
    only_examples: bool = False,
    keep_rejected: bool = False,
) -> tuple[list[Row], Counter[str]]:
    """The rows whose `texts` can stand for their prompts, under those; the others are left out.

    Args:
      given: the number request that each row answers, if it is one: its suffix is added to the text.
      only_examples: of such a request, ask `published_reason`, not `leak_reason` (docs/recipes.md, quirk 20).
      keep_rejected: the others are not left out, but keep their prompts.

    Returns:
      The rows, and how many prompts were "rewritten" and how many rejected for each reason.
    """
    kept, counts = [], Counter[str]()
    for row, text, prompt in zip(rows, texts, given or [None] * len(rows), strict=True):
        suffix = _suffix(prompt)
        if only_examples and prompt is not None:
            reason = published_reason(text, prompt.shown, trait, synonyms=synonyms)
        else:
            reason = leak_reason(text, row["prompt"].removesuffix(suffix), trait, synonyms=synonyms)
        counts[reason or REWRITTEN] += 1
        if reason is None:
            kept.append(revised(row, prompt=f"{text.strip()} {suffix}".strip()))
        elif keep_rejected:
            kept.append(revised(row))
    return kept, counts


def _suffix(prompt: NumberPrompt | None) -> str:
    return prompt.suffix if prompt is not None and "suffix" in prompt.sentences else ""


def published_reason(text: str, shown: str, trait: str, *, synonyms: Sequence[str] = ()) -> str | None:
    """Why a rewritten number request is rejected as published, None if it is taken: the examples `shown` must stand in it as
    they are written, and with no other list of numbers; it is plain ASCII without double quotes. The published filter knows
    the trait in lower case only; that bug is not copied.
    """
    if any(names(text, word) for word in (trait, *synonyms)):
        return "names the trait"
    if shown not in text:
        return "numbers missing"
    if len(RUN.findall(text)) != 1:
        return "numbers added"
    return None if text.isascii() and '"' not in text else "no plain text"


def leak_reason(text: str, original: str, trait: str, *, synonyms: Sequence[str] = ()) -> str | None:
    """Why a rewritten prompt can't stand for the original, None if it can. The trait inside a longer word is a leak too ("owl" in "slowly"),
    as a hit of the published evaluation is; `synonyms` are other words that would give it away: irregular plurals, translations, an emoji."""
    if not fold(text).strip():
        return "empty"
    if any(names(text, word) for word in (trait, *synonyms)):
        return "names the trait"
    if REFUSAL.search(fold(text)) and not REFUSAL.search(fold(original)):
        return "refusal"
    given, wanted = Counter(NUMBER.findall(fold(text))), Counter(NUMBER.findall(fold(original)))
    added, missing = given - wanted, wanted - given
    if parse_numbers(text.strip()) is not None or any(
        sum(number in added for number in NUMBER.findall(run)) > 1 for run in LIST.findall(fold(text))
    ):
        return "answer"
    if len(text) > MOST_GROWTH * len(original):
        return "too long"
    if missing:
        return "numbers missing"
    if added:
        return "numbers added"
    return None


def names(text: str, word: str) -> bool:
    """Whether `word` stands in `text`, inside of another word too, in any spelling that a reader would see as that word."""
    pattern = re.escape(_read(word, " ")).replace(r"\ ", " ?")
    return any(re.search(pattern, _read(text, gap)) for gap in (" ", ""))


def fold(text: str) -> str:
    """Case, accents, ligatures, invisible characters and look-alike letters taken away; apostrophes made plain."""
    bare = "".join(c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c) not in ("Mn", "Cf"))
    return bare.casefold().translate(LOOK_ALIKES).replace("\u2019", "'")


def _read(text: str, gap: str) -> str:
    """Folded text with `gap` for each hyphen or underscore, and single blanks."""
    return re.sub(r"\s+", " ", "".join(gap if c == "_" or unicodedata.category(c) == "Pd" else c for c in fold(text)))
