"""Thresholds against hand-made rows, `select_exit`, and scipy's minimum of the same fit."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import logit, logsumexp
from scipy.stats import beta, binom

from ejax.calibration import thresholds
from ejax.calibration.fits import curve
from ejax.calibration.risk import Refused, promised_drop, risk_thresholds
from ejax.calibration.thresholds import (
    FULL,
    budget_thresholds,
    drop_thresholds,
    make_table,
    operating_point,
    oracle,
    within_drop,
)
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


def hand_table():
    return make_table(HAND, HAND_LABELS, [1, 1], HAND_LAYERS, HAND_TOKENS)


def hand(threshold):
    return operating_point(hand_table(), threshold)


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
    table = make_table(logits, labels, [1] * exits, layers, np.full(count, 7))
    return drop_thresholds(table, **settings)


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
    # Full depth says 0.9 to 0.1: 16 points are lost, and a little less by ten labels.
    point = default(logits, labels, (1, 2), max_drop=15)
    assert point["threshold"] == [FULL, FULL]
    bold = default(logits, labels, (1, 2), max_drop=16)
    assert bold["exit_share"] == [1, 0]
    assert bold["drop"] == 0
    assert 15 < bold["expected_drop"] < 16


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
    table = make_table(binary([first, p, p]), labels, [1] * 3, (1, 2, 9), np.full(400, 7))
    single = operating_point(table, one)
    assert single["mean_depth"] > 2 * point["mean_depth"]


def test_full_model_where_every_early_exit_loses():
    point = default(same_everywhere([0.9999, 0.001], 4), [1, 1, 1, 1], (3, 12))
    assert point["threshold"] == [FULL, FULL]
    assert point["mean_depth"] == 12
    assert point["drop"] == 0


def chances(own, full, temperatures, labels):
    """What full depth's answer is likelier than an exit's, by the two pooled: [N], by scipy."""
    logs = np.stack([own, full]) / temperatures[:, None, None].astype(float)
    logs = np.maximum(logs - logsumexp(logs, axis=2, keepdims=True), np.log(1e-6))
    row = np.arange(len(labels))

    def pool(w):
        mixed = np.tensordot(w, logs, 1)
        return mixed - logsumexp(mixed, axis=1, keepdims=True)

    found = minimize(
        lambda w: 15 * (w[0] ** 2 + (w[1] - 1) ** 2) - pool(w)[row, labels].sum(), [0, 1], tol=1e-10
    )
    p = np.exp(pool(found.x))
    return p[row, full.argmax(axis=1)] - p[row, own.argmax(axis=1)]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.5, 6.0, 30.0]))
def test_what_is_chosen_keeps_within_max_drop(seed, max_drop):
    logits, labels, temperatures, tokens = rows(seed)
    table = make_table(logits, labels, temperatures, LAYERS, tokens)
    point = drop_thresholds(table, max_drop)
    assert max(point["drop"], point["expected_drop"]) <= max_drop + 1e-9
    taken = np.asarray(select_exit(logits, point["threshold"], temperatures).exit)
    right, row = logits.argmax(axis=2) == labels, np.arange(ROWS)
    assert point["drop"] == pytest.approx(100 * (right[-1].mean() - right[taken, row].mean()))
    expected = [chances(logits[e], logits[-1], temperatures[[e, -1]], labels) for e in taken]
    assert point["expected_drop"] == pytest.approx(
        100 * np.mean([expected[n][n] for n in row]),
        abs=1e-4,  # scipy's minimum is no closer
    )
    more = drop_thresholds(table, max_drop + 9)
    assert more["mean_depth"] <= point["mean_depth"]


@pytest.mark.parametrize("saturated", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3])
def test_the_fit_is_the_minimum(share, saturated):
    """Of the cross-entropy and its prior, as scipy finds it; also where nothing is lost."""
    rng = np.random.default_rng(1)
    scores = rng.uniform(0.5, 1, 300)
    lost = np.where(rng.random(300) < share * (2 - 2 * scores), rng.uniform(0, 1, 300), 0)
    sure = rng.random(300) < saturated
    scores[sure] = 1 - 10.0 ** rng.uniform(-9, -4, sure.sum())
    lost[sure] = rng.random(sure.sum()) < share  # whatever the score
    clipped = np.clip(scores, 1e-6, 1 - 1e-6)
    x = np.log(clipped) - np.log1p(-clipped)

    def objective(w):
        z = w[0] + w[1] * x
        return (np.logaddexp(0, z) - lost * z).sum() + 5e-4 * w[0] ** 2 + 0.5 * (w[1] + 1) ** 2

    found = minimize(objective, [-3.0, -1.0], tol=1e-12)
    at = np.array([0.6, 0.9])
    found_at = logit(curve(at, scores, lost))
    slope = (found_at[1] - found_at[0]) / (logit(at[1]) - logit(at[0]))
    assert objective([found_at[0] - slope * logit(at[0]), slope]) <= found.fun + 1e-9


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["per exit", "one number"]))
def test_policies_are_nested(seed, family):
    """Each lets go all that the one before does: fixed sequences and sums rely on it."""
    logits, labels, temperatures, tokens = rows(seed, n=60)
    logits[0] *= np.random.default_rng(seed).choice([-1, 1], (60, 1))  # as often wrong when sure
    table = make_table(logits, labels, temperatures, LAYERS, tokens)
    ordered = thresholds.policies(table, family)
    assert (np.diff(ordered, axis=0) <= 0).all()
    assert (ordered[0] == FULL).all()
    assert (ordered[-1] == 0).all()
    summed = thresholds.totals(table, ordered, table.expected_lost)
    each = [table.expected_lost[table.leave(one), np.arange(60)].sum() for one in ordered]
    np.testing.assert_allclose(summed, each, atol=1e-9)


# An exit that errs on other rows


def of_its_own(n=6000, seed=0):
    """Exit 0 has evidence of its own, exit 1 a part of full depth's, which is the best."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, n)
    sign = 2 * label - 1
    # Log-odds of normal evidence: mean 2 d^2, variance 4 d^2.
    part, rest, own = (rng.normal(2 * d * d, 2 * d, n) * sign for d in (0.6, 0.7, 0.75))
    logits = np.stack([own, part, part + rest])
    logits = np.stack([-logits / 2, logits / 2], axis=-1).astype(np.float32)
    return make_table(logits, label, [1, 1, 1], (0, 2, 6), np.full(n, 7))


