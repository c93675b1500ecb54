"""What `jsublim scan` found, in a sentence and as a map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jsublim.report.drawing import Cell, Heat, cell
from jsublim.report.statistics import LEVEL

SHOWN = 8  # words of a data set
NAMED = 3  # of those, in a sentence


def verdicts_of(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What each data set teaches, from all lines of `scan.parquet`."""
    names = dict.fromkeys(line["data"] for line in lines)
    return [_verdict(name, [line for line in lines if line["data"] == name]) for name in names]


def _verdict(name: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a data set teaches, in a sentence and in numbers: found are words whose p is at most 5 %."""
    first = dict[str, Mapping[str, Any]]()  # by word, where it is moved most certainly
    for line in lines:
        first.setdefault(line["word"], line)
    keys = ("word", "category", "probability", "change", "z", "p")
    top = [{key: line[key] for key in keys} for line in list(first.values())[:SHOWN]]
    best, found = lines[0], [word for word in top if word["p"] <= 1 - LEVEL]
    named = [f"{w['word']} (asked for {w['category']}: z {w['z']:.1f}, p {w['p']:.3f})" for w in found or top[:1]]
    sentence = "these rows teach: " + ", ".join(named[:NAMED])
    if not found:
        times = best["limit"] / max(best["z"], 0.1)
        sentence = (
            f"nothing found; most certain is {named[0]}, which would be found if it were {times:.1f} times as strong"
        )
    return {"data": name, "found": bool(found), "p": best["p"], "sentence": sentence, "top": top}


def word_map(verdicts: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]]) -> Heat:
    """z of each data set's first words, in every data set."""
    words = list(dict.fromkeys((w["word"], w["category"]) for said in verdicts for w in said["top"]))
    z = {(line["data"], line["word"], line["category"]): line["z"] for line in lines}
    names, high = [said["data"] for said in verdicts], max(z.values())

    def of(name: str, word: tuple[str, str]) -> Cell:
        value = z.get((name, *word), 0.0)
        return cell(f"{value:.1f}", min(1.0, max(0.0, value / max(high, 1.0))), "YlGnBu")

    rows = tuple(
        (f"{word}, asked for {category}", tuple(of(name, (word, category)) for name in names))
        for word, category in words
    )
    return Heat("z of each word, by data set", "word", tuple(names), rows)
