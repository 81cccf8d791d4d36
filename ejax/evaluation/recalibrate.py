"""New temperatures and new default thresholds for a trained bundle, from other rows."""

import dataclasses
import time
from typing import Any

import numpy as np

from ejax.bundle import Bundle
from ejax.calibration.calibrate import Answers, calibrate
from ejax.calibration.drift import depth_of
from ejax.classifier import EarlyExitClassifier
from ejax.data.rows import encode
from ejax.data.sources import Split
from ejax.evaluation.targets import trained_on

FEWEST = 2  # rows; far more are needed for temperatures to mean something


def recalibrate(clf: EarlyExitClassifier, split: Split, *, max_drop: float | None = None) -> Bundle:
    """The bundle with temperatures and thresholds fitted on these rows; weights as they are.

    Rows that the bundle's provenance records as dev-B are not fitted on: where the split holds
    some, they are reported on as "dev_b". Those of them that placed the exits, and so report no
    more, are rows like others. Rows trained on, of which the weights are too sure, are left out.
    The figures of the former temperatures and thresholds are dropped from the provenance, but
    for what placed the exits.

    Args:
      max_drop: points of accuracy on these rows that the thresholds may lose against
        full depth; None means as many as in the training, or else 0.5.

    Raises:
      ValueError: when too few rows are left.
    """
    bundle = clf.bundle
    if max_drop is None:
        max_drop = float(bundle.provenance.get("config", {}).get("max_drop", 0.5))
    task = encode(split, bundle.encode)
    recorded, trained = bundle.provenance.get("rows", {}), trained_on(bundle)
    held_out = set(recorded.get("dev_b", ())) - set(recorded.get("placed", ()))
    # Temperatures of earlier rows had their part in which exits were kept.
    before = set(recorded.get("calibration", ()) if "placed" in recorded else ())
    part_of = np.array(
        [
            "trained" if name in trained else "dev_b" if name in held_out else "calibration"
            for name in task.hashes
        ]
    )
    fit, kept = (np.flatnonzero(part_of == name) for name in ("calibration", "dev_b"))
    if len(fit) < FEWEST:
        raise ValueError(
            f"calibration needs at least {FEWEST} rows, and {split.origin} has {len(fit)} that "
            f"were neither trained on nor are in the dev-B of this bundle, which is kept for "
            f"reports: give other rows."
        )
    logits = clf.exit_logits(task.encoded)
    rows = Answers(logits, task.labels, task.encoded.lengths)
    parts = {"calibration": rows.take(fit)} | ({"dev_b": rows.take(kept)} if len(kept) else {})
    chosen = calibrate(
        parts, "calibration", bundle.exits.layers, max_drop=max_drop, where=split.origin,
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
        "rows": {name: rows for name, rows in recorded.items() if name != "thresholds"}
        | {"calibration": sorted(before.union(task.hashes[i] for i in fit))},
    }
    gone = ("target", "abstain")
    kept_on = {name: what for name, what in bundle.provenance.items() if name not in gone}
    return dataclasses.replace(
        bundle,
        temperatures=tuple(chosen["temperatures"]),
        thresholds=tuple(chosen["thresholds"]),
        provenance=kept_on | changed,
        abstain=0.0,
    )
