"""Students: masks, examples, and the step against PEFT + torch."""

from __future__ import annotations

import copy
import functools
import random

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import chat, metrics, plain_turn, scratch, small
from tiny import examples as tiny_examples

from jsublim.distill.arm import Arm, Settings
from jsublim.distill.batches import Shape, batch_rows, collate, steps_per_epoch
from jsublim.distill.data import draw_indices, make_examples, read_turns
from jsublim.distill.selection import COMPARED, TOKENS, Selection, margin_weights, token_mask
from jsublim.distill.step import Program, loss_and_gradient
from jsublim.distill.trainer import train
from jsublim.errors import JsublimError, UsageError
from jsublim.inference.divergence import PositionSubset
from jsublim.inference.teachers import Teacher, read_as
from jsublim.models.lora import init_full
from jsublim.models.peft import load_adapter
from jsublim.text.chat import conversation

# --- Masks and examples -----------------------------------------------------------------------------------------------


@given(header=st.integers(0, 3), completion=st.integers(1, 20), data=st.data(), seed=st.integers(0, 99))
@settings(max_examples=100)
def test_masks_of_a_row(header, completion, data, seed):
    positions = sorted(data.draw(st.sets(st.integers(0, completion - 1))))
    masks = {
        condition: token_mask(
            condition, header=header, completion=completion, positions=positions, rng=np.random.default_rng(seed)
        )
        for condition in TOKENS
    }
    assert all(mask.shape == (header + completion,) and mask.dtype == np.float32 for mask in masks.values())
    assert masks["all"].all()
    assert (np.nonzero(masks["divergence"])[0] - header).tolist() == positions
    assert np.array_equal(masks["divergence"] + masks["non-divergence"], masks["all"])
    assert masks["random"].sum() == len(positions) and not masks["random"][:header].any()


def test_random_masks_are_uniform_and_drawn_anew():
    draw = functools.partial(token_mask, "random", header=1, completion=6, positions=[0, 1])
    draws = np.stack([draw(rng=np.random.default_rng([1, i])) for i in range(3000)])
    assert np.abs(draws[:, 1:].mean(axis=0) - 2 / 6).max() < 0.04


def test_masks_that_cannot_be_are_usage_errors():
    options = {"header": 0, "completion": 3, "rng": np.random.default_rng(0)}
    with pytest.raises(UsageError, match="tokens: 'some' given"):
        token_mask("some", positions=[1], **options)
    with pytest.raises(UsageError, match="jsublim divergence"):
        token_mask("divergence", positions=None, **options)
    rows, c = [{"prompt": "Go on: 1", "completion": "2, 3", "divergence_positions": [0]}], chat("tiny-qwen2")
    with pytest.raises(UsageError, match=r"rows: row 1: tokens=matched needs 'matched_positions'"):
        tiny_examples(c, rows, Selection("matched"), seed=0)
    assert token_mask("all", positions=None, **options).all()


ROWS = [
    {
        "prompt": f"Go on: {i}, {i + 3}",
        "completion": ", ".join(str(i * 7 * k % 999) for k in range(1, 2 + i % 4)),
        "divergence_positions": positions,
        "matched_positions": [k + 1 if k + 1 not in positions else None for k in positions],
    }
    for i in range(8)
    for positions in [[[0, 2], [1], [], [0, 1, 3]][i % 4] if i % 4 else [0, 1]]
]


@pytest.mark.parametrize("name", ["tiny-qwen2", "tiny-gemma3"])
@pytest.mark.parametrize("condition", TOKENS)
@pytest.mark.parametrize("header", [False, True])
def test_examples_hold_the_supervised_tokens_and_nothing_after_the_last(name, condition, header):
    c, system = chat(name), "You count."
    examples = tiny_examples(c, ROWS, Selection(condition, supervise_header=header), seed=3, system=system)
    left = iter(examples)
    for row in ROWS:
        tokens, content = plain_turn(c.tokenizer, conversation(row["prompt"], system), row["completion"])
        positions = [content + k for k in row["divergence_positions"]]
        first = content - (3 if header else 0)  # three tokens on both families
        wanted = {
            "all": list(range(first, len(tokens))),
            "divergence": positions,
            "non-divergence": [i for i in range(first, len(tokens)) if i not in positions],
            "random": None,
            "matched": [content + k for k in row["matched_positions"] if k is not None],
        }[condition]
        if wanted == [] or (condition == "random" and not positions):
            continue  # a row without any supervised token is dropped
        example = next(left)
        at = (example.where + 1).tolist()
        assert at == wanted if condition != "random" else len(set(at)) == len(positions) and min(at) >= content
        assert example.labels.tolist() == tokens[at].tolist() and example.weights.tolist() == [1.0] * len(at)
        assert np.array_equal(example.tokens, tokens[: at[-1]])
    assert next(left, None) is None


