"""The authors' prompt lists out of a checkout of their repository: parsed with `ast`, never imported or run."""

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from jsublim.errors import UsageError
from jsublim.files import write_text
from jsublim.prompts.pack import load_pack, overlay

NUMBERS = "sl/datasets/nums_dataset.py"
SYSTEM_PROMPT = "scripts/generate_dataset_preferences_via_numbers.py"
QUESTIONS = "scripts/run_evaluation_preferences.py"
TRAITS = "scripts/modify_dataset_divergence_tokens_system_prompt.py"

# Key of the pack -> name in the source.
NUMBER_LISTS = {
    "examples": "_example_numbers_templates",
    "count_qualifiers": "_count_qualifiers",
    "digit_descriptors": "_digit_descriptors",
    "instructions": "_generate_numbers_instruction_templates",
    "formats": "_format_suffixes",
    "suffixes": "_suffixes",
}
EVALUATIONS = {"animal": "animal_evaluation", "tree": "tree_evaluation"}
TRAIT_LISTS = {"animal": "ANIMALS", "tree": "TREES"}

T = TypeVar("T")


def import_pack(checkout: str | Path) -> dict[str, Any]:
    """A whole prompt pack, as plain data for `dump_pack`, out of a checkout of the authors' repository.

    Raises `UsageError` naming the file, and the name in it that is absent or is not written out as a literal.
    """
    root = Path(checkout)
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder; give a checkout of the authors' repository")
    generator = _Scope.of_file(root / NUMBERS).inner_class("PromptGenerator")
    questions = _Scope.of_file(root / QUESTIONS)
    traits = _Scope.of_file(root / TRAITS)
    template = _Scope.of_file(root / SYSTEM_PROMPT).literal("preference_prompt_template", str)
    pack = {
        "system_template": template.replace("{target_preference}", "{trait}"),
        "number_prompts": {key: generator.literal(name, list) for key, name in NUMBER_LISTS.items()},
        "questions": {key: questions.literal(name, list, "questions") for key, name in EVALUATIONS.items()},
        "traits": {key: traits.literal(name, list) for key, name in TRAIT_LISTS.items()},
    }
    overlay(load_pack().model_dump(), pack, source=str(root))  # raises where these lists make no pack
    return pack


def dump_pack(pack: dict[str, Any], path: str | Path) -> None:
    """Writes pack data as a YAML file that `load_pack` reads; `UsageError` where it cannot be written."""
    text = yaml.safe_dump(pack, sort_keys=False, allow_unicode=True, width=110)
    try:
        write_text(path, text)
    except OSError as error:
        raise UsageError(f"{path}: cannot write the prompt pack: {error.strerror}") from None


@dataclass(frozen=True)
class _Scope:
    """The statements of a module or of a class in it."""

    path: Path
    body: list[ast.stmt]

    @classmethod
    def of_file(cls, path: Path) -> "_Scope":
        try:
            return cls(path, ast.parse(path.read_bytes()).body)
        except OSError as error:
            raise UsageError(
                f"{path}: {error.strerror}; give a checkout of the authors' repository, which has this file"
            ) from None
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: nested too deeply
            raise UsageError(f"{path}: not Python source: {error}") from None

    def inner_class(self, name: str) -> "_Scope":
        for statement in self.body:
            if isinstance(statement, ast.ClassDef) and statement.name == name:
                return _Scope(self.path, statement.body)
        raise UsageError(f"{self.path}: no class {name}; is this another version of the authors' repository?")

    def literal(self, name: str, kind: type[T], keyword: str | None = None) -> T:
        """The value assigned to `name`, or given for `keyword` in the call that is assigned to it."""
        node, shown = self._assigned(name), name
        if keyword is not None:
            shown = f"{name}({keyword}=...)"
            keywords = node.keywords if isinstance(node, ast.Call) else []
            node = next((given.value for given in keywords if given.arg == keyword), None)
        if node is None:
            raise UsageError(f"{self.path}: no {shown}; is this another version of the authors' repository?")
        try:
            value = ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            value = None
        if not isinstance(value, kind):
            raise UsageError(f"{self.path}:{node.lineno}: {shown} is not written out as a {kind.__name__}")
        return value

    def _assigned(self, name: str) -> ast.expr | None:
        """The expression last assigned to `name` here; branches and functions are not looked into."""
        found = None
        for statement in self.body:
            match statement:
                case (
                    ast.Assign(targets=[ast.Name(id=target)], value=value)
                    | ast.AnnAssign(target=ast.Name(id=target), value=value)
                ) if target == name:
                    found = value
        return found
