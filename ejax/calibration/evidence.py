"""How much of exit 0's logits each later exit adds to its own. Axes: E exits, N rows, C classes."""

from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, softmax

from ejax.calibration.metrics import Float, check_rows
from ejax.tasks import Task

LEAST = 0.05  # of an exit's own logits, as the highest temperature leaves of them


def fit_evidence(logits: Any, labels: Any, task: Task | None = None) -> np.ndarray:
    """The weight of exit 0 in each later exit, which then answers by `own + weight * exit 0's`.

    Exit 0 reads other things, n-grams of the whole text, and errs on other texts than the encoder.
    For each exit the NLL of `softmax(a * own + b * exit 0's)` is minimised over a and b, which is
    convex, and the weight is b / a: a is left to the temperature. Each label counts as
    (N + 1) / (N + 2) likely, as of temperatures (Platt, 1999, section 2.2), so that there is a
    minimum where no row is wrong. A weight stays 0 unless it pays for itself: unless the
    log-likelihood rises by more than 1 (Akaike, "A New Look at the Statistical Model
    Identification", 1974). The rows must have had no part in the training.

    Args:
      logits: <float>[E, N, C], exit 0's first.
      labels: <int>[N], or of several labels bool [N, C].
      task: None means one of several labels.

    Returns:
      float32 [E - 1], 0 or above.
    """
    values, checked = check_rows(logits, labels, task)
    rows, classes = values.shape[1:]
    several = checked.ndim == 2  # labels at once: each is a logistic of its own
    if several:
        target = np.where(checked, rows + 1, 1) / (rows + 2)
    else:
        target = np.full((rows, classes), 1 / (rows + 2) / (classes - 1))
        target[np.arange(rows), checked] = (rows + 1) / (rows + 2)
    return np.array([_weight(own, values[0], target, several) for own in values[1:]], np.float32)


def _weight(own: Float, zero: Float, target: Float, several: bool) -> float:
    both = np.stack([own, zero])

    def loss(scale: Float) -> tuple[float, Float]:
        mixed = np.tensordot(scale, both, 1)
        probs = expit(mixed) if several else softmax(mixed, axis=-1)
        slope = ((probs - target) * both).sum(axis=(1, 2))
        if several:
            return float((np.logaddexp(0, mixed) - target * mixed).sum()), slope
        return -float((target * log_softmax(mixed, axis=-1)).sum()), slope

    def fitted(most: float | None) -> Any:
        bounds = [(LEAST, None), (0.0, most)]
        return minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=bounds)

    alone, together = fitted(0.0), fitted(None)
    own_scale, zero_scale = together.x
    return zero_scale / own_scale if together.fun < alone.fun - 1 else 0.0


def with_evidence(logits: Any, weights: Any) -> np.ndarray:
    """The logits [E, N, C] of all exits, exit 0's added to the later ones by `fit_evidence`."""
    later = logits[1:] + np.asarray(weights, np.float32)[:, None, None] * logits[:1]
    return np.concatenate([logits[:1], later])