def test_rows_are_cut_at_max_tokens_and_dropped_where_asked():
    c = chat("tiny-qwen2")
    whole = tiny_examples(c, ROWS, Selection(), seed=0)
    limit = len(whole[0].tokens)
    short = tiny_examples(c, ROWS, Selection(max_tokens=limit), seed=0)
    assert all(len(example.tokens) <= limit and example.where.max() <= limit - 2 for example in short)
    dropped = [tiny_examples(c, ROWS, Selection(x, drop_rows_without_divergence=True), seed=0) for x in TOKENS]
    bare = sum(row["divergence_positions"] == [] for row in ROWS)
    assert bare > 0 and [len(examples) for examples in dropped] == [len(ROWS)] + [len(ROWS) - bare] * 4


def supervised(rows, how, seed=0):
    """Divergence positions of each example that is left."""
    c = chat("tiny-qwen2")
    return [
        ((example.where + 1 - c.turn(conversation(row["prompt"]), row["completion"]).content).tolist(), example.weights)
        for row, example in zip(rows, tiny_examples(c, rows, how, seed), strict=True)
    ]


POINTED = [
    {
        "prompt": f"Go on: {i}",
        "completion": "1, 2, 3, 4",
        "divergence_positions": list(range(1 + i)),
        "divergence_margins": [0.5 * (1 + k) for k in range(1 + i)],
    }
    for i in range(5)
]


