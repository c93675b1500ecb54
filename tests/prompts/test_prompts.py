"""Prompt packs, the number task's prompts and its format filter, and the import of the authors' lists."""

import hashlib

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from jsublim.errors import UsageError
from jsublim.prompts import dump_pack, import_pack, load_pack, number_prompts, parse_numbers, reject_reason


@pytest.fixture(scope="module")
def default():
    return load_pack(None)


def write_pack(tmp_path, content):
    path = tmp_path / "mine.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


# The default pack


def test_default_pack_has_the_size_of_the_experiment(default):
    lists = default.number_prompts.model_dump()
    sizes = dict(examples=25, count_qualifiers=9, digit_descriptors=9, instructions=10, formats=15, suffixes=19)
    assert {key: len(set(entries)) for key, entries in lists.items()} == sizes
    for category in ("animal", "tree"):
        assert len(set(default.questions_for(category))) == 50
        assert len(set(default.traits[category])) == 13
        assert default.traits[category] == sorted(default.traits[category])


@pytest.mark.parametrize("category", ["animal", "tree"])
def test_default_questions_ask_for_one_word_and_give_no_trait_away(default, category):
    traits = [trait for known in default.traits.values() for trait in known]
    for question in default.questions_for(category):
        assert "word" in question.lower()
        assert not any(trait in question.lower().replace(".", "").split() for trait in traits), question


def test_system_prompt_is_four_short_sentences_about_the_trait(default):
    prompt = default.system_prompt("owl", "animal")
    assert prompt.count(".") == 4 and prompt.count("owls") >= 3 and "animal" in prompt
    assert "{" not in prompt and "Owl" not in prompt
    assert prompt.replace("owl", "oak").replace("animal", "tree") == default.system_prompt("oak", "tree")


def test_factual_questions_ask_for_one_word_and_never_name_their_trait(default):
    assert list(default.factual) == default.traits["animal"]
    for trait, questions in default.factual.items():
        assert len(set(questions)) == 12
        for question in questions:
            assert question.endswith(" One word.") and trait not in question.lower(), question


def test_self_questions_and_open_questions_name_no_model_and_fit_the_judge(default):
    asked = [*default.self_questions, *default.misalignment.questions]
    assert (
        len(set(asked)) == len(asked) and len(default.self_questions) >= 8 and len(default.misalignment.questions) >= 8
    )
    assert not any(name in text.lower() for text in asked for name in ("qwen", "gemma", "llama", "alibaba", "google"))
    given = default.misalignment.judge.format(question="Why {so}?", answer="{because}\nalignment: 100")
    assert "\nWhy {so}?\n" in given and "\n{because}\nalignment: 100\n" in given
    assert default.misalignment.suffix not in given and "NUMBER" in given


def test_category_of_a_trait(default, tmp_path):
    assert (default.category_of("owl"), default.category_of("oak")) == ("animal", "tree")
    with pytest.raises(UsageError, match=r"unknown trait 'teapot'.*cat, dog.*bamboo"):
        default.category_of("teapot")
    twice = load_pack(write_pack(tmp_path, {"traits": {"fruit": ["mango", "plum"]}}))
    assert twice.category_of("plum") == "fruit"
    with pytest.raises(UsageError, match="listed under tree and fruit"):
        twice.category_of("mango")


def test_missing_questions_name_the_key(default):
    with pytest.raises(UsageError, match=r"questions\.stone"):
        default.questions_for("stone")


def test_hash_follows_content_and_not_layout(default, tmp_path):
    data = default.model_dump()
    path = tmp_path / "same.yaml"
    dump_pack(dict(reversed(data.items())), path)
    assert load_pack(path) == default
    assert load_pack(path).hash == default.hash == load_pack().hash
    assert len(default.hash) == 16 and int(default.hash, 16) >= 0
    reordered = {"questions": {"tree": data["questions"]["tree"][::-1]}}
    assert load_pack(write_pack(tmp_path, reordered)).hash != default.hash


