"""How right and how honest an exit is: accuracy, macro F1, NLL, Brier, ECE, failure AUROC.

Everything is computed in float64 with NumPy. Axes: E exits, N rows, C classes.
"""

import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import special

from ejax.errors import UserError
from ejax.inference.policy import check_calibration, check_temperatures
from ejax.tasks import Task

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]
Binning = Literal["width", "mass"]

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
    checked = _check_labels(labels, rows, classes) if single else _check_other(labels, rows, task)
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


def _check_labels(labels: Any, rows: int, classes: int | None = None) -> Int:
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


def _check_probs(probs: Any) -> Float:
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
    values = _check_probs(probs)
    checked = _check_labels(labels, *values.shape)
    target = np.eye(values.shape[1])[checked]
    return float(np.mean(((values - target) ** 2).sum(axis=1)))


def accuracy(predictions: Any, labels: Any) -> float:
    """The fraction of rows, in [0, 1], whose predicted class <int>[N] is the label <int>[N]."""
    checked = _check_labels(labels, np.size(labels))
    return float(np.mean(_check_predictions(predictions, checked.size) == checked))


def macro_f1(predictions: Any, labels: Any) -> float:
    """Mean F1 over the classes that occur in the labels or in the predictions, in [0, 1].

    A class that occurs in neither is left out; one that occurs on one side only counts as 0.

    Args:
      predictions: <int>[N].
      labels: <int>[N].
    """
    from sklearn.metrics import f1_score  # slow to import

    checked = _check_labels(labels, np.size(labels))
    predicted = _check_predictions(predictions, checked.size)
    return float(f1_score(checked, predicted, average="macro"))


def _check_predictions(predictions: Any, rows: int) -> Int:
    values = np.asarray(predictions)
    if values.shape != (rows,) or values.dtype.kind not in "iu" or (values < 0).any():
        raise UserError(
            f"predictions must be {rows} class indices, one per label: take the argmax of logits "
            f"first. Got shape {values.shape}, dtype {values.dtype}."
        )
    return values.astype(np.int64)


def ece(probs: Any, labels: Any, *, bins: int = 15, binning: Binning = "width") -> float:
    """Expected calibration error of the largest probability, in [0, 1].

    The mean over rows of |accuracy - confidence| of the row's bin (Guo et al., "On
    Calibration of Modern Neural Networks", ICML 2017, section 2). "width": bins ((i-1)/bins,
    i/bins]. "mass": bins of about equally many rows (Nguyen and O'Connor, EMNLP 2015); rows
    of equal confidence share a bin, so the order of the rows does not matter.

    Few rows bias it upward: see `ece_floor`.

    Args:
      probs: <float>[N, C].
      labels: <int>[N] in 0..C-1.
    """
    confidence, correct = _top(probs, labels)
    bin_of = _bin(confidence, bins, binning)
    return _gap(bin_of, correct - confidence, bins)


def ece_floor(
    probs: Any, *, bins: int = 15, binning: Binning = "width", samples: int = 100, seed: int = 0
) -> float:
    """The ECE that a perfectly calibrated classifier with these confidences shows on N rows.

    The mean ECE over `samples` sets of labels drawn from the probabilities themselves. Only
    whether the top class is right enters the ECE, so that alone is drawn.

    Args:
      probs: <float>[N, C].
    """
    confidence = _check_probs(probs).max(axis=1)
    bin_of = _bin(confidence, bins, binning)
    rng = np.random.default_rng(seed)
    draws = [
        _gap(bin_of, (rng.random(confidence.size) < confidence) - confidence, bins)
        for _ in range(samples)
    ]
    return float(np.mean(draws))


def ece_bounds(logits: Any, labels: Any, temperature: float) -> dict[str, float]:
    """How sure an exit's ECE less its floor is, and what another temperature would make of it.

    Args:
      logits: <float>[N, C], before temperature.
      labels: <int>[N] in 0..C-1.
      temperature: the one in use.

    Returns:
      `ece_minus_floor_low` and `_high`: 95 %, by drawing the rows with replacement, and with
      them the labels that make the floor, so that both hold the noise of the draw.
      `best_temperature`: of the one in use and 61 from 1/5 to 5, that with the least ECE less
      its floor (of 20 draws) on these very rows, which is `ece_minus_floor_at_best` (of 100);
      at or below 0 all are alike, and the one in use is kept.

    Where a classifier is far from calibrated, noise adds less to its ECE than the floor takes
    off: then the difference and its interval lie below the true error, which lies below the ECE.
    """
    values, checked = check_rows(np.asarray(logits)[None], labels)

    def excess(temperature: float, samples: int) -> float:
        probs = softmax(values[0], temperature=temperature)
        return ece(probs, checked) - ece_floor(probs, samples=samples)

    confidence, correct = _top(softmax(values[0], temperature=temperature), checked)
    rng = np.random.default_rng(0)
    floors = rng.random((20, checked.size)) < confidence
    off = np.concatenate([correct[None], floors]) - confidence  # [1 + floors, N]
    bin_of = _bin(confidence, 15, "width")
    differences = []
    for _ in range(200):
        counts = rng.multinomial(checked.size, np.full(checked.size, 1 / checked.size))
        drawn, *floor = (_gap(bin_of, counts * excess_of_rows, 15) for excess_of_rows in off)
        differences.append(drawn - np.mean(floor))
    low, high = np.quantile(differences, (0.025, 0.975))
    ladder = [float(temperature), *np.geomspace(0.2, 5, 61).tolist()]
    best = min(ladder, key=lambda t: max(0.0, excess(t, samples=20)))
    excess_at = {t: excess(t, samples=100) for t in (ladder[0], best)}
    best = min(excess_at, key=lambda t: max(0.0, excess_at[t]))
    return {
        "ece_minus_floor_low": float(low),
        "ece_minus_floor_high": float(high),
        "best_temperature": best,
        "ece_minus_floor_at_best": excess_at[best],
    }


