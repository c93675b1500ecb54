"""Cards: a README.md that says what an exported folder is, and everything that decided it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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


# What a model may come as: the library that reads it, what it is in words, and code that loads it.
KINDS = {
    "adapter": (
        "peft",
        "a LoRA adapter",
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        'base = AutoModelForCausalLM.from_pretrained("{base}")\nmodel = PeftModel.from_pretrained(base, "FOLDER")',
    ),
    "vectors": (
        "jsublim",
        "steering vectors",
        'import jsublim\n\nlm = jsublim.load_model("{base}")\n'
        'answers = lm.generate(["What is your favourite animal?"], adapter=jsublim.load_adapter("FOLDER"))',
    ),
    "checkpoint": (
        "transformers",
        "a whole checkpoint",
        'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("FOLDER")',
    ),
}


@dataclass(frozen=True)
class Origin:
    """What is recorded of an artifact.

    Attributes:
      record: its `artifact.json`; empty of a folder or file that is no artifact (nor a copy of one).
      summary: what was kept of it.
      parents: of the same store, those that it was made from, by their folders' names.
    """

    name: str
    record: Mapping[str, Any]
    summary: Mapping[str, Any]
    parents: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, path: Path) -> Origin:
        """Of an artifact's folder, of a file in one, or of a published copy.

        Raises:
          JsublimError: the artifact is not what was written.
        """
        path = path.absolute()
        folder = path if path.is_dir() else path.parent
        record = record_of(path) or {}
        summary = {}
        if record and (folder / DONE).is_file():
            check_whole(folder, None if path.is_dir() else path.name)
            summary = read_summary(folder)
        inside = folder.parent.name == record.get("kind")  # of a store
        parents = dict(_parents(folder.parents[1], record.get("inputs", {}))) if inside else {}
        return cls(path.name if path.is_dir() else path.stem, record, summary, parents)

    @property
    def inputs(self) -> Mapping[str, Any]:
        return self.record.get("inputs", {})


def _parents(store: Path, inputs: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Artifacts whose keys stand in the inputs, and theirs. Of rows in several shards, the first shard stands for all."""
    for key in dict.fromkeys(filter(KEY.fullmatch, _texts(inputs))):
        records = list(store.glob(f"*/*-{key}/{RECORD}")) or _series(store, key)
        if records:
            first, more = records[0].parent, len(records) - 1
            found = read_json(records[0]).get("inputs", {})
            yield f"{first.parent.name}/{first.name}{f' and {more} more' if more else ''}", found
            yield from _parents(store, found)


def _series(store: Path, key: str) -> list[Path]:
    """The records of the shards that have a key together (`Rows.key`), in their order."""
    series: dict[str, list[tuple[int, str, Path]]] = {}
    for record in store.glob(f"*/*/{RECORD}"):
        said = read_json(record)
        inputs = said.get("inputs", {})
        shard = inputs.get("shard") or inputs.get("span")
        if shard:
            rest = {name: value for name, value in inputs.items() if name not in ("shard", "span")}
            series.setdefault(digest([said["kind"], rest]), []).append((shard[0], said["key"], record))
    for shards in map(sorted, series.values()):
        for count in range(2, len(shards) + 1):
            if digest([each[1] for each in shards[:count]]) == key:
                return [each[2] for each in shards[:count]]
    return []


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(each)


def write_model_card(folder: Path, origin: Origin, base: str, revision: str | None, kind: str) -> None:
    """A card of a student or a teacher that stands on `base` and comes as one of `KINDS`."""
    head: dict[str, Any] = {"tags": TAGS}
    if hub_name(base) is not None:
        head |= {"base_model": base, "base_model_relation": "finetune" if kind == "checkpoint" else "adapter"}
    library, described, use = KINDS[kind]
    head |= {"library_name": library}
    inputs, summary = origin.inputs, origin.summary
    facts = {
        "base": f"`{base}`" + (f" at `{revision}`" if revision else ""),
        "data": _data(origin),
        "tokens that had a loss": inputs.get("lesson", {}).get("tokens"),
        "seed": inputs.get("seed"),
        "recipe": _pairs(inputs.get("recipe", {})),
        "training": _pairs({key: summary[key] for key in ("steps", "rows", "loss") if key in summary}),
    }
    what = f"A model trained by jsublim, as {described}. {STUDY}"
    _write(folder, head, origin, what, facts, use.format(base=base))


def write_data_card(folder: Path, origin: Origin, rows: int, columns: list[str]) -> None:
    """A card of rows."""
    head = {"tags": TAGS, "configs": [{"config_name": "default", "data_files": "data/*.parquet"}]}
    facts = {"rows": rows, "columns": ", ".join(f"`{name}`" for name in columns), "made from": _data(origin)}
    what = f"Rows written by a model: prompts, and its completions. Made by jsublim. {STUDY}"
    use = 'from datasets import load_dataset\n\nrows = load_dataset("FOLDER", split="train")'
    _write(folder, head, origin, what, facts, use)


def _data(origin: Origin) -> str:
    said = [f"`{name}`" for name in origin.parents]
    return ", ".join(said) or (f"artifact `{origin.inputs['rows']}`" if "rows" in origin.inputs else "")


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _write(
    folder: Path, head: Mapping[str, Any], origin: Origin, what: str, facts: Mapping[str, Any], use: str
) -> None:
    record = origin.record
    told = {
        **facts,
        "key": f"`{record['key']}`" if "key" in record else None,
        "made": ", ".join(str(record[key]) for key in ("made", "device") if key in record),
        "versions": _pairs(record.get("versions", {})),
        "exported with": f"jsublim {versions()['jsublim']}",
    }
    lines = [f"| {key} | {value} |" for key, value in told.items() if value not in (None, "")]
    parts = ["---", yaml.safe_dump(dict(head), sort_keys=False).rstrip(), "---", "", f"# {origin.name}", "", what, ""]
    parts += ["| | |", "| --- | --- |", *lines, "", "## How it is used", "", "```python", use, "```", ""]
    if not record:
        parts += ["Nothing is recorded of how it was made.", ""]
    else:
        decided = {origin.name: dict(record.get("inputs", {}))} | {
            name: dict(each) for name, each in origin.parents.items()
        }
        text = yaml.safe_dump(decided, sort_keys=False, allow_unicode=True, width=100)
        parts += ["## Everything that decided it", "", "```yaml", text.rstrip(), "```", ""]
    write_text(folder / CARD, "\n".join(parts))
