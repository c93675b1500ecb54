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
    "Adapter": "jsublim.models.lora",
    "JsublimError": "jsublim.errors",
    "LanguageModel": "jsublim.inference.lm",
    "Run": "jsublim.api",
    "Sampling": "jsublim.inference.sampling",
    "UsageError": "jsublim.errors",
    "load_adapter": "jsublim.models.peft",
    "load_model": "jsublim.inference.lm",
    "results": "jsublim.api",
    "run": "jsublim.api",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: reading a report or a config must not start an accelerator runtime.
    if name not in _HOMES:
        raise AttributeError(f"module 'jsublim' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
