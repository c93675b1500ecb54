"""What the single commands make of the small checkpoint, each once a process, for tests of several files."""

from __future__ import annotations

import functools
from pathlib import Path

from command import TWO_LAYERS, ok
from tiny import scratch

GENERATE = ("generate", "--model", TWO_LAYERS, "sampling.max_new_tokens=40", "sampling.batch_size=4")
DIVERGENCE = ("divergence", "--model", TWO_LAYERS, "--trait", "cat", "--counterfactuals", "dog,owl")
FINETUNE = (
    "finetune",
    "--model",
    TWO_LAYERS,
    "students.data.batch_size=4",
    "students.data.accumulate=1",
    "students.optimizer.lr=1e-3",
    "students.optimizer.warmup=1",
)

LAYER0 = ("students.adapter.layers=[0]", "students.adapter.projections=[q,v]", "students.adapter.rank=2", "students.adapter.alpha=4")  # fmt: skip


@functools.cache
def home() -> Path:
    folder = scratch() / "commands"
    folder.mkdir()
    return folder


@functools.cache
def cat_rows() -> Path:
    """Rows of the cat teacher."""
    ok(*GENERATE, "--trait", "cat", "data.num_prompts=16", "--out", home() / "cat.jsonl")
    return home() / "cat.jsonl"


@functools.cache
def cat_divergence() -> Path:
    """The same rows with their divergence tokens."""
    out = home() / "cat-divergence.jsonl"
    ok(*DIVERGENCE, "scoring.batch_size=4", "--data", cat_rows(), "--out", out)
    return out


@functools.cache
def layer0() -> Path:
    """A student of one layer."""
    ok(*finetune(cat_divergence(), home() / "layer0", *LAYER0))
    return home() / "layer0"


def finetune(data: Path, out: Path, *options) -> tuple:
    return (*FINETUNE, "students.data.epochs=2", "--data", data, "--out", out, *options)


def artifact_of(out: Path, kind: str) -> Path:
    """The one artifact of a kind that a command has beside its result."""
    (folder,) = out.with_name(f"{out.name}.artifacts").glob(f"{kind}/*")
    return folder
