"""This bundle compared with what a user would run instead, on the same rows, in one run.

Each contender is built, compiled and warmed up, and a small sweep finds its best batch size
and number of threads; then every repeat of a scenario runs each of them in turn.
"""

import dataclasses
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ejax.base import FULL, TextClassifier
from ejax.bundle import Bundle
from ejax.classifier import EarlyExitClassifier
from ejax.data.tokenizer import Encoded
from ejax.errors import UserError
from ejax.evaluation import contenders, engines
from ejax.evaluation.contenders import CORES, Run, Setting, Texts
from ejax.evaluation.engines import RANGE_ROWS
from ejax.evaluation.evaluate import (
    LADDER,
    best_full_depth,
    compared_with_full,
    exit_measures,
    quality,
    timing,
)
from ejax.evaluation.labelled import check_beside, check_single
from ejax.evaluation.scenarios import (
    BATCHES,
    Contender,
    entered,
    requests,
    single_stream,
    spread,
)
from ejax.hardware import environment
from ejax.inference.cost import ideal_speedup
from ejax.rivals import Rival, enough
from ejax.storage import first_line
from ejax.timing import interleaved, with_seconds

TOKENISING = "tokenising"
TORCH = ("torch", "transformers")
ONNX = (*TORCH, "onnx", "onnxruntime")
OPENVINO = (*TORCH, "openvino")
LIBRARIES = (*ONNX, "openvino", "nncf")
AGAINST: dict[str, tuple[tuple[str, ...], str]] = {  # libraries, what it is
    "torch-float32": (TORCH, "transformers in PyTorch, full depth, float32"),
    "torch-bfloat16": (TORCH, "the same under bfloat16 autocast"),
    "torch-compile": (TORCH, "the same in float32 by torch.compile"),
    "onnx-float32": (ONNX, "ONNX Runtime, float32"),
    "onnx-int8": (ONNX, "the same, INT8, ranges of each batch its own"),
    "onnx-int8-static": (ONNX, "the same, INT8, fixed ranges"),
    "openvino-bfloat16": (OPENVINO, "OpenVINO, bfloat16"),
    "openvino-int8": ((*OPENVINO, "nncf"), "OpenVINO, INT8 by nncf"),
    "torch-exit": (TORCH, "early exit in PyTorch, one text at a time"),
}
RANGED = ("onnx-int8-static", "openvino-int8")  # need texts for the ranges of activations


