"""A bundle as a folder with one ONNX graph, in float32 or in INT8 with fixed ranges.

INT8's ranges come from some rows, and so does which layers stay float32. Those rows are recorded
in the ledger as "ranges": `ejax thresholds` leaves them out.

Axes: B batch, T tokens, L layers, E exits, N rows, O outputs of a head.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ejax.errors import UserError

try:
    import onnx  # noqa: F401
    import onnxruntime
except ModuleNotFoundError as error:
    raise UserError(
        f"ONNX graphs need {error.name}, which is not installed: `pip install '.[onnx]'` in ejax's "
        f"folder."
    ) from None

from ejax import storage
from ejax.bundle import Bundle
from ejax.bundle_files import WEIGHTS, Graph
from ejax.calibration.evidence import with_evidence
from ejax.data.batches import pad
from ejax.data.sources import Example, row_hash
from ejax.data.tokenizer import Encoded
from ejax.export.graph import early_exit_graph, every_exit_graph
from ejax.export.operators import OPERATORS, Operators
from ejax.inference.policy import select_exit
from ejax.models.ngrams import ragged_logits
from ejax.provenance import FITTED, TRAINED, promises_risk
from ejax.saving import check_output, save_bundle

RANGE_ROWS = 100
FEWEST_ROWS = 20  # of fewer the lowest and the highest value say little
# Of the logits' spread. Where both are normal, noise of a tenth turns 3 % of the answers of two
# equally likely classes, as many for the better as for the worse where neither is easy.
MOST_NOISE = 0.1
Progress = Callable[[str], None]


def export_onnx(
    bundle: Bundle,
    folder: str | Path,
    *,
    rows: Sequence[Example] | None = None,
    origin: str = "",
    operators: Operators = "onnxruntime",
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Writes the folder of the runtime "onnx"; see `ejax.export.graph` for what its graph holds.

    Args:
      bundle: with the encoder's weights.
      rows: for INT8, `RANGE_ROWS` of which are drawn; their labels are not read. None means
        float32. Rows that were trained on, or are in the bundle's dev-B, are left out; those that
        fitted the bundle already come first, so that few others are spent.
      origin: where the rows come from, in words.
      operators: see `ejax.export.operators`.

    Returns:
      Ready for JSON, {} for float32: `data`, `date`, `rows`; `answers_as_before` and
      `at_another_exit`, of these rows at the bundle's thresholds, against float32;
      `layers_in_float32`; `noise` per exit, see `noise_of`.

    Raises:
      ValueError: without weights, for too few rows, where no layer stands INT8, or `folder`
        cannot be written.
    """
    bundle.check_weights("ejax export")
    if operators not in OPERATORS:
        raise UserError(f"operators must be one of {', '.join(OPERATORS)}. Got {operators!r}.")
    folder = check_output(folder)
    with storage.reaching(folder):
        if (folder / WEIGHTS).exists():
            raise UserError(
                f"{folder} is a bundle with weights, which a graph would replace: choose another "
                f"output folder."
            )
    if rows is None:
        content = early_exit_graph(bundle, operators=operators)
        save_bundle(_with_graph(bundle, Graph(content, "float32", operators)), folder)
        return {}
    drawn = rows_for_ranges(bundle, rows, origin)
    encoded = bundle.encode([row.inputs for row in drawn])
    progress("the ranges of every product")
    logits, ranges = activation_ranges(bundle, encoded)
    ranges, quantised = choose_layers(bundle, encoded, logits, ranges, progress=progress)
    before, after = (decided(bundle, encoded, each) for each in (logits, quantised))
    answers, others = (
        bundle.task.answers(one.logits, bundle.calibration[one.exit]) for one in (before, after)
    )
    report = {
        "data": origin,
        "date": time.strftime("%Y-%m-%d"),
        "rows": len(drawn),
        "answers_as_before": int((~bundle.task.differ(others, answers)).sum()),
        "at_another_exit": int((before.exit != after.exit).sum()),
        "layers_in_float32": (1 + np.flatnonzero(np.isnan(ranges[:, 0, 0]))).tolist(),
        "noise": noise_of(quantised, logits).tolist(),
    }
    content = early_exit_graph(bundle, precision="int8", operators=operators, ranges=ranges)
    recorded = dataclasses.replace(
        bundle,
        provenance=bundle.provenance | {"int8": report},
        ledger=bundle.ledger.with_rows("ranges", list(map(row_hash, drawn))),
    )
    save_bundle(_with_graph(recorded, Graph(content, "int8", operators)), folder)
    return report


def _with_graph(bundle: Bundle, graph: Graph) -> Bundle:
    zero = {k: v for k, v in bundle.variables["params"].items() if k == "ngrams"}
    # Until `ejax calibrate` on the folder, its metrics are those of before.
    provenance = bundle.provenance | {"measured_before_export": bundle.numerics}
    if chosen := provenance.get("thresholds_from"):
        after = ", and no promise for this folder" if promises_risk(provenance) else ""
        provenance["thresholds_from"] = (
            f"{chosen} That was in {bundle.numerics}, before the export{after}."
        )
    return dataclasses.replace(
        bundle, graph=graph, variables={"params": zero}, provenance=provenance
    )


