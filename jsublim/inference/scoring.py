"""Teacher-forced reading of conversations: what the model would have said at each token of a completion.

What all conversations of a call begin with (a system prompt) is read once; the head is applied to completion
positions only, a block of them at a time, so there is never a `[B, T, V]` array.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jsublim.errors import UsageError
from jsublim.inference.batching import (
    LENGTH_STEP,
    PREFIX_STEP,
    ROWS_EACH,
    Batches,
    branched,
    chunks,
    few_sizes,
    fill,
    in_lines,
    line_tokens,
    pad_tokens,
    round_up,
    shared_beginning,
)
from jsublim.inference.sampling import argmax
from jsublim.models import decoder
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import KV, Branches, Params
from jsublim.models.lora import Adapter, at_every_layer, bind
from jsublim.models.parallel import HERE, ROWS, WHOLE, Layout
from jsublim.text.chat import Turn

_NEVER = -1e30  # a log-probability
HEAD_BLOCK = 256  # positions whose logits exist at one time, on one device
ANSWERS_EACH = 16  # rows of answers that a device reads at one time, where nobody says
ANSWERS_STEP = 256  # tokens of answers that stand beside one another

At = Callable[[Array, Array], Any]  # (logits [V], the label there: a token, or k of them) -> a pytree


@dataclass(frozen=True)
class Scored:
    """The model's reading of one conversation at its tokens from `content` to the last, arrays `[n]`."""

    argmax: np.ndarray  # int32, the model's most probable token
    margin: np.ndarray  # float32, its logit over the runner-up's
    logprob: np.ndarray  # float32, log-probability (nats) of the token that stands there
    entropy: np.ndarray  # float32, of the model's prediction (nats)


@dataclass(frozen=True)
class Targets:
    """Next-token distributions on one conversation at its tokens from `content` to the last, cut to k tokens."""

    ids: np.ndarray  # int32 [n, k], the most probable tokens
    logp: np.ndarray  # float32 [n, k + 1], log-probabilities (nats) of those, and of all others together


@functools.partial(jax.jit, static_argnames=("config",))
def prefix_cache(config: ModelConfig, params: Params, adapter: Adapter | None, tokens_1P: Array) -> KV | None:
    """Keys and values `[L, 1, K, P, h]` of tokens that stand before many rows."""
    params, adapter = bind(params, adapter)
    valid = jnp.ones(tokens_1P.shape, bool)
    return decoder.hidden_states(config, params, tokens_1P, valid, adapter=adapter, with_cache=True)[1]


@functools.partial(jax.jit, static_argnames=("config", "at", "layout"))
def read_batch(
    config: ModelConfig,
    params: Params,
    adapter: Adapter | None,
    prefix: KV | None,
    tokens_BT: Array,
    valid_BT: Array,
    where_BC: Array,
    labels_BC: Array,
    at: At,
    branches: Branches | None = None,
    layout: Layout = HERE,
) -> Any:
    """`at(logits [V], label)` at every position `where_BC`, leaves `[B, C, ...]`; labels may have further axes."""

    def read(params, adapter, prefix, tokens_BT, valid_BT, where_BC, labels_BC, branches) -> Any:
        params, adapter = bind(params, adapter)
        how = {"adapter": adapter, "prefix": prefix, "branches": branches}
        h, _ = decoder.hidden_states(config, params, tokens_BT, valid_BT, **how)
        h_BCD = jnp.take_along_axis(h, where_BC[..., None], axis=1)
        flat = jax.lax.map(
            lambda xs: at(decoder.logits(config, params, xs[0]), xs[1]),
            (h_BCD.reshape(-1, h.shape[-1]), labels_BC.reshape(-1, *labels_BC.shape[2:])),
            batch_size=HEAD_BLOCK,
        )
        return jax.tree.map(lambda x: x.reshape(*where_BC.shape, *x.shape[1:]), flat)

    spread = layout.spread(read, (WHOLE, WHOLE, WHOLE, ROWS, ROWS, ROWS, ROWS, ROWS), ROWS)
    return spread(params, adapter, prefix, tokens_BT, valid_BT, where_BC, labels_BC, branches)


def best_token(z: Array, label: Array) -> tuple[Array, Array, Array, Array]:
    best, total = argmax(z), jax.nn.logsumexp(z)
    runner_up = jnp.max(jnp.where(jnp.arange(z.shape[0]) == best, -jnp.inf, z))
    return best.astype(jnp.int32), z[best] - runner_up, z[label] - total, total - jnp.sum(jnp.exp(z - total) * z)


