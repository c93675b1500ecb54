"""Where in the model divergence tokens come from, and what rows teach, predicted before anything is trained on them."""

from __future__ import annotations

from typing import Annotated

from jsublim.attribution.patching import DIRECTIONS, SITES
from jsublim.core.section import NONEMPTY, RESULT, RUNTIME, Distinct, Positive, Section, one_of


class Attribution(Section):
    """Attribution patching of the first divergence token of each trait's first rows."""

    rows: Annotated[Positive, RESULT] = 100
    """How many of each trait's rows are read, the first ones."""
    steps: Annotated[Positive, RESULT] = 10
    """Steps of the integral between the two runs; 1 is the plain gradient."""
    sites: Annotated[list[Annotated[str, one_of(SITES)]], Distinct, NONEMPTY, RESULT] = ["residual"]
    """What is patched in each layer: the residual stream, the attention's output, or the MLP's."""
    directions: Annotated[list[Annotated[str, one_of(DIRECTIONS)]], Distinct, NONEMPTY, RESULT] = list(DIRECTIONS)
    """From the teacher's run to the counterfactual teacher's (noising), or back (denoising)."""
    batch_size: Annotated[Positive, RUNTIME] = 8
    """Rows that are read together."""


class Audit(Section):
    """First-order scores of each source's first rows for each evaluated trait, by what the first seed's student trains."""

    rows: Annotated[Positive, RESULT] = 300
    """The first so many rows of each source."""
    batch_size: Annotated[Positive, RUNTIME] = 16
    """Rows read at one time."""
