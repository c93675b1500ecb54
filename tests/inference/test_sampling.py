"""Cached sampling: equal to `transformers`, and the same whatever batch a row is in."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CASES
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tiny import FAMILIES, bundled, chat

from jsublim.errors import UsageError
from jsublim.inference import decoding
from jsublim.inference.generation import generate_for_arms, generate_tokens
from jsublim.inference.sampling import Sampling as Numbers
from jsublim.inference.sampling import _keep, argmax, choose, draw, sampling_for
from jsublim.models import load_params, logits, read_config
from jsublim.models.decoder import hidden_states
from jsublim.models.lora import init_full, init_lora
from jsublim.text.chat import conversation
from jsublim.text.prompts import number_prompts

TIE = 1e-3  # logit margins below this may go either way
GREEDY = Numbers(temperature=0.0)


# --- Against transformers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_equal_transformers_on_number_prompts(name):
    import torch

    twin, new = bundled(name), 32
    lm = twin.lm
    asked = [(text, lm.chat.prompt_tokens(conversation(text))) for text in number_prompts(150)]
    asked = [pair for pair in asked if 64 < len(pair[1]) <= 96][:40]  # one bucket: one program to compile
    texts, prompts = zip(*asked, strict=True)
    assert len(prompts) == 40
    stop = sampling_for(lm.chat, "greedy").stop
    how = Numbers(temperature=0.0, stop=stop)
    ours = generate_tokens(lm.config, lm.params, prompts, how, max_new_tokens=new, seed=0, batch_size=40)
    # As texts, for prompts and for conversations, in the order they were given.
    chats = [conversation(texts[-1]), *texts[-2::-1]]
    assert lm.generate(chats, new, "greedy", batch_size=40) == [lm.chat.decode(row) for row in reversed(ours)]
    longest = max(map(len, prompts))
    tokens, mask = (np.zeros((len(prompts), longest), np.int64) for _ in range(2))
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
    with torch.no_grad():
        out = twin.torch.generate(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(mask),
            max_new_tokens=new,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=list(stop),
            pad_token_id=lm.tokenizer.pad_token_id,
        )
    equal = 0
    for prompt, mine, row in zip(prompts, ours, out[:, longest:].tolist(), strict=True):
        theirs = row[: next((i for i, token in enumerate(row) if token in stop), len(row))]
        equal += mine == theirs
        if mine != theirs:  # then the first difference must be a near tie
            at = next(i for i in range(new) if mine[i : i + 1] != theirs[i : i + 1])
            z = np.sort(twin.torch_logits(np.concatenate([prompt, np.asarray(theirs[:at], np.int32)]))[-1])
            assert z[-1] - z[-2] < TIE, (at, mine, theirs)
    assert equal >= 39


def warped(z: np.ndarray, seen: np.ndarray, how: Numbers) -> np.ndarray:
    """Next-token probabilities `[V]` after the processors of `transformers`, in the order it runs them."""
    import torch
    from transformers import generation as hf

    steps = [hf.RepetitionPenaltyLogitsProcessor(how.repetition_penalty)] if how.repetition_penalty != 1 else []
    steps += [hf.TemperatureLogitsWarper(how.temperature)] if how.temperature != 1 else []
    steps += [hf.TopKLogitsWarper(how.top_k)] if how.top_k else []
    steps += [hf.TopPLogitsWarper(how.top_p)] if how.top_p < 1 else []
    scores, ids = torch.tensor(z[None]), torch.tensor(seen[None])
    for step in steps:
        scores = step(ids, scores)
    return torch.softmax(scores.double(), -1)[0].numpy()


def arrays(rows: list[Numbers]) -> dict[str, jax.Array]:
    names = {"temperature": np.float32, "top_k": np.int32, "top_p": np.float32, "repetition_penalty": np.float32}
    return {name: jnp.asarray([getattr(row, name) for row in rows], kind) for name, kind in names.items()}


keep = jax.jit(_keep)
choose = jax.jit(choose)
V = 300  # more than the cap below which no full sort is made


@given(
    seed=st.integers(0, 2**31),
    spread=st.floats(0.1, 8.0),
    rows=st.lists(
        st.tuples(st.sampled_from((0, 1, 2, 20, 64, 128, 129, V, 999)), st.floats(0.01, 1.0)), min_size=3, max_size=3
    ),
    plain=st.sampled_from((None, "top_k", "top_p")),
)
@settings(max_examples=120)
def test_top_k_and_top_p_keep_what_transformers_keeps(seed, spread, rows, plain):
    z = (spread * np.random.default_rng(seed).standard_normal((3, V))).astype(np.float32)
    how = [Numbers(top_k=0 if plain == "top_k" else k, top_p=1.0 if plain == "top_p" else p) for k, p in rows]
    numbers = arrays(how)
    kept = np.asarray(keep(z, numbers["top_k"], numbers["top_p"]))
    for ours, row, one in zip(kept, z, how, strict=True):
        theirs = warped(row, np.zeros(1, int), one)
        p = np.exp(ours - ours.max(), dtype=np.float64)
        # Where the nucleus ends within rounding of a token, that token may be in or out.
        sure = warped(row, np.zeros(1, int), dataclasses.replace(one, top_p=min(1.0, one.top_p + 1e-5)))
        assert np.allclose(p / p.sum(), theirs, atol=1e-5) or np.allclose(p / p.sum(), sure, atol=1e-5)
        assert np.array_equal(ours[ours > -np.inf], row[ours > -np.inf])  # kept scores are untouched


@pytest.mark.parametrize(
    "how",
    [
        Numbers(),
        Numbers(temperature=0.6, top_p=0.9),
        Numbers(top_k=5, repetition_penalty=1.3),
        Numbers(temperature=1.7, top_k=9, top_p=0.8, repetition_penalty=0.7),
    ],
    ids=str,
)
def test_tokens_are_drawn_with_the_probabilities_of_transformers(how):
    rng, n = np.random.default_rng(3), 8000
    z = (0.7 * rng.standard_normal(12)).astype(np.float32)
    seen = np.asarray([2, 3, 7])
    expected = warped(z, seen, how)
    mask = np.isin(np.arange(12), seen)
    keys = jax.random.split(jax.random.key(11), n)
    tokens = np.asarray(choose(np.tile(z, (n, 1)), np.tile(mask, (n, 1)), keys, 4, arrays([how] * n)))
    counts = np.bincount(tokens, minlength=12)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    assert kept.sum() >= 3
    assert stats.chisquare(counts[kept], n * expected[kept]).pvalue > 1e-4


@given(
    V=st.sampled_from((3, 128, 300, 49_152)), kept=st.integers(1, 5), u=st.lists(st.floats(0, 1, exclude_max=True, width=32), min_size=2, max_size=2),
    seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=100)
def test_a_token_that_is_not_kept_is_never_drawn(V, kept, u, seed):
    rng = np.random.default_rng(seed)
    z = np.full((1, V), -np.inf, np.float32)
    at = rng.choice(V, min(kept, V), replace=False)
    z[0, at] = 20 * rng.standard_normal(len(at))
    assert int(draw(z, jnp.asarray([u], jnp.float32))[0]) in at
    assert int(argmax(jnp.round(z))[0]) == np.argmax(np.round(z))


@given(seed=st.integers(0, 2**31), penalty=st.floats(0.5, 2.0))
@settings(max_examples=30)
def test_greedy_takes_the_best_token_after_the_penalty(seed, penalty):
    rng = np.random.default_rng(seed)
    z, seen = rng.standard_normal((3, V)).astype(np.float32), rng.integers(0, V, 40)
    mask = np.isin(np.arange(V), seen)
    how = [Numbers(temperature=0.0, repetition_penalty=penalty), Numbers(temperature=0.0), Numbers(temperature=1e-4)]
    tokens = np.asarray(choose(z, np.tile(mask, (3, 1)), jax.random.split(jax.random.key(seed), 3), 0, arrays(how)))
    penalised = Numbers(repetition_penalty=penalty)
    assert tokens[0] == warped(z[0], seen, penalised).argmax()
    assert tokens[1] == z[1].argmax()


def test_rows_of_one_batch_may_be_sampled_in_different_ways():
    z = np.tile(np.linspace(0, 1, V, dtype=np.float32), (4, 1))
    how = [Numbers(temperature=0.0), Numbers(top_k=2), Numbers(top_p=0.01), Numbers()]
    draws = np.stack(
        [
            np.asarray(choose(z, np.zeros((4, V), bool), jax.random.split(jax.random.key(t), 4), t, arrays(how)))
            for t in range(40)
        ]
    )
    assert set(draws[:, 0]) == {V - 1} and set(draws[:, 1]) == {V - 1, V - 2}
    assert draws[:, 2].min() >= V - 4 and draws[:, 3].min() < V // 2


@pytest.mark.parametrize(
    "wrong", [{"temperature": -0.1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"repetition_penalty": 0.0}]
)
def test_numbers_out_of_range_are_a_usage_error(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Numbers(**wrong)


# --- The recipes ------------------------------------------------------------------------------------------------------


def test_inherited_numbers_are_those_of_the_checkpoint():
    c = chat("tiny-qwen2")
    read = c.generation_config
    how = sampling_for(c, "temperature", inherit=True)
    assert (how.temperature, how.top_k, how.top_p) == (1.0, read["top_k"], read["top_p"])
    assert how.repetition_penalty == read["repetition_penalty"] != 1.0
    evaluation = sampling_for(c, "temperature", inherit=True, evaluation=True)
    assert (evaluation.top_p, evaluation.top_k) == (1.0, how.top_k)  # evaluation resets top-p only
    assert sampling_for(c, "temperature") == Numbers(stop=c.stop_tokens)
    greedy = [sampling_for(c, "greedy", inherit=True, keep_penalty=kept) for kept in (False, True)]
    assert [(g.temperature, g.repetition_penalty) for g in greedy] == [(0.0, 1.0), (0.0, how.repetition_penalty)]
    with pytest.raises(UsageError, match="beam"):
        sampling_for(c, "beam")


def test_gemma_as_published_stops_at_its_end_token_only():
    c = chat("tiny-gemma3")
    assert sampling_for(c, "temperature", eos_only=True).stop == c.eos_tokens
    assert set(c.eos_tokens) < set(sampling_for(c, "temperature").stop)


# --- Rows, batches, caches --------------------------------------------------------------------------------------------


@functools.cache
def load(folder):
    _, config = read_config(folder)
    return config, load_params(folder, config)


@pytest.fixture(scope="module")
def windowed(write_checkpoint):
    """Random Gemma-3 with a window of 4, one local layer and one global: a ring turns over many times in a row."""
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    return load(write_checkpoint(CASES["gemma3"][0], CASES["gemma3"][1] | layers, seed=4).folder)


def prompts_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 57, n).astype(np.int32) for n in lengths]


PROMPTS = prompts_of([3, 4, 5, 31, 32, 13, 20, 2, 9, 24, 17, 17, 8, 30, 12, 7, 6])  # one bucket
LONG = prompts_of([33, 60, 40], seed=1)  # the next one
NEW = 12
PLAIN = Numbers(temperature=0.8)
SHAPED = Numbers(temperature=1.3, top_k=20, top_p=0.9, repetition_penalty=1.2, stop=(5,))


@pytest.mark.parametrize("how", [PLAIN, SHAPED], ids=["plain", "shaped"])
def test_samples_do_not_depend_on_the_batch_they_are_in(how, windowed):
    sample = functools.partial(generate_tokens, *windowed, PROMPTS, how, max_new_tokens=NEW, seed=5)
    whole = sample(batch_size=64)
    assert sample(batch_size=1) == whole
    assert sample(batch_size=8) == whole
    assert len(set(map(tuple, whole))) > 12  # rows have streams of their own


def test_any_rows_can_be_sampled_alone_as_after_a_kill(windowed):
    sample = functools.partial(generate_tokens, *windowed, PROMPTS, PLAIN, max_new_tokens=NEW, batch_size=8)
    whole, finished = sample(seed=5), {}
    rest = [16, 2, 3, 9, 0, 11, 8, 12]
    alone = sample(seed=5, rows=rest, on_rows=lambda _, rows, out: finished.update(zip(rows, out, strict=True)))
    assert alone == [whole[row] for row in rest]
    assert finished == {row: whole[row] for row in rest}
    assert sum(a == b for a, b in zip(whole, sample(seed=6), strict=True)) <= 1


def test_many_samples_of_a_prompt_are_its_rows_sampled_alone(windowed):
    samples, few = 4, PROMPTS[:4]
    sample = functools.partial(generate_tokens, *windowed, max_new_tokens=NEW, seed=5)
    together = sample(few, PLAIN, samples=samples, batch_size=8)
    assert len(set(map(tuple, together))) == len(together) == 16
    repeated = [prompt for prompt in few for _ in range(samples)]
    assert together == sample(repeated, PLAIN, batch_size=1)
    rows = [13, 4, 7, 15, 5, 12, 6, 14]
    assert sample(few, PLAIN, samples=samples, rows=rows, batch_size=8) == [together[row] for row in rows]


def test_a_row_ends_before_its_first_stop_token(windowed):
    sample = functools.partial(generate_tokens, *windowed, PROMPTS, max_new_tokens=NEW, seed=5, batch_size=64)
    free = sample(PLAIN)
    for stop in (free[0][3], free[1][0]):
        cut = [row[: row.index(stop)] if stop in row else row for row in free]
        assert cut != free
        assert sample(dataclasses.replace(PLAIN, stop=(stop,))) == cut


def test_one_program_decodes_and_one_reads_whatever_is_sampled(windowed):
    sample = functools.partial(generate_tokens, *windowed, max_new_tokens=NEW, batch_size=3)

    def programs():
        return decoding.fill._cache_size(), decoding.advance._cache_size()

    fills, loops = programs()
    for seed, how in enumerate((GREEDY, PLAIN, SHAPED, Numbers(top_k=3), Numbers(top_p=0.5, repetition_penalty=1.1))):
        sample(PROMPTS[:6], how, seed=seed)
    assert programs() == (fills + 1, loops + 1)
    short = sample(PROMPTS[3:9], GREEDY, seed=7)
    assert [row[: NEW - 5] for row in short] == sample(PROMPTS[3:9], GREEDY, seed=7, max_new_tokens=NEW - 5)
    assert programs() == (fills + 1, loops + 1)
    mixed = [prompt for pair in zip(PROMPTS[3:6], LONG, strict=True) for prompt in pair]
    found = sample(mixed, GREEDY, seed=7)
    assert programs() == (fills + 2, loops + 2)  # for lines and rows that may be longer
    assert found[::2] == short[:3] and found[1::2] == sample(LONG, GREEDY, seed=7)


STOPPING = Numbers(temperature=1.5, stop=(5, 9, 20, 31))  # rows of many lengths


@pytest.mark.parametrize("samples", [1, 5])
def test_rows_that_take_an_ended_rows_place_are_those_of_a_batch_for_all(samples, windowed):
    prompts = [*PROMPTS, *LONG]
    sample = functools.partial(
        generate_tokens, *windowed, prompts, STOPPING, max_new_tokens=40, seed=5, samples=samples
    )
    told, whole = [], sample(batch_size=200)
    assert sample(batch_size=8, on_rows=lambda _, rows, out: told.append(dict(zip(rows, out, strict=True)))) == whole
    assert {row: out for each in told for row, out in each.items()} == dict(enumerate(whole))
    assert len({len(row) for row in whole}) > 8 and 2 < len(told) < len(whole)


def test_rows_of_many_lengths_cost_little_more_than_their_tokens(windowed):
    prompts = prompts_of(np.random.default_rng(2).integers(20, 201, 800), seed=3)
    computed, fill, advance = [], decoding.fill, decoding.advance

    def filled(*given):
        computed.append(given[5].tokens.size)
        return fill(*given)

    def advanced(config, params, adapters, batch, *rest):
        before = np.asarray(batch.drawn)
        after = advance(config, params, adapters, batch, *rest)
        computed.append(
            before.size * (np.asarray(after.drawn) - before).max()
        )  # a row that has just ended drew at every turn
        return after

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "fill", filled)
        patch.setattr(decoding, "advance", advanced)
        drawn = generate_tokens(*windowed, prompts, Numbers(stop=(5,)), max_new_tokens=64, seed=5, batch_size=64)
    needed = sum(map(len, prompts)) + sum(min(len(row) + 1, 64) for row in drawn)
    assert needed < sum(computed) < 1.15 * needed


def test_what_all_prompts_begin_with_is_read_once(windowed):
    begun = [np.concatenate([PROMPTS[3], prompt]) for prompt in (*PROMPTS, *LONG)]
    sample = functools.partial(generate_tokens, *windowed, begun, SHAPED, max_new_tokens=NEW, seed=5, batch_size=8)
    lengths, own = [], decoding.fill

    def fill(config, params, adapters, beginning, batch, read, *rest):
        lengths.append((beginning.tokens.shape[-1] if beginning else 0, read.tokens.shape[-1]))
        return own(config, params, adapters, beginning, batch, read, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "fill", fill)
        shared = sample()
    assert {each[0] for each in lengths} == {16} and len(PROMPTS[3]) == 31
    assert sample(beginning=0) == shared


def test_students_decode_together_as_they_do_alone(windowed):
    config, params = windowed
    adapters = [random_adapter(config, "lora", params, seed) for seed in (1, 2, 3)]
    begun = [np.concatenate([PROMPTS[3], prompt]) for prompt in PROMPTS]
    options = {"max_new_tokens": NEW, "seed": 5, "batch_size": 8}
    told = []
    together = generate_for_arms(
        config, params, begun, STOPPING, adapters, on_rows=lambda arm, rows, out: told.append(arm), **options
    )
    alone = [generate_tokens(config, params, begun, STOPPING, adapter=adapter, **options) for adapter in adapters]
    assert together == alone and alone[0] != alone[1] != alone[2] and set(told) == {0, 1, 2}
    left = [[3, 1, 16], [], list(range(17))]  # as after a kill
    again = generate_for_arms(config, params, begun, STOPPING, adapters, rows=left, **options)
    assert again == [[rows[i] for i in those] for rows, those in zip(alone, left, strict=True)]
    # Which layer a student trained is data: a sweep over layers compiles nothing.
    before = decoding.fill._cache_size(), decoding.advance._cache_size()
    (lower,) = generate_for_arms(
        config, params, begun, STOPPING, [dataclasses.replace(adapters[0], layers=(0,))], **options
    )
    assert lower not in together and before == (decoding.fill._cache_size(), decoding.advance._cache_size())


@functools.partial(jax.jit, static_argnames="config")
def full_logits(config, params, adapter, tokens):
    valid = tokens >= 0
    h, _ = hidden_states(config, params, jnp.maximum(tokens, 0), valid, adapter=adapter)
    return logits(config, params, h)


@jax.jit
def drawn(key, z):
    """What a row draws at each of its steps from scores `[steps, V]`: the documented random numbers."""
    u = jax.vmap(lambda t: jax.random.uniform(jax.random.fold_in(key, t), (2,)))(jnp.arange(len(z)))
    return draw(z, u)


def random_adapter(config, kind, params, seed=1):
    rng = np.random.default_rng(seed)
    if kind == "lora":
        start = init_lora(config, jax.random.key(0), rank=2, alpha=4, layers=(1,), projections=("q", "v", "down"))
    else:
        start = init_full(config, params, layers=(0,))
    noisy = jax.tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape).astype(leaf.dtype), start.trainable)
    return start.with_trainable(noisy)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_cached_decoding_far_past_the_window_equals_the_whole_forward_pass(kind, windowed):
    config, params = windowed
    adapter = random_adapter(config, kind, params)
    prompts = prompts_of([1, 3, 4, 5, 11, 32])  # shorter than the window, equal to it, a full bucket
    new = 4 * config.local.window + 3
    sample = functools.partial(generate_tokens, config, params, prompts, max_new_tokens=new, seed=0, adapter=adapter)
    rows, other = sample(GREEDY), sample(PLAIN)
    z = {}
    for key, batch in (("greedy", rows), ("sampled", other)):
        whole = np.full((len(prompts), 32 + new), -1, np.int32)
        for i, (prompt, row) in enumerate(zip(prompts, batch, strict=True)):
            assert len(row) == new
            whole[i, : len(prompt) + new] = [*prompt, *row]
        z[key] = np.asarray(full_logits(config, params, adapter, whole))
    base = jax.random.key(0)
    for i, prompt in enumerate(prompts):
        at = slice(len(prompt) - 1, len(prompt) + new - 1)
        greedy = z["greedy"][i, at]
        assert np.all(greedy.max(axis=-1) - greedy[np.arange(new), rows[i]] < TIE)
        # Sampled text does not settle into a loop, so it reads more of the cache.
        expected = np.asarray(drawn(jax.random.fold_in(base, i), z["sampled"][i, at] / PLAIN.temperature))
        assert (expected == other[i]).mean() > 0.97  # a number on the edge between two tokens may fall on either side