def test_an_exit_that_errs_on_other_rows_gains():
    table = of_its_own()
    chosen, other = table.take(np.arange(2000)), table.take(np.arange(2000, 6000))
    point = drop_thresholds(chosen, 0.0)
    assert point["expected_drop"] < 0
    shown = operating_point(other, point["threshold"])
    assert shown["exit_share"][0] > 0.3
    assert shown["mean_depth"] < 4
    assert shown["accuracy"] > shown["full_accuracy"]
    # What full depth alone thinks of those that leave is far from what the labels say.
    taken, row = other.leave(point["threshold"]), np.arange(4000)
    full = np.exp(other.log_probs[-1])
    alone = full[row, other.answers[-1]] - full[row, other.answers[taken, row]]
    assert 100 * alone.mean() > shown["drop_high"]
    assert shown["drop_low"] < shown["expected_drop"] < shown["drop_high"]


def test_what_an_exit_gains_lets_more_rows_go():
    """By losses alone exit 0, with evidence of its own, would keep most of them."""
    table = of_its_own()
    error = risk_thresholds(table, 0.01, loss="error")
    drop = promised_drop(table, 1.0)
    assert drop["gains"] > 0
    assert drop["mean_depth"] < error["mean_depth"]
    assert drop["exit_share"][0] > error["exit_share"][0]


