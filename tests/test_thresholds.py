"""Default thresholds against hand-made rows, `select_exit` and a search over every candidate."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ejax.calibration.metrics import softmax
from ejax.calibration.thresholds import CANDIDATES, FULL, default_threshold, operating_point
from ejax.inference.policy import select_exit

EXITS, ROWS, CLASSES = 3, 17, 5
LAYERS = (1, 4, 6)


def rows(seed, exits=EXITS, n=ROWS, classes=CLASSES):
    """Exits that get better with depth."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    logits = rng.normal(size=(exits, n, classes)).astype(np.float32) * 2
    logits[:, np.arange(n), labels] += np.linspace(1, 4, exits)[:, None]
    temperatures = rng.uniform(0.5, 2, exits).astype(np.float32)
    return logits, labels, temperatures, rng.integers(1, 129, n)


def binary(confidences):
    """Logits [E, N, 2] whose class 0 has the given probabilities [E, N]."""
    p = np.asarray(confidences)
    return np.stack([np.log(p), np.log(1 - p)], axis=-1).astype(np.float32)


# Numbers by hand. Row 0 is short and easy, row 1 long and unsure, row 2 sure and wrong early.
HAND = binary([[0.905, 0.605, 0.805], [0.99, 0.95, 0.2]])
HAND_LABELS, HAND_TOKENS, HAND_LAYERS = [0, 0, 1], [10, 70, 20], (2, 6)


def hand(threshold):
    return operating_point(HAND, HAND_LABELS, [1, 1], HAND_LAYERS, HAND_TOKENS, threshold)


def test_operating_point_by_hand():
    point = hand(0.7)  # rows 0 and 2 leave at layer 2
    assert point["mean_depth"] == pytest.approx((10 * 2 + 70 * 6 + 20 * 2) / 100)
    assert point["cost"] == pytest.approx(4.8 / 6)
    assert point["accuracy"] == pytest.approx(2 / 3)
    assert point["full_accuracy"] == 1
    assert point["drop"] == pytest.approx(100 / 3)
    assert point["drop_low"] < point["drop"] < point["drop_high"]
    assert point["exit_share"] == pytest.approx([2 / 3, 1 / 3])
    assert point["rows"] == 3


def test_limits_of_the_threshold():
    first, full = hand(0.0), hand(FULL)
    assert first["mean_depth"] == 2
    assert first["exit_share"] == [1, 0]
    assert full["mean_depth"] == 6
    assert full["cost"] == 1
    assert full["drop"] == 0
    assert full["drop_low"] < 0 < full["drop_high"]


def chosen(max_drop):
    return default_threshold(HAND, HAND_LABELS, [1, 1], HAND_LAYERS, HAND_TOKENS, max_drop=max_drop)


def test_default_threshold_by_hand():
    # Above 0.805 row 2 goes on and nothing is lost; row 0 leaves up to 0.905. Of the equal
    # candidates 0.81 to 0.9 the highest.
    safe = chosen(0.5)
    assert safe["threshold"] == 0.9
    assert safe["drop"] == 0
    assert safe["mean_depth"] == pytest.approx((10 * 2 + 90 * 6) / 100)
    # A third of the rows may be lost: everyone leaves at once, up to 0.605.
    bold = chosen(34)
    assert bold["threshold"] == 0.6
    assert bold["mean_depth"] == 2


def test_a_drop_of_exactly_max_drop_is_allowed():
    # One row of 200 is 0.5 points, which floating point must not push over the edge.
    p = np.full((2, 200), 0.99)
    labels = np.zeros(200, np.int64)
    p[1, :] = 0.999
    labels[-1], p[1, -1] = 1, 0.001
    point = default_threshold(binary(p), labels, [1, 1], (1, 2), np.full(200, 7), max_drop=0.5)
    assert point["drop"] == pytest.approx(0.5)
    assert point["mean_depth"] == 1
    stricter = default_threshold(binary(p), labels, [1, 1], (1, 2), np.full(200, 7), max_drop=0.4)
    assert stricter["threshold"] == FULL


def test_errors_that_happen_to_cancel_out_do_not_choose():
    # Leaving at once, up to 0.8, wins row 0 and loses row 1: no drop by the labels. But full
    # depth is 90 % sure of both rows, and so expects to lose (0.9 - 0.1) * 2 of 3 rows.
    logits = binary([[0.805, 0.195, 0.905], [0.1, 0.9, 0.9]])
    point = default_threshold(logits, [0, 0, 0], [1, 1], (1, 2), [5, 6, 7], max_drop=50)
    assert point["threshold"] == 0.9
    assert (point["drop"], point["expected_drop"]) == (0, 0)
    bold = default_threshold(logits, [0, 0, 0], [1, 1], (1, 2), [5, 6, 7], max_drop=54)
    assert bold["threshold"] == 0.8
    assert bold["drop"] == 0
    assert bold["expected_drop"] == pytest.approx(100 * 1.6 / 3, rel=1e-6)


def test_full_model_where_every_early_exit_loses():
    logits = binary([[0.9999] * 4, [0.001] * 4])
    point = default_threshold(logits, [1, 1, 1, 1], [1, 1], (3, 12), [5, 6, 7, 8])
    assert point["threshold"] == FULL
    assert point["mean_depth"] == 12
    assert point["drop"] == 0


