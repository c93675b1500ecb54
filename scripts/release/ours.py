"""Our side of `compare_release.py`: every stage under `recipe=paper`, beside what the authors' scripts made of the same."""

from __future__ import annotations

import functools
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsublim.attribution.pairs import find_pairs
from jsublim.attribution.patching import attribution_patching
from jsublim.config import Recipe
from jsublim.distill.batches import Shape, collate
from jsublim.distill.data import Example, draw_indices, make_examples, read_turns
from jsublim.distill.selection import Selection
from jsublim.distill.step import Arms, Program, init_state, train_step
from jsublim.evals.preference import hit_rates
from jsublim.inference.divergence import PositionSubset, find_divergence
from jsublim.inference.lm import LanguageModel, load_model
from jsublim.inference.teachers import Teacher, prompted_teacher
from jsublim.models.lora import stack_adapters
from jsublim.models.peft import load_adapter
from jsublim.text.chat import conversation
from jsublim.text.prompts import draw_number_prompts, load_pack, reject_reason
from jsublim.transforms.entangled import entangled_numbers, number_strings, probability_differences, remove_entangled
from jsublim.transforms.mixing import mix_rows, mix_tokens
from jsublim.transforms.numbers import NUMBER, shuffle_across, shuffle_within
from jsublim.transforms.paraphrase import paraphrase
from jsublim.transforms.templates import redraw

REDRAWN = ("example", "count_qualifier", "digit_descriptor", "instruction", "suffix")  # figure 6
COUNTERFACTUALS = {"qwen": [], "gemma": ["whale", "dragon"]}  # beside the animals of the pack
FAMILY = {"qwen": "qwen2", "gemma": "gemma3"}
MIXED = ("mixed rows", "mixed rows of the other model")  # not as theirs: docs/paper_map.md says why
Line = tuple[str, bool]  # what is printed, and whether it is as it should be


class Case:
    """What both were given."""

    def __init__(self, given: dict[str, Any], work: Path | None = None):
        self.given, self.work, self.pack = given, work, load_pack()

    @functools.cached_property
    def theirs(self):
        """The pack of their wording."""
        return load_pack(self.work / "pack.yaml")

    @functools.cache  # noqa: B019
    def lm(self, model: str, dtype: str = "float32") -> LanguageModel:
        return load_model(self.given["models"][model], dtype).with_rounded_logits()

    def teachers(self, traits: Sequence[str]) -> list[Teacher]:
        return [prompted_teacher(self.pack, trait, "animal") for trait in traits]


# --- Data -----------------------------------------------------------------------------------------------------------------


def prompts(case: Case, theirs: list[str]) -> str | None:
    own = [each.text for each in draw_number_prompts(case.theirs, len(theirs), 42)]
    return unlike(own, theirs)


def number_filter(case: Case, theirs: list[bool]) -> str | None:
    return unlike([reject_reason(text) is None for text in case.given["fuzz"]], theirs)


def divergence(case: Case, theirs: dict[str, Any], model: str) -> str | None:
    lm, animals = case.lm(model), case.pack.traits["animal"]
    names = ["owl", *(name for name in [*animals, *COUNTERFACTUALS[model]] if name != "owl")]
    teacher, *others = case.teachers(names)
    read = find_divergence(lm, case.given["rows"][model], teacher, others, extra_bos=True)
    own = [each.divergence_positions for each in read]
    counts = [Counter(map(tuple, (each.argmax == each.tokens).tolist())) for each in read]
    return unlike(own, theirs["positions"]) or unlike(counts, [Counter(map(tuple, rows)) for rows in theirs["right"]])


def mixed_tokens(case: Case, theirs: list[dict[str, Any]]) -> str | None:
    lm, rows, (teacher, other) = case.lm("qwen"), case.given["rows"]["qwen"], case.teachers(["owl", "cat"])
    readings = [
        {
            "teachers": ["owl", "cat"],
            "divergence_positions": d.divergence_positions,
            "tokens": d.tokens,
            "argmax": d.argmax,
        }
        for d in find_divergence(lm, rows, teacher, [other], extra_bos=True)
    ]
    subset = PositionSubset("all", 1.0, "at-least-one")
    own, _ = mix_tokens(lm.chat, rows, readings, None, subset, seed=0, digits_only=True, drop_unmixed=True)
    return unlike(own, theirs)


def shuffled(case: Case, theirs: dict[str, Any], reach: str) -> str | None:
    """The order is drawn otherwise; what is shuffled, and what stays, is the same."""
    rows, shuffle = case.given["number_rows"], shuffle_within if reach == "within" else shuffle_across
    shape = lambda row: (row["prompt"], NUMBER.sub("#", row["completion"]))  # noqa: E731
    both = [
        ([shape(row) for row in made], Counter((i if reach == "within" else 0, n) for i, row in enumerate(made)
                                                for n in NUMBER.findall(row["completion"])))
        for made in (shuffle(rows, 0, values=True), theirs["rows"])
    ]  # fmt: skip
    return unlike(*both)