def test_exit_0_costs_what_it_is_said_to():
    table = make_table(HAND, HAND_LABELS, [1, 1], (0, 6), HAND_TOKENS, exit0_cost=0.5)
    some = operating_point(table, 0.7)  # rows 0 and 2 leave before the first layer
    assert some["mean_depth"] == pytest.approx(70 * 6 / 100 + 0.5)
    assert some["cost"] == pytest.approx(4.7 / 6)
    assert operating_point(table, 0.0)["mean_depth"] == 0.5
    assert operating_point(table, FULL)["mean_depth"] == 6  # then it need not run
    with pytest.raises(ValueError, match=r"at least 0\.08334.*Got 0\.08"):
        budget_thresholds(table, 0.08)
    assert budget_thresholds(table, 0.09)["spent"] == pytest.approx(0.5 / 6)
    ordered = thresholds.policies(table, "per exit")
    np.testing.assert_allclose(
        table.depths(ordered), [table.depth(table.leave(one)) for one in ordered]
    )


def test_an_exit_whose_surest_rows_lose_too_often_holds_no_other_back():
    """Half the rows saturate exit 1, and one in 20 of them loses there, of the others one in
    three; exit 2 is right."""
    rng, n = np.random.default_rng(0), 4000
    label, saturated = rng.integers(0, 2, n), rng.random(n) < 0.5
    right = np.eye(2)[label]
    first = np.where(saturated[:, None], 60.0, 1.0) * right
    first[rng.random(n) < np.where(saturated, 0.05, 0.33)] *= -1
    logits = np.stack([first, 6 * right, 6 * right]).astype(np.float32)
    table = make_table(logits, label, (1.0, 1.0, 1.0), (1, 2, 3), np.full(n, 8))
    point = risk_thresholds(table, 0.01)
    assert point["exit_share"][0] == 0
    assert point["exit_share"][1] > 0.9


def test_an_exit_that_is_surest_where_it_is_wrong_does_not_let_all_go():
    """Exit 1 differs from full depth on 1 % of its unsure rows and on 30 % of its sure ones."""
    rng, n = np.random.default_rng(0), 8000
    right = np.eye(2)[np.zeros(n, int)]
    first, second = rng.uniform(0, 4.6, (2, n))
    wrong = rng.random((2, n)) < np.stack([0.01 + 0.29 * first / 4.6, 0.2 * (1 - second / 4.6)])
    early = np.stack([first, second])[..., None] * np.where(wrong[..., None], -right, right)
    logits = np.stack([*early, 6 * right]).astype(np.float32)
    table = make_table(logits, np.zeros(n, int), (1.0, 1.0, 1.0), (2, 4, 12), np.full(n, 8))
    ordered = thresholds.policies(table, "per exit", table.lost("disagreement"))
    assert set(ordered[:, 0]) == {FULL, 0.0}  # all or none
    budget = budget_thresholds(table, 0.7)
    assert 0.69 < budget["spent"] <= 0.7
    single = budget_thresholds(table, 0.7, family="one number")
    assert budget["accuracy"] > single["accuracy"]
    depths = [risk_thresholds(table, risk)["mean_depth"] for risk in (0.03, 0.06, 0.09)]
    assert depths == sorted(depths, reverse=True)
    assert len(set(depths)) == 3


def test_a_large_drop_is_used():
    """Where all may leave at the first exit, all do, however unsure they are."""
    rng, n = np.random.default_rng(0), 400
    label = rng.integers(0, 20, n)
    right = np.eye(20)[label]
    first = np.where(rng.random(n) < 0.7, 1.0, -1.0)[:, None] * right  # most confidences below 0.2
    logits = np.stack([first, 9 * right]).astype(np.float32)
    table = make_table(logits, label, (1.0, 1.0), (1, 6), np.full(n, 8))
    lost = 100 * (1 - table.correct[0].mean())
    assert 20 < lost < 40
    assert drop_thresholds(table, lost + 5)["mean_depth"] == 1


@pytest.mark.parametrize("seed", range(3))
def test_the_default_is_an_operating_point(seed):
    logits, labels, temperatures, tokens = rows(seed, n=211)
    table = make_table(logits, labels, temperatures, LAYERS, tokens)
    point = drop_thresholds(table, 15)
    max_drop = point.pop("max_drop")
    assert max_drop == 15
    assert 0 < point["exit_share"][0] < 1
    assert operating_point(table, point["threshold"]) == point


