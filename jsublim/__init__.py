"""Subliminal learning in JAX: biased teachers, divergence tokens, distilled students."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsublim.api import Run, results, run
    from jsublim.errors import JsublimError, UsageError
    from jsublim.inference.lm import LanguageModel, load_model
    from jsublim.inference.sampling import Sampling
    from jsublim.models.lora import Adapter
    from jsublim.models.peft import load_adapter

__all__ = [
    "Adapter",
    "JsublimError",
    "LanguageModel",
    "Run",
    "Sampling",
    "UsageError",
    "load_adapter",
    "load_model",
    "results",
    "run",
]

_HOMES = {
    "jsublim.api": ("Run", "results", "run"),
    "jsublim.errors": ("JsublimError", "UsageError"),
    "jsublim.inference.lm": ("LanguageModel", "load_model"),
    "jsublim.inference.sampling": ("Sampling",),
    "jsublim.models.lora": ("Adapter",),
    "jsublim.models.peft": ("load_adapter",),
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: reading a report or a config must not start an accelerator runtime.
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'jsublim' has no attribute '{name}'")
    return getattr(import_module(home), name)
