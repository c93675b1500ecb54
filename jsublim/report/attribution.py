"""Where attribution lies: the heat maps by layer and token role, and what claim C10 asks of them.

Tables are those of attribution tasks (`attribution.parquet`), or several of them one after another.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from jsublim.report.drawing import Heat, cell
from jsublim.report.tables import query

SOURCE = "attribution.parquet"  # in errors


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
    sql = """
        with residual as (
            select *, 3 * layer <= max(layer) over () as early from records where site = 'residual'
        )
        select trait, row, direction,
               sum(mass) filter (early and role = 'trait') / nullif(sum(mass) filter (early), 0) as of_early,
               sum(mass) filter (early and role = 'trait') / nullif(sum(mass), 0) as of_all
        from residual group by trait, row, direction having of_early is not null
        order by trait, row, direction
        """
    return [EarlyShare(**row) for row in query(SOURCE, table, sql)]


def attribution_heats(table: pa.Table) -> list[Heat]:
    """A map for each site and direction: the share (percent) of its whole absolute attribution by layer (a row each) and token role
    (a column each); all rows of the table together."""
    sites, directions, roles = (table[name].unique().to_pylist() for name in ("site", "direction", "role"))
    sql = "select site, direction, layer, role, sum(mass) as mass from records group by all"
    sums = {tuple(key): mass for *key, mass in (row.values() for row in query(SOURCE, table, sql))}
    layers, shares = max(table["layer"].to_pylist()) + 1, {}
    for where in ((site, direction) for site in sites for direction in directions):
        mass = np.asarray([[sums.get((*where, layer, role), 0.0) for role in roles] for layer in range(layers)])
        shares[where] = 100 * mass / (mass.sum() or 1.0)
    limit = max(float(share.max()) for share in shares.values()) or 1.0
    heats = []
    for where, share in shares.items():
        cells = ((cell(f"{value:.1f}", value / limit, "YlGnBu") for value in row) for row in share.tolist())
        rows = tuple((str(layer), tuple(row)) for layer, row in enumerate(cells))
        heats.append(Heat(", ".join(where), "layer", tuple(roles), rows))
    return heats
