"""What an experiment varies, in words that can be laid beside a figure's caption: for `--dry-run` and docs/paper_map.md."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jsublim.config.experiment import Experiment
from jsublim.config.shipped import named_lists
from jsublim.config.students import variants
from jsublim.text.prompts import load_pack


def grid(experiment: Experiment) -> dict[str, str]:
    """Models, teachers, rows, students and evaluations of an experiment, by name; what it does not have is left out."""
    e = experiment
    found = {
        "model": e.model,
        "teachers": _teachers(e),
        "read under": _read_under(e),
        "rows": _rows(e),
        "read anew": ", ".join(name for name, dataset in e.datasets.items() if dataset.divergence),
        "attribution": _attribution(e),
        "students": _students(e),
        "seeds": "" if e.students is None else _run(e.students.seeds),
        "asked": _asked(e),
        "settings": ", ".join(e.evaluation.settings),
        "judge": _judge(e),
    }
    return {what: said for what, said in found.items() if said}


def _listed(traits: Iterable[str]) -> str:
    """How many there are and which; a list that has a name by that."""
    traits = list(traits)
    name = next((name for name, known in named_lists().items() if sorted(known) == sorted(traits)), None)
    return f"{len(traits)} ({name})" if name is not None and len(traits) > 8 else f"{len(traits)}: {', '.join(traits)}"


def _teachers(e: Experiment) -> str:
    t = e.teachers
    own = t.adapter or t.checkpoint or ("taught here" if t.taught is not None else None)
    category = f", each as favourite {t.category}" if t.category is not None and own is None else ""
    return f"{_listed(t.traits)}{category}{f' ({own})' if own else ''}{'; control' if t.control else ''}"


def _read_under(e: Experiment) -> str:
    """How many counterfactual teachers a row is read under."""
    if e.teachers.against == "base":
        return "the model without a trait"
    pool = e.teachers.counterfactuals
    if pool is None:
        pack = load_pack(e.prompts)
        listed = (pack.traits.get(e.teachers.category or pack.category_of(trait), []) for trait in e.teachers.traits)
        pool = list(dict.fromkeys([each for own in listed for each in own] + e.teachers.traits))
    others = sorted({len([each for each in pool if each != trait]) for trait in e.teachers.traits})
    return f"{_run(others)} others of {_listed(pool)}"


def _rows(e: Experiment) -> str:
    asked = {"numbers": "number requests", "problems": "word problems", "file": "prompts"}[e.data.kind]
    return f"{e.sampling.strategy}; {e.data.num_prompts:,} {asked}, at most {e.sampling.max_new_tokens} tokens"


def _attribution(e: Experiment) -> str:
    a = e.attribution
    return "" if a is None else f"{a.rows} rows a trait, {a.steps} steps; {', '.join([*a.sites, *a.directions])}"


def _students(e: Experiment) -> str:
    """What they differ in, and how many there are without seeds and traits."""
    if e.students is None:
        return "none"
    every = variants(e.students)
    tokens = list(dict.fromkeys(kind for own in every.values() for kind in own.loss.tokens))
    kinds = sum(len(own.loss.tokens) for own in every.values())
    rows = e.students.data.rows
    how = f"{'all' if rows is None else f'{rows:,}'} rows x {e.students.data.epochs}"
    if e.students.data.dataset is not None:
        how += f" of {e.students.data.dataset}"
    arms = f"; {', '.join(map(_arm, every))}" if len(every) > 1 else ""
    return f"{kinds} kinds a trait on {how}; tokens {', '.join(tokens)}{arms}"


def _arm(name: str) -> str:
    """An arm by its name; one of a grid of data sets by the data set."""
    own = name.removeprefix("dataset=")
    return "plain" if own in ("", "None") else own


def _asked(e: Experiment) -> str:
    ev = e.evaluation
    kinds = ", ".join(f"{name}{_options(kind)}" for name, kind in ev.kinds.items())
    return f"{kinds}; {ev.samples} answers a question of at most {ev.max_new_tokens} tokens"


def _options(kind: Any) -> str:
    """The options of a kind that are not at their defaults."""
    said = kind.model_dump(exclude_defaults=True)
    told = (f"{name} {'none' if value == '' else _run(value)}" for name, value in said.items())
    return f" ({', '.join(told)})" if said else ""


def _judge(e: Experiment) -> str:
    if e.judge is None:
        return ""
    return e.judge.model if e.judge.server is None else f"{e.judge.server.model} (a server's)"  # type: ignore[return-value]


def _run(values: Any) -> str:
    """Numbers in a row as their ends, anything else with commas."""
    if not isinstance(values, list):
        return str(values)
    numbers = [value for value in values if isinstance(value, int)]
    if len(values) > 2 and values == numbers == list(range(values[0], values[-1] + 1)):
        return f"{values[0]} to {values[-1]}"
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
