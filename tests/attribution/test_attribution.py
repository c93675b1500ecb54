"""Attribution patching against torch's hooks and gradients, token roles by their text, the stage and its figure."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import contents, ok, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, bundled, chat, small

from jsublim.attribution import patching
from jsublim.attribution.pairs import NO_EQUAL_LENGTH, NO_OTHER_TOKEN, NO_POINT, Pair, find_pairs
from jsublim.attribution.patching import DIRECTIONS, SITES, activation_patching, attribution_patching, layer_patching
from jsublim.attribution.roles import ROLES, mentions, token_roles
from jsublim.divergence import find_divergence
from jsublim.errors import JsublimError, UsageError
from jsublim.models.decoder import hidden_states
from jsublim.models.lora import bind, init_full, init_lora, init_steering, merge_full
from jsublim.models.stream import residual_stream, resume
from jsublim.pipeline.attribution import ATTRIBUTION, attribute_rows
from jsublim.pipeline.store import Artifact
from jsublim.prompts import load_pack, number_prompts
from jsublim.report.attribution import attribution_heat_map, early_share
from jsublim.rows import write_rows
from jsublim.teachers import CONTROL, Teacher, prompted_teacher

PACK = load_pack()


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


class Hooked:
    """A `transformers` model on one pair, whose sites can be read and replaced."""

    def __init__(self, name: str, pair: Pair, direction: str):
        self.model, self.pair = small(name).torch, pair
        start, end = (pair.clean, pair.patch) if direction == "noising" else (pair.patch, pair.clean)
        self.start, self.layers = start, range(len(self.model.model.layers))
        self.places = [(site, layer) for site in SITES for layer in self.layers]
        self.before = {place: self.value(start, place) for place in self.places}
        self.after = {place: self.value(end, place) for place in self.places}

    def module(self, site: str, layer: int):
        """What puts out a site's value: on Gemma the norm after attention and MLP comes before the sum."""
        block = self.model.model.layers[layer]
        sandwich = hasattr(block, "post_feedforward_layernorm")
        attention = block.post_attention_layernorm if sandwich else block.self_attn
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


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_attribution_equals_integrated_gradients_by_torch(name, direction, assert_close):
    lm, pairs = small(name).lm, random_pairs(1)
    for steps in (1, 3):
        ours = attribution_patching(lm.config, lm.params, pairs, direction=direction, steps=steps, batch_size=2)
        for pair, values_SLT in list(zip(pairs, ours, strict=True))[1:]:  # one of a full batch, one of a padded one
            theirs = Hooked(name, pair, direction).integrated(steps)
            assert values_SLT.shape == theirs.shape == (len(SITES), lm.config.num_layers, len(pair.clean))
            for mine, its in zip(values_SLT, theirs, strict=True):
                assert_close(mine, its, 1e-3)


@pytest.mark.parametrize(("name", "direction"), zip(FAMILIES, DIRECTIONS, strict=True))
def test_activation_and_layer_patching_equal_torchs_hooks(name, direction, assert_close):
    lm, pairs = small(name).lm, random_pairs(2)
    how = {"direction": direction, "batch_size": 2}
    ones = activation_patching(lm.config, lm.params, pairs, **how)
    whole = layer_patching(lm.config, lm.params, pairs, **how)
    for pair, one_SLT, whole_SL in list(zip(pairs, ones, whole, strict=True))[1:]:
        model = Hooked(name, pair, direction)
        assert_close(one_SLT, model.replaced([[t] for t in range(len(pair.clean))]), 1e-3)
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
    before, programs = compiles(), patching._integrated._cache_size()
    call(random_pairs(5, (11, 3, 8, 10, 12)), steps=6, direction="denoising")
    assert compiles() == before and patching._integrated._cache_size() == programs
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


# --- Pairs ----------------------------------------------------------------------------------------------------------------


