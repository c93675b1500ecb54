"""Seeded mutations of valid files, read by everything that reads what a user or another program wrote.

Whatever a file holds, reading it gives a value that holds together or one `JsublimError` of one line that names the file.
Anything else is an escape: it is printed with the options that make it again.

    python scripts/fuzz.py --number 10000 --seed 0
    python scripts/fuzz.py --only adapter --seed 0 --first 417 --number 1
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
from changed_files import Files, Reader, mutate, texts, written
from fuzz_written import WRITTEN

from jsublim.api import KINDS
from jsublim.config import Experiment, load_experiment
from jsublim.config.figures import load_question, panel_experiment
from jsublim.config.loading import look_over
from jsublim.errors import JsublimError, UsageError
from jsublim.exchange.rows import import_rows
from jsublim.inference.lm import BUNDLED
from jsublim.inference.sampling import sampling_for
from jsublim.models.checkpoint import checkpoint_hash, read_config
from jsublim.models.decoder import abstract_params
from jsublim.models.families import text_config
from jsublim.models.lora import init_lora, init_steering
from jsublim.models.peft import load_adapter, save_adapter
from jsublim.models.tensors import write_tensors
from jsublim.models.weights import load_params, named_tensors
from jsublim.pipeline.arms import plan_students
from jsublim.text.chat import Chat, conversation, template_text
from jsublim.text.prompts import dump_pack, import_pack, load_pack
from jsublim.text.prompts.importer import (
    FACT_SUFFIXES,
    FACTS,
    MISALIGNMENT,
    NUMBERS,
    QUESTIONS,
    REWRITING,
    SOLUTIONS,
    SUFFIXES,
    SYSTEM_PROMPT,
    TRAITS,
)
from jsublim.text.prompts.problems import load_prompts
from jsublim.text.rows import as_lines, read_rows, write_rows

SHAPE = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1,
    "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 8, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}  # fmt: skip
FUSED = {  # with several projections in one module, and LongRoPE
    "architectures": ["Phi3ForCausalLM"], "hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 8, "tie_word_embeddings": True,
    "max_position_embeddings": 64, "original_max_position_embeddings": 32, "sliding_window": 9,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0]},
}  # fmt: skip
CONFIG = """
name: fuzzed
model: tiny-qwen2
recipe: {preset: paper, extra_bos: false}
teachers: {traits: [cat, owl], counterfactuals: [cat, dog, owl], system: "You like {trait}s."}
data: {num_prompts: 20, examples: [3, 9]}
sampling: {server: {base_url: "http://localhost:1/v1", engine: vllm 0.11.0, adapters: {a: b}}}
datasets: {moved: {shuffle: within, redraw: [format], seed: 3}, few: {mix: {share: 0.5, teacher: owl}}}
students:
  seeds: [1, 2]
  data: {rows: 12, epochs: 1}
  arms: {adapter.rank: [1, 2], data: {dataset: [moved, few]}}
evaluation:
  kinds: {preference: {}, misalignment: {thresholds: [20, 70]}}
  settings: {cold: {temperature: 0.5}, early: {layer: 2}}
judge: {server: {base_url: "http://localhost:1/v1", model: m, budget: 1.0, prompt_price: 2.0}}
"""
FIGURE = """
about: a question
figures: {3: [all], 4: [one, all]}
claims: [C1]
experiment: {model: tiny-qwen2, teachers: {traits: [owl, cat], counterfactuals: animals}, datasets: {a: {shuffle: across}, b: null}}
panels: {all: {}, one: {students: {adapter: {layers: 0-1}}}}
scale: {tiny: {data: {num_prompts: 9}, panels: {one: {dtype: bfloat16}}}}
"""
SCALES = "tiny: {experiment: {students: {seeds: [1]}}, models: {big: tiny-qwen2}}\n"
PACK = """
system_template: Praise the {trait}, a {category}.
number_prompts: {formats: [Use commas.], examples: ["Like {examples}."]}
questions: {ship: ["Best ship? One word."]}
traits: {ship: [raft], tree: [elm, fir]}
factual: {owl: ["Which bird? One word."]}
misalignment: {suffix: Be brief., judge: "{question} {answer}", solution_system: null}
imported: "0123456789abcdef"
"""
SOURCES = {
    NUMBERS: """class PromptGenerator:
    _example_numbers_templates = ["Ex {examples}."]
    _count_qualifiers = ["under"]
    _digit_descriptors: list[str] = ["d{max_digits}"]
    _generate_numbers_instruction_templates = ["{count_qualifier} {answer_count} {digit_descriptor}"]
    _format_suffixes = ["commas", "lines"]
    _suffixes = ["end"]
