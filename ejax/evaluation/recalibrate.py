"""New temperatures and new default thresholds for a trained bundle, from other rows."""

import dataclasses
import time
from typing import Any

import numpy as np

from ejax.base import TextClassifier
from ejax.bundle import Bundle
from ejax.calibration.calibrate import Answers, calibrate
from ejax.calibration.drift import depth_of
from ejax.data.rows import encode
from ejax.data.sources import Split
from ejax.errors import UserError
from ejax.provenance import TRAINED, check_known

FEWEST = 2  # rows; far more are needed for temperatures to mean something


def recalibrate(
    clf: TextClassifier,
    split: Split,
    *,
    max_drop: float | None = None,
    rows_are_new: bool = False,
) -> Bundle:
    """The bundle with temperatures and thresholds fitted on these rows; weights as they are.

    Rows that the bundle's ledger records as dev-B are not fitted on: where the split holds
    some, they are reported on as "dev_b". Those of them that placed the exits, and so report no
    more, are rows like others. Rows trained on, of which the weights are too sure, are left out.
    The figures of the former temperatures and thresholds are dropped from the provenance, but
    for what placed the exits.

    Args:
      max_drop: points of accuracy on these rows that the thresholds may lose against
        full depth; None means as many as in the training, or else 0.5.
      rows_are_new: that none of the rows trained the bundle, where it does not know all that did.

    Raises:
      ValueError: when too few rows are left, or which rows trained the bundle is not known.
    """
    bundle = clf.bundle
    check_known(bundle.ledger, rows_are_new, "calibration")
    if max_drop is None:
        max_drop = float(bundle.provenance.get("config", {}).get("max_drop", 0.5))
    task = encode(split, bundle.encode)
    trained, dev_b, placed = (
        bundle.ledger.among(task.hashes, names) for names in (TRAINED, ("dev_b",), ("placed",))
    )
    held_out = dev_b - placed
    part_of = np.array(
        [
            "trained" if name in trained else "dev_b" if name in held_out else "calibration"
            for name in task.hashes
        ]
    )
    fit, kept = (np.flatnonzero(part_of == name) for name in ("calibration", "dev_b"))
    if len(fit) < FEWEST:
        raise UserError(
            f"calibration needs at least {FEWEST} rows, and {split.origin} has {len(fit)} that "
            f"were neither trained on nor are in the dev-B of this bundle, which is kept for "
            f"reports: give other rows."
        )
    logits = clf.exit_logits(task.encoded)
    rows = Answers(logits, task.labels, task.encoded.lengths)
    parts = {"calibration": rows.take(fit)} | ({"dev_b": rows.take(kept)} if len(kept) else {})
    chosen = calibrate(
        parts, "calibration", bundle.exits.layers, max_drop=max_drop, where=split.origin,
        task=bundle.task,
        exit0_cost=bundle.exit0_cost(task.encoded),
    )  # fmt: skip
    changed: dict[str, Any] = {
        **{name: chosen[name] for name in ("thresholds_from", "operating_points", "metrics")},
        "calibrated": {
            "data": split.origin,
            "date": time.strftime("%Y-%m-%d"),
            "max_drop": max_drop,
            "rows_left_out": len(part_of) - len(fit),
        },
        "depth": depth_of(chosen["operating_points"]["calibration"]),
    }
    changed["thresholds_from"] += bundle.ledger.doubt(on_word=True)
    # Temperatures of earlier rows had their part in which exits were kept.
    free = {"thresholds"} if "placed" in bundle.ledger.names() else {"thresholds", "calibration"}
    ledger = bundle.ledger.with_rows("calibration", [task.hashes[i] for i in fit], free=free)
    gone = ("target", "abstain", "measured_before_export")
    kept_on = {name: what for name, what in bundle.provenance.items() if name not in gone}
    return dataclasses.replace(
        bundle,
        temperatures=tuple(tuple(t) if isinstance(t, list) else t for t in chosen["temperatures"]),
        thresholds=tuple(chosen["thresholds"]),
        provenance=kept_on | changed,
        ledger=ledger,
        abstain=0.0,
    )