def test_pairs_are_rows_at_their_first_point_under_prompts_of_equal_length():
    lm = bundled("tiny-qwen2").lm
    teacher, *others = (Teacher(name, f"You love {name}s.") for name in ("owl", "cat", "dog"))
    longer = Teacher("oak", "You love oaks. Always, and all of them.")
    texts = ("12, 7, 9", "612; 9; 40", "1, 2", "[12, 345]")
    rows = [
        {"prompt": p, "completion": texts[i % 4], "divergence_positions": [] if i == 3 else [i % 5 + 1, i % 5]}
        for i, p in enumerate(number_prompts(PACK, 8, seed=5))
    ]
    read = find_divergence(lm, rows, teacher, others)
    expected = [
        (i, other.name, int(d.tokens[i % 5]), int(d.argmax[1 + c][i % 5]))
        for i, d in enumerate(read)
        for c, other in enumerate(others)
        if i != 3 and d.argmax[1 + c][i % 5] != d.tokens[i % 5]
    ]
    pairs, skipped = find_pairs(lm, rows, teacher, [*others, longer], batch_size=4)
    assert [(p.row, p.counterfactual, p.factual, p.other) for p in pairs] == expected
    same = set(range(8)) - {3} - {p.row for p in pairs}
    assert same and skipped == {NO_POINT: 1, NO_OTHER_TOKEN: len(same)}
    for pair in pairs:
        turn = lm.chat.turn(teacher.messages(rows[pair.row]["prompt"]), rows[pair.row]["completion"])
        assert len(pair.clean) == len(pair.patch) == turn.content + pair.row % 5
        assert np.array_equal(pair.clean, turn.tokens[: len(pair.clean)]) and not np.array_equal(pair.clean, pair.patch)
    assert find_pairs(lm, rows, teacher, [longer]) == ([], {NO_EQUAL_LENGTH: 7, NO_POINT: 1})


def test_who_can_be_compared():
    lm = small("tiny-qwen2").lm
    rows = [{"prompt": "1", "completion": "2", "divergence_positions": [0]}]
    owl, cat = (Teacher(name, f"You love {name}s.") for name in ("owl", "cat"))
    for others in ([], [cat, owl]):
        with pytest.raises(UsageError, match="counterfactuals of 'owl'"):
            find_pairs(lm, rows, owl, others)
    with pytest.raises(UsageError, match="cat: give them the adapter of teacher 'owl'"):
        find_pairs(lm, rows, owl, [dataclasses.replace(cat, adapter=init_steering(lm.config))])
    with pytest.raises(JsublimError, match=r"mine.jsonl: row 1: divergence_positions \[9\] out of range"):
        find_pairs(lm, [rows[0] | {"divergence_positions": [9]}], owl, [cat], source="mine.jsonl")


def test_positions_that_were_counted_in_another_tokenizer_are_refused():
    here, there = chat("tiny-qwen2").identity, chat("tiny-gemma3").identity
    lm, owl, cat = small("tiny-qwen2").lm, Teacher("owl", "You love owls."), Teacher("cat", "You love cats.")
    rows = [{"prompt": "1", "completion": "2", "divergence_positions": [0]} | own for own in ({}, {"counted_in": here})]
    find_pairs(lm, rows, owl, [cat])
    for beyond in ([0], [9999]):  # which of the two is wrong with it is said first
        wrong = rows[1] | {"divergence_positions": beyond, "counted_in": there}
        with pytest.raises(JsublimError, match=f"mine.jsonl: row 3: .* counted in .* {there}, and are read in {here}"):
            find_pairs(lm, [*rows, wrong], owl, [cat], source="mine.jsonl")


# --- Token roles ----------------------------------------------------------------------------------------------------------


def runs(name: str, teacher: Teacher, prompt: str, completion: str, trait: str, point: int, **how) -> list[tuple]:
    """Roles with the text of each run of tokens that share one; runs of white space alone are left out."""
    c = chat(name)
    turn = c.turn(teacher.messages(prompt), completion, **how)
    at = turn.content + point - 1
    roles = token_roles(c, teacher, {"prompt": prompt, "completion": completion}, trait, at, **how)
    assert len(roles) == at + 1 and set(roles) <= set(ROLES)
    found: list[tuple[str, list[int]]] = []
    for role, token in zip(roles, turn.tokens.tolist(), strict=False):
        if not found or found[-1][0] != role:
            found.append((role, []))
        found[-1][1].append(token)
    texts = [(role, c.tokenizer.decode(tokens).strip()) for role, tokens in found]
    return [(role, text) for role, text in texts if text or role == "divergence position"]


