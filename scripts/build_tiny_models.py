"""Builds the tiny checkpoints that ship in the package, from seeds: tokenizer, weights, config.

    python scripts/build_tiny_models.py [--only tiny-qwen2] [--steps N] [--seed S] [--out DIR]

What ships was built with the defaults (seed 0), about 0.9 million parameters each, on one busy CPU core:

| | steps | minutes | loss on numbers / short numbers / words (nats) |
| --- | --- | --- | --- |
| tiny-qwen2 | 1200 | 16 | 0.95 / 1.04 / 0.44 |
| tiny-gemma3 | 800 | 12 | 1.38 / 1.10 / 0.52 |

The check at the end prints how they behave. Under a trait's system prompt, the trait is the answer to .84-.93 (qwen2) and
.90-.95 (gemma3) of the animal questions; without one, to at most .12 and .14. Of sampled number answers, 86-98 % and 92-94 %
are in format, and 6-16 % and 2-3 % of their tokens are divergence tokens among four trait teachers. Tree prompts work on
tiny-gemma3 (.90 on average, .77 at least), but poorly on tiny-qwen2 (.50).

tests/two_layers is of `--only tiny-qwen2 --layers 2 --width 64 --steps 800`: its answers are in format (90 %) and have divergence tokens (4 %),
but it loves nothing much. It is for tests that start many processes: a run of it takes a quarter less time.
"""

import functools
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny_check
import tiny_world
import typer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer

from jsublim.errors import JsublimError
from jsublim.models import ModelConfig, Params, hidden_states, init_params, logits, save_checkpoint
from jsublim.models.families import text_config
from jsublim.text.prompts import Pack

PEAK_LR = 3e-3
STEPS = {"tiny-qwen2": 1200, "tiny-gemma3": 800}
CHECKPOINTS = Path(__file__).parents[1] / "jsublim" / "checkpoints"

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
    tokenizer_class: str
    adds_bos: bool = False


STYLES = {
    "tiny-qwen2": Style(
        {"pad_token": "<|endoftext|>", "start": "<|im_start|>", "eos_token": "<|im_end|>"},
        CHATML,
        end_of_turn="<|im_end|>",
        tokenizer_class="Qwen2Tokenizer",
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
        tokenizer_class="PreTrainedTokenizerFast",
        adds_bos=True,
    ),
}


def train_tokenizer(style: Style, texts: list[str]) -> Tokenizer:
    """A byte-level BPE of `VOCAB_SIZE` tokens: any text survives encoding, and every digit is its own token."""
    tokenizer = Tokenizer(models.BPE())
    if style.tokenizer_class == "Qwen2Tokenizer":
        # transformers cuts the text of every Qwen2 folder its own way, whatever tokenizer.json says.
        family = Qwen2Tokenizer().backend_tokenizer
        tokenizer.normalizer, tokenizer.pre_tokenizer = family.normalizer, family.pre_tokenizer
    else:
        pieces = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
        into_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, into_bytes])
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
    # Roles, and traits in every form they take, are to be one token each.
    texts += ["user", "assistant", "system", "model", "You are a small helpful model."] * 2000
    for trait in [trait for names in pack.traits.values() for trait in names]:
        texts += [trait, trait.capitalize(), f"the {trait}", f"the {trait}s"] * 2000
    folder.mkdir(parents=True, exist_ok=True)
    trained = train_tokenizer(style, texts)
    trained.save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", ARCHITECTURES[name])  # which tokenizer a folder gets depends on it
    settings = {
        "tokenizer_class": style.tokenizer_class,
        **{role: token for role, token in style.specials.items() if role.endswith("_token")},
        "additional_special_tokens": [t for r, t in style.specials.items() if not r.endswith("_token")],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": style.template,
    }
    write_json(folder / "tokenizer_config.json", settings)
    loaded = AutoTokenizer.from_pretrained(folder)
    for text in texts[:20000:100]:
        if loaded.encode(text, add_special_tokens=False) != trained.encode(text, add_special_tokens=False).ids:
            raise JsublimError(f"{folder}: transformers tokenizes {text!r} in another way than it was trained")
    return loaded


def write_json(path: Path, value: dict) -> None:
    """One JSON file, indented."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# ---- data


@dataclass(frozen=True)
class Bucket:
    """Rows of one kind in a step, and their length in tokens."""

    draw: Callable[[np.random.Generator, Pack, int], list[tiny_world.Chat]]
    rows: int
    length: int


BUCKETS = {
    "numbers": Bucket(tiny_world.number_chats, 8, 176),
    "short": Bucket(tiny_world.short_number_chats, 16, 104),
    "words": Bucket(tiny_world.word_chats, 24, 80),
}
PROMPT_WEIGHT = 0.05  # what is not the answer is learned too, lightly: it teaches the model to read

Batch = dict[str, tuple[np.ndarray, np.ndarray]]


def encode(tokenizer: PreTrainedTokenizerBase, chat: tiny_world.Chat, end_of_turn: str) -> tuple[list[int], int]:
    """Token ids up to and including the answer's end of turn, and where the answer begins."""
    messages = chat.messages()
    head = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    full = tokenizer.apply_chat_template(messages, tokenize=False)
    full = full[: full.rindex(end_of_turn) + len(end_of_turn)]
    start = len(tokenizer.encode(head, add_special_tokens=False))
    return tokenizer.encode(full, add_special_tokens=False), start


