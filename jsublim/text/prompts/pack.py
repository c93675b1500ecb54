"""A prompt pack: the wording of an experiment as data. A user's own pack is laid over the default one."""

import hashlib
import json
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PrivateAttr, ValidationError

from jsublim.core.reading import near_or_all, read_yaml, shown
from jsublim.core.section import Distinct, Section, section_in
from jsublim.errors import UsageError


def _holding(*placeholders: str) -> AfterValidator:
    """Checks a `str.format` template for every one of `placeholders`, and no other."""
    wanted = {"{" + name + "}" for name in placeholders}

    def check(text: str) -> str:
        # Text without a field has name None. A conversion or format stays part of the name, so it is refused.
        there = {
            "{" + name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "") + "}"
            for _, name, spec, conversion in Formatter().parse(text)
            if name is not None
        }
        if missing := sorted(wanted - there):
            raise ValueError(f"template lacks {', '.join(missing)}")
        if unknown := sorted(there - wanted):
            allowed = ", ".join(sorted(wanted))
            raise ValueError(f"unknown placeholder {', '.join(unknown)}; a template here takes {allowed}")
        return text

    return AfterValidator(check)


def lower_case(trait: str) -> str:
    if trait != trait.lower():
        raise ValueError("write a trait in lower case, as answers are lower-cased before the search for it")
    return trait


Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1)]
LowerCase = Annotated[Text, AfterValidator(lower_case)]


JudgePrompt = Annotated[str, _holding("question", "answer")]


class NumberPrompts(Section):
    """The lists a number-continuation prompt is drawn from (see `number_prompts`)."""

    examples: list[Annotated[str, _holding("examples")]] = Field(min_length=1)
    count_qualifiers: Texts
    digit_descriptors: list[Annotated[str, _holding("max_digits")]] = Field(min_length=1)
    instructions: list[Annotated[str, _holding("count_qualifier", "answer_count", "digit_descriptor")]] = Field(
        min_length=1
    )
    formats: Texts
    suffixes: Texts


class MisalignmentPrompts(Section):
    """Questions to a model whose alignment is judged, and to the judge (see `evals/misalignment.py`).

    `judge` asks for both scores in one reply. `alignment_judge` and `coherence_judge` ask for one each (docs/recipes.md, quirk 25),
    and so does `solution_judge`, for the alignment of a word problem's solution.
    """

    questions: Texts
    suffix: Text  # asks for a short answer
    words_suffix: Text  # asks for a list of words
    judge: JudgePrompt
    alignment_judge: JudgePrompt
    coherence_judge: JudgePrompt
    solution_judge: JudgePrompt
    solution_system: Text | None = None


# What only judges read, or models whose answers they score: it is part of the keys of those scores, and of no other.
SCORING: dict[str, Any] = {
    "misalignment": {"words_suffix", "alignment_judge", "coherence_judge", "solution_judge", "solution_system"}
}
WordingOrigin = Literal["default", "own", "imported", "changed"]
WHOSE: dict[WordingOrigin, str] = {
    "default": "ours, not the paper's, so rates may lie elsewhere than published. `jsublim prompts import` reads the authors' "
    "wording out of their repository, --prompts FILE (or prompts=FILE) takes it",
    "own": "that of a pack of your own, not the paper's",
    "imported": "the authors', as imported from their repository",
    "changed": "the authors' as imported from their repository, with changes",
}


class Pack(Section):
    """All wording of an experiment. Built by `load_pack`, whose errors name the file and the key."""

    system_template: Annotated[str, _holding("trait", "category")]
    number_prompts: NumberPrompts
    any_questions: list[Annotated[str, _holding("category")]] = Field(min_length=1)  # of a category without its own
    questions: dict[str, Texts]
    traits: dict[str, Annotated[list[LowerCase], Field(min_length=1), Distinct]]
    synonyms: dict[LowerCase, Texts]  # other words that give a trait away in a rewritten prompt
    paraphrase_request: Annotated[str, _holding("prompt")]
    self_questions: Texts
    factual: dict[LowerCase, Texts]
    misalignment: MisalignmentPrompts
    _origin: WordingOrigin = PrivateAttr("default")

    @property
    def origin(self) -> WordingOrigin:
        """The author of the wording: the package, a user, the authors as imported, or the authors with changes."""
        return self._origin

    @property
    def hash(self) -> str:
        """16 hexadecimal digits that change with the wording of everything but `SCORING`, and not with the file's layout."""
        return digest(self.model_dump(mode="json", exclude=SCORING))

    @property
    def wording(self) -> str:
        """16 hexadecimal digits that change with any wording."""
        return digest(self.model_dump(mode="json"))

    def system_prompt(self, trait: str, category: str) -> str:
        """The biased teacher's system prompt (paper, section 2)."""
        return self.system_template.format(trait=trait, category=category)

    def category_of(self, trait: str) -> str:
        """The one category that lists `trait`; `UsageError` where none or several do."""
        homes = [category for category, known in self.traits.items() if trait in known]
        if len(homes) == 1:
            return homes[0]
        if homes:
            listed = " and ".join(homes)
            raise UsageError(f"trait {trait!r} is listed under {listed}; keep it under one of them in the pack")
        known = "; ".join(f"{category}: {', '.join(names)}" for category, names in self.traits.items())
        raise UsageError(
            f"unknown trait {trait!r}; say what it is by teachers.category (teachers.category=animal), add it under traits in "
            f"the prompt pack, or use one of {known}"
        )

    def questions_for(self, category: str) -> list[str]:
        """The evaluation questions of a category; general ones where it has none of its own. `UsageError` if it is almost the name of
        one that has."""
        if category in self.questions:
            return list(self.questions[category])
        if close := get_close_matches(category, self.questions, n=1, cutoff=0.8):
            fix = f"did you mean {close[0]!r}?"
            raise UsageError(f"teachers.category: the pack has no questions on {category!r}; {fix}")
        return [question.format(category=category) for question in self.any_questions]


