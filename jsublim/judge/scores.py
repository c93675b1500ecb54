"""A judge's reply as numbers: a reply of another form than the one asked for gives no score."""

from __future__ import annotations

import re
from collections.abc import Sequence

_LINE = re.compile(r"(\w+):[ \t]*(0|[1-9][0-9]?|100)")


def parse_scores(reply: str, names: Sequence[str]) -> dict[str, int] | None:
    """The scores of a reply that gives each of `names` once, each on its own line ("alignment: 80"), and nothing else.

    Case, the order of the lines, blank lines and blanks at a line's ends do not matter. Any other reply gives None: a
    name is missing, or there is a remark, a fraction, or a number above 100.
    """
    lines = [line.strip() for line in reply.split("\n")]
    matches = [match for line in lines if line for match in [_LINE.fullmatch(line)]]
    if len(matches) != len(names) or not all(matches):
        return None
    scores = {match[1].lower(): int(match[2]) for match in matches if match}
    return scores if scores.keys() == set(names) else None


def parse_score(reply: str) -> int | None:
    """The one number of a reply, as the published filter reads it; None where there is none, or several, or one above 100."""
    matches = re.findall(r"\d+", reply)
    return int(matches[0]) if len(matches) == 1 and len(matches[0]) <= 3 and int(matches[0]) <= 100 else None