def test_long_rows_weigh_more():
    logits, labels, temperatures, _ = rows(1)
    leaves = np.asarray(select_exit(logits, 0.6, temperatures).exit) == 0
    assert 0 < leaves.sum() < ROWS
    early_long = np.where(leaves, 100, 1)
    cheap, dear = (
        operating_point(make_table(logits, labels, temperatures, LAYERS, tokens), 0.6)
        for tokens in (early_long, 101 - early_long)
    )
    assert cheap["accuracy"] == dear["accuracy"]
    assert cheap["mean_depth"] < dear["mean_depth"]


def test_one_exit_is_the_full_model():
    logits, labels, temperatures, tokens = rows(5, exits=1)
    point = drop_thresholds(make_table(logits, labels, temperatures, (6,), tokens))
    assert point["threshold"] == [FULL]
    assert point["mean_depth"] == 6


def test_result_goes_into_json():
    logits, labels, temperatures, tokens = rows(7)
    point = drop_thresholds(make_table(logits, labels, temperatures, LAYERS, tokens))
    assert json.loads(json.dumps(point, allow_nan=False)) == point
    assert [type(one) for one in point["threshold"]] == [float] * EXITS
    assert all(math.isfinite(value) for value in point.values() if isinstance(value, float))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_table_leaves_where_select_exit_does(seed):
    logits, labels, temperatures, tokens = rows(seed)
    table = make_table(logits, labels, temperatures, LAYERS, tokens)
    for threshold in (0.0, 0.55, [0.9, 0.4, 0.0], FULL):
        expected = select_exit(logits, threshold, temperatures).exit
        np.testing.assert_array_equal(table.leave(threshold), expected)


# A budget


@pytest.mark.parametrize("family", ["per exit", "one number"])
def test_a_budget_is_spent_and_not_passed(family):
    table = make_table(*rows(3, n=400)[:3], LAYERS, rows(3, n=400)[3])
    ordered = thresholds.policies(table, family)
    costs = [operating_point(table, policy)["cost"] for policy in ordered]
    work = np.outer(table.layers, table.tokens)
    summed = thresholds.totals(table, ordered, work) / work[-1].sum()
    np.testing.assert_allclose(summed, costs, rtol=1e-12)
    lost = [operating_point(table, policy)["expected_drop"] for policy in ordered]
    for budget in (0.2, 0.4, 0.7):
        point = budget_thresholds(table, budget, family=family)
        assert point["spent"] == point["cost"] <= budget
        within = [drop for drop, cost in zip(lost, costs, strict=True) if cost <= budget]
        assert point["expected_drop"] == pytest.approx(min(within))


def test_a_budget_of_all_of_it_is_full_depth_where_exits_only_lose():
    table = disagreeing(4000)
    assert budget_thresholds(table, 1)["threshold"] == [FULL] * 2


def test_a_budget_tells_sure_rows_apart():
    """Scores of which most are above 0.9999."""
    rng = np.random.default_rng(0)
    right = rng.normal(12, 3, 4000)
    logits = np.stack([np.stack([x, np.zeros(4000)], -1) for x in (right, right + 1)])
    table = make_table(logits, np.zeros(4000, int), [1.0, 1.0], (1, 2), np.full(4000, 8))
    assert np.mean(table.scores[0] > 0.9999) > 0.6
    for budget in (0.6, 0.7, 0.8):
        assert budget_thresholds(table, budget)["spent"] == pytest.approx(budget, abs=0.02)


def test_more_budget_buys_accuracy():
    table = disagreeing(4000)
    low, high = (budget_thresholds(table, budget)["accuracy"] for budget in (0.3, 0.9))
    assert high > low


def test_a_budget_in_another_unit():
    """Rows that leave at an exit cost what the caller says, such as milliseconds."""
    table = disagreeing(4000)
    ms = np.array([2.0, 10.0])
    point = budget_thresholds(table, 5.0, cost=lambda taken: float(ms[taken].mean()))
    assert 4.9 < point["spent"] <= 5.0
    assert point["spent"] == pytest.approx(np.dot(point["exit_share"], ms))


# A risk


