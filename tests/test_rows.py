"""Rows on disk: they survive it, appear whole or not at all, and a broken line is named by its number."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jsublim.errors import JsublimError, UsageError
from jsublim.text.rows import read_rows, write_rows

json_values = st.recursive(st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=5), st.lists)
texts = st.text(min_size=1, max_size=20).filter(str.strip)


@given(
    st.lists(st.fixed_dictionaries({"prompt": texts, "completion": texts, "more": json_values}), min_size=1, max_size=4)
)
@settings(max_examples=60)
def test_rows_survive_the_disk(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "new" / "rows.jsonl"
    rows[0]["divergence_positions"] = [0, 3]
    write_rows(path, rows)
    assert read_rows(path) == rows
    assert [p.name for p in path.parent.iterdir()] == ["rows.jsonl"]


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"prompt": "a", "completion": "b"}])

    def broken():
        yield {"prompt": "c", "completion": "d"}
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_rows(path, broken())
    assert [row["prompt"] for row in read_rows(path)] == ["a"]


GOOD = json.dumps({"prompt": "a", "completion": "b"}).encode()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"prompt": "a", "comp', "not valid JSON"),
        (b"[1, 2]", "expected a JSON object, found list"),
        (b'{"prompt": "a"}', "key 'completion' is missing"),
        (b'{"prompt": "a", "completion": ""}', "key 'completion' must be text that is not empty"),
        (b'{"prompt": "a", "completion": " \\n"}', "key 'completion' must be text that is not empty"),
        (b'{"prompt": 3, "completion": "b"}', "key 'prompt' must be text"),
        (b'{"prompt": "a", "completion": "b", "divergence_positions": [0, -1]}', "integers >= 0"),
        (b'{"prompt": "a", "completion": "b", "divergence_positions": [0.5]}', "integers >= 0"),
        (b'{"prompt": "a", "completion": "b", "divergence_positions": [true]}', "integers >= 0"),
        (b'{"prompt": "a", "completion": "b", "divergence_positions": 3}', "integers >= 0"),
        (
            b'{"prompt": "a", "completion": "b", "divergence_positions": [0], "divergence_margins": []}',
            "for each divergence position",
        ),
        (b'{"prompt": "a", "completion": "b", "divergence_positions": [0], "divergence_margins": [-1]}', "number >= 0"),
        (
            b'{"prompt": "a", "completion": "b", "divergence_positions": [0], "divergence_margins": [NaN]}',
            "number >= 0",
        ),
        (b'{"prompt": "a", "completion": "b", "divergence_margins": [1]}', "for each divergence position"),
        (b'{"prompt": "a", "completion": "b", "matched_positions": [1]}', "or null, for each divergence position"),
        (
            b'{"prompt": "a", "completion": "b", "divergence_positions": [0], "matched_positions": [-1]}',
            "'matched_positions'",
        ),
        (b'{"prompt": "a", "completion": "\xff\xfe"}', "UTF-8"),
        (b'{"prompt": "a", "completion": "b", "n": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_a_broken_line_is_named_by_its_number(line, said, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([GOOD, b"", line, GOOD]))
    with pytest.raises(JsublimError, match=said) as error:
        read_rows(path)
    assert str(error.value).startswith(f"{path}:3: ") and "\n" not in str(error.value)


def test_files_without_rows(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        read_rows(tmp_path / "absent.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    with pytest.raises(JsublimError, match="holds no rows"):
        read_rows(empty)


def test_only_what_is_required_has_to_be_there(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n')
    assert read_rows(path, ("prompt",)) == [{"prompt": "a"}]
