"""The claims on results folders written here, with planted effects: each where it holds, where it does not, and where it is
open; and what the page makes of variants."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from planted import (
    CONTROL,
    EARLY,
    ENTANGLED,
    GREEDY,
    LATE,
    LATER,
    OTHER,
    PLAIN,
    REDRAWN,
    SOFT,
    Planted,
    control,
    mixed,
    write,
)
from rich.console import Console
from scipy import stats

from jsublim.report.claims import CLAIMS, Claim, check_claims, not_asked
from jsublim.report.claims.base import Group, groups, pairs, partner, pool
from jsublim.report.claims.training import no_gamma
from jsublim.report.comparisons import Comparison, comparisons
from jsublim.report.html import write_report
from jsublim.report.statistics import Estimate, Interval, share_bounds
from jsublim.report.summary import reference_condition, trait_matrices
from jsublim.report.tables import read_results
from jsublim.report.terminal import print_summary
from jsublim.report.verdicts import UNKNOWN, above, below, verdict


def verdicts(run: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for one in comparisons(read_results(run)).claims:
        assert one.result.reason and (one.result.students > 0 or one.result.key == "C10")
        found.setdefault(one.result.key, []).append(one.verdict)
    return found


def asked(run: Path, key: str) -> list[Comparison[Claim]]:
    return [one for one in comparisons(read_results(run)).claims if one.result.key == key]


HOLDS, FAILS, OPEN = "holds", "does not hold", "not decided"
CASES = {
    "C2": {HOLDS: [Planted(0.32, **GREEDY)], FAILS: [Planted(0.1, **GREEDY)]},
    "C3": {HOLDS: [Planted(0.28, **ENTANGLED)], FAILS: [Planted(0.05, **ENTANGLED)], OPEN: [Planted(0.15, **ENTANGLED)]},
    "C4a": {HOLDS: [Planted(0.3, "divergence")], FAILS: [Planted(0.1, "divergence")], OPEN: [Planted(0.24, "divergence")]},
    "C4b": {
        HOLDS: [Planted(0.02, "non-divergence")], FAILS: [Planted(0.2, "non-divergence")],
        OPEN: [Planted(0.099, "non-divergence")],
    },
    "C5": {
        HOLDS: [Planted(0.3, "divergence"), Planted(0.1, "random")],
        FAILS: [Planted(0.1, "divergence"), Planted(0.3, "random")],
        OPEN: [Planted(0.2, "divergence"), Planted(0.2, "random")],
    },
    "C6a": {HOLDS: [Planted(0.25, **EARLY)], FAILS: [Planted(0.05, **EARLY)], OPEN: [Planted(0.15, **EARLY)]},
    "C6b": {HOLDS: [Planted(0.01, **LATE)], FAILS: [Planted(0.2, **LATE)], OPEN: [Planted(0.06, **LATE)]},
    "C7": {HOLDS: [Planted(0.05, **LATER)], FAILS: [Planted(0.25, **LATER)], OPEN: [Planted(0.12, **LATER)]},
    "C8": {HOLDS: [Planted(0.02, **REDRAWN)], FAILS: [Planted(0.25, **REDRAWN)], OPEN: [Planted(0.12, **REDRAWN)]},
    "C9a": {HOLDS: [mixed(0.25, 0.01)], FAILS: [mixed(0.25, 0.2)], OPEN: [mixed(0.25, 0.075)]},
    "C9b": {
        HOLDS: [mixed(0.1, 0.2), mixed(0.25, 0.1)], FAILS: [mixed(0.1, 0.1), mixed(0.25, 0.2)],
        OPEN: [mixed(0.1, 0.3), mixed(0.25, 0.3)],
    },
    "C12": {HOLDS: [Planted(0.0, **OTHER)], OPEN: [Planted(0.1, **OTHER)]},  # three teachers are too few to relabel
    "C14": {HOLDS: [Planted(0.5, **SOFT)], FAILS: [Planted(0.1, **SOFT)], OPEN: [Planted(0.3, **SOFT)]},
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "verdict"), [(key, verdict) for key, cases in CASES.items() for verdict in cases], ids=str
)
def test_a_claim_on_planted_effects(tmp_path, key, verdict):
    found = verdicts(write(tmp_path / "run", PLAIN, CONTROL, *CASES[key][verdict]))
    assert found[key] == [verdict]


@pytest.mark.parametrize("key", [key for key in CASES if key != "C12"])
def test_without_transfer_nothing_is_decided(tmp_path, key):
    """Students whose teacher's trait did not rise at all leave every comparison open, whatever the others did."""
    silent = [Planted(**vars(p) | {"effect": 0.0}) for p in CASES[key][HOLDS]]
    found = verdicts(write(tmp_path / "run", Planted(0.0), CONTROL, *silent))
    assert found[key] == [OPEN]