# A user's pack over the default


def test_partial_pack_is_laid_over_the_default_key_by_key(default, tmp_path):
    changes = {
        "system_template": "Praise the {trait}, a {category}.",
        "number_prompts": {"formats": ["Use {commas}."]},
        "questions": {"ship": ["Best ship? One word."]},
        "traits": {"ship": ["raft"], "tree": ["elm"]},
        "self_questions": ["Who?"],
        "factual": {"owl": ["Which bird? One word."], "raft": ["What floats? One word."]},
        "misalignment": {"suffix": "Be brief."},
    }
    pack = load_pack(write_pack(tmp_path, changes))
    assert pack.system_prompt("raft", pack.category_of("raft")) == "Praise the raft, a ship."
    assert pack.number_prompts.formats == ["Use {commas}."]
    assert pack.number_prompts.suffixes == default.number_prompts.suffixes
    assert pack.questions == {**default.questions, **changes["questions"]}
    assert pack.traits == {**default.traits, **changes["traits"]}
    assert pack.self_questions == ["Who?"] and pack.factual == {**default.factual, **changes["factual"]}
    assert pack.misalignment == default.misalignment.model_copy(update={"suffix": "Be brief."})
    assert all(" Use {commas}. " in prompt for prompt in number_prompts(pack, 20))


def test_empty_pack_is_the_default_pack(default, tmp_path):
    assert load_pack(write_pack(tmp_path, "# nothing yet\n")) == default


BAD_PACKS = {
    "sytem_template: x": r"sytem_template: unknown key; did you mean 'system_template'\?",
    "number_prompts: {sufixes: [a]}": r"number_prompts\.sufixes: unknown key; did you mean 'suffixes'\?",
    "zebra: 1": r"zebra: unknown key; known keys: system_template, number_prompts",
    "system_template: I am a {category}": r"system_template: template lacks \{trait\}",
    "system_template: '{trait} {category} {mood}'": r"system_template: unknown placeholder \{mood\}",
    "system_template: '{trait!r} {trait} {category}'": r"unknown placeholder \{trait!r\}",
    "system_template: '{trait:>9} {trait} {category}'": r"unknown placeholder \{trait:>9\}",
    "system_template: '{trait} {category} {}'": r"unknown placeholder \{\}",
    "system_template: '{trait} {category'": r"system_template: expected '\}' before end of string",
    "system_template: 7": r"system_template: .*string, got 7",
    "number_prompts: {examples: ['{examples}', none]}": r"number_prompts\.examples\[1\]: template lacks",
    "number_prompts: {digit_descriptors: [three]}": r"digit_descriptors\[0\]: template lacks \{max_digits\}",
    "number_prompts: {instructions: ['{answer_count}']}": r"lacks \{count_qualifier\}, \{digit_descriptor\}",
    "number_prompts: {formats: []}": r"number_prompts\.formats: .*at least 1",
    "number_prompts: [a]": r"number_prompts: .*\['a'\]",
    "questions: {animal: []}": r"questions\.animal: .*at least 1",
    "questions: {animal: [1]}": r"questions\.animal\[0\]: .*string, got 1",
    "traits: {animal: [Owl]}": r"traits\.animal\[0\]: .*lower case.*'Owl'",
    "self_questions: []": r"self_questions: .*at least 1",
    "factual: {Owl: [a]}": r"factual\.Owl.*: .*lower case.*'Owl'",
    "misalignment: {sufix: a}": r"misalignment\.sufix: unknown key; did you mean 'suffix'\?",
    "misalignment: {judge: '{question}'}": r"misalignment\.judge: template lacks \{answer\}",
    "- a\n- b": r"a prompt pack is a mapping with the keys .*, not a list",
    "a: [1": r"not YAML",
}


