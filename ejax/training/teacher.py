"""A bundle that teaches another one: its full depth, calibrated.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (2015), at the temperature
that calibrates the teacher and not a higher one.

Axes: N rows, C classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import softmax

from ejax.bundle import Bundle, check_alike, load_bundle
from ejax.classifier import EarlyExitClassifier
from ejax.data.sources import Split
from ejax.errors import UserError
from ejax.inference.shapes import check_finite

CHUNK_ROWS = 1 << 16  # tokenised and run together


def load_teacher(folder: str, train: Split, dtype: str) -> Bundle:
    """The bundle, which must have the labels of train and read as many texts per row.

    Args:
      dtype: of its products.
    """
    bundle = load_bundle(folder, dtype=dtype)
    if bundle.exits.problem_type != train.problem_type:
        raise UserError(
            f"teacher {folder} must be of the problem type of train, {train.problem_type}. Got "
            f"{bundle.exits.problem_type}."
        )
    check_alike(f"teacher {folder}", bundle, train.labels, train.text_columns, in_order=False)
    return bundle


def probabilities(bundle: Bundle, texts: Sequence[Any], labels: Sequence[str]) -> np.ndarray:
    """What its last exit says, float32 [N, C], in the order of `labels`.

    It reads the texts by its own tokenizer.

    Raises:
      ValueError: naming a text whose logits are not finite.
    """
    clf = EarlyExitClassifier(bundle)
    order = [bundle.labels.index(label) for label in labels]
    parts = []
    for start in range(0, len(texts), CHUNK_ROWS):
        encoded = clf.encode(texts[start : start + CHUNK_ROWS], first=start)
        logits = clf.full_logits(encoded)
        check_finite(logits, start)
        parts.append(softmax(logits / np.float32(bundle.temperatures[-1]), axis=1)[:, order])
    return np.concatenate(parts)
