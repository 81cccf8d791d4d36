"""The fits behind thresholds per exit: chances along a score, chances by two classifiers.

Axes: N rows, C classes, G scores of a grid, K weights.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit, softmax

from ejax.calibration.metrics import Float, Int

# How sure it is, before labels speak, that full depth's probabilities need no exit's. Of 4, 30, 100
# and 300: asked for 0.5 points on 436 rows, 4 lost up to 0.9 with a spread of 0.1 to 1.4, 30 up to
# 0.7 with 0.1 to 1.0; 100 and 300 lost no less on the worst of eight sets, and ran deeper on six.
PRIOR = 30.0
LEAST = 1e-6  # a saturated score is as sure as one row in a million


def curve(grid: Float, scores: Float, share: Float) -> Float:
    """The share at each score of `grid`: logistic(intercept + slope * logit(score)), fitted.

    A weak prior, a slope of -1 and an intercept of 0, keeps it finite where nothing is lost.
    """
    x = np.stack([np.ones_like(scores, np.float64), _logit(scores)], axis=1)
    intercept, slope = _logistic(
        x, share, np.array([0.0, -1.0]), np.array([1e-3, 1.0]), np.array([-2.0, -0.5])
    )
    return np.asarray(expit(intercept + slope * _logit(grid)))


def pooled_labels(full: Float, own: Float, true: Any) -> Float:
    """Of several labels at once, as `pooled`: probabilities [N, C] from the log-odds of each.

    One logistic regression for all labels on both log-odds and a constant, its prior that of
    `pooled`.

    Args:
      true: bool [N, C].
    """
    x = np.stack([full.ravel(), own.ravel(), np.ones(full.size)], axis=1).astype(np.float64)
    middle = np.array([1.0, 0.0, 0.0])
    weights = _logistic(x, true.ravel().astype(float), middle, np.full(3, PRIOR), middle)
    return np.asarray(expit(x @ weights).reshape(full.shape))


def pooled_numbers(full: Float, own: Float, numbers: Float) -> Float:
    """Of numbers, what they are expected to be [N] by full depth and an exit together.

    Least squares on both. The prior, worth `PRIOR` rows, is that full depth alone knows.

    Args:
      full, own, numbers: [N], of mean 0 and variance 1.
    """
    x = np.stack([full, own])
    alone = np.array([np.mean(full * numbers), 0.0])
    return np.asarray(np.linalg.solve(x @ x.T + PRIOR * np.eye(2), x @ numbers + PRIOR * alone) @ x)


def pooled(full: Float, own: Float, labels: Int) -> Float:
    """Probabilities [N, C] by full depth and an exit together, from the log-probabilities of each.

    p ~ full^a own^b (a logarithmic opinion pool: Genest and Zidek, "Combining Probability
    Distributions", Statistical Science 1, 1986), with the a and b likeliest by the labels. Their
    prior, of precision `PRIOR`, is a = 1 and b = 0: without evidence full depth alone knows.
    """
    x = np.ascontiguousarray(np.stack([full.T, own.T]))  # [2, C, N]: sums over rows are fast
    rows = np.arange(labels.size)
    truth = x[:, labels, rows]
    middle = np.array([1.0, 0.0])

    def probs_at(weights: Float) -> Float:
        return np.asarray(softmax(weights[0] * x[0] + weights[1] * x[1], axis=0))

    def at(weights: Float) -> tuple[float, Float, Float]:
        p, off = probs_at(weights), weights - middle
        weighted = x * p
        mean = weighted.sum(axis=1)
        value = PRIOR * (off**2).sum() / 2 - np.log(np.maximum(p[labels, rows], 1e-300)).sum()
        curvature = weighted.reshape(2, -1) @ x.reshape(2, -1).T - mean @ mean.T
        gradient = (mean - truth).sum(axis=1) + PRIOR * off
        return float(value), gradient, curvature + PRIOR * np.eye(2)

    return probs_at(_minimum(at, middle)).T


def _logistic(x: Float, share: Float, middle: Float, precision: Float, start: Float) -> Float:
    """Weights [K] of a logistic regression of `share` [N] on `x` [N, K], under a normal prior."""

    def at(weights: Float) -> tuple[float, Float, Float]:
        z, off = x @ weights, weights - middle
        p = expit(z)
        value = (np.logaddexp(0, z) - share * z).sum() + (precision * off**2).sum() / 2
        curvature = (x * (p * (1 - p))[:, None]).T @ x + np.diag(precision)
        return float(value), x.T @ (p - share) + precision * off, curvature

    return _minimum(at, start)


def _minimum(at: Callable[[Float], tuple[float, Float, Float]], start: Float) -> Float:
    """Of a convex function; `at` gives its value, gradient and curvature."""
    found = minimize(
        lambda weights: at(weights)[:2], start, jac=True, hess=lambda weights: at(weights)[2],
        method="trust-exact", options={"gtol": 1e-8},
    )  # fmt: skip
    return np.asarray(found.x)


def _logit(p: Any) -> Any:
    return logit(np.clip(np.asarray(p, np.float64), LEAST, 1 - LEAST))
