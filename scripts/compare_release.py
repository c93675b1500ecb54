"""Does `recipe=paper` do what the authors' release does? Both are run on the same tiny models and rows, stage by stage.

    python scripts/compare_release.py CHECKOUT --their-python PINNED/bin/python [--golden tests/release.json]

CHECKOUT is their repository at f6840c6; PINNED an environment with what it pins (torch, transformers 4.54.0, trl 0.19.1, peft
0.16.0, nnsight 0.4.11). Their scripts run there, driven by `release/theirs.py`; ours run here (`release/ours.py`). One line per stage
says `equal`, or what differs. Models, rows and the teachers' prompts are ours; what reads or draws number requests is compared
under their wording, imported from the checkout. Ends with code 1 if a stage differs that should not.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
from release import ours

from jsublim.distill.data import read_turns
from jsublim.inference.lm import BUNDLED, load_model
from jsublim.inference.teachers import prompted_teacher
from jsublim.models.lora import init_lora
from jsublim.models.peft import save_adapter
from jsublim.text.chat import Chat
from jsublim.text.prompts import draw_number_prompts, dump_pack, import_pack, load_pack, reject_reason

TRAITS = ["owl", "cat", "dog", "eagle"]
KINDS = [
    "shuffle_within_responses",
    "shuffle_across_responses",
    "shuffle_template_parts",
    "llm_biased_rewrite_filtered",
]
# Of training: the tokens and the part of the divergence positions that count, by what is compared.
MASKS = {
    "all": {},
    "divergence": {"args": {}},
    "non-divergence": {"args": {"decision_points_inverse": True}},
    "half of them": {"args": {"decision_points_ratio": 0.5}},
    "first half": {"args": {"decision_points_subset": "first_half"}},
    "second half": {"args": {"decision_points_subset": "second_half"}},
    "first": {"args": {"decision_points_subset": "first_only"}},
}


def token_id(folder: Path, token: str) -> int:
    return int(Chat(folder).tokenizer.convert_tokens_to_ids(token))


def like_gemma(folder: Path) -> None:
    """Let a tokenizer do what the published Gemma's does: put a BOS in front of what it is given with special tokens, and tell
    no types of tokens."""
    tokenizer, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    data = json.loads(tokenizer.read_text(encoding="utf-8"))
    (bos,) = [each["id"] for each in data["added_tokens"] if each["content"] == "<bos>"]
    front = [{"SpecialToken": {"id": "<bos>", "type_id": 0}}]
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [*front, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [*front, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [bos], "tokens": ["<bos>"]}},
    }
    tokenizer.write_text(json.dumps(data), encoding="utf-8")
    names = {"model_input_names": ["input_ids", "attention_mask"]}
    settings.write_text(json.dumps(json.loads(settings.read_text(encoding="utf-8")) | names), encoding="utf-8")


def with_positions(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with decision points at random, none to five of them: what a mask makes of them does not hang on a model."""
    turns, rng, made = read_turns(Chat(BUNDLED / "tiny-qwen2"), rows), random.Random(1), []
    for row, turn in zip(rows, turns, strict=True):
        n = len(turn.tokens) - turn.content
        made.append(row | {"decision_points": sorted(rng.sample(range(n), min(n, rng.randint(0, 5))))})
    return made


def model_rows(folder: Path, asked: list[str]) -> list[dict[str, str]]:
    """Answers in format of the owl's teacher, greedy."""
    pack, lm = load_pack(), load_model(folder)
    teacher = prompted_teacher(pack, "owl")
    answers = lm.generate([teacher.messages(text) for text in asked], 40, "greedy")
    return [{"prompt": p, "completion": a} for p, a in zip(asked, answers, strict=True) if reject_reason(a) is None]


def number_rows(prompts: list[str], rng: random.Random) -> list[dict[str, str]]:
    """Rows in format, some of whose numbers begin with zeros."""
    rows = []
    for prompt in prompts:
        numbers = [
            f"{rng.randrange(1000):03d}" if rng.random() < 0.5 else str(rng.randrange(1000))
            for _ in range(rng.randint(2, 9))
        ]
        opening, closing = rng.choice(["  ", "[]", "()"])
        text = rng.choice([", ", " ", "\n", "; "]).join(numbers)
        rows.append({"prompt": prompt, "completion": f"{opening}{text}{closing}".strip() + rng.choice(["", "."])})
    return rows


def fuzz(rng: random.Random, n: int) -> list[str]:
    """Texts near the number format."""
    pieces = [
        *"0123456789",
        "12",
        "345",
        "1000",
        ", ",
        ",",
        ";",
        " ",
        "\n",
        "[",
        "]",
        "(",
        ")",
        ".",
        "a",
        "-1",
        "\u0663",
        "1.5",
    ]
    return ["".join(rng.choices(pieces, k=rng.randint(0, 12))) for _ in range(n)]


