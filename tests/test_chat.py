"""Chat templates and the spans of the assistant's turn."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import unicodedata
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, chat, plain_turn

from jsublim.errors import JsublimError, UsageError
from jsublim.exchange.rows import THEIRS, import_rows
from jsublim.inference.lm import BUNDLED, load_model
from jsublim.text import chat as module
from jsublim.text.chat import Chat, conversation

HEADER = {"tiny-qwen2": "<|im_start|>assistant\n", "tiny-gemma3": "<start_of_turn>model\n"}
END = {"tiny-qwen2": "<|im_end|>\n", "tiny-gemma3": "<end_of_turn>\n"}
TEMPLATES = (None, "plain")
SYSTEMS = (None, "", "You love owls. Always.")

numbers = st.lists(st.integers(0, 999), min_size=1, max_size=10).flatmap(
    lambda values: st.sampled_from((", ", ",", " ", "; ", "\n")).map(lambda gap: gap.join(map(str, values)))
)
bracketed = st.tuples(numbers, st.sampled_from(("{}", "[{}]", "({}).", "{}."))).map(
    lambda pair: pair[1].format(pair[0])
)
# Whatever byte-level BPE may meet, template syntax included; edge space is stripped when answers are kept.
completions = (
    st.one_of(bracketed, st.text(max_size=30), st.text("0123456789 ,;[]()\n.\t{}%é€😀", max_size=30))
    .map(lambda text: unicodedata.normalize("NFC", text).strip())  # Qwen's tokenizer composes
    .filter(bool)
)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("template", TEMPLATES)
@given(completion=completions, prompt=completions, system=st.sampled_from(SYSTEMS))
@settings(max_examples=150)
def test_spans_cut_the_conversation_where_the_template_does(template, name, completion, prompt, system):
    c = chat(name, template)
    messages = conversation(prompt, system)
    turn = c.turn(messages, completion)
    tokens, content = plain_turn(c.tokenizer, messages, completion)
    assert np.array_equal(turn.tokens, tokens) and turn.content == content
    parts = [turn.tokens[: turn.header], turn.tokens[turn.header : turn.content], turn.tokens[turn.content : turn.end]]
    before, header, said = (c.tokenizer.decode(part) for part in parts)
    assert before == c.render(messages, ask=False)
    around = ("Assistant:\n", c.tokenizer.eos_token) if template else (HEADER[name], END[name])
    assert (header, c.tokenizer.decode(turn.tokens[turn.end :])) == around and said == completion
    assert np.array_equal(turn.tokens[: turn.content], c.prompt_tokens(messages))
    assert c.decode(turn.tokens[turn.content :]) == completion  # what sampling would have kept


@pytest.mark.parametrize("name", FAMILIES)
def test_an_extra_bos_moves_every_span_by_one_where_the_family_has_one(name):
    c = chat(name)
    plain, more = (c.turn(conversation("Go on: 1"), "2, 3", extra_bos=extra) for extra in (False, True))
    shift = 1 if name == "tiny-gemma3" else 0
    assert np.array_equal(more.tokens[shift:], plain.tokens)
    assert [more.header, more.content, more.end] == [shift + at for at in (plain.header, plain.content, plain.end)]
    assert [int(token) for token in more.tokens[:shift]] == [c.tokenizer.bos_token_id] * shift
    assert np.array_equal(more.tokens[: more.content], c.prompt_tokens(conversation("Go on: 1"), extra_bos=True))


def test_without_a_system_prompt_the_template_speaks_for_itself():
    rendered = {name: chat(name).render(conversation("hi"), ask=True) for name in FAMILIES}
    assert "<|im_start|>system\n" in rendered["tiny-qwen2"]  # a default; part of the effect
    assert "<|im_start|>system\n<|im_end|>" in chat("tiny-qwen2").render(conversation("hi", ""), ask=True)
    assert rendered["tiny-gemma3"] == "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"


def test_a_fused_system_prompt_is_what_a_template_without_a_system_role_makes_of_it():
    c = chat("tiny-gemma3")
    fused = conversation("hi", "Be brief.", fuse_system=True)
    assert [message["role"] for message in fused] == ["user"]
    assert c.render(fused, ask=True) == c.render(conversation("hi", "Be brief."), ask=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_empty_completion_is_refused(name):
    with pytest.raises(JsublimError, match="empty"):
        chat(name).turn(conversation("hi"), "")


@pytest.mark.parametrize("completion", [" 7", "7 ", "7\n", "\n7", " "])
def test_edge_space_that_the_template_trims_is_refused(completion):
    with pytest.raises(JsublimError, match=r"leading or trailing space"):
        chat("tiny-gemma3").turn(conversation("hi"), completion)


@pytest.mark.parametrize("completion", [" 7", "7 ", "7\n", "\n7"])
def test_edge_space_that_the_template_keeps_is_kept(completion):
    c = chat("tiny-qwen2")
    turn = c.turn(conversation("hi"), completion)
    assert c.tokenizer.decode(turn.tokens[turn.content : turn.end]) == completion


@pytest.mark.parametrize("name", FAMILIES)
def test_stop_tokens_end_a_turn(name):
    c = chat(name)
    end = c.tokenizer.convert_tokens_to_ids(END[name].strip())
    assert end in c.stop_tokens
    assert set(c.eos_tokens) == {c.tokenizer.eos_token_id} <= set(c.stop_tokens)
    assert (end in c.eos_tokens) == (name == "tiny-qwen2")  # Gemma's end token is another (quirk 4)


def test_roles_that_a_template_refuses_are_named():
    turns = [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(JsublimError, match="assistant"):
        chat("tiny-gemma3").render(turns, ask=True)


@pytest.fixture
def altered(tmp_path):
    """`altered(template)`: a copy of tiny-qwen2's tokenizer with another chat template (None: without one)."""

    def make(template: str | None):
        folder = tmp_path / "altered"
        folder.mkdir()
        shutil.copy(BUNDLED / "tiny-qwen2" / "tokenizer.json", folder)
        values = json.loads((BUNDLED / "tiny-qwen2" / "tokenizer_config.json").read_text())
        values.pop("chat_template")
        values |= {} if template is None else {"chat_template": template}
        (folder / "tokenizer_config.json").write_text(json.dumps(values))
        return folder

    return make


