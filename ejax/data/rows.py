"""A tokenised split: what training, calibration and reports read of labelled rows.

Axes: N rows, C classes.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ejax.config import Problem
from ejax.data.labels import REGRESSION, SEVERAL, SINGLE
from ejax.data.sources import Example, Split, row_hash
from ejax.data.tokenizer import Encoded
from ejax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TokenizedSplit:
    """N rows: their tokens, labels and hashes, and what a teacher says of them."""

    encoded: Encoded
    labels: np.ndarray  # by the problem type, see `label_array`
    hashes: list[str]  # one per row, see `ejax.data.sources.row_hash`
    teacher: np.ndarray | None = None  # its probabilities, float32 [N, C]

    def take(self, rows: np.ndarray) -> "TokenizedSplit":
        """Some of the rows, by number: int [M]."""
        hashes = [self.hashes[row] for row in rows]
        teacher = None if self.teacher is None else self.teacher[rows]
        return TokenizedSplit(self.encoded.subset(rows), self.labels[rows], hashes, teacher)

    @property
    def labelled(self) -> np.ndarray:
        """The numbers of the rows that have a label: int [M]."""
        if self.labels.ndim == 2:
            return np.flatnonzero((self.labels >= 0).all(axis=1))
        return np.flatnonzero(
            self.labels >= 0 if self.labels.dtype.kind == "i" else ~np.isnan(self.labels)
        )

    def teaching(self) -> "TokenizedSplit":
        """The rows that teach a head by itself: all with a teacher, else those with a label."""
        return self if self.teacher is not None else self.take(self.labelled)

    def targets(self, classes: int, distillation: float) -> np.ndarray:
        """What each class weighs in a row's cross-entropy, by label and teacher: [N, C].

        Of a single label per row.
        """
        by_label = (self.labels[:, None] == np.arange(classes)).astype(np.float64)
        return by_label if self.teacher is None else by_label + distillation * self.teacher

    def without(self, seen: set[str], refusal: str) -> np.ndarray:
        """The numbers of the rows whose hashes are not in `seen`: int [M].

        Raises:
          ValueError: `refusal`, where none are left.
        """
        unseen = np.array([i for i, name in enumerate(self.hashes) if name not in seen], int)
        if not len(unseen):
            raise UserError(refusal)
        return unseen

    def fingerprint(self) -> str:
        """16 hex digits of the sha256 over the rows' hashes and labels."""
        rows = zip(self.hashes, self.labels.tolist(), strict=True)
        content = " ".join(f"{name} {label}" for name, label in rows)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def encode(
    split: Iterable[Example],
    tokenise: Callable[[Sequence[Any]], Encoded],
    like: Split | None = None,
) -> TokenizedSplit:
    """The rows of a split as `tokenise`, such as `Bundle.encode`, reads them.

    Args:
      like: the split that says the problem type and the labels, where `split` is a plain list;
        without one a row has a single label.
    """
    rows = list(split)
    told = like or (split if isinstance(split, Split) else None)
    problem, classes = (told.problem_type, len(told.labels)) if told else (SINGLE, 0)
    return TokenizedSplit(
        tokenise([row.inputs for row in rows]),
        label_array(rows, problem, classes),
        [row_hash(row) for row in rows],
    )


def label_array(rows: Sequence[Example], problem: Problem, classes: int) -> np.ndarray:
    """The labels of N rows, by the problem type.

    Args:
      classes: C, for several labels a row.

    Returns:
      int32 [N], -1 for a row without one; for several labels float32 [N, C] of 0 and 1, a row of
      -1 without; for a regression float32 [N], NaN without.
    """
    labels: list[Any] = [row.label for row in rows]
    if problem != SEVERAL:
        return np.asarray(labels, np.float32 if problem == REGRESSION else np.int32)
    array = np.zeros((len(rows), classes), np.float32)
    for i, chosen in enumerate(labels):
        array[i, list(chosen)] = 1
        if chosen == (-1,):
            array[i] = -1
    return array
