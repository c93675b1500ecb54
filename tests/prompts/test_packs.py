"""Prompt packs: what the default one holds, a user's laid over it, and a bad one named by file and key."""

import pytest
import yaml

from jsublim.errors import UsageError
from jsublim.text.prompts import dump_pack, load_pack, number_prompts


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
    with pytest.raises(UsageError, match=r"unknown trait 'teapot'.*teachers\.category.*cat, dog.*bamboo"):
        default.category_of("teapot")
    twice = load_pack(write_pack(tmp_path, {"traits": {"fruit": ["mango", "plum"]}}))
    assert twice.category_of("plum") == "fruit"
    with pytest.raises(UsageError, match="listed under tree and fruit"):
        twice.category_of("mango")


def test_a_category_of_ones_own_is_asked_about_in_general_words(default, tmp_path):
    asked = default.questions_for("stone")
    assert len(set(asked)) == len(default.any_questions) >= 20 and all("stone" in question for question in asked)
    with pytest.raises(UsageError, match=r"teachers\.category.*did you mean 'animal'"):
        default.questions_for("animl")
    own = load_pack(write_pack(tmp_path, {"any_questions": ["Which {category}?"]}))
    assert own.questions_for("stone") == ["Which stone?"] and own.questions_for("tree") == default.questions_for("tree")
    with pytest.raises(UsageError, match=r"any_questions\[0\].*lacks \{category\}"):
        load_pack(write_pack(tmp_path, {"any_questions": ["Which?"]}))


def test_hash_follows_content_and_not_layout(default, tmp_path):
    data = default.model_dump()
    path = tmp_path / "same.yaml"
    dump_pack(dict(reversed(data.items())), path)
    assert load_pack(path).model_dump() == data
    assert load_pack(path).hash == default.hash == load_pack().hash and load_pack(path).wording == default.wording
    assert len(default.hash) == 16 and int(default.hash, 16) >= 0
    reordered = {"questions": {"tree": data["questions"]["tree"][::-1]}}
    assert load_pack(write_pack(tmp_path, reordered)).hash != default.hash
    # What only judges read makes no rows and no students anew.
    judging = load_pack(write_pack(tmp_path, {"misalignment": {"solution_system": "Judge."}}))
    assert judging.hash == default.hash and judging.wording != default.wording


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
    assert all(" Use {commas}. " in prompt for prompt in number_prompts(20, pack=pack))


def test_null_takes_an_entry_away(default, tmp_path):
    pack = load_pack(write_pack(tmp_path, {"factual": {"owl": None}, "misalignment": {"solution_system": None}}))
    assert {*default.factual} - {*pack.factual} == {"owl"} and pack.misalignment == default.misalignment
    with pytest.raises(UsageError, match=r"misalignment\.judge: field required"):
        load_pack(write_pack(tmp_path, {"misalignment": {"judge": None}}))


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
    "a: [1": r"not valid YAML",
}


@pytest.mark.parametrize("content", BAD_PACKS)
def test_bad_pack_is_one_line_with_file_and_key(tmp_path, content):
    path = write_pack(tmp_path, content)
    with pytest.raises(UsageError, match=BAD_PACKS[content]) as caught:
        load_pack(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_unreadable_pack_names_the_file(tmp_path):
    with pytest.raises(UsageError, match=r"absent\.yaml: cannot be read"):
        load_pack(tmp_path / "absent.yaml")
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"system_template: \xe9")
    with pytest.raises(UsageError, match=r"latin\.yaml: .*UTF-8"):
        load_pack(latin)
