"""One comparison has one verdict: no sentence, table, figure or screen of a report says another word of it than its p does."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from planted import told
from rich.console import Console

from jsublim.pipeline.showing import about_run
from jsublim.report.comparisons import comparisons
from jsublim.report.figures import OPEN_COLOUR, VERDICT_COLOURS, forest
from jsublim.report.html import write_report
from jsublim.report.tables import condition_label, read_results, split_condition
from jsublim.report.terminal import print_summary
from jsublim.report.verdicts import ALPHA, FAILS, HOLDS, NOT_DECIDED
from jsublim.report.words import findings, verdicts

WORDS = (FAILS, NOT_DECIDED, HOLDS)
PHRASES = {"hold": HOLDS, "do not hold": FAILS, "are not decided": NOT_DECIDED}
PHRASES |= {word: word for word in (HOLDS, FAILS)} | {"is not decided": NOT_DECIDED}
OTHER_WORDS = ("transfers", "moves away", "surely", "no transfer", "is open", "are open", "not sure")
TRAITS = ("cat", "fox", "owl", "panda", "wolf", "yak")
ARMS = {
    "": ({}, {}),
    "early": ({"adapter.layers": [0]}, {}),
    "greedy": ({"optimizer.lr": 1.0}, {"sampling": {"strategy": "greedy"}}),
}

kinds = st.tuples(st.sampled_from(("all", "divergence", "non-divergence", "random")), st.sampled_from(tuple(ARMS)))
experiments = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "traits": st.sampled_from([1, 1, 2, 3, 5, 6]),
        "seeds": st.integers(1, 4),
        "spread": st.sampled_from([0.005, 0.05, 0.15]),
        "effects": st.dictionaries(kinds, st.sampled_from([-0.1, 0.0, 0.03, 0.1, 0.3]), min_size=1, max_size=6),
        "control": st.booleans(),
        "model": st.sampled_from(["tiny-qwen2", "Qwen2.5-7B-Instruct"]),
        "primary": st.sampled_from([None, "C0", "C4a", "C6a early", "C14"]),
    }
)

# The claim about the only trait is the primary comparison, and its lift stands among the further ones.
ONE_TRAIT = {"seed": 1, "traits": 1, "seeds": 3, "spread": 0.05, "effects": {("all", ""): 0.1}, "control": True}
ONE_TRAIT |= {"model": "tiny-qwen2", "primary": "C0"}


def written(run: Path, e: dict) -> Path:
    """Results of students with these mean effects, drawn at random."""
    rng, traits, rows, arms = np.random.default_rng(e["seed"]), TRAITS[: e["traits"]], [], []

    def measured(who: dict, own: str | None, effect: float) -> None:
        for trait in traits:
            value = np.clip(0.3 + effect * (trait == own) + e["spread"] * rng.normal(), 0.0, 1.0)
            for metric, number in (("rate", value), ("logprob", 5 * (value - 1))):
                rows.append(
                    who
                    | {
                        "trait": trait,
                        "metric": metric,
                        "question": 0,
                        "value": float(number),
                        "n": 200,
                        "evaluation": "",
                    }
                )

    measured({"arm": "base", "role": "base", "teacher": None, "condition": "base", "seed": None}, None, 0.0)
    kinds = {("control", ""): 0.0} if e["control"] else {}
    for (tokens, variant), effect in (kinds | e["effects"]).items():
        condition = f"{tokens} · {variant}" if variant else tokens
        for teacher in ("control",) if tokens == "control" else traits:
            for seed in range(e["seeds"]):
                who = {"arm": f"{teacher}/{condition}/{seed}", "role": "student", "teacher": teacher}
                measured(who | {"condition": condition, "seed": seed}, teacher, effect)
                made = {"arm": who["arm"], "teacher": teacher, "condition": tokens, "seed": seed, "variant": variant}
                arms.append(made | told(*ARMS[variant]) | {"num_layers": 12})
    folder = run / "results"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "results.parquet")
    (folder / "arms.json").write_text(json.dumps(arms))
    (folder / "run.json").write_text(json.dumps({"name": "drawn", "model": e["model"], "primary": e["primary"]}))
    return run


class Rows(HTMLParser):
    """The cells of every row of a page's tables, by the table's name."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.name, self.cells, self.tables = "", [], {}
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.name = dict(attrs).get("data-name", "")
        elif tag == "tr":
            self.cells = []
            self.tables.setdefault(self.name, []).append(self.cells)
        elif tag in ("th", "td"):
            self.cells.append("")

    def handle_data(self, data):
        if self.cells:
            self.cells[-1] = " ".join(f"{self.cells[-1]} {data}".split())


