"""Several labels per text: a temperature and a decision threshold for each label at each exit.

Axes: E exits, N rows, C labels.
"""

from typing import Any

import numpy as np
from scipy.special import expit

from ejax.calibration.metrics import Float
from ejax.calibration.temperature import HIGHEST, LOWEST

CANDIDATES = 64  # decision thresholds tried per label
PASSES = 5  # over all labels; the micro-F1 rarely rises after the third
LEAST, MOST = 0.01, 0.99  # of a decision threshold
HALVINGS = 40  # of an interval of log temperatures of 6: below a float32 step


def fit_decisions(logits: Any, labels: Any) -> np.ndarray:
    """Temperatures of least NLL, then decision thresholds of the highest micro-F1 on these rows.

    Each label of each exit has its own temperature, as of one label (`fit_temperatures`); its
    targets are Platt's (1999, section 2.2), so that a label that no row has is finite. Decision
    thresholds begin with the best common one and are then changed label by label while micro-F1
    rises (Pillai, Fumera, Roli, "Threshold optimisation for multi-label classifiers", Pattern
    Recognition 46, 2013, section 3). Rows that choose them flatter the F1 they give.

    Args:
      logits: <float>[E, N, C].
      labels: float [N, C] of 0 and 1.

    Returns:
      float32 [E, 2 C]: temperatures, then decision thresholds, which are probabilities.
    """
    values, true = np.asarray(logits, np.float64), np.asarray(labels) > 0
    found = np.empty((len(values), 2 * true.shape[1]), np.float32)
    for e, own in enumerate(values):
        temperature = label_temperatures(own, true)
        found[e] = np.concatenate([temperature, decide(expit(own / temperature), true)])
    return found


def label_temperatures(logits: Float, true: Any) -> Float:
    """Of each label [C], the temperature at which the slope of its NLL is 0, within bounds."""
    positive = true.sum(axis=0)
    high, low = (positive + 1) / (positive + 2), 1 / (len(true) - positive + 2)
    target = np.where(true, high, low)
    at_least, at_most = (np.full(true.shape[1], np.log(t)) for t in (LOWEST, HIGHEST))
    for _ in range(HALVINGS):
        middle = (at_least + at_most) / 2
        slope = ((expit(logits * np.exp(-middle)) - target) * logits).sum(axis=0)
        # Above 0: less trust in the logits, a higher temperature, lowers the NLL.
        at_least, at_most = (
            np.where(slope > 0, middle, at_least), np.where(slope > 0, at_most, middle),
        )  # fmt: skip
    return np.asarray(np.exp((at_least + at_most) / 2))


def decide(probs: Float, true: Any) -> Float:
    """Decision thresholds [C] of a high micro-F1, from probabilities [N, C]."""
    rows, positive = np.arange(true.shape[1]), true.sum()
    common = np.linspace(LEAST, MOST, 2 * CANDIDATES)
    grid = np.stack([np.concatenate([between(own), common]) for own in probs.T])
    grid = np.clip(grid, LEAST, MOST)
    hits, answered = np.empty((2, *grid.shape))
    for c in rows:
        order = np.sort(probs[:, c]), np.sort(probs[true[:, c], c])
        answered[c], hits[c] = (values.size - np.searchsorted(values, grid[c]) for values in order)

    def f1(hits: Any, answered: Any) -> Any:
        either = answered + positive
        return np.where(either, 2 * hits / np.maximum(either, 1), 1.0)

    def best(values: Any, grid: Any) -> Any:
        """Of equals the nearest to 0.5."""
        return np.where(values == values.max(), np.abs(grid - 0.5), np.inf).argmin()

    together = (counts[:, CANDIDATES:].sum(axis=0) for counts in (hits, answered))
    chosen = np.full(len(rows), CANDIDATES + best(f1(*together), common))
    for _ in range(PASSES):
        before = chosen.copy()
        for c in rows:
            with_each = (
                counts[rows, chosen].sum() - counts[c, chosen[c]] + counts[c]
                for counts in (hits, answered)
            )
            of_each = f1(*with_each)
            if of_each.max() > of_each[chosen[c]]:
                chosen[c] = best(of_each, grid[c])
        if (chosen == before).all():
            break
    return np.asarray(grid[rows, chosen])


def between(probs: Float) -> Float:
    """`CANDIDATES` halfway between probabilities [N], most of them where few rows are above.

    A row's own probability would round to either side of it in float32.
    """
    values = np.unique(probs.astype(np.float32)).astype(np.float64)
    halfway = (values[1:] + values[:-1]) / 2 if values.size > 1 else np.array([0.5])
    shares = 1 - np.linspace(0, 1, CANDIDATES) ** 2
    return np.asarray(np.quantile(halfway, shares, method="nearest"))