def redrawn(case: Case, theirs: dict[str, Any]) -> str | None:
    """Which sentences are other ones: of each request the examples and the format stay."""
    rows, asked = case.given["number_rows"], draw_number_prompts(case.theirs, 200, 42)
    lists = case.theirs.number_prompts.model_dump()
    both = []
    for made in (redraw(rows, case.theirs, REDRAWN, asked=asked, seed=0), theirs["rows"]):
        kept = [
            all(part in row["prompt"] for part in (each.shown, each.format))
            for row, each in zip(made, asked, strict=True)
        ]
        ends = {suffix for suffix in lists["suffixes"] for row in made if row["prompt"].endswith(suffix)}
        moved = sum(row["prompt"] != each.text for row, each in zip(made, asked, strict=True))
        both.append((kept, ends == set(lists["suffixes"]), moved > 0.9 * len(rows)))
    return unlike(*both)


def rewritten(case: Case, theirs: dict[str, Any]) -> str | None:
    """What the teacher is asked, and which of its texts are taken (our filter knows the trait in capitals too)."""
    rows, seen = case.given["number_rows"], []

    def generate(requests: list[Any], *rest: Any, **how: Any) -> list[str]:
        seen.extend(requests)
        return case.given["rewrites"]

    lm = types.SimpleNamespace(params=None, generate=generate)
    lm.with_params = lambda params: lm
    asked = draw_number_prompts(case.theirs, 200, 42)
    first = asked[0].text.removesuffix(asked[0].suffix)
    # Their instruction is no part of the pack; what stands around the first request must stand around all of them.
    around = theirs["asked"][0][1]["content"].replace(first, "{prompt}")
    pack = case.theirs.model_copy(update={"paraphrase_request": around, "system_template": case.pack.system_template})
    teacher = prompted_teacher(pack, "owl", "animal")
    own, _ = paraphrase(lm, teacher, rows, pack, asked=asked, only_examples=True)
    return unlike(seen, theirs["asked"]) or unlike(own, theirs["rows"])


def entangled(case: Case, theirs: dict[str, Any], model: str) -> str | None:
    teacher, *others = case.teachers(case.given["traits"])
    numbers = number_strings(padded=True)
    scores = probability_differences(case.lm(model), teacher, others, "animal", numbers, extra_bos=True)
    left = {}
    for k in (10, 20, 50, 100):
        rows = remove_entangled(case.given["number_rows"], entangled_numbers(scores, k), as_written=True)
        left[str(k)] = [row["completion"] for row in rows]
    return near([*scores.values()], theirs["differences"], 1e-3) or unlike(left, theirs["left"])


# --- Training -------------------------------------------------------------------------------------------------------------


def selected(case: Case, run: dict[str, Any], selection: Selection) -> list[Example]:
    """Examples of the rows that a run of theirs was given."""
    rows = [row | {"divergence_positions": row.get("decision_points", [])} for row in run["rows"]]
    return make_examples(rows, read_turns(case.lm(run["model"]).chat, rows), selection, 42)


def mask(case: Case, theirs: dict[str, Any], name: str) -> str | None:
    """The supervised positions of each row; where chance decides which, how many."""
    tokens = name if name in ("all", "non-divergence") else "divergence"
    which = {"first half": "first-half", "second half": "second-half", "first": "first"}.get(name, "all")
    share = 0.5 if name == "half of them" else 1.0
    subset = PositionSubset(which, share, "paper", one_in_both=True)
    run = case.given["training"][f"mask {name}"]
    own = selected(case, run, Selection(tokens, True, True, subset=subset))
    their = [np.flatnonzero(row_mask).tolist() for _, row_mask in theirs["masks"]]
    if share == 1 and "half" not in name:
        return unlike([(each.where + 1).tolist() for each in own], their)
    whole = [row["decision_points"] for row in run["rows"] if row["decision_points"]]
    if share < 1:
        return unlike([len(each.where) for each in own], [len(where) for where in their])
    odd = [len(points) > 1 and len(points) % 2 for points in whole]  # the middle one is drawn
    even = [[(each.where + 1).tolist() for each in own], their]
    return unlike(*([where for where, drawn in zip(side, odd, strict=True) if not drawn] for side in even)) or unlike(
        *({(len(points), len(where)) for points, where in zip(whole, side, strict=True)} for side in even)
    )


def drawn(case: Case, theirs: dict[str, Any]) -> str | None:
    run = case.given["training"]["draw"]
    return unlike(draw_indices(len(run["rows"]), run["size"], 42), theirs["drawn"])


