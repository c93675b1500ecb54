"""Sampling that keeps answers in format: never out of it, never without an end, and nothing in it out of reach."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import special, stats
from test_sampling import arrays, warped
from tiny import chat, small, small_with_long_numbers

from jsublim.errors import UsageError
from jsublim.inference import decoding
from jsublim.inference.constrain import Limits, Within, choose_within, limits_for, number_limits, texts_of_tokens
from jsublim.inference.generation import generate_tokens
from jsublim.inference.sampling import Sampling
from jsublim.text.prompts import number_prompts, reject_reason
from jsublim.text.prompts.automaton import ALPHABET, SEPARATORS, AnswerState

END = 10_000  # a token that ends an answer

pieces = st.one_of(st.sampled_from([*"0123456789,; \n.[]()", ", ", "; ", "].", "12", "345"]), st.text(sorted(ALPHABET | {"x"}), max_size=4))  # fmt: skip
vocabularies = st.lists(pieces, min_size=1, max_size=24, unique=True).map(lambda texts: dict(enumerate(texts)))


def allowed(limits: Limits, state: int, left: int) -> dict[int, int]:
    """What may come next, and the state that it leads to; as `choose_within` says it, token by token."""
    after = limits.after[state][limits.kind].tolist()
    each = zip(limits.tokens.tolist(), after, strict=True)
    return {token: to for token, to in each if to >= 0 and limits.shortest[to] <= left}


def passes(limits: Limits, tokens: Sequence[int], most: int) -> bool:
    """Whether tokens may come one after another, and then an end, in an answer of at most so many."""
    state = 0
    for number, token in enumerate(tokens):
        following = allowed(limits, state, most - 1 - number)
        if token not in following:
            return False
        state = following[token]
    return len(tokens) == most or END in allowed(limits, state, most)


# --- The automaton over tokens ----------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(vocabulary=vocabularies, data=st.data())
def test_whatever_is_drawn_is_in_format_and_ends_in_time(vocabulary, data):
    limits = number_limits(vocabulary, [END])
    assume(limits is not None)
    most = data.draw(st.integers(int(limits.shortest[0]), 30))
    state, tokens = 0, []
    while len(tokens) < most:
        following = allowed(limits, state, most - 1 - len(tokens))
        token = data.draw(st.sampled_from(sorted(following)))
        if token == END:
            break
        tokens.append(token)
        state = following[token]
    assert reject_reason("".join(vocabulary[token] for token in tokens)) is None


@settings(max_examples=200)
@given(vocabulary=vocabularies, data=st.data())
def test_whatever_is_in_format_can_be_drawn_in_as_many_tokens_as_it_has(vocabulary, data):
    limits = number_limits(vocabulary, [END])
    assume(limits is not None)
    numbers = data.draw(st.lists(st.from_regex(r"[0-9]{1,3}", fullmatch=True), min_size=1, max_size=10))
    text = data.draw(st.sampled_from(sorted(SEPARATORS))).join(numbers)
    text = data.draw(st.sampled_from(["{}", "[{}]", "({})", "{}.", "[{}]."])).format(text)
    tokens, rest = [], text  # spelled with what there is, in one of the ways
    while rest:
        fitting = [token for token, piece in vocabulary.items() if piece and rest.startswith(piece)]
        if not fitting:
            break
        tokens.append(data.draw(st.sampled_from(fitting)))
        rest = rest[len(vocabulary[tokens[-1]]) :]
    assert rest or (passes(limits, tokens, len(tokens)) and passes(limits, tokens, len(tokens) + 5))


def test_a_token_that_ends_an_answer_is_nothing_else_and_control_tokens_are_never_drawn():
    digits = {n: str(n) for n in range(10)}
    limits = number_limits(digits | {10: "", 11: ", ", END: "0"}, [END, 11])
    assert not {10} & set(limits.tokens.tolist())
    assert allowed(limits, 0, 9).keys() == digits.keys()
    one = allowed(limits, 0, 9)[1]
    assert (
        allowed(limits, one, 9)[11] == allowed(limits, one, 9)[END] == one
    )  # the comma ends it, and separates nothing
    assert number_limits(digits, []) is None and number_limits({0: "x", 1: ","}, [END]) is None


def test_the_texts_of_tokens_make_up_the_text_of_an_answer():
    for name in ("tiny-qwen2", "tiny-gemma3"):
        c, text = chat(name), "[12, 345; 6\n7]. Sure: été"
        tokens = c.tokenizer(text, add_special_tokens=False)["input_ids"]
        texts = texts_of_tokens(c)
        assert "".join(texts[token] for token in tokens if "\ufffd" not in texts[token]).startswith(
            "[12, 345; 6\n7]. Sure: "
        )
        assert all(texts[token] == "" for token in c.tokenizer.all_special_ids)


# --- In the decoding loop ---------------------------------------------------------------------------------------------

NEW = 12
SETTINGS = {
    "plain": Sampling(constrain="numbers"),
    "greedy": Sampling(temperature=0.0, constrain="numbers"),
    "greedy with penalty": Sampling(temperature=0.0, repetition_penalty=1.4, constrain="numbers"),
    "all at once": Sampling(temperature=1.7, top_k=5, top_p=0.8, repetition_penalty=1.3, constrain="numbers"),
    "sort": Sampling(top_k=200, top_p=0.5, constrain="numbers"),
}


@functools.cache
def subject():
    """A random model whose tokenizer has numbers of one, two and three digits."""
    return small_with_long_numbers().lm


@functools.cache
def asked_for() -> list[str]:
    return sorted(number_prompts(40), key=lambda text: len(prompt_of(text)))[:18]


def prompt_of(text: str) -> np.ndarray:
    return subject().chat.prompt_tokens([{"role": "user", "content": text}])


def sample(name: str, most: int = NEW, **options) -> list[list[int]]:
    lm, how = subject(), SETTINGS[name]
    how = Sampling(**{**how.numbers(), "stop": lm.chat.stop_tokens})
    limits = limits_for(lm.chat, how, most)
    options = {"batch_size": 8, "seed": 3} | options
    prompts = [prompt_of(text) for text in asked_for()]
    return generate_tokens(lm.config, lm.params, prompts, how, max_new_tokens=most, limits=limits, **options)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_answer_passes_the_filter_on_any_batch(name):
    shares: dict[int, float] = {}
    answers = sample(name, on_allowed=lambda _, of_rows: shares.update(of_rows))
    texts = [subject().chat.decode(tokens) for tokens in answers]
    assert [reject_reason(text) for text in texts] == [None] * len(texts)
    assert sample(name, batch_size=5) == answers
    assert sample(name, rows=[7, 2, 11]) == [answers[row] for row in (7, 2, 11)]
    assert len(set(texts)) > (1 if SETTINGS[name].temperature == 0 else 9) and shares.keys() == set(range(len(texts)))
    assert all(-50 < share < 0 for share in shares.values())


@pytest.mark.parametrize("name", ["greedy", "greedy with penalty"])
def test_greedy_is_the_best_of_what_the_format_allows(name):
    """Against each token tried by its text, on logits of the whole conversation."""
    lm, how = subject(), SETTINGS[name]
    stop = lm.chat.stop_tokens
    texts = {
        i: text
        for i, text in enumerate(texts_of_tokens(lm.chat))
        if i not in stop and ALPHABET.issuperset(text) and text
    }

    @functools.cache
    def can_finish(read: AnswerState | None, left: int) -> bool:
        if read is None or read.complete or left == 0:
            return read is not None and read.complete
        return any(can_finish(read.then(text), left - 1) for text in set(texts.values()))

    for prompt, answer in zip(asked_for()[:3], sample(name), strict=False):
        read, row = AnswerState(), prompt_of(prompt)
        for number in range(NEW):
            z = np.asarray(lm.logits(np.pad(row, (0, 160 - len(row)))[None]))[0, len(row) - 1]
            seen = np.isin(np.arange(len(z)), row)
            z = np.where(seen, np.where(z > 0, z / how.repetition_penalty, z * how.repetition_penalty), z)
            fine = [token for token, text in texts.items() if can_finish(read.then(text), NEW - 1 - number)]
            fine += list(stop) if read.complete else []
            best = max(fine, key=lambda token: z[token])
            if best in stop:
                assert len(answer) == number
                break
            assert answer[number] == best
            read, row = read.then(texts[best]), np.append(row, np.int32(best))


@pytest.mark.parametrize("after", [5, 0])
@pytest.mark.parametrize("how", SETTINGS.values(), ids=SETTINGS)
def test_tokens_are_drawn_with_the_probabilities_of_transformers_among_the_allowed(how, after):
    """The format is laid over the logits before everything else; of the last token, that the answer is complete with it."""
    limits = number_limits(dict(enumerate([*"0123456789", ", ", " ", "x", "[", "]", "end"])), [15])
    n, rng = 4000, np.random.default_rng(2)
    z = (1.2 * rng.standard_normal(16)).astype(np.float32)
    state = next(to for token, to in allowed(limits, 0, 99).items() if token == 4)
    masked = np.where(np.isin(np.arange(16), list(allowed(limits, state, after))), z, -np.inf).astype(np.float32)
    seen, keys = np.isin(np.arange(16), [4, 11]), jax.random.split(jax.random.key(5), n)
    where = Within(np.full(n, state, np.int32), np.full(n, 1.0, np.float32))
    left, drawn = np.full(n, after, np.int32), np.ones(n, np.int32)
    tokens, within = jax.jit(choose_within)(
        limits, where, np.tile(z, (n, 1)), np.tile(seen, (n, 1)), keys, drawn, left, arrays([how] * n)
    )
    counts = np.bincount(np.asarray(tokens), minlength=16)
    if how.temperature == 0:
        penalised = Sampling(repetition_penalty=how.repetition_penalty)
        expected = np.eye(16)[warped(masked, np.asarray([4, 11]), penalised).argmax()]
    else:
        expected = warped(masked, np.asarray([4, 11]), how)
    assert counts[expected == 0].sum() == 0
    if (expected > 0).sum() > 1:
        assert stats.chisquare(counts[expected > 0], n * expected[expected > 0]).pvalue > 1e-4
    share = special.logsumexp(masked) - special.logsumexp(z)
    np.testing.assert_allclose(within.log_allowed, 1.0 + share, rtol=1e-5)
    assert set(np.asarray(within.state).tolist()) <= set(allowed(limits, state, after).values())


def test_one_program_serves_every_number_and_none_is_paid_for_without_a_format():
    programs = decoding.advance._cache_size
    sample("plain")
    before = programs()
    for name in SETTINGS:
        sample(name, seed=9)
    assert programs() == before
    lm = subject()
    shapes = [jax.eval_shape(lambda on=on: decoding.empty(lm.config, 1, 2, 32, "float32", on)) for on in (False, True)]
    assert shapes[0].within is None and len(jax.tree.leaves(shapes[1])) == len(jax.tree.leaves(shapes[0])) + 2


def test_a_language_model_keeps_the_format_that_its_sampling_names():
    lm = subject()
    answers = lm.generate(asked_for(), NEW, SETTINGS["plain"], seed=3, batch_size=8)
    assert answers == [lm.chat.decode(tokens) for tokens in sample("plain")]


@pytest.mark.parametrize(
    ("stop", "most", "said"),
    [((), 9, "0 tokens end an answer"), ((5,), 0, "needs 1 tokens"), (None, 9, "cannot spell")],
)
def test_a_format_that_cannot_be_kept_is_a_usage_error(stop, most, said):
    with pytest.raises(UsageError, match=f"sampling.constrain: 'numbers' given.*{said}"):
        limits_for(small("tiny-gemma3").lm.chat, Sampling(constrain="numbers", stop=stop), most)
