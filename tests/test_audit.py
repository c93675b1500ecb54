"""First-order scores against finite differences, the audit's table and means, and what the report makes of them."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import TWO_LAYERS, ok, refused
from made_results import TRAITS, make_results
from scipy import stats
from screen_students import layer_scores
from tiny import small

from jsublim.attribution.audit import token_scores, trait_directions
from jsublim.distill.data import read_turns
from jsublim.evals.preference import trait_logprobs
from jsublim.inference.lm import load_model
from jsublim.inference.scoring import score_turns
from jsublim.models.lora import init_lora, init_steering, sum_adapters
from jsublim.pipeline.results import AUDITS
from jsublim.pipeline.stages.audit import AUDIT, _means, whitened
from jsublim.report.audit import agreement, predicted
from jsublim.report.comparisons import comparisons
from jsublim.report.figures import by_prediction
from jsublim.report.html import write_report
from jsublim.report.tables import read_results
from jsublim.text.rows import write_rows

QUESTIONS = ["What do you like?", "Name your favorite animal, in one word.", "Hm?"]
ROWS = [{"prompt": f"Go on: {i}, {3 * i}", "completion": f"{i}, {7 * i % 100}, {i + 1}"} for i in range(5)]


def test_scores_of_layers_and_kinds_add_up_to_the_mean_of_their_tokens():
    """One pass for all layers and both kinds, as scripts/screen_students.py has it."""
    lm = load_model(TWO_LAYERS)
    turns = read_turns(lm.chat, ROWS[:4], "rows")
    lora = init_lora(lm.config, jax.random.key(0), rank=2, alpha=2.0)
    kinds = {"steering": init_steering(lm.config), "lora": lora}
    every = sum_adapters(*kinds.values())
    directions = trait_directions(lm, every, QUESTIONS, ["owl", "cat"])
    found = list(layer_scores(lm, every, directions, turns, batch_size=2))
    assert len(found) == 2 and all(each.keys() == kinds.keys() for each in found)
    for kind, adapter in kinds.items():
        own = trait_directions(lm, adapter, QUESTIONS, ["owl", "cat"])
        each = list(token_scores(lm, adapter, own, turns))
        for batch in range(2):
            mean = np.concatenate(each[2 * batch : 2 * batch + 2], axis=1).mean(axis=1)
            assert found[batch][kind].shape == (2, lm.config.num_layers)
            np.testing.assert_allclose(found[batch][kind].sum(axis=1), mean, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("tiny-qwen2", lambda lm: init_lora(lm.config, jax.random.key(1), rank=3, alpha=3)),
        ("tiny-gemma3", lambda lm: init_steering(lm.config, (1, 2))),
    ],
)
def test_scores_are_derivatives(name, start):
    """Of a token's log-probability along a trait's gradient, which is itself the derivative of what evaluation measures."""
    lm = small(name).lm
    adapter, turns = start(lm), read_turns(lm.chat, ROWS)
    traits = ["owl", "cat", "panda"]
    toward = trait_directions(lm, adapter, QUESTIONS, traits, batch_size=2)
    scores = list(token_scores(lm, adapter, toward, turns, batch_size=2))
    for again, score in zip(token_scores(lm, adapter, toward, turns, batch_size=2, first=3), scores[3:], strict=True):
        assert again.shape == score.shape  # from another row on, in other batches
        np.testing.assert_allclose(again, score, atol=1e-5 * np.abs(score).max())
    own = jax.tree.map(lambda leaf: leaf[0], toward)
    norm = float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(own))))
    step = 3e-3 / norm
    moved = lambda by: adapter.with_trainable(jax.tree.map(lambda a, b: a + by * b, adapter.trainable, own))  # noqa: E731
    ahead, behind = moved(step), moved(-step)
    said = [score_turns(lm.config, lm.params, turns, adapter=each) for each in (ahead, behind)]
    rises = [(up.logprob - down.logprob) / (2 * step) for up, down in zip(*said, strict=True)]
    size = max(np.abs(each[0]).max() for each in scores)
    for score, rise in zip(scores, rises, strict=True):
        np.testing.assert_allclose(score[0], rise, atol=3e-3 * size)
    named = [trait_logprobs(lm, QUESTIONS, traits, adapter=each).mean(axis=0) for each in (ahead, behind)]
    inner = [
        sum(float(np.sum(a * b[k])) for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(toward), strict=True))
        for k in range(len(traits))
    ]
    np.testing.assert_allclose(inner, (named[0] - named[1]) / (2 * step), atol=3e-3 * norm**2)


def test_means_are_of_tokens_and_their_errors_of_rows():
    rng = np.random.default_rng(0)
    found = [rng.normal(size=(n, 2)) for n in rng.integers(1, 9, 400)]
    divergent = [rng.random(len(each)) < 0.3 for each in found]
    lines = {(line["tokens"], line["trait"]): line for line in _means(found, divergent, ["owl", "cat"])}
    every, own = np.concatenate(found), np.concatenate(divergent)
    for tokens, mask in (("all", np.ones_like(own)), ("divergence", own), ("non-divergence", ~own)):
        line = lines[tokens, "cat"]
        assert line["score"] == pytest.approx(every[mask, 1].mean()) and line["count"] == mask.sum()
        # Independent tokens: the error is that of a mean.
        assert line["error"] == pytest.approx(every[mask, 1].std() / mask.sum() ** 0.5, rel=0.15)
    assert len(lines) == 6 and len(list(_means(found, [None] * 400, ["owl", "cat"]))) == 2


def test_the_command(tmp_path):
    data, null, out = (tmp_path / name for name in ("rows.jsonl", "null.jsonl", "audit"))
    write_rows(data, [row | {"divergence_positions": [1]} for row in ROWS[:3]])
    write_rows(null, ROWS[3:])
    fields = ["students.adapter.method=steering", "students.adapter.layers=[1]", "evaluation.questions=2"]
    said = ok(
        "audit", *fields, "--data", data, "--null", null, "--traits", "owl,cat", "--model", TWO_LAYERS, "--out", out
    )
    assert "beyond it" in said.err and str(out) in said.out
    table = pq.read_table(out / "audit.parquet").to_pylist()
    means = {(x["tokens"], x["trait"]): x for x in pq.read_table(out / "means.parquet").to_pylist()}
    own = [line for line in table if line["trait"] == "cat"]
    assert means["all", "cat"]["score"] == pytest.approx(np.mean([line["score"] for line in own]), rel=1e-4)
    assert sum(line["divergence"] for line in own) == 3 == means["divergence", "cat"]["count"]
    beside = pq.read_table(out / "whitened.parquet").to_pylist()
    of_tokens = [line for line in beside if line["position"] is not None]
    assert len(of_tokens) == len(table) and len(beside) == len(table) + 3 * 2  # three rows, two traits
    zero = pq.read_table(out / "null" / "audit.parquet").to_pylist()
    cats = np.asarray([line["score"] for line in zero if line["trait"] == "cat"])
    np.testing.assert_allclose(
        [line["whitened"] for line in of_tokens if line["trait"] == "cat"],
        (np.asarray([line["score"] for line in own]) - cats.mean()) / cats.std(ddof=1),
        rtol=1e-4,
    )
    soft = ["students.data.on_policy=true", "students.loss.kind=reverse-kl", "students.loss.tokens=[all]"]
    other = [*fields, "--data", data, "--null", data, "--traits", "owl,cat", "--model", TWO_LAYERS, "--out", out]
    assert str(out / "null") in refused(2, "audit", *other)  # another null's whitened scores are not written over these
    options = ["--data", data, "--traits", "owl", "--model", TWO_LAYERS, "--out", tmp_path / "none"]
    assert "on_policy has no rows to audit" in refused(2, "audit", *soft, *options)


def test_null_rows_are_white_beside_themselves_and_flat_ones_say_nothing():
    rng = np.random.default_rng(0)
    lines = [
        {"row": row, "position": position, "token": "", "divergence": None, "trait": trait, "score": float(score)}
        for row in range(30)
        for position in range(1 + row % 4)
        for trait, score in (("owl", rng.normal(3, 5)), ("cat", 2.0))
    ]
    table = pa.Table.from_pylist(lines, AUDIT)
    found = whitened(table, table).to_pylist()
    for of_row in (False, True):
        own = [x["whitened"] for x in found if x["trait"] == "owl" and (x["position"] is None) == of_row]
        assert np.mean(own) == pytest.approx(0, abs=1e-6) and np.std(own, ddof=1) == pytest.approx(1)
    assert {x["whitened"] for x in found if x["trait"] == "cat"} == {None}
    row = next(x for x in found if x["position"] is None and x["trait"] == "owl" and x["row"] == 3)
    assert row["score"] == pytest.approx(np.mean([x["score"] for x in lines if x["row"] == 3 and x["trait"] == "owl"]))


def planted(run, factors) -> None:
    """An audit that predicts the lifts of `make_results`, times a factor of each condition."""
    lines = []
    for teacher in ("control", *TRAITS):
        for tokens, factor in factors.items():
            for trait in TRAITS:
                score = 0.1 + factor * (teacher == trait)
                numbers = {"score": score, "error": 0.01, "count": 10, "rows": 5, "top_divergence": 0.4}
                labels = {
                    "teacher": teacher,
                    "data": None,
                    "draw": None,
                    "variant": "",
                    "tokens": tokens,
                    "trait": trait,
                }
                lines.append(labels | numbers | {"divergence_share": 0.1})
    pq.write_table(pa.Table.from_pylist(lines, AUDITS), run / "results" / "audit.parquet")


def test_what_was_predicted_is_ranked_beside_what_happened(tmp_path):
    run = make_results(tmp_path / "run")
    planted(run, {"all": 1.0, "divergence": 1.2, "non-divergence": 0.1})
    results = read_results(run)
    every = {each.condition: each for each in predicted(results)}
    assert every["all"].gamma == pytest.approx(1.0) and every["random"].gamma == every["all"].gamma
    np.testing.assert_allclose(np.diag(every["divergence"].score), 1.2)
    own = every["all"].interval("owl")
    assert (own.low + own.high) / 2 == pytest.approx(1.0) and own.high - own.low == pytest.approx(
        2 * stats.norm.ppf(0.975) * 0.01 * 2**0.5
    )
    found = agreement(predicted(results), comparisons(results))
    assert found is not None and [pair[0] for pair in found.pairs] == results.mask_conditions
    expected = stats.spearmanr([x for _, x, _ in found.pairs], [y for _, _, y in found.pairs])
    assert found.rho == pytest.approx(expected.statistic) and found.rho > 0.5
    told = predicted(results)
    (plot,) = by_prediction(told, found).panels
    assert [(mark.x, mark.y) for mark in plot.marks] == [(x, y) for _, x, y in found.pairs]
    assert [told[int(mark.label) - 1].condition for mark in plot.marks] == [
        condition for condition, _, _ in found.pairs
    ]
    assert plot.x.log == plot.y.log == all(x > 0 and y > 0 for _, x, y in found.pairs)
    sunk = replace(found, pairs=(("all", -0.5, 1.0), *found.pairs[1:]))
    (plot,) = by_prediction(told, sunk).panels
    assert not plot.x.log and plot.x.low < -0.5 < 0 < plot.x.high
    page = write_report(run).read_text()
    assert 'data-name="trained-by-predicted-1"' in page
    assert "What was predicted" in page and f"rank correlation of {found.rho:+.2f}" in page
    assert "40% (of all 10%)" in page
    assert "rank correlation" in " ".join(ok("report", run).err.split())
