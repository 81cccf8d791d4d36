"""The exit rule, exactly, on hand-made logits; the engine is tested against it."""

import math

import numpy as np
import pytest
from reference import first_sure

from ejax.inference.policy import select_exit
from ejax.tasks import Task

confidence = Task(2).score
pytestmark = pytest.mark.usefixtures("strict")


def binary(gaps):
    """Logits [E, N, 2] with class 0 ahead by gaps [E, N]; the row and exit can be told apart."""
    gaps = np.asarray(gaps, np.float32)
    low = np.arange(gaps.size, dtype=np.float32).reshape(gaps.shape) / 16
    return np.stack([low + gaps, low], axis=-1)


def exits(logits, thresholds, temperatures=None):
    decision = select_exit(logits, thresholds, temperatures)
    exit = np.asarray(decision.exit)
    # Whatever is decided, logits and score are those of the exit taken.
    own = np.asarray(logits, np.float32)[exit, np.arange(exit.size)]
    np.testing.assert_array_equal(decision.logits, own)
    scale = np.ones(len(logits)) if temperatures is None else np.asarray(temperatures)
    scale = np.broadcast_to(scale, len(logits)).astype(np.float32)
    np.testing.assert_array_equal(decision.score, confidence(own, scale[exit]))
    assert decision.exit.dtype == np.int32
    assert decision.score.dtype == decision.logits.dtype == np.float32
    return exit.tolist()


EASY, HARD = 3.0, 0.1  # gaps: confidence 0.953 and 0.525
LOGITS = binary([[EASY, HARD, HARD, 0], [HARD, EASY, HARD, 0], [HARD, HARD, EASY, 0]])


def test_confidence_by_hand():
    scores = confidence(np.array([[0, 0], [0, math.log(3)]], np.float32), np.float32(1))
    np.testing.assert_allclose(scores, [0.5, 0.75], rtol=1e-6)
    three = np.array([math.log(1), math.log(4), math.log(9)], np.float32)
    np.testing.assert_allclose(confidence(three, np.float32(0.5)), 81 / 98, rtol=1e-6)
    np.testing.assert_allclose(confidence(three, np.float32(2)), 3 / 6, rtol=1e-6)


def test_confidence_of_huge_logits_is_finite():
    huge = np.array([[3e38, -3e38], [1e30, 1e30]], np.float32)
    scores = confidence(huge / np.float32(4), np.float32(0.5))
    np.testing.assert_array_equal(scores, [1.0, 0.5])


def test_nothing_is_sure_of_what_is_not_finite():
    broken = binary([[np.nan], [2.0]])
    assert np.asarray(select_exit(broken, 0.5).exit) == [1]


def test_each_row_leaves_at_its_first_sure_exit():
    """And a row unsure everywhere takes the last exit, with its logits and not zeros."""
    assert exits(LOGITS, 0.9) == [0, 1, 2, 2]


def test_limits():
    assert exits(LOGITS, 0.0) == [0, 0, 0, 0]
    assert exits(LOGITS, -1) == [0, 0, 0, 0]
    assert exits(LOGITS, 1.5) == [2, 2, 2, 2]
    assert exits(LOGITS, math.inf) == [2, 2, 2, 2]


def test_a_score_equal_to_the_threshold_leaves():
    scores = np.asarray(confidence(LOGITS, np.ones((3, 1), np.float32)))
    equal = np.full((4, 3), 2, np.float32)
    equal[0, 0], equal[1, 1], equal[3, 1] = scores[0, 0], scores[1, 1], scores[1, 3]
    assert exits(LOGITS, equal) == [0, 1, 2, 1]
    above = np.nextafter(equal, np.float32(3))
    assert exits(LOGITS, above) == [2, 2, 2, 2]
    # A tie of classes is exactly a half.
    assert exits(LOGITS, 0.5)[3] == 0
    assert exits(LOGITS[:, 3:], np.nextafter(np.float32(0.5), np.float32(1))) == [2]


def test_a_saturated_score_leaves_at_one_and_not_above():
    saturated = binary([[200.0, 1], [200, 1]])
    assert np.asarray(select_exit(saturated, 1.0).score)[0] == 1
    assert exits(saturated, 1.0) == [0, 1]
    for above in (np.nextafter(np.float32(1), np.float32(2)), 1 + 1e-9):
        assert exits(saturated, above) == [1, 1]


