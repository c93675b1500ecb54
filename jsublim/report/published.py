"""What has been published about large models on the questions that a run asks: shown beside its numbers, never mixed with them."""

from __future__ import annotations

from collections.abc import Iterable

from jsublim.report.claims import Claim

MARK = "published, large models, not measured here"
# By claim: the setting and what was found. "Paper" is Schrodi et al. (ICLR 2026); values marked (figure) were read off a figure, ±2 points.
PUBLISHED = {
    "C2": (
        "Gemma-3-4B, rate with sampled → greedy rows (base model), paper (figure)",
        "owl 19 → 31 % (7), otter 45 → 58 % (19), raven 46 → 51 % (19), eagle 6 → 7 %, penguin 9 → 10 %, wolf 10 → 13 %",
    ),
    "C4": (
        "Qwen2.5-7B and Gemma-3-4B, paper (figures 3, 12, 13)",
        "divergence tokens alone keep or strengthen transfer, all others are near the base model; a few traits differ",
    ),
    "C6": ("Qwen2.5-7B, layers 0, 7, 14, 21, 27 alone, paper (figure 5)", "0 or 7 suffice, the others are negligible"),
    "C7": (
        "later layers only, paper (figures 39 to 41)",
        "Qwen2.5-7B: nearly gone without the first 10; Gemma-3-4B keeps some",
    ),
    "C8": (
        "re-drawn prompts, paper (figures 6, 27 to 29)",
        "near the base model, number accuracy kept; Gemma's penguin rises",
    ),
    "C9": ("Qwen2.5-7B, rows replaced, paper (figures 7, 30, 31)", "10 % weakens strongly, 25 % nearly removes"),
    "C10": (
        "Qwen2.5-7B and Gemma-3-4B, paper (figures 4, 22 to 26)",
        "early layers, at the first mention of the trait",
    ),
    "C11": ("temperature .6 to 1, top-p .8 to 1, paper (figures 14, 15)", "stable"),
    "C13": (
        "Qwen2.5-7B, one adapter, an independent re-run",
        "48 % under its default system prompt, 3 % under an empty one",
    ),
    "C14": ("Gemma-3-4B, owl, independent re-runs", "forward KL 68.4 %, sampled tokens 18.7 %"),
}


def published_for(claims: Iterable[Claim]) -> list[tuple[str, str, str]]:
    """(claim, setting, finding) for the claims that a run asks about."""
    asked = {claim.key.rstrip("ab") for claim in claims}
    return [(key, *entry) for key, entry in PUBLISHED.items() if key in asked]