def rows_for_ranges(bundle: Bundle, rows: Sequence[Example], origin: str) -> list[Example]:
    """At most `RANGE_ROWS` of the rows, drawn by a fixed seed as `export_onnx` says.

    Raises:
      ValueError: where fewer than `FEWEST_ROWS` are left.
    """
    every = list(rows)
    hashes = list(map(row_hash, every))
    trained, dev_b, placed, fitted = (
        bundle.ledger.among(hashes, names) for names in (TRAINED, ("dev_b",), ("placed",), FITTED)
    )
    kept_apart = trained | (dev_b - placed)
    order = np.random.default_rng(0).permutation(len(every))
    left = [row for row in order if hashes[row] not in kept_apart]
    if len(left) < FEWEST_ROWS:
        raise UserError(
            f"INT8 needs at least {FEWEST_ROWS} rows for its ranges, and {origin} has "
            f"{len(left)} that were neither trained on nor are in the dev-B of this bundle, which "
            f"is kept for reports: give other rows."
        )
    left.sort(key=lambda row: hashes[row] not in fitted)
    return [every[row] for row in np.sort(left[:RANGE_ROWS])]


def activation_ranges(bundle: Bundle, encoded: Encoded) -> tuple[np.ndarray, np.ndarray]:
    """Runs the rows in float32, each alone, so that padding has no part in it.

    Returns:
      The logits float32 [E, N, O] of the exits after layers, without what exit 0 adds; and the
      lowest and the highest input of the four products of every layer, float32 [L, 4, 2].
    """
    logits, extremes = zip(*_run(every_exit_graph(bundle.without_zero), encoded), strict=True)
    low, high = np.stack(extremes).min(axis=0)[..., 0], np.stack(extremes).max(axis=0)[..., 1]
    return np.concatenate(logits, axis=1), np.stack([low, high], axis=-1)


def choose_layers(
    bundle: Bundle,
    encoded: Encoded,
    logits: np.ndarray,
    ranges: np.ndarray,
    *,
    progress: Progress = lambda _: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Which layers are INT8: all, or those that add least noise, while no exit's is too much.

    The noise of an exit may be `MOST_NOISE`. Where that of all layers together is above, each layer
    is put into INT8 alone; the one that then adds most stays float32, and the next, until the rest
    together are within the bound.

    Args:
      encoded: the rows that `logits` and `ranges` are of, as `activation_ranges` gives them.

    Returns:
      The ranges, NaN for a layer that stays float32, and the logits float32 [E, N, O] with them.

    Raises:
      ValueError: where no layer can be INT8.
    """

    def tried(layers: Any) -> tuple[np.ndarray, np.ndarray, float]:
        chosen = np.full_like(ranges, np.nan)
        chosen[layers] = ranges[layers]
        content = every_exit_graph(bundle.without_zero, ranges=chosen)
        found = np.concatenate([one for (one,) in _run(content, encoded)], axis=1)
        return chosen, found, float(noise_of(found, logits).max())

    layers = list(range(len(ranges)))
    progress("all layers in INT8")
    chosen, found, noise = tried(layers)
    if noise > MOST_NOISE:
        progress("each layer in INT8 alone")
        alone = [tried([layer])[2] for layer in layers]
        layers.sort(key=lambda layer: alone[layer])
    while noise > MOST_NOISE:
        layers.pop()
        if not layers:
            raise UserError(
                f"no layer of this encoder stands INT8: the noise in its logits is above "
                f"{MOST_NOISE:g} of their spread. Export it without --int8."
            )
        progress(f"{len(layers)} of {len(ranges)} layers in INT8")
        chosen, found, noise = tried(layers)
    return chosen, found


def noise_of(logits: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """How far logits are from those of float32, as a share of their spread over rows: [E].

    Both root mean squares, over rows and outputs.

    Args:
      logits, exact: float32 [E, N, O].

    >>> exact = np.array([[[0.0], [2.0]]])
    >>> noise_of(exact + [[[0.1], [-0.1]]], exact).round(3).tolist()
    [0.1]
    """
    spread = ((exact - exact.mean(axis=1, keepdims=True)) ** 2).mean(axis=(1, 2))
    return np.sqrt(((logits - exact) ** 2).mean(axis=(1, 2)) / np.maximum(spread, 1e-12))


def decided(bundle: Bundle, encoded: Encoded, logits: np.ndarray) -> Any:
    """What the bundle's thresholds decide of logits as `activation_ranges` gives them."""
    if bundle.exits.has_zero:
        whole, params = encoded.whole, bundle.variables["params"]["ngrams"]
        assert whole is not None
        zero = ragged_logits(params, whole.ids, whole.types, whole.offsets)
        logits = with_evidence(np.concatenate([zero[None], logits]), params["evidence"])
    decision = select_exit(logits, bundle.thresholds, bundle.calibration, task=bundle.task)
    return type(decision)(*map(np.asarray, decision))


def _run(content: bytes, encoded: Encoded) -> list[list[np.ndarray]]:
    """The outputs of a graph for every row, each alone at its own length."""
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    found = []
    for row, length in enumerate(encoded.lengths.tolist()):
        batch = pad(encoded, np.array([row]), length)
        given = {"ids": batch.ids, "types": batch.types, "mask": batch.mask}
        found.append(session.run(None, given))
    return found