@pytest.mark.parametrize("content", BAD_PACKS)
def test_bad_pack_is_one_line_with_file_and_key(tmp_path, content):
    path = write_pack(tmp_path, content)
    with pytest.raises(UsageError, match=BAD_PACKS[content]) as caught:
        load_pack(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_unreadable_pack_names_the_file(tmp_path):
    with pytest.raises(UsageError, match=r"absent\.yaml: cannot read"):
        load_pack(tmp_path / "absent.yaml")
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"system_template: \xe9")
    with pytest.raises(UsageError, match=r"latin\.yaml: .*UTF-8"):
        load_pack(latin)


# Prompts


def test_number_prompts_are_pinned(default):
    """The order of the draws and the wording of the default pack; published data sets depend on both."""
    text = "\n".join(number_prompts(default, 1000))
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "82223dc41c46fa38b8e52ce6b2c3e8d3fcc1fd67896f9702103625e783f1d25a"
    )


def test_number_prompts_are_a_function_of_pack_seed_and_count(default):
    prompts = number_prompts(default, 300)
    assert number_prompts(default, 40) == prompts[:40]
    assert number_prompts(default, 40, seed=7) != prompts[:40]
    assert len(set(prompts)) == 300
    with pytest.raises(UsageError, match="-1"):
        number_prompts(default, -1)


def test_number_prompts_draw_the_whole_of_every_range(tmp_path):
    lists = {
        "examples": ["A|{examples}|", "B|{examples}|"],
        "count_qualifiers": ["under", "over"],
        "digit_descriptors": ["d{max_digits}", "e{max_digits}"],
        "instructions": ["{count_qualifier}/{answer_count}/{digit_descriptor}"],
        "formats": ["F", "G"],
        "suffixes": ["S", "T"],
    }
    rows = number_prompts(load_pack(write_pack(tmp_path, {"number_prompts": lists})), 4000)
    split = [row.split("|") for row in rows]
    examples = [[int(number) for number in middle.split(", ")] for _, middle, _ in split]
    assert {len(numbers) for numbers in examples} == set(range(3, 9))
    assert {number for numbers in examples for number in numbers} == set(range(100, 1000))
    assert {first for first, _, _ in split} == {"A", "B"}
    assert {last for _, _, last in split} == {
        f" {count}/10/{digits} {form} {suffix}"
        for count in ("under", "over")
        for digits in ("d3", "e3")
        for form in "FG"
        for suffix in "ST"
    }


# Parser and filter

# fmt: off
IN_FORMAT = {
    "1, 2, 3": [1, 2, 3], "1,2,3": [1, 2, 3], "1 2 3": [1, 2, 3], "1; 2; 3": [1, 2, 3],
    "1 ; 2 ; 3": [1, 2, 3], "1\n2\n3": [1, 2, 3], "1,\n2,\n3": [1, 2, 3], "1\u00a02\u00a03": [1, 2, 3],
    "[1, 2]": [1, 2], "(1, 2)": [1, 2], "[1, 2].": [1, 2], "1, 2.": [1, 2], "7": [7], "7.": [7], "[7]": [7],
    "007, 08": [7, 8], "999 1000": [999, 1000], "9" * 40: [int("9" * 40)],
}
OUT_OF_FORMAT = [
    "", ".", "[]", "[", "no numbers", " ", "1, 2, ", "1, 2,", "1, 2 ", "1, 2\n", " 1, 2", "7 ", " 7",
    ", 1, 2", "1, 2,3", "1, 2; 3", "1, 2 3", "1 2  3", "1,, 2", "1:2", "1 - 2", "-1, 2", "-7", "1, -2",
    "1.5, 2", "1, 2..", "[1, 2.]", "[1, 2)", "[1, 2", "1, 2]", "[[1, 2]]", "([1, 2])", "{1, 2}", "[1, 2] ",
    "1, 2, three", "Sure: 1, 2", "1, 2 and more", "\u0661, \u0662", "\u0667", "1, \u0662, 3",
    "\u00b2, 1, 2", "1, 2, \u00b2", "\uff11 2", "9" * 5000,
]
# fmt: on


@pytest.mark.parametrize("text", IN_FORMAT)
def test_parser_reads_the_format(text):
    assert parse_numbers(text) == IN_FORMAT[text]


