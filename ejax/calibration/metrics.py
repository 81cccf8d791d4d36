"""How right the answers of an exit are: accuracy, macro F1, NLL, Brier, and their intervals.

Everything is computed in float64 with NumPy. Axes: E exits, N rows, C classes, R resamples.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

from ejax.errors import UserError
from ejax.tasks import Task

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]

# Softmax rows of float32 sum to 1 within 1e-5; logits passed by mistake are off by far more.
SUM_TOLERANCE = 1e-3
DRAWS = 200  # of rows, for the interval of a metric that is no mean over rows


def check_rows(logits: Any, labels: Any, task: Task | None = None) -> tuple[Float, Any]:
    """Logits as float64 [E, N, O] and labels as int64 [N].

    Of several labels at once these are bool [N, C], of a regression float64 [N].

    Raises:
      ValueError: no rows, a wrong shape, a logit that is not finite, or a label
        that is no integer in 0..C-1.
    """
    values = np.asarray(logits, np.float64)
    task = task or Task(values.shape[-1])
    single = task.metric == "accuracy"
    if values.ndim != 3 or values.shape[0] < 1 or (single and values.shape[2] < 2):
        raise UserError(
            "logits must have shape [exits, rows, classes] with at least two classes. "
            f"Got {values.shape}."
        )
    exits, rows, classes = values.shape
    if classes != task.outputs:
        raise UserError(
            f"logits must have {task.outputs} outputs for {task.problem_type}. Got {values.shape}."
        )
    checked = check_labels(labels, rows, classes) if single else _check_other(labels, rows, task)
    if not np.isfinite(values).all():
        exit, row, _ = np.argwhere(~np.isfinite(values))[0]
        raise UserError(
            f"logits must be finite. Got NaN or infinity at exit {exit} (of {exits}, counted "
            f"from 0), row {row}: the run that made them diverged, or its weights are damaged."
        )
    return values, checked


def _check_other(labels: Any, rows: int, task: Task) -> Any:
    values = np.asarray(labels)
    shape = (rows, task.labels)[: task.answer_ndim]
    if values.shape != shape or rows < 1:
        raise UserError(f"labels must have shape {shape}, of one row or more. Got {values.shape}.")
    if not np.all(task.has_label(values)):
        raise UserError("every row must have a label here. Got rows without one.")
    return values > 0 if task.answer_ndim == 2 else values.astype(np.float64)


def check_labels(labels: Any, rows: int, classes: int | None = None) -> Int:
    values = np.asarray(labels)
    if rows < 1:
        raise UserError("at least one labelled row is needed. Got 0 rows.")
    if values.shape != (rows,):
        raise UserError(f"labels must have shape ({rows},), one per row. Got {values.shape}.")
    if values.dtype.kind not in "iu":
        raise UserError(f"labels must be integers. Got dtype {values.dtype}.")
    wrong = np.flatnonzero((values < 0) | (values >= (math.inf if classes is None else classes)))
    if wrong.size:
        allowed = "0 or above" if classes is None else f"in 0..{classes - 1}"
        raise UserError(
            f"labels must be {allowed}. Got {values[wrong[0]]} at row {wrong[0]}: leave out rows "
            "without a label (such as GLUE test, where it is -1)."
        )
    return values.astype(np.int64)


def check_probs(probs: Any) -> Float:
    values = np.asarray(probs, np.float64)
    if values.ndim != 2 or values.shape[1] < 2:
        raise UserError(
            f"probs must have shape [rows, classes] with at least two classes. Got {values.shape}."
        )
    if values.shape[0] < 1:
        raise UserError("at least one labelled row is needed. Got 0 rows.")
    sums = np.abs(values.sum(axis=1) - 1) <= SUM_TOLERANCE
    if not (sums.all() and (values >= 0).all()):
        raise UserError(
            "probs must be probabilities that sum to 1 in each row. Got rows that sum to "
            f"{values.sum(axis=1).min():g} to {values.sum(axis=1).max():g}, smallest entry "
            f"{values.min():g}: apply softmax to logits first."
        )
    return values


def softmax(logits: Any, *, temperature: float = 1.0) -> Float:
    """Softmax of `logits / temperature` over the last axis, float64; never overflows."""
    scaled = np.asarray(logits, np.float64) / _positive(temperature)
    return np.asarray(special.softmax(scaled, axis=-1))


def _positive(temperature: float) -> float:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise UserError(f"temperature must be a positive number. Got {temperature}.")
    return float(temperature)


def nll(logits: Any, labels: Any, *, temperature: float = 1.0) -> float:
    """Mean negative log-likelihood of the labels, in nats, under `logits / temperature`.

    It takes logits, since the logarithm of a probability rounded to 0 is infinite.

    Args:
      logits: <float>[N, C].
      labels: <int>[N] in 0..C-1.
      temperature: positive.
    """
    values, checked = check_rows(np.asarray(logits)[None], labels)
    log_probs = special.log_softmax(values[0] / _positive(temperature), axis=1)
    return float(-np.mean(log_probs[np.arange(checked.size), checked]))


def brier(probs: Any, labels: Any) -> float:
    """Mean over rows of the squared error summed over classes, in [0, 2].

    Brier, "Verification of forecasts expressed in terms of probability" (1950). With two
    classes it is twice the one-sided score (scikit-learn: `scale_by_half=False`).

    Args:
      probs: <float>[N, C].
      labels: <int>[N] in 0..C-1.
    """
    values = check_probs(probs)
    checked = check_labels(labels, *values.shape)
    target = np.eye(values.shape[1])[checked]
    return float(np.mean(((values - target) ** 2).sum(axis=1)))


def accuracy(predictions: Any, labels: Any) -> float:
    """The fraction of rows, in [0, 1], whose predicted class <int>[N] is the label <int>[N]."""
    checked = check_labels(labels, np.size(labels))
    return float(np.mean(_check_predictions(predictions, checked.size) == checked))


def macro_f1(predictions: Any, labels: Any) -> float:
    """Mean F1 over the classes that occur in the labels or in the predictions, in [0, 1].

    A class that occurs in neither is left out; one that occurs on one side only counts as 0.

    Args:
      predictions: <int>[N].
      labels: <int>[N].
    """
    checked = check_labels(labels, np.size(labels))
    predicted = _check_predictions(predictions, checked.size)
    return float(weighted_f1(predicted, checked, np.ones((checked.size, 1)))[0])


def weighted_f1(predictions: Int, labels: Int, weights: Float) -> Float:
    """`macro_f1` of rows that count `weights` [N, R]: [R]."""
    scores, present = np.zeros((2, weights.shape[1]))
    for label in np.union1d(predictions, labels):
        said, is_so = predictions == label, labels == label
        seen = (said.astype(float) + is_so) @ weights
        scores += 2 * ((said & is_so) @ weights) / np.maximum(seen, 1)
        present += seen > 0
    return np.asarray(scores / np.maximum(present, 1))


def _check_predictions(predictions: Any, rows: int) -> Int:
    values = np.asarray(predictions)
    if values.shape != (rows,) or values.dtype.kind not in "iu" or (values < 0).any():
        raise UserError(
            f"predictions must be {rows} class indices, one per label: take the argmax of logits "
            f"first. Got shape {values.shape}, dtype {values.dtype}."
        )
    return values.astype(np.int64)


def other_quality(task: Task, logits: Any, calibration: Any, labels: Any) -> dict[str, float]:
    """Of one exit: micro and macro F1 and the share of exact sets; or correlations and errors."""
    answers, labels = task.answers(logits, calibration), np.asarray(labels)
    found = {task.metric: task.measure(answers, labels)}
    if task.answer_ndim == 2:
        true = labels > 0
        both, either = (answers & true).sum(axis=0), answers.sum(axis=0) + true.sum(axis=0)
        per_label = 2 * both[either > 0] / either[either > 0]
        return found | {
            "macro_f1": float(per_label.mean()) if per_label.size else 1.0,
            "exact": float(task.right(answers, labels).mean()),
        }
    off = answers - labels
    constant = np.ptp(answers) == 0 or np.ptp(labels) == 0
    return found | {
        "pearson": 0.0 if constant else float(np.corrcoef(answers, labels)[0, 1]),
        "rmse": float(np.sqrt(np.mean(off**2))),
        "mae": float(np.mean(np.abs(off))),
    }


def lost_points(task: Task, full: Any, early: Any, labels: Any) -> tuple[float, float, float]:
    """(100 times the metric lost, and its 95 % interval), of two answers to the same N rows.

    By `paired_interval` of accuracies; of another metric by drawing the rows `DRAWS` times with
    replacement, by a fixed seed (Efron, 1979: the percentiles).
    """
    if task.metric == "accuracy":
        return paired_interval(full == labels, early == labels)

    def lost(rows: Any) -> float:
        of_full, of_early = (task.measure(of[rows], labels[rows]) for of in (full, early))
        return 100 * (of_full - of_early)

    drop = lost(slice(None))
    if np.array_equal(full, early):
        return drop, drop, drop
    rng = np.random.default_rng(0)
    draws = [lost(rng.integers(len(labels), size=len(labels))) for _ in range(DRAWS)]
    low, high = np.quantile(draws, (0.025, 0.975))
    return drop, float(low), float(high)


def paired_interval(
    correct_a: Any, correct_b: Any, level: float = 0.95
) -> tuple[float, float, float]:
    """Accuracy of a minus accuracy of b on the same rows, in points, with its interval.

    An approximation from the two Wilson score intervals and the correlation of the pairs
    (continuity corrected): method 10 of Newcombe, "Improved confidence intervals for the
    difference between binomial proportions based on paired data", Statistics in Medicine
    17 (1998). Unlike the Wald interval it stays in [-100, 100] and has a width above 0 even
    when a and b are right on the very same rows.

    Args:
      correct_a: <bool>[N], whether a is right.
      correct_b: <bool>[N], whether b is right, same rows in the same order.
      level: confidence level in (0, 1).

    Returns:
      (difference, low, high) in percentage points; above 0, a is better.
    """
    a, b = np.asarray(correct_a), np.asarray(correct_b)
    if a.ndim != 1 or a.shape != b.shape or a.size < 1 or not a.dtype == b.dtype == np.bool_:
        raise UserError(
            "correct_a and correct_b must be boolean, of one length [rows], with at least one "
            f"row. Got {a.dtype} {a.shape} and {b.dtype} {b.shape}."
        )
    if not 0 < level < 1:
        raise UserError(f"level must be between 0 and 1. Got {level}.")
    n = a.size
    both, only_a, only_b = (int(x.sum()) for x in (a & b, a & ~b, ~a & b))
    neither = n - both - only_a - only_b
    (down_a, up_a), (down_b, up_b) = (
        _arms(both + only_one, n, level) for only_one in (only_a, only_b)
    )
    phi = _corrected_phi(both, only_a, only_b, neither)
    low_arm = math.sqrt(max(down_a**2 - 2 * phi * down_a * up_b + up_b**2, 0.0))
    high_arm = math.sqrt(max(up_a**2 - 2 * phi * up_a * down_b + down_b**2, 0.0))
    difference = (only_a - only_b) / n
    # Rounding may carry a bound past the end of the scale by 1e-14.
    low, high = max(difference - low_arm, -1.0), min(difference + high_arm, 1.0)
    return 100 * difference, 100 * low, 100 * high


def wilson_interval(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Of a share of which `hits` of `n` were seen (Wilson, 1927): low and high, in [0, 1]."""
    from scipy.stats import binomtest  # slow to import

    interval = binomtest(hits, n).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def _arms(hits: int, n: int, level: float) -> tuple[float, float]:
    """How far Wilson's interval reaches below and above hits / n."""
    low, high = wilson_interval(hits, n, level)
    return hits / n - low, high - hits / n


def _corrected_phi(both: int, only_a: int, only_b: int, neither: int) -> float:
    n = both + only_a + only_b + neither
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    if margins == 0:
        return 0.0
    product = float(both * neither - only_a * only_b)
    if product > 0:
        product = max(product - n / 2, 0.0)
    return product / math.sqrt(margins)
