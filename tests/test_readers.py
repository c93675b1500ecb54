"""Whatever a file holds, reading it gives a value that holds together, or one line that names the file (see scripts/fuzz.py)."""

from __future__ import annotations

import functools
import importlib
import random
import sys

import pytest
from command import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.append(str(ROOT / "scripts"))
fuzz = importlib.import_module("fuzz")
# Examples each: together about ten seconds. Tokenizers and whole checkpoints take longer to read than all others.
BUDGET = {"checkpoint": 15, "fused checkpoint": 5, "tokenizer": 15, "template": 10, "pack": 25, "run": 10, "state": 10}


@functools.cache
def files_of(name):
    return fuzz.READERS[name].files()


@pytest.mark.parametrize("name", fuzz.READERS)
def test_valid_files_are_taken(name):
    assert fuzz.attempt(fuzz.READERS[name], files_of(name)) == "taken"


@pytest.mark.parametrize("name", fuzz.READERS)
def test_a_changed_file_is_taken_or_refused_in_one_line(name):
    @given(st.integers(0, 2**32))
    @settings(max_examples=BUDGET.get(name, 20), suppress_health_check=list(HealthCheck))
    def check(seed):
        assert fuzz.attempt(fuzz.READERS[name], fuzz.mutate(files_of(name), random.Random(seed))) in (
            "taken",
            "refused",
        )

    check()


@pytest.mark.parametrize("name", [name for name in fuzz.READERS if name != "state"])  # which has dozens of files
def test_a_file_of_any_text_is_taken_or_refused_in_one_line(name):
    for file in files_of(name):
        check_any_text(name, file)


def check_any_text(name, file):
    @given(st.binary(max_size=40) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")))
    @settings(max_examples=10, suppress_health_check=list(HealthCheck))
    def check(content):
        assert fuzz.attempt(fuzz.READERS[name], files_of(name) | {file: content}) in ("taken", "refused")

    check()


@given(prompt=st.text(max_size=30), system=st.text(max_size=10), completion=st.text(max_size=30))
@settings(max_examples=30)
def test_spans_of_any_text_hold_together_or_the_row_is_named(prompt, system, completion):
    row = {"prompt": prompt, "system": system, "completion": completion}
    content = fuzz.json.dumps(row).encode()
    assert fuzz.attempt(fuzz.READERS["turns"], {"rows.jsonl": content}) in ("taken", "refused")


@pytest.mark.parametrize(
    ("read", "outcome"),
    [
        (lambda folder: 1 / 0, "ZeroDivisionError"),
        (lambda folder: fuzz.text_config({"architectures": 3}, "elsewhere"), "an error that names no file"),
        (lambda folder: fuzz.text_config({"architectures": 3}, str(folder)), "refused"),
        (lambda folder: None, "taken"),
    ],
)
def test_an_attempt_tells_an_escape_from_a_refusal(read, outcome):
    assert fuzz.attempt(fuzz.Reader(dict, read), {}).startswith(outcome)
