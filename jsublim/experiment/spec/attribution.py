"""Where in the model divergence tokens come from."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from jsublim.attribution.patching import DIRECTIONS, SITES
from jsublim.experiment.spec.base import Distinct, Positive, Section

Site = Literal["residual", "attention", "mlp"]
Direction = Literal["noising", "denoising"]
assert get_args(Site) == SITES and get_args(Direction) == DIRECTIONS


class Attribution(Section):
    """Attribution patching of the first divergence token of each trait's first rows."""

    rows: Positive = 100
    steps: Positive = 10
    sites: Annotated[list[Site], Distinct, Field(min_length=1)] = ["residual"]
    directions: Annotated[list[Direction], Distinct, Field(min_length=1)] = ["noising", "denoising"]
    batch_size: Positive = 8
