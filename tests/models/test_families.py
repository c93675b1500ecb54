"""What one family has and others have not; and each family's greedy tokens, drawn with our cache."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_by_hand import load
from tiny import small_of

from jsublim.config import find_config
from jsublim.errors import JsublimError
from jsublim.inference.decoding import cache_slots
from jsublim.inference.generation import generate_tokens
from jsublim.inference.sampling import Sampling
from jsublim.models import hidden_states, read_config
from jsublim.models.decoder import abstract_params
from jsublim.models.families import text_config
from jsublim.serve.engine import Engine

NEW = ("qwen3", "ministral", "phi3", "olmo2", "gemma2", "pythia")


@pytest.mark.parametrize("name", NEW)
def test_greedy_tokens_drawn_with_a_cache_equal_transformers(name, named_checkpoint):
    """Prompts shorter and longer than the window of 4, decoded well beyond it."""
    import torch

    checkpoint, rng = named_checkpoint(name), np.random.default_rng(8)
    config, params = load(checkpoint)
    prompts = [rng.integers(2, 57, length).astype(np.int32) for length in (3, 7, 11)]
    how = Sampling(temperature=0.0, stop=())
    ours = generate_tokens(config, params, prompts, how, max_new_tokens=8, seed=0, batch_size=3)
    for prompt, tokens in zip(prompts, ours, strict=True):
        with torch.no_grad():
            out = checkpoint.model.generate(
                input_ids=torch.tensor(prompt[None], dtype=torch.long),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=8,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert tokens == out[0, len(prompt) :].tolist()


def test_null_says_that_there_is_none_where_absence_means_the_architectures_own(named_checkpoint):
    """Soft caps of Gemma-2, and Mistral's window."""
    gemma = json.loads((named_checkpoint("gemma2").folder / "config.json").read_text())
    caps = {key: gemma.pop(key) for key in ("attn_logit_softcapping", "final_logit_softcapping")}
    absent, null = (text_config(gemma | each, "x")[1].scales for each in ({}, dict.fromkeys(caps)))
    assert (absent.attention_softcap, absent.softcap) == (50.0, 30.0)
    assert (null.attention_softcap, null.softcap) == (None, None)
    mistral = json.loads((named_checkpoint("ministral").folder / "config.json").read_text())
    del mistral["sliding_window"], mistral["layer_types"]
    absent, null = (text_config(mistral | each, "x")[1].local for each in ({}, {"sliding_window": None}))
    assert (absent.window, absent.layers, null.layers) == (4096, (True,) * 3, ())


def test_rows_beyond_what_longrope_is_read_for_are_refused(named_checkpoint):
    config, params = load(named_checkpoint("phi3"))

    def read(tokens: int, before: int):
        begun = jnp.zeros((config.num_layers, 1, config.num_kv_heads, before, config.head_dim))
        row, prefix = jnp.zeros((1, tokens), jnp.int32), (begun, begun) if before else None
        return jax.eval_shape(lambda: hidden_states(config, params, row, row == 0, prefix=prefix))

    def draw(new: int):
        return generate_tokens(config, params, [np.ones(64, np.int32)], Sampling(), max_new_tokens=new, seed=0)

    def serve(length: int):
        return Engine(small_of("phi3").lm, lambda name: None, slots=1, length=length)

    assert read(72, 0) and read(64, 8) and cache_slots(config, 72) >= 72
    for refused in (lambda: read(73, 0), lambda: read(64, 9), lambda: draw(9), lambda: serve(73)):
        with pytest.raises(JsublimError, match=r"rows of 73 tokens.*original_max_position_embeddings, 72"):
            refused()


@pytest.mark.parametrize(("shape", "billions"), [("phi-4", 14.66), ("ministral-8b", 8.019808256)])
def test_a_shape_that_comes_with_the_package_has_as_many_parameters_as_published(shape, billions):
    config = read_config(find_config(f"configs/shapes/{shape}/config.json").parent)[1]
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))
    assert count / 1e9 == pytest.approx(billions, abs=0 if shape == "ministral-8b" else 0.005)
