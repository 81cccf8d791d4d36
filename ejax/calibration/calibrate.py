"""Temperatures and the default thresholds from one set of rows, a report on all of them."""

from typing import Any, NamedTuple

import numpy as np

from ejax.calibration.metrics import report
from ejax.calibration.temperature import fit_temperatures
from ejax.calibration.thresholds import drop_thresholds, make_table, operating_point


class Answers(NamedTuple):
    """Every exit's answers on one set of labelled rows."""

    logits: np.ndarray  # float32 [E, N, C], before temperature
    labels: np.ndarray  # int32 [N]
    tokens: np.ndarray  # int64 [N]

    def take(self, rows: np.ndarray) -> "Answers":
        return Answers(self.logits[:, rows], self.labels[rows], self.tokens[rows])


def estimated(chosen: dict[str, Any], where: str) -> str:
    """What can be said of thresholds for a drop that is not promised."""
    low, high = chosen["drop_low"], chosen["drop_high"]
    return (
        f"The fastest that lose at most {chosen['max_drop']:g} points of full depth's accuracy, "
        f"estimated on {chosen['rows']} rows of {where}: drop {chosen['drop']:.2f} ({low:.2f} to "
        f"{high:.2f}, 95 %). It holds for texts like those."
    )


def calibrate(
    parts: dict[str, Answers],
    fit: str,
    layers: tuple[int, ...],
    *,
    max_drop: float,
    where: str,
    exit0_cost: float = 0.0,
) -> dict[str, Any]:
    """Fits on the rows named `fit`, and reports on every set.

    Args:
      parts: sets of rows by name, such as "dev_a", "dev_b" and "test".
      fit: the one that temperatures and thresholds are fitted on.
      layers: the exits' layers.
      max_drop: points of accuracy on the fitting rows that the thresholds may lose.
      where: the fitting rows in words, for people.
      exit0_cost: see `ejax.calibration.thresholds.make_table`.

    Returns:
      Ready for JSON: `temperatures` [E], `thresholds` [E], `thresholds_from` (a sentence),
      and per set `operating_points` and `metrics` (a list per exit).
    """
    rows = parts[fit]
    temperatures = fit_temperatures(rows.logits, rows.labels)
    tables = {
        name: make_table(
            part.logits, part.labels, temperatures, layers, part.tokens, exit0_cost=exit0_cost
        )
        for name, part in parts.items()
    }
    chosen = drop_thresholds(tables[fit], max_drop)
    thresholds = chosen["threshold"]
    return {
        "temperatures": [float(t) for t in temperatures],
        "thresholds": thresholds,
        "thresholds_from": estimated(chosen, where),
        "operating_points": {
            name: operating_point(table, thresholds) for name, table in tables.items()
        },
        "metrics": {
            name: report(part.logits, part.labels, temperatures) for name, part in parts.items()
        },
    }
