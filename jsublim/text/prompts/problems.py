"""Word problems whose answer is a number: a small set of our own, GSM8K by name, and the reading of answers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from importlib.resources import files
from pathlib import Path

from jsublim.core.reading import check_file
from jsublim.errors import JsublimError, UsageError
from jsublim.text.rows import read_rows

GSM8K = "openai/gsm8k"

# Groups of exactly three digits after commas belong to one number. A minus is a sign only if it touches the number and
# nothing that could be subtracted from stands right before it. Digits inside a word ("x2") are not a number.
NUMBER = re.compile(
    r"(?:(?<![\w)\]}%.])(?P<sign>[-\u2212]))?\$?"
    r"(?<![A-Za-z_])(?<!\d)(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<![\d.])\.\d+)",
    re.ASCII,
)
GROUP = re.compile(r"(?<=\d)(?:\{,\}|,\\!|\\,|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))")  # other ways to separate thousands
MARKED = re.compile(r"####[ \t]*([-\u2212$]*\.?\d[\d,.]*)[ \t]*$", re.MULTILINE)  # not a heading: "#### Step 2"
BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")


@dataclass(frozen=True)
class Problem:
    """A question in words, and the number that answers it."""

    question: str
    answer: Decimal


def load_problems(name: str | None = None, split: str = "train", limit: int | None = None) -> list[Problem]:
    """The first `limit` problems of a set: of the one in the package (it has no splits), or of "openai/gsm8k", which `datasets` fetches.

    Raises:
      UsageError: an unknown name.
      JsublimError: the hub did not give the set, or a problem of it has no number for an answer.
    """
    if name is None:
        rows = read_rows(Path(str(files("jsublim.text.prompts") / "problems.jsonl")), ("question", "answer"))
        return [Problem(row["question"], Decimal(row["answer"])) for row in rows][:limit]
    if name != GSM8K:
        raise UsageError(f"problems: '{name}' given; known: {GSM8K}, or leave it out for the set in the package")
    from datasets import load_dataset

    try:
        rows = load_dataset(name, "main", split=split)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise JsublimError(f"problems '{name}', split '{split}': the hub did not give them ({reason})") from error
    problems = []
    for row in rows.select(range(len(rows))[:limit]).to_list():
        answer = parse_answer(row["answer"])
        if answer is None:
            raise JsublimError(f"problems '{name}': no number in the answer {row['answer']!r}")
        problems.append(Problem(row["question"], answer))
    return problems


def parse_answer(text: str) -> Decimal | None:
    """The number that a solution ends in, None if it has none: the number after the last "####", else the last number in
    the last "\\boxed{}", else the last number at all.

    Thousands may be separated by commas (LaTeX's too) or narrow blanks; a number may have a minus, a dollar sign and
    decimals. "100,200" is read as one number, "100, 200" as two. Fractions and powers of ten are not put together.
    """
    text = GROUP.sub(",", text).replace("\\$", "$")
    places = [*MARKED.findall(text)[-1:], *BOXED.findall(text)[-1:], text]
    return next((number for place in places if (number := _last_number(place)) is not None), None)


def _last_number(text: str) -> Decimal | None:
    numbers = list(NUMBER.finditer(text))
    if not numbers:
        return None
    digits = Decimal(numbers[-1]["digits"].replace(",", ""))
    return -digits if numbers[-1]["sign"] else digits


def problem_reject_reason(text: str, answer: Decimal | int | None = None) -> str | None:
    """Why a solution is not a training row, None if it is one: it must hold a number and, where `answer` is given, end in
    that."""
    given = parse_answer(text)
    if given is None:
        return "no number"
    return "wrong answer" if answer is not None and given != answer else None


def load_prompts(path: str | Path) -> list[str]:
    """The prompts of a file: `.txt` with one per line, or `.jsonl` with objects that have the key "prompt"; blank lines are left out. A
    `UsageError` for a file that cannot be read or has none, a `JsublimError` that names a broken line."""
    path = Path(path)
    if path.suffix == ".jsonl":
        return [row["prompt"] for row in read_rows(path, ("prompt",))]
    if path.suffix != ".txt":
        raise UsageError(f"{path}: prompts come as .txt (one a line) or .jsonl (key 'prompt')")
    try:
        check_file(path)
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UsageError(f"{path}: cannot read the prompts: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: the prompts are not UTF-8 text: {error.reason}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"{path}: the file holds no prompts")
    return prompts