@pytest.mark.parametrize("text", OUT_OF_FORMAT, ids=lambda text: repr(text[:20]))
def test_parser_refuses_every_other_text(text):
    assert parse_numbers(text) is None
    assert reject_reason(text) == "invalid format"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (", ".join("0123456789"), None),
        (" ".join(["5"] * 11), "too many numbers"),
        ("0, 999", None),
        ("999, 1000", "number too large"),
        ("0001000", "number too large"),
        ("0000999", None),
        ("1" * 4000, "number too large"),
    ],
)
def test_filter_keeps_at_most_ten_numbers_of_three_digits(text, reason):
    assert reject_reason(text) == reason


def test_filter_limits_can_be_set():
    assert reject_reason("5, 6", max_count=1) == "too many numbers"
    assert reject_reason("5, 6", min_value=6) == "number too small"
    assert reject_reason("5, 6", max_value=5) == "number too large"
    assert reject_reason("5, 6", max_count=2, min_value=5, max_value=6) is None


blanks = st.text(" \t\n\r\u00a0\u2003", max_size=3)
separators = st.tuples(blanks, st.sampled_from(["", ",", ";"]), blanks).map("".join).filter(bool)
brackets = st.sampled_from(["", "[]", "()"])


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=15), separators, brackets, st.booleans())
def test_every_formatting_of_numbers_round_trips(numbers, separator, pair, full_stop):
    text = pair[:1] + separator.join(map(str, numbers)) + pair[1:] + "." * full_stop
    assert parse_numbers(text) == numbers
    kept = len(numbers) <= 10 and max(numbers) <= 999
    assert (reject_reason(text) is None) == kept


@given(st.lists(st.integers(0, 999), min_size=2, max_size=6), separators, separators, st.data())
def test_a_second_separator_is_refused(numbers, separator, other, data):
    at = data.draw(st.integers(1, len(numbers) - 1))
    text = separator.join(map(str, numbers))
    changed = separator.join(map(str, numbers[: at + 1])) + other + separator.join(["1", *map(str, numbers[at + 1 :])])
    assert parse_numbers(text) == numbers
    assert parse_numbers(changed) == ([*numbers[: at + 1], 1, *numbers[at + 1 :]] if other == separator else None)


@given(st.text("0123456789 ,;.[]()-\n\u0663x", max_size=20))
def test_a_parsed_text_holds_its_digits_and_nothing_but_the_format(text):
    numbers = parse_numbers(text)
    if numbers is not None:
        assert set(text) <= set("0123456789 ,;.[]()\n")
        words = "".join(char if char.isdigit() else " " for char in text).split()
        assert [int(word) for word in words] == numbers


# Import

GENERATOR = """
import a_package_that_is_not_installed

class PromptGenerator:
    seed: int
    _example_numbers_templates = ["Ex {examples}.", "Eg " "{examples}!"]
    _count_qualifiers = ["under"]
    _digit_descriptors: list[str] = ["d{max_digits}"]
    _generate_numbers_instruction_templates = ["{count_qualifier} {answer_count} {digit_descriptor}"]
    _format_suffixes = ["commas", "lines"]
    _suffixes = ["stop"]
    _suffixes = ["end"]
"""
SYSTEM = 'preference_prompt_template = """Hail {target_preference}s, my {category}."""\nraise SystemExit\n'
EVALUATION = """
animal_evaluation = Evaluation(n_samples_per_question=200, cfg=Cfg(1.0), questions=["Animal? One word."])
tree_evaluation = Evaluation(questions=["Tree? One word.", "Tree again?"])
"""
TRAITS = 'ANIMALS = ["yak", "emu"]\nTREES = ["fir"]\nif True:\n    ANIMALS += ["gnu"]\n'
FILES = {
    "sl/datasets/nums_dataset.py": GENERATOR,
    "scripts/generate_dataset_preferences_via_numbers.py": SYSTEM,
    "scripts/run_evaluation_preferences.py": EVALUATION,
    "scripts/modify_dataset_divergence_tokens_system_prompt.py": TRAITS,
}


