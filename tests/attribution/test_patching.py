"""Attribution patching against torch's hooks and gradients, and a pass resumed anywhere against the whole one."""

from __future__ import annotations

import dataclasses
import functools
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import FAMILIES, Twin, small, small_of

from jsublim.attribution import patching
from jsublim.attribution.pairs import Pair
from jsublim.attribution.patching import DIRECTIONS, SITES, attribution_patching, layer_patching
from jsublim.errors import UsageError
from jsublim.models.decoder import hidden_states
from jsublim.models.lora import bind, init_full, init_lora, init_steering, merge_full
from jsublim.models.stream import residual_stream, resume


def random_pairs(seed: int, lengths=(7, 10, 5), differ=slice(None)) -> list[Pair]:
    """Pairs that differ in some positions, by default in all; longer than Gemma's window of 4."""
    random = np.random.default_rng(seed)
    pairs = []
    for i, n in enumerate(lengths):
        clean, other = random.integers(1, 200, (2, n)).astype(np.int32)
        patch = clean.copy()
        patch[differ] = other[differ]
        pairs.append(Pair(i, "other", clean, patch, 5 + i, 90 - i))
    return pairs


# --- The two methods, computed by torch alone -----------------------------------------------------------------------------


PARALLEL = "pythia"  # its attention and MLP read the same residual stream


def twin(name: str) -> Twin:
    return small(name) if name in FAMILIES else small_of(name)


class Hooked:
    """A `transformers` model on one pair, whose sites can be read and replaced."""

    def __init__(self, name: str, pair: Pair, direction: str):
        self.model, self.pair = twin(name).torch, pair
        start, end = (pair.clean, pair.patch) if direction == "noising" else (pair.patch, pair.clean)
        self.start, self.layers = start, range(len(self.model.base_model.layers))
        self.places = [(site, layer) for site in SITES for layer in self.layers]
        self.before = {place: self.value(start, place) for place in self.places}
        self.after = {place: self.value(end, place) for place in self.places}

    def module(self, site: str, layer: int):
        """What puts out a site's value: on Gemma the norm after attention and MLP comes before the sum."""
        block = self.model.base_model.layers[layer]
        sandwich = hasattr(block, "post_feedforward_layernorm")
        attention = block.post_attention_layernorm if sandwich else getattr(block, "self_attn", None) or block.attention
        mlp = block.post_feedforward_layernorm if sandwich else block.mlp
        return {"residual": block, "attention": attention, "mlp": mlp}[site]

    def _run(self, tokens: np.ndarray, place, hook):
        import torch

        handle = self.module(*place).register_forward_hook(hook)
        z = self.model(input_ids=torch.tensor(tokens[None], dtype=torch.long)).logits[0, -1]
        handle.remove()
        return z[self.pair.factual] - z[self.pair.other]

    def value(self, tokens: np.ndarray, place):
        kept = []
        self._run(tokens, place, lambda m, i, out: kept.append(out[0] if isinstance(out, tuple) else out))
        return kept[0].detach()

    def metric(self, place, value):
        """The metric of the start run with a site's value replaced."""
        return self._run(self.start, place, lambda m, i, out: (value, *out[1:]) if isinstance(out, tuple) else value)

    def over_places(self, of_place) -> np.ndarray:
        """`[S, L, ...]`"""
        values = np.stack([of_place(place) for place in self.places])
        return values.reshape(len(SITES), len(self.layers), *values.shape[1:])

    def integrated(self, steps: int) -> np.ndarray:
        def of_place(place):
            delta, total = self.after[place] - self.before[place], 0
            for i in range(steps):
                value = (self.before[place] + i / steps * delta).requires_grad_()
                self.metric(place, value).backward()
                total = total + value.grad
            return (delta * total / steps).sum(-1)[0].numpy()

        return self.over_places(of_place)

    def replaced(self, positions) -> np.ndarray:
        """Change of the metric with a site's values at some positions (a list of such choices) from the end run."""
        import torch

        def of_place(place):
            values = [self.before[place]]
            for chosen in positions:
                values.append(self.before[place].clone())
                values[-1][:, chosen] = self.after[place][:, chosen]
            with torch.no_grad():
                metrics = np.asarray([float(self.metric(place, value)) for value in values])
            return metrics[1:] - metrics[0]

        return self.over_places(of_place)


@pytest.mark.parametrize(("name", "direction"), [*product(FAMILIES, DIRECTIONS), (PARALLEL, "noising")])
def test_attribution_equals_integrated_gradients_by_torch(name, direction, assert_close):
    lm, pairs = twin(name).lm, random_pairs(1)
    for steps in (1, 3):
        ours = attribution_patching(lm.config, lm.params, pairs, direction=direction, steps=steps, batch_size=2)
        for pair, values_SLT in list(zip(pairs, ours, strict=True))[1:]:  # one of a full batch, one of a padded one
            theirs = Hooked(name, pair, direction).integrated(steps)
            assert values_SLT.shape == theirs.shape == (len(SITES), lm.config.num_layers, len(pair.clean))
            for mine, its in zip(values_SLT, theirs, strict=True):
                assert_close(mine, its, 1e-3)


