"""Which rows stand together in a batch, and the padded arrays of one.

A plan is a list of `Step`s and a pure function of the rows' lengths and (seed, epoch):
the position to resume from is a number of steps. All rows of a step are padded to one
length, so that a program is compiled once per bucket.

Axes: B batch, T tokens, N rows.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ejax.data.tokenizer import Encoded, bucket_of
from ejax.errors import UserError

if TYPE_CHECKING:
    from ejax.models.bert import Batch

# What one more program to compile is worth, in tokens trained on: 24 s of compiling the step of
# MiniLM-L6 on 2 CPU cores, where that trains about 2,700 tokens a second.
PROGRAM_TOKENS = 1 << 16


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One batch of a plan.

    Attributes:
      rows: int64 [B], row numbers; -1 is padding.
      length: tokens T that the batch is padded to.
    """

    rows: np.ndarray
    length: int


def train_plan(
    lengths: np.ndarray,
    *,
    buckets: Sequence[int],
    max_length: int,
    batch_size: int,
    seed: int,
    epoch: int,
) -> list[Step]:
    """One epoch: every row once, in ceil(N / batch_size) steps, in an order of its own.

    Rows of one bucket are shuffled and batched; those left over join the next longer
    bucket. So only one batch has padding rows, and it comes last.

    Args:
      lengths: tokens per row, int [N], each at most `max_length`.
      buckets, max_length: see `bucket_of`.
      seed, epoch: not negative; the plan depends on them alone (and on the lengths).
    """
    _check_batch_size(batch_size)
    for name, value in (("seed", seed), ("epoch", epoch)):
        if value < 0:
            raise UserError(f"{name} must be 0 or above. Got {value}.")
    bucket = bucket_of(lengths, buckets, max_length)
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(bucket))
    steps: list[Step] = []
    waiting = order[:0]
    length = 0
    for length, rows in _by_bucket(order, bucket):
        waiting = np.concatenate([waiting, rows])
        full = len(waiting) // batch_size * batch_size
        steps += [Step(batch, length) for batch in waiting[:full].reshape(-1, batch_size)]
        waiting = waiting[full:]
    steps = [steps[i] for i in rng.permutation(len(steps))]
    if len(waiting):
        steps.append(Step(_filled(waiting, batch_size)[0], length))
    return steps


def eval_plan(
    lengths: np.ndarray, *, buckets: Sequence[int], max_length: int, batch_size: int
) -> list[Step]:
    """Every row exactly once, from the shortest to the longest.

    A row's own length alone decides the length it is padded to, so each bucket may
    end in a batch with padding rows.

    Args: as for `train_plan`.
    """
    _check_batch_size(batch_size)
    bucket = bucket_of(lengths, buckets, max_length)
    order = np.argsort(lengths, kind="stable")
    return [
        Step(batch, length)
        for length, rows in _by_bucket(order, bucket)
        for batch in _filled(rows, batch_size)
    ]


def pad(encoded: Encoded, rows: np.ndarray, length: int) -> "Batch":
    """`arrays_of` as a Batch."""
    from ejax.models.bert import Batch  # which imports jax

    return Batch(*arrays_of(encoded, rows, length))


def arrays_of(
    encoded: Encoded, rows: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of `encoded` padded to `length` tokens: their ids, mask and types, int32 [B, T].

    Padding tokens, and the whole of a row -1, have id 0, type 0 and mask 0.

    Raises:
      ValueError: for a row that is longer than `length` or does not exist.
    """
    rows = np.asarray(rows, np.int64)
    if len(rows) and rows.max() >= len(encoded):
        raise UserError(f"rows must be below {len(encoded)}. Got {rows.max()}.")
    real = rows >= 0
    starts, counts = np.zeros_like(rows), np.zeros_like(rows)
    starts[real] = encoded.offsets[rows[real]]
    counts[real] = encoded.offsets[rows[real] + 1] - starts[real]
    if len(rows) and counts.max() > length:
        raise UserError(
            f"length must be at least {counts.max()}, the tokens of row "
            f"{rows[counts.argmax()]}. Got {length}."
        )
    mask = np.arange(length) < counts[:, None]
    tokens = (starts[:, None] + np.arange(length))[mask]
    ids = np.zeros(mask.shape, np.int32)
    types = np.zeros(mask.shape, np.int32)
    ids[mask] = encoded.ids[tokens]
    types[mask] = encoded.types[tokens]
    return ids, mask.astype(np.int32), types


def take(
    encoded: Encoded, labels: np.ndarray, step: Step
) -> tuple["Batch", np.ndarray, np.ndarray]:
    """A step's (Batch [B, T], labels [B, ...], weights float32 [B]).

    Padding rows have mask 0, label 0 and weight 0; all others have weight 1.
    """
    if len(labels) != len(encoded):
        raise UserError(f"labels must be one per row, {len(encoded)}. Got {len(labels)}.")
    real = step.rows >= 0
    taken = np.zeros((len(step.rows), *labels.shape[1:]), labels.dtype)
    taken[real] = labels[step.rows[real]]
    return pad(encoded, step.rows, step.length), taken, real.astype(np.float32)


def worth_compiling(
    lengths: np.ndarray, buckets: Sequence[int], max_length: int, epochs: int
) -> tuple[int, ...]:
    """The buckets that save more padding in `epochs` passes than their programs take to compile.

    Of all subsets that hold the longest row, the one with the least tokens padded, programs
    counted as `PROGRAM_TOKENS` each.

    >>> lengths = np.repeat([10, 30, 100], [400, 50, 50])
    >>> worth_compiling(lengths, (12, 32, 48, 112), 128, epochs=1)
    (112,)
    >>> worth_compiling(lengths, (12, 32, 48, 112), 128, epochs=20)
    (12, 32, 112)
    """
    edges, rows = np.unique(bucket_of(lengths, buckets, max_length), return_counts=True)
    before = np.concatenate([[0], np.cumsum(rows)]) * epochs
    # best[j]: the least cost of the rows of the first j buckets, the last of them kept.
    best: list[float] = [0.0]
    kept: list[tuple[int, ...]] = [()]
    for j in range(1, len(edges) + 1):
        costs = [
            best[i] + PROGRAM_TOKENS + float((before[j] - before[i]) * edges[j - 1])
            for i in range(j)
        ]
        i = int(np.argmin(costs))
        best.append(costs[i])
        kept.append((*kept[i], int(edges[j - 1])))
    return kept[-1]


def _by_bucket(order: np.ndarray, bucket: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(length, its rows in the given order) for every bucket that has rows, ascending."""
    sorted_rows = order[np.argsort(bucket[order], kind="stable")]
    found, counts = np.unique(bucket, return_counts=True)
    parts = np.split(sorted_rows, np.cumsum(counts)[:-1])
    return list(zip(found.tolist(), parts, strict=False))


def _filled(rows: np.ndarray, batch_size: int) -> np.ndarray:
    """Rows as [batches, B], filled up with -1."""
    padding = np.full(-len(rows) % batch_size, -1, rows.dtype)
    return np.concatenate([rows, padding]).reshape(-1, batch_size)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1. Got {batch_size}.")
