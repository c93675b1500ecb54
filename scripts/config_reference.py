"""Writes what is generated from the sections of a config: `configs/schema.json` and `configs/paper/schema.json`, which editors read,
and docs/config.md (tests/config/test_reference.py holds all three to the sections).

python scripts/config_reference.py
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic.json_schema import models_json_schema

from jsublim.config import Experiment
from jsublim.config.data import Dataset
from jsublim.config.evaluation import Setting
from jsublim.config.figures import Question
from jsublim.core.section import Decides, section_in
from jsublim.digits.config import Digits
from jsublim.evals import EVAL_KINDS
from jsublim.transforms import CHANGES

ROOT = Path(__file__).parents[1]
DIALECT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, Any]


def files() -> dict[Path, str]:
    """Every generated file with its text."""
    return {
        ROOT / "configs" / "schema.json": _json(config_schema()),
        ROOT / "configs" / "paper" / "schema.json": _json(question_schema()),
        ROOT / "docs" / "config.md": reference(),
    }


def _json(value: Schema) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


# --- for editors


def config_schema() -> Schema:
    """A JSON schema of whatever `jsublim run` takes, short forms included."""
    named, definitions = _sections()
    is_digits = {"properties": {"kind": {"const": "digits"}}, "required": ["kind"]}
    return {
        "$schema": DIALECT,
        "title": "jsublim: an experiment",
        "if": is_digits,
        "then": named[Digits],
        "else": named[Experiment],
        "$defs": definitions,
    }


def question_schema() -> Schema:
    """A JSON schema of the files of `configs/paper/`: parts of an experiment, laid over one another."""
    named, definitions = _sections()
    part, whole = _partial(definitions), Question.model_json_schema()
    values = named[Experiment]
    scale = {"anyOf": [values, {"type": "null"}]}
    part["Scale"] = copy.deepcopy(part["Experiment"])
    part["Scale"]["properties"]["panels"] = {"type": "object", "additionalProperties": scale}
    properties = whole["properties"]
    properties["experiment"] = values
    properties["panels"]["additionalProperties"] = values
    properties["scale"] = {"type": "object", "additionalProperties": {"$ref": "#/$defs/Scale"}}
    return {"$schema": DIALECT} | _bare(whole) | {"title": "jsublim: a question of the paper", "$defs": part}


def _sections() -> tuple[dict[type[BaseModel], Schema], dict[str, Schema]]:
    """How each section is referred to, and all of them by name, with the short forms that a config may use."""
    kinds: list[type[BaseModel]] = [Experiment, Digits, *CHANGES.known.values(), *EVAL_KINDS.known.values()]
    found, whole = models_json_schema([(kind, "validation") for kind in kinds])
    named = {kind: found[kind, "validation"] for kind in kinds}
    definitions: dict[str, Schema] = {name: _bare(each) for name, each in whole["$defs"].items()}
    for kind in CHANGES.known.values():
        name = _name(named[kind])
        short = definitions[name]["properties"].get(getattr(kind, "shorthand", None))
        words = {"enum": [False, None] if definitions[name].get("required") else [True, False, None]}
        definitions[name] = {"anyOf": [definitions[name], *([short] if short else []), words]}
    changes = {name: named[kind] for name, kind in CHANGES.known.items()}
    definitions["Dataset"]["properties"].pop("changes")
    definitions["Dataset"]["properties"] |= changes
    options = {name: {"anyOf": [named[kind], {"type": "null"}]} for name, kind in EVAL_KINDS.known.items()}
    said = definitions["Evaluation"]["properties"]["kinds"]
    by_name = {"type": "object", "properties": options, "additionalProperties": False, "minProperties": 1}
    listed = {"type": "array", "items": {"enum": list(options)}, "minItems": 1}
    definitions["Evaluation"]["properties"]["kinds"] = {
        "description": said["description"],
        "anyOf": [listed, by_name],
    }
    preset = definitions["Recipe"]["properties"]["preset"]
    definitions["Recipe"] = {"anyOf": [{"enum": preset["enum"]}, definitions["Recipe"]]}
    server = definitions["SampleServerSettings"]
    definitions["SampleServerSettings"] = {"anyOf": [{"type": "string"}, server]}
    for name in ("Change", "EvalKind"):
        del definitions[name]
    return named, definitions


def _name(reference: Schema) -> str:
    return reference["$ref"].rsplit("/", 1)[-1]


def _bare(schema: Any) -> Any:
    """Without titles that repeat a field's name, and without limits that no value comes near."""
    if isinstance(schema, list):
        return [_bare(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    far = schema.get("exclusiveMaximum") == 2**31
    kept = {key: value for key, value in schema.items() if key != "exclusiveMaximum" or not far}
    if isinstance(kept.get("title"), str):
        del kept["title"]
    return {key: _bare(value) for key, value in kept.items()}


def _partial(definitions: dict[str, Schema]) -> dict[str, Schema]:
    """Sections of which a layer may leave anything out, and take a named data set or setting away (null)."""
    found = {name: _optional(each) for name, each in definitions.items()}
    gone = {"type": "null"}
    for section, key in (("Experiment", "datasets"), ("Evaluation", "settings")):
        field = found[section]["properties"][key]
        field["additionalProperties"] = {"anyOf": [field["additionalProperties"], gone]}
    return found


def _optional(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_optional(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _optional(value) for key, value in schema.items() if key != "required"}


# --- for readers

HEAD = """# Every field

<!-- written by scripts/config_reference.py -->

What a config may say, section by section, made from the code. How the sections work together is in [experiments.md](experiments.md);
the quirks are in [recipes.md](recipes.md). An editor that understands JSON schemas checks a config while you write it, where its first
line names the schema: `# yaml-language-server: $schema=configs/schema.json`.

A field **decides** one or more of these:

| | what hangs on it |
| --- | --- |
| result | what is computed: the value is part of the key of everything that it concerns |
| content | the same, by the content of the file or artifact that it names |
| program | what is compiled |
| plan | which tasks there are, not what any of them makes |
| runtime | only how it is made: speed, memory, places. No key knows it |
"""


def reference() -> str:
    """docs/config.md."""
    parts = [HEAD, "## An experiment on a language model\n", *_tables(Experiment, "")]
    parts += [
        "## An experiment on digits\n",
        "With `kind: digits` ([digits.md](findings/digits.md)).\n",
        *_tables(Digits, ""),
    ]
    return "\n".join(parts)


def _tables(section: type[BaseModel], path: str) -> Iterator[str]:
    """A section's table, and those of the sections in it."""
    schemas = _bare(section.model_json_schema())
    if path:
        yield f"### {path}\n"
    yield " ".join((section.__doc__ or "").split("\n\n")[0].split()) + "\n"
    if section.model_fields:
        rows = [_row(name, field, schemas) for name, field in section.model_fields.items() if name != "changes"]
        yield (
            "| field | what it is | value | default | decides |\n| --- | --- | --- | --- | --- |\n"
            + "\n".join(rows)
            + "\n"
        )
    for name, field in section.model_fields.items():
        place = f"{path}.{name}" if path else name
        inner = section_in(field.annotation)
        if name == "kinds":
            yield from _registered(EVAL_KINDS.known, place)
        elif name == "changes":
            yield from _registered(CHANGES.known, path)
        elif inner in (Dataset, Setting):
            yield from _tables(inner, f"{place}.NAME")
        elif inner is not None:
            yield from _tables(inner, place)


def _registered(known: Mapping[str, type[BaseModel]], place: str) -> Iterator[str]:
    for name, kind in known.items():
        yield from _tables(kind, f"{place}.{name}")


def _row(name: str, field: FieldInfo, schemas: Schema) -> str:
    own = schemas["properties"][name]
    value = "a section" if section_in(field.annotation) else _value(own, schemas.get("$defs", {}))
    marks = [mark for mark in field.metadata if isinstance(mark, Decides)]
    decides = ", ".join(str(flag.name).lower() for mark in marks for flag in mark)
    said = " ".join((field.description or "").split())
    cells = (f"`{name}`", said, value, _default(field, own), decides)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(field: FieldInfo, own: Schema) -> str:
    if field.is_required():
        return "required"
    if "default" not in own or (isinstance(own["default"], dict) and section_in(field.annotation) is not None):
        return ""
    text = yaml.safe_dump(own["default"], default_flow_style=True, width=10_000, allow_unicode=True)
    return f"`{text.removesuffix('...' + chr(10)).strip()}`"


def _value(schema: Schema, definitions: Mapping[str, Schema]) -> str:
    """What a JSON schema allows, in words."""
    if "$ref" in schema:
        return "a section"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_value(each, definitions) for each in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{each}`" for each in schema.get("enum", [schema.get("const")]))
    if "prefixItems" in schema:
        return "[" + ", ".join(_value(each, definitions) for each in schema["prefixItems"]) + "]"
    kind = schema.get("type")
    if kind == "array":
        return f"[{_value(schema.get('items', {}), definitions)}, ...]"
    if kind == "object":
        return "mapping"
    if kind in ("integer", "number"):
        return f"{kind}{_limits(schema)}"
    return {"string": "text", "boolean": "true or false", "null": "null"}.get(str(kind), "anything")


def _limits(schema: Schema) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    said = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema]
    return f" {', '.join(said)}" if said else ""


def main() -> None:
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
