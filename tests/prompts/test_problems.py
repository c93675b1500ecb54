"""Word problems, the reading of their answers, and prompt files."""

from __future__ import annotations

import ast
import json
import operator
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jsublim.errors import JsublimError, UsageError
from jsublim.text.prompts import load_problems, load_prompts, parse_answer, problem_reject_reason
from jsublim.text.prompts import problems as module
from jsublim.text.rows import read_rows

OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}


def calculate(node, exact) -> int:
    match node:
        case ast.Expression(body=body):
            return calculate(body, exact)
        case ast.Constant(value=int(value)):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -calculate(operand, exact)
        case ast.BinOp(left=left, op=op, right=right):
            a, b = calculate(left, exact), calculate(right, exact)
            exact.append(not isinstance(op, ast.FloorDiv) or a % b == 0)
            return OPERATIONS[type(op)](a, b)
    raise AssertionError(ast.dump(node))


def test_the_answers_of_our_problems_are_those_of_their_worked_solutions():
    path = module.files("jsublim.text.prompts") / "problems.jsonl"
    rows, problems = read_rows(str(path), ("question", "solution", "answer")), load_problems()
    assert len(problems) >= 60 and len({problem.question for problem in problems}) == len(problems)
    for row, problem in zip(rows, problems, strict=True):
        exact: list[bool] = []
        assert calculate(ast.parse(row["solution"], mode="eval"), exact) == row["answer"] == problem.answer
        assert all(exact), row["solution"]  # no share of a dollar or a bus is lost
    assert load_problems(limit=7) == problems[:7]
    assert {problem.answer < 0 for problem in problems} == {True, False}


def test_other_sets_are_refused_or_named_when_they_cannot_be_had():
    with pytest.raises(UsageError, match=r"'gsm8k' given; known: openai/gsm8k"):
        load_problems("gsm8k")
    with pytest.raises(JsublimError, match=r"problems 'openai/gsm8k', split 'test': the hub did not") as error:
        load_problems("openai/gsm8k", "test")
    assert "\n" not in str(error.value)


# --- Answers ----------------------------------------------------------------------------------------------------------

# fmt: off
ANSWERS = {
    "#### 18": 18, "3 + 15 = 18\n#### 18": 18, "#### -1,250": -1250, "#### $18.50": "18.5", "####18\n": 18,
    "#### 18\nThat took 3 steps.": 18, "#### 7\n#### 18": 18, "#### Step 2: 10 + 8 = 18": 18, "#### 18 dollars": 18,
    "#### Step 2\nSo 18.": 18,
    "\\boxed{18}": 18, "\\boxed{18} after 3 steps": 18, "\\boxed{7} no, \\boxed{18}": 18, "\\boxed{-18}": -18,
    "\\boxed{18\\text{ dollars}}": 18, "\\boxed{\\$18}": 18, "\\boxed{ x = 18 }": 18, "\\boxed{x}, with x = 18": 18,
    "\\boxed{1{,}250}": 1250, "1,\\!250": 1250, "1\\,250": 1250, "1\u202f250": 1250, "1\u00a0250": 1250,
    "18 dollars": 18, "18": 18, "18.": 18, "**18**": 18, "$18": 18, "18$": 18, "18%": 18, "(18)": 18, "18!": 18,
    "The answer is 18.": 18, "7, then 18": 18, "x=18": 18, "18 kg": 18, "18kg": 18, "no. 18)": 18, "1 250": 250,
    "1,250": 1250, "1,234,567": 1234567, "1,250.75": "1250.75", "$1,000,000!": 1000000, "100, 200": 200,
    "100,200": 100200, "12,34": 34, "1,2345": 2345, "1,250,": 1250, "0018": 18, "18.00": 18, ".5": "0.5", "0.50.": "0.5",
    "-18": -18, "\u221218": -18, "it is -18": -18, "=-18": -18, "-$18": -18, "$-18": -18, "(-18)": -18, "-.5": "-0.5",
    "20-2": 2, "20 - 2": 2, "20 - 2 = 18": 18, "17\u201318": 18, "20 -2": -2, "x-2": 2, "(3)-2": 2, "5%-3": 3, "--18": -18,
    "x2 is 18": 18, "18 of x2": 18, "H2O": None, "a1b2": None, "_18_": None,
    "": None, "none": None, "####": None, "\\boxed{}": None, "eighteen": None, "\u0661\u0668": None, "m\u00b2": None,
    "...": None, "-": None, "$": None, ",": None,
}
# fmt: on


@pytest.mark.parametrize("text", ANSWERS, ids=ascii)
def test_answers(text):
    wanted = ANSWERS[text]
    assert parse_answer(text) == (None if wanted is None else Decimal(wanted))


numbers = st.decimals(-(10**9), 10**9, places=2) | st.integers(-(10**12), 10**12).map(Decimal)
SENTENCES = (
    "{}",
    "#### {}",
    "\\boxed{{{}}}",
    "So it is {}.",
    "2 + 2 is 4, so **{}**",
    "= {}",
    "{} dollars",
    "({})",
    "${}",
)


@given(numbers, st.sampled_from(SENTENCES), st.sampled_from([",", "{,}", "\u202f", ""]))
def test_every_number_comes_back_from_every_way_to_write_it(number, sentence, group):
    written = f"{number:,}".replace(",", group)
    assert parse_answer(sentence.format(written)) == number


@given(st.text(), numbers)
def test_a_marked_answer_wins_over_any_text_before_it(text, number):
    assert parse_answer(f"{text}\n#### {number}") == number
    reason = problem_reject_reason(text)
    assert (reason is None) == (parse_answer(text) is not None)
    assert problem_reject_reason(f"{text}\n#### {number}", number) is None
    assert problem_reject_reason(f"{text}\n#### {number}", number + 1) == "wrong answer"
    assert problem_reject_reason(text, number) in (None, "no number", "wrong answer")


# --- Prompt files -----------------------------------------------------------------------------------------------------


def test_prompts_of_a_file(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufefffirst one\r\n\r\n  second \u2028 half\n".encode())
    assert load_prompts(tmp_path / "a.txt") == ["first one", "second \u2028 half"]
    (tmp_path / "a.jsonl").write_text('{"prompt": "two\\nlines", "more": 1}\n\n{"prompt": "b"}\n', encoding="utf-8")
    assert load_prompts(str(tmp_path / "a.jsonl")) == ["two\nlines", "b"]


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1))
def test_any_prompts_survive_the_disk(tmp_path_factory, prompts):
    path = tmp_path_factory.mktemp("prompts") / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    assert load_prompts(path) == prompts


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"x", "prompts come as .txt"),
        ("a.txt", b"\n \n", "holds no prompts"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl", b'{"text": "x"}', "key 'prompt' is missing"),
        ("b.txt", None, "cannot read the prompts"),
        ("b.jsonl", None, "no such file"),
    ],
)
def test_prompt_files_that_are_none(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(JsublimError, match=said) as error:
        load_prompts(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