def bench(
    clf: TextClassifier,
    texts: Sequence[Any],
    labels: Sequence[int],
    *,
    threshold: float | None = None,
    against: Sequence[str] = tuple(AGAINST),
    beside: Mapping[str, TextClassifier] | None = None,
    rivals: Sequence[Rival] = (),
    ranges: Sequence[Any] = (),
    repeats: int = 3,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Times full depth, early exit and every contender whose libraries are installed.

    Args:
      texts: strings or pairs, N of them.
      labels: int [N].
      threshold: of the early exits, one number; None means the bundle's, one per exit.
      against: names in `AGAINST`.
      beside: other models for the same labels, by name, such as smaller ones: each runs at
        full depth here and, where that is among `against`, in ONNX Runtime INT8. Of an exported
        folder also its early exit, at its own thresholds. Where exit 0 is one of the exits,
        early exit also runs without it.
      rivals: linear models for the same labels. They take texts: all their times are from there.
      ranges: texts, such as those of the training, that fix the ranges of INT8 activations;
        contenders that need them are left out where there are none.
      repeats: timed passes.

    Returns:
      Ready for JSON. `contenders`: for each `accuracy`, `drop` (points below this model's
      full depth, with its paired 95 % interval), `agreement` with its labels, `setting`
      (batch and threads from the sweep), `peak_bytes` (rough: what earlier ones freed may serve
      again, and our own weights were there before), `offline`, `end_to_end` (with
      tokenisation, timed once in every pass), `single_stream` (seconds: mean, p50, p90, p99)
      and `requests` (texts per second by texts per request, medians of the passes); for full
      depth and those that run its weights also `logit_difference`, to this model in float32
      (null for an exported graph, which holds no weights).
      `early_exit`: `mean_depth`, `exit_share`, `ideal_speedup`; `without_exit_0`: the same of this
      bundle without it, or null. `exit_accuracy`: of every exit on all rows. `cores`: that this
      process may use. `curve`: accuracy and speed at other thresholds. `left_out`: who did
      not run, and why. `enough`: a sentence where a rival does as well as full depth, or "".

    Raises:
      ValueError: for an unknown contender, or a model beside with other labels.
    """
    unknown = [name for name in against if name not in AGAINST]
    if unknown:
        raise UserError(f"--against must be among {', '.join(AGAINST)}. Got {unknown[0]!r}.")
    check_single(clf.bundle, "bench")
    check_beside(clf.bundle, beside or {})
    levels = clf.bundle.thresholds
    if threshold is not None:
        levels = (float(threshold),) * len(levels)
    clf, truth = clf.on_one_device(), np.asarray(labels)
    encoded = clf.encode(texts)
    field, left_out = line_up(
        clf, texts, encoded, levels, against, beside or {}, rivals, ranges, progress
    )
    seconds = interleaved(
        {TOKENISING: partial(clf.encode, texts), **{one.name: one.offline for one in field}},
        repeats, warm_up=False,
        progress=lambda turn, name: progress(f"offline, pass {turn} of {repeats}, {name}"),
    )  # fmt: skip
    stream = single_stream(field, repeats, progress)
    by_request = requests(field, repeats, progress)
    tokenising_seconds = statistics.median(seconds[TOKENISING])
    first = encoded.subset(np.arange(min(64, len(encoded))))
    exact = None
    if isinstance(clf, EarlyExitClassifier):  # an exported graph has no weights to compare with
        exact = in_float32(clf).full_logits(first)
    runs_its_weights = {field[0].name, *against} - {"torch-exit"}

    def from_exact(one: Contender) -> float | None:
        if exact is None or one.name not in runs_its_weights:
            return None
        return float(np.abs(one.logits[: len(first)] - exact).max())

    full, without = field[0].answers, without_zero(clf, levels)
    return {
        "rows": len(encoded),
        "tokens": int(encoded.lengths.sum()),
        "layers": list(clf.bundle.exits.layers),
        "thresholds": list(levels),
        "early_exit": early_facts(clf, encoded, levels, full, truth),
        "without_exit_0": without and early_facts(clf, encoded, without, full, truth),
        "exit_accuracy": exit_measures(clf.bundle, clf.exit_logits(encoded), truth),
        "curve": curve(clf, encoded, truth, progress),
        "dtype": clf.bundle.numerics,
        "profiled": clf.shapes.profile is not None,
        "tokenising_seconds": tokenising_seconds,
        "repeats": repeats,
        "cores": CORES,
        "contenders": [
            {
                "name": one.name,
                **compared_with_full(clf.bundle.task, one.answers, full, truth),
                "logit_difference": from_exact(one),
                "setting": one.setting._asdict() if one.setting.batch else None,
                "peak_bytes": one.peak_bytes,
                **speed(one, seconds[one.name], tokenising_seconds),
                "single_stream": stream[one.name],
                "requests": by_request[one.name],
                **({"rival": one.rival.facts()} if one.rival else {}),
            }
            for one in field
        ],
        "left_out": left_out,
        "enough": enough(
            full == truth, {one.name: one.answers == truth for one in field if one.rival}
        ),
        "date": time.strftime("%Y-%m-%d"),
        **environment(onnx=bool(clf.bundle.graph)),
        "libraries": {
            name: sys.modules[name].__version__ for name in LIBRARIES if name in sys.modules
        },
    }


def line_up(
    clf: TextClassifier,
    texts: Sequence[Any],
    encoded: Encoded,
    levels: Sequence[float],
    against: Sequence[str],
    beside: Mapping[str, TextClassifier],
    rivals: Sequence[Rival],
    ranges: Sequence[Any],
    progress: Callable[[str], None],
) -> tuple[list[Contender], dict[str, str]]:
    """Those that run, full depth first, and why others do not; arguments as of `bench`."""
    all_cores = [Setting(0, CORES)]  # ours chooses tiles instead of batches
    left_out: dict[str, str] = {}
    field: list[Contender] = []

    def enter(name: str, make: Callable[[], Run], rows: Encoded | Texts, settings: Any) -> None:
        progress(f"building and trying {name}")
        try:
            tried = field[0] if field and isinstance(rows, Encoded) else None  # a rival stays
            found = entered(name, make, rows, settings, tried)
        except Exception as error:  # of another library: its own words, and the rest goes on
            if name.partition(",")[0] not in AGAINST:
                raise
            found = f"failed: {type(error).__name__}: {first_line(error)}"
        if isinstance(found, str):
            left_out[name] = found
        else:
            field.append(found)

    def full_run(model: TextClassifier, rows: Encoded) -> Run:
        best = best_full_depth(model, rows)
        return lambda rows, _: best.full_logits(rows)

    def early_run(model: TextClassifier, levels: Sequence[float]) -> Run:
        return lambda rows, _: model.decide_encoded(rows, threshold=levels).logits

    def enter_early(model: TextClassifier, levels: Sequence[float], rows: Encoded, of: str) -> None:
        enter(f"ejax early exit{of}", partial(early_run, model, levels), rows, all_cores)
        if without := without_zero(model, levels):
            name = f"ejax early exit without exit 0{of}"
            enter(name, partial(early_run, model, without), rows, all_cores)

    enter("ejax full depth", lambda: full_run(clf, encoded), encoded, all_cores)
    enter_early(clf, levels, encoded, "")
    installed = []
    ranged = None
    if ranges and not clf.bundle.graph and not set(against).isdisjoint(RANGED):
        ranged = clf.encode([ranges[i] for i in spread(len(ranges), RANGE_ROWS)])
    for name in against:
        if clf.bundle.graph:
            left_out[name] = "an exported folder holds no weights to run in it"
            continue
        if name in RANGED and ranged is None:
            left_out[name] = "needs training rows (--train) for the ranges of its activations"
            continue
        missing = [lib for lib in AGAINST[name][0] if importlib.util.find_spec(lib) is None]
        if missing:
            left_out[name] = f"not installed: {', '.join(missing)}"
            continue
        installed.append(name)
        enter(name, partial(build, name, clf.bundle, levels, ranged), encoded, settings_of(name))
    for name, model in beside.items():
        other, rows = model.on_one_device(), model.encode(texts)
        enter(f"ejax, {name}", partial(full_run, other, rows), rows, all_cores)
        if other.bundle.graph:
            enter_early(other, other.bundle.thresholds, rows, f", {name}")
        elif "onnx-int8" in installed:
            make = partial(build, "onnx-int8", other.bundle, levels, None)
            enter(f"onnx-int8, {name}", make, rows, settings_of("onnx-int8"))
    for rival in rivals:
        enter(rival.name, partial(rival_run, rival), Texts(texts), all_cores)
        field[-1].rival, field[-1].peak_bytes = rival, None  # its memory went to fitting
    return field, left_out


def without_zero(clf: TextClassifier, levels: Sequence[float]) -> tuple[float, ...] | None:
    """The same thresholds with nobody leaving at exit 0; None where nobody does."""
    reached = clf.bundle.exits.has_zero and levels[0] <= 1
    return (FULL, *levels[1:]) if reached else None


def early_facts(
    clf: TextClassifier,
    encoded: Encoded,
    levels: Sequence[float],
    full: np.ndarray,
    truth: np.ndarray,
) -> dict[str, Any]:
    """How deep the rows go at these thresholds; `full` [N] are the answers of full depth."""
    decision, bundle = clf.decide_encoded(encoded, threshold=levels), clf.bundle
    early = quality(clf, encoded.lengths, truth, decision, full)
    return {key: early[key] for key in ("mean_depth", "exit_share")} | {
        "ideal_speedup": ideal_speedup(
            bundle.cfg, bundle.exits, encoded.lengths, decision.exit, encoded.whole_lengths
        )
    }


def speed(one: Contender, seconds: list[float], tokenising: float) -> dict[str, Any]:
    """Of all rows at once, from tokens and from text; a rival starts from text in both."""
    time_of = timing(seconds, len(one.encoded))
    from_text = time_of["seconds"]["median"] + (0 if one.rival else tokenising)
    return {
        "offline": time_of,
        "end_to_end": {"texts_per_second": len(one.encoded) / from_text},
    }


def build(name: str, bundle: Bundle, thresholds: Sequence[float], ranges: Encoded | None) -> Run:
    library, _, kind = name.partition("-")
    if kind == "exit":
        return contenders.torch_early_exit(bundle, thresholds)
    if library == "torch":
        return contenders.torch_full(bundle, kind)
    make = engines.onnx_full if library == "onnx" else engines.openvino_full
    return make(bundle, kind, ranges)


def rival_run(rival: Rival) -> Run:
    return lambda rows, _: rival.scores(rows.inputs)


def settings_of(name: str) -> list[Setting]:
    """All batch sizes on all cores; the best of them is then tried on one core too."""
    if name == "torch-exit":
        return [Setting(1, CORES)]
    return [Setting(batch, CORES) for batch in BATCHES]


def curve(
    clf: TextClassifier,
    encoded: Encoded,
    truth: np.ndarray,
    progress: Callable[[str], None],
) -> list[dict[str, float]]:
    """Accuracy and texts per second of one pass at each threshold of a ladder."""
    points = []
    for threshold in LADDER:
        progress(f"threshold {threshold:g}")
        decision, seconds = with_seconds(partial(clf.decide_encoded, encoded, threshold=threshold))
        answers = decision.logits.argmax(axis=1)
        points.append(
            {
                "threshold": threshold,
                "accuracy": clf.bundle.task.measure(answers, truth),
                "texts_per_second": len(encoded) / seconds,
            }
        )
    return points


def in_float32(clf: EarlyExitClassifier) -> EarlyExitClassifier:
    cfg = dataclasses.replace(clf.bundle.cfg, dtype="float32", residual_dtype="float32")
    return EarlyExitClassifier(dataclasses.replace(clf.bundle, cfg=cfg), devices=clf.devices)
