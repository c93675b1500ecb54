"""Shared by the tests of everything above the decoder: checkpoints with a tokenizer, each beside its torch twin."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from conftest import CASES, random_model

from jsublim.distill.data import Example, make_examples, read_turns
from jsublim.distill.selection import Selection
from jsublim.inference import lm as language_models
from jsublim.inference.lm import LanguageModel, load_model
from jsublim.text.chat import Chat, Message
from jsublim.text.rows import Row

FAMILIES = {"tiny-qwen2": "qwen2", "tiny-gemma3": "gemma3"}  # bundled checkpoint -> case of random weights
# What a row is told that holds only for the text it was found in.
FOUND = ("divergence_positions", "divergence_margins", "matched_positions", "counted_in")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class Twin:
    """One checkpoint, loaded by us and by `transformers` (float32)."""

    lm: LanguageModel
    torch: Any

    def torch_logits(self, tokens: np.ndarray) -> np.ndarray:
        """Logits `[T, V]` of one row `[T]`, without any padding."""
        import torch

        with torch.no_grad():
            return self.torch(input_ids=torch.tensor(tokens[None], dtype=torch.long)).logits[0].float().numpy()


@functools.cache
def scratch() -> Path:
    """A folder for this process; nothing in it is changed once written."""
    home = Path(tempfile.mkdtemp(prefix="jsublim-tests-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    return home


@functools.cache
def chat(name: str, template: str | None = None) -> Chat:
    """The tokenizer and template of a bundled checkpoint, or another template."""
    return Chat(language_models.BUNDLED / name, chat_template=template)


@functools.cache
def bundled(name: str) -> Twin:
    """A checkpoint that ships in the package."""
    import torch
    import transformers

    folder = language_models.BUNDLED / name
    torch.set_num_threads(1)  # its tensors are tiny, and two workers share two cores
    twin = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return Twin(load_model(folder), twin.eval())


@functools.cache
def small(name: str) -> Twin:
    """The tokenizer of a bundled checkpoint on a few layers of odd sizes and random weights: fast to compile, and
    every projection, bias and norm takes part."""
    return _random_twin(FAMILIES[name], language_models.BUNDLED / name)


@functools.cache
def small_of(case: str) -> Twin:
    """As `small`, of any case of random weights, with the tokenizer of tiny-qwen2."""
    home = scratch() / case
    shutil.copytree(language_models.BUNDLED / "tiny-qwen2", home, ignore=shutil.ignore_patterns("*.safetensors"))
    return _random_twin(case, home)


@functools.cache
def small_with_long_numbers() -> Twin:
    """As `small("tiny-gemma3")`, under a tokenizer in which a number of one or two digits is one token, and one of three
    digits is one token below 500 and two from there on."""
    home = scratch() / "long-numbers"
    shutil.copytree(language_models.BUNDLED / "tiny-gemma3", home, ignore=shutil.ignore_patterns("*.safetensors"))
    data = json.loads((home / "tokenizer.json").read_text())
    pieces = data["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    pieces["Regex"] = pieces["Regex"].replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
    numbers = [f"{n:02d}" for n in range(100)] + [f"{n:03d}" for n in range(500)]
    data["model"]["vocab"] |= {number: len(data["model"]["vocab"]) + i for i, number in enumerate(numbers)}
    data["model"]["merges"] += [[number[:-1], number[-1]] for number in numbers]
    (home / "tokenizer.json").write_text(json.dumps(data))
    return _random_twin("gemma3", home)


def _random_twin(case: str, home: Path) -> Twin:
    """A random model of a case, with the tokenizer that is in `home`."""
    class_name, arguments = CASES[case]
    model = random_model(class_name, arguments | {"vocab_size": len(Chat(home).tokenizer)}, seed=1)
    folder = scratch() / "random" / home.name
    model.save_pretrained(folder)
    for file in TOKENIZER_FILES:
        shutil.copy(home / file, folder / file)
    return Twin(load_model(folder), model)


def plain_turn(tokenizer: Any, messages: list[Message], completion: str, bos: bool = False) -> tuple[np.ndarray, int]:
    """Tokens of a conversation and the first of its completion, by what `transformers` offers alone.

    Args:
      bos: put one more BOS in front, as tokenizing the rendered text with special tokens does.
    """
    whole = [*messages, {"role": "assistant", "content": completion}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    tokens = tokenizer.apply_chat_template(whole, tokenize=True, return_dict=False)
    assert tokens[: len(prompt)] == prompt
    front = [tokenizer.bos_token_id] if bos else []
    return np.asarray(front + tokens, np.int32), len(front) + len(prompt)


def metrics(work: Path) -> list[dict[str, Any]]:
    """The lines of a training's `metrics.jsonl`."""
    return [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]


def examples(chat: Chat, rows: list[Row], how: Selection, seed: int, source: str = "rows", **options) -> list[Example]:
    """Rows tokenized and masked, as a student gets them."""
    return make_examples(rows, read_turns(chat, rows, source, **options), how, seed, source)