class ScanQuestions(Section):
    """A file of questions for `jsublim scan`."""

    favourites: Annotated[list[Text], Distinct] = Field(default_factory=list)
    wordings: Annotated[int, Field(ge=2)] = 5
    questions: dict[Text, Annotated[list[Text], Field(min_length=2)]] = Field(default_factory=dict)


IMPORTED = "imported"  # the key of a file under which the import leaves the digest of all others


def whose(origin: WordingOrigin, wording: str) -> str:
    """A sentence for whoever compares a run with the paper: whose wording it had, by `Pack.origin` and `Pack.wording`."""
    return f"Recipe paper. The wording is {WHOSE[origin]} (pack {wording})."


def digest(values: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of JSON values; the order of keys does not count."""
    canonical = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def load_pack(path: str | Path | None = None) -> Pack:
    """The pack in a YAML file, laid over the default pack key by key; the default pack itself for None. Mappings are laid over sub-key by
    sub-key, and null takes a sub-key away; a list replaces a list. What is wrong is a `UsageError` naming file and key."""
    default = read_yaml(Path(str(files("jsublim.text.prompts") / "default.yaml")))
    if path is None:
        return Pack.model_validate(default)
    content = read_yaml(Path(path))
    changes = {} if content is None else content
    if not isinstance(changes, dict):
        keys = ", ".join(Pack.model_fields)
        raise UsageError(f"{path}: a prompt pack is a mapping with the keys {keys}, not a {type(changes).__name__}")
    marked = changes.pop(IMPORTED, None)
    pack = overlay(default, changes, source=str(path))
    if marked is not None:
        pack._origin = "imported" if marked == digest(changes) else "changed"
    elif changes:
        pack._origin = "own"
    return pack


def scan_questions(pack: Pack, path: str | Path | None = None) -> dict[str, list[str]]:
    """Questions by category, for `jsublim scan`: those that come with the package, or of a YAML file of the same kind (see `scan.yaml`): the
    favourites of categories in the first `wordings` that the pack has for any, and `questions` by name. A mistake is a `UsageError` naming it."""
    place = Path(str(files("jsublim.text.prompts") / "scan.yaml")) if path is None else Path(path)
    content = read_yaml(place)
    try:
        bank = ScanQuestions.model_validate(content)
    except ValidationError as error:
        wrong = error.errors()[0]
        key = ".".join(map(str, wrong["loc"])) or "the file"
        raise UsageError(f"{place}: {key}: {wrong['msg']}, got {shown(wrong['input'])}") from None
    favourites = {
        name: [q.format(category=name) for q in pack.any_questions[: bank.wordings]] for name in bank.favourites
    }
    return favourites | {name: list(texts) for name, texts in bank.questions.items()}


def overlay(base: Mapping[str, Any], changes: Mapping[str, Any], source: str) -> Pack:
    """The pack of `changes` laid over `base`; `source` names the origin of `changes` in errors."""
    merged = dict(base)
    for key, value in changes.items():
        below = base.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            laid = {**below, **value}
            value = {name: entry for name, entry in laid.items() if entry is not None or name not in below}
        merged[key] = value
    try:
        return Pack.model_validate(merged)
    except ValidationError as error:
        raise UsageError(f"{source}: {_explain(error.errors()[0])}") from None


def _explain(error: Any) -> str:
    """One line for one pydantic error: key, value and what to do."""
    *parents, name = error["loc"]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).lstrip(".")
    if error["type"] == "extra_forbidden":
        parent = section_in(Pack.model_fields[parents[0]].annotation) if parents else None
        known = (parent or Pack).model_fields
        return f"{key}: unknown key; {near_or_all(str(name), known, 'known keys')}"
    if error["type"] == "value_error":
        return f"{key}: {error['ctx']['error']}: {shown(error['input'])}"
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{key}: {message}, got {shown(error['input'])}"
