"""Evaluations: one file per kind of question. Importing this package registers the kinds that ship."""
# ruff: noqa: F401 (what others import from here)

from jsublim.evals import factual, kl, misalignment, naming, numbers, preference, problems
from jsublim.evals.base import (
    EVAL_KINDS,
    Answers,
    EvalContext,
    EvalKind,
    EvalTask,
    PromptedModel,
    Record,
    evaluate,
    sample_answers,
)