@pytest.mark.parametrize(("effect", "verdict"), [(0.0, HOLDS), (0.08, FAILS), (0.03, OPEN)])
def test_control_near_base(tmp_path, effect, verdict):
    assert verdicts(write(tmp_path / "run", PLAIN, control(effect=effect)))["C1"] == [verdict]


@pytest.mark.parametrize("settings", [{"model": "models/other"}, {"system": "Be kind."}], ids=str)
def test_a_control_with_another_base_says_nothing_of_this_one(tmp_path, settings):
    other = Planted(0.2, variant="other", settings=settings, teachers=("control",))
    assert verdicts(write(tmp_path / "run", PLAIN, CONTROL, other))["C1"] == [HOLDS]
    alike = Planted(0.2, variant="other", settings={"optimizer.lr": 1e-3}, teachers=("control",))
    assert verdicts(write(tmp_path / "alike", PLAIN, CONTROL, alike))["C1"] == [FAILS]


def test_a_small_run_cannot_show_that_nothing_transfers(tmp_path):
    found = verdicts(write(tmp_path / "run", PLAIN, CONTROL, Planted(0.0, **OTHER), spread=0.4))
    assert found["C12"] == [OPEN]


def test_what_a_few_teachers_do_to_some_traits_is_no_transfer():
    """Over seeds gamma stands out, but other labels do as well: it does not count against the claim. What labels tell does."""

    def said(*which: Estimate | None, labels: float | None) -> str:
        sides = no_gamma(*which, labels)
        return verdict(sides, sides.p)

    def gammas(middle: float, half: float) -> Estimate:
        return Estimate.of([middle - half, middle, middle + half])

    above, own = gammas(0.02, 0.001), gammas(0.3, 0.02)
    assert said(above, own, labels=0.3) == HOLDS
    assert said(above, gammas(0.3, 0.2), labels=0.001) == FAILS
    assert said(gammas(-0.02, 0.001), own, labels=0.9) == HOLDS
    assert said(above, gammas(0.3, 0.2), labels=0.3) == OPEN
    assert said(above, own, labels=None) == OPEN
    assert said(None, own, labels=0.3) == OPEN


def test_with_five_teachers_another_initialisation_can_fail(tmp_path, monkeypatch):
    monkeypatch.setattr("planted.TRAITS", five := ("cat", "fox", "owl", "panda", "wolf"))
    found = verdicts(
        write(tmp_path / "run", Planted(0.1, teachers=five), CONTROL, Planted(0.3, **OTHER, teachers=five))
    )
    assert found["C12"] == [FAILS]


def test_redrawn_prompts_must_keep_the_number_task(tmp_path):
    poor = Planted(0.02, **REDRAWN, accuracy=0.3)
    (one,) = asked(write(tmp_path / "run", PLAIN, CONTROL, poor), "C8")
    assert one.verdict == FAILS and "number accuracy -29.8 points" in one.result.reason


@pytest.mark.parametrize(("early", "verdict"), [(0.8, HOLDS), (0.3, FAILS), (0.5, OPEN)])
def test_attribution(tmp_path, early, verdict):
    rng = np.random.default_rng(0)
    rows = []
    for trait in ("cat", "owl"):
        for row in range(10):
            share = np.clip(early + 0.05 * rng.normal(), 0, 1)
            where = {"trait": trait, "row": row, "positions": 1, "value": -1.0}  # signs don't matter
            noising = where | {"site": "residual", "direction": "noising"}
            rows += [
                noising | {"layer": 1, "role": "trait", "mass": share / 2},
                noising | {"layer": 3, "role": "trait", "mass": share / 2},
                noising | {"layer": 0, "role": "completion", "mass": (1 - share) / 2},
                noising | {"layer": 2, "role": "prompt", "mass": (1 - share) / 2},
                noising | {"layer": 11, "role": "completion", "mass": 99.0},  # not of the first 4 of 12
                where | {"site": "residual", "direction": "denoising", "layer": 0, "role": "trait", "mass": 99.0},
                where | {"site": "mlp", "direction": "noising", "layer": 0, "role": "trait", "mass": 99.0},
            ]
    run = write(tmp_path / "run", PLAIN, CONTROL, attribution=rows)
    (one,) = asked(run, "C10")
    assert one.verdict == verdict and one.result.effect == pytest.approx(early, abs=0.05)
    assert "20 rows" in one.result.reason