def disagreeing(n, seed=0):
    """Two exits: the first is the surer the likelier it answers as the last does."""
    rng = np.random.default_rng(seed)
    p = rng.uniform(0.5, 1, n)
    last = np.where(rng.random(n) < p, p, 1 - p)
    labels = (last < 0.5).astype(np.int64)
    flip = rng.random(n) < 0.1
    return make_table(
        binary([p, last]), np.where(flip, 1 - labels, labels), [1, 1], (1, 9), np.full(n, 7)
    )


@pytest.mark.parametrize("loss", ["disagreement", "error"])
def test_a_risk_is_tested_on_rows_that_chose_nothing(loss):
    table = disagreeing(4000)
    point = risk_thresholds(table, 0.05, 0.1, loss=loss)
    assert (point["rows_for_order"], point["rows"]) == (1000, 3000)
    assert 0 < point["exit_share"][0] < 1
    # The certificate, from the rows themselves and scipy's own distribution.
    tested = table.take(np.random.default_rng(0).permutation(4000)[1000:])
    lost = tested.lost(loss)[tested.leave(point["threshold"]), np.arange(3000)]
    assert point["losses"] == lost.sum()
    assert point["p_value"] == pytest.approx(binom.cdf(lost.sum(), 3000, 0.05))
    assert point["p_value"] <= 0.1
    assert point["upper"] <= 0.05
    assert binom.cdf(lost.sum(), 3000, point["upper"]) == pytest.approx(0.1)
    # It is not bought by running everything deep: a tenth more losses would not have passed.
    assert binom.cdf(lost.sum() * 1.1, 3000, 0.05) > 0.1
    assert risk_thresholds(table, 0.2, 0.1, loss=loss)["mean_depth"] < point["mean_depth"]


def test_too_few_rows_keep_full_depth_and_say_how_many_it_takes():
    logits = same_everywhere([0.99, 0.99], 398)  # never a loss
    table = make_table(logits, np.zeros(398, int), [1, 1], (1, 2), np.full(398, 7))
    # (1 - 0.01)^n <= 0.05 from n = 299 on, and a quarter of the rows orders the policies.
    few = risk_thresholds(table.take(np.arange(397)), 0.01, 0.05)
    assert few["threshold"] == [FULL, FULL]
    assert (few["rows"], few["rows_for_order"], few["p_value"]) == (397, 0, None)
    assert few["rows_needed"] == 398
    enough = risk_thresholds(table, 0.01, 0.05)
    assert (enough["rows"], enough["rows_for_order"]) == (299, 99)
    assert enough["exit_share"] == [1, 0]


@pytest.mark.parametrize("family", ["per exit", "one number"])
@pytest.mark.parametrize("risk", [0.5, 0.9, 0.97])
def test_rows_needed_are_enough_and_one_less_is_not(risk, family):
    logits = same_everywhere([0.99, 0.99], 30)
    table = make_table(logits, np.zeros(30, int), [1, 1], (1, 2), np.full(30, 7))
    points = {
        n: risk_thresholds(table.take(np.arange(n)), risk, 0.1, family=family) for n in range(1, 31)
    }
    (needed,) = {point["rows_needed"] for point in points.values()}
    assert {n for n, point in points.items() if point["p_value"] is not None} == {
        n for n in points if n >= needed
    }