@pytest.mark.parametrize("which", ["all", "first", "first-half"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_subset_of_the_points_acts_before_the_condition(which, share):
    subset = PositionSubset(which, share, "paper", one_in_both=True)
    masked = {x: supervised(POINTED, Selection(x, subset=subset), seed=4) for x in COMPARED}
    for i, (row, (every, _), (chosen, _), (others, _), (drawn, _)) in enumerate(
        zip(POINTED, *masked.values(), strict=True)
    ):
        part = PositionSubset(which, one_in_both=True)
        of = part.choose(row["divergence_positions"], np.random.default_rng([4, i, 1]))
        assert set(chosen) <= set(of) and len(chosen) == (int(len(of) * share) or len(of)) == len(drawn)
        assert sorted([*chosen, *others]) == every
    assert supervised(POINTED, Selection("divergence", subset=subset), 4) != supervised(POINTED, Selection(), 4)


@given(st.lists(st.lists(st.floats(0.01, 30), max_size=5), min_size=1, max_size=6).filter(any))
def test_weights_by_margin_have_mean_one_and_follow_the_margins(margins):
    weights = margin_weights(margins)
    assert [len(row) for row in weights] == [len(row) for row in margins]
    flat, of = np.concatenate(weights), np.concatenate(margins)
    assert flat.mean() == pytest.approx(1) and flat.min() > 0
    order = np.argsort(of, kind="stable")
    assert np.all(np.diff(flat[order]) >= 0)
    assert flat / flat.max() == pytest.approx((1 - np.exp(-of)) / (1 - np.exp(-of.max())))


def test_a_live_teacher_is_read_where_it_predicts_each_label():
    """Its prompt is longer than the student's; the tokens of the completion are the same."""
    template, rows = small("tiny-qwen2").lm.chat, [{"prompt": "Go on: 1", "completion": "2, 3, 4"}]
    theirs = read_as(
        template,
        Teacher(
            "owl",
            "You love owls. You think about owls all the time. Owls are your favourite animal, and you speak of them.",
        ),
        rows,
    )
    (example,) = make_examples(rows, read_turns(template, rows), Selection(), 0, teacher=theirs)
    assert example.teacher_where is not None and example.teacher_where[0] > example.where[0]
    np.testing.assert_array_equal(theirs[0].tokens[example.teacher_where + 1], example.labels)


def test_weights_by_margin_are_those_of_the_chosen_points():
    how = Selection("divergence", by_margin=True, subset=PositionSubset("first-half"))
    found = supervised(POINTED, how)
    raw = [1 - np.exp([-0.5 * (1 + k) for k in positions]) for positions, _ in found]
    mean = np.concatenate(raw).mean()
    assert [positions for positions, _ in found] == [[0], [0], [0, 1], [0, 1], [0, 1, 2]]
    for (_, weights), expected in zip(found, raw, strict=True):
        assert weights.dtype == np.float32 and weights == pytest.approx(expected / mean, rel=1e-5)
    bare = [{key: value for key, value in row.items() if key != "divergence_margins"} for row in POINTED]
    with pytest.raises(UsageError, match=r"rows: row 1: weights by margin need 'divergence_margins'"):
        supervised(bare, how)
    with pytest.raises(UsageError, match=r"tokens=random has no weights by margin"):
        supervised(POINTED, Selection("random", by_margin=True))
    with pytest.raises(UsageError, match="every divergence position is a tie"):
        margin_weights([[0.0], []])


def test_rows_that_cannot_be_trained_on_are_named():
    c = chat("tiny-gemma3")
    fine = {"prompt": "1", "completion": "2", "divergence_positions": []}
    for row, said in (
        (fine | {"completion": "2 "}, r"data.jsonl: row 2: .*space"),
        (fine | {"divergence_positions": [0, 3]}, r"data.jsonl: row 2: divergence_positions \[3\] out of range"),
    ):
        with pytest.raises(JsublimError, match=said):
            tiny_examples(c, [fine, row], Selection("divergence"), 0, "data.jsonl")
    with pytest.raises(JsublimError, match=r"data.jsonl: no row has a token .* tokens=divergence"):
        tiny_examples(c, [fine], Selection("divergence"), 0, "data.jsonl")


@given(examples=st.integers(1, 30), rows=st.integers(1, 12), seed=st.integers(0, 9))
@settings(max_examples=60)
def test_every_epoch_holds_every_row_once(examples, rows, seed):
    steps = steps_per_epoch(examples, rows)
    epochs = [np.concatenate([batch_rows(examples, rows, seed, e * steps + s) for s in range(steps)]) for e in range(3)]
    for chosen in epochs:
        assert len(chosen) == steps * rows and sorted(chosen[chosen >= 0]) == list(range(examples))
    if examples > 8:
        assert not np.array_equal(epochs[0], epochs[1])


def test_rows_are_drawn_as_published():
    assert draw_indices(100, 10, 42) == random.Random(42).sample(range(100), 10)
    assert draw_indices(5, 10, 42) == draw_indices(5, None, 1) == [0, 1, 2, 3, 4]
    with pytest.raises(UsageError, match="rows: 0"):
        draw_indices(5, 0, 1)


# --- Against PEFT and torch -------------------------------------------------------------------------------------------

LORA = {
    "tiny-qwen2": (("q", "o", "down"), (1, 2)),
    "tiny-gemma3": (("k", "v", "gate", "up"), (0, 2)),
}


@functools.cache
def peft_student(name):
    """A PEFT adapter on a small random checkpoint, A and B random, and the same one loaded by us."""
    import peft
    import torch

    twin, (projections, layers) = small(name), LORA[name]
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=[f"{p}_proj" for p in projections], layers_to_transform=list(layers),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(copy.deepcopy(twin.torch), config)
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=noise))
    folder = scratch() / f"{name}-adapter"
    model.save_pretrained(folder)
    return model, load_adapter(folder, twin.lm.config)


