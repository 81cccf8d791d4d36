"""Thresholds against hand-made rows, `select_exit`, and scipy's minimum of the same fit."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from ejax.calibration import thresholds
from ejax.calibration.metrics import softmax
from ejax.calibration.thresholds import FULL, default_thresholds, operating_point
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


def same_everywhere(exits, count=200):
    """Every row alike: probabilities of class 0, one per exit."""
    return binary(np.repeat(np.array(exits)[:, None], count, axis=1))


def default(logits, labels, layers, **settings):
    exits, count, _ = logits.shape
    return default_thresholds(logits, labels, [1] * exits, layers, np.full(count, 7), **settings)


def test_per_exit_by_hand():
    """One number does for all exits too."""
    assert hand([0.7, 0.0]) == hand(0.7) | {"threshold": [0.7, 0.0]}


def test_a_drop_of_exactly_max_drop_is_allowed():
    # One row of 200 is 0.5 points, which floating point must not push over the edge.
    logits = same_everywhere([0.99, 0.999])
    logits[1, -1] = logits[1, -1, ::-1]
    labels = np.zeros(200, np.int64)
    labels[-1] = 1
    point = default(logits, labels, (1, 2), max_drop=0.5)
    assert point["drop"] == pytest.approx(0.5)
    assert point["mean_depth"] == 1
    stricter = default(logits, labels, (1, 2), max_drop=0.4)
    assert stricter["threshold"] == [FULL, FULL]


def test_errors_that_happen_to_cancel_out_do_not_choose():
    """An exit that changes two rows in ten, one for the better, has no drop by the labels."""
    logits = same_everywhere([0.8, 0.9], 10)
    logits[0, :2] = logits[0, :2, ::-1]
    labels = [0, 1, *[0] * 8]
    point = default(logits, labels, (1, 2), max_drop=15)
    assert point["threshold"] == [FULL, FULL]
    bold = default(logits, labels, (1, 2), max_drop=17)  # (0.9 - 0.1) * 2 of 10 rows
    assert bold["exit_share"] == [1, 0]
    assert (bold["drop"], bold["expected_drop"]) == (0, pytest.approx(16, rel=1e-6))


def test_unsure_rows_leave_where_more_layers_would_not_help():
    """Exit 2 answers as the last one does, exit 1 differs where it is unsure."""
    rng = np.random.default_rng(0)
    p = rng.uniform(0.5, 1, 400)
    first = np.where((p < 0.8) & (rng.random(400) < 0.4), 1 - p, p)
    labels = (rng.random(400) > p).astype(np.int64)
    point = default(binary([first, p, p]), labels, (1, 2, 9), max_drop=1.0)
    one, two, _ = point["threshold"]
    assert 0.75 < one < 1
    assert two <= 0.5
    assert point["exit_share"][2] == 0
    assert 0 < point["exit_share"][0] < 1
    # One number for all exits would have kept the unsure ones to the end.
    single = operating_point(
        binary([first, p, p]), labels, [1] * 3, (1, 2, 9), np.full(400, 7), one
    )
    assert single["mean_depth"] > 2 * point["mean_depth"]


def test_full_model_where_every_early_exit_loses():
    point = default(same_everywhere([0.9999, 0.001], 4), [1, 1, 1, 1], (3, 12))
    assert point["threshold"] == [FULL, FULL]
    assert point["mean_depth"] == 12
    assert point["drop"] == 0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.5, 6.0, 30.0]))
def test_what_is_chosen_keeps_within_max_drop(seed, max_drop):
    logits, labels, temperatures, tokens = rows(seed)
    point = default_thresholds(logits, labels, temperatures, LAYERS, tokens, max_drop=max_drop)
    assert max(point["drop"], point["expected_drop"]) <= max_drop + 1e-9
    taken = np.asarray(select_exit(logits, point["threshold"], temperatures).exit)
    right = logits.argmax(axis=2) == labels
    p = softmax(logits[-1], temperature=temperatures[-1])
    label, row = logits.argmax(axis=2), np.arange(ROWS)
    lost = right[-1].mean() - right[taken, row].mean()
    expected = (p[row, label[-1]] - p[row, label[taken, row]]).mean()
    assert point["drop"] == pytest.approx(100 * lost)
    assert point["expected_drop"] == pytest.approx(100 * expected, abs=1e-5)
    more = default_thresholds(logits, labels, temperatures, LAYERS, tokens, max_drop=max_drop + 9)
    assert more["mean_depth"] <= point["mean_depth"]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3])
def test_the_fit_is_the_minimum(share):
    """Of the cross-entropy and its prior, as scipy finds it; also where nothing is lost."""
    rng = np.random.default_rng(1)
    scores = rng.uniform(0.5, 1, 300)
    lost = np.where(rng.random(300) < share * (2 - 2 * scores), rng.uniform(0, 1, 300), 0)
    x = np.log(scores) - np.log1p(-scores)

    def objective(w):
        z = w[0] + w[1] * x
        return (np.logaddexp(0, z) - lost * z).sum() + 5e-4 * w[0] ** 2 + 0.5 * (w[1] + 1) ** 2

    found = minimize(objective, [-3.0, -1.0], tol=1e-12)
    ours = thresholds._fit_loss(scores, lost)
    assert objective(ours) <= found.fun + 1e-9
    at = thresholds._score_at(ours, 0.01)
    if 0 < at < 1:
        z = ours[0] + ours[1] * (np.log(at) - np.log1p(-at))
        assert 1 / (1 + np.exp(-z)) == pytest.approx(0.01, rel=0.02)  # four decimals of a score


@pytest.mark.parametrize("seed", range(3))
def test_the_default_is_an_operating_point(seed):
    logits, labels, temperatures, tokens = rows(seed, n=211)
    point = default_thresholds(logits, labels, temperatures, LAYERS, tokens, max_drop=15)
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
    point = default_thresholds(logits, labels, temperatures, (6,), tokens)
    assert point["threshold"] == [FULL]
    assert point["mean_depth"] == 6


def test_result_goes_into_json():
    logits, labels, temperatures, tokens = rows(7)
    point = default_thresholds(logits, labels, temperatures, LAYERS, tokens)
    assert json.loads(json.dumps(point, allow_nan=False)) == point
    assert [type(one) for one in point["threshold"]] == [float] * EXITS
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
        default_thresholds(logits, **given)
    with pytest.raises(ValueError, match=message):
        operating_point(logits, **given, threshold=0.9)


def test_wrong_settings_are_one_clear_sentence():
    args = *rows(0)[:3], LAYERS, rows(0)[3]
    with pytest.raises(ValueError, match=r"max_drop must be 0 points or above\. Got -1"):
        default_thresholds(*args, max_drop=-1)
    with pytest.raises(ValueError, match="threshold must be one number, or one per exit"):
        operating_point(*args, [[0.9, 0.9, 0.9]])
    with pytest.raises(ValueError, match="thresholds must be numbers"):
        operating_point(*args, math.nan)