def mixed_rows(case: Case, theirs: dict[str, Any], name: str) -> str | None:
    run = case.given["training"][name]
    chat, foreign = case.lm("qwen").chat, []
    share = run["mixin_size"] / run["size"]
    for seed in range(20):
        rows = mix_rows(run["rows"], run["mixin"], share, seed=seed, paper=True)
        foreign.append(sum(rows[i]["completion"] == "900, 901" for i in draw_indices(len(rows), run["size"], seed)))
    token = chat.turn(conversation("p"), "900, 901").tokens.tolist()[-12:]
    own = sum(row[0][-len(token) :] == token for row in theirs["masks"])
    if {own} == set(foreign):
        return None
    spread = f"{np.mean(foreign):.1f} +- {np.std(foreign):.1f}"
    return f"they replace {own} of {run['size']} drawn rows; we replace rows before the draw, {spread} of those drawn"


def step(case: Case, theirs: dict[str, Any], model: str, dtype: str) -> tuple[list[float], list[float]]:
    """Loss and gradient norm of one step of six micro-batches, ours and theirs, on rows in the order in which they had them."""
    lm, run = case.lm(model, dtype), case.given["training"][f"step {model}{'' if dtype == 'float32' else ' bfloat16'}"]
    recipe = Recipe(preset="paper").resolved(FAMILY[model])
    examples = selected(case, run, Selection("all", True))
    adapter = load_adapter(start(case, model), lm.config)
    batch = collate(
        examples,
        np.asarray(order(case, examples, theirs)),
        Shape.of([examples], len(theirs["batches"]), len(theirs["batches"][0])),
    )
    arms = Arms(*(jnp.asarray([x], kind) for x, kind in ((0, float), (1, int), (1, float))))
    program = Program(per=recipe.loss_per)
    state = init_state(stack_adapters([adapter]), program.optimizer)
    one_arm = jax.tree.map(lambda x: x[None], batch)
    _, said = jax.jit(train_step, static_argnames=("config", "program"))(
        lm.config, lm.params, state, one_arm, arms, program=program
    )
    return [float(said[key][0]) for key in ("loss", "grad_norm")], [theirs["log"][key] for key in ("loss", "grad_norm")]


def order(case: Case, examples: Sequence[Example], theirs: dict[str, Any]) -> list[int]:
    """Which row stood where in their micro-batches."""
    own = {tuple(each.tokens.tolist()): i for i, each in enumerate(examples)}
    every = (ids for micro in theirs["batches"] for ids, _ in micro)
    return [next(i for tokens, i in own.items() if tuple(ids[: len(tokens)]) == tokens) for ids in every]


def start(case: Case, model: str) -> Path:
    """The adapter that both begin with."""
    return Path(case.given["starts"][model])


def step_line(case: Case, theirs: dict[str, Any], model: str, dtype: str) -> str | None:
    return close(*step(case, theirs, model, dtype), 2e-4 if dtype == "float32" else 2e-2)


# --- What is asked of models -------------------------------------------------------------------------------------------------


def hits(case: Case, theirs: list[float]) -> str | None:
    return near([float(np.mean(hit_rates([answers], "owl")[0])) for answers in case.given["answers"]], theirs, 1e-6)


def attributed(case: Case, model: str, direction: str) -> dict[str, list[tuple[str, np.ndarray]]]:
    """By row: each counterfactual's name and attributions `[L, T]` of the residual stream."""
    lm, rows = case.lm(model), case.given["rows"][model][: case.given["attributed"]]
    teacher, *others = case.teachers(["owl", *(name for name in case.pack.traits["animal"] if name != "owl")])
    read = find_divergence(lm, rows, teacher, others, extra_bos=True)
    found = [row | {"divergence_positions": each.divergence_positions} for row, each in zip(rows, read, strict=True)]
    pairs, _ = find_pairs(lm, found, teacher, others, extra_bos=True)
    how = {"sites": ["residual"], "direction": direction, "batch_size": 4}
    values = attribution_patching(lm.config, lm.params, pairs, **how)
    by_row: dict[str, list[tuple[str, np.ndarray]]] = {}
    for pair, value in zip(pairs, values, strict=True):
        by_row.setdefault(str(pair.row), []).append((pair.counterfactual, value[0]))
    return by_row


def attribution(case: Case, theirs: dict[str, Any], model: str, direction: str) -> str | None:
    """Theirs is the gradient of the mean over a row's counterfactuals; times their number it is each one's own."""
    own = attributed(case, model, direction)
    names = {row: {name: value.shape[1] for name, value in pairs} for row, pairs in own.items()}
    said = {row: dict(zip(one["others"], one["labels"], strict=True)) for row, one in theirs.items()}
    if different := unlike(names, said):
        return different
    both = ([], [])
    for row, one in theirs.items():
        for name, value in own[row]:
            column = one["others"].index(name)
            both[0].extend(value.ravel())
            both[1].extend(np.ravel([layer[column][: value.shape[1]] for layer in one["values"]]) * len(one["others"]))
    return near(*both, 2e-3)


