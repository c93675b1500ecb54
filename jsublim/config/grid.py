"""What an experiment varies, in words that can be laid beside a figure's caption: for `--dry-run` and docs/paper_map.md."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jsublim.config.experiment import Experiment
from jsublim.config.shipped import named_lists
from jsublim.config.students import Students, variants
from jsublim.text.prompts import load_pack

ASKED = {"numbers": "number requests", "problems": "word problems", "file": "prompts"}


def grid(experiment: Experiment) -> dict[str, str]:
    """Models, teachers, rows, students and evaluations of an experiment, by name; what it does not have is left out."""
    e, a, ev, judge = experiment, experiment.attribution, experiment.evaluation, experiment.judge
    kinds = ", ".join(f"{name}{_options(kind)}" for name, kind in ev.kinds.items())
    words = {
        "model": e.model,
        "teachers": _teachers(e),
        "read under": _read_under(e),
        "rows": f"{e.sampling.strategy}; {e.data.num_prompts:,} {ASKED[e.data.kind]}, at most {e.sampling.max_new_tokens} tokens",
        "read anew": ", ".join(name for name, dataset in e.datasets.items() if dataset.divergence),
        "attribution": a and f"{a.rows} rows a trait, {a.steps} steps; {', '.join([*a.sites, *a.directions])}",
        "students": "none" if e.students is None else _students(e.students),
        "seeds": e.students and _run(e.students.seeds),
        "asked": f"{kinds}; {ev.samples} answers a question of at most {ev.max_new_tokens} tokens",
        "settings": ", ".join(ev.settings),
        "judge": judge and (f"{judge.server.model} (a server's)" if judge.server is not None else judge.model),
    }
    return {what: told for what, told in words.items() if told}


def _listed(traits: Iterable[str]) -> str:
    """How many there are and which; a list that has a name by that."""
    traits = list(traits)
    name = next((name for name, known in named_lists().items() if sorted(known) == sorted(traits)), None)
    return f"{len(traits)} ({name})" if name is not None and len(traits) > 8 else f"{len(traits)}: {', '.join(traits)}"


def _teachers(e: Experiment) -> str:
    t = e.teachers
    given = t.adapter or t.checkpoint or ("taught here" if t.taught is not None else None)
    category = f", each as favourite {t.category}" if t.category is not None and given is None else ""
    return f"{_listed(t.traits)}{category}{f' ({given})' if given else ''}{'; control' if t.control else ''}"


def _read_under(e: Experiment) -> str:
    """How many counterfactual teachers a row is read under."""
    if e.teachers.against == "base":
        return "the model without a trait"
    pool = e.teachers.counterfactuals
    if pool is None:
        pack = load_pack(e.prompts)
        categories = [e.teachers.category or pack.category_of(trait) for trait in e.teachers.traits]
        listed = [trait for category in categories for trait in pack.traits.get(category, [])]
        pool = list(dict.fromkeys(listed + e.teachers.traits))
    others = sorted({sum(other != trait for other in pool) for trait in e.teachers.traits})
    return f"{_run(others)} others of {_listed(pool)}"


def _students(students: Students) -> str:
    """What they differ in, and how many there are without seeds and traits; an arm of a grid of data sets is called by the data set."""
    arms, data = variants(students), students.data
    tokens = [kind for arm in arms.values() for kind in arm.loss.tokens]
    how = f"{'all' if data.rows is None else f'{data.rows:,}'} rows x {data.epochs}"
    how += "" if data.dataset is None else f" of {data.dataset}"
    names = [name.removeprefix("dataset=") for name in arms]
    named = ", ".join("plain" if name in ("", "None") else name for name in names)
    tail = f"; {named}" if len(arms) > 1 else ""
    return f"{len(tokens)} kinds a trait on {how}; tokens {', '.join(dict.fromkeys(tokens))}{tail}"


def _options(kind: Any) -> str:
    """The options of a kind that are not at their defaults."""
    given = kind.model_dump(exclude_defaults=True)
    told = (f"{name} {'none' if value == '' else _run(value)}" for name, value in given.items())
    return f" ({', '.join(told)})" if given else ""


def _run(values: Any) -> str:
    """Numbers in a row as their ends, anything else with commas."""
    if not isinstance(values, list):
        return str(values)
    whole = all(isinstance(value, int) for value in values)
    if len(values) > 2 and whole and values == list(range(values[0], values[-1] + 1)):
        return f"{values[0]} to {values[-1]}"
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
