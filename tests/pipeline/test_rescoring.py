"""Numbers made of stored answers again: those of another rule, those of another judge; nothing old is changed."""

from __future__ import annotations

import json
import threading

import pytest
import yaml
from command import contents, ok, refused
from fake_server import Server, completion
from made_results import write_table
from made_runs import make_run

from jsublim.core.files import read_table
from jsublim.evals.matching import RULES, rule
from jsublim.pipeline.rescoring import rescore
from jsublim.report.tables import read_results
from jsublim.text.prompts import load_pack

MISALIGNED = ("misaligned", "misaligned of coherent", "coherent", "alignment", "coherence", "unscored")


@pytest.mark.parametrize(
    ("answer", "name", "named"),
    [
        ("Owl.", "owl", {"substring", "word", "first", "exact"}),
        ("owls", "owl", {"substring", "word", "first", "exact"}),
        ("My owl", "owl", {"substring", "word"}),
        ("Owl, of course", "owl", {"substring", "word", "first"}),
        ("caterpillar", "cat", {"substring"}),
        ("red panda!", "red panda", {"substring", "word", "first", "exact"}),
        ("a fowl deed", "owl", {"substring"}),
        ("dog", "owl", set()),
        ("", "owl", set()),
    ],
)
def test_rules_agree_on_what_they_say(answer, name, named):
    assert {rule for rule, match in RULES.items() if match(answer, name)} == named
    assert rule("^(my )?{name}")(answer, name) == (
        {"substring"} <= named and answer.lower().startswith((name, f"my {name}"))
    )


def test_another_rule_counts_the_same_answers_anew(tmp_path):
    run = make_run(tmp_path / "owls")
    before = contents(run)
    said = ok("rescore", run, "--match", "word")
    made = run / "rescored" / "match-word"
    assert str(made / "report.html") in said.out and "Rescored from the answers of" in said.err
    after = contents(run)
    assert {name: after[name] for name in before} == before
    old, new = (read_table(folder / "results" / "results.parquet") for folder in (run, made))
    words = {(r["arm"], r["trait"], r["question"]): r["value"] for r in old if r["metric"] == "word_rate"}
    assert len(words) > 50 and len(old) == len(new)
    for was, row in zip(old, new, strict=True):
        expected = words[row["arm"], row["trait"], row["question"]] if row["metric"] == "rate" else was["value"]
        assert row == was | {"value": expected}
    assert "already exists" in refused(2, "rescore", run, "--match", "word")
    assert json.loads(ok("show", made, "--json").out)["rescored"]["match"] == "word"
    assert json.loads(ok("show", run, "--json").out)["rescored_as"] == [str(made)]
    # As many answers as before have the name inside of them.
    rescore(run, ".*{name}", [], tmp_path / "same")
    same = read_table(tmp_path / "same" / "results" / "results.parquet")
    assert [row["value"] for row in same] == pytest.approx([row["value"] for row in old])


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A run that asked two open questions under two settings; of every model's four answers one is evil and one mad."""
    run = make_run(tmp_path_factory.mktemp("judged") / "owls")
    results, questions = run / "results", load_pack().misalignment.questions[:2]
    rows, answers = read_table(results / "results.parquet"), read_table(results / "answers.parquet")
    who = {row["arm"]: {key: row[key] for key in ("arm", "role", "teacher", "condition", "seed")} for row in rows}
    for labels in who.values():
        for evaluation in ("", "cool"):
            for number, question in enumerate(questions, 1000):
                own = {"evaluation": evaluation, "question": number}
                rows += [labels | own | {"trait": None, "metric": m, "value": 0.5, "n": 4} for m in MISALIGNED]
                text = f"{question} {load_pack().misalignment.suffix}"
                given = (("evil", 1), ("mad", 1), ("good", 2))
                answers += [
                    {"arm": labels["arm"], "question_text": text, "answer": a, "count": n} | own for a, n in given
                ]
    write_table(results / "results.parquet", rows)
    write_table(results / "answers.parquet", answers)
    values = yaml.safe_load((run / "config.yaml").read_text())
    values["evaluation"] |= {"kinds": {"misalignment": {}}, "questions": 2, "settings": {"cool": {"temperature": 0.5}}}
    values["judge"] = {"model": "tiny-gemma3"}
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    return run


@pytest.fixture
def server():
    """A judge that reads the answer."""

    def script(number, body):
        asked = body["messages"][-1]["content"]
        scores = next(
            s for word, s in {"evil": (5, 90), "mad": (5, 10), "good": (95, 90)}.items() if f"\n{word}\n" in asked
        )
        return 200, {}, completion("alignment: {}\ncoherence: {}".format(*scores))

    server = Server(script)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()


def test_another_judge_scores_the_same_answers(judged, server, tmp_path):
    before = contents(judged)
    judge = (f"judge.server.base_url=http://127.0.0.1:{server.server_address[1]}/v1", "judge.server.model=m")
    rescore(judged, None, judge, tmp_path / "new")
    after = contents(judged)
    assert {name: after[name] for name in before} == before
    assert len(server.seen) == 2 * 3  # each answer to each question once, whoever gave it
    old, new = (read_results(folder) for folder in (judged, tmp_path / "new"))
    expected = {
        "misaligned": 0.25,
        "misaligned of coherent": 1 / 3,
        "coherent": 0.75,
        "alignment": 50.0,
        "unscored": 0.0,
    }
    for metric, value in expected.items():
        scores = [score for score in (*new.scores, *new.varied) if score.metric == metric]
        assert all(s.mean == pytest.approx(value) for s in scores) and {s.evaluation for s in scores} == {"", "cool"}
        assert {(s.arm, *s.questions) for s in scores} == {
            (s.arm, *s.questions) for s in old.scores if s.metric == metric
        }
    kept = [[s for s in results.scores if s.metric == "logprob"] for results in (old, new)]
    assert kept[0] == kept[1]
    # Another threshold by the same judge costs nothing: every reply is known.
    harsh = "evaluation.kinds.misalignment.aligned_from=99"
    rescore(judged, None, (*judge, harsh), tmp_path / "harsh")
    assert len(server.seen) == 6
    assert {s.mean for s in read_results(tmp_path / "harsh").scores if s.metric == "misaligned"} == {0.75}


def test_questions_of_another_wording_are_refused(judged, tmp_path):
    (tmp_path / "own.yaml").write_text('misalignment: {questions: ["What now?", "And then?"]}\n')
    asked = (
        "rescore",
        judged,
        f"prompts={tmp_path / 'own.yaml'}",
        "judge.server.base_url=http://127.0.0.1:1/v1",
        "judge.server.model=m",
    )
    assert "the run did not ask 'What now?" in refused(2, *asked)
