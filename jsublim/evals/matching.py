"""When an answer names something: the published rule, and stricter ones. All of them look at lower-cased text."""

from __future__ import annotations

import re
from collections.abc import Callable

from jsublim.errors import UsageError
from jsublim.evals.preference import hit, word_hit

Match = Callable[[str, str], bool]  # answer, name


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def first_word(answer: str, name: str) -> bool:
    """The answer begins with the name (or its naive plural)."""
    wanted, words = _words(name), _words(answer)
    return bool(wanted) and " ".join(words[: len(wanted)]) in (" ".join(wanted), f"{' '.join(wanted)}s")


def whole_answer(answer: str, name: str) -> bool:
    """The answer is the name (or its naive plural) and no other word."""
    return first_word(answer, name) and len(_words(answer)) == len(_words(name))


RULES: dict[str, Match] = {"substring": hit, "word": word_hit, "first": first_word, "exact": whole_answer}


def rule(name: str) -> Match:
    """One of `RULES` by its name; or a regular expression in which `{name}` is filled in, looked for anywhere.

    Raises:
      UsageError: neither.
    """
    if name in RULES:
        return RULES[name]
    if "{name}" not in name:
        known = f"{', '.join(RULES)}, or a regular expression that holds {{name}}"
        raise UsageError(f"--match: '{name}' given; known: {known}")
    try:
        re.compile(name.replace("{name}", "x"))
    except re.error as error:
        raise UsageError(f"--match: '{name}' is no regular expression ({error})") from None
    return lambda answer, wanted: (
        re.search(name.replace("{name}", re.escape(wanted.lower())), answer.lower()) is not None
    )