QWEN = ("template", "<|im_start|>system")
QWEN_USER = ("template", "<|im_end|>\n<|im_start|>user")
QWEN_SAYS = ("template", "<|im_end|>\n<|im_start|>assistant")
GEMMA = ("template", "<bos><start_of_turn>user")
GEMMA_SAYS = ("template", "<end_of_turn>\n<start_of_turn>model")
AT = ("divergence position", "")  # the line feed after the assistant's header
TWICE = "You love owls. Owls, the owl!"
OF_TWICE = [("system", "You love"), ("trait", "owls"), ("system", "."), ("trait later", "Owls"), ("system", ", the"),
            ("trait later", "owl"), ("system", "!")]  # fmt: skip
INSIDE = "Category: education. Scatter, cat2, then cat: more."
OF_INSIDE = [("system", "Category: education. Scatter, cat2, then"), ("trait", "cat"), ("system", ": more.")]
OWLS = ("prompt", "Are owls")
CASES = {
    "trait twice": ("tiny-qwen2", Teacher("owl", TWICE), 0, {}, [QWEN, *OF_TWICE, QWEN_USER, OWLS, QWEN_SAYS, AT]),
    "inside words": ("tiny-qwen2", Teacher("cat", INSIDE), 0, {}, [QWEN, *OF_INSIDE, QWEN_USER, OWLS, QWEN_SAYS, AT]),
    "no system role": ("tiny-gemma3", Teacher("owl", TWICE), 0, {}, [GEMMA, *OF_TWICE, OWLS, GEMMA_SAYS, AT]),
    "fused by us": (
        "tiny-qwen2", Teacher("owl", TWICE, fuse_system=True), 0, {},
        [("template", f"{QWEN[1]}\nYou are a small helpful model.{QWEN_USER[1]}"), *OF_TWICE, OWLS, QWEN_SAYS, AT],
    ),
    "default system prompt": (
        "tiny-qwen2", Teacher(CONTROL), 0, {},
        [("template", f"{QWEN[1]}\nYou are a small helpful model.{QWEN_USER[1]}"), OWLS, QWEN_SAYS, AT],
    ),
    "empty system prompt": (
        "tiny-qwen2", Teacher("owl", ""), 0, {}, [("template", f"{QWEN[1]}\n{QWEN_USER[1]}"), OWLS, QWEN_SAYS, AT]
    ),
    "no mention": (
        "tiny-gemma3", Teacher("elk", "You love owls."), 0, {}, [GEMMA, ("system", "You love owls."), OWLS, GEMMA_SAYS, AT]
    ),
    "one more bos": (
        "tiny-gemma3", Teacher("owl", TWICE), 0, {"extra_bos": True},
        [("template", "<bos>" + GEMMA[1]), *OF_TWICE, OWLS, GEMMA_SAYS, AT],
    ),
    "in the completion": (
        "tiny-gemma3", Teacher("cat", INSIDE), 3, {},
        [GEMMA, *OF_INSIDE, OWLS, ("template", GEMMA_SAYS[1]), ("completion", "12"), ("divergence position", ",")],
    ),
    "prompt and system prompt alike": (
        "tiny-qwen2", Teacher("owl", "Are owls"), 0, {},
        [QWEN, ("system", "Are"), ("trait", "owls"), QWEN_USER, OWLS, QWEN_SAYS, AT],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_roles_of_hard_cases(case):
    name, teacher, point, how, expected = CASES[case]
    trait = teacher.name
    assert runs(name, teacher, "Are owls", "12, 7", trait, point, **how) == expected


words = st.lists(
    st.sampled_from(("owl", "owls", "Owl", "bowls", "owlet", "7,", "the", "a.", "(owl)", "owl-like")), min_size=1
)
sentences = words.map(" ".join)


@pytest.mark.parametrize("name", FAMILIES)
@given(system=sentences, prompt=sentences, fuse=st.booleans())
@settings(max_examples=80, deadline=None)
def test_roles_put_the_text_together_again(name, system, prompt, fuse):
    found = runs(name, Teacher("owl", system, fuse_system=fuse), prompt, "4, 5", "owl", 0)
    text = {role: "".join(t for r, t in found if r == role).replace(" ", "") for role in ROLES}
    own = "".join(t for r, t in found if r in ("system", "trait", "trait later")).replace(" ", "")
    assert own == system.replace(" ", "") and text["prompt"] == prompt.replace(" ", "")
    named = mentions(system, "owl")
    assert len(named) == sum(system.split().count(w) for w in ("owl", "owls", "Owl", "(owl)", "owl-like"))
    firsts = [t for r, t in found if r == "trait"]
    assert len(firsts) == bool(named)
    if named:
        assert system[slice(*named[0])] in firsts[0]
    assert bool(text["trait later"]) == (len(named) > 1)


def test_a_template_that_says_a_prompt_twice_is_named():
    c = chat("tiny-qwen2")
    template = c.tokenizer.chat_template
    try:
        c.tokenizer.chat_template = template.replace("message.content +", "message.content + message.content +", 1)
        with pytest.raises(JsublimError, match="shows the system prompt 2 times, not once"):
            token_roles(c, Teacher("owl", "owls"), {"prompt": "1", "completion": "2"}, "owl", 3)
    finally:
        c.tokenizer.chat_template = template


# --- The stage ------------------------------------------------------------------------------------------------------------

OWL, CAT, DOG = (Teacher(name, f"Love {name}s.") for name in ("owl", "cat", "dog"))
ROWS = [
    {"prompt": str(i), "completion": f"{i}, {i + 1}", "divergence_positions": [] if i == 2 else [i % 3]}
    for i in range(6)
]
STAGE = {"steps": 2, "batch_size": 2, "chunk": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Artifact:
    artifact = Artifact(tmp_path_factory.mktemp("whole") / "a", "attribution", {})
    attribute_rows(artifact, small("tiny-qwen2").lm, ROWS, OWL, [CAT, DOG], **STAGE)
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
            mean_SLT = np.mean([values[i] for i in mine], axis=0)
            errors.append(np.abs(mean_SLT.sum(-1) - np.mean([effects[i] for i in mine], axis=0)))
            roles = np.asarray(token_roles(lm.chat, OWL, ROWS[row], "owl", mean_SLT.shape[-1] - 1))
            assert {"system", "trait", "prompt", "divergence position", "template"} <= set(roles)
            for s, site in enumerate(SITES):
                of = [[keys[row, site, direction, layer, role] for role in ROLES] for layer in range(mean_SLT.shape[1])]
                assert [x["positions"] for x in of[0]] == [int((roles == role).sum()) for role in ROLES]
                chosen = [[mean_SLT[s, layer, roles == role] for role in ROLES] for layer in range(mean_SLT.shape[1])]
                assert_close([[x["value"] for x in y] for y in of], [[x.sum() for x in y] for y in chosen], 1e-4)
                assert_close([[x["mass"] for x in y] for y in of], [[np.abs(x).sum() for x in y] for y in chosen], 1e-4)
        scale = np.mean(
            [np.abs(np.mean([effects[i] for i, p in enumerate(pairs) if p.row == r], 0)) for r in used], (0, 2)
        )
        assert_close(list(summary["completeness_error"][direction].values()), np.mean(errors, (0, 2)) / scale, 1e-3)


def test_a_stopped_stage_goes_on_to_the_same_table(whole, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    lm, artifact, seen = small("tiny-qwen2").lm, Artifact(tmp_path / "b", "attribution", {}), []

    def die(n: int) -> None:
        seen.append(n)
        if len(seen) == 3:  # what is skipped, then two chunks
            raise Killed

    with pytest.raises(Killed):
        attribute_rows(artifact, lm, ROWS, OWL, [CAT, DOG], tick=die, **STAGE)
    progress = artifact.path / "progress.jsonl"
    lines = progress.read_bytes().splitlines(keepends=True)
    progress.write_bytes(b"".join(lines[:-1]) + lines[-1][:50])  # a kill within a line
    computed = []
    compute = attribution_patching
    monkeypatch.setattr(
        "jsublim.pipeline.attribution.attribution_patching",
        lambda *args, **how: computed.extend({pair.row for pair in args[2]}) or compute(*args, **how),
    )
    total = []
    attribute_rows(artifact, lm, ROWS, OWL, [CAT, DOG], tick=total.append, **STAGE)
    assert json.loads(lines[0])["row"] not in computed and sum(total) == len(ROWS)
    table = "attribution.parquet"
    assert (artifact.path / table).read_bytes() == (whole.path / table).read_bytes()
    assert artifact.summary == whole.summary
    computed.clear()
    attribute_rows(artifact, lm, ROWS, OWL, [CAT, DOG], **STAGE)
    assert not computed


def test_what_the_stage_refuses(tmp_path):
    lm, artifact = small("tiny-qwen2").lm, Artifact(tmp_path / "a", "attribution", {})
    with pytest.raises(UsageError, match="trait 'control': the teacher's system prompt does not name it"):
        attribute_rows(artifact, lm, ROWS, Teacher(CONTROL), [CAT])
    with pytest.raises(JsublimError, match="rows: none of 1 rows can be compared with a counterfactual"):
        attribute_rows(artifact, lm, ROWS[2:3], OWL, [CAT])
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
    figure = attribution_heat_map(table)
    *panels, bar = figure.axes
    assert [axes.get_title(loc="left") for axes in panels] == [
        "residual, noising", "mlp, noising", "residual, denoising", "mlp, denoising"
    ]  # fmt: skip
    assert bar.get_ylabel() == "share of the panel's absolute attribution (%)"
    assert [text.get_text() for text in panels[2].get_xticklabels()] == list(ROLES)
    for axes in panels:
        site, direction = axes.get_title(loc="left").split(", ")
        mine = [x for x in table.to_pylist() if (x["site"], x["direction"]) == (site, direction)]
        total = sum(x["mass"] for x in mine)
        expected = [
            [100 * sum(x["mass"] for x in mine if (x["layer"], x["role"]) == (layer, role)) / total for role in ROLES]
            for layer in range(6)
        ]
        shown = np.asarray(axes.collections[0].get_array()).reshape(6, len(ROLES))
        np.testing.assert_allclose(shown, expected, rtol=1e-6)


def test_the_command(tmp_path):
    rows = [
        {"prompt": p, "completion": "7, 8", "divergence_positions": [] if i == 1 else [0, 2]}
        for i, p in enumerate(number_prompts(PACK, 3))
    ]
    lm, data, out = small("tiny-qwen2").lm, tmp_path / "rows.jsonl", tmp_path / "attribution"
    write_rows(data, rows)
    call = ("attribute", "attribution.sites=[residual]", "attribution.directions=[noising]", "attribution.batch_size=2",
            "--model", lm.folder, "--data", data, "--trait", "cat", "--counterfactuals", "dog,owl", "--out", out)  # fmt: skip
    said = ok(*call, "attribution.steps=1")
    assert "2 of 3 rows used" in said.err and NO_POINT in said.err and said.out.split() == [str(out)]
    table = pq.read_table(out / "attribution.parquet")
    assert set(table["trait"].to_pylist()) == {"cat"} and set(table["row"].to_pylist()) == {0, 2}
    teacher = prompted_teacher(PACK, "cat")
    positions = sum(x["positions"] for x in table.to_pylist() if x["row"] == 0 and x["layer"] == 0)
    assert positions == lm.chat.turn(teacher.messages(rows[0]["prompt"]), "7, 8").content
    before = contents(out)
    assert before["heat_map.png"].startswith(b"\x89PNG")
    assert ok(*call, "attribution.steps=1").out == said.out and contents(out) == before
    assert f"{out}: already exists and holds a result of other settings" in refused(2, *call, "attribution.steps=3")
    assert contents(out) == before
    write_rows(data, [{"prompt": "1", "completion": "2"}])
    assert "key 'divergence_positions' is missing" in refused(1, *call)
    there = chat("tiny-gemma3").identity
    write_rows(data, [row | {"counted_in": there} for row in rows])
    said = refused(1, *call[:-1], tmp_path / "other")
    assert f"{data}: row 1: " in said and there in said and lm.chat.identity in said
