"""Where in the model divergence tokens come from."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from jsublim.attribution.patching import DIRECTIONS, SITES
from jsublim.section import HOW, RESULT, Distinct, Positive, Section

Site = Literal["residual", "attention", "mlp"]
Direction = Literal["noising", "denoising"]
assert get_args(Site) == SITES and get_args(Direction) == DIRECTIONS


class Attribution(Section):
    """Attribution patching of the first divergence token of each trait's first rows."""

    rows: Annotated[Positive, RESULT] = 100
    steps: Annotated[Positive, RESULT] = 10
    sites: Annotated[list[Site], Distinct, Field(min_length=1), RESULT] = ["residual"]
    directions: Annotated[list[Direction], Distinct, Field(min_length=1), RESULT] = ["noising", "denoising"]
    batch_size: Annotated[Positive, HOW] = 8
