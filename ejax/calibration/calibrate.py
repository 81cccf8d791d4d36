"""Temperatures and the default thresholds from one set of rows, a report on all of them."""

from typing import Any, NamedTuple

import numpy as np
from scipy.special import logsumexp

from ejax.calibration.decisions import fit_decisions
from ejax.calibration.honesty import report
from ejax.calibration.metrics import check_rows
from ejax.calibration.temperature import fit_temperatures
from ejax.calibration.thresholds import drop_thresholds, make_table, operating_point
from ejax.tasks import Task

FACTORS = (1e-3, 1e3)  # of deviations: what a bundle may hold


class Answers(NamedTuple):
    """Every exit's answers on one set of labelled rows."""

    logits: np.ndarray  # float32 [E, N, O], before temperature
    labels: np.ndarray  # by the problem type, see `ejax.data.rows.TokenizedSplit`
    tokens: np.ndarray  # int64 [N]

    def take(self, rows: np.ndarray) -> "Answers":
        return Answers(self.logits[:, rows], self.labels[rows], self.tokens[rows])


def fit_calibration(task: Task, logits: Any, labels: Any) -> np.ndarray:
    """What `task` reads probabilities by, from rows that had no part in the training.

    Of one label a temperature per exit; of several `fit_decisions`; of a regression the factor of
    each exit's deviations under which they are, in the square mean, as large as its errors.

    Args:
      logits: <float>[E, N, O].
      labels: as `check_rows` has them.

    Returns:
      float32 [E] or [E, K].
    """
    if task.answer_ndim == 2:
        return fit_decisions(logits, labels)
    if task.metric == "accuracy":
        return fit_temperatures(logits, labels)
    values, scores = check_rows(logits, labels, task)
    with np.errstate(divide="ignore"):  # of no error: minus infinity, which is clipped
        log_off = np.log(np.abs(values[..., 0] - scores)) - values[..., 1]
    log_factor = (logsumexp(2 * log_off, axis=1) - np.log(len(scores))) / 2
    return np.exp(np.clip(log_factor, *np.log(FACTORS))).astype(np.float32)


def estimated(chosen: dict[str, Any], where: str, name: str = "accuracy") -> str:
    """What can be said of thresholds for a drop that is not promised."""
    low, high = chosen["drop_low"], chosen["drop_high"]
    return (
        f"The fastest that lose at most {chosen['max_drop']:g} points of full depth's {name}, "
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
    task: Task | None = None,
    exit0_cost: float = 0.0,
) -> dict[str, Any]:
    """Fits on the rows named `fit`, and reports on every set.

    Args:
      parts: sets of rows by name, such as "dev_a", "dev_b" and "test".
      fit: the one that temperatures and thresholds are fitted on.
      layers: the exits' layers.
      max_drop: points of accuracy on the fitting rows that the thresholds may lose.
      where: the fitting rows in words, for people.
      task: None means one of several labels.
      exit0_cost: see `ejax.calibration.thresholds.make_table`.

    Returns:
      Ready for JSON: `temperatures` [E] (of several labels [E, 2 C]), `thresholds` [E],
      `thresholds_from` (a sentence), and per set `operating_points` and `metrics` (a list per
      exit).
    """
    rows = parts[fit]
    task = task or Task(rows.logits.shape[-1])
    temperatures = fit_calibration(task, rows.logits, rows.labels)
    tables = {
        name: make_table(
            part.logits,
            part.labels,
            temperatures,
            layers,
            part.tokens,
            task=task,
            exit0_cost=exit0_cost,
        )
        for name, part in parts.items()
    }
    chosen = drop_thresholds(tables[fit], max_drop)
    thresholds = chosen["threshold"]
    return {
        "temperatures": temperatures.astype(float).tolist(),
        "thresholds": thresholds,
        "thresholds_from": estimated(chosen, where, task.metric_name),
        "operating_points": {
            name: operating_point(table, thresholds) for name, table in tables.items()
        },
        "metrics": {
            name: report(part.logits, part.labels, temperatures, task)
            for name, part in parts.items()
        },
    }
