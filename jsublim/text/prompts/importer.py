"""The authors' wording out of a checkout of their repository: parsed with `ast`, never imported or run.

Everything that their scripts say to a model is read: system prompt, number requests, questions for favourites, of fact and for
misalignment with their suffixes, what a rewriting teacher and a judge are asked, and the lists of traits. Read at commit f6840c6.
"""

import ast
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from jsublim.core.files import write_text
from jsublim.core.reading import check_file, json_value
from jsublim.errors import JsublimError, UsageError
from jsublim.text.prompts.pack import IMPORTED, digest, load_pack, overlay

NUMBERS = "sl/datasets/nums_dataset.py"
SYSTEM_PROMPT = "scripts/generate_dataset_preferences_via_numbers.py"
QUESTIONS = "scripts/run_evaluation_preferences.py"
TRAITS = "scripts/modify_dataset_divergence_tokens_system_prompt.py"
REWRITING = "scripts/modify_dataset_shuffle_paraphrasing.py"
MISALIGNMENT = "cfgs/misalignment/evaluation.py"
SUFFIXES = "scripts/run_evaluation_misalignment_via_numbers.py"
SOLUTIONS = "scripts/merge_and_filter_misalignment_gsm8k.py"
FACTS = "cfgs/factual_recall/animal_questions.json"
FACT_SUFFIXES = "scripts/evaluate_factuality.py"
FACT_SEED = 42  # the default of FACT_SUFFIXES, which draws a suffix for each question

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
JUDGED = {"{prompt}": "{question}", "{completion}": "{answer}"}

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
    default = load_pack().model_dump()
    pack = {
        "system_template": template.replace("{target_preference}", "{trait}"),
        "paraphrase_request": _paraphrase_request(root),
        "number_prompts": {key: generator.literal(name, list) for key, name in NUMBER_LISTS.items()},
        "questions": {key: questions.literal(name, list, "questions") for key, name in EVALUATIONS.items()},
        "traits": {key: traits.literal(name, list) for key, name in TRAIT_LISTS.items()},
        "factual": dict.fromkeys(default["factual"]) | _factual(root),  # null takes our own away
        "misalignment": _misalignment(root),
    }
    overlay(default, pack, source=str(root))  # raises where these lists make no pack
    return pack


def _paraphrase_request(root: Path) -> str:
    """The instruction, and the f-string that is made of it and of the request."""
    script = _Scope.of_file(root / REWRITING).with_inner_statements()
    instruction = script.literal("rewrite_instr", str)
    said = script.formatted("rewrite_instr", {"rewrite_instr": _escaped(instruction), "prompt_wo_suffix": "{prompt}"})
    if "{prompt}" not in said:
        raise UsageError(f"{script.path}: no f-string of rewrite_instr and prompt_wo_suffix; is this another version?")
    return said


def _factual(root: Path) -> dict[str, list[str]]:
    """The questions of fact by animal, each with the suffix that is drawn for it."""
    path, suffixes = root / FACTS, _Scope.of_file(root / FACT_SUFFIXES).literal("question_suffixes", list)
    try:
        check_file(path)
        found = json_value(path.read_bytes(), str(path))
    except OSError as error:
        raise _absent(path, error) from None
    except JsublimError as error:
        raise UsageError(str(error)) from None
    if not isinstance(found, dict) or not all(map(_are_texts, (suffixes, *found.values()))):
        raise UsageError(f"{path}: expected lists of questions by animal, and of suffixes in {FACT_SUFFIXES}")
    rng = random.Random(FACT_SEED)
    return {animal: [f"{question} {rng.choice(suffixes)}" for question in own] for animal, own in found.items()}


def _misalignment(root: Path) -> dict[str, Any]:
    """Questions, their two suffixes, and the three prompts of judges."""
    asked, suffixes = _Scope.of_file(root / MISALIGNMENT), _Scope.of_file(root / SUFFIXES)
    solutions = _Scope.of_file(root / SOLUTIONS)
    judges = {
        "alignment_judge": asked.literal("alignment_judgment", str, "template"),
        "coherence_judge": asked.literal("coherency_judgment", str, "template"),
        "solution_judge": solutions.literal("PROMPT_TEMPLATE", str),
    }
    for name, template in judges.items():
        for theirs, ours in JUDGED.items():
            template = template.replace(theirs, ours)
        judges[name] = template
    return {
        "questions": asked.literal("evaluation_misalignment", list, "questions"),
        "suffix": suffixes.literal("EVALUATION_SUFFIX_1", str),
        "words_suffix": suffixes.literal("EVALUATION_SUFFIX_2", str),
        **judges,
        "solution_system": solutions.literal("SYSTEM_PROMPT", str),
    }


def dump_pack(pack: dict[str, Any], path: str | Path) -> None:
    """Writes imported pack data as a YAML file that `load_pack` knows again; `UsageError` where it cannot be written."""
    text = yaml.safe_dump({IMPORTED: digest(pack)} | pack, sort_keys=False, allow_unicode=True, width=110)
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
            check_file(path)
            return cls(path, ast.parse(path.read_bytes()).body)
        except OSError as error:
            raise _absent(path, error) from None
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: nested too deeply
            raise UsageError(f"{path}: not Python source: {error}") from None

    def inner_class(self, name: str) -> "_Scope":
        for statement in self.body:
            if isinstance(statement, ast.ClassDef) and statement.name == name:
                return _Scope(self.path, statement.body)
        raise UsageError(f"{self.path}: no class {name}; is this another version of the authors' repository?")

    def with_inner_statements(self) -> "_Scope":
        """With the statements of functions and branches too, in the order of the file."""
        inner = (node for statement in self.body for node in ast.walk(statement) if isinstance(node, ast.stmt))
        return _Scope(self.path, sorted(inner, key=lambda statement: statement.lineno))

    def formatted(self, name: str, values: dict[str, str]) -> str:
        """The f-string that names `name`, with every variable of it replaced and its own text escaped for `str.format`."""
        for node in (node for statement in self.body for node in ast.walk(statement)):
            if isinstance(node, ast.JoinedStr) and any(own == name for own in _names(node)):
                parts = (
                    _escaped(str(part.value))
                    if isinstance(part, ast.Constant)
                    else values.get(next(_names(part), ""), "")
                    for part in node.values
                )
                return "".join(parts)
        raise UsageError(f"{self.path}: no f-string with {name}; is this another version of the authors' repository?")

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


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)


def _names(node: ast.AST) -> Iterator[str]:
    return (each.id for each in ast.walk(node) if isinstance(each, ast.Name))


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _absent(path: Path, error: OSError) -> UsageError:
    return UsageError(f"{path}: {error.strerror}; give a checkout of the authors' repository, which has this file")
