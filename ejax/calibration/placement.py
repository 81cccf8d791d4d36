"""Which exits to keep: the subset and thresholds of the least cost, by simulation.

Axes: E exits, N rows, P policies.
"""

from collections.abc import Sequence
from itertools import combinations
from math import comb
from typing import Any, NamedTuple

import numpy as np

from ejax.calibration import thresholds
from ejax.calibration.metrics import Float
from ejax.errors import UserError

MOST_SUBSETS = 20_000  # some minutes


class Placement(NamedTuple):
    """Some exits of a table, the last of them taking everyone, and their thresholds."""

    exits: tuple[int, ...]  # indices into the table's layers, ascending
    thresholds: tuple[float, ...]  # one per exit kept
    cost: float  # the mean over rows, in the unit given

    def of_all(self, exits: int) -> np.ndarray:
        """The same as thresholds for all exits, float64 [E]: nobody leaves at another one."""
        values = np.full(exits, thresholds.FULL)
        values[list(self.exits)] = self.thresholds
        values[self.exits[-1]] = 0.0
        return values


def place(
    table: thresholds.Table,
    count: int,
    layer_cost: Any,
    exit_cost: Any,
    *,
    max_drop: float = 0.5,
    with_first: bool = False,
) -> list[Placement]:
    """The cheapest placement within `max_drop` points of the whole model, for 1 to `count` exits.

    Every subset of so many exits is tried with the thresholds of `drop_thresholds`; its last
    exit may lie below the table's last, so that the layers above are not needed at all. Both the
    measured drop and the one that probabilities expect keep within `max_drop`.

    Args:
      count: the most exits to keep, the last one counted.
      layer_cost: <float>[N], what a layer costs each row.
      exit_cost: <float>[N], what passing an exit costs it: head, scores, order.
      with_first: whether the first exit stays, as later ones add its logits to their own; then
        for 2 to `count` exits.

    Raises:
      ValueError: on a count outside 1..E (2..E), or a `max_drop` below 0.
    """
    thresholds.check_max_drop(max_drop)
    exits = len(table.layers)
    check_count(count, exits, with_first)
    ordered = thresholds.policies(table, "per exit")
    best: list[Placement] = []
    for size in range(1 + with_first, count + 1):
        tried = (
            _cheapest(table, kept, ordered, layer_cost, exit_cost, max_drop)
            for kept in combinations(range(exits), size)
            if table.layers[kept[-1]]  # exit 0 alone is no encoder
            and (kept[0] == 0 or not with_first)
        )
        within = [placement for placement in tried if placement is not None]
        best.append(cheapest(within))  # the last exit alone loses nothing
    return best


def cheapest(placements: Sequence[Placement]) -> Placement:
    """The first of the least cost: what no row uses changes it by rounding alone."""
    return placements[_first_of_least([placement.cost for placement in placements])]


def _first_of_least(costs: Any) -> int:
    return int(np.argmax(np.asarray(costs) <= np.min(costs) * (1 + thresholds.ROUNDING)))


def check_count(count: int, exits: int, with_first: bool = False) -> None:
    """Raises ValueError unless so many of the exits can be kept, and all choices be tried."""
    least, why = (2, "; exit 0 stays, as later exits read it") if with_first else (1, "")
    if not least <= count <= exits:
        raise UserError(
            f"exits must be between {least} and {exits}, those there are{why}. Got {count}."
        )
    subsets = sum(comb(exits, size) for size in range(1, count + 1))
    if subsets > MOST_SUBSETS:
        raise UserError(
            f"{count} of {exits} exits can be kept in {subsets:,} ways, and at most "
            f"{MOST_SUBSETS:,} are tried: keep fewer."
        )


def _cheapest(
    table: thresholds.Table,
    kept: tuple[int, ...],
    ordered: Float,
    layer_cost: Any,
    exit_cost: Any,
    max_drop: float,
) -> Placement | None:
    """The cheapest policy of one subset of exits; None where all lose too much."""
    some = np.full_like(ordered, thresholds.FULL)
    some[:, kept] = ordered[:, kept]
    some[:, kept[-1]] = 0.0
    if len(kept) == 1:
        some = some[:1]
    layers = table.layers + table.exit0_cost * (0 in kept)
    passed = np.searchsorted(kept, np.arange(len(table.layers)), side="right")
    cost = thresholds.totals(
        table, some, np.outer(layers, layer_cost) + np.outer(passed, exit_cost)
    )
    allowed = thresholds.within_drop(table, some, max_drop)
    if not allowed.any():
        return None
    p = _first_of_least(np.where(allowed, cost, np.inf))
    return Placement(kept, tuple(some[p, kept].tolist()), float(cost[p]) / table.tokens.size)


def point_of(table: thresholds.Table, placement: Placement) -> dict[str, Any]:
    """`operating_point` against the whole model, with the `layers` kept and the cost as `ms`."""
    taken = table.leave(placement.of_all(len(table.layers)))
    return thresholds.describe(table, taken) | {
        "layers": table.layers[list(placement.exits)].tolist(),
        "threshold": list(placement.thresholds),
        "ms": placement.cost,
    }