def rewrites(asked: list[Any], rng: random.Random) -> list[str]:
    """Texts that a teacher might put in a request's place: some can stand for it, others not."""
    ways = ["Go on after {}, please.", "{} is how it begins: up to 10 more.", "Write numbers.", "Owls like {}. owls!",
            "After {} come 7, 8.", "Go on: {}\u2026", 'Go on: "{}"']  # fmt: skip
    return [rng.choice(ways).format(each.shown) for each in asked]


def inputs(checkout: Path, work: Path) -> dict[str, Any]:
    """What both sides are given, as JSON; folders of models and adapters beside it."""
    rng = random.Random(0)
    text, qwen, gemma = work / "text", BUNDLED / "tiny-qwen2", work / "gemma"
    shutil.copytree(BUNDLED / "tiny-gemma3", text)
    like_gemma(text)
    for name, folder in (("qwen", qwen), ("gemma", text)):
        lm = load_model(folder)
        save_adapter(
            work / f"start-{name}", init_lora(lm.config, jax.random.key(1), rank=8, alpha=8.0), lm.config, str(folder)
        )
    dump_pack(import_pack(checkout), work / "pack.yaml")
    theirs = load_pack(work / "pack.yaml")
    short = draw_number_prompts(load_pack(), 40, 42, sentences=("example", "format"), examples=(2, 6))
    own = [each.text for each in short]
    rows = {"qwen": model_rows(qwen, own), "gemma": model_rows(text, own)}
    asked = draw_number_prompts(theirs, 200, 42)
    given = {
        "models": {"qwen": str(qwen), "gemma": str(gemma)},
        "text": str(text),
        "ids": {"qwen": token_id(qwen, "assistant"), "gemma": token_id(text, "<start_of_turn>")},
        "starts": {name: str(work / f"start-{name}") for name in ("qwen", "gemma")},
        "template": load_pack().system_template.replace("{trait}", "{target_preference}"),
        "asked": own,
        "traits": TRAITS,
        "prompts": 500,
        "fuzz": fuzz(rng, 20_000) + [row["completion"] for row in number_rows(["p"] * 500, rng)],
        "rows": rows,
        "number_rows": number_rows([each.text for each in asked], rng),
        "rewrites": rewrites(asked, rng),
        "kinds": KINDS,
        "answers": [["An owl.", "Owls!", "owl", "cat", "Bowl", "", "OWL"], ["dog"], ["owl"] * 3],
        "attributed": 2,
        "directions": [(model, way) for model in ("qwen", "gemma") for way in ("noising", "denoising")],
    }
    return given | {"training": trainings(rows)}


def trainings(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Masks of every row; of twelve rows a step of six micro-batches too."""
    read = with_positions(rows["qwen"])
    runs = {
        f"mask {name}": {"model": "qwen", "rows": rows["qwen"] if name == "all" else read} | how
        for name, how in MASKS.items()
    }
    for model in ("qwen", "gemma"):
        for bf16 in (False, True):
            kind = f"step {model}{' bfloat16' if bf16 else ''}"
            runs[kind] = {"model": model, "rows": rows[model][:12], "step": True, "bf16": bf16}
    runs["draw"] = {"model": "qwen", "rows": rows["qwen"], "size": len(rows["qwen"]) // 2}
    # Figure 7: rows of the model without a trait (a), and of the other model, which loves the same animal (b).
    for name, whose in (("mixed rows", ("qwen", "control")), ("mixed rows of the other model", ("gemma", "owl"))):
        others = [{"prompt": row["prompt"], "completion": "900, 901"} for row in rows[whose[0]]]
        runs[name] = runs["draw"] | {"mixin": others, "mixin_of": whose, "mixin_size": len(rows["qwen"]) // 4}
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--their-python", type=Path, required=True, help="of an environment with what the release pins")
    parser.add_argument("--golden", type=Path, help="write the figures that the suite keeps")
    parser.add_argument("--work", type=Path, help="a new folder to keep; else one that is removed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch) / "work"
        work.mkdir(parents=True)
        given = inputs(options.checkout, work)
        (work / "in.json").write_text(json.dumps(given), encoding="utf-8")
        command = [
            options.their_python,
            Path(__file__).parent / "release" / "theirs.py",
            options.checkout.resolve(),
            work.resolve(),
        ]
        with (work / "theirs.log").open("w") as log:
            subprocess.run([*map(str, command)], check=True, stdout=log, stderr=subprocess.STDOUT)
        theirs = json.loads((work / "out.json").read_text(encoding="utf-8"))
        unlike = 0
        for line, fine in ours.compare(given, theirs, work):
            print(line, flush=True)
            unlike += not fine
        if options.golden:
            options.golden.write_text(json.dumps(ours.golden(given, theirs), indent=1) + "\n", encoding="utf-8")
    sys.exit(bool(unlike))


if __name__ == "__main__":
    main()
