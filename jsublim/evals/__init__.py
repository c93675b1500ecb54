"""Evaluations: one file per kind of question. Importing this package registers the kinds that ship."""

from jsublim.evals import factual, misalignment, naming, preference, problems
from jsublim.evals.base import EVAL_KINDS, Answers, Asked, EvalKind, EvalTask, PromptedModel, Record, sample_answers

__all__ = [
    "EVAL_KINDS",
    "Answers",
    "Asked",
    "EvalKind",
    "EvalTask",
    "PromptedModel",
    "Record",
    "factual",
    "misalignment",
    "naming",
    "preference",
    "problems",
    "sample_answers",
]
