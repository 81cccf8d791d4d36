"""Plans by hand and by properties; padded arrays by hand."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ejax.data.batches import Step, bucket_of, eval_plan, pad, take, train_plan
from ejax.data.tokenizer import Encoded

ENCODED = Encoded(
    ids=np.array([2, 5, 3, 2, 3, 2, 7, 8, 3, 9, 3], np.int32),
    types=np.array([0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1], np.int8),
    offsets=np.array([0, 3, 5, 11]),
)
NOTHING = Encoded(np.zeros(0, np.int32), np.zeros(0, np.int8), np.zeros(1, np.int64))


def test_pad_by_hand():
    batch = pad(ENCODED, np.array([2, -1, 0]), 7)
    assert batch.ids.tolist() == [[2, 7, 8, 3, 9, 3, 0], [0] * 7, [2, 5, 3, 0, 0, 0, 0]]
    assert batch.mask.tolist() == [[1, 1, 1, 1, 1, 1, 0], [0] * 7, [1, 1, 1, 0, 0, 0, 0]]
    assert batch.types.tolist() == [[0, 0, 0, 0, 1, 1, 0], [0] * 7, [0] * 7]
    assert {a.dtype for a in (batch.ids, batch.mask, batch.types)} == {np.dtype(np.int32)}


def test_pad_without_rows():
    assert pad(ENCODED, np.array([], int), 4).ids.shape == (0, 4)
    assert pad(NOTHING, np.array([-1, -1]), 4).mask.tolist() == [[0] * 4] * 2


def test_pad_errors():
    with pytest.raises(ValueError, match=r"at least 6, the tokens of row 2\. Got 5\.$"):
        pad(ENCODED, np.array([0, 2]), 5)
    with pytest.raises(ValueError, match=r"^rows must be below 3\. Got 3\.$"):
        pad(ENCODED, np.array([0, 3]), 8)


def test_take_by_hand():
    step = Step(np.array([1, 2, -1, -1]), 6)
    batch, labels, weights = take(ENCODED, np.array([4, 5, 6], np.int32), step)
    assert batch.ids.tolist() == pad(ENCODED, step.rows, 6).ids.tolist()
    assert labels.tolist() == [5, 6, 0, 0]
    assert weights.tolist() == [1, 1, 0, 0]
    assert (labels.dtype, weights.dtype) == (np.int32, np.float32)


def test_take_needs_a_label_per_row():
    with pytest.raises(ValueError, match=r"^labels must be one per row, 3\. Got 2\.$"):
        take(ENCODED, np.array([4, 5]), Step(np.array([0]), 6))


def test_eval_plan_by_hand():
    plan = eval_plan(
        np.array([9, 3, 20, 4, 3, 16]), buckets=(4, 16, 64), max_length=32, batch_size=2
    )
    assert [(step.rows.tolist(), step.length) for step in plan] == [
        ([1, 4], 4),
        ([3, -1], 4),
        ([0, 5], 16),
        ([2, -1], 32),
    ]


def test_left_over_rows_join_the_next_longer_bucket():
    lengths = np.array([3, 3, 3, 10, 10, 10, 30])
    plan = train_plan(
        lengths, buckets=(4, 16, 64, 128), max_length=100, batch_size=2, seed=3, epoch=0
    )
    assert sorted(step.length for step in plan[:-1]) == [4, 16, 16]
    assert plan[-1].rows.tolist() == [6, -1]
    assert plan[-1].length == 64


def test_no_longer_shape_than_the_rows_need():
    plan = train_plan(
        np.full(5, 3), buckets=(4, 16, 64), max_length=64, batch_size=8, seed=0, epoch=0
    )
    assert [(step.length, sorted(step.rows)) for step in plan] == [(4, [-1, -1, -1, 0, 1, 2, 3, 4])]


SETTINGS = st.fixed_dictionaries(
    {
        "buckets": st.sampled_from([(16,), (4, 8, 16, 32), (8, 64), (512,)]),
        "max_length": st.sampled_from([40, 50]),
        "batch_size": st.integers(1, 9),
    }
)
LENGTHS = st.lists(st.integers(2, 40), max_size=60).map(lambda values: np.array(values, int))


def rows_of(plan):
    return np.concatenate([step.rows for step in plan]) if plan else np.zeros(0, int)


def check_every_row_once(plan, lengths, batch_size):
    rows = rows_of(plan)
    assert sorted(rows[rows >= 0]) == list(range(len(lengths)))
    assert all(step.rows.shape == (batch_size,) and step.rows.dtype == np.int64 for step in plan)
    assert all(lengths[step.rows[step.rows >= 0]].max() <= step.length for step in plan)
    assert all(isinstance(step.length, int) for step in plan)


@settings(deadline=None)
@given(LENGTHS, SETTINGS, st.integers(0, 5), st.integers(0, 5))
def test_train_plan(lengths, how, seed, epoch):
    plan = train_plan(lengths, **how, seed=seed, epoch=epoch)
    check_every_row_once(plan, lengths, how["batch_size"])
    assert len(plan) == -(-len(lengths) // how["batch_size"])
    assert all((step.rows >= 0).all() for step in plan[:-1])
    used = bucket_of(lengths, how["buckets"], how["max_length"])
    assert {step.length for step in plan} <= set(used.tolist())
    moved = sum(int((used[step.rows[step.rows >= 0]] != step.length).sum()) for step in plan)
    assert moved <= len(set(used.tolist())) * (how["batch_size"] - 1)

    again = train_plan(lengths, **how, seed=seed, epoch=epoch)
    assert [step.length for step in again] == [step.length for step in plan]
    assert rows_of(again).tolist() == rows_of(plan).tolist()


@settings(deadline=None)
@given(LENGTHS, SETTINGS)
def test_eval_plan(lengths, how):
    plan = eval_plan(lengths, **how)
    check_every_row_once(plan, lengths, how["batch_size"])
    used = bucket_of(lengths, how["buckets"], how["max_length"])
    assert all((used[step.rows[step.rows >= 0]] == step.length).all() for step in plan)
    rows = rows_of(plan)
    assert (np.diff(lengths[rows[rows >= 0]]) >= 0).all()
    ragged = [step.length for step in plan if (step.rows < 0).any()]
    assert len(ragged) == len(set(ragged))


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(0, 1000))
def test_seeds_and_epochs_differ(seed, epoch):
    lengths = np.arange(200) % 37 + 2
    how = {"buckets": (8, 16, 64), "max_length": 64, "batch_size": 4}
    here = rows_of(train_plan(lengths, **how, seed=seed, epoch=epoch)).tolist()
    assert here != rows_of(train_plan(lengths, **how, seed=seed, epoch=epoch + 1)).tolist()
    assert here != rows_of(train_plan(lengths, **how, seed=seed + 1, epoch=epoch)).tolist()
    if seed != epoch:
        assert here != rows_of(train_plan(lengths, **how, seed=epoch, epoch=seed)).tolist()


def test_rows_meet_other_rows_and_lengths_are_mixed():
    lengths = np.arange(400) % 30 + 2
    how = {"buckets": (8, 16, 32), "max_length": 32, "batch_size": 4}
    plans = [train_plan(lengths, **how, seed=0, epoch=epoch) for epoch in range(2)]
    companions = [{frozenset(step.rows.tolist()) for step in plan} for plan in plans]
    assert len(companions[0] & companions[1]) <= 2
    order = [step.length for step in plans[0]]
    assert np.count_nonzero(np.diff(order)) > 20  # sorted lengths would change twice


def test_an_interrupted_epoch_goes_on_where_it_was():
    how = {"buckets": (8, 32), "max_length": 32, "batch_size": 3, "seed": 7, "epoch": 2}
    lengths = np.arange(50) % 30 + 2
    seen = rows_of(train_plan(lengths, **how)[:6]).tolist()
    rest = rows_of(train_plan(lengths, **how)[6:]).tolist()
    assert sorted(row for row in seen + rest if row >= 0) == list(range(50))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"batch_size": 0}, r"^batch_size must be at least 1\. Got 0\.$"),
        ({"seed": -1}, r"^seed must be 0 or above\. Got -1\.$"),
        ({"epoch": -2}, r"^epoch must be 0 or above\. Got -2\.$"),
        ({"max_length": 8}, r"^lengths must be at most max_length, 8: .* Got 9 tokens in row 1\.$"),
    ],
)
def test_wrong_settings(wrong, sentence):
    how = {"buckets": (8,), "max_length": 16, "batch_size": 2, "seed": 0, "epoch": 0} | wrong
    with pytest.raises(ValueError, match=sentence):
        train_plan(np.array([3, 9]), **how)


def test_plans_of_half_a_million_rows_take_no_time():
    lengths = np.random.default_rng(0).integers(2, 129, 550_000)
    how = {"buckets": (16, 32, 64, 128), "max_length": 128, "batch_size": 32}
    start = time.perf_counter()
    train = train_plan(lengths, **how, seed=0, epoch=0)
    evaluation = eval_plan(lengths, **how)
    assert time.perf_counter() - start < 5  # in fact 0.3 s
    assert len(train) == 17_188
    assert len(rows_of(evaluation)) >= 550_000