def reliability(
    probs: Any, labels: Any, *, bins: int = 15, binning: Binning = "width"
) -> list[dict[str, float]]:
    """The points of a reliability diagram, one per bin that holds rows, least sure first.

    Args:
      probs: <float>[N, C].
      labels: <int>[N] in 0..C-1.

    Returns:
      Per bin: `rows`, mean `confidence` and `accuracy`, both in [0, 1].
    """
    confidence, correct = _top(probs, labels)
    bin_of = _bin(confidence, bins, binning)
    return [
        {
            "rows": int((bin_of == b).sum()),
            "confidence": float(confidence[bin_of == b].mean()),
            "accuracy": float(correct[bin_of == b].mean()),
        }
        for b in np.unique(bin_of)
    ]


def _top(probs: Any, labels: Any) -> tuple[Float, Float]:
    values = _check_probs(probs)
    checked = _check_labels(labels, *values.shape)
    return values.max(axis=1), (values.argmax(axis=1) == checked).astype(np.float64)


def _bin(confidence: Float, bins: int, binning: Binning) -> Int:
    if bins < 1:
        raise UserError(f"bins must be at least 1. Got {bins}.")
    if binning == "width":
        edges = np.linspace(0, 1, bins + 1)[1:-1]
    elif binning == "mass":
        last = -(-confidence.size * np.arange(1, bins) // bins) - 1
        edges = np.sort(confidence)[last]
    else:
        raise UserError(f"binning must be 'width' or 'mass'. Got {binning!r}.")
    return np.searchsorted(edges, confidence, side="left").astype(np.int64)


def _gap(bin_of: Int, excess: Float, bins: int) -> float:
    return float(np.abs(np.bincount(bin_of, excess, minlength=bins)).sum() / excess.size)


def failure_auroc(probs: Any, labels: Any) -> float | None:
    """How well the largest probability tells right rows from wrong ones, in [0, 1].

    The probability that a right row is surer than a wrong one, ties counting half; 0.5 is
    chance. None where no row is wrong, or none is right.

    Args:
      probs: <float>[N, C].
      labels: <int>[N] in 0..C-1.
    """
    from sklearn.metrics import roc_auc_score  # slow to import

    confidence, correct = _top(probs, labels)
    if correct.min() == correct.max():
        return None
    return float(roc_auc_score(correct, confidence))


def report(
    logits: Any, labels: Any, temperatures: Any, task: Task | None = None
) -> list[dict[str, Any]]:
    """Quality and calibration of every exit, before (T = 1) and after its temperature.

    Args:
      logits: <float>[E, N, C], before temperature.
      labels: <int>[N] in 0..C-1.
      temperatures: <float>[E], positive.

    Returns:
      Per exit, ready for JSON: `temperature`, `rows`, and under `before` and `after` each
      `accuracy`, `macro_f1`, `nll`, `brier`, `failure_auroc` (null if no row is wrong), and
      `ece_width`, `ece_mass` (15 bins), raw and `_minus_floor` (below 0: within the noise). Of
      other tasks `rows` and, under `after`, the task's metric and more of its kind.
    """
    if task and task.metric != "accuracy":
        calibration = check_calibration(task, temperatures, len(logits))
        each = zip(logits, calibration, strict=True)
        return [
            {"rows": len(labels), "after": other_quality(task, *of_exit, labels)}
            for of_exit in each
        ]
    values, checked = check_rows(logits, labels)
    per_exit = check_temperatures(temperatures, len(values))
    return [
        {
            "temperature": float(temperature),
            "rows": checked.size,
            "before": _quality(exit_logits, checked, 1.0),
            "after": _quality(exit_logits, checked, float(temperature)),
        }
        for exit_logits, temperature in zip(values, per_exit, strict=True)
    ]


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


def _quality(logits: Float, labels: Int, temperature: float) -> dict[str, float | None]:
    probs = softmax(logits, temperature=temperature)
    predictions = logits.argmax(axis=1)
    width, mass = (ece(probs, labels, binning=binning) for binning in ("width", "mass"))
    return {
        "accuracy": accuracy(predictions, labels),
        "macro_f1": macro_f1(predictions, labels),
        "nll": nll(logits, labels, temperature=temperature),
        "brier": brier(probs, labels),
        "failure_auroc": failure_auroc(probs, labels),
        "ece_width": width,
        "ece_width_minus_floor": width - ece_floor(probs, binning="width"),
        "ece_mass": mass,
        "ece_mass_minus_floor": mass - ece_floor(probs, binning="mass"),
    }


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