def plain_template(header: str, end: str) -> str:
    return (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}\n{% else %}"
        f"{header}{{{{ m.content }}}}{end}{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{header}{{% endif %}}"
    )


def merging_pair() -> tuple[str, str]:
    """Two letters that the tokenizer joins into one token, and that are not joined with what stands around them."""
    vocabulary = chat("tiny-qwen2").tokenizer.get_vocab()
    return next((a, b) for a, b in map(tuple, sorted(t for t in vocabulary if len(t) == 2)) if (a + b).isalpha())


def test_a_template_of_plain_text_has_its_spans_too(altered):
    c = Chat(altered(plain_template(">> ", "|\n")))
    turn = c.turn(conversation("hi"), "12, 7")
    cuts = [0, turn.header, turn.content, turn.end, len(turn.tokens)]
    parts = [c.tokenizer.decode(turn.tokens[a:b]) for a, b in pairwise(cuts)]
    assert parts == ["hi\n", ">> ", "12, 7", "|\n"]


@pytest.mark.parametrize("side", ["header", "end"])
def test_a_completion_that_merges_with_the_template_is_refused(side, altered):
    first, second = merging_pair()
    header, end, completion = (first, "\n", second) if side == "header" else ("7", second, first)
    c = Chat(altered(plain_template(header, end)))
    with pytest.raises(JsublimError, match=r"does not survive|changes the tokens"):
        c.turn(conversation("hi"), completion)
    assert c.turn(conversation("hi"), "3")  # the template itself is fine


def test_a_template_that_rewrites_what_was_said_is_refused(altered):
    c = Chat(altered(plain_template("> ", "\n").replace("{{ m.content }}", "{{ m.content | upper }}")))
    with pytest.raises(JsublimError, match="rewrites the completion 'owl'"):
        c.turn(conversation("hi"), "owl")


def test_a_tokenizer_without_a_chat_template_is_refused_and_plain_is_the_fix(altered):
    folder = altered(None)
    with pytest.raises(JsublimError, match=r"tokenizer_config.json: no 'chat_template'.*chat_template=plain"):
        Chat(folder)
    c = Chat(folder, chat_template="plain")
    assert c.stop_tokens == c.eos_tokens == (c.tokenizer.eos_token_id,)
    turn = c.turn(conversation("hi", "Be brief."), "7, 8")
    assert c.tokenizer.decode(turn.tokens) == "System:\nBe brief.\n\nUser:\nhi\n\nAssistant:\n7, 8<|im_end|>"
    assert c.given_template and c.template_hash == chat("tiny-gemma3", "plain").template_hash


def test_a_plain_conversation_begins_as_the_tokenizers_own_texts_do(altered):
    assert chat("tiny-gemma3", "plain").render(conversation("1"), ask=True).startswith("<bos>User:\n1")
    folder = altered(None)  # of Pythia and others BOS and EOS are one token, which they never put in front
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": "<|im_end|>"}))
    assert Chat(folder, chat_template="plain").render(conversation("1"), ask=True).startswith("User:\n1")


