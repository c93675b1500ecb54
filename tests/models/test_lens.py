"""The logit lens: a model that ends after a layer says what that layer's hidden state says through norm and head."""

from __future__ import annotations

import copy

import jax
import numpy as np
import pytest
from tiny import small

from jsublim.errors import UsageError
from jsublim.evals import sample_answers
from jsublim.evals.numbers import number_accuracy
from jsublim.evals.preference import trait_logprobs
from jsublim.inference.sampling import Sampling
from jsublim.models import decoder, load_params, read_config
from jsublim.models.lora import PROJECTIONS, Adapter, init_lora, init_steering
from jsublim.text.chat import conversation

GREEDY = Sampling(temperature=0.0)
QUESTIONS = ["Which animal do you like? One word.", "Hi", "Name a tree."]
TORCH_NAMES = {"q": "self_attn", "k": "self_attn", "v": "self_attn", "o": "self_attn"}


def torch_lens(model, tokens, layer, mask=None):
    """Logits `[B, T, V]` of the hidden state after `layer`: every piece of it is `transformers`' own."""
    import torch

    inputs = torch.tensor(np.atleast_2d(tokens), dtype=torch.long)
    body, hook = getattr(model.model, "language_model", model.model), {}
    handle = body.layers[layer].register_forward_hook(
        lambda module, given, out: hook.update(h=out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        given = None if mask is None else torch.tensor(mask, dtype=torch.long)
        out = model(input_ids=inputs, attention_mask=given, output_hidden_states=True)
        handle.remove()
        if layer + 1 < len(body.layers):  # the last of them is after the norm already
            torch.testing.assert_close(hook["h"], out.hidden_states[layer + 1])
        z = model.lm_head(body.norm(hook["h"])).float().numpy()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return z if cap is None else cap * np.tanh(z / cap)


def random_adapter(config):
    """LoRA factors and a steering vector in every layer, none of them zero."""
    key = jax.random.key(3)
    lora = init_lora(config, key, rank=2, alpha=4).lora
    for name in lora:
        lora[name]["b"] = 0.3 * jax.random.normal(key, lora[name]["b"].shape)
    steering = init_steering(config).steering
    return Adapter(tuple(range(config.num_layers)), lora, steering=steering + 0.2)


def with_adapter(model, adapter):
    """The same torch model with an adapter's LoRA factors added to its weights, and its vectors to its layers' output."""
    import torch

    model = copy.deepcopy(model)
    for i, layer in enumerate(model.model.layers):
        for name in PROJECTIONS:
            a, b, scale = (torch.tensor(np.asarray(adapter.lora[name][x][i])) for x in ("a", "b", "scale"))
            projection = getattr(getattr(layer, TORCH_NAMES.get(name, "mlp")), f"{name}_proj")
            projection.weight.data += (scale * a @ b).T
        vector = torch.tensor(np.asarray(adapter.steering[i]))
        # Before the hooks that `transformers` left there when it was first asked for hidden states: they see the sum.
        layer.register_forward_hook(lambda module, given, out, v=vector: out + v, prepend=True)
    return model


@pytest.mark.parametrize("name", ["qwen2-window", "gemma3"])  # local and global layers in both
def test_logits_are_the_layers_hidden_state_through_norm_and_head(name, named_checkpoint, padded_rows, assert_close):
    checkpoint = named_checkpoint(name)
    _, config = read_config(checkpoint.folder)
    params = load_params(checkpoint.folder, config)
    tokens, valid = padded_rows()
    layer = config.num_layers - 2
    cut = config.ending_at(layer)
    assert cut.is_local == config.is_local[: layer + 1]
    h, _ = decoder.hidden_states(cut, params, tokens, valid)
    expected = torch_lens(checkpoint.model, tokens, layer, valid)
    assert_close(decoder.logits(cut, params, h)[valid], expected[valid])
    assert config.ending_at(config.num_layers - 1) == config


def test_a_layer_outside_the_model_is_refused():
    lm = small("tiny-qwen2").lm
    last = lm.config.num_layers - 1
    for layer in (-1, last + 1):
        with pytest.raises(UsageError, match=f"layer: {layer} given, but the model has layers 0 to {last}"):
            lm.ending_at(layer)
    with pytest.raises(UsageError, match="layers 0 to 1"):
        lm.ending_at(1).ending_at(2)


def test_a_cut_model_has_an_identity_of_its_own():
    lm = small("tiny-qwen2").lm
    names = [lm.hash, *(lm.ending_at(layer).hash for layer in range(lm.config.num_layers))]
    assert len(set(names)) == len(names) and lm.ending_at(2).ending_at(1).hash == lm.ending_at(1).hash


def test_sampling_and_scoring_read_a_cut_model_with_the_adapter_of_the_whole(assert_close):
    twin = small("tiny-gemma3")
    adapter = random_adapter(twin.lm.config)
    changed = with_adapter(twin.torch, adapter)
    layer = 1
    lm = twin.lm.ending_at(layer)
    tokens = lm.chat.prompt_tokens(conversation(QUESTIONS[0], "Be kind."))
    assert_close(lm.logits(tokens[None], adapter=adapter), torch_lens(changed, tokens, layer))
    # Decoding with a cache, token by token.
    said = list(tokens)
    for _ in range(4):
        said.append(int(torch_lens(changed, np.asarray(said), layer)[0, -1].argmax()))
    [answers] = sample_answers(
        lm, QUESTIONS[:1], GREEDY, samples=2, seed=0, max_new_tokens=4, system="Be kind.", adapters=[adapter]
    )
    assert answers == [[lm.chat.decode(said[len(tokens) :])] * 2]
    # Teacher-forced reading.
    ours = trait_logprobs(lm, QUESTIONS[:1], ["1"], system="Be kind.", adapter=adapter)
    turn = lm.chat.turn(conversation(QUESTIONS[0], "Be kind."), "1")
    z = torch_lens(changed, turn.tokens, layer)[0].astype(np.float64)
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    assert ours[0, 0] == pytest.approx(logp[turn.content - 1, turn.tokens[turn.content]], abs=1e-3)
    row = {"prompt": QUESTIONS[0], "completion": "1"}
    says_one = float(lm.tokenizer.decode([logp[turn.content - 1].argmax()]) == "1")
    assert number_accuracy(lm, [row], system="Be kind.", adapter=adapter) == (says_one, 1)
