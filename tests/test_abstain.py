"""The threshold of an answer at all, by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from ejax.calibration.abstain import answered, certainty, check_abstain, lowest_abstain
from ejax.calibration.metrics import softmax

SCORES = np.array([0.9, 0.5, 0.8, 0.7, 0.6], np.float32)
RIGHT = np.array([True, False, True, False, True])


@pytest.mark.parametrize(
    ("accuracy", "threshold", "count"),
    [(1.0, 0.75, 2), (0.76, 0.75, 2), (0.75, 0.55, 4), (0.7, 0.55, 4), (0.6, 0.0, 5)],
)
def test_by_hand(accuracy, threshold, count):
    """Surest first: right, right, wrong, right, wrong. The lowest that is enough, not the first
    that is not: 4 answers hold 3 right ones, though 3 hold only 2."""
    found = lowest_abstain(SCORES, RIGHT, accuracy)
    assert found == pytest.approx(threshold, abs=1e-6)
    point = answered(SCORES, RIGHT, found)
    assert point["answered"] == count
    assert point["rows"] == 5
    assert point["accuracy"] == RIGHT[np.float32(found) <= SCORES].mean() >= accuracy


def test_equal_certainties_are_answered_together():
    assert lowest_abstain([0.9, 0.8, 0.8], [True, True, False], 1.0) == pytest.approx(0.85)
    with pytest.raises(ValueError, match=r"right on 0\.9 of 3 rows; the most is 0\.6667, on the"):
        lowest_abstain([0.8, 0.8, 0.8], [True, True, False], 0.9)


def test_neighbours_in_float32_stay_apart():
    sure = np.nextafter(np.float32(1), np.float32(0))
    for scores in ([1.0, sure], [sure, np.nextafter(sure, np.float32(0))]):
        some = np.array(scores, np.float32)
        found = lowest_abstain(some, [True, False], 1.0)
        assert (some >= check_abstain(found)).tolist() == [True, False]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 1.0))
def test_no_lower_threshold_is_enough(seed, accuracy):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 30, 40).astype(np.float32) / 30
    right = rng.random(40) < scores
    right[scores.argmax()] = True
    levels = np.unique(scores)
    enough = [level for level in levels if right[scores >= level].mean() >= accuracy]
    if not enough:
        with pytest.raises(ValueError, match="no threshold makes the answers right"):
            lowest_abstain(scores, right, accuracy)
        return
    found = lowest_abstain(scores, right, accuracy)
    np.testing.assert_array_equal(scores >= check_abstain(found), scores >= min(enough))


def test_the_interval_is_wilsons():
    scores, right = np.full(50, 0.9, np.float32), np.arange(50) < 47
    point = answered(scores, right, 0.5)
    wanted = binomtest(47, 50).proportion_ci(method="wilson")
    assert (point["low"], point["high"]) == pytest.approx((wanted.low, wanted.high), abs=1e-9)
    none = answered(scores, right, 1.0)
    assert (none["answered"], none["accuracy"], none["low"]) == (0, None, None)


def test_certainty_is_the_largest_calibrated_probability():
    rng = np.random.default_rng(0)
    logits, temperatures = rng.normal(0, 90, (7, 5)), rng.uniform(0.1, 3, 7)
    found = certainty(logits.astype(np.float32), temperatures.astype(np.float32))
    wanted = softmax(logits / temperatures[:, None]).max(axis=1)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)  # float32 logits of up to 900


@pytest.mark.parametrize("threshold", [-0.1, 1.1, np.nan, "sure", None, [0.5, 0.5]])
def test_a_wrong_threshold_is_one_clear_sentence(threshold):
    with pytest.raises(ValueError, match="abstain must be a number from 0"):
        check_abstain(threshold)


@pytest.mark.parametrize("accuracy", [0, -1, 1.01, np.nan])
def test_a_wrong_accuracy_is_one_clear_sentence(accuracy):
    with pytest.raises(ValueError, match="a share of right answers, above 0 and at most 1"):
        lowest_abstain(SCORES, RIGHT, accuracy)
