"""Fewer exits for a trained bundle: the placement of the least measured cost."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from rich.table import Table as Shown
from rich.text import Text

from ejax.base import TextClassifier
from ejax.bundle import Bundle
from ejax.calibration.drift import depth_of
from ejax.calibration.placement import cheapest, check_count, place, point_of
from ejax.calibration.thresholds import describe
from ejax.card import describe_threshold
from ejax.classifier import EarlyExitClassifier
from ejax.data.sources import Split
from ejax.data.tokenizer import Encoded
from ejax.evaluation.describe import numbers
from ejax.evaluation.labelled import check_single
from ejax.evaluation.targets import needed_profile, rows_for_thresholds, table_of
from ejax.hardware import describe as machine
from ejax.models.early_exit import cut
from ejax.timing import interleaved, medians


def place_exits(
    clf: TextClassifier,
    split: Split,
    count: int,
    *,
    max_drop: float = 0.5,
    repeats: int = 3,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Bundle, dict[str, Any]]:
    """The bundle with at most `count` of its exits, and a report on the choice.

    Costs are of all rows at once, by this machine's profile. The layers above the last exit
    kept are gone; temperatures stay. Rows are treated as `ejax.evaluation.targets.choose` does.

    Returns:
      The bundle, and, ready for JSON: `found`, per number of exits the cheapest placement
      within `max_drop` with `ms`, predicted milliseconds per text; `measured`, the
      milliseconds per text of the bundle as it was (`before`) and with the cheapest placement
      (`after`), medians of `repeats` in turns; `before`, the operating point of the bundle's own
      thresholds; `differ`, rows that leave elsewhere in the new bundle than simulated; `sentence`.

    Raises:
      ValueError: without a profile, or where no rows are left.
    """
    bundle = clf.bundle
    bundle.check_weights("place")
    assert isinstance(clf, EarlyExitClassifier)  # what has weights is one
    check_single(bundle, "place")
    needed_profile(clf, "placing exits")
    check_count(count, len(bundle.exits.layers), bundle.adds_evidence)
    task = rows_for_thresholds(bundle, split)
    progress("every exit's answers")
    table = table_of(clf, task)
    progress("trying placements")
    found = place(
        table, count, *row_costs(clf, task.encoded), max_drop=max_drop,
        with_first=bundle.adds_evidence,
    )  # fmt: skip
    best = cheapest(found)
    placed = keep(bundle, best.exits, best.thresholds)
    taken, seconds = in_turns(clf, placed, task.encoded, repeats, progress)
    after, simulated = taken["after"], table.leave(best.of_all(len(table.layers)))
    rows = len(task.labels)
    kept = ", ".join(map(str, placed.exits.layers))
    sentence = (
        f"Exits at layers {kept} of {', '.join(map(str, bundle.exits.layers))}: the cheapest "
        f"here of at most {count} exits that lose at most {max_drop:g} points, estimated on {rows} "
        f"rows of {split.origin}. It holds for texts like those.{bundle.ledger.doubt()}"
    )
    report = {
        "data": split.origin,
        "rows": rows,
        "rows_left_out": len(split) - rows,
        "max_drop": max_drop,
        "found": [point_of(table, one) for one in found],
        "before": describe(table, taken["before"]),
        "measured": {name: 1000 * median / rows for name, median in medians(seconds).items()},
        "differ": int((np.asarray(best.exits)[after] != simulated).sum()),
        "dtype": bundle.cfg.dtype,
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "sentence": sentence,
    }
    changed = {
        "thresholds_from": sentence,
        "placed": report,
        "operating_points": {},
        "metrics": metrics_left(bundle, task.hashes, best.exits),
        "depth": depth_of(
            {
                "rows": rows,
                "exit_share": (np.bincount(after, minlength=len(best.exits)) / rows).tolist(),
                "threshold": best.thresholds,
            }
        ),
    }
    gone = ("target", "abstain")
    provenance = {k: v for k, v in bundle.provenance.items() if k not in gone} | changed
    ledger = bundle.ledger.with_rows("placed", task.hashes, free=["thresholds"])
    return (
        dataclasses.replace(placed, provenance=provenance, ledger=ledger, abstain=0.0),
        report,
    )


def in_turns(
    clf: EarlyExitClassifier,
    placed: Bundle,
    encoded: Encoded,
    repeats: int,
    progress: Callable[[str], None],
) -> tuple[dict[str, np.ndarray], dict[str, list[float]]]:
    """The exits taken [N] and the seconds of each pass, before and after, on one device."""
    options: dict[str, Any] = {"shapes": clf.shapes, "one_type": clf.one_type}
    runs = {
        "before": clf.on_one_device(),
        "after": EarlyExitClassifier(placed, devices=clf.devices[:1], **options),
    }
    taken = {name: run.decide_encoded(encoded).exit for name, run in runs.items()}
    seconds = interleaved(
        {name: partial(run.decide_encoded, encoded) for name, run in runs.items()},
        repeats, warm_up=False, progress=lambda turn, _: progress(f"pass {turn} of {repeats}"),
    )  # fmt: skip
    return taken, seconds


def metrics_left(
    bundle: Bundle, hashes: Sequence[str], exits: Sequence[int]
) -> dict[str, list[Any]]:
    """What is reported of these exits on rows that are known, and not among those used here."""
    metrics, ledger = bundle.provenance.get("metrics", {}), bundle.ledger
    left = [n for n in metrics if n in ledger.names() and not ledger.among(hashes, [n])]
    return {name: [metrics[name][e] for e in exits] for name in left}


def row_costs(clf: EarlyExitClassifier, encoded: Encoded) -> tuple[np.ndarray, np.ndarray]:
    """Milliseconds of each row for one layer, and for passing one exit, in a whole tile: [N]."""
    profile = needed_profile(clf, "placing exits")
    layer, passing = np.zeros((2, len(encoded)))
    for rows, shape in clf.pools(encoded.lengths):
        part = profile.seconds[shape.tile, shape.length]
        scale = 1000 * profile.whole / shape.tile
        layer[rows], passing[rows] = scale * part.layer, scale * (part.head + part.gather)
    return layer, passing


def keep(bundle: Bundle, exits: Sequence[int], thresholds: Sequence[float]) -> Bundle:
    """The bundle with some of its exits, by index, and no layers above the last of them.

    Where later exits add exit 0's logits to their own, it has to be among them.
    """
    assert 0 in exits or not bundle.adds_evidence
    layers = tuple(bundle.exits.layers[e] for e in exits)
    config = dataclasses.replace(bundle.exits, layers=layers)
    params = bundle.variables["params"]
    kept = np.flatnonzero(np.isin(bundle.exits.encoder.layers, layers))
    heads = jax.tree.map(lambda leaf: leaf[kept], params["heads"])
    heads = {**heads, "mix": heads["mix"][:, : layers[-1]]}
    zero = {}
    if config.has_zero:
        grams = params["ngrams"]
        zero = {"ngrams": {**grams, "evidence": grams["evidence"][kept]}}
    encoder = jax.tree.map(lambda leaf: leaf[: layers[-1]], params["bert"]["layers"])
    return dataclasses.replace(
        bundle,
        cfg=cut(bundle.cfg, config),
        exits=config,
        variables={
            "params": {"bert": {**params["bert"], "layers": encoder}, "heads": heads, **zero}
        },
        temperatures=tuple(bundle.temperatures[e] for e in exits),
        thresholds=tuple(thresholds),
    )


def placements_table(report: dict[str, Any]) -> Shown:
    """The report as people read it."""
    made = numbers(
        Text(f"{report['rows']} rows of {report['data']}", "italic"),
        "exits", "thresholds", "accuracy", "drop, points (95 %)", "depth", "ms predicted",
    )  # fmt: skip
    for p in report["found"]:
        made.add_row(
            ", ".join(map(str, p["layers"])),
            ", ".join(map(describe_threshold, p["threshold"][:-1])),
            f"{p['accuracy']:.4f}",
            f"{p['drop']:.2f} ({p['drop_low']:.2f} to {p['drop_high']:.2f})",
            f"{p['mean_depth']:.2f}",
            f"{p['ms']:.3f}",
        )
    before, after = report["measured"].values()
    was = report["before"]
    made.caption = (
        f"chosen on these rows, which flatters the drop; measured, ms per text: {before:.3f} "
        f"before (accuracy {was['accuracy']:.4f}, depth {was['mean_depth']:.2f}), {after:.3f} "
        f"with the cheapest"
    )
    return made