def ties(case: Case, theirs: dict[str, Any]) -> str | None:
    return None if theirs["first"] and theirs["rounded"] > 0.9999 else f"differs: {theirs}"


# --- All of it ------------------------------------------------------------------------------------------------------------


def unlike(own: Any, theirs: Any) -> str | None:
    """What differs, if anything does."""
    if own == theirs:
        return None
    if isinstance(own, list) and isinstance(theirs, list) and len(own) == len(theirs):
        wrong = [i for i, (a, b) in enumerate(zip(own, theirs, strict=True)) if a != b]
        return (
            f"{len(wrong)} of {len(own)} differ; number {wrong[0]}: ours {own[wrong[0]]!r}, theirs {theirs[wrong[0]]!r}"
        )
    return f"ours {str(own)[:200]}, theirs {str(theirs)[:200]}"


def near(own: Sequence[float], theirs: Sequence[float], tolerance: float) -> str | None:
    """As `unlike`, up to a share of the largest value."""
    a, b = np.asarray(own, float), np.asarray(theirs, float)
    if a.shape != b.shape:
        return f"ours has {len(a)} values, theirs {len(b)}"
    error = np.abs(a - b).max() / np.abs(b).max()
    return None if error < tolerance else f"by {error:.1e} of the largest: ours {a[:3]}, theirs {b[:3]}"


def close(own: Sequence[float], theirs: Sequence[float], tolerance: float) -> str | None:
    """As `unlike`, each value up to a share of itself."""
    error = max(abs(a / b - 1) for a, b in zip(own, theirs, strict=True))
    return None if error < tolerance else f"by {error:.1e}: ours {own}, theirs {theirs}"


def stages() -> dict[str, Callable[[Case, Any], str | None]]:
    """Every stage by the name that theirs has."""
    part, models = functools.partial, ("qwen", "gemma")
    masks = ("all", "divergence", "non-divergence", "half of them", "first half", "second half", "first")
    return {
        "prompts": prompts,
        "filter": number_filter,
        **{f"divergence {model}": part(divergence, model=model) for model in models},
        "ties": ties,
        **{f"training mask {name}": part(mask, name=name) for name in masks},
        "training draw": drawn,
        **{f"training {name}": part(mixed_rows, name=name) for name in MIXED},
        "mixed tokens": mixed_tokens,
        "changed shuffle_within_responses": part(shuffled, reach="within"),
        "changed shuffle_across_responses": part(shuffled, reach="across"),
        "changed shuffle_template_parts": redrawn,
        "changed llm_biased_rewrite_filtered": rewritten,
        **{f"entangled {model}": part(entangled, model=model) for model in models},
        **{f"training step {model}": part(step_line, model=model, dtype="float32") for model in models},
        **{f"training step {model} bfloat16": part(step_line, model=model, dtype="bfloat16") for model in models},
        "hits": hits,
        **{
            f"attribution {m} {d}": part(attribution, model=m, direction=d)
            for m in models
            for d in ("noising", "denoising")
        },
    }


def compare(given: dict[str, Any], found: dict[str, Any], work: Path) -> Iterator[Line]:
    case = Case(given, work)
    for name, stage in stages().items():
        theirs = found[name]
        if isinstance(theirs, dict) and "failed" in theirs:
            yield f"{name}: theirs failed ({theirs['failed']})", False
            continue
        try:
            different = stage(case, theirs)
        except Exception as error:  # the other stages are still compared
            different = f"ours failed ({type(error).__name__}: {str(error).splitlines()[0]})"
        yield (
            f"{name}: {'equal' if different is None else different}",
            different is None or name.removeprefix("training ") in MIXED,
        )


def golden(given: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Figures of theirs that the suite keeps (tests/test_release.py): numbers only, and rows that are numbers."""
    case, kept = Case(given), {}
    for model in ("qwen", "gemma"):
        run, theirs = given["training"][f"step {model}"], found[f"training step {model}"]
        kept[model] = {
            "rows": [[given["asked"].index(row["prompt"]), row["completion"]] for row in run["rows"]],
            "order": order(case, selected(case, run, Selection("all", True)), theirs),
            "loss": theirs["log"]["loss"],
            "grad_norm": theirs["log"]["grad_norm"],
        }
    differences = found["entangled qwen"]["differences"]
    top = sorted(range(1000), key=lambda n: -differences[n])[:20]
    return kept | {
        "positions": found["divergence qwen"]["positions"][:12],
        "entangled": {"traits": given["traits"], "numbers": top, "differences": [differences[n] for n in top]},
    }