def test_a_threshold_is_compared_as_float32():
    """0.9 in float64 is below 0.9 in float32: one rounding for everybody."""
    logits = binary([[2.0], [2.0]])
    score = np.asarray(select_exit(logits, 0.0).score)[0]
    assert exits(logits, float(score)) == [0]
    assert exits(logits, float(score) + 1e-9) == [0]  # rounds back to the score


def test_thresholds_per_exit_and_per_row():
    assert exits(LOGITS, [2, 0.9, 0]) == [2, 1, 2, 2]
    rows = [[0.9, 0.9, 0.9], [2, 2, 2], [0, 0, 0], [2, 0, 2]]
    assert exits(LOGITS, rows) == [0, 2, 0, 1]


def test_a_bare_vector_is_per_exit_even_for_as_many_rows():
    square = LOGITS[:, :3]
    assert exits(square, [2, 2, 0]) == [2, 2, 2]
    assert exits(square, [2, 0, 0]) == [1, 1, 1]
    assert exits(square, np.array([[2, 2, 2], [2, 0, 2], [0, 2, 2]])) == [2, 1, 0]


def test_the_last_threshold_is_not_read():
    assert exits(LOGITS, [0.9, 0.9, 2]) == exits(LOGITS, [0.9, 0.9, 0]) == [0, 1, 2, 2]


def test_one_exit_takes_everyone():
    assert exits(LOGITS[:1], 2.0) == [0, 0, 0, 0]


def test_temperature_moves_decisions_the_right_way():
    sharp, flat = [0.02, 1, 1], [10, 10, 1]
    assert exits(LOGITS, 0.9, sharp) == [0, 0, 0, 2]  # below 1: surer
    assert exits(LOGITS, 0.9, flat) == [2, 2, 2, 2]  # above 1: less sure
    assert exits(LOGITS, 0.9, 1) == exits(LOGITS, 0.9, None) == [0, 1, 2, 2]
    assert exits(LOGITS, 0.9, [10, 1, 1]) == [2, 1, 2, 2]  # of its own exit only


def test_a_row_by_row_loop_agrees():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(5, 203, 7)).astype(np.float32) * 3
    temperatures = rng.uniform(0.5, 2, 5).astype(np.float32)
    thresholds = rng.uniform(0.3, 1, (203, 5)).astype(np.float32)
    exit, score, own = first_sure(logits, thresholds, temperatures)
    assert len(set(exit)) == 5
    decision = select_exit(logits, thresholds, temperatures)
    np.testing.assert_array_equal(decision.exit, exit)
    np.testing.assert_allclose(decision.score, score, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(decision.logits, own)


@pytest.mark.parametrize(
    ("thresholds", "text"),
    [
        (math.nan, "thresholds must be numbers: one, one per exit.*Got nan"),
        ([0.5, math.nan, 0.5], "thresholds must be numbers"),
        ("sure", "thresholds must be numbers.*Got 'sure'"),
        (None, "thresholds must be numbers.*Got None"),
        ([0.5, None, 0.5], "thresholds must be numbers"),
        ([[0.5], [0.5, 0.5]], "thresholds must be numbers"),
        ([0.5, 0.5], r"thresholds must have shape \(\), \(3,\) or \(4, 3\). Got \(2,\)"),
        ([0.5] * 4, r"thresholds must have shape .* Got \(4,\)"),  # one per row is not meant
        (np.full((3, 4), 0.5), r"thresholds must have shape .* Got \(3, 4\)"),
        ([], r"thresholds must have shape .* Got \(0,\)"),
    ],
)
def test_wrong_thresholds(thresholds, text):
    with pytest.raises(ValueError, match=text):
        select_exit(LOGITS, thresholds)


@pytest.mark.parametrize(
    "temperatures", [0, -1, [1, 0, 1], [1, -2, 1], [1, 1], [[1, 1, 1]], math.nan, math.inf, "warm"]
)
def test_wrong_temperatures(temperatures):
    with pytest.raises(ValueError, match="temperatures must be 3 positive numbers"):
        select_exit(LOGITS, 0.9, temperatures)


def test_logits_of_a_wrong_rank():
    with pytest.raises(ValueError, match="logits"):
        select_exit(LOGITS[0], 0.9)