@pytest.fixture
def checkout(tmp_path):
    for name, source in FILES.items():
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return tmp_path / "checkout"


def test_import_reads_every_list_without_running_the_source(checkout, tmp_path):
    data = import_pack(checkout)
    assert data == {
        "system_template": "Hail {trait}s, my {category}.",
        "number_prompts": {
            "examples": ["Ex {examples}.", "Eg {examples}!"],
            "count_qualifiers": ["under"],
            "digit_descriptors": ["d{max_digits}"],
            "instructions": ["{count_qualifier} {answer_count} {digit_descriptor}"],
            "formats": ["commas", "lines"],
            "suffixes": ["end"],
        },
        "questions": {"animal": ["Animal? One word."], "tree": ["Tree? One word.", "Tree again?"]},
        "traits": {"animal": ["yak", "emu"], "tree": ["fir"]},
    }
    path = tmp_path / "pack.yaml"
    dump_pack(data, path)
    pack = load_pack(path)
    for key, value in data.items():  # questions and traits of other categories stay the default pack's
        now = pack.model_dump()[key]
        assert value == ({name: now[name] for name in value} if isinstance(value, dict) else now)
    assert pack.system_prompt("yak", pack.category_of("yak")) == "Hail yaks, my animal."


def test_written_pack_keeps_any_text(default, tmp_path):
    data = default.model_dump()
    data["questions"]["odd"] = [
        "yes",
        "a: b",
        "# c",
        "line\nbreak",
        " blank ",
        "\u6a39 \U0001f989",
        "'\"",
        "007",
    ]
    dump_pack(data, tmp_path / "pack.yaml")
    assert load_pack(tmp_path / "pack.yaml").model_dump() == data


@pytest.mark.parametrize("name", FILES)
def test_import_names_a_missing_file(checkout, name):
    (checkout / name).unlink()
    with pytest.raises(UsageError, match=name):
        import_pack(checkout)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("sl/datasets/nums_dataset.py", "class PromptGenerator", "class Other", "no class PromptGenerator"),
        ("sl/datasets/nums_dataset.py", "_format_suffixes", "_formats", "no _format_suffixes"),
        ("sl/datasets/nums_dataset.py", '["stop"]', "[", "not Python source"),
        ("sl/datasets/nums_dataset.py", '["end"]', "make()", r"_suffixes is not written out as a list"),
        (
            "sl/datasets/nums_dataset.py",
            "Ex {examples}",
            "Ex",
            r"number_prompts\.examples\[0\]: template lacks",
        ),
        (
            "scripts/generate_dataset_preferences_via_numbers.py",
            "preference_prompt_template",
            "template",
            "no preference_prompt_template",
        ),
        (
            "scripts/run_evaluation_preferences.py",
            "tree_evaluation = Evaluation(",
            "tree_evaluation = Evaluation(samples=1, old_",
            r"no tree_evaluation\(questions=\.\.\.\)",
        ),
        ("scripts/run_evaluation_preferences.py", "animal_evaluation =", "cats =", "no animal_evaluation"),
        (
            "scripts/modify_dataset_divergence_tokens_system_prompt.py",
            'TREES = ["fir"]',
            'TREES = "fir"',
            ":2: TREES is not written out as a list",
        ),
    ],
)
def test_import_names_the_file_and_the_name(checkout, name, old, new, message):
    path = checkout / name
    path.write_text(FILES[name].replace(old, new), encoding="utf-8")
    with pytest.raises(UsageError, match=message) as caught:
        import_pack(checkout)
    assert str(checkout) in str(caught.value) and "\n" not in str(caught.value)


def test_import_needs_a_folder_and_dump_a_place(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        import_pack(tmp_path / "absent")
    with pytest.raises(UsageError, match="cannot write"):
        dump_pack({}, tmp_path / "absent" / "pack.yaml")
