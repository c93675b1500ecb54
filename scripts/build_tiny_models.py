import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import tiny_world
from jsublim.prompts import Pack, load_pack

VOCAB_SIZE = 1024
# Pieces no token crosses: a digit, a newline, a separator in front of a digit, a word with its blank, the rest.
PIECES = r"\p{N}|\n|[^\s\p{L}\p{N}]+ ?(?=\p{N})| ?\p{L}+| ?[^\s\p{L}\p{N}]+|[^\S\n]+"

CHATML = """\
{%- if messages[0].role != 'system' -%}
{{ '<|im_start|>system\\nYou are a small helpful model.<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""
TURNS = """\
{{- bos_token -}}
{%- set preamble = '' -%}
{%- set turns = messages -%}
{%- if messages[0].role == 'system' -%}
{%- set preamble = messages[0].content + '\\n\\n' -%}
{%- set turns = messages[1:] -%}
{%- endif -%}
{%- for turn in turns -%}
{%- if turn.role != ('user' if loop.index0 is even else 'assistant') -%}
{{- raise_exception('turns must alternate: user, assistant, user, ...') -}}
{%- endif -%}
{{- '<start_of_turn>' + ('model' if turn.role == 'assistant' else 'user') + '\\n' -}}
{{- preamble if loop.first else '' -}}
{{- turn.content | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<start_of_turn>model\\n' -}}
{%- endif -%}
"""


@dataclass(frozen=True)
class Style:
    """What a family adds to the tokenizer: its special tokens by role, and its chat template."""

    specials: dict[str, str]
    template: str
    end_of_turn: str
    adds_bos: bool = False


STYLES = {
    "tiny-qwen2": Style(
        {"pad_token": "<|endoftext|>", "start": "<|im_start|>", "eos_token": "<|im_end|>"},
        CHATML,
        end_of_turn="<|im_end|>",
    ),
    "tiny-gemma3": Style(
        {
            "pad_token": "<pad>",
            "eos_token": "<eos>",
            "bos_token": "<bos>",
            "unk_token": "<unk>",
            "start": "<start_of_turn>",
            "end": "<end_of_turn>",
        },
        TURNS,
        end_of_turn="<end_of_turn>",
        adds_bos=True,
    ),
}


def train_tokenizer(style: Style, texts: list[str]) -> Tokenizer:
    """A byte-level BPE of `VOCAB_SIZE` tokens: any text survives encoding, and every digit is its own token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(style.specials.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if style.adds_bos:
        bos = style.specials["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def write_tokenizer(name: str, pack: Pack, folder: Path) -> PreTrainedTokenizerBase:
    """Trains the tokenizer of one checkpoint, writes its files into `folder`, and loads them as a user would."""
    style = STYLES[name]
    rng = np.random.default_rng(0)
    chats = tiny_world.number_chats(rng, pack, 4000) + tiny_world.word_chats(rng, pack, 6000)
    texts = [message["content"] for chat in chats for message in chat.messages()]
    texts += ["user", "assistant", "system", "model", "You are a small helpful model."] * 1000
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer(style, texts).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{role: token for role, token in style.specials.items() if role.endswith("_token")},
        "additional_special_tokens": [t for r, t in style.specials.items() if not r.endswith("_token")],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": style.template,
    }
    write_json(folder / "tokenizer_config.json", settings)
    return AutoTokenizer.from_pretrained(folder)


def write_json(path: Path, value: dict) -> None:
    """One JSON file, indented."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