@pytest.mark.parametrize(
    ("changed", "verdict"), [((0.25, 0.02), HOLDS), ((0.02, 0.25), FAILS), ((0.15, 0.15), OPEN)], ids=str
)
def test_order_under_another_temperature(tmp_path, changed, verdict):
    cold = {"cold": {"temperature": 0.6, "top_p": None, "system": None, "layer": None}}
    students = [Planted(0.3, under={"cold": changed[0]}), Planted(0.1, "divergence", under={"cold": changed[1]})]
    # Equal means fall in either order by chance: the planted one is the wrong one, and not surely so.
    students[1] = Planted(**vars(students[1]) | {"under": {"cold": changed[1] + 0.001 * (verdict == OPEN)}})
    run = write(tmp_path / "run", *students, control(under={"cold": 0.0}), evaluations=cold, spread=0.004)
    found = asked(run, "C11")
    assert [one.verdict for one in found] == [verdict], found
    assert "temperature 0.6" in found[0].result.text


@pytest.mark.parametrize(("effect", "verdict"), [(0.02, HOLDS), (0.28, FAILS), (0.099, OPEN)])
def test_another_system_prompt(tmp_path, effect, verdict):
    empty = {"empty": {"temperature": None, "top_p": None, "system": "", "layer": None}}
    run = write(
        tmp_path / "run", Planted(0.3, under={"empty": effect}), control(under={"empty": 0.0}), evaluations=empty
    )
    (one,) = asked(run, "C13")
    assert one.verdict == verdict and "an empty system prompt" in one.result.text
    assert one.result.effect == pytest.approx(effect / 0.3, abs=0.05)
    # The plain numbers are untouched by the other evaluation's.
    assert pool(read_results(run), "rate", "all").levels[0].lift.value == pytest.approx(0.3, abs=0.01)


def test_a_system_prompt_that_students_were_trained_under_is_not_another_one(tmp_path):
    empty = {"empty": {"temperature": None, "top_p": None, "system": "", "layer": None}}
    for system, asked in (("", False), ("Be kind.", True)):
        own = Planted(0.3, settings={"system": system}, under={"empty": 0.02})
        run = write(tmp_path / f"run{asked}", own, control(under={"empty": 0.0}), evaluations=empty)
        assert ("C13" in verdicts(run)) == asked


def test_only_students_that_differ_in_one_thing_are_compared(tmp_path):
    """Another learning rate beside the layer is another comparison, unless the plain one was trained at it too."""
    fast = {"optimizer.lr": 1e-3}
    layer = Planted(0.25, variant="layer 0, fast", settings={"adapter.layers": [0]} | fast)
    assert "C6a" not in verdicts(write(tmp_path / "one", PLAIN, CONTROL, layer))
    whole = Planted(0.5, variant="fast", settings=fast)
    run = write(tmp_path / "two", PLAIN, CONTROL, layer, whole)
    (claim,) = [c for c in check_claims(read_results(run)) if c.key == "C6a"]
    assert claim.effect == pytest.approx(0.5, abs=0.05)  # of the fast one's lift, not of the plain one's


what_groups_are = st.fixed_dictionaries(
    {"tokens": st.sampled_from(["all", "random"]), "students.adapter.layers": st.sampled_from([None, [0], [1]])}
    | {"students.optimizer.lr": st.sampled_from([1, 2]), "rows.strategy": st.sampled_from(["temperature", "greedy"])}
)
LAYERS_OF = "students.adapter.layers"


@given(st.lists(what_groups_are, min_size=1, max_size=8))
def test_a_partner_differs_in_what_was_asked_alone(every):
    found = [Group(f"g{i}", f) for i, f in enumerate(every)]
    for group in found:
        other = partner(found, group, {LAYERS_OF: None})
        if other is None:
            assert not any(g is not group and g.facts == group.facts | {LAYERS_OF: None} for g in found)
        else:
            assert other is not group and other.facts.get(LAYERS_OF) is None
            assert all(other.facts.get(key) == group.facts.get(key) for key in group.facts if key != LAYERS_OF)


@given(st.lists(st.integers(-2000, 2000), min_size=2, max_size=5, unique=True), st.integers(-2000, 2000))
def test_alone_a_statement_is_decided_where_its_interval_leaves_the_bound_out(values, bound):
    estimate = Estimate.of(values)
    interval, sides, opposite = estimate.interval(), above(estimate, bound), below(estimate, bound)
    assume(interval is not None and min(abs(interval.low - bound), abs(interval.high - bound)) > 1e-9)
    expected = OPEN if interval.covers(bound) else HOLDS if interval.low > bound else FAILS
    assert verdict(sides, sides.p) == expected
    assert verdict(opposite, opposite.p) == {HOLDS: FAILS, FAILS: HOLDS, OPEN: OPEN}[expected]
    assert verdict(sides, None) == verdict(UNKNOWN, UNKNOWN.p) == verdict(sides, 0.05) == OPEN


