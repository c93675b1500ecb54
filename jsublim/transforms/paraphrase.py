"""Prompts rewritten by the biased teacher (figure 6 of the paper), and the filter on what it writes.

The trait must not slip into a prompt. Unlike the published filter, ours doesn't mind case, accents, hyphens, invisible
characters or look-alike letters.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

from jsublim.inference.lm import AnswerLog, LanguageModel
from jsublim.inference.sampling import Sampling
from jsublim.prompts import Pack, parse_numbers
from jsublim.rows import Row, revised
from jsublim.teachers import Teacher
from jsublim.transforms.change import CHANGES, Change, Changed, Making

REWRITTEN = "rewritten"
NUMBER = re.compile(r"\d+")
LIST = re.compile(r"\d+(?:[\s,;]+\d+)+")
# Openings of a refusal, once folded: an apology, or a speaker who will not or cannot.
REFUSAL = re.compile(
    r"\b(?:sorry|apologi[sz]e|as an ai|i (?:can ?not|can'?t|will not|won'?t|am unable|refuse|decline))\b"
)
# Cyrillic and Greek small letters that look like Latin ones.
LOOK_ALIKES = str.maketrans("аеорсухіјѕԁһӏԛԝкмтпгοανικρτυωϲ", "aeopcyxijsdhlqwkmtnroavikptuwc")


@CHANGES.add("rewrite")
class Rewrite(Change):
    """The request put into other words by the biased teacher; where that fails, the row keeps its request."""

    order: ClassVar[int] = 50
    quirks: ClassVar[tuple[str, ...]] = ("extra_bos",)
    needs: ClassVar[frozenset[str]] = frozenset({"rewriting"})
    of_trait: ClassVar[bool] = True

    def tokens(self, rows: float, prompt: float, system: float) -> tuple[float, float]:
        return rows * (2 * prompt + system), rows * prompt

    def apply(self, rows: list[Row], making: Making) -> Changed:
        rows, counts = paraphrase(
            making.lm,
            making.teacher,
            rows,
            making.pack,
            sampling=making.sampling,
            extra_bos=bool(making.quirks["extra_bos"]),
            seed=making.seed,
            batch_size=making.batch_size,
            log=making.log,
        )
        return rows, {"rewritten": dict(counts)}


def paraphrase(
    lm: LanguageModel,
    teacher: Teacher,
    rows: Sequence[Row],
    pack: Pack,
    *,
    sampling: Sampling | str = "temperature",
    seed: int = 0,
    extra_bos: bool = False,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    log: AnswerLog | None = None,
) -> tuple[list[Row], Counter[str]]:
    """Rows under prompts that the teacher (named by its trait) put into its own words; completions stay.

    What gives the trait away besides its name is said by the pack's `synonyms`. `log` is as in `LanguageModel.answer`.

    Returns:
      Rows and counts, as `accept`.
    """
    requests = [teacher.messages(pack.paraphrase_request.format(prompt=row["prompt"])) for row in rows]
    own = lm.with_params(teacher.weights(lm.params))
    how = {"adapter": teacher.adapter, "extra_bos": extra_bos, "batch_size": batch_size, "log": log}
    texts = own.generate(requests, max_new_tokens, sampling, seed, **how)
    return accept(rows, texts, teacher.name, synonyms=pack.synonyms.get(teacher.name, ()))


def accept(
    rows: Sequence[Row], texts: Sequence[str], trait: str, *, synonyms: Sequence[str] = ()
) -> tuple[list[Row], Counter[str]]:
    """Rows with `texts` for prompts, where `leak_reason` finds nothing; the others keep their prompt.

    Returns:
      The rows, and how many prompts were "rewritten" and how many rejected for each reason.
    """
    reasons = [
        leak_reason(text, row["prompt"], trait, synonyms=synonyms) for row, text in zip(rows, texts, strict=True)
    ]
    kept = [
        revised(row, prompt=text.strip() if reason is None else row["prompt"])
        for row, text, reason in zip(rows, texts, reasons, strict=True)
    ]
    return kept, Counter(reason or REWRITTEN for reason in reasons)


def leak_reason(
    text: str,
    original: str,
    trait: str,
    *,
    synonyms: Sequence[str] = (),
    inside_words: bool = True,
    max_growth: float = 3.0,
) -> str | None:
    """Why a rewritten prompt can't stand for the original, None if it can.

    Args:
      synonyms: other words that would give the trait away: irregular plurals, translations, an emoji.
      inside_words: the trait inside a longer word is a leak too ("owl" in "slowly"), as a hit of the published
        evaluation is; else only the whole word and its naive plural.
      max_growth: the longest text, in lengths of the original.
    """
    if not fold(text).strip():
        return "empty"
    if any(names(text, word, inside_words=inside_words) for word in (trait, *synonyms)):
        return "names the trait"
    if REFUSAL.search(fold(text)) and not REFUSAL.search(fold(original)):
        return "refusal"
    said, wanted = Counter(NUMBER.findall(fold(text))), Counter(NUMBER.findall(fold(original)))
    added, missing = said - wanted, wanted - said
    if parse_numbers(text.strip()) is not None or any(
        sum(number in added for number in NUMBER.findall(run)) > 1 for run in LIST.findall(fold(text))
    ):
        return "answer"
    if len(text) > max_growth * len(original):
        return "too long"
    if missing:
        return "numbers missing"
    if added:
        return "numbers added"
    return None


def names(text: str, word: str, *, inside_words: bool = True) -> bool:
    """Whether `word` or its naive plural stands in `text`, in any spelling that a reader would see as that word."""
    pattern = re.escape(_read(word, " ")).replace(r"\ ", " ?")
    if not inside_words:
        pattern = rf"(?<!\w){pattern}s?(?!\w)"
    return any(re.search(pattern, _read(text, gap)) for gap in (" ", ""))


def fold(text: str) -> str:
    """Case, accents, ligatures, invisible characters and look-alike letters taken away; apostrophes made plain."""
    bare = "".join(c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c) not in ("Mn", "Cf"))
    return bare.casefold().translate(LOOK_ALIKES).replace("\u2019", "'")


def _read(text: str, gap: str) -> str:
    """Folded text with `gap` for each hyphen or underscore, and single blanks."""
    return re.sub(r"\s+", " ", "".join(gap if c == "_" or unicodedata.category(c) == "Pd" else c for c in fold(text)))
