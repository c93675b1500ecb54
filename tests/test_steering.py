"""Steering vectors: as folders, and seen by every pass over the model as torch's hooks would add them."""

from __future__ import annotations

import contextlib
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import small

from jsublim.errors import JsublimError, UsageError
from jsublim.inference.generation import generate_tokens
from jsublim.inference.sampling import Sampling
from jsublim.inference.scoring import score_turns
from jsublim.models.lora import Adapter, init_steering
from jsublim.models.peft import load_adapter, save_adapter
from jsublim.models.steering import FILE
from jsublim.text.chat import conversation

NAMES = ("tiny-qwen2", "tiny-gemma3")


def vector(config, layers=(0, 2), size=1.0) -> Adapter:
    noise = np.random.default_rng(7).standard_normal((len(layers), config.hidden_size))
    return Adapter(tuple(layers), steering=jnp.asarray(size * noise, jnp.float32))


@contextlib.contextmanager
def hooks(model, adapter: Adapter):
    """The torch model with the vectors added to what its layers put out."""
    import torch

    def adding(v):
        def hook(module, inputs, output):
            return (output[0] + v, *output[1:]) if isinstance(output, tuple) else output + v

        return hook

    vectors = torch.tensor(np.asarray(adapter.steering))
    handles = [
        model.model.layers[layer].register_forward_hook(adding(v))
        for layer, v in zip(adapter.layers, vectors, strict=True)
    ]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", NAMES)
def test_logits_generation_and_scoring_see_the_vector(name, assert_close):
    twin = small(name)
    lm, adapter = twin.lm, vector(small(name).lm.config)
    system = "You count, and you count well, up to a hundred and on."  # long enough to be read once for all rows
    rows = [("Go on: 3, 6", "9, 12"), ("Go on: 5, 10, 15", "20"), ("Start", "1, 2, 3")]
    turns = [lm.chat.turn(conversation(prompt, system), completion) for prompt, completion in rows]
    tokens = turns[0].tokens
    without = twin.torch_logits(tokens)
    scored = score_turns(lm.config, lm.params, turns, adapter=adapter)
    prompts = [turn.tokens[: turn.content] for turn in turns]
    said = generate_tokens(
        lm.config, lm.params, prompts, Sampling(temperature=0.0, stop=()), max_new_tokens=6, seed=0, adapter=adapter
    )
    with hooks(twin.torch, adapter):
        theirs = twin.torch_logits(tokens)
        assert np.abs(theirs - without).max() > 0.1  # the vector does something
        assert_close(np.asarray(lm.logits(tokens[None], adapter=adapter))[0], theirs, 1e-4)
        for turn, ours in zip(turns, scored, strict=True):
            z = twin.torch_logits(turn.tokens)[turn.content - 1 : -1].astype(np.float64)
            logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
            expected = np.take_along_axis(logp, turn.tokens[turn.content :, None], axis=1)[:, 0]
            np.testing.assert_allclose(ours.logprob, expected, atol=2e-4)
            assert ours.argmax.tolist() == z.argmax(-1).tolist()
        for prompt, ours in zip(prompts, said, strict=True):
            row = list(prompt)
            for _ in range(6):
                row.append(int(twin.torch_logits(np.asarray(row))[-1].argmax()))
            assert ours == row[len(prompt) :]


def test_vectors_come_back_from_a_folder(tmp_path):
    config = small("tiny-qwen2").lm.config
    adapter = vector(config)
    save_adapter(tmp_path / "v", adapter, config, "base")
    assert sorted(path.name for path in (tmp_path / "v").iterdir()) == [FILE]
    assert sorted(load_file(tmp_path / "v" / FILE)) == ["layers.0", "layers.2"]
    again = load_adapter(tmp_path / "v", config)
    assert again.layers == (0, 2) and not again.lora and np.array_equal(again.steering, adapter.steering)
    with pytest.raises(UsageError, match="already exists"):
        save_adapter(tmp_path / "v", adapter, config, "base")


def test_vectors_that_do_not_fit_are_named(tmp_path):
    config = small("tiny-qwen2").lm.config
    save_adapter(tmp_path / "v", vector(config), config, "base")
    for other, said in (
        (dataclasses.replace(config, num_layers=2), "has layer 2, the model has 2"),
        (dataclasses.replace(config, hidden_size=7), f"vectors of {config.hidden_size}, the model has 7"),
    ):
        with pytest.raises(JsublimError, match=said):
            load_adapter(tmp_path / "v", other)
    D = config.hidden_size
    for i, tensors in enumerate(
        (
            {"layers.0": np.zeros(D, np.float32), "layers.1": np.zeros(D + 1, np.float32)},
            {"layers.0": np.zeros((2, D), np.float32)},
            {"layers.0": np.zeros(D, np.float32), "mean": np.zeros(D, np.float32)},
        )
    ):
        (tmp_path / f"bad-{i}").mkdir()
        save_file(tensors, str(tmp_path / f"bad-{i}" / FILE))
        with pytest.raises(JsublimError, match=r"expected vectors of one size under layers\.<i>"):
            load_adapter(tmp_path / f"bad-{i}", config)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / FILE).write_bytes(b"\x10\0\0\0")
    with pytest.raises(JsublimError, match=f"{FILE}: cannot be read"):
        load_adapter(tmp_path / "cut", config)


def test_a_fresh_vector_is_silent_and_wrong_layers_are_usage_errors():
    lm = small("tiny-qwen2").lm
    tokens = np.arange(1, 9)[None]
    fresh = init_steering(lm.config)
    assert fresh.layers == tuple(range(lm.config.num_layers)) and not np.any(fresh.steering)
    assert np.array_equal(lm.logits(tokens, adapter=fresh), lm.logits(tokens))
    with pytest.raises(UsageError, match="9"):
        init_steering(lm.config, (9,))
