"""Where attribution lies: the heat map by layer and token role, and what claim C10 asks of it.

Tables are those of attribution tasks (`attribution.parquet`), or several of them one after another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure

from jsublim.report.drawing import Heat, cell
from jsublim.report.tables import query

SOURCE = "attribution.parquet"  # in errors
SEQUENTIAL = "YlGnBu"  # pale is little, dark is much: it can be read in grey too
STYLE: dict[Any, Any] = {"font.family": "DejaVu Sans", "text.parse_math": False, "axes.titlesize": 11, "axes.titleweight": "bold",
         "axes.titlelocation": "left"}  # fmt: skip
WIDTH = 10.0  # inches


@dataclass(frozen=True)
class EarlyShare:
    """One row's residual mass (absolute attributions) in the first third of the layers, at the trait's first mention.

    Attributes:
      of_early: as a share of the mass in those layers, at any token.
      of_all: as a share of the mass in all layers. Attributions of the residual stream sum to the same total after every
        layer, so this hardly exceeds a third. It is the figure's number; a threshold belongs on `of_early`.
    """

    trait: str
    row: int
    direction: str
    of_early: float
    of_all: float


def early_share(table: pa.Table) -> list[EarlyShare]:
    """Claim C10: one value per row and direction (rows without any residual mass are left out).

    The first third consists of the layers with 3 x index < number of layers.
    """
    return [
        EarlyShare(*line)
        for line in query(
            SOURCE,
            table,
            """
            with residual as (
                select *, 3 * layer <= max(layer) over () as early from found where site = 'residual'
            )
            select trait, row, direction,
                   sum(mass) filter (early and role = 'trait') / nullif(sum(mass) filter (early), 0) as of_early,
                   sum(mass) filter (early and role = 'trait') / nullif(sum(mass), 0) as of_all
            from residual group by trait, row, direction having of_early is not null
            order by trait, row, direction
            """,
        )
    ]


def panel_shares(table: pa.Table) -> tuple[list[str], dict[tuple[str, str], np.ndarray]]:
    """The token roles, and for each site and direction the share (percent) of the panel's whole absolute attribution by
    layer and role, `[layers, roles]`; all rows together."""
    sites, directions, roles = (table[name].unique().to_pylist() for name in ("site", "direction", "role"))
    layers = max(table["layer"].to_pylist()) + 1
    sums = {
        tuple(key): mass
        for *key, mass in query(SOURCE, table, "select site, direction, layer, role, sum(mass) from found group by all")
    }
    shares = {}
    for site in sites:
        for direction in directions:
            mass = np.asarray(
                [[sums.get((site, direction, layer, role), 0.0) for role in roles] for layer in range(layers)]
            )
            shares[site, direction] = 100 * mass / (mass.sum() or 1.0)
    return roles, shares


def attribution_heats(table: pa.Table) -> list[Heat]:
    """The maps as tables of a page: a row for each layer, a column for each role."""
    roles, shares = panel_shares(table)
    limit = max(float(share.max()) for share in shares.values()) or 1.0
    return [
        Heat(
            f"{site}, {direction}",
            "layer",
            tuple(roles),
            tuple(
                (str(layer), tuple(cell(f"{value:.1f}", value / limit, SEQUENTIAL) for value in row))
                for layer, row in enumerate(share.tolist())
            ),
        )
        for (site, direction), share in shares.items()
    ]


def attribution_heat_map(table: pa.Table) -> Figure:
    """Layers by token roles, one panel per site and direction, as `panel_shares` has them."""
    roles, shares = panel_shares(table)
    sites, directions = (list(dict.fromkeys(key[i] for key in shares)) for i in (0, 1))
    layers = len(next(iter(shares.values())))
    limit = max(float(share.max()) for share in shares.values()) or 1.0
    with matplotlib.rc_context(STYLE):
        height = 1.6 + len(directions) * (0.9 + 0.14 * max(layers, 8))
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        grid = figure.subplots(len(directions), len(sites), sharex=True, sharey=True, squeeze=False)
        for axes, (site, direction) in zip(grid.T.flat, shares, strict=True):
            mesh = axes.pcolormesh(
                shares[site, direction], cmap=SEQUENTIAL, vmin=0.0, vmax=limit, edgecolors="face", lw=0.3
            )
            axes.set_title(f"{site}, {direction}")
            axes.set_xticks(np.arange(len(roles)) + 0.5, roles, rotation=45, ha="right")
            marks = np.unique(np.linspace(0, layers - 1, min(layers, 8)).round().astype(int))
            axes.set_yticks(marks + 0.5, marks)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        for axes in grid[:, 0]:
            axes.set_ylabel("layer")
        bar = figure.colorbar(mesh, ax=grid, label="share of the panel's absolute attribution (%)", shrink=0.9)
        bar.outline.set_visible(False)
    return figure
