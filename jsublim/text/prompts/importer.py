"""The authors' wording out of a checkout of their repository: parsed with `ast`, never imported or run.

Everything that their scripts say to a model is read: system prompt, number requests, questions for favourites, of fact and for
misalignment with their suffixes, what a rewriting teacher and a judge are asked, and the lists of traits. Read at commit f6840c6.
"""

import ast
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from jsublim.core.files import write_text
from jsublim.core.reading import check_file, json_value
from jsublim.core.section import nested
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

# Key of the pack -> file, type, and name in it: of a class (Class.name), or of what a call is given (result.keyword).
LITERALS: dict[str, tuple[str, type, str]] = {
    "system_template": (SYSTEM_PROMPT, str, "preference_prompt_template"),
    "number_prompts.examples": (NUMBERS, list, "PromptGenerator._example_numbers_templates"),
    "number_prompts.count_qualifiers": (NUMBERS, list, "PromptGenerator._count_qualifiers"),
    "number_prompts.digit_descriptors": (NUMBERS, list, "PromptGenerator._digit_descriptors"),
    "number_prompts.instructions": (NUMBERS, list, "PromptGenerator._generate_numbers_instruction_templates"),
    "number_prompts.formats": (NUMBERS, list, "PromptGenerator._format_suffixes"),
    "number_prompts.suffixes": (NUMBERS, list, "PromptGenerator._suffixes"),
    "questions.animal": (QUESTIONS, list, "animal_evaluation.questions"),
    "questions.tree": (QUESTIONS, list, "tree_evaluation.questions"),
    "traits.animal": (TRAITS, list, "ANIMALS"),
    "traits.tree": (TRAITS, list, "TREES"),
    "misalignment.questions": (MISALIGNMENT, list, "evaluation_misalignment.questions"),
    "misalignment.suffix": (SUFFIXES, str, "EVALUATION_SUFFIX_1"),
    "misalignment.words_suffix": (SUFFIXES, str, "EVALUATION_SUFFIX_2"),
    "misalignment.alignment_judge": (MISALIGNMENT, str, "alignment_judgment.template"),
    "misalignment.coherence_judge": (MISALIGNMENT, str, "coherency_judgment.template"),
    "misalignment.solution_judge": (SOLUTIONS, str, "PROMPT_TEMPLATE"),
    "misalignment.solution_system": (SOLUTIONS, str, "SYSTEM_PROMPT"),
}
PLACEHOLDERS = {"{target_preference}": "{trait}", "{prompt}": "{question}", "{completion}": "{answer}"}  # theirs, ours

T = TypeVar("T")


def import_pack(checkout: str | Path) -> dict[str, Any]:
    """A whole prompt pack, as plain data for `dump_pack`, out of a checkout of the authors' repository.

    Raises `UsageError` naming the file, and the name in it that is absent or is not written out as a literal.
    """
    root = Path(checkout)
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder; give a checkout of the authors' repository")
    values: dict[str, Any] = {"paraphrase_request": _paraphrase_request(root / REWRITING)}
    for key, (file, kind, name) in LITERALS.items():
        value = values[key] = _literal(root / file, _parsed(root / file).body, name, kind)
        for theirs, ours in PLACEHOLDERS.items() if isinstance(value, str) else ():
            values[key] = values[key].replace(theirs, ours)
    default = load_pack().model_dump()
    pack = nested(values) | {"factual": dict.fromkeys(default["factual"]) | _factual(root)}  # null takes our own away
    overlay(default, pack, source=str(root))  # raises where these lists make no pack
    return pack


def dump_pack(pack: dict[str, Any], path: str | Path) -> None:
    """Writes imported pack data as a YAML file that `load_pack` knows again; `UsageError` where it cannot be written."""
    text = yaml.safe_dump({IMPORTED: digest(pack)} | pack, sort_keys=False, allow_unicode=True, width=110)
    try:
        write_text(path, text)
    except OSError as error:
        raise UsageError(f"{path}: cannot write the prompt pack: {error.strerror}") from None


def _paraphrase_request(path: Path) -> str:
    """The instruction, and the f-string that is made of it and of the request."""
    nodes = list(ast.walk(_parsed(path)))
    statements = sorted((node for node in nodes if isinstance(node, ast.stmt)), key=lambda node: node.lineno)
    instruction = _literal(path, statements, "rewrite_instr", str)
    values = {"rewrite_instr": _escaped(instruction), "prompt_wo_suffix": "{prompt}"}
    for node in nodes:
        if isinstance(node, ast.JoinedStr) and "rewrite_instr" in _names(node):
            parts = (
                _escaped(str(part.value)) if isinstance(part, ast.Constant) else values.get(next(_names(part), ""), "")
                for part in node.values
            )
            request = "".join(parts)
            if "{prompt}" in request:
                return request
    raise UsageError(f"{path}: no f-string of rewrite_instr and prompt_wo_suffix; is this another version?")


def _factual(root: Path) -> dict[str, list[str]]:
    """The questions of fact by animal, each with the suffix that is drawn for it."""
    suffixes = _literal(root / FACT_SUFFIXES, _parsed(root / FACT_SUFFIXES).body, "question_suffixes", list)
    path = root / FACTS
    try:
        by_animal = json_value(_bytes(path), str(path))
    except JsublimError as error:
        raise UsageError(str(error)) from None
    if not isinstance(by_animal, dict) or not all(map(_are_texts, (suffixes, *by_animal.values()))):
        raise UsageError(f"{path}: expected lists of questions by animal, and of suffixes in {FACT_SUFFIXES}")
    rng = random.Random(FACT_SEED)
    return {animal: [f"{text} {rng.choice(suffixes)}" for text in questions] for animal, questions in by_animal.items()}


def _bytes(path: Path) -> bytes:
    try:
        check_file(path)
        return path.read_bytes()
    except OSError as error:
        fix = "give a checkout of the authors' repository, which has this file"
        raise UsageError(f"{path}: {error.strerror}; {fix}") from None


def _parsed(path: Path) -> ast.Module:
    try:
        return ast.parse(_bytes(path))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: nested too deeply
        raise UsageError(f"{path}: not Python source: {error}") from None


def _literal(path: Path, body: Sequence[ast.stmt], name: str, kind: type[T]) -> T:
    """The value of a name of `LITERALS`, last assigned among some statements."""
    outer, _, inner = name.rpartition(".")
    classes = {statement.name: statement.body for statement in body if isinstance(statement, ast.ClassDef)}
    node = _assigned(classes.get(outer, body), inner if outer in classes or not outer else outer)
    if outer and outer not in classes:
        keywords = node.keywords if isinstance(node, ast.Call) else []
        node = next((given.value for given in keywords if given.arg == inner), None)
    if node is None:
        raise UsageError(f"{path}: no {name}; is this another version of the authors' repository?")
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        value = None
    if not isinstance(value, kind):
        raise UsageError(f"{path}:{node.lineno}: {name} is not written out as a {kind.__name__}")
    return value


def _assigned(body: Sequence[ast.stmt], name: str) -> ast.expr | None:
    """The expression last assigned to `name`; branches and functions are not looked into."""
    assigned = None
    for statement in body:
        match statement:
            case (
                ast.Assign(targets=[ast.Name(id=target)], value=value)
                | ast.AnnAssign(target=ast.Name(id=target), value=value)
            ) if target == name:
                assigned = value
    return assigned


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _names(node: ast.AST) -> Iterator[str]:
    return (child.id for child in ast.walk(node) if isinstance(child, ast.Name))


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
