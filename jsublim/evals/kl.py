"""How far a student is from its teacher: the KL divergence of their next-token distributions on the teacher's rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jsublim.errors import JsublimError
from jsublim.evals.base import PromptedModel
from jsublim.evals.metric import metric
from jsublim.text.rows import Row

if TYPE_CHECKING:
    from jsublim.inference.scoring import Targets

KL = metric("kl_to_teacher", "KL from the teacher", unit="nats", high=math.inf, digits=4, better="lower", listed=False)

LARGEST = 64  # tokens of a teacher's distribution that are told apart; all others count as one


def kl_to_teacher(
    model: PromptedModel, rows: Sequence[Row], of_teacher: Sequence[Targets], *, batch_size: int | None = None
) -> tuple[float, int]:
    """Mean over completion tokens of KL(teacher || student), nats, at temperature 1.

    Both distributions are those over the teacher's k most probable tokens and all others as one, so this is a lower bound of
    the divergence over the vocabulary (the data-processing inequality); it is that divergence where k + 1 tokens are all there are.

    Args:
      of_teacher: what the teacher says at every completion token of the rows, each in its own context.

    Returns:
      The mean, and the tokens it is over.

    Raises:
      JsublimError: a completion that has other tokens in the student's context; its row is named.
    """
    from jsublim.inference.scoring import log_probs_of
    from jsublim.inference.teachers import Teacher, read_as

    turns = read_as(model.lm.chat, Teacher("student", model.system, fuse_system=model.fuse_system), rows)
    for number, (turn, targets) in enumerate(zip(turns, of_teacher, strict=True), 1):
        if len(turn.tokens) - turn.content != len(targets.ids):
            raise JsublimError(f"row {number}: the completion has other tokens for the student than for its teacher")
    ids = [targets.ids for targets in of_teacher]
    read = log_probs_of(model.lm.config, model.lm.params, turns, ids, adapter=model.adapter, batch_size=batch_size)
    total = 0.0
    for student, targets in zip(read, of_teacher, strict=True):
        logp = targets.logp.astype(np.float64)
        total += float((np.exp(logp) * (logp - student)).sum())
    tokens = sum(map(len, ids))
    return total / tokens, tokens
