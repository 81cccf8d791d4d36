"""A threshold below which a trained bundle gives no answer, from labelled rows."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from ejax.answers import certainty
from ejax.base import TextClassifier
from ejax.bundle import Bundle
from ejax.calibration.abstain import answered, check_accuracy, in_words, lowest_abstain
from ejax.data.sources import Split
from ejax.evaluation.labelled import check_single
from ejax.evaluation.targets import rows_for_thresholds


def choose_abstain(
    clf: TextClassifier,
    split: Split,
    accuracy: float,
    *,
    bundle: Bundle | None = None,
    rows_are_new: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Bundle, dict[str, Any]]:
    """The bundle with the lowest `abstain` at which its answers are right so often on these rows.

    An estimate. Rows that fitted the bundle are left out, and the rows used are recorded with
    those that chose its thresholds.

    Args:
      accuracy: the share of the answered that is to be right, in (0, 1].
      bundle: the classifier's with other thresholds, such as those just chosen; None means its own.
      rows_are_new: as of `ejax.evaluation.targets.choose`.

    Returns:
      The bundle, and, ready for JSON, what `answered` says at the threshold chosen, with `target`,
      `data`, `rows_left_out`, `dtype`, `date` and `sentence`.

    Raises:
      ValueError: where no rows are left, or no threshold reaches the accuracy.
    """
    check_accuracy(accuracy)
    check_single(clf.bundle, "abstain")
    bundle = bundle or clf.bundle
    task = rows_for_thresholds(clf.bundle, split)
    progress("answers at the default thresholds")
    decision = clf.decide_encoded(task.encoded, threshold=bundle.thresholds)
    right = decision.logits.argmax(axis=1) == task.labels
    certainties = certainty(clf.bundle, decision)
    found = answered(certainties, right, lowest_abstain(certainties, right, accuracy))
    report = found | {
        "target": accuracy,
        "data": split.origin,
        "rows_left_out": len(split) - len(right),
        "dtype": bundle.numerics,
        "date": time.strftime("%Y-%m-%d"),
        "sentence": f"No answer below a certainty of {found['threshold']:.4g}: the lowest at which "
        f"{100 * accuracy:g} % of the answers are right, estimated on {split.origin}: "
        f"{in_words(found)}. It holds for texts like those.{bundle.ledger.doubt(rows_are_new)}",
    }
    changed = dataclasses.replace(
        bundle,
        abstain=found["threshold"],
        provenance=bundle.provenance | {"abstain": report},
        ledger=bundle.ledger.with_rows("thresholds", task.hashes),
    )
    return changed, report