def _logprob(z: Array, label: Array) -> Array:
    return z[label] - jax.nn.logsumexp(z)


def top_k_log_probs(logits: Array, ids: Array) -> Array:
    """Log-probabilities `[..., k + 1]` of the tokens `ids` `[..., k]`, and of all others together (the lumped tail)."""
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, ids, axis=-1) - total
    named = jnp.put_along_axis(jnp.zeros(logits.shape, bool), ids, True, axis=-1, inplace=False)
    rest = jnp.where(named, jnp.finfo(logits.dtype).min, logits)  # finite: an empty tail must not become NaN
    tail = jax.nn.logsumexp(rest, axis=-1, keepdims=True) - total
    return jnp.concatenate([chosen, tail], axis=-1)


@functools.cache
def _top_k(k: int, temperature: float) -> At:
    def at(z: Array, label: Array) -> tuple[Array, Array]:
        ids = jax.lax.top_k(z, k)[1]
        return ids.astype(jnp.int32), top_k_log_probs(z / temperature, ids)

    return at


@functools.cache
def _label_and_best(k: int) -> At:
    def at(z: Array, label: Array) -> tuple[Array, Array, Array]:
        ids, logp = _top_k(k, 1.0)(z, label)
        return _logprob(z, label), ids, logp[:-1]

    return at


def label_and_best(
    config: ModelConfig, params: Params, turns: Sequence[Turn], k: int, **options: Any
) -> Iterator[list[np.ndarray]]:
    """At every token from `content` on of each conversation: the log-probability (nats) of the token that stands there, float32 `[n]`, the k most
    probable tokens, int32 `[n, k]`, and their log-probabilities, float32 `[n, k]`. Options are as of `_read_turns`."""
    yield from _read_turns(config, params, turns, _label_and_best(k), **options)


def score_turns(config: ModelConfig, params: Params, turns: Sequence[Turn], **options: Any) -> list[Scored]:
    """Every conversation, read as by `scores`."""
    return list(scores(config, params, turns, **options))


def scores(config: ModelConfig, params: Params, turns: Sequence[Turn], **options: Any) -> Iterator[Scored]:
    """Read conversations teacher-forced, one after another; options are as of `_read_turns`."""
    for x in _read_turns(config, params, turns, best_token, **options):
        yield Scored(*x)


def top_k_targets(
    config: ModelConfig, params: Params, turns: Sequence[Turn], k: int, *, temperature: float = 1.0, **options: Any
) -> Iterator[Targets]:
    """A teacher's distribution at every token from `content` on, as its k best tokens (fewer than the vocabulary has) and the rest as one;
    conversation after conversation. Options are as of `_read_turns`."""
    if k >= config.vocab_size:
        raise UsageError(
            f"top_k: {k} given, the vocabulary has {config.vocab_size} tokens; leave it out for all of them"
        )
    for x in _read_turns(config, params, turns, _top_k(k, temperature), **options):
        yield Targets(*x)


def log_probs_of(
    config: ModelConfig, params: Params, turns: Sequence[Turn], ids: Sequence[np.ndarray], **options: Any
) -> Iterator[np.ndarray]:
    """Log-probabilities (nats), float32 `[n, k + 1]` for each conversation, of the k tokens `ids` int32 `[n, k]` at each token from
    `content` on, and of all others together. Options are as of `_read_turns`."""
    for (logp,) in _read_turns(config, params, turns, top_k_log_probs, labels_of=ids, **options):
        yield logp