def test_full_model_is_preferred_to_a_threshold_nobody_reaches():
    labels = [1, 2, 1, 2]
    # Exit 1 scores 1/3 and is wrong everywhere.
    logits = np.stack([np.zeros((4, 3), np.float32), np.eye(3, dtype=np.float32)[labels]])
    point = default_threshold(logits, labels, [1, 1], (1, 2), [5, 6, 7, 8])
    assert point["threshold"] == FULL
    assert point["exit_share"] == [0, 1]


def test_a_score_equal_to_the_threshold_leaves():
    logits = np.zeros((2, 4, 2), np.float32)  # every score is exactly 0.5
    point = default_threshold(logits, [0, 0, 1, 1], [1, 1], (1, 2), [5, 6, 7, 8])
    assert point["threshold"] == 0.5
    assert point["exit_share"] == [1, 0]


# Against the plain way


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.5, 6.0, 30.0]))
def test_no_candidate_is_faster_or_as_fast_and_surer(seed, max_drop):
    logits, labels, temperatures, tokens = rows(seed)
    point = default_threshold(logits, labels, temperatures, LAYERS, tokens, max_drop=max_drop)
    assert max(point["drop"], point["expected_drop"]) <= max_drop + 1e-9
    taken = {t: np.asarray(select_exit(logits, t, temperatures).exit) for t in (*CANDIDATES, FULL)}
    right = logits.argmax(axis=2) == labels
    everyone = np.arange(ROWS)
    depth = {t: (tokens * np.array(LAYERS)[exits]).sum() for t, exits in taken.items()}
    lost = {t: right[-1].sum() - right[exits, everyone].sum() for t, exits in taken.items()}
    p = softmax(logits[-1], temperature=temperatures[-1])
    label = logits.argmax(axis=2)
    expected = {
        t: (p[everyone, label[-1]] - p[everyone, label[exits, everyone]]).sum()
        for t, exits in taken.items()
    }
    lost = {t: max(lost[t], expected[t]) for t in taken}
    best = min((t for t in taken if 100 * lost[t] <= max_drop * ROWS), key=lambda t: (depth[t], -t))
    assert point["threshold"] == best


@pytest.mark.parametrize("seed", range(3))
def test_default_threshold_is_an_operating_point(seed):
    logits, labels, temperatures, tokens = rows(seed, n=211)
    point = default_threshold(logits, labels, temperatures, LAYERS, tokens, max_drop=15)
    max_drop = point.pop("max_drop")
    assert max_drop == 15
    assert 0 < point["exit_share"][0] < 1
    args = logits, labels, temperatures, LAYERS, tokens, point["threshold"]
    assert operating_point(*args) == point


def test_long_rows_weigh_more():
    logits, labels, temperatures, _ = rows(1)
    leaves = np.asarray(select_exit(logits, 0.6, temperatures).exit) == 0
    assert 0 < leaves.sum() < ROWS
    early_long = np.where(leaves, 100, 1)
    cheap = operating_point(logits, labels, temperatures, LAYERS, early_long, 0.6)
    dear = operating_point(logits, labels, temperatures, LAYERS, 101 - early_long, 0.6)
    assert cheap["accuracy"] == dear["accuracy"]
    assert cheap["mean_depth"] < dear["mean_depth"]


def test_one_exit_is_the_full_model():
    logits, labels, temperatures, tokens = rows(5, exits=1)
    point = default_threshold(logits, labels, temperatures, (6,), tokens)
    assert point["threshold"] == FULL
    assert point["mean_depth"] == 6


def test_result_goes_into_json():
    logits, labels, temperatures, tokens = rows(7)
    point = default_threshold(logits, labels, temperatures, LAYERS, tokens)
    assert json.loads(json.dumps(point, allow_nan=False)) == point
    assert type(point["threshold"]) is float
    assert all(math.isfinite(value) for value in point.values() if isinstance(value, float))


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": (1, 4)}, r"one layer per exit \(3\)\. Got 2"),
        ({"layers": (4, 1, 6)}, "exit layers must be ascending"),
        ({"tokens": np.ones(4, int)}, r"tokens must be 17 integers.*Got shape \(4,\)"),
        ({"tokens": np.zeros(ROWS, int)}, "at least 1.*smallest 0"),
        ({"tokens": np.ones(ROWS)}, "dtype float64"),
        ({"temperatures": [1.0, 0.0, 1.0]}, "temperatures must be 3 positive numbers"),
        ({"labels": np.full(ROWS, 9)}, r"labels must be in 0\.\.4\. Got 9"),
        ({"rule": "certainty"}, "rule must be one of"),
    ],
)
def test_wrong_input_is_one_clear_sentence(change, message):
    logits, labels, temperatures, tokens = rows(0)
    given = {"labels": labels, "temperatures": temperatures, "layers": LAYERS, "tokens": tokens}
    given |= change
    with pytest.raises(ValueError, match=message):
        default_threshold(logits, **given)
    with pytest.raises(ValueError, match=message):
        operating_point(logits, **given, threshold=0.9)


def test_wrong_settings_are_one_clear_sentence():
    args = *rows(0)[:3], LAYERS, rows(0)[3]
    with pytest.raises(ValueError, match=r"max_drop must be 0 points or above\. Got -1"):
        default_threshold(*args, max_drop=-1)
    with pytest.raises(ValueError, match="threshold must be one number"):
        operating_point(*args, [0.9, 0.9, 0.9])
    with pytest.raises(ValueError, match="thresholds must be numbers"):
        operating_point(*args, math.nan)