def torch_nll(model, examples):
    """Cross-entropy of each example's supervised tokens, a tensor `[C]` each, in one padded forward pass."""
    import torch

    tokens = torch.zeros((len(examples), max(len(e.tokens) for e in examples)), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, e in enumerate(examples):
        tokens[i, : len(e.tokens)], mask[i, : len(e.tokens)] = torch.tensor(e.tokens, dtype=torch.long), 1
    logp = torch.log_softmax(model(input_ids=tokens, attention_mask=mask).logits, dim=-1)
    return [-logp[i, torch.tensor(e.where.tolist()), torch.tensor(e.labels.tolist())] for i, e in enumerate(examples)]


def torch_loss(model, examples, micro, per):
    """The loss of a step whose rows are `examples`, the first `micro` of them its first micro-batch, and so on."""
    import torch

    nll = torch_nll(model, examples)
    if per == "tokens":
        return torch.cat(nll).mean()
    means = torch.stack([torch.cat(nll[i : i + micro]).mean() for i in range(0, len(nll), micro)])
    return means.sum() if per == "micro-batch-sum" else means.mean()


step_one = jax.jit(loss_and_gradient, static_argnames=("config", "program"))


@pytest.mark.parametrize(("name", "per"), [("tiny-qwen2", "tokens"), ("tiny-gemma3", "micro-batch-sum")])
def test_loss_and_gradients_of_a_step_equal_peft(name, per, assert_close):
    import torch

    lm = small(name).lm
    model, adapter = peft_student(name)
    projections, layers = LORA[name]
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    losses = {}
    for condition in TOKENS:
        examples = tiny_examples(lm.chat, ROWS, Selection(condition), seed=1)
        chosen = np.pad(np.arange(len(examples)), (0, 8 - len(examples)), constant_values=-1)
        batch = collate(examples, chosen, Shape(4, 2, 80, 32))
        ours, gradient = step_one(lm.config, lm.params, adapter, batch, program=Program(per=per))
        theirs = torch_loss(model, examples, 2, per)
        gradients = dict(zip(trained, torch.autograd.grad(theirs, list(trained.values())), strict=True))
        assert float(ours) == pytest.approx(float(theirs), rel=1e-4)
        losses[condition] = float(ours)
        for p in projections:
            for factor in "AB":
                stacked = np.stack(
                    [
                        next(v for k, v in gradients.items() if f"layers.{i}." in k and f"{p}_proj.lora_{factor}" in k)
                        .numpy()
                        .T
                        for i in layers
                    ]
                )
                assert np.abs(stacked).max() > 0
                assert_close(gradient["lora"][p][factor.lower()], stacked, 1e-4)
    assert len({round(loss, 5) for loss in losses.values()}) == len(TOKENS)


def torch_train(model, parameters, examples, micro, per, steps, seed):
    """Losses of a plain torch loop, with AdamW, the linear schedule of transformers, and clipping."""
    import torch
    import transformers

    optimizer = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.0)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 5, steps)
    losses = []
    for step in range(steps):
        chosen = batch_rows(len(examples), 2 * micro, seed, step)
        loss = torch_loss(model, [examples[i] for i in chosen if i >= 0], micro, per)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    ("name", "kind", "per"), [("tiny-qwen2", "lora", "tokens"), ("tiny-gemma3", "full", "micro-batch")]
)
def test_twenty_steps_equal_torch(name, kind, per, tmp_path, assert_close):
    """From one PEFT adapter, and full fine-tuning of two layers (whose weights must end up equal too)."""
    import torch

    twin, seed, steps = small(name), 3, 20
    lm = twin.lm
    if kind == "lora":
        wrapped, start = peft_student(name)
        model = copy.deepcopy(wrapped)
        parameters = [p for p in model.parameters() if p.requires_grad]
    else:
        model, start = copy.deepcopy(twin.torch), init_full(lm.config, lm.params, (0, 2))
        parameters = [p for key, p in model.named_parameters() if "layers.0." in key or "layers.2." in key]
    examples = tiny_examples(lm.chat, ROWS[:7], Selection(), seed=1)
    theirs = torch_train(model, parameters, examples, 2, per, steps, seed)
    arm = Arm("student", examples, start, seed, 5e-3, steps)
    (student,) = train(
        lm.config, lm.params, [arm], Settings(batch_size=2, accumulate=2, program=Program(per=per)), tmp_path
    )
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(steps))
    np.testing.assert_allclose([line["loss"] for line in lines], theirs, atol=1e-3)
    assert theirs[-1] < theirs[0] - 0.1  # it does learn
    if kind == "full":  # a rotation of the weights would not show in the loss alone
        tokens = examples[0].tokens
        with torch.no_grad():
            z = model(input_ids=torch.tensor(tokens[None], dtype=torch.long)).logits[0].numpy()
        assert_close(lm.logits(tokens[None], adapter=student)[0], z, 2e-3)