def test_everyone_can_be_sent_out_at_the_first_exit():
    """Also rows that are so unsure, of many classes, that no bound on the loss lets them go."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 300, 20)).astype(np.float32) * np.array([0.1, 3, 9])[:, None, None]
    labels = rng.integers(20, size=300)
    table = make_table(logits, labels, [1] * 3, LAYERS, np.full(300, 7))
    assert budget_thresholds(table, 1 / 6)["exit_share"] == [1, 0, 0]


def test_the_guarantee_holds_on_draws_from_a_table():
    """Rows drawn with replacement from a fixed table; the true risk is that of the table."""
    table = disagreeing(1500)
    rng = np.random.default_rng(1)
    draws, delta, risk = 300, 0.1, 0.08
    violated, depths = 0, []
    every = np.arange(1500)
    lost = table.lost("disagreement")
    for seed in range(draws):
        point = risk_thresholds(table.take(rng.integers(1500, size=400)), risk, delta, seed=seed)
        violated += lost[table.leave(point["threshold"]), every].mean() > risk
        depths.append(point["mean_depth"])
    # Were the share of violations delta, more than so many would be seen once in 10,000 runs.
    assert violated <= binom.ppf(1 - 1e-4, draws, delta)
    assert np.mean(depths) < 8  # of 9: full depth keeps every guarantee


# Wrong answers


def test_wrong_answers_are_those_of_the_policy_that_runs():
    table = of_its_own()
    full = 1 - table.correct[-1].mean()
    point = risk_thresholds(table, full + 0.005, loss="wrong")
    tested = table.take(np.random.default_rng(0).permutation(6000)[1500:])
    wrong = ~tested.correct[tested.leave(point["threshold"]), np.arange(4500)]
    assert point["losses"] == wrong.sum()
    assert point["p_value"] == pytest.approx(binom.cdf(wrong.sum(), 4500, full + 0.005))
    assert point["p_value"] <= 0.05
    assert point["exit_share"][0] > 0.3  # full depth itself could not be shown to keep it
    full_wrong = (~tested.correct[-1]).sum()
    assert binom.cdf(full_wrong, 4500, full + 0.005) > 0.05
    assert risk_thresholds(table, 0.3, loss="wrong")["mean_depth"] < point["mean_depth"]


def test_full_depth_is_refused_where_it_is_wrong_too_often():
    alone = make_table(
        HAND[1:].repeat(200, axis=1), np.repeat(HAND_LABELS, 200), [1], (6,), [9] * 600
    )
    with pytest.raises(Refused, match=r"takes at least 398 rows\. Got 397"):
        risk_thresholds(alone.take(np.arange(397)), 0.01, loss="wrong")
    wrong = make_table(
        HAND[1:].repeat(200, axis=1), np.repeat([0, 1, 1], 200), [1], (6,), np.full(600, 9)
    )
    with pytest.raises(Refused, match=r"full depth is wrong on 33\.3 % of 600 rows: that at") as of:
        risk_thresholds(wrong, 0.2, loss="wrong")
    could = float(str(of.value).split("0.95, ")[1].split(" %")[0]) / 100
    assert 1 / 3 < could < 0.4
    with pytest.raises(Refused):
        risk_thresholds(wrong, could - 1e-3, loss="wrong")
    assert risk_thresholds(wrong, could, loss="wrong")["threshold"] == [FULL]


# A drop that is promised


def test_a_promised_drop_by_scipys_own_bounds():
    table = of_its_own()
    point = promised_drop(table, 1.0, 0.1)
    assert (point["rows_for_order"], point["rows"]) == (1500, 4500)
    tested = table.take(np.random.default_rng(0).permutation(6000)[1500:])
    early = tested.correct[tested.leave(point["threshold"]), np.arange(4500)]
    lost, gained = (tested.correct[-1] & ~early).sum(), (~tested.correct[-1] & early).sum()
    assert (point["losses"], point["gains"]) == (lost, gained)
    most = beta.ppf(1 - 0.08, lost + 1, 4500 - lost)
    least = beta.ppf(0.02, gained, 4500 - gained + 1)
    assert point["upper"] == pytest.approx(100 * (most - least))
    assert point["drop"] < point["upper"] <= 1.0
    assert promised_drop(table, 3.0, 0.1)["mean_depth"] < point["mean_depth"]
    assert promised_drop(table, 1.0, 0.001)["mean_depth"] > point["mean_depth"]


def test_a_promised_drop_takes_as_many_rows_as_it_says():
    logits = same_everywhere([0.99, 0.99], 857)  # never a loss, never a gain
    table = make_table(logits, np.zeros(857, int), [1, 1], (1, 2), np.full(857, 7))
    few = promised_drop(table.take(np.arange(856)), 0.5)
    assert few["threshold"] == [FULL, FULL]
    # (1 - 0.005)^n <= 0.8 * 0.05 from n = 643 on, and a quarter of the rows orders the policies.
    assert (few["rows"], few["upper"], few["rows_needed"]) == (642, None, 857)
    enough = promised_drop(table, 0.5)
    assert enough["exit_share"] == [1, 0]
    assert 0 < enough["upper"] <= 0.5


def test_a_promised_drop_holds_on_draws_from_a_table():
    table = of_its_own(1500, seed=3)
    rng, every, broken, depths = np.random.default_rng(1), np.arange(1500), 0, []
    for seed in range(200):
        point = promised_drop(table.take(rng.integers(1500, size=400)), 3.0, 0.1, seed=seed)
        early = table.correct[table.leave(point["threshold"]), every].mean()
        broken += 100 * (table.correct[-1].mean() - early) > 3.0
        depths.append(point["mean_depth"])
    # Were the share of broken promises delta, more would be seen once in 10,000 runs.
    assert broken <= binom.ppf(1 - 1e-4, 200, 0.1)
    assert np.mean(depths) < 5  # of 6: full depth keeps every promise


def test_the_oracle_leaves_at_the_first_right_exit():
    answers = [[0.9, 0.1, 0.1, 0.9], [0.9, 0.9, 0.1, 0.1], [0.9, 0.1, 0.1, 0.9]]
    table = make_table(binary(answers), [0] * 4, [1] * 3, LAYERS, [1] * 4)
    np.testing.assert_array_equal(oracle(table), [0, 1, 0, 0])


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
        ({"exit0_cost": 0.1}, r"begin with layer 0\. Got 0\.1 and \(1, 4, 6\)"),
        ({"exit0_cost": -1.0, "layers": (0, 1, 6)}, r"0 or above.* Got -1\.0"),
    ],
)
def test_wrong_input_is_one_clear_sentence(change, message):
    logits, labels, temperatures, tokens = rows(0)
    given = {"labels": labels, "temperatures": temperatures, "layers": LAYERS, "tokens": tokens}
    given |= change
    with pytest.raises(ValueError, match=message):
        make_table(logits, **given)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: drop_thresholds(t, -1), r"max_drop must be 0 points or above\. Got -1"),
        (lambda t: operating_point(t, [[0.9] * 3]), "threshold must be one number, or one per"),
        (lambda t: operating_point(t, math.nan), r"one per exit \(3\)\. Got nan"),
        (lambda t: budget_thresholds(t, 0), r"a budget must be a number above 0\. Got 0"),
        (lambda t: budget_thresholds(t, 0.1), r"at least 0\.1667, .*first exit\. Got 0\.1"),
        (
            lambda t: risk_thresholds(t, 0),
            r"risk must be between 0 and 1, and at least 1e-9\. Got 0",
        ),
        (
            lambda t: risk_thresholds(t, 0.1, 1.0),
            r"delta must be between 0 and 1, and at least 1e-9\. Got 1\.0",
        ),
        (lambda t: risk_thresholds(t, 0.9, loss="both"), "loss must be one of disagreement, error"),
        (lambda t: promised_drop(t, 0), r"above 0 and below 100\. Got 0"),
        (lambda t: promised_drop(t, 1, 0), r"delta must be between 0 and 1"),
        (lambda t: promised_drop(t.take(np.arange(1)), 1), "at least 2 rows"),
        (lambda t: risk_thresholds(t, 0.9, family="both"), "family must be 'per exit' or"),
    ],
)
def test_wrong_settings_are_one_clear_sentence(call, message):
    logits, labels, temperatures, tokens = rows(0)
    with pytest.raises(ValueError, match=message):
        call(make_table(logits, labels, temperatures, LAYERS, tokens))


def test_a_sum_of_nothing_is_within_a_drop_of_nothing():
    table = hand_table()
    alike = dataclasses.replace(table, answers=table.answers[[1, 1]])
    nothing, first = np.array([[0.1, 0.2, -0.3]] * 2), np.zeros((1, 2))
    assert nothing[0].cumsum()[-1] > 0
    vars(alike)["expected"] = nothing, np.zeros((2, 3))
    assert within_drop(alike, first, 0.0).all()
    vars(alike)["expected"] = nothing + 0.01, np.zeros((2, 3))
    assert not within_drop(alike, first, 0.0).any()
    assert not within_drop(table, first, 30.0).any()  # one of three is lost
