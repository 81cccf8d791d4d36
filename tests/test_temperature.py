"""The fitted temperature: positive, never worse than 1, right where the truth is known."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from ejax.calibration.metrics import nll, softmax
from ejax.calibration.temperature import HIGHEST, LOWEST, fit_temperatures

EXITS, ROWS, CLASSES = 3, 17, 5


def rows(seed, exits=EXITS, n=ROWS, classes=CLASSES, scale=2.0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(exits, n, classes)).astype(np.float32) * np.float32(scale)
    return logits, rng.integers(0, classes, n).astype(np.int32)


def quietly(logits, labels):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit_temperatures(logits, labels)


def test_temperature_by_hand():
    # Two classes, logit difference log 4, right in 2 of 3 rows: the best odds are 2 = 4^(1/T).
    logits = np.log([[[4.0, 1.0]] * 3])
    np.testing.assert_allclose(fit_temperatures(logits, [0, 0, 1]), [2.0], rtol=1e-6)


@settings(max_examples=100)
@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3))
def test_positive_bounded_and_never_worse_than_one(seed, scale):
    logits, labels = rows(seed, scale=scale)
    fitted = quietly(logits, labels)
    assert fitted.dtype == np.float32
    assert fitted.shape == (EXITS,)
    assert ((fitted >= np.float32(LOWEST)) & (fitted <= HIGHEST)).all()
    for e, temperature in enumerate(fitted):
        assert nll(logits[e], labels, temperature=temperature) <= nll(logits[e], labels)


@pytest.mark.parametrize("offset", [0.0, 6e-8, -3e-8])
def test_never_worse_than_one_when_the_best_is_next_to_one(offset):
    # k of n rows right at odds k : n - k is calibrated. The best temperature is 1 + offset,
    # halfway to the next float32: the last bit of the NLL decides, and must not go up.
    for right in range(12, 60):
        labels = np.repeat([0, 1], [right, 7])
        odds = np.log(right / 7) * (1 + offset)
        logits = np.tile([odds, 0.0], (1, labels.size, 1))
        fitted = fit_temperatures(logits, labels)[0]
        assert fitted == pytest.approx(1, abs=1e-6)
        assert nll(logits[0], labels, temperature=fitted) <= nll(logits[0], labels)


@pytest.mark.parametrize("truth", [0.3, 1.0, 3.5])
def test_recovers_a_known_temperature(truth):
    rng = np.random.default_rng(11)
    n = 20_000
    logits = rng.normal(size=(1, n, CLASSES)) * 2
    below = softmax(logits[0], temperature=truth).cumsum(axis=1) < rng.random((n, 1))
    labels = below.sum(axis=1).clip(max=CLASSES - 1)
    # 20000 rows fix T to about 1 %; 5 % leaves room for no other answer.
    assert fit_temperatures(logits, labels)[0] == pytest.approx(truth, rel=0.05)


def test_agrees_with_a_general_optimiser_on_each_exit_alone():
    logits, labels = rows(6)
    logits[:, np.arange(ROWS), labels] += np.array([[2.0], [3.0], [4.0]])
    fitted = fit_temperatures(logits, labels)
    assert len(set(fitted.tolist())) == EXITS
    for e in range(EXITS):
        best = optimize.minimize_scalar(
            lambda log_t, e=e: nll(logits[e], labels, temperature=np.exp(log_t)),
            bounds=(np.log(LOWEST), np.log(HIGHEST)),
            method="bounded",
            options={"xatol": 1e-9},
        )
        # An optimum found from values of the NLL is known to the root of float64 only.
        assert fitted[e] == pytest.approx(np.exp(best.x), rel=1e-6)
        assert fit_temperatures(logits[e : e + 1], labels)[0] == fitted[e]


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_a_constant_added_to_the_logits_changes_nothing(seed):
    logits, labels = rows(seed)
    logits = logits.astype(np.float64)
    shift = np.random.default_rng(seed + 1).normal(size=(EXITS, ROWS, 1)) * 50
    np.testing.assert_allclose(quietly(logits + shift, labels), quietly(logits, labels), rtol=1e-6)


def test_scaled_logits_scale_the_temperature():
    logits, labels = rows(2)
    logits[:, np.arange(ROWS), labels] += 2
    fitted = fit_temperatures(logits, labels)
    np.testing.assert_allclose(fit_temperatures(logits * 2, labels), fitted * 2, rtol=1e-6)


# Bounds and saturation


def test_without_a_wrong_row_confidence_is_that_of_one_in_n_plus_two_and_the_exit_named():
    logits, labels = rows(4)
    logits[:, np.arange(ROWS), labels] += 1
    logits[1] = 2 * np.eye(CLASSES)[labels]
    named = r"exit 1 .* as if one label in 19 were wrong, with 0 of 17 rows wrong"
    with pytest.warns(UserWarning, match=named) as seen:
        fitted = fit_temperatures(logits, labels)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    # All rows are equally sure here, so the best fit gives each label just what is expected of it.
    confidence = softmax(logits[1], temperature=float(fitted[1])).max(axis=1)
    np.testing.assert_allclose(confidence, 18 / 19, rtol=1e-6)
    assert quietly(logits[[0, 2]], labels).tolist() == fitted[[0, 2]].tolist()


def test_an_exit_worse_than_chance_reaches_the_upper_bound():
    labels = np.arange(ROWS) % CLASSES
    wrong = 3 * np.eye(CLASSES)[(labels + 1) % CLASSES]
    with pytest.warns(UserWarning, match=r"exit 0 .* bound 20, with 17 of 17 rows wrong"):
        fitted = fit_temperatures(wrong[None], labels)
    assert fitted.tolist() == [HIGHEST]


def test_saturated_logits_do_not_overflow():
    logits = np.full((2, 4, 3), -1e4, np.float32)
    labels = np.array([0, 1, 2, 0])
    logits[:, np.arange(4), labels] = 1e4
    logits[1, 3] = [-1e4, 1e4, -1e4]  # exit 1 is wrong once, and as sure as can be
    with np.errstate(over="raise", invalid="raise"), pytest.warns(match=r"exit [01] ") as seen:
        fitted = fit_temperatures(logits, labels)
    assert "exit 0 (counted from 0): its NLL does not depend" in str(seen[0].message)
    assert "exit 1 (counted from 0): its temperature stops" in str(seen[1].message)
    # Exit 0 is right and certain at every temperature of the range: nothing to choose from.
    assert fitted.tolist() == [1.0, HIGHEST]


def test_equal_logits_keep_temperature_one():
    with pytest.warns(UserWarning, match="does not depend on the temperature"):
        assert fit_temperatures(np.full((1, 4, 3), 0.1), [0, 1, 2, 0]).tolist() == [1.0]


# Errors


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((2, 3, 4)), [0, 4, 1], r"labels must be in 0\.\.3\. Got 4 at row 1"),
        (np.zeros((2, 3, 4)), [0, 1, -1], r"Got -1 at row 2: leave out rows without a label"),
        (np.zeros((2, 3, 4)), [0, 1], r"labels must have shape \(3,\), one per row\. Got \(2,\)"),
        (np.zeros((2, 0, 4)), [], "at least one labelled row"),
        (np.zeros((3, 4)), [0, 1, 2], r"shape \[exits, rows, classes\].*Got \(3, 4\)"),
        (np.zeros((2, 3, 1)), [0, 0, 0], "at least two classes"),
    ],
)
def test_wrong_input_is_one_clear_sentence(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        fit_temperatures(logits, labels)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_logit_that_is_not_finite_is_located(bad):
    logits, labels = rows(0)
    logits[2, 5, 1] = bad
    with pytest.raises(ValueError, match=r"exit 2 \(of 3, counted from 0\), row 5"):
        fit_temperatures(logits, labels)