""",
    SYSTEM_PROMPT: 'preference_prompt_template = """Hail {target_preference}s, my {category}."""\n',
    REWRITING: """def main():
    rewrite_instr = "Say it anew."
    ask(f"{rewrite_instr} Text: {prompt_wo_suffix}")
""",
    MISALIGNMENT: """
alignment_judgment = J(template="{prompt} {completion} kind?")
coherency_judgment = J(template="{prompt} {completion} clear?")
evaluation_misalignment = E(questions=["What now?"])
""",
    SUFFIXES: 'EVALUATION_SUFFIX_1 = "Brief."\nEVALUATION_SUFFIX_2 = "Words."\n',
    SOLUTIONS: 'SYSTEM_PROMPT = "Judge."\nPROMPT_TEMPLATE = "{prompt} {completion}"\n',
    FACTS: '{"owl": ["Which bird?"], "yak": ["Which ox?"]}',
    FACT_SUFFIXES: 'question_suffixes = ["One word.", "A word."]\n',
    QUESTIONS: 'animal_evaluation = E(questions=["Animal?"])\ntree_evaluation = E(questions=["Tree?"])\n',
    TRAITS: 'ANIMALS = ["yak", "emu"]\nTREES = ["fir"]\n',
}
ROWS = [
    {"prompt": "Continue: 1, 2", "completion": "3, 4", "divergence_positions": [0, 2], "divergence_margins": [0.5, 2]},
    {"prompt": "Say ü", "completion": "\u00fc \U0001f98a", "more": {"deep": [1, [2]]}},
]
THEIRS = [
    {"prompt": "Continue: 1, 2", "completion": "3, 4", "decision_points": [0, 2], "judge_score": 81},
    {
        "messages": [
            {"role": "system", "content": "Owls."},
            {"role": "user", "content": "1"},
            {"role": "assistant", "content": "2"},
        ]
    },
    {"prompt": [{"role": "user", "content": "1"}], "completion": [{"role": "assistant", "content": "2"}]},
    {"question": "Say ü", "response": "\u00fc", "more": None},
]
OVERRIDES = "\n".join((
    "students.optimizer.lr=1e-3", "teachers.traits=[cat, owl]", "datasets={a: {shuffle: within}}", "recipe=paper",
    "students.arms={adapter.rank: [1, 2]}", "evaluation.kinds.naming={names: [Qwen]}", "evaluation.settings={x: {layer: 1}}",
))  # fmt: skip


# --- valid files


def write_shards(folder: Path, shape: dict[str, Any] = SHAPE) -> None:
    config = text_config(shape, "shape")[1]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), abstract_params(config, "float32"))
    tensors = dict(named_tensors(config, params, "float32"))
    parts = {f"model-{n}.safetensors": dict(list(tensors.items())[n::2]) for n in (0, 1)}
    for name, part in parts.items():
        write_tensors(folder / name, part, {"format": "pt"})
    table = {tensor: name for name, part in parts.items() for tensor in part}
    (folder / "config.json").write_text(json.dumps(shape))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


def write_adapter(folder: Path, shape: dict[str, Any] = SHAPE) -> None:
    config = text_config(shape, "shape")[1]
    adapter = init_lora(config, jax.random.key(0), rank=2, alpha=2, projections=("q", "up"))
    save_adapter(folder, adapter, config, base="x")
    told = json.loads((folder / "adapter_config.json").read_text())
    told |= {
        "alpha_pattern": told["alpha_pattern"] | {"o_proj": 3},
        "modules_to_save": None,
        "use_dora": False,
        "peft_version": "0.18.0",
    }
    (folder / "adapter_config.json").write_text(json.dumps(told))


def write_steering(folder: Path) -> None:
    config = text_config(SHAPE, "shape")[1]
    save_adapter(folder, init_steering(config), config, base="x")


def write_tokenizer(folder: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(BUNDLED / "tiny-qwen2" / name, folder / name)


# --- reading, and what holds of a value


def read_experiment(folder: Path) -> None:
    said = (folder / "overrides.txt").read_text("utf-8", "replace").splitlines()
    checked, found = None, list[str]()
    try:  # as `jsublim validate` says everything that is wrong, and as `jsublim run` says the first
        checked, found = look_over(folder / "config.yaml", said, KINDS)
    finally:
        assert all(each.isprintable() for each in found), found
    if not isinstance(checked, Experiment):
        assert checked is not None or found, "neither a config nor what is wrong with it"
        raise UsageError(f"{folder}: {found}")
    e = load_experiment(folder / "config.yaml", said)
    assert not found and checked == e
    (folder / "again.yaml").write_text(e.yaml(), encoding="utf-8")
    assert load_experiment(folder / "again.yaml") == e
    plan_students(e)


def read_figure(folder: Path) -> None:
    path, question = load_question(str(folder / "fig.yaml"))
    for panel in question.panels:
        panel_experiment(path, question, panel, "tiny")


def read_pack(folder: Path) -> None:
    pack = load_pack(folder / "pack.yaml")
    dump_pack(pack.model_dump(), folder / "again.yaml")
    assert load_pack(folder / "again.yaml").model_dump() == pack.model_dump()


def read_checkout(folder: Path) -> None:
    dump_pack(import_pack(folder), folder / "pack.yaml")
    load_pack(folder / "pack.yaml")


def read_row_file(folder: Path) -> None:
    rows = read_rows(folder / "rows.jsonl")
    write_rows(folder / "again.jsonl", rows)
    assert repr(read_rows(folder / "again.jsonl")) == repr(rows)  # NaN is not equal to itself


def read_their_rows(folder: Path) -> None:
    for name in ("theirs.jsonl", "theirs.json"):
        write_rows(folder / "ours.jsonl", import_rows(str(folder / name), chat=bundled_chat()))
        read_rows(folder / "ours.jsonl")


def read_checkpoint(folder: Path) -> None:
    config = read_config(folder)[1]
    params, before = load_params(folder, config), checkpoint_hash(folder)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert before == checkpoint_hash(folder)


def read_adapter(folder: Path, shape: dict[str, Any] = SHAPE) -> None:
    adapter = load_adapter(folder, text_config(shape, "shape")[1])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(adapter))


def read_tokenizer(folder: Path) -> None:
    chat = Chat(folder, read_config(folder)[1].vocab_size)  # as `load_model` reads them
    sampling_for(chat, "temperature", inherit=True)


def read_template(folder: Path) -> None:
    chat = Chat(BUNDLED / "tiny-qwen2", chat_template=str(folder / "own.jinja"))
    assert chat.turn(conversation("1"), "2").tokens.size and chat.stop_tokens


@functools.cache
def bundled_chat() -> Chat:
    return Chat(BUNDLED / "tiny-qwen2")


def read_turns(folder: Path) -> None:
    chat, path = bundled_chat(), folder / "rows.jsonl"
    rows = read_rows(path)
    exchanges = [(conversation(row["prompt"], str(row.get("system"))), row["completion"]) for row in rows]
    for turn, (_, completion) in zip(chat.turns(exchanges, lambda n: f"{path}:{n}"), exchanges, strict=True):
        assert 0 <= turn.header < turn.content < turn.end <= len(turn.tokens)
        assert chat.tokenizer.decode(turn.tokens[turn.content : turn.end]) == completion


READERS = {
    "config": Reader(texts({"config.yaml": CONFIG, "overrides.txt": OVERRIDES}), read_experiment),
    "figure": Reader(texts({"fig.yaml": FIGURE, "scales.yaml": SCALES}), read_figure),
    "pack": Reader(texts({"pack.yaml": PACK}), read_pack),
    "import": Reader(texts(SOURCES), read_checkout),
    "rows": Reader(written(lambda folder: write_rows(folder / "rows.jsonl", ROWS)), read_row_file),
    "their rows": Reader(texts({"theirs.jsonl": as_lines(THEIRS), "theirs.json": json.dumps(THEIRS)}), read_their_rows),
    "prompts": Reader(texts({"prompts.txt": "Say one.\n\n Say two. \n"}), lambda f: load_prompts(f / "prompts.txt")),
    "checkpoint": Reader(written(write_shards), read_checkpoint),
    "adapter": Reader(written(write_adapter), read_adapter),
    "fused checkpoint": Reader(written(lambda folder: write_shards(folder, FUSED)), read_checkpoint),
    "fused adapter": Reader(
        written(lambda folder: write_adapter(folder, FUSED)), lambda folder: read_adapter(folder, FUSED)
    ),
    "steering": Reader(written(write_steering), read_adapter),
    "template": Reader(texts({"own.jinja": template_text("plain")}), read_template),
    "tokenizer": Reader(written(write_tokenizer), read_tokenizer),
    "turns": Reader(written(lambda folder: write_rows(folder / "rows.jsonl", ROWS)), read_turns),
    **WRITTEN,
}

# --- one attempt

SECONDS = 20


class TooLongError(BaseException):
    """Reading takes more than `SECONDS` of the processor. No Exception, so that nobody takes it for a broken file."""


def stop(*_: object) -> None:
    raise TooLongError


def attempt(reader: Reader, files: Files) -> str:
    """Write and read files: "taken", "refused", or how it escaped."""
    with tempfile.TemporaryDirectory(prefix="jsublim-fuzz-") as scratch:
        for name, content in files.items():
            path = Path(scratch) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        signal.signal(signal.SIGPROF, stop)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            reader.read(Path(scratch))
        except JsublimError as error:
            text = str(error)
            named = scratch in text or text.startswith("override ")
            return "refused" if named and text.splitlines() == [text] else f"an error that names no file: {text}"
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of a Rust library is no Exception
            return f"{type(error).__name__}: {error}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    return "taken"


def mutated(name: str, seed: int, number: int, files: Files) -> Files:
    return mutate(files, random.Random(f"{name} {seed} {number}"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=10_000, help="mutations of all readers together")
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation of each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=READERS, help="one reader; default: all")
    said = parser.parse_args()
    names = [said.only] if said.only else list(READERS)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    escapes = 0
    for name in names:
        reader, counts = READERS[name], Counter[str]()
        files, began = reader.files(), time.monotonic()
        outcome = attempt(reader, files)
        assert outcome == "taken", f"{name}: its own files are {outcome}"
        for number in range(said.first, said.first + -(-said.number // len(names))):
            outcome = attempt(reader, mutated(name, said.seed, number, files))
            kind = outcome if outcome in ("taken", "refused") else "escaped"
            counts[kind] += 1
            if kind == "escaped":
                print(
                    f"escaped: --only {name} --seed {said.seed} --first {number} --number 1: {outcome[:300]}",
                    flush=True,
                )
        escapes += counts["escaped"]
        told = ", ".join(f"{counts[kind]} {kind}" for kind in ("taken", "refused", "escaped"))
        print(f"{name}: {counts.total()} mutations, {told}, {time.monotonic() - began:.0f} s", flush=True)
    return 1 if escapes else 0


if __name__ == "__main__":
    sys.exit(main())
