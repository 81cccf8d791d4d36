"""What thresholds cost and lose on labelled rows, and the default ones.

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
BOUNDS = tuple(np.geomspace(5e-4, 0.5, 61).tolist())  # on the loss of a row that leaves

Thresholds = float | tuple[float, ...]  # one for all exits, or one per exit


def operating_point(
    logits: Any,
    labels: Any,
    temperatures: Any,
    layers: tuple[int, ...],
    tokens: Any,
    threshold: Thresholds,
    *,
    rule: str = "confidence",
) -> dict[str, Any]:
    """What a threshold costs and loses on these rows, against the full model.

    Args:
      logits: <float>[E, N, C], every exit's, before temperature.
      labels: <int>[N] in 0..C-1.
      temperatures: <float>[E], positive.
      layers: the exits' layers, 1-based, ascending, E of them.
      tokens: <int>[N], real tokens per row, at least 1.
      threshold: one number, or one per exit [E]; above 1 is the full model.
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
    if np.ndim(threshold) > 1:
        raise ValueError(
            f"threshold must be one number, or one per exit. Got shape {np.shape(threshold)}."
        )
    taken = np.asarray(select_exit(logits, threshold, temperatures, rule=rule).exit)
    expected_lost = _expected_lost(logits, temperatures)
    return _describe(correct, expected_lost, layers_, counts, taken, threshold, rule)


def default_thresholds(
    logits: Any,
    labels: Any,
    temperatures: Any,
    layers: tuple[int, ...],
    tokens: Any,
    *,
    max_drop: float = 0.5,
    rule: str = "confidence",
) -> dict[str, Any]:
    """The fastest thresholds, one per exit, that lose at most `max_drop` points on these rows.

    What leaving at an exit would lose of full depth's accuracy is fitted from the score
    there, by full depth's calibrated probabilities: a logistic curve of two numbers per
    exit (as Platt, 1999, maps scores to probabilities). One bound on that loss, the same
    for all exits, then gives each exit its threshold: an exit that agrees with full depth
    lets unsure rows go too, since the layers above would not make them surer. The bound is
    one of `BOUNDS`, or else nobody leaves early. On 60 random draws of 436 of SST-2's dev and
    test rows (MiniLM-L6) the fastest single number within 0.5 points lost 0.56 (standard
    deviation 0.31) on the other rows at a mean depth of 3.35 layers, one per exit so chosen
    0.59 (0.36) at 2.49.

    Both `drop` and `expected_drop` have to keep within `max_drop`: on few rows the measured
    drop alone is a poor guide, since the fastest of many choices is then the one whose
    errors happened to cancel out. The choice fits these rows, so its drop there is
    optimistic: report `operating_point` on other rows.

    Args:
      max_drop: in points, 0 or above.
      logits, labels, temperatures, layers, tokens, rule: as in `operating_point`.

    Returns:
      The dict of `operating_point` at the thresholds chosen, and `max_drop`.

    Raises:
      ValueError: as `operating_point`, or on a `max_drop` below 0.
    """
    correct, layers_, counts = _check(logits, labels, layers, tokens)
    if not (math.isfinite(max_drop) and max_drop >= 0):
        raise ValueError(f"max_drop must be 0 points or above. Got {max_drop}.")
    per_exit = jnp.asarray(check_temperatures(temperatures, len(layers_)))
    scores = np.asarray(
        exit_scores(jnp.asarray(logits, jnp.float32), per_exit, check_rule(rule)), np.float64
    )
    expected_lost = _expected_lost(logits, temperatures)
    curves = [_fit_loss(*pair) for pair in zip(scores[:-1], expected_lost[:-1], strict=True)]
    rows, exits = np.arange(counts.size), len(layers_)
    chosen, taken = (FULL,) * exits, np.full(counts.size, exits - 1)
    least = int(counts.sum()) * layers_[-1]
    for bound in BOUNDS:
        candidate = (*(_score_at(curve, bound) for curve in curves), 0.0)
        reached = scores.astype(np.float32) >= np.asarray(candidate, np.float32)[:, None]
        leaves = reached.argmax(axis=0)
        lost = int(correct[-1].sum()) - int(correct[leaves, rows].sum())
        expected = expected_lost[leaves, rows].sum()
        work = (counts * layers_[leaves]).sum()
        if work < least and 100 * max(lost, expected) <= max_drop * counts.size:
            chosen, taken, least = candidate, leaves, work
    point = _describe(correct, expected_lost, layers_, counts, taken, chosen, rule)
    return point | {"max_drop": float(max_drop)}


def _fit_loss(scores: Float, lost: Float) -> Float:
    """(intercept, slope) of loss ~ logistic(intercept + slope * logit(score)), by Newton.

    A weak prior, a slope of -1 and an intercept of 0, keeps it finite where nothing is lost.
    """
    x = np.stack([np.ones_like(scores), _logit(scores)], axis=1)
    middle, precision = np.array([0.0, -1.0]), np.array([1e-3, 1.0])
    weights = np.array([-2.0, -0.5])
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(x @ weights, -30, 30)))
        gradient = x.T @ (p - lost) + precision * (weights - middle)
        curvature = (x * (p * (1 - p))[:, None]).T @ x + np.diag(precision)
        step = np.linalg.solve(curvature, gradient)
        weights = weights - np.clip(step, -1, 1)  # far from the end Newton may overshoot
        if np.abs(step).max() < 1e-9:
            break
    return weights


def _score_at(curve: Float, bound: float) -> float:
    """The score at which a row is expected to lose `bound`; a curve that rises has none."""
    intercept, slope = curve
    if slope >= 0:
        return 0.0 if intercept <= _logit(bound) else FULL
    return round(float(1 / (1 + np.exp(-(_logit(bound) - intercept) / slope))), 4)


def _logit(p: Any) -> Any:
    p = np.clip(p, 1e-6, 1 - 1e-6)  # a saturated score is as sure as one row in a million
    return np.log(p) - np.log1p(-p)


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
    threshold: Thresholds,
    rule: str,
) -> dict[str, Any]:
    early = correct[taken, np.arange(tokens.size)]
    drop, low, high = paired_interval(correct[-1], early)
    mean_depth = float((tokens * layers[taken]).sum() / tokens.sum())
    return {
        "threshold": np.asarray(threshold, np.float64).tolist(),
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
