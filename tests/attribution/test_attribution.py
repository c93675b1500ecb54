"""The attribution stage against its parts, its table after a kill, its figure and share by hand, and its command."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import contents, ok, refused
from tiny import bundled, chat, small

from jsublim.attribution.pairs import NO_DIVERGENCE, find_pairs
from jsublim.attribution.patching import DIRECTIONS, SITES, attribution_patching, layer_patching
from jsublim.attribution.roles import ROLES, token_roles
from jsublim.config.attribution import Attribution
from jsublim.core.progress import no_tick
from jsublim.errors import JsublimError, UsageError
from jsublim.inference.teachers import CONTROL, Teacher, prompted_teacher
from jsublim.pipeline.stages.attribution import ATTRIBUTION, attribute_rows
from jsublim.pipeline.store import Artifact, Output
from jsublim.report.attribution import attribution_heats, early_share
from jsublim.text.prompts import load_pack, number_prompts
from jsublim.text.rows import write_rows

PACK = load_pack()


# --- The stage ------------------------------------------------------------------------------------------------------------

OWL, CAT, DOG = (Teacher(name, f"Love {name}s.") for name in ("owl", "cat", "dog"))
ROWS = [
    {"prompt": str(i), "completion": f"{i}, {i + 1}", "divergence_positions": [] if i == 2 else [i % 3, 3]}
    for i in range(6)
]
STAGE = {"steps": 2, "batch_size": 2, "chunk": 2}


def attribute(
    artifact: Artifact, *arguments: Any, tick: Callable[[int], None] = no_tick, chunk: int = 16, **options: Any
) -> None:
    context, how = SimpleNamespace(artifact=artifact, tick=tick, say=print), {"sites": list(SITES)} | options
    save = attribute_rows(context, *arguments, Attribution.model_validate(how), chunk=chunk)
    artifact.finish(save(artifact.path))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Artifact:
    artifact = Artifact(tmp_path_factory.mktemp("whole") / "a", Output("attribution", "owl", {}))
    attribute(artifact, small("tiny-qwen2").lm, ROWS, OWL, [CAT, DOG], **STAGE)
    return artifact


def test_the_stage_sums_attributions_by_role(whole, assert_close):
    lm, table = small("tiny-qwen2").lm, pq.read_table(whole.path / "attribution.parquet")
    assert table.schema.equals(ATTRIBUTION)
    pairs, skipped = find_pairs(lm, ROWS, OWL, [CAT, DOG])
    used = sorted({pair.row for pair in pairs})
    assert len(table) == len(used) * len(SITES) * len(DIRECTIONS) * lm.config.num_layers * len(ROLES)
    summary = whole.summary
    assert (summary["rows"], summary["used"], summary["pairs"]) == (6, len(used), len(pairs))
    assert summary["skipped"] == skipped and len(used) + sum(skipped.values()) == 6
    lines = table.to_pylist()
    keys = {(x["row"], x["site"], x["direction"], x["layer"], x["role"]): x for x in lines}
    assert len(keys) == len(lines)
    for direction in DIRECTIONS:
        how = {"direction": direction, "batch_size": 2}
        values = attribution_patching(lm.config, lm.params, pairs, steps=2, **how)
        effects = layer_patching(lm.config, lm.params, pairs, **how)
        errors = []
        for row in used:
            mine = [i for i, pair in enumerate(pairs) if pair.row == row]
            errors.append(np.mean([np.abs(values[i].sum(-1) - effects[i]) for i in mine], axis=0))
            # A row's counterfactuals may diverge at different places: each has its own roles.
            roles = [np.asarray(token_roles(lm.chat, OWL, ROWS[row], "owl", values[i].shape[-1] - 1)) for i in mine]
            assert {"system", "trait", "prompt", "divergence position", "template"} <= set(roles[0])
            for s, site in enumerate(SITES):
                of = [[keys[row, site, direction, n, role] for role in ROLES] for n in range(lm.config.num_layers)]
                counts = np.mean([[(own == role).sum() for role in ROLES] for own in roles], axis=0)
                assert [x["positions"] for x in of[0]] == counts.tolist()
                sums, masses = (
                    np.mean(
                        [
                            [f(values[i])[s][:, own == role].sum(1) for role in ROLES]
                            for i, own in zip(mine, roles, strict=True)
                        ],
                        0,
                    ).T
                    for f in (np.asarray, np.abs)
                )
                assert_close([[x["value"] for x in y] for y in of], sums, 1e-4)
                assert_close([[x["mass"] for x in y] for y in of], masses, 1e-4)
        scale = np.mean(
            [np.mean([np.abs(effects[i]) for i, p in enumerate(pairs) if p.row == r], 0) for r in used], (0, 2)
        )
        assert_close(list(summary["completeness_error"][direction].values()), np.mean(errors, (0, 2)) / scale, 1e-3)


def test_counterfactuals_of_a_row_may_diverge_at_different_places(tmp_path):
    lm, how = bundled("tiny-qwen2").lm, {"sites": ["residual"], "directions": ["noising"], "steps": 1}
    row = {"prompt": number_prompts(3, seed=5)[2], "completion": "1, 2", "divergence_positions": [1, 3]}
    owl, cat, dog = (Teacher(name, f"You love {name}s.") for name in ("owl", "cat", "dog"))
    one, two = find_pairs(lm, [row], owl, [cat, dog])[0]
    assert len(two.clean) == len(one.clean) + 2
    both, alone = {}, {}
    for folder, into, others in (("both", both, [[cat, dog]]), ("alone", alone, [[cat], [dog]])):
        for named in others:
            artifact = Artifact(tmp_path / folder / named[0].name, Output("attribution", "owl", {}))
            attribute(artifact, lm, [row], owl, named, **how)
            for line in pq.read_table(artifact.path / "attribution.parquet").to_pylist():
                into.setdefault((line["layer"], line["role"]), []).append(
                    [line["value"], line["mass"], line["positions"]]
                )
    for key, (together,) in both.items():
        np.testing.assert_allclose(together, np.mean(alone[key], axis=0), rtol=1e-3, atol=1e-4)


def test_a_stopped_stage_goes_on_to_the_same_table(whole, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    lm, artifact, seen = small("tiny-qwen2").lm, Artifact(tmp_path / "b", Output("attribution", "owl", {})), []

    def die(n: int) -> None:
        seen.append(n)
        if len(seen) == 3:  # what is skipped, then two chunks
            raise Killed

    with pytest.raises(Killed):
        attribute(artifact, lm, ROWS, OWL, [CAT, DOG], tick=die, **STAGE)
    progress = artifact.path / "progress.jsonl"
    lines = progress.read_bytes().splitlines(keepends=True)
    progress.write_bytes(b"".join(lines[:-1]) + lines[-1][:50])  # a kill within a line
    computed = []
    compute = attribution_patching
    monkeypatch.setattr(
        "jsublim.pipeline.stages.attribution.attribution_patching",
        lambda *args, **how: computed.extend({pair.row for pair in args[2]}) or compute(*args, **how),
    )
    total = []
    attribute(artifact, lm, ROWS, OWL, [CAT, DOG], tick=total.append, **STAGE)
    assert json.loads(lines[0])["row"] not in computed and sum(total) == len(ROWS)
    table = "attribution.parquet"
    assert (artifact.path / table).read_bytes() == (whole.path / table).read_bytes()
    assert artifact.summary == whole.summary
    assert not progress.exists()


def test_what_the_stage_refuses(tmp_path):
    lm, artifact = small("tiny-qwen2").lm, Artifact(tmp_path / "a", Output("attribution", "owl", {}))
    with pytest.raises(UsageError, match="trait 'control': the teacher's system prompt does not name it"):
        attribute(artifact, lm, ROWS, Teacher(CONTROL), [CAT])
    with pytest.raises(JsublimError, match="rows: none of 1 rows can be compared with a counterfactual"):
        attribute(artifact, lm, ROWS[2:3], OWL, [CAT])
    assert not artifact.done


# --- Figure, claim and command ----------------------------------------------------------------------------------------------


def made_table(mass, sites=("residual", "mlp"), layers=6, rows=2) -> pa.Table:
    lines = [
        {"trait": "owl", "row": row, "site": site, "direction": direction, "layer": layer, "role": role,
         "value": 0.0, "mass": float(mass(row, site, direction, layer, role)), "positions": 1}
        for row in range(rows) for site in sites for direction in DIRECTIONS for layer in range(layers) for role in ROLES
    ]  # fmt: skip
    return pa.Table.from_pylist(lines, ATTRIBUTION)


def test_early_share_is_the_trait_tokens_mass_in_the_first_third():
    def mass(row, site, direction, layer, role):
        weight = 3 + row if role == "trait" and layer < 2 else 1
        return weight if site == "residual" and not (row == 1 and direction == "denoising") else 0

    shares = early_share(made_table(mass))
    assert [(s.trait, s.row, s.direction) for s in shares] == [
        ("owl", 0, "denoising"), ("owl", 0, "noising"), ("owl", 1, "noising")
    ]  # fmt: skip
    n = len(ROLES) - 1
    for share, weight in zip(shares, (3, 3, 4), strict=True):
        assert share.of_early == pytest.approx(weight / (weight + n))
        assert share.of_all == pytest.approx(2 * weight / (2 * (weight + n) + 4 * (n + 1)))


def test_the_heat_map_shows_each_panels_shares():
    table = made_table(lambda *key: np.random.default_rng([*map(ord, str(key))]).random())
    maps = attribution_heats(table)
    assert {heat.title for heat in maps} == {
        "residual, noising", "mlp, noising", "residual, denoising", "mlp, denoising"
    }  # fmt: skip
    limit, darkest = 0.0, []
    for heat in maps:
        site, direction = heat.title.split(", ")
        mine = [x for x in table.to_pylist() if (x["site"], x["direction"]) == (site, direction)]
        total = sum(x["mass"] for x in mine)
        assert heat.columns == ROLES and [heading for heading, _ in heat.rows] == [str(layer) for layer in range(6)]
        for layer, (_, cells) in enumerate(heat.rows):
            for role, cell in zip(ROLES, cells, strict=True):
                share = 100 * sum(x["mass"] for x in mine if (x["layer"], x["role"]) == (layer, role)) / total
                assert cell.text == f"{share:.1f}"
                darkest, limit = (cell, share) if share > limit else (darkest, limit)
    assert darkest.fill == "#081d58" and darkest.ink == "#ffffff"  # one scale for all maps


def test_the_command(tmp_path):
    rows = [
        {"prompt": p, "completion": "7, 8", "divergence_positions": [] if i == 1 else [0, 2]}
        for i, p in enumerate(number_prompts(3))
    ]
    lm, data, out = small("tiny-qwen2").lm, tmp_path / "rows.jsonl", tmp_path / "attribution"
    write_rows(data, rows)
    call = ("attribute", "attribution.sites=[residual]", "attribution.directions=[noising]", "attribution.batch_size=2",
            "--model", lm.folder, "--data", data, "--trait", "cat", "--counterfactuals", "dog,owl", "--out", out)  # fmt: skip
    said = ok(*call, "attribution.steps=1")
    assert "2 of 3 rows used" in said.err and NO_DIVERGENCE in said.err and said.out.split() == [str(out)]
    table = pq.read_table(out / "attribution.parquet")
    assert set(table["trait"].to_pylist()) == {"cat"} and set(table["row"].to_pylist()) == {0, 2}
    teacher = prompted_teacher(PACK, "cat")
    positions = sum(x["positions"] for x in table.to_pylist() if x["row"] == 0 and x["layer"] == 0)
    assert positions == lm.chat.turn(teacher.messages(rows[0]["prompt"]), "7, 8").content
    before = contents(out)
    assert before["heat_map.html"].startswith(b"<!doctype html>") and b"residual, noising" in before["heat_map.html"]
    assert ok(*call, "attribution.steps=1").out == said.out and contents(out) == before
    assert f"{out}: already exists, a result of other settings (how.steps was 1, is 3)" in refused(
        2, *call, "attribution.steps=3"
    )
    assert contents(out) == before
    write_rows(data, [{"prompt": "1", "completion": "2"}])
    assert "key 'divergence_positions' is missing" in refused(1, *call)
    there = chat("tiny-gemma3").identity
    write_rows(data, [row | {"counted_in": there} for row in rows])
    said = refused(1, *call[:-1], tmp_path / "other")
    assert f"{data}: row 1: " in said and there in said and lm.chat.identity in said