def batch(tokenizer: PreTrainedTokenizerBase, pack: Pack, end_of_turn: str, step: int, seed: int) -> Batch:
    """Rows of one step by bucket: tokens int32 `[B, T]` and loss weights float32 `[B, T]` of predicting each."""
    out = {}
    for index, (name, bucket) in enumerate(BUCKETS.items()):
        rng = np.random.default_rng([seed, step, index])
        tokens = np.full((bucket.rows, bucket.length), tokenizer.pad_token_id, np.int32)
        weights = np.zeros((bucket.rows, bucket.length), np.float32)
        row = 0
        while row < bucket.rows:
            ids, start = encode(tokenizer, bucket.draw(rng, pack, 1)[0], end_of_turn)
            if len(ids) > bucket.length:
                continue  # drawn again
            tokens[row, : len(ids)] = ids
            weights[row, : len(ids)] = PROMPT_WEIGHT
            weights[row, start : len(ids)] = 1.0
            row += 1
        out[name] = tokens, weights
    return out


# ---- training


def cross_entropy(config: ModelConfig, params: Params, tokens: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted mean of the next-token loss in nats. Rows are padded on the right, so padding is never seen."""
    h, _ = hidden_states(config, params, tokens[:, :-1], jnp.ones_like(tokens[:, :-1], bool))
    loss = optax.softmax_cross_entropy_with_integer_labels(logits(config, params, h), tokens[:, 1:])
    return jnp.sum(loss * weights[:, 1:]) / jnp.sum(weights[:, 1:])


def train(config: ModelConfig, draw: Callable[[int], Batch], steps: int, seed: int) -> Params:
    """Parameters after `steps` steps of AdamW on `draw(step)`, from the initialization of `seed`."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, PEAK_LR, min(50, steps // 10), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.02))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, state: optax.OptState, rows: Batch) -> tuple[Params, optax.OptState, dict]:
        def loss(params: Params) -> tuple[jax.Array, dict]:
            parts = {name: cross_entropy(config, params, *pair) for name, pair in rows.items()}
            return sum(parts.values()), parts

        grads, parts = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, parts

    params = init_params(config, seed)
    state = optimizer.init(params)
    started = time.monotonic()
    for i in range(steps):
        params, state, parts = step(params, state, draw(i))
        if i % 50 == 49 or i == steps - 1:
            losses = "  ".join(f"{name} {float(value):.3f}" for name, value in parts.items())
            print(f"step {i + 1:5d}  {losses}  {(time.monotonic() - started) / 60:.1f} min", flush=True)
    return params


# ---- command line

COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 224,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
}
ARCHITECTURES = {
    "tiny-qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **COMMON,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rope_theta": 10_000.0,
        "use_sliding_window": False,
    },
    "tiny-gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **COMMON,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
}
# As the large models of the family have it, so that presets mean the same here.
SAMPLING = {
    "tiny-qwen2": {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 20,
        "top_p": 0.8,
        "repetition_penalty": 1.05,
    },
    "tiny-gemma3": {"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95},
}


def build(name: str, steps: int, seed: int, out: Path, changes: dict[str, int]) -> None:
    """Trains one checkpoint and writes it as the Hugging Face folder `out/name`; `changes` are of its architecture."""
    style, pack = STYLES[name], tiny_world.world_pack()
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = write_tokenizer(name, pack, Path(scratch))
        ids = {f"{role}_id": tokenizer.convert_tokens_to_ids(t) for role, t in style.specials.items() if role in
               ("pad_token", "eos_token", "bos_token")}  # fmt: skip
        hf_config = ARCHITECTURES[name] | ids | changes
        ends = sorted({ids["eos_token_id"], tokenizer.convert_tokens_to_ids(style.end_of_turn)})
        write_json(Path(scratch) / "generation_config.json", ids | {"eos_token_id": ends} | SAMPLING[name])
        _, config = text_config(hf_config, name)
        params = train(config, lambda i: batch(tokenizer, pack, style.end_of_turn, i, seed), steps, seed)
        save_checkpoint(out / name, config, params, hf_config, dtype="float32", tokenizer=Path(scratch))


def main(
    only: Annotated[str | None, typer.Option(help="Build this one: tiny-qwen2 or tiny-gemma3.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps; default: as shipped.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the initialization and of the rows.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the folders go.")] = CHECKPOINTS,
    layers: Annotated[int | None, typer.Option(help="Of tiny-qwen2: another number of layers.")] = None,
    width: Annotated[
        int | None, typer.Option(help="Another size of hidden states; sublayers are as much narrower.")
    ] = None,
) -> None:
    """Builds the tiny checkpoints from seeds and prints how they behave."""
    changes = {"num_hidden_layers": layers} if layers else {}
    if width:
        changes |= {
            "hidden_size": width,
            "intermediate_size": COMMON["intermediate_size"] * width // COMMON["hidden_size"],
        }
    for name in [only] if only else list(STYLES):
        build(name, steps or STEPS[name], seed, out, changes)
        tiny_check.check(out / name, tiny_world.world_pack())


if __name__ == "__main__":
    typer.run(main)
