"""One temperature per exit, fitted by NLL. Axes: E exits, N rows, C classes."""

import math
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import softmax

from ejax.calibration.metrics import Float, Int, check_rows, nll

LOWEST, HIGHEST = 0.05, 20.0


def fit_temperatures(logits: Any, labels: Any) -> npt.NDArray[np.float32]:
    """The temperature of each exit that minimises the NLL of `softmax(logits / T)`.

    Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017), section 4.2, one exit
    at a time as in Schwartz et al. (ACL 2020), section 3.3. The NLL is convex in 1 / T, not
    in T, so the fit is the root of its slope in 1 / T, within [0.05, 20]. Of an exit without
    a wrong row the NLL falls as long as T does: there each label counts as
    (N + 1) / (N + 2) likely, the others as equally likely (Platt, 1999, section 2.2).

    Args:
      logits: <float>[E, N, C], finite.
      labels: <int>[N] in 0..C-1.

    Returns:
      float32 [E], positive; `nll(logits[e], labels, temperature=T[e])` is never above the
      one at temperature 1.

    Raises:
      ValueError: on no rows, NaN or infinite logits, or a label outside the classes.

    Warns:
      UserWarning: naming an exit whose temperature is at a bound or is not determined.
    """
    values, checked = check_rows(logits, labels)
    fitted = np.ones(len(values), np.float32)
    for e, exit_logits in enumerate(values):
        fitted[e] = _fit(e, exit_logits, checked)
    return fitted


def _fit(exit: int, logits: Float, labels: Int) -> float:
    margins = logits - logits[np.arange(labels.size), labels][:, None]
    still_falls = _slope(margins, 1 / LOWEST) <= 0
    already_rises = _slope(margins, 1 / HIGHEST) >= 0
    if still_falls and already_rises:
        _warn(exit, "its NLL does not depend on the temperature, which stays 1", logits, labels)
        return 1.0
    if still_falls and (margins <= 0).all():
        rows, classes = logits.shape
        others = margins.sum(axis=1).mean() / (classes - 1) / (rows + 2)
        temperature = _root(margins, others)
        what = f"its temperature is fitted as if one label in {rows + 2} were wrong"
        _warn(exit, what, logits, labels)
    elif still_falls or already_rises:
        temperature = LOWEST if still_falls else HIGHEST
        _warn(exit, f"its temperature stops at the bound {temperature:g}", logits, labels)
    else:
        temperature = _root(margins)
    temperature = float(np.float32(temperature))
    # Rounding to float32 can undo the last bit of the gain when the best is close to 1.
    worse = nll(logits, labels, temperature=temperature) > nll(logits, labels)
    return 1.0 if worse else temperature


def _slope(margins: Float, beta: float) -> float:
    """d NLL / d beta at beta = 1 / T; `margins` are the logits minus the label's, [N, C]."""
    return float((softmax(beta * margins, axis=1) * margins).sum(axis=1).mean())


def _root(margins: Float, expected: float = 0.0) -> float:
    """The temperature at which the slope is 0, or that of labels whose margin is `expected`."""

    def above(log_temperature: float) -> float:
        return _slope(margins, math.exp(-log_temperature)) - expected

    low, high = math.log(LOWEST), math.log(HIGHEST)
    # The slope falls as T rises; what is expected of it may lie outside the bounds.
    if above(low) <= 0:
        return LOWEST
    if above(high) >= 0:
        return HIGHEST
    return math.exp(brentq(above, low, high, xtol=1e-12))  # far below a float32 step


def _warn(exit: int, what: str, logits: Float, labels: Int) -> None:
    wrong = int((logits.argmax(axis=1) != labels).sum())
    warnings.warn(
        f"exit {exit} (counted from 0): {what}, with {wrong} of {labels.size} rows wrong; its "
        "confidences may mislead. Fit on more rows, or train this exit longer.",
        stacklevel=4,
    )
