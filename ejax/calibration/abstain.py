"""No answer rather than a doubtful one: the certainty of an answer, and a threshold on it.

Axes: N rows, C classes.
"""

from typing import Any

import numpy as np
from scipy.special import softmax

from ejax.calibration.metrics import wilson_interval
from ejax.errors import UserError


def certainty(logits: np.ndarray, temperatures: np.ndarray) -> np.ndarray:
    """What an abstain threshold is compared with: the largest calibrated probability.

    Another measure of doubt goes here, and nowhere else; `python -m train.unknown` compares some.

    Args:
      logits: float32 [N, C], of the exit that each text took.
      temperatures: float32 [N], of that exit.

    Returns:
      float32 [N] in [1/C, 1].
    """
    return np.asarray(softmax(logits / temperatures[:, None], axis=1).max(axis=1))


def check_abstain(threshold: Any) -> np.float32:
    """A threshold on `certainty`; 0 answers every text."""
    try:
        value = np.float32(float(threshold))
    except (TypeError, ValueError):
        value = np.float32(np.nan)
    if not 0 <= value <= 1:
        raise UserError(
            f"abstain must be a number from 0, where every text gets an answer, to 1. "
            f"Got {threshold!r}."
        )
    return value


def check_accuracy(accuracy: float) -> None:
    """Of the answered, as a target."""
    if not 0 < accuracy <= 1:
        raise UserError(
            f"abstain must be a share of right answers, above 0 and at most 1. Got {accuracy}."
        )


def answered(certainties: Any, right: Any, threshold: float) -> dict[str, Any]:
    """What is answered at a threshold, and how much of that rightly.

    Args:
      certainties: float32 [N].
      right: bool [N].

    Returns:
      Ready for JSON: `threshold`, `rows`, `answered`; `accuracy` of the answered with its Wilson
      interval `low` to `high` (95 %), null where none is answered.
    """
    some = np.asarray(right)[np.asarray(certainties) >= check_abstain(threshold)]
    low, high = wilson_interval(int(some.sum()), some.size) if some.size else (None, None)
    return {
        "threshold": float(threshold),
        "rows": len(right),
        "answered": some.size,
        "accuracy": float(some.mean()) if some.size else None,
        "low": low,
        "high": high,
    }


def in_words(found: dict[str, Any]) -> str:
    """What `answered` gave."""
    count, rows = found["answered"], found["rows"]
    right = (
        f", {found['accuracy']:.4f} of them right ({found['low']:.4f} to {found['high']:.4f}, 95 %)"
        if count
        else ""
    )
    return f"{count} of {rows} rows answered ({100 * count / rows:.1f} %){right}"


def lowest_abstain(certainties: Any, right: Any, accuracy: float) -> float:
    """The lowest threshold at which the answered of N rows are right on such a share.

    It lies halfway to the next certainty below, so that rounding silences no other row; 0 where
    all may be answered.

    Args:
      certainties: float32 [N].
      right: bool [N].
      accuracy: in (0, 1].

    Raises:
      ValueError: where no threshold does.
    """
    check_accuracy(accuracy)
    doubts, at = np.unique(-np.asarray(certainties, np.float64), return_inverse=True)
    rows = np.bincount(at).cumsum()
    share = np.bincount(at, right).cumsum() / rows
    enough = np.flatnonzero(share >= accuracy)
    if not enough.size:
        raise UserError(
            f"abstain: no threshold makes the answers right on {accuracy:g} of {rows[-1]} rows; "
            f"the most is {share.max():.4g}, on the most confident {rows[share.argmax()]}."
        )
    least, *below = -doubts[enough[-1] :]
    if not below:
        return 0.0
    halfway = (least + below[0]) / 2
    return float(halfway if np.float32(halfway) > below[0] else least)