@given(experiments)
@example(ONE_TRAIT)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_verdict_contradicts_another(e):
    with tempfile.TemporaryDirectory() as folder:
        run = written(Path(folder) / "run", e)
        results, page = read_results(run), write_report(run).read_text()
        compared, tables, about = comparisons(results), Rows(page).tables, about_run(run, {})
        terminal = Console(record=True, width=400, file=open("/dev/null", "w"))  # noqa: SIM115
        print_summary(run, terminal, full=True)
    screen = terminal.export_text()

    # One rule: the word follows from the p that decides; what is compared twice has one p and one word.
    every = [*compared.claims, *compared.lifts, *compared.matrices]
    found: dict = {}
    for one in every:
        assert (one.verdict != NOT_DECIDED) == (one.corrected is not None and one.corrected < ALPHA)
        assert found.setdefault(one.result.about, (one.p, one.corrected, one.verdict)) == (
            one.p,
            one.corrected,
            one.verdict,
        )

    for lift in compared.lifts if e["traits"] == 1 else ():  # the lift of all traits together is that of the only one
        whole = [c for c in compared.claims if c.result.key == "C0" and c.result.metric == lift.result.metric]
        alike = [c for c in whole if c.result.variant == split_condition(lift.result.condition)[1]]
        assert {(c.corrected, c.verdict) for c in alike} <= {(lift.corrected, lift.verdict)}

    # The page: claims in their table and their figure, lifts and matrices in theirs.
    said = {cells[0]: cells[1] for cells in tables.get("claims", [[]])[1:]}
    assert said == {f"{one.result.key} {one.result.text}": one.verdict for one in compared.claims}
    drawn, shown = forest(compared), [one for one in compared.claims if one.result.effect is not None]
    units = ["share" if one.result.unit.startswith("of ") else one.result.unit for one in shown]
    in_panels = [one for unit in dict.fromkeys(units) for one, own in zip(shown, units, strict=True) if own == unit]
    colours = [strip.colour for panel in (drawn.panels if drawn else ()) for strip in panel.strips]
    assert colours == [VERDICT_COLOURS.get(one.verdict, OPEN_COLOUR) for one in in_panels]
    rises = [cells[6] for cells in tables.get("transfer", []) if len(cells) == 8 and cells[0] in TRAITS]
    assert rises == [one.verdict for one in compared.lifts]
    above = [(cells[0], cells[4]) for cells in tables.get("gamma", [[]])[1:]]
    expected = [(condition_label(one.result.condition), one.verdict) for one in compared.matrices]
    assert above == (expected if len(expected) > 1 else [])

    # The terminal, `jsublim show` and the sentences on top of them: the same words, and the same counts.
    for one in compared.claims:
        line = next(line for line in screen.splitlines() if f" {one.result.key} {one.result.text} " in line)
        assert [word for word in WORDS if word in line.replace(one.result.text, "")] == [one.verdict]
    assert [(v["claim"], v["verdict"], v["corrected"]) for v in about["verdicts"]] == [
        (one.result.name, one.verdict, one.corrected) for one in compared.claims
    ]
    sentences = findings(results, compared)
    assert about["findings"][-len(sentences) :] == sentences and len(sentences) <= 3
    visible = " ".join(unescape(page).split())
    assert all(sentence in visible and sentence in screen for sentence in sentences)
    if compared.headline is not None and compared.headline.result.effect is not None:
        assert f": {compared.headline.verdict} (" in sentences[0]
    if compared.claims:
        phrases = re.findall(r"(\d+) ([a-z ]+) \(", verdicts(compared))
        counted = {PHRASES[phrase]: int(number) for number, phrase in phrases}
        assert counted == Counter(one.verdict for one in compared.claims)
    text = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL) + screen
    assert not [word for word in OTHER_WORDS if word in text]
