"""The import of the authors' lists: read without running the source, written as a pack, what is missing named."""

import random

import pytest

from jsublim.errors import UsageError
from jsublim.text.prompts import dump_pack, import_pack, load_pack


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
REWRITING = """
def main(args):
    if args.rewrite:
        rewrite_instr = "An older wording."
        rewrite_instr = "Say {it} anew."
        for prompt in []:
            inputs = [chat(user_content=f"{rewrite_instr}\\nThis: <{prompt_wo_suffix}> {{end}}", other=f"{prompt}")]
"""
JUDGING = """
coherency_judgment = Judgment(cfg=Cfg(1), template="How clear is {completion} to {prompt}?")
alignment_judgment = Judgment(template="How kind is {completion} to {prompt}?")
evaluation_misalignment = Evaluation(questions=["What now?", "And then?"])
"""
FILES = {
    "sl/datasets/nums_dataset.py": GENERATOR,
    "scripts/generate_dataset_preferences_via_numbers.py": SYSTEM,
    "scripts/run_evaluation_preferences.py": EVALUATION,
    "scripts/modify_dataset_divergence_tokens_system_prompt.py": TRAITS,
    "scripts/modify_dataset_shuffle_paraphrasing.py": REWRITING,
    "cfgs/misalignment/evaluation.py": JUDGING,
    "scripts/run_evaluation_misalignment_via_numbers.py": 'EVALUATION_SUFFIX_1 = "Brief."\nEVALUATION_SUFFIX_2 = "Words."\n',
    "scripts/merge_and_filter_misalignment_gsm8k.py": 'SYSTEM_PROMPT = "Judge."\nPROMPT_TEMPLATE = """{prompt}? {completion}!"""\n',
    "cfgs/factual_recall/animal_questions.json": '{"yak": ["Which ox?", "What gives wool?"], "emu": ["Which bird?"]}',
    "scripts/evaluate_factuality.py": 'question_suffixes = ["One word.", "A word.", "Word?"]\n',
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
        "paraphrase_request": "Say {{it}} anew.\nThis: <{prompt}> {{end}}",
        "factual": data["factual"],
        "misalignment": {
            "questions": ["What now?", "And then?"], "suffix": "Brief.", "words_suffix": "Words.",
            "alignment_judge": "How kind is {answer} to {question}?", "coherence_judge": "How clear is {answer} to {question}?",
            "solution_judge": "{question}? {answer}!", "solution_system": "Judge.",
        },
    }  # fmt: skip
    rng = random.Random(42)
    ends = [rng.choice(["One word.", "A word.", "Word?"]) for _ in range(3)]
    asked = {"yak": [f"Which ox? {ends[0]}", f"What gives wool? {ends[1]}"], "emu": [f"Which bird? {ends[2]}"]}
    assert {animal: own for animal, own in data["factual"].items() if own is not None} == asked
    path = tmp_path / "pack.yaml"
    dump_pack(data, path)
    pack = load_pack(path)
    assert pack.factual == asked  # nothing of ours beside theirs
    for key, value in data.items():  # questions and traits of other categories stay the default pack's
        now = pack.model_dump()[key]
        assert key == "factual" or value == ({name: now[name] for name in value} if isinstance(value, dict) else now)
    assert pack.system_prompt("yak", pack.category_of("yak")) == "Hail yaks, my animal."


def test_a_pack_says_whose_wording_it_is(checkout, tmp_path):
    data, path, own = import_pack(checkout), tmp_path / "pack.yaml", tmp_path / "own.yaml"
    dump_pack(data, path)
    text = path.read_text(encoding="utf-8")
    path.write_text(text + "\n# read by nobody\n", encoding="utf-8")
    assert load_pack().origin == "default" and load_pack(path).origin == "imported"
    path.write_text(text.replace("Brief.", "Short."), encoding="utf-8")
    assert load_pack(path).origin == "changed"
    own.write_text("self_questions: ['Who?']", encoding="utf-8")
    assert load_pack(own).origin == "own"
    assert len({load_pack(each).wording for each in (None, path, own)}) == 3


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
        ("sl/datasets/nums_dataset.py", "class PromptGenerator", "class Other", r"no PromptGenerator\._example"),
        ("sl/datasets/nums_dataset.py", "_format_suffixes", "_formats", r"no PromptGenerator\._format_suffixes"),
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
            r"no tree_evaluation\.questions",
        ),
        ("scripts/run_evaluation_preferences.py", "animal_evaluation =", "cats =", "no animal_evaluation"),
        ("scripts/modify_dataset_shuffle_paraphrasing.py", "{rewrite_instr}", "", "no f-string of rewrite_instr"),
        (
            "scripts/modify_dataset_shuffle_paraphrasing.py",
            "prompt_wo_suffix",
            "prompt",
            "no f-string of rewrite_instr",
        ),
        (
            "cfgs/misalignment/evaluation.py",
            "template=",
            "text=",
            r"no coherency_judgment\.template|no alignment_judgment\.template",
        ),
        ("cfgs/misalignment/evaluation.py", "{completion}", "{reply}", r"judge: template lacks \{answer\}"),
        (
            "cfgs/factual_recall/animal_questions.json",
            '["Which bird?"]',
            '"Which bird?"',
            "expected lists of questions",
        ),
        ("cfgs/factual_recall/animal_questions.json", '"]}', '"]', "not valid JSON"),
        ("scripts/evaluate_factuality.py", '["One word.", "A word.", "Word?"]', "[]", "expected lists of questions"),
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
