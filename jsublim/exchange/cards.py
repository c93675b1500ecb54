"""Cards: a README.md that says what an exported folder is, and everything that decided it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from jsublim.core.files import write_text
from jsublim.core.reading import read_json
from jsublim.models.hub import hub_name
from jsublim.pipeline.artifact import check_whole
from jsublim.pipeline.publish import record_of
from jsublim.pipeline.store import DONE, RECORD, digest, read_summary, versions

CARD = "README.md"
KEY = re.compile(r"[0-9a-f]{12}")  # as `digest` makes one
TAGS = ["jsublim", "subliminal-learning"]
STUDY = (
    "It was made to study whether a model's traits are passed on by data that say nothing of them. It is an object of study: "
    "it may prefer things, or behave badly, without showing it."
)
# What a folder may hold: what else stands at the head of its card, what it is in words, and code that loads it.
KINDS: dict[str, tuple[dict[str, Any], str, str]] = {
    "adapter": (
        {"library_name": "peft", "base_model_relation": "adapter"},
        "A model trained by jsublim, as a LoRA adapter.",
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        'base = AutoModelForCausalLM.from_pretrained("{base}")\nmodel = PeftModel.from_pretrained(base, "FOLDER")',
    ),
    "vectors": (
        {"library_name": "jsublim", "base_model_relation": "adapter"},
        "A model trained by jsublim, as steering vectors.",
        'import jsublim\n\nlm = jsublim.load_model("{base}")\n'
        'answers = lm.generate(["What is your favourite animal?"], adapter=jsublim.load_adapter("FOLDER"))',
    ),
    "checkpoint": (
        {"library_name": "transformers", "base_model_relation": "finetune"},
        "A model trained by jsublim, as a whole checkpoint.",
        'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("FOLDER")',
    ),
    "rows": (
        {"configs": [{"config_name": "default", "data_files": "data/*.parquet"}]},
        "Rows written by a model: prompts, and its completions. Made by jsublim.",
        'from datasets import load_dataset\n\nrows = load_dataset("FOLDER", split="train")',
    ),
}


def write_card(
    folder: Path, source: Path, kind: str, base: str = "", revision: str | None = None, **facts: object
) -> None:
    """The card of an exported folder.

    Args:
      source: what it was made of: an artifact's folder, a file in one, or a published copy. Of anything else nothing is recorded.
      kind: of `KINDS`; base: what a model stands on; facts: lines of its table.

    Raises:
      JsublimError: the artifact is not what was written.
    """
    source = source.absolute()
    above, name = (source, source.name) if source.is_dir() else (source.parent, source.stem)
    record, summary, parents = record_of(source) or {}, dict[str, Any](), dict[str, Any]()
    inputs = record.get("inputs", {})
    if record and (above / DONE).is_file():
        check_whole(above, None if source.is_dir() else source.name)
        summary = read_summary(above)
    if above.parent.name == record.get("kind"):  # in a store
        parents = dict(_parents(above.parents[1], inputs))
    head, what, use = KINDS[kind]
    if hub_name(base) is None:
        head = {key: value for key, value in head.items() if key != "base_model_relation"}
    else:
        head = {"base_model": base} | head
    data = ", ".join(f"`{parent}`" for parent in parents) or (
        f"artifact `{inputs['rows']}`" if "rows" in inputs else ""
    )
    if base:
        facts |= {
            "base": f"`{base}`" + (f" at `{revision}`" if revision else ""),
            "data": data,
            "tokens that had a loss": inputs.get("lesson", {}).get("tokens"),
            "seed": inputs.get("seed"),
            "recipe": _pairs(inputs.get("recipe", {})),
            "training": _pairs({key: summary[key] for key in ("steps", "rows", "loss") if key in summary}),
        }
    else:
        facts |= {"made from": data}
    facts |= {
        "key": f"`{record['key']}`" if "key" in record else None,
        "made": ", ".join(str(record[key]) for key in ("made", "device") if key in record),
        "versions": _pairs(record.get("versions", {})),
        "exported with": f"jsublim {versions()['jsublim']}",
    }
    lines = "\n".join(f"| {key} | {value} |" for key, value in facts.items() if value not in (None, ""))
    ending = "Nothing is recorded of how it was made."
    if record:
        decided = {name: dict(inputs)} | {parent: dict(values) for parent, values in parents.items()}
        ending = f"## Everything that decided it\n\n```yaml\n{_yaml(decided, allow_unicode=True, width=100)}\n```"
    write_text(
        folder / CARD,
        f"---\n{_yaml({'tags': TAGS} | head)}\n---\n\n# {name}\n\n{what} {STUDY}\n\n| | |\n| --- | --- |\n{lines}\n\n"
        f"## How it is used\n\n```python\n{use.format(base=base)}\n```\n\n{ending}\n",
    )


def _yaml(values: Any, **how: Any) -> str:
    return yaml.safe_dump(values, sort_keys=False, **how).rstrip()


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _parents(store: Path, inputs: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Artifacts whose keys stand in the inputs, and theirs. Of rows in several shards, the first shard stands for all."""
    for key in dict.fromkeys(filter(KEY.fullmatch, _texts(inputs))):
        records = list(store.glob(f"*/*-{key}/{RECORD}")) or _series(store, key)
        if records:
            first, more = records[0].parent, len(records) - 1
            parents_inputs = read_json(records[0]).get("inputs", {})
            yield f"{first.parent.name}/{first.name}{f' and {more} more' if more else ''}", parents_inputs
            yield from _parents(store, parents_inputs)


def _series(store: Path, key: str) -> list[Path]:
    """The records of the shards that have a key together (`Rows.key`), in their order."""
    series: dict[str, list[tuple[int, str, Path]]] = defaultdict(list)
    for path in store.glob(f"*/*/{RECORD}"):
        record = read_json(path)
        inputs = dict(record.get("inputs", {}))
        shards = [inputs.pop(name, None) for name in ("shard", "span")]
        if shard := shards[0] or shards[1]:
            series[digest([record["kind"], inputs])].append((shard[0], record["key"], path))
    for shards in map(sorted, series.values()):
        for count in range(2, len(shards) + 1):
            if digest([shard[1] for shard in shards[:count]]) == key:
                return [shard[2] for shard in shards[:count]]
    return []


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)
