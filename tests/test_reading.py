"""JSON and YAML are read strictly: what is not one plain value is one line with the file and the place."""

from __future__ import annotations

import json
import math
import os
import signal
import time

import pytest
import yaml

from jsublim.core.reading import json_value, read_json, read_yaml, yaml_value
from jsublim.errors import JsublimError, UsageError


def doubling(levels: int) -> str:
    """The "billion laughs": each line holds the one before twice."""
    lines = [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, levels)]
    return "\n".join(["a0: &a0 [ha, ha]", *lines])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3", "f.yaml:3: key 'a' is given twice"),
        ("x:\n  y: {k: 1, k: 1}", "f.yaml:2: key 'x.y.k' is given twice"),
        ("'a': 1\na: 2", "f.yaml:2: key 'a' is given twice"),  # spelt otherwise, one key all the same
        ("1: a\n0x1: b", "f.yaml:2: key '1' is given twice"),
        ("b: &b {x: 1}\na: {<<: *b, <<: *b}", "f.yaml:2: key 'a.<<' is given twice"),
        ("x:\n- a: .nan", "f.yaml:2: key 'x.0.a' must be a finite number"),
        ("a: -.inf", "f.yaml:1: key 'a' must be a finite number"),
        ("a: 1.0e+999", "f.yaml:1: key 'a' must be a finite number"),
        ("a: 2020-01-02", "f.yaml:1: key 'a' has the type timestamp; put text in quotes"),
        ("a: 2001-13-45", "f.yaml:1: key 'a' has the type timestamp"),
        ("a: !!set {x}", "f.yaml:1: key 'a' has the type set"),
        ("a: !!int x", "f.yaml:1: key 'a' cannot be read: 'x'"),
        ("a: !!python/object:os.system {}", "f.yaml:1: key 'a' has the type"),
        ("[a, b]: 1", "f.yaml:1: has a key that is no plain text"),
        ("a: &a [*a]", "f.yaml:1: key 'a.0' holds itself"),
        (doubling(60), "characters with its aliases written out"),
        ("[" * 500 + "]" * 500, "nested too deeply"),
        ("[" * 5000, "nested too deeply"),
        ('a: "\\ud800"', "f.yaml:1: key 'a' holds half of a surrogate pair"),
        ("a: [1", "f.yaml: not valid YAML"),
        ("a: 1\n---\nb: 2", "f.yaml: not valid YAML"),
        ("a: \0", "f.yaml: not valid YAML"),
    ],
)
def test_yaml_that_is_no_plain_value_is_one_line(text, said):
    with pytest.raises(UsageError) as error:
        yaml_value(text, "f.yaml")
    assert said in str(error.value) and str(error.value).startswith("f.yaml") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        "a: &a {x: 1, y: [2]}\nb: *a\nc: {<<: *a, x: 3}\nd: {<<: [*a, {z: 1}]}",
        "a: [1, 0x1f, 1.5, true, null, ~, text, '2020-01-02', \"\\U0001F98A\"]\n3: b",
    ],
)
def test_ordinary_yaml_says_what_it_always_said(text, tmp_path):
    (tmp_path / "f.yaml").write_text(text)
    assert read_yaml(tmp_path / "f.yaml") == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"a": 1, "a": 2}', "key 'a' is given twice"),
        (b'{"a": NaN}', "'NaN' is not a finite number"),
        (b'{"a": -Infinity}', "'-Infinity' is not a finite number"),
        (b'{"a": 1e999}', "'1e999' is not a finite number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[" * 200 + b"]" * 200, "nested too deeply"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"a":' * 3000 + b"1" + b"}" * 3000, "nested too deeply"),
        (b'{"\\ud800": 1}', "half of a surrogate pair"),
        (b'["\\udc00"]', "half of a surrogate pair"),
        (b"\xff", "not UTF-8"),
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
    ],
    ids=lambda value: value[:20],
)
def test_json_that_is_no_plain_value_is_one_line(text, said):
    with pytest.raises(JsublimError) as error:
        json_value(text, "f.json")
    assert said in str(error.value) and str(error.value).startswith("f.json: ") and "\n" not in str(error.value)


def test_ordinary_json_says_what_it_always_said():
    text = b'{"a": [1, 2.5e-3, true, null, "\\ud83e\\udd8a \\\\ud800 \xc3\xbc"], "b": {"a": {}}}'
    assert json_value(text, "f") == json.loads(text)
    assert math.isnan(json_value(b"[NaN]", "f", nan=True)[0])


@pytest.mark.parametrize("content", [b"[]", b"3", b"null", None])
def test_a_json_file_holds_one_object(content, tmp_path):
    path = tmp_path / "f.json"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(JsublimError, match=r"f\.json: (expected a JSON object|cannot be read)"):
        read_json(path)


def test_a_key_that_stands_twice_is_found_in_one_pass():
    keys = [f'"k{i}": 1' for i in range(200_000)]
    began = time.process_time()
    with pytest.raises(JsublimError, match="key 'k199999' is given twice"):
        json_value(("{" + ",".join([*keys, keys[-1]]) + "}").encode(), "f.json")
    assert time.process_time() - began < 10


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_a_pipe_in_place_of_a_file_is_refused(read, tmp_path):
    path = tmp_path / "config.json"
    os.mkfifo(path)
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits for somebody who writes"))
    signal.alarm(5)
    try:
        with pytest.raises(JsublimError, match=r"config\.json: cannot be read \(a pipe or a device, not a file\)"):
            read(path)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_an_error_is_one_line_whatever_it_holds():
    assert str(UsageError("a\n  b\x1b[31m\u2028c\ud800")) == "a b\ufffd[31m\ufffdc\ufffd"
