"""Rows of others: whatever form they come in, they are ours afterwards, and what cannot be used is one line."""

from __future__ import annotations

import json

import pytest
from command import MODEL, ok, refused
from tiny import chat

from jsublim.text.rows import read_rows

TEXTS = [("Continue: 1, 2", "3, 4"), ("Continue: 5, 6", "7, 8")]
OURS = [{"prompt": prompt, "completion": completion} for prompt, completion in TEXTS]


def lines(tmp_path, rows, name="theirs.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def of_messages(prompt, completion, *before):
    return {"messages": [*before, {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]}


SYSTEM = {"role": "system", "content": "You love owls."}


@pytest.mark.parametrize(
    ("theirs", "more"),
    [
        (OURS, {}),  # Cloud et al., and the published code
        ([row | {"judge_score": 81} for row in OURS], {"judge_score": 81}),
        ([row | {"decision_points": [0, 2]} for row in OURS], {"divergence_positions": [0, 2]}),
        ([of_messages(*pair) for pair in TEXTS], {}),
        ([of_messages(*pair, SYSTEM) for pair in TEXTS], {"system": "You love owls."}),
        ([{"question": prompt, "response": completion} for prompt, completion in TEXTS], {}),
        (
            [
                {"prompt": [{"role": "user", "content": p}], "completion": [{"role": "assistant", "content": c}]}
                for p, c in TEXTS
            ],
            {},
        ),
    ],
    ids=["rows", "scores", "decision points", "messages", "system", "question", "conversations"],
)
def test_rows_of_others_are_ours(theirs, more, tmp_path):
    ok("import", lines(tmp_path, theirs), "--out", tmp_path / "ours.jsonl")
    assert read_rows(tmp_path / "ours.jsonl") == [row | more for row in OURS]


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ([{"text": "1, 2"}], "row 1: has no prompt and completion, or messages; give --prompt-column"),
        ([OURS[0], {"prompt": "1", "completion": " "}], "row 2: key 'completion' must be text that is not empty"),
        ([of_messages(*TEXTS[0], SYSTEM, SYSTEM)], "row 1: messages must be one of the user and one of the assistant"),
        ([{"messages": [SYSTEM]}], "found system"),
        ([OURS[0] | {"decision_points": [1, 1]}], "key 'divergence_positions' must be a list of different integers"),
        ([[1, 2]], "row 1: expected an object, found list"),
    ],
)
def test_what_cannot_be_used_is_one_line(theirs, said, tmp_path):
    out = tmp_path / "ours.jsonl"
    assert said in refused(1 if "give --" not in said else 2, "import", lines(tmp_path, theirs), "--out", out)
    assert not out.exists()


def test_columns_are_named(tmp_path):
    theirs = lines(tmp_path, [{"ask": prompt, "say": completion} for prompt, completion in TEXTS])
    ok("import", theirs, "--out", tmp_path / "ours.jsonl", "--prompt-column", "ask", "--completion-column", "say")
    assert read_rows(tmp_path / "ours.jsonl") == OURS


def test_positions_are_held_against_the_tokens_that_they_were_counted_in(tmp_path):
    """A completion of n tokens has positions up to n, its end of turn, and what the template adds."""
    theirs, out = lines(tmp_path, [OURS[0] | {"decision_points": [0, 2]}]), tmp_path / "ours.jsonl"
    ok("import", theirs, "--out", out, "--model", MODEL)
    assert read_rows(out) == [OURS[0] | {"divergence_positions": [0, 2], "counted_in": chat(MODEL).identity}]
    beyond = lines(tmp_path, [OURS[0] | {"decision_points": [0, 400]}], "beyond.jsonl")
    assert "position 400 lies behind" in refused(1, "import", beyond, "--out", tmp_path / "x.jsonl", "--model", MODEL)


def test_a_data_set_goes_out_and_comes_back(tmp_path):
    """As parquet in a folder, as `save_to_disk` leaves one, as a CSV file: the same rows."""
    from datasets import load_dataset

    rows = [row | {"divergence_positions": [number]} for number, row in enumerate(OURS)]
    ok("export", lines(tmp_path, rows), "--out", tmp_path / "set")
    assert "| rows | 2 |" in (tmp_path / "set" / "README.md").read_text()
    found = load_dataset(str(tmp_path / "set"), split="train", cache_dir=str(tmp_path / "cache"))
    assert found.to_list() == rows
    found.save_to_disk(str(tmp_path / "disk"))
    found.remove_columns("divergence_positions").to_csv(str(tmp_path / "set.csv"))
    for source, same in (("set", rows), ("disk", rows), ("set.csv", OURS)):
        ok("import", tmp_path / source, "--out", tmp_path / f"{source}.jsonl")
        assert read_rows(tmp_path / f"{source}.jsonl") == same
    assert "--split: 'test' given; there are train" in refused(
        2, "import", tmp_path / "set", "--out", tmp_path / "y.jsonl", "--split", "test"
    )
