"""What rows teach, predicted before anything is trained on them."""

from __future__ import annotations

from typing import Annotated

from jsublim.core.section import RESULT, RUNTIME, Positive, Section


class Audit(Section):
    """First-order scores of each source's first rows for each evaluated trait, by what the first seed's student trains."""

    rows: Annotated[Positive, RESULT] = 300
    """The first so many rows of each source."""
    batch_size: Annotated[Positive, RUNTIME] = 16
    """Rows read at one time."""
