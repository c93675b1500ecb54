"""Subliminal learning in JAX: biased teachers, divergence tokens, distilled students."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsublim.api import Run, results, run
    from jsublim.attribution.pairs import find_pairs
    from jsublim.attribution.patching import attribution_patching
    from jsublim.attribution.scan import scan
    from jsublim.distill.arm import Arm, Settings
    from jsublim.distill.data import make_examples, read_turns
    from jsublim.distill.losses import Loss
    from jsublim.distill.selection import Selection, token_mask
    from jsublim.distill.step import Program, train_step
    from jsublim.distill.trainer import first_state, make_batches, train
    from jsublim.errors import JsublimError, UsageError
    from jsublim.evals.base import PromptedModel, evaluate
    from jsublim.evals.preference import preference_task
    from jsublim.inference.divergence import find_divergence
    from jsublim.inference.lm import LanguageModel, load_model
    from jsublim.inference.sampling import Sampling
    from jsublim.inference.teachers import Teacher, generate
    from jsublim.models.lora import Adapter, init_full, init_lora, init_steering
    from jsublim.models.peft import load_adapter, save_adapter
    from jsublim.text.prompts import number_prompts

__all__ = [
    "Adapter",
    "Arm",
    "JsublimError",
    "LanguageModel",
    "Loss",
    "Program",
    "PromptedModel",
    "Run",
    "Sampling",
    "Selection",
    "Settings",
    "Teacher",
    "UsageError",
    "attribution_patching",
    "evaluate",
    "find_divergence",
    "find_pairs",
    "first_state",
    "generate",
    "init_full",
    "init_lora",
    "init_steering",
    "load_adapter",
    "load_model",
    "make_batches",
    "make_examples",
    "number_prompts",
    "preference_task",
    "read_turns",
    "results",
    "run",
    "save_adapter",
    "scan",
    "token_mask",
    "train",
    "train_step",
]

_HOMES = {
    "jsublim.api": ("Run", "results", "run"),
    "jsublim.attribution.pairs": ("find_pairs",),
    "jsublim.attribution.patching": ("attribution_patching",),
    "jsublim.attribution.scan": ("scan",),
    "jsublim.distill.arm": ("Arm", "Settings"),
    "jsublim.distill.data": ("make_examples", "read_turns"),
    "jsublim.distill.losses": ("Loss",),
    "jsublim.distill.selection": ("Selection", "token_mask"),
    "jsublim.distill.step": ("Program", "train_step"),
    "jsublim.distill.trainer": ("first_state", "make_batches", "train"),
    "jsublim.errors": ("JsublimError", "UsageError"),
    "jsublim.evals.base": ("PromptedModel", "evaluate"),
    "jsublim.evals.preference": ("preference_task",),
    "jsublim.inference.divergence": ("find_divergence",),
    "jsublim.inference.lm": ("LanguageModel", "load_model"),
    "jsublim.inference.sampling": ("Sampling",),
    "jsublim.inference.teachers": ("Teacher", "generate"),
    "jsublim.models.lora": ("Adapter", "init_full", "init_lora", "init_steering"),
    "jsublim.models.peft": ("load_adapter", "save_adapter"),
    "jsublim.text.prompts": ("number_prompts",),
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: reading a report or a config must not start an accelerator runtime.
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'jsublim' has no attribute '{name}'")
    return getattr(import_module(home), name)
