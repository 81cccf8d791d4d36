"""What a threshold costs and loses on labelled rows, and the default one.

Axes: E exits, N rows, C classes.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from ejax.calibration.metrics import Float, Int, check_rows, paired_interval, softmax
from ejax.config import check_layers
from ejax.inference.policy import check_rule, check_temperatures, exit_scores, select_exit

FULL = 2.0  # above every score: nobody leaves early
CANDIDATES = (
    *(percent / 100 for percent in range(1, 100)),
    *(mille / 1000 for mille in range(991, 1000)),
)


def operating_point(
    logits: Any,
    labels: Any,
    temperatures: Any,
    layers: tuple[int, ...],
    tokens: Any,
    threshold: float,
    *,
    rule: str = "confidence",
) -> dict[str, Any]:
    """What one threshold costs and loses on these rows, against the full model.

    Args:
      logits: <float>[E, N, C], every exit's, before temperature.
      labels: <int>[N] in 0..C-1.
      temperatures: <float>[E], positive.
      layers: the exits' layers, 1-based, ascending, E of them.
      tokens: <int>[N], real tokens per row, at least 1.
      threshold: one number; above 1 is the full model.
      rule: a name in `ejax.inference.policy.RULE_NAMES`.

    Returns:
      Ready for JSON: `threshold`, `rule`, `rows`; `accuracy` and `full_accuracy` (of the last
      exit) in [0, 1]; `drop`, `drop_low`, `drop_high`: accuracy lost in points with its
      95 % interval (`paired_interval`); `expected_drop`: the same by the calibrated
      probabilities of full depth instead of the labels; `mean_depth`: layers per token,
      sum(tokens * depth) / sum(tokens); `cost`: mean_depth / L, without heads and overhead;
      `exit_share`: fraction of rows that leave at each exit.

    Raises:
      ValueError: on a wrong shape, label, token count, layer, threshold or rule.
    """
    correct, layers_, counts = _check(logits, labels, layers, tokens)
    if np.ndim(threshold) != 0:
        raise ValueError(f"threshold must be one number. Got shape {np.shape(threshold)}.")
    taken = np.asarray(select_exit(logits, threshold, temperatures, rule=rule).exit)
    expected_lost = _expected_lost(logits, temperatures)
    return _describe(correct, expected_lost, layers_, counts, taken, float(threshold), rule)


def default_threshold(
    logits: Any,
    labels: Any,
    temperatures: Any,
    layers: tuple[int, ...],
    tokens: Any,
    *,
    max_drop: float = 0.5,
    rule: str = "confidence",
) -> dict[str, Any]:
    """The fastest threshold that loses at most `max_drop` points of accuracy on these rows.

    Both `drop` and `expected_drop` have to keep within `max_drop`: on few rows the
    measured drop alone is a poor guide, since the fastest of many thresholds is then the
    one whose errors happened to cancel out. On random draws of 436 of SST-2's dev and
    test rows (two models), choosing by the measured drop alone lost 0.9 points (standard
    deviation 0.8 to 1.0) on other rows where 0.5 was asked, choosing by both 0.3 to 0.6
    (0.2 to 0.3).

    One of `CANDIDATES` (0.01 to 0.99 by 0.01, 0.991 to 0.999 by 0.001) or else 2.0, the full
    model. Fastest is the least `mean_depth`; of equal ones the highest threshold. The choice
    fits these rows, so its drop there is optimistic: report `operating_point` at the chosen
    threshold on other rows.

    Args:
      max_drop: in points, 0 or above.
      logits, labels, temperatures, layers, tokens, rule: as in `operating_point`.

    Returns:
      The dict of `operating_point` at the threshold chosen, and `max_drop`.

    Raises:
      ValueError: as `operating_point`, or on a `max_drop` below 0.
    """
    correct, layers_, counts = _check(logits, labels, layers, tokens)
    if not (math.isfinite(max_drop) and max_drop >= 0):
        raise ValueError(f"max_drop must be 0 points or above. Got {max_drop}.")
    per_exit = check_temperatures(temperatures, len(layers_))
    scores = exit_scores(jnp.asarray(logits, jnp.float32), per_exit, check_rule(rule))
    # A row passes exit e by when every score so far is below the threshold.
    best_so_far = np.maximum.accumulate(np.asarray(scores)[:-1], axis=0)
    rows = np.arange(counts.size)
    expected_lost = _expected_lost(logits, temperatures)
    threshold, taken = FULL, np.full(counts.size, len(layers_) - 1)
    least = int(counts.sum()) * layers_[-1]
    for candidate in reversed(CANDIDATES):
        leaves = (best_so_far < np.float32(candidate)).sum(axis=0)
        lost = int(correct[-1].sum()) - int(correct[leaves, rows].sum())
        expected = expected_lost[leaves, rows].sum()
        work = (counts * layers_[leaves]).sum()
        if work < least and 100 * max(lost, expected) <= max_drop * counts.size:
            threshold, taken, least = candidate, leaves, work
    point = _describe(correct, expected_lost, layers_, counts, taken, threshold, rule)
    return point | {"max_drop": float(max_drop)}


def _check(
    logits: Any, labels: Any, layers: tuple[int, ...], tokens: Any
) -> tuple[npt.NDArray[np.bool_], Int, Int]:
    """Correct [E, N], layers [E], tokens [N]."""
    values, checked = check_rows(logits, labels)
    exits, rows, _ = values.shape
    check_layers(tuple(layers))
    if len(layers) != exits:
        raise ValueError(
            f"layers must hold one layer per exit ({exits}). Got {len(layers)}: {tuple(layers)}."
        )
    counts = np.asarray(tokens)
    if counts.shape != (rows,) or counts.dtype.kind not in "iu" or (counts < 1).any():
        raise ValueError(
            f"tokens must be {rows} integers of at least 1, the real tokens of each row. "
            f"Got shape {counts.shape}, dtype {counts.dtype}, smallest {counts.min(initial=1)}."
        )
    correct = values.argmax(axis=2) == checked
    return correct, np.asarray(layers, np.int64), counts.astype(np.int64)


def _expected_lost(logits: Any, temperatures: Any) -> Float:
    """[E, N]: how much likelier full depth's label is than this exit's, by full depth.

    Its mean is the drop that calibrated probabilities expect, whatever the labels: 0
    where the two agree.
    """
    values = np.asarray(logits, np.float64)
    per_exit = np.broadcast_to(np.asarray(temperatures, np.float64), len(values))
    full = softmax(values[-1], temperature=float(per_exit[-1]))
    labels = values.argmax(axis=2)
    row = np.arange(values.shape[1])
    return full[row, labels[-1]] - full[row[None], labels]


def _describe(
    correct: npt.NDArray[np.bool_],
    expected_lost: Float,
    layers: Int,
    tokens: Int,
    taken: npt.NDArray[Any],
    threshold: float,
    rule: str,
) -> dict[str, Any]:
    early = correct[taken, np.arange(tokens.size)]
    drop, low, high = paired_interval(correct[-1], early)
    mean_depth = float((tokens * layers[taken]).sum() / tokens.sum())
    return {
        "threshold": threshold,
        "rule": rule,
        "rows": tokens.size,
        "accuracy": float(early.mean()),
        "full_accuracy": float(correct[-1].mean()),
        "drop": drop,
        "drop_low": low,
        "drop_high": high,
        "expected_drop": 100 * float(expected_lost[taken, np.arange(tokens.size)].mean()),
        "mean_depth": mean_depth,
        "cost": mean_depth / float(layers[-1]),
        "exit_share": (np.bincount(taken, minlength=layers.size) / tokens.size).tolist(),
    }
