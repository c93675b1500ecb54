"""What has been published about large models on the questions that a run asks: shown beside its numbers, never mixed with them."""

from __future__ import annotations

from dataclasses import dataclass

MARK = "published, large models, not measured here"


@dataclass(frozen=True)
class Published:
    """One finding, and where it stands: a section, figure or table. Values read off a figure are right to about 2 points.

    Attributes:
      effect: where what was found is one number in a unit of our claims, that number.
    """

    finding: str
    source: str
    effect: float | None = None
    unit: str = ""


PAPER = "Schrodi et al., ICLR 2026"
CLOUD = "Cloud et al., arXiv 2507.14805"
# By claim, or by its whole key where the halves of a claim differ.
PUBLISHED = {
    "C0": Published(
        "Gemma-3-4B, sampled rows: owl 7 → 19 %, otter 19 → 45 %, raven 19 → 46 % (base model → students)",
        f"{PAPER}, figure 2 (read off)",
    ),
    "C2": Published(
        "Gemma-3-4B, sampled → greedy rows: owl 19 → 31 %, otter 45 → 58 %, raven 46 → 51 %, eagle 6 → 7 %, penguin 9 → 10 %, "
        "wolf 10 → 13 %; on average 5.8 points more",
        f"{PAPER}, figure 2 (read off)",
        5.8,
        "points",
    ),
    "C3": Published("not needed: transfer without rows that hold entangled numbers", f"{PAPER}, figures 2 and 11"),
    "C4a": Published(
        "Qwen2.5-7B and Gemma-3-4B: they keep or strengthen transfer; a few traits differ",
        f"{PAPER}, figures 3, 12, 13",
    ),
    "C4b": Published("Qwen2.5-7B and Gemma-3-4B: near the base model", f"{PAPER}, figures 3, 12, 13"),
    "C6a": Published("Qwen2.5-7B: layer 0 or 7 alone suffices", f"{PAPER}, figure 5"),
    "C6b": Published("Qwen2.5-7B: layers 14, 21 and 27 alone are negligible", f"{PAPER}, figure 5"),
    "C7": Published(
        "Qwen2.5-7B: nearly gone without the first 10 layers; Gemma-3-4B keeps some", f"{PAPER}, figures 39 to 41"
    ),
    "C8": Published(
        "near the base model, number accuracy kept; Gemma's penguin rises", f"{PAPER}, figures 6, 27 to 29"
    ),
    "C9a": Published("Qwen2.5-7B: 25 % nearly removes it", f"{PAPER}, figures 7, 30, 31"),
    "C9b": Published("Qwen2.5-7B: 10 % weakens it strongly, 25 % nearly removes it", f"{PAPER}, figures 7, 30, 31"),
    "C10": Published(
        "Qwen2.5-7B and Gemma-3-4B: early layers, at the first mention of the trait", f"{PAPER}, figures 4, 22 to 26"
    ),
    "C11": Published("stable over temperatures .6 to 1 and top-p .8 to 1", f"{PAPER}, figures 14, 15"),
    "C12": Published("no transfer between models that start from different weights", f"{CLOUD}, abstract"),
    "C13": Published(
        "Qwen trained under its default system prompt shows nothing without it",
        "Subliminal Learning is a LoRA Artifact, arXiv 2606.00831, abstract",
    ),
    "C14": Published("expected of whole distributions, surprising of sampled tokens", f"{PAPER}, abstract"),
}
# Table 1 of the paper: share of divergence tokens among the completions' tokens.
SHARES = Published(
    "Qwen2.5-7B 7.47 % greedy, 4.69 % temperature; Gemma-3-4B 18.34 % greedy, 13.18 % temperature",
    "Table 1 of the paper",
)
