"""What exit 0 tells the later exits."""

import io

import numpy as np
import pytest
from rich.console import Console
from scipy.special import softmax

from ejax.calibration.calibrate import Answers
from ejax.calibration.evidence import fit_evidence, with_evidence
from ejax.calibration.metrics import nll
from ejax.config import ExitConfig, TrainConfig
from ejax.training.outcome import calibrated


def two_views(rows: int, seed: int, share: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits [2, N, 3] of two views of a label, each wrong by itself; and the labels [N]."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 3, rows)
    truth = np.eye(3)[labels]
    zero = share * truth + draw.normal(0, 0.5, (rows, 3))
    later = 2 * truth + draw.normal(0, 1, (rows, 3))
    return np.stack([zero, later]).astype(np.float32), labels


def test_independent_views_add_up() -> None:
    """Gaussian views: the best logits are truth / variance, 4 and 2 times the two views'."""
    logits, labels = two_views(20_000, 0)
    weight = fit_evidence(logits, labels)
    assert weight.shape == (1,)
    # standard error of the ratio on as many rows, from the spread over 10 other seeds: 0.05
    assert weight[0] == pytest.approx(2.0, abs=0.12)
    other, truth = two_views(20_000, 1)
    mixed = with_evidence(other, weight)
    np.testing.assert_array_equal(mixed[0], other[0])
    right = (mixed.argmax(axis=-1) == truth[None]).mean(axis=1)
    assert right[1] > (other[1].argmax(axis=-1) == truth).mean() + 0.03
    assert nll(mixed[1] * 2, truth) < nll(other[1] * 2, truth)


def test_what_tells_nothing_weighs_nothing() -> None:
    weights = [fit_evidence(*two_views(400, seed, share=0.0))[0] for seed in range(40)]
    assert np.mean(np.array(weights) > 0) < 0.2  # chance of a gain above 1 by luck: 0.08
    assert max(weights) < 0.6


def test_rows_without_an_error_have_a_weight() -> None:
    logits, labels = two_views(30, 2)
    logits += 20 * np.eye(3)[labels].astype(np.float32)
    weight = fit_evidence(logits, labels)
    assert np.isfinite(weight).all()
    assert (softmax(with_evidence(logits, weight), axis=-1).argmax(axis=-1) == labels).all()


def outcome(share: float) -> tuple:
    """What a training makes of two exits, at 0 and 2; exit 0 knows so much of the label."""
    parts = {}
    for seed, name in enumerate(("dev_a", "dev_b")):
        logits, labels = two_views(400, seed, share)
        parts[name] = Answers(logits, labels, np.full(400, 8))
    console = Console(file=io.StringIO(), width=200)
    exits = ExitConfig((0, 2), 3)
    return parts, calibrated(
        exits, parts, TrainConfig(max_drop=0.0), exit0_cost=0.01, console=console
    )


def test_a_training_adds_what_pays() -> None:
    given, (exits, evidence, parts, chosen) = outcome(1.0)
    assert exits.layers == (0, 2)
    assert evidence.tolist() == fit_evidence(given["dev_a"].logits, given["dev_a"].labels).tolist()
    assert evidence[0] > 1
    wanted = with_evidence(given["dev_b"].logits, evidence)
    np.testing.assert_array_equal(parts["dev_b"].logits, wanted)
    assert len(chosen["temperatures"]) == 2


def test_without_exit_0_nothing_is_added() -> None:
    given, (exits, _, parts, chosen) = outcome(0.0)
    assert exits.layers == (2,)
    np.testing.assert_array_equal(parts["dev_b"].logits, given["dev_b"].logits[1:])
    assert len(chosen["temperatures"]) == 1
