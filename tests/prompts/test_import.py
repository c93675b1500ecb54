"""The import of the authors' lists: read without running the source, written as a pack, what is missing named."""

import pytest

from jsublim.errors import UsageError
from jsublim.prompts import dump_pack, import_pack, load_pack


@pytest.fixture(scope="module")
def default():
    return load_pack(None)


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