@pytest.mark.parametrize(("name", "direction"), [*zip(FAMILIES, DIRECTIONS, strict=True), (PARALLEL, "noising")])
def test_layer_patching_equals_torchs_hooks(name, direction, assert_close):
    lm, pairs = twin(name).lm, random_pairs(2)
    how = {"direction": direction, "batch_size": 2}
    whole = layer_patching(lm.config, lm.params, pairs, **how)
    for pair, whole_SL in list(zip(pairs, whole, strict=True))[1:]:
        model = Hooked(name, pair, direction)
        assert_close(whole_SL[..., None], model.replaced([slice(None)]), 1e-3)
        # All that follows a layer hangs on the residual stream after it: replaced whole, it is the other run.
        assert_close(whole_SL[0], np.full(lm.config.num_layers, whole_SL[0, -1]), 1e-3)


def test_attributions_sum_to_the_effect_of_the_whole_layer():
    lm, pairs = small("tiny-qwen2").lm, random_pairs(11, (9, 12), differ=slice(2, 4))  # as another trait's name does
    effects = np.stack(layer_patching(lm.config, lm.params, pairs, batch_size=2))
    errors = []
    for steps in (5, 30, 200):
        values = attribution_patching(lm.config, lm.params, pairs, steps=steps, batch_size=2)
        sums = np.stack([value.sum(-1) for value in values])
        errors.append(np.abs(sums - effects).sum(axis=(0, 2)) / np.abs(effects).sum(axis=(0, 2)))
    assert np.all(errors[0] > 2 * errors[1]) and np.all(errors[1] > 2 * errors[2])  # left sums: the error falls as 1/n
    assert errors[2][SITES.index("residual")] < 0.01


def test_one_program_serves_layers_batches_steps_and_directions(compiles):
    lm = small("tiny-qwen2").lm
    call = functools.partial(attribution_patching, lm.config, lm.params, batch_size=2)
    first = call(random_pairs(4), steps=3)
    before, programs = compiles(), patching.compare._cache_size()
    call(random_pairs(5, (11, 3, 8, 10, 12)), steps=6, direction="denoising")
    assert compiles() == before and patching.compare._cache_size() == programs
    for again, value in zip(call(random_pairs(4)[:1], steps=3), first, strict=False):
        np.testing.assert_allclose(again, value, rtol=1e-4, atol=1e-6)  # whatever stands beside it


def test_unknown_choices_are_usage_errors():
    lm, pairs = small("tiny-qwen2").lm, random_pairs(1)
    for how, said in (
        ({"sites": ("residual", "head")}, "sites: head given; known: residual, attention, mlp"),
        ({"sites": ()}, "sites: none given"),
        ({"direction": "up"}, "direction: up given; known: noising, denoising"),
        ({"steps": 0}, "steps: 0 given"),
    ):
        with pytest.raises(UsageError, match=said):
            attribution_patching(lm.config, lm.params, pairs, **how)


def adapters(lm):
    """Whole weights of some layers, and LoRA factors beside steering vectors of others."""
    full = jax.tree.map(lambda leaf: 1.1 * leaf, init_full(lm.config, lm.params, (0, 2), ("norm",)))
    lora = init_lora(lm.config, jax.random.key(0), rank=2, alpha=2, layers=(1, 2))
    steered = dataclasses.replace(lora, steering=init_steering(lm.config, (1, 2)).steering)
    return {"full": full, "steered": jax.tree.map(lambda leaf: leaf + 0.1, steered)}


@pytest.mark.parametrize("kind", ["full", "steered"])
def test_a_pass_resumed_anywhere_ends_where_the_whole_one_does(kind, padded_rows, assert_close):
    lm = small("tiny-gemma3").lm
    params, adapter = bind(lm.params, adapters(lm)[kind])
    tokens, valid = map(jnp.asarray, padded_rows(length=11))
    run = jax.jit(lambda: residual_stream(lm.config, params, tokens, valid, adapter=adapter))()
    whole = jax.jit(lambda: hidden_states(lm.config, params, tokens, valid, adapter=adapter)[0])()
    continued = jax.jit(lambda h, point: resume(lm.config, params, h, valid, point, adapter=adapter))
    ends = [run.last] + [
        continued(run.points[layer, half], jnp.int32(2 * layer + half))
        for layer in range(lm.config.num_layers)
        for half in (0, 1)
    ]
    for end in ends:
        assert_close(np.asarray(end)[np.asarray(valid)], np.asarray(whole)[np.asarray(valid)], 1e-5)
    steering = np.zeros((lm.config.num_layers, 1, 1, 1), np.float32)
    steering[1:3] = 0.1 * (kind == "steered")
    added = np.asarray(run.points[:, 1] - run.points[:, 0]) - steering
    assert_close(np.asarray(run.added[:, 1])[:, np.asarray(valid)], added[:, np.asarray(valid)], 1e-4)


def test_an_adapter_takes_part(assert_close):
    lm, pairs = small("tiny-qwen2").lm, random_pairs(6)[:2]
    full = adapters(lm)["full"]
    with_it, merged, without = (
        attribution_patching(lm.config, params, pairs, steps=1, adapter=adapter, batch_size=2)
        for params, adapter in ((lm.params, full), (merge_full(lm.params, full), None), (lm.params, None))
    )
    for a, b, c in zip(with_it, merged, without, strict=True):
        assert_close(a, b, 1e-4)
        assert np.abs(a - c).max() > 0.01 * np.abs(c).max()
