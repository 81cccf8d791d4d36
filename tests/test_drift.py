"""The drift alarm: silent on like texts whatever their number, loud where they go deeper."""

import numpy as np
import pytest
from scipy.stats import binom, hypergeom
from test_thresholds import LAYERS, rows

from ejax.calibration.drift import FALSE_ALARMS, compare, depth_of
from ejax.calibration.thresholds import budget_thresholds, drop_thresholds, make_table

DRAWS = 2000


def record(counts):
    counts = np.asarray(counts)
    share = (counts / counts.sum()).tolist()
    return depth_of({"rows": int(counts.sum()), "exit_share": share, "threshold": [0.9, 0.0]})


def test_deeper_and_less_deep_texts_in_words():
    found = compare([580, 120, 90, 210], record([920, 43, 30, 7]), (1, 2, 4, 6))
    assert (found.depth, found.depth_then) == (2.44, 1.168)
    assert found.sentence == (
        "These texts leave later than those the thresholds are for: after 2.44 layers in the mean, "
        "there 1.17; accuracy and promises may not hold: `ejax calibrate` or `ejax thresholds` on "
        "labelled rows like these."
    )
    back = compare([920, 43, 30, 7], record([580, 120, 90, 210]), (1, 2, 4, 6))
    assert "leave earlier than" in back.sentence
    assert back.p_value == pytest.approx(found.p_value)
    moved = compare([300, 100, 300], record([50, 600, 50]), (1, 2, 3))
    assert "leave at other exits than" in moved.sentence


@pytest.mark.parametrize(("left", "before"), [((9, 11), (19, 1)), ((700, 300), (400, 600))])
def test_the_p_value_is_fishers(left, before):
    """Twice the smaller tail of the hypergeometric distribution, by scipy."""
    split = hypergeom(sum(left) + sum(before), left[0] + before[0], sum(left))
    tail = min(split.cdf(left[0]), split.sf(left[0] - 1))
    assert compare(left, record(before), (1, 6)).p_value == pytest.approx(2 * tail, rel=1e-6)
    # Of two exits with the same numbers, twice that (Bonferroni).
    three = compare((left[0], 0, left[1]), record((before[0], 0, before[1])), (1, 2, 6))
    assert three.p_value == pytest.approx(4 * tail, rel=1e-6)


def test_many_texts_do_not_alarm_on_little_and_few_not_by_chance():
    little = compare([56_000, 44_000], record([60_000, 40_000]), (1, 2))
    assert little.p_value < 1e-9
    assert little.sentence == ""
    assert compare([49_000, 51_000], record([60_000, 40_000]), (1, 2)).sentence  # 11 points
    assert compare([93_000, 7_000], record([99_900, 100]), (1, 6)).sentence  # 0.35 layers
    few = compare([12, 8], record([90, 10]), (1, 6))  # 1.5 and 3 layers
    assert few.depth == 2 * few.depth_then
    assert few.p_value > FALSE_ALARMS
    assert few.sentence == ""


def test_a_fifth_of_next_to_nothing_is_nothing():
    """Before the first layer: 0.05 layers more than 0.05 are twice as much, and cheap."""
    assert compare([90_000, 10_000], record([95_000, 5_000]), (0, 1)).sentence == ""


def test_one_exit_tells_nothing():
    assert compare([7], record([9]), (6,)) == (6.0, 6.0, 1.0, "")


@pytest.mark.parametrize(
    ("share", "layers"),
    [((0.9, 0.06, 0.04), (1, 2, 6)), ((0.5, 0.5), (1, 6)), ((0.4, 0.3, 0.2, 0.1), (0, 1, 2, 6))],
)
@pytest.mark.parametrize(("before", "now"), [(20, 20), (20, 100_000), (128, 300), (400, 400)])
def test_like_texts_alarm_in_at_most_one_of_a_thousand_looks(share, layers, before, now):
    """So many of 2,000 draws as happen at that rate in all but one of 10,000 tries."""
    rng = np.random.default_rng(0)
    draws = zip(
        rng.multinomial(now, share, DRAWS), rng.multinomial(before, share, DRAWS), strict=True
    )
    alarms = sum(bool(compare(left, record(then), layers).sentence) for left, then in draws)
    assert alarms <= binom.ppf(1 - 1e-4, DRAWS, FALSE_ALARMS)


def test_deeper_texts_are_found():
    """From 1.17 to 2.44 layers, 128 rows before: of 100 texts in nearly every draw."""
    rng = np.random.default_rng(0)
    then, now = (0.92, 0.043, 0.03, 0.007), (0.58, 0.12, 0.09, 0.21)
    found = [
        compare(rng.multinomial(100, now), record(rng.multinomial(128, then)), (1, 2, 4, 6))
        for _ in range(200)
    ]
    assert np.mean([one.sentence != "" for one in found]) > 0.95


@pytest.mark.parametrize("choose", [drop_thresholds, budget_thresholds])
def test_rows_that_chose_the_thresholds_may_be_compared_with(choose):
    """That they were chosen there moves no more rows than another draw does."""
    logits, labels, temperatures, tokens = rows(3, n=20_000)
    every = make_table(logits, labels, temperatures, LAYERS, tokens)
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(300):
        drawn = rng.permutation(20_000)
        point = choose(every.take(drawn[:300]), 0.5)
        left = every.take(drawn[300:600]).leave(point["threshold"])
        counts = np.bincount(left, minlength=len(LAYERS))
        alarms += compare(counts, depth_of(point), LAYERS).sentence != ""
    assert alarms <= binom.ppf(1 - 1e-4, 300, FALSE_ALARMS)