def score_answers(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[np.ndarray],
    answers: Sequence[np.ndarray],
    *,
    adapter: Adapter | None = None,
    batch_size: int | None = None,
) -> np.ndarray:
    """Log-probability (nats) of each answer after each prompt (int32 `[T_i]`, at least one token each), all its tokens together: float64 `[prompts,
    answers]`. A prompt is read once for all the answers that stand beside one another in its row. `batch_size` rows are read at one time, on
    all devices together; each has as many. None is ANSWERS_EACH on each."""
    longest = max(map(len, answers))
    decoder.check_length(config, max(map(len, prompts)) + longest - 1)  # no answer's last token is read
    together = min(len(answers), max(1, ANSWERS_STEP // longest))
    groups = [range(i, min(i + together, len(answers))) for i in range(0, len(answers), together)]
    rows = [(prompt, group) for prompt in range(len(prompts)) for group in groups]
    T = round_up(max(map(len, prompts)) + together * (longest - 1), LENGTH_STEP)
    C = round_up(together * longest, PREFIX_STEP)
    layout, params = Layout.under(params)
    most = batch_size or ANSWERS_EACH * layout.data
    B = round_up(few_sizes(len(rows), most), layout.data)
    adapter, scores = _placed(config, layout, adapter), np.zeros((len(prompts), len(answers)))
    for part in chunks(len(rows), B):
        batch = [_beside_one_another(prompts[prompt], [answers[i] for i in group]) for prompt, group in rows[part]]
        batch += [batch[-1]] * (B - len(batch))
        row_tokens, *others = zip(*batch, strict=True)
        tokens, valid = pad_tokens(row_tokens, T)
        where, labels, positions, branch = (
            fill(values, length, np.zeros(0, np.int32)) for values, length in zip(others, (C, C, T, T), strict=True)
        )
        branches = Branches(positions, branch)  # pyright: ignore[reportArgumentType] (arrays of the host, until they are placed)
        *read, branches = layout.place_as(ROWS, (tokens, valid, where, labels, branches))
        how: dict[str, Any] = {"at": _logprob, "branches": branches, "layout": layout}
        logprobs = Layout.host(read_batch(config, params, adapter, None, *read, **how))
        for logprob, (prompt, group) in zip(logprobs, rows[part], strict=False):
            ends = np.cumsum([len(answers[i]) for i in group])
            by_answer = np.split(logprob[: ends[-1]].astype(np.float64), ends[:-1])
            scores[prompt, group.start : group.stop] = [x.sum() for x in by_answer]
    return scores


def _beside_one_another(prompt: np.ndarray, answers: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """A prompt and answers to it as one row, int32 arrays: its tokens; where the answers' tokens are predicted, and which they are; and
    of each token its position and branch."""
    n, read = len(prompt), [len(answer) - 1 for answer in answers]  # the last token of an answer is predicted only
    firsts = n + np.cumsum([0, *read[:-1]])
    where = [np.r_[n - 1, first + np.arange(count)] for first, count in zip(firsts, read, strict=True)]
    tokens = np.concatenate([prompt, *(answer[:-1] for answer in answers)])
    return tokens, np.concatenate(where).astype(np.int32), np.concatenate(answers), *branched(n, read)


def answers_only(targets: Sequence[Targets], turns: Sequence[Turn]) -> list[Targets]:
    """Distributions over the tokens that stand in the answers of `turns`, end of turn included, renormalised. What a teacher would rather have
    said than a number is no part of its answers, and a student must not learn it from their probabilities. A place
    where none of the stored tokens is one of those is a UsageError."""
    spoken = np.unique(np.concatenate([turn.tokens[turn.content :] for turn in turns]))
    cut = []
    for number, (ids, logp) in enumerate(((row.ids, row.logp) for row in targets), 1):
        named = np.where(np.isin(ids, spoken), logp[:, :-1].astype(np.float64), -np.inf)
        total = np.logaddexp.reduce(named, axis=1, keepdims=True)
        if not np.isfinite(total).all():
            raise UsageError(
                f"top_k: {ids.shape[1]} stored tokens hold none of the answers' at row {number}; store more"
            )
        # Not minus infinity: zero times that is not a number.
        named = np.maximum(named - total, _NEVER)
        cut.append(Targets(ids, np.pad(named, ((0, 0), (0, 1)), constant_values=_NEVER).astype(np.float32)))
    return cut


def _placed(config: ModelConfig, layout: Layout, adapter: Adapter | None) -> Adapter | None:
    return None if adapter is None else layout.place_weights(at_every_layer(adapter, config.num_layers))


def _read_turns(
    config: ModelConfig,
    params: Params,
    turns: Sequence[Turn],
    at: At,
    *,
    adapter: Adapter | None = None,
    batch_size: int | None = None,
    on_batch: Callable[[int], None] | None = None,
    first: int = 0,
    labels_of: Sequence[np.ndarray] | None = None,
) -> Iterator[list[np.ndarray]]:
    """`at(logits, label)` at every token from `content` on of each conversation from number `first` on, arrays `[n, ...]`. Of many conversations
    short ones share a line of the batch, where each sees itself alone. How they lie there follows from all of them, so that the last bit of
    one does not depend on where reading began.

    Args:
      batch_size: of the longest conversations so many are read at one time, on all devices together; each has as many. None is ROWS_EACH on each.
      on_batch: called with the number of conversations just read.
      labels_of: the conversations, `[n, ...]`; None are the tokens themselves.
    """
    chex.assert_rank([turn.tokens for turn in turns], 1)
    if first == len(turns):
        return
    decoder.check_length(config, max(len(turn.tokens) for turn in turns))
    layout, params = Layout.under(params)
    adapter = _placed(config, layout, adapter)
    P = shared_beginning([turn.tokens[: turn.content] for turn in turns], PREFIX_STEP)
    prefix = prefix_cache(config, params, adapter, layout.place_as(WHOLE, turns[0].tokens[None, :P])) if P else None
    labels_of = [turn.tokens[turn.content :] for turn in turns] if labels_of is None else labels_of
    lengths = np.asarray([len(turn.tokens) - P for turn in turns])
    counts = [len(turn.tokens) - turn.content for turn in turns]
    T, B, batches = _in_lines(config, lengths, batch_size or ROWS_EACH * layout.data, layout.data)
    several = any(len(line) > line.max() + 1 for _, line in batches)
    longest = max(np.bincount(line, counts[i : i + len(line)]).max() for i, line in batches)
    C = round_up(int(longest), LENGTH_STEP)
    for begin, line in batches:
        rows = range(max(begin, first), begin + len(line))
        if not rows:
            continue
        lines = [(begin + np.flatnonzero(line == number)).tolist() for number in range(B)]
        *read, branches = layout.place_as(ROWS, _laid_out(lines, turns, labels_of, P, T, C, several=several))
        how: dict[str, Any] = {"at": at, "branches": branches, "layout": layout}
        out = jax.tree.leaves(Layout.host(read_batch(config, params, adapter, prefix, *read, **how)))
        if on_batch is not None:
            on_batch(len(rows))
        sums = (np.cumsum([counts[i] for i in of_line]) for of_line in lines)
        ends = dict(zip(itertools.chain(*lines), itertools.chain(*sums), strict=True))
        for i in rows:
            yield [x[line[i - begin], ends[i] - counts[i] : ends[i]] for x in out]


def _in_lines(config: ModelConfig, lengths: np.ndarray, rows: int, devices: int) -> tuple[int, int, Batches]:
    """How many tokens a line has, how many lines a batch of about `rows` of the longest rows, and the batches: with lines of twice the
    longest row where that is less work."""
    longest = round_up(int(lengths.max()), LENGTH_STEP)
    plans = {k * longest: in_lines(lengths, k * longest, max(1, rows // k), devices) for k in (1, 2)}
    tokens = line_tokens(config, longest, lambda tokens: len(plans[tokens][1]) * plans[tokens][0])
    return tokens, *plans[tokens]


def _laid_out(
    lines: Sequence[Sequence[int]],
    turns: Sequence[Turn],
    labels_of: Sequence[np.ndarray],
    P: int,
    T: int,
    C: int,
    *,
    several: bool,
) -> tuple[np.ndarray | Branches | None, ...]:
    """Conversations by their numbers in lines, one after another, without the P tokens that all begin with: tokens and which are some `[B, T]`;
    where those from `content` on are predicted, and their labels `[B, C, ...]`; and, where a line has `several`, whose each token is."""
    laid = [_line([turns[i] for i in line], [labels_of[i] for i in line], P) if line else [None] * 5 for line in lines]
    tokens, where, labels, positions, branch = map(list, zip(*laid, strict=True))
    number, like = np.zeros(0, np.int32), np.zeros((0, *labels_of[0].shape[1:]), np.int32)
    branches = Branches(fill(positions, T, number), fill(branch, T, number)) if several else None  # type: ignore[arg-type]
    return *pad_tokens(tokens, T), fill(where, C, number), fill(labels, C, like), branches


def _line(turns: Sequence[Turn], labels: Sequence[np.ndarray], P: int) -> list[np.ndarray]:
    """A line of `_laid_out`: tokens; where some are predicted, and the labels there; positions and branches."""
    lengths = [len(turn.tokens) - P for turn in turns]
    starts = np.cumsum([0, *lengths[:-1]])
    # A token is predicted at the position before it.
    where = [at + np.arange(turn.content, len(turn.tokens)) - 1 - P for at, turn in zip(starts, turns, strict=True)]
    tokens, (positions, branch) = np.concatenate([turn.tokens[P:] for turn in turns]), branched(0, lengths)
    return [tokens, np.concatenate(where), np.concatenate(labels), positions + P, branch]