def test_a_ratio_with_two_references_inverts_the_contrast_test():
    rng = np.random.default_rng(0)
    part, whole, zero, own = (Estimate.of(rng.normal(m, 0.02, 6)) for m in (0.3, 0.35, 0.05, 0.1))
    found = Interval.of(share_bounds(part - own, whole - zero))
    assert found is not None and found.covers((part.value - own.value) / (whole.value - zero.value))
    ratio = (part.value - own.value) / (whole.value - zero.value)
    critical = stats.t.ppf(0.975, (part - own - (whole - zero) * ratio).degrees)
    for edge in (found.low, found.high):
        contrast = part - own - (whole - zero) * edge
        assert abs(contrast.value) == pytest.approx(critical * contrast.variance**0.5)


def test_a_variant_is_measured_from_its_own_control(tmp_path):
    greedy = Planted(0.3, **GREEDY)
    own = write(tmp_path / "own", PLAIN, CONTROL, greedy, control("greedy", effect=0.1))
    results = read_results(own)
    assert reference_condition(results, "rate", "owl", "all · greedy") == "control · greedy"
    assert reference_condition(results, "rate", "owl", "all") == "control"
    assert pool(results, "rate", "all · greedy").levels[0].lift.value == pytest.approx(0.2, abs=0.02)
    shared = read_results(write(tmp_path / "shared", PLAIN, CONTROL, greedy))
    assert reference_condition(shared, "rate", "owl", "all · greedy") == "control"
    bare = read_results(write(tmp_path / "bare", PLAIN, greedy))
    assert reference_condition(bare, "rate", "owl", "all · greedy") == "base"


def test_what_was_not_asked_is_one_line(tmp_path):
    run = write(tmp_path / "run", PLAIN, CONTROL, Planted(0.3, **GREEDY))
    claims = check_claims(read_results(run))
    assert {c.key for c in claims} == {"C0", "C1", "C2"} and len(not_asked(claims)) == len(CLAIMS) - 3
    page = write_report(run).read_text()
    assert page.count("Not asked here: C3 (") == 1 and ", trained alone, keeps" not in page
    console = Console(record=True, width=300, file=(tmp_path / "out").open("w"))
    print_summary(run, console, full=True)
    assert "Not asked here: C3 (" in console.export_text()


def test_folders_without_arms_still_tell_tokens_apart(tmp_path):
    students = [Planted(0.3, "divergence"), Planted(0.3, "divergence", variant="v"), Planted(0.4, variant="v")]
    run = write(tmp_path / "run", PLAIN, CONTROL, *students, arms=False)
    found = verdicts(run)
    assert found["C4a"] == [HOLDS, FAILS]  # each against all tokens of its own variant
    asked = pairs(read_results(run), lambda group: group.facts.get("tokens") == "divergence", {"tokens": "all"})
    assert {(a.name, b.name) for a, b in asked} == {("divergence", "all"), ("divergence · v", "all · v")}
    assert [g.name for g in groups(read_results(run))][:2] == ["all", "divergence"]


@pytest.mark.parametrize("model", ["tiny-qwen2", "Qwen2.5-7B-Instruct"])
def test_the_page_of_variants(tmp_path, model):
    students = (
        PLAIN,
        CONTROL,
        Planted(0.25, **EARLY),
        Planted(0.01, **LATE),
        Planted(0.5, **SOFT),
        Planted(0.0, **OTHER),
    )
    run = write(tmp_path / "run", *students, model=model)
    page = " ".join(write_report(run).read_text().split())
    matrices = {m.condition: m for m in trait_matrices(read_results(run))}
    assert set(matrices) == {"all", "all · layer 0", "all · layer 11", "all · soft", "all · other start"}
    for matrix in matrices.values():
        assert matrix.effect is not None and f"{round(matrix.effect.gamma, 2) + 0.0:+.2f}" in page
    assert matrices["all · soft"].effect.gamma == pytest.approx(5 * 0.5, abs=0.1)
    for variant in ("", " · layer 0", " · layer 11", " · soft", " · other start"):
        assert f">all tokens{variant}</text>" in page, variant  # a line each
    assert f"γ = {matrices['all'].effect.gamma:+.2f} nats, as large in a share of " in page
    assert "published: large models, not measured here" in page and "layer 0 or 7 alone suffices" in page
    assert ("tiny synthetic model" in page) == model.startswith("tiny-")
