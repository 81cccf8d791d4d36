"""How honest an exit is: ECE, its floor and its bounds, failure AUROC; and all metrics of a bundle.

Everything is computed in float64 with NumPy. Axes: E exits, N rows, C classes.
"""

from typing import Any, Literal

import numpy as np

from ejax.calibration import metrics
from ejax.calibration.metrics import Float, Int
from ejax.errors import UserError
from ejax.inference.policy import check_calibration, check_temperatures
from ejax.tasks import Task

Binning = Literal["width", "mass"]


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
    confidence = metrics.check_probs(probs).max(axis=1)
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
    values, checked = metrics.check_rows(np.asarray(logits)[None], labels)

    def excess(temperature: float, samples: int) -> float:
        probs = metrics.softmax(values[0], temperature=temperature)
        return ece(probs, checked) - ece_floor(probs, samples=samples)

    confidence, correct = _top(metrics.softmax(values[0], temperature=temperature), checked)
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
    values = metrics.check_probs(probs)
    checked = metrics.check_labels(labels, *values.shape)
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
            {"rows": len(labels), "after": metrics.other_quality(task, *of_exit, labels)}
            for of_exit in each
        ]
    values, checked = metrics.check_rows(logits, labels)
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


def _quality(logits: Float, labels: Int, temperature: float) -> dict[str, float | None]:
    probs = metrics.softmax(logits, temperature=temperature)
    predictions = logits.argmax(axis=1)
    width, mass = (ece(probs, labels, binning=binning) for binning in ("width", "mass"))
    return {
        "accuracy": metrics.accuracy(predictions, labels),
        "macro_f1": metrics.macro_f1(predictions, labels),
        "nll": metrics.nll(logits, labels, temperature=temperature),
        "brier": metrics.brier(probs, labels),
        "failure_auroc": failure_auroc(probs, labels),
        "ece_width": width,
        "ece_width_minus_floor": width - ece_floor(probs, binning="width"),
        "ece_mass": mass,
        "ece_mass_minus_floor": mass - ece_floor(probs, binning="mass"),
    }
