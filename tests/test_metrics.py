"""Metrics against numbers worked out by hand, scikit-learn and a published table."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from ejax.calibration import honesty, metrics

ROWS, CLASSES = 17, 5


@pytest.fixture
def rows():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(ROWS, CLASSES)).astype(np.float32) * 2
    labels = rng.integers(0, CLASSES, ROWS).astype(np.int32)
    return logits, labels


def probs_of(confidences):
    """Two classes; class 0 has the given probability."""
    confidences = np.asarray(confidences, float)
    return np.stack([confidences, 1 - confidences], axis=1)


# Numbers by hand


def test_softmax_and_nll_by_hand():
    logits = np.log([[1.0, 3.0], [4.0, 1.0]])
    np.testing.assert_allclose(metrics.softmax(logits), [[0.25, 0.75], [0.8, 0.2]], rtol=1e-14)
    expected = -(math.log(0.75) + math.log(0.2)) / 2
    assert metrics.nll(logits, [1, 1]) == pytest.approx(expected, rel=1e-14)
    # At temperature 0.5 the odds are squared: 1 : 9 and 16 : 1.
    halved = metrics.softmax(logits, temperature=0.5)
    np.testing.assert_allclose(halved, [[0.1, 0.9], [16 / 17, 1 / 17]], rtol=1e-14)
    expected = -(math.log(0.9) + math.log(1 / 17)) / 2
    assert metrics.nll(logits, [1, 1], temperature=0.5) == pytest.approx(expected, rel=1e-14)


def test_brier_by_hand():
    probs = [[0.5, 0.3, 0.2], [0.0, 0.0, 1.0]]
    assert metrics.brier(probs, [0, 1]) == pytest.approx((0.25 + 0.09 + 0.04 + 2) / 2)


def test_macro_f1_by_hand_counts_only_classes_that_occur():
    # class 0: 2 TP, 1 FP; class 2: 1 FN; class 1 is nowhere and left out.
    assert metrics.macro_f1([0, 0, 0], [0, 0, 2]) == pytest.approx((0.8 + 0) / 2)


def test_macro_f1_of_weighted_rows():
    """A row that counts twice is two rows."""
    rng = np.random.default_rng(0)
    labels, answers = rng.integers(0, 4, (2, 30))
    weights = rng.integers(0, 3, (30, 5))
    expected = [
        sk.f1_score(np.repeat(labels, column), np.repeat(answers, column), average="macro")
        for column in weights.T
    ]
    # Sums of the same few numbers in another order.
    np.testing.assert_allclose(metrics.weighted_f1(answers, labels, weights), expected, rtol=1e-12)


def test_ece_width_by_hand():
    # Two bins: (0.5, 1] holds all rows, two of three right, mean confidence 0.7.
    probs = probs_of([0.6, 0.7, 0.8])
    assert honesty.ece(probs, [0, 0, 1], bins=2) == pytest.approx(abs(2 / 3 - 0.7))
    # Ten bins: each row alone, off by 0.4, 0.3 and 0.8.
    assert honesty.ece(probs, [0, 0, 1], bins=10) == pytest.approx((0.4 + 0.3 + 0.8) / 3)


def test_ece_mass_by_hand():
    # Bins {0.6, 0.7} (right, wrong) and {0.8, 0.9} (right, right).
    probs = probs_of([0.9, 0.6, 0.8, 0.7])
    gap = (abs(1 - 1.3) + abs(2 - 1.7)) / 4
    assert honesty.ece(probs, [0, 0, 0, 1], bins=2, binning="mass") == pytest.approx(gap)


def test_ece_mass_does_not_depend_on_the_order_of_tied_rows():
    probs, labels = probs_of([1.0] * 6), np.array([0, 0, 0, 1, 1, 1])
    order = [0, 3, 1, 4, 2, 5]
    first = honesty.ece(probs, labels, bins=3, binning="mass")
    assert first == honesty.ece(probs[order], labels[order], bins=3, binning="mass") == 0.5


def test_reliability_points_give_the_ece(rows):
    logits, labels = rows
    probs = metrics.softmax(logits)
    for binning in ("width", "mass"):
        points = honesty.reliability(probs, labels, bins=4, binning=binning)
        assert sum(point["rows"] for point in points) == ROWS
        assert [p["confidence"] for p in points] == sorted(p["confidence"] for p in points)
        gap = sum(p["rows"] * abs(p["accuracy"] - p["confidence"]) for p in points) / ROWS
        assert gap == pytest.approx(honesty.ece(probs, labels, bins=4, binning=binning))


def test_ece_floor_is_what_a_calibrated_classifier_shows():
    rng = np.random.default_rng(5)
    probs = rng.dirichlet([0.5, 0.5, 0.5], size=436)
    perfect = [
        honesty.ece(probs, (rng.random(436)[:, None] > probs.cumsum(1)).sum(1)) for _ in range(40)
    ]
    floor = honesty.ece_floor(probs)
    # Two means, of 40 and 100 draws: five standard errors apart at most.
    assert abs(floor - np.mean(perfect)) < 5 * np.std(perfect) * math.sqrt(1 / 40 + 1 / 100)
    assert honesty.ece_floor(np.repeat(probs, 16, axis=0)) < floor / 2
    assert honesty.ece_floor(probs, seed=1) != floor == honesty.ece_floor(probs)
    assert honesty.ece_floor(probs_of([1.0, 1.0])) == 0


def test_ece_bounds_tell_a_wrong_temperature_from_a_wrong_shape():
    rng = np.random.default_rng(6)
    logits = rng.normal(size=(4000, 3)) * 2
    labels = (rng.random(4000)[:, None] > metrics.softmax(logits).cumsum(1)).sum(1)
    right = honesty.ece_bounds(logits, labels, 1.0)
    # Labels drawn from the probabilities: an ECE of 4000 rows strays by less than 0.01 from its
    # floor (five standard errors), and drawing the rows again can only add.
    assert right["ece_minus_floor_low"] < 0.01
    assert right["ece_minus_floor_at_best"] < 0.01
    too_sure = honesty.ece_bounds(2.5 * logits, labels, 1.0)
    assert too_sure["ece_minus_floor_low"] > 0.05
    assert 2.5 / 1.2 < too_sure["best_temperature"] < 2.5 * 1.2
    assert too_sure["ece_minus_floor_at_best"] < 0.01
    # The surer half is right less often: a temperature keeps the order of the two halves, so
    # the ECE is at least half of 0.9 - 0.6; the floor of 2000 rows is below 0.02.
    odds = np.repeat([math.log(0.6 / 0.4), math.log(0.95 / 0.05)], 1000)
    wrong = np.concatenate([np.arange(1000) >= 900, np.arange(1000) >= 600]).astype(int)
    shape = honesty.ece_bounds(np.stack([odds, 0 * odds], axis=1), wrong, 1.0)
    assert shape["ece_minus_floor_at_best"] > 0.15 - 0.02


def test_ece_bounds_lie_around_a_calibrated_classifier():
    """Drawing rows again adds noise to the ECE: were it not in the floor too, 0 would lie low."""
    rng, bounds = np.random.default_rng(7), []
    for _ in range(40):
        logits = rng.normal(size=(500, 2)) * 1.5
        labels = (rng.random(500) < metrics.softmax(logits)[:, 1]).astype(int)
        found = honesty.ece_bounds(logits, labels, 1.0)
        bounds.append([found["ece_minus_floor_low"], found["ece_minus_floor_high"]])
    low, high = np.transpose(bounds)
    # Each holds 0 with a probability of 0.95 at least: more than 4 of 40 do not in 1 run of 20.
    assert ((low < 0) & (high > 0)).sum() >= 36
    # The mean of 40 middles strays by 0.0015 (one standard error of the ECE less its floor).
    assert abs((low + high).mean() / 2) < 3 * 0.0015


def test_the_best_temperature_is_no_worse_than_the_one_in_use(rows):
    logits, labels = rows
    for temperature in (0.31, 1.07, 3.9):  # none of them is on the ladder
        probs = metrics.softmax(logits, temperature=temperature)
        in_use = honesty.ece(probs, labels) - honesty.ece_floor(probs)
        assert honesty.ece_bounds(logits, labels, temperature)["ece_minus_floor_at_best"] <= in_use


def test_failure_auroc_by_hand():
    # right rows 0.9 and 0.6, wrong rows 0.6 and 0.5: pairs 1, 1, 1/2, 1.
    probs = probs_of([0.9, 0.6, 0.6, 0.5])
    assert honesty.failure_auroc(probs, [0, 0, 1, 1]) == pytest.approx(3.5 / 4)
    assert honesty.failure_auroc(probs, [0, 0, 0, 0]) is None


# Parity with scikit-learn


def test_parity_with_scikit_learn(rows):
    logits, labels = rows
    probs, predictions = metrics.softmax(logits), logits.argmax(axis=1)
    classes = list(range(CLASSES))
    assert metrics.nll(logits, labels) == pytest.approx(
        sk.log_loss(labels, probs, labels=classes), rel=1e-12
    )
    one_against_rest = [sk.brier_score_loss(labels == c, probs[:, c]) for c in classes]
    assert metrics.brier(probs, labels) == pytest.approx(sum(one_against_rest), rel=1e-12)
    assert metrics.accuracy(predictions, labels) == sk.accuracy_score(labels, predictions)


# Limits


def test_saturated_logits_stay_finite():
    logits = np.array([[1e4, -1e4], [1e4, -1e4], [-1e4, 1e4]], np.float32)
    assert metrics.nll(logits, [0, 1, 1]) == pytest.approx(2e4 / 3)
    assert metrics.nll(logits, [0, 0, 1], temperature=0.05) == 0
    probs = metrics.softmax(logits)
    assert np.isfinite(probs).all()
    for binning in ("width", "mass"):
        assert honesty.ece(probs, [0, 1, 1], binning=binning) == pytest.approx(1 / 3)


def test_one_row_is_enough():
    point = honesty.report(np.array([[[0.0, 1.0]]]), [1], [2.0])[0]
    assert point["rows"] == 1
    assert point["after"]["accuracy"] == 1
    assert point["after"]["ece_mass"] == pytest.approx(1 - 1 / (1 + math.exp(-0.5)))


# Report


def test_report_has_every_exit_before_and_after_and_is_json():
    rng = np.random.default_rng(8)
    logits = rng.normal(size=(3, ROWS, CLASSES)).astype(np.float32)
    labels = rng.integers(0, CLASSES, ROWS)
    report = honesty.report(logits, labels, np.array([0.5, 1.0, 4.0], np.float32))
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert [entry["temperature"] for entry in report] == [0.5, 1.0, 4.0]
    assert report[1]["before"] == report[1]["after"]
    for e, temperature in enumerate([0.5, 1.0, 4.0]):
        before, after = report[e]["before"], report[e]["after"]
        assert before["accuracy"] == after["accuracy"]  # a temperature moves no argmax
        assert before["macro_f1"] == after["macro_f1"]
        assert before["nll"] == metrics.nll(logits[e], labels)
        assert after["nll"] == metrics.nll(logits[e], labels, temperature=temperature)
        probs = metrics.softmax(logits[e], temperature=temperature)
        assert after["brier"] == metrics.brier(probs, labels)
        for binning in ("width", "mass"):
            raw = honesty.ece(probs, labels, binning=binning)
            assert after[f"ece_{binning}"] == raw
            floor = honesty.ece_floor(probs, binning=binning)
            assert after[f"ece_{binning}_minus_floor"] == raw - floor


# Paired interval


def pairs(both, only_a, only_b, neither):
    counts = [both, only_a, only_b, neither]
    return (np.repeat([True, True, False, False], counts),
            np.repeat([True, False, True, False], counts))  # fmt: skip


# Newcombe (1998), table III, method 10: four decimals as printed.
@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((20, 12, 2, 16), 0.0562, 0.3292),
        ((18, 12, 2, 18), 0.0562, 0.3290),
        ((36, 14, 0, 0), 0.1528, 0.4167),
        ((35, 14, 0, 1), 0.1461, 0.4175),
        ((2, 97, 1, 0), 0.8721, 0.9854),
        ((0, 29, 1, 0), 0.6666, 0.9882),
        ((0, 30, 0, 0), 0.8395, 1.0),
        ((54, 0, 0, 0), -0.0664, 0.0664),
        ((53, 0, 0, 1), -0.0729, 0.0729),
        ((30, 0, 0, 24), -0.0358, 0.0358),
    ],
)
def test_paired_interval_reproduces_the_published_table(counts, low, high):
    difference, got_low, got_high = metrics.paired_interval(*pairs(*counts))
    assert difference == pytest.approx(100 * (counts[1] - counts[2]) / sum(counts))
    # 0.006 points: the rounding of the print, and 1.96 for the exact quantile.
    assert (got_low, got_high) == pytest.approx((100 * low, 100 * high), abs=0.006)


@given(st.lists(st.integers(0, 40), min_size=4, max_size=4).filter(any))
def test_paired_interval_is_antisymmetric_and_in_range(counts):
    a, b = pairs(*counts)
    difference, low, high = metrics.paired_interval(a, b)
    assert low >= -100 - 1e-9
    assert high <= 100 + 1e-9
    assert low <= difference <= high
    assert low < high
    swapped = metrics.paired_interval(b, a)
    assert swapped == pytest.approx((-difference, -high, -low), abs=1e-9)
    assert metrics.paired_interval(a, b, level=0.5)[1] >= low


def test_paired_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    cells, n, repeats = [0.8, 0.08, 0.04, 0.08], 120, 1000
    hits = 0
    for counts in rng.multinomial(n, cells, size=repeats):
        _, low, high = metrics.paired_interval(*pairs(*counts))
        hits += low <= 4.0 <= high
    # 0.95, less four standard errors of 1000 draws.
    assert hits / repeats > 0.95 - 4 * math.sqrt(0.95 * 0.05 / repeats)


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.nll(np.zeros((0, 2)), []), "at least one labelled row"),
        (lambda: metrics.nll([[0.0, np.nan]], [0]), "logits must be finite.*row 0"),
        (lambda: metrics.nll([[0.0, 1.0]], [2]), r"labels must be in 0\.\.1\. Got 2 at row 0"),
        (lambda: metrics.nll([[0.0, 1.0]], [-1]), "Got -1 at row 0.*GLUE"),
        (lambda: metrics.nll([[0.0, 1.0]], [0.0]), "labels must be integers"),
        (lambda: metrics.nll([[0.0, 1.0]], [0, 1]), r"labels must have shape \(1,\).*Got \(2,\)"),
        (lambda: metrics.nll([0.0, 1.0], [0, 1]), "shape .exits, rows, classes."),
        (lambda: metrics.nll([[0.0, 1.0]], [0], temperature=0), "positive number. Got 0"),
        (lambda: metrics.brier([[3.0, 1.0]], [0]), "apply softmax"),
        (lambda: honesty.ece([[np.nan, 1.0]], [0]), "apply softmax"),
        (lambda: honesty.ece(np.zeros((0, 3)), []), "at least one labelled row"),
        (lambda: honesty.ece([[0.5, 0.5]], [0], binning="equal"), "'width' or 'mass'"),
        (lambda: honesty.ece([[0.5, 0.5]], [0], bins=0), "bins must be at least 1. Got 0"),
        (lambda: metrics.accuracy([], []), "at least one labelled row"),
        (lambda: metrics.accuracy([[0.1, 0.9]], [1]), "take the argmax"),
        (lambda: metrics.macro_f1([1], [-1]), "labels must be 0 or above. Got -1"),
        (lambda: honesty.report([[[0.0, 1.0]]], [0], [-1.0]), "temperatures must be 1 positive"),
        (lambda: metrics.paired_interval([1, 0], [True, False]), "must be boolean"),
        (lambda: metrics.paired_interval([True], [True, False]), "of one length"),
        (lambda: metrics.paired_interval([True], [True], level=95), "level must be between"),
    ],
)
def test_wrong_input_is_one_clear_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.sampled_from(["width", "mass"]))
def test_ece_is_a_weighted_gap_between_0_and_1(seed, bins, binning):
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(CLASSES, 0.3), size=ROWS)
    labels = rng.integers(0, CLASSES, ROWS)
    value = honesty.ece(probs, labels, bins=bins, binning=binning)
    overall = abs((probs.argmax(1) == labels).mean() - probs.max(1).mean())
    # One bin is the coarsest; splitting it can only add gaps.
    assert overall - 1e-12 <= value <= 1