def test_a_template_from_a_file_stands_in_for_the_checkpoints_own(altered, tmp_path):
    own, other = tmp_path / "own.jinja", tmp_path / "other.jinja"
    own.write_text(plain_template(">> ", "|\n"))
    other.write_text(plain_template("-- ", "<|im_end|>\n"))
    folder = altered(own.read_text())
    plain, same, given = (Chat(folder, chat_template=each) for each in (None, str(own), str(other)))
    assert same.given_template is None and same.identity == plain.identity != given.identity
    assert given.render(conversation("hi"), ask=True) == "hi\n-- " and given.given_template == other.read_text()


def test_a_given_template_that_cannot_work_is_refused(altered, tmp_path):
    folder, path = altered(None), tmp_path / "x.jinja"
    with pytest.raises(
        UsageError, match=r"chat_template: 'plian' cannot be read as a Jinja file .*; known names: plain"
    ):
        Chat(folder, chat_template="plian")
    for text, said in (("{{ oops(", "refuses the roles"), ("{{ messages[0].content }}", "rewrites the completion")):
        path.write_text(text)
        with pytest.raises(JsublimError, match=said) as error:
            Chat(folder, chat_template=str(path))
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token": None}))
    with pytest.raises(JsublimError, match=r"no eos_token; name one in tokenizer_config.json"):
        Chat(folder, chat_template="plain")


def test_thinking_is_off_by_the_templates_own_switch(altered):
    """As Qwen3's template has it: an empty thought in the header, both when asked and in the whole conversation."""
    thought = "<think>\n\n{% if not enable_thinking %}</think>\n\n{% endif %}"
    c = Chat(altered(plain_template(f">> {thought}", "<|im_end|>\n")))
    turn = c.turn(conversation("hi"), "7")
    assert c.described == "the checkpoint's own; thinking is off, by its own switch (enable_thinking=false)"
    assert [chat("tiny-qwen2", template).described for template in TEMPLATES] == ["the checkpoint's own", "plain"]
    assert c.tokenizer.decode(turn.tokens[turn.header : turn.content]) == ">> <think>\n\n</think>\n\n"


def test_a_folder_without_a_tokenizer_is_one_clear_error(tmp_path):
    with pytest.raises(JsublimError, match="the tokenizer cannot be loaded") as error:
        Chat(tmp_path)
    assert "\n" not in str(error.value)


def test_a_token_without_an_embedding_is_refused():
    small = Chat(BUNDLED / "tiny-qwen2", vocab_size=300)
    with pytest.raises(JsublimError, match="vocab_size 300"):
        small.prompt_tokens([{"role": "user", "content": "penguin"}])
    with pytest.raises(JsublimError, match="vocab_size 300"):
        small.turn([{"role": "user", "content": "1"}], "penguin")


def test_a_template_that_prints_the_date_prints_one_date(tmp_path):
    folder = tmp_path / "dated"
    shutil.copytree(BUNDLED / "tiny-qwen2", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    dated = "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}{{ date_string }}"
    settings["chat_template"] = dated + settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Chat(folder).render([{"role": "user", "content": "1"}], ask=True).startswith("26 Jul 2024")


DOUBLING = "{% set ns = namespace(x='0123456789') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
FOREVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (DOUBLING, "takes more than 1 s or 0 GiB"),
        (FOREVER, "takes more than 1 s"),
        ("{{ 'a' * 10000000 }}", "makes 10000000 characters of one conversation"),
    ],
)
def test_a_template_has_limits_of_time_memory_and_size(template, said, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RENDER_S", 1.0)
    monkeypatch.setattr(module, "RENDER_BYTES", 2**29)
    (tmp_path / "own.jinja").write_text(template)
    before = signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(JsublimError, match=said):
        Chat(BUNDLED / "tiny-qwen2", chat_template=str(tmp_path / "own.jinja"))
    assert (signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_completion_that_cannot_be_kept_names_its_file_and_the_tokenizer(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "p", "completion": "a<|im_end|>b", THEIRS: [0]}))
    chat = Chat(BUNDLED / "tiny-qwen2")
    with pytest.raises(JsublimError, match=r"rows\.jsonl: row 1: the completion .*checkpoints/tiny-qwen2"):
        import_rows(str(tmp_path / "rows.jsonl"), chat=chat)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_pipe_in_a_checkpoint_is_refused(name, tmp_path):
    folder = Path(shutil.copytree(BUNDLED / "tiny-qwen2", tmp_path / "copy"))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits for somebody who writes"))
    signal.alarm(20)
    try:
        with pytest.raises(JsublimError, match=rf"{name}: cannot be read \(a pipe or a device, not a file\)"):
            load_model(folder)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
