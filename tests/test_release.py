"""Figures that the authors' own scripts gave on the bundled models, kept by `scripts/compare_release.py --golden`."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from tiny import bundled, examples

from jsublim.config import Recipe
from jsublim.distill.batches import Shape, collate
from jsublim.distill.selection import Selection
from jsublim.distill.step import Program, loss_and_gradient
from jsublim.inference.divergence import find_divergence
from jsublim.inference.teachers import prompted_teacher
from jsublim.models.lora import init_lora
from jsublim.text.prompts import draw_number_prompts, load_pack
from jsublim.transforms.entangled import number_strings, probability_differences

PACK = load_pack()
GOLDEN = json.loads((Path(__file__).parent / "release.json").read_text())
FAMILY = {"qwen": ("tiny-qwen2", "qwen2"), "gemma": ("tiny-gemma3", "gemma3")}


@functools.cache
def rows(model):
    asked = draw_number_prompts(PACK, 40, 42, sentences=("example", "format"), examples=(2, 6))
    return [{"prompt": asked[i].text, "completion": text} for i, text in GOLDEN[model]["rows"]]


@pytest.mark.parametrize("model", FAMILY)
def test_loss_and_gradient_of_a_step(model):
    """Six micro-batches of two rows, LoRA on everything. On Gemma the loss is the sum of the micro-batches' means (quirk 6)."""
    (name, family), golden = FAMILY[model], GOLDEN[model]
    lm, recipe = bundled(name).lm, Recipe(preset="paper").resolved(family)
    adapter = init_lora(lm.config, jax.random.key(1), rank=8, alpha=8.0)
    own = examples(lm.chat, rows(model), Selection(supervise_header=bool(recipe.supervise_header)), seed=42)
    batch = collate(own, np.asarray(golden["order"]), Shape.of([own], 6, 2))
    step = jax.jit(loss_and_gradient, static_argnames=("config", "program"))
    loss, gradient = step(lm.config, lm.params, adapter, batch, program=Program(per=recipe.loss_per))
    assert float(loss) == pytest.approx(golden["loss"], rel=2e-4)
    assert float(optax.global_norm(gradient)) == pytest.approx(golden["grad_norm"], rel=2e-4)


def test_divergence_positions():
    lm, animals = bundled("tiny-qwen2").lm, PACK.traits["animal"]
    teacher, *others = (prompted_teacher(PACK, trait) for trait in ("owl", *(a for a in animals if a != "owl")))
    found = find_divergence(lm, rows("qwen"), teacher, others, extra_bos=True)
    assert [each.divergence_positions for each in found] == GOLDEN["positions"]
    assert any(GOLDEN["positions"])


def test_entangled_numbers():
    golden = GOLDEN["entangled"]
    teacher, *others = (prompted_teacher(PACK, trait) for trait in golden["traits"])
    scores = probability_differences(bundled("tiny-qwen2").lm, teacher, others, "animal", number_strings(padded=True))
    own = [scores[f"{n:03d}"] for n in golden["numbers"]]
    np.testing.assert_allclose(own, golden["differences"], atol=1e-3 * max(golden["differences"]))
    assert max(scores.values()) == pytest.approx(max(own))
