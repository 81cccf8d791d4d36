"""Accuracy and measured time of a bundle at several thresholds, in one run.

Every repeat times full depth and each threshold in turn on the same tokenised rows,
after one pass that compiles; speed-ups are ratios of medians.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ejax import storage
from ejax.answers import certainty, chosen
from ejax.base import TextClassifier
from ejax.bundle import Bundle
from ejax.calibration.abstain import answered, in_words
from ejax.calibration.metrics import lost_points, macro_f1
from ejax.data.tokenizer import Encoded, Text
from ejax.errors import UserError
from ejax.evaluation.describe import numbers
from ejax.hardware import environment
from ejax.inference.cost import ideal_speedup, tile_rows
from ejax.inference.policy import Decision
from ejax.inference.shapes import Pool
from ejax.rivals import Rival, enough
from ejax.tasks import Task, task_with
from ejax.timing import interleaved, medians

LADDER = (0.6, 0.7, 0.8, 0.9, 0.95, 0.99)  # thresholds to try where none are given
TILE_TOKENS = (512, 1024, 2048, 4096)
TRIAL_TOKENS, TRIALS = 2 * TILE_TOKENS[-1], 5  # the least of three trials once took a slow tile
Level = float | tuple[float, ...] | str | None  # of a run, "full" is the baseline


def evaluate(
    clf: TextClassifier,
    encoded: Encoded,
    labels: np.ndarray,
    thresholds: Sequence[float | tuple[float, ...] | None],
    *,
    repeats: int = 3,
    exit_logits: np.ndarray | None = None,
    texts: Sequence[Text] = (),
    rivals: Sequence[Rival] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measures every threshold against full depth, side by side on one device.

    Args:
      encoded: the rows' tokens, N of them.
      labels: int [N].
      thresholds: numbers, or tuples of one per exit; above 1 stands for full depth through
        the early-exit program, None for the bundle's own.
      repeats: timed passes; the median and the extremes are reported.
      exit_logits: every exit's [E, N, C], where they are available.
      texts: the rows', from which tokenising and the rivals are timed, in the same passes.
      rivals: linear models for the same labels.

    Returns:
      Ready for JSON. `metric`: that of the task, "accuracy" below. `full`: the baseline, a
      straight scan of the same model with its
      best tile. `thresholds`: for each `accuracy`, `macro_f1`, `drop` (points below
      full depth, with its paired 95 % interval), `agreement` (share of rows with full
      depth's label), `mean_depth` (layers, weighted by tokens), `exit_share`,
      `seconds` (median, min, max), `texts_per_second`, `speedup` (measured),
      `ideal_speedup` (by operations on real tokens, heads counted, no packing),
      `efficiency` (the one over the other),
      `tile_rounding` (tokens run over those of rows alive at their padded length) and,
      where this machine has a profile, `predicted_seconds`. `exit_accuracy`: of every
      exit on all rows. With `texts` also `tokenising_seconds` and, of full depth and each
      threshold and rival, `from_text`: texts per second with tokenising; `rivals`: of each its
      accuracy; `enough`: a sentence where one does as well as full depth, or "". Of the bundle's
      own thresholds `drift` and, where it abstains, `abstain`, see `of_own`.
    """
    rows = len(encoded)
    if rows == 0:
        raise UserError("evaluation needs at least one labelled row. Got none.")
    progress("choosing the baseline's tile")
    clf = clf.on_one_device()
    baseline = best_full_depth(clf, encoded)
    runs: dict[Level, Callable[[], Any]] = {"full": partial(baseline.full_logits, encoded)}
    for threshold in thresholds:
        runs[threshold] = partial(clf.decide_encoded, encoded, threshold=threshold)
    for rival in rivals:
        runs[rival.name] = partial(rival.scores, texts)
    if texts:
        runs["tokenising"] = partial(clf.encode, texts)
    results: dict[Level, Any] = {}
    for name, run in runs.items():
        progress(f"compiling, {describe(name)}")
        results[name] = run()
    seconds = interleaved(
        runs, repeats, warm_up=False,
        progress=lambda turn, name: progress(f"pass {turn} of {repeats}, {describe(name)}"),
    )  # fmt: skip
    tokenising = statistics.median(seconds["tokenising"]) if texts else None
    times = {name: timing(taken, rows, tokenising) for name, taken in seconds.items()}
    task = clf.bundle.task
    full_answers = task.answers(results["full"], clf.bundle.calibration[-1])
    pools = list(clf.pools(encoded.lengths))
    if exit_logits is None:
        exit_logits = clf.exit_logits(encoded)
    return {
        "rows": rows,
        "metric": task.metric,
        "layers": list(clf.bundle.exits.layers),
        "dtype": clf.bundle.numerics,
        "repeats": repeats,
        f"exit_{task.metric}": exit_measures(clf.bundle, exit_logits, labels),
        "full": {
            **measures(task, full_answers, labels),
            "tiles": {
                length: baseline.tile(length)
                for length in sorted({shape.length for _, shape in pools})
            },
            **times["full"],
        },
        "thresholds": [
            {"threshold": np.asarray(clf.bundle.thresholds if t is None else t).tolist()}
            | quality(clf, encoded.lengths, labels, results[t], full_answers)
            | times[t]
            | speed(clf, encoded, pools, results[t], times[t], times["full"])
            for t in thresholds
        ],
        **(of_own(clf, results[None], labels) if None in results else {}),
        **({"tokenising_seconds": tokenising} if texts else {}),
        **compared_with_rivals(
            clf.bundle, rivals, full_answers, labels,
            {rival.name: results[rival.name] for rival in rivals},
            {rival.name: rows / statistics.median(seconds[rival.name]) for rival in rivals},
        ),
        "date": time.strftime("%Y-%m-%d"),
        **environment(onnx=bool(clf.bundle.graph)),
    }  # fmt: skip


def speed(
    clf: TextClassifier,
    encoded: Encoded,
    pools: "Pools",
    decision: Decision,
    taken: dict[str, Any],
    full: dict[str, Any],
) -> dict[str, Any]:
    """How much faster than full depth a decision was, and could have been."""
    speedup = full["seconds"]["median"] / taken["seconds"]["median"]
    ideal = ideal_speedup(
        clf.bundle.cfg, clf.bundle.exits, encoded.lengths, decision.exit, encoded.whole_lengths
    )
    return {
        "speedup": speedup,
        "ideal_speedup": ideal,
        "efficiency": speedup / ideal,
        "tile_rounding": tile_rounding(clf, pools, decision.exit),
        "predicted_seconds": predicted(clf, pools, decision.exit, encoded),
    }


def compared_with_rivals(
    bundle: Bundle,
    rivals: Sequence[Rival],
    full: np.ndarray,
    labels: np.ndarray,
    scores: dict[str, np.ndarray],
    from_text: dict[str, float],
) -> dict[str, Any]:
    """`rivals` and `enough` of `evaluate`; {} without any."""
    if not rivals:
        return {}
    task = bundle.task
    answers = {rival.name: rival.answers(scores[rival.name]) for rival in rivals}
    linear = [
        rival.facts()
        | compared_with_full(task, answers[rival.name], full, labels)
        | {"from_text": from_text[rival.name]}
        for rival in rivals
    ]
    right = {name: task.right(answer, labels) for name, answer in answers.items()}
    told = enough(task.right(full, labels), right) if task.metric == "accuracy" else ""
    return {"rivals": linear, "enough": told}


def of_own(clf: TextClassifier, decision: Decision, labels: np.ndarray) -> dict[str, Any]:
    """Of a decision at the bundle's own thresholds, what is known.

    Returns:
      `drift`, as `clf.drift` says it; and where the bundle abstains `abstain`: what is answered and
      how much of that rightly; both with a `sentence`.
    """
    found: dict[str, Any] = {}
    if clf.depth_record:
        found["drift"] = clf.drift(decision)._asdict()
    if clf.bundle.abstain:
        right = clf.bundle.task.right(chosen(clf.bundle, decision), labels)
        point = answered(certainty(clf.bundle, decision), right, clf.bundle.abstain)
        sentence = f"With its threshold of an answer: {in_words(point)}."
        found["abstain"] = point | {"sentence": sentence}
    return found


Pools = Sequence[Pool]


def exit_measures(bundle: Bundle, logits: np.ndarray, labels: np.ndarray) -> list[float]:
    """The metric of every exit on all rows, from its logits [E, N, O]."""
    task = bundle.task
    each = zip(logits, bundle.calibration, strict=True)
    return [task.measure(task.answers(*of_exit), labels) for of_exit in each]


def tile_rounding(clf: TextClassifier, pools: Pools, exit: np.ndarray) -> float:
    """Tokens that the engine's tiles hold over those of the rows alive, weighted by layers."""
    exits = clf.bundle.exits
    layers, exit = np.diff((0, *exits.encoder.layers)), exit - exits.has_zero
    run = alive = 0
    for rows, shape in pools:
        run += shape.length * int(layers @ tile_rows(exit[rows], shape.tile, len(layers)))
        alive += shape.length * int(layers @ tile_rows(exit[rows], 1, len(layers)))
    return run / max(alive, 1)


def predicted(
    clf: TextClassifier, pools: Pools, exit: np.ndarray, encoded: Encoded
) -> float | None:
    """Seconds by the profile of this machine; None where there is none of these lengths.

    That of an exported graph has texts alone.
    """
    profile = None if clf.bundle.graph else clf.shapes.profile
    if profile is None or any((s.tile, s.length) not in profile.seconds for _, s in pools):
        return None
    zero = profile.zero * int(encoded.whole_lengths.sum()) * clf.bundle.exits.has_zero
    return zero + sum(
        profile.predict(clf.bundle.exits, exit[rows], shape.tile, shape.length)
        for rows, shape in pools
    )


def best_full_depth(clf: TextClassifier, encoded: Encoded) -> TextClassifier:
    """The classifier whose tiles run rows of the commonest length fastest at full depth.

    Those are this machine's profile of each length, where there is one, and the same number of
    tokens for all lengths.
    """
    measured = clf.shapes.profile
    free = measured and dataclasses.replace(measured, tile={})
    candidates = [
        clf.on_one_device(dataclasses.replace(clf.shapes, tile_tokens=tokens, profile=free))
        for tokens in TILE_TOKENS
    ] + [clf.on_one_device()] * bool(measured)
    rows, shape = max(clf.pools(encoded.lengths), key=lambda pool: len(pool[0]))
    sample = encoded.subset(rows[: TRIAL_TOKENS // shape.length])

    runs = {candidate: partial(candidate.full_logits, sample) for candidate in candidates}
    seconds = medians(interleaved(runs, TRIALS))
    return min(candidates, key=seconds.__getitem__)


def quality(
    clf: TextClassifier,
    tokens: np.ndarray,
    labels: np.ndarray,
    decision: Decision,
    full: np.ndarray,
) -> dict[str, Any]:
    """Of a decision, compared with the answers of full depth."""
    layers = np.asarray(clf.bundle.exits.layers)
    counts = np.bincount(decision.exit, minlength=len(layers))
    return {
        **compared_with_full(clf.bundle.task, chosen(clf.bundle, decision), full, labels),
        "mean_depth": float((layers[decision.exit] * tokens).sum() / tokens.sum()),
        "exit_share": [float(share) for share in counts / len(labels)],
    }


def compared_with_full(
    task: Task, answers: np.ndarray, full: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """Answers compared with those of full depth, as `Task.answers` has them."""
    drop, low, high = lost_points(task, full, answers, labels)
    return {
        **measures(task, answers, labels),
        "drop": drop,
        "drop_low": low,
        "drop_high": high,
        "agreement": float(1 - task.differ(answers, full).mean()),
    }


def measures(task: Task, answers: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The metric, and of labels macro-F1."""
    found = {task.metric: task.measure(answers, labels)}
    if task.metric == "accuracy":
        found["macro_f1"] = macro_f1(answers, labels)
    return found


def timing(seconds: list[float], rows: int, tokenising: float | None = None) -> dict[str, Any]:
    """Of passes over so many rows; with the seconds of tokenising them also from text."""
    median = statistics.median(seconds)
    return {
        "seconds": {"median": median, "min": min(seconds), "max": max(seconds)},
        "texts_per_second": rows / median,
        **({} if tokenising is None else {"from_text": rows / (median + tokenising)}),
    }


def describe(threshold: Any) -> str:
    """A number, one per exit, None for a bundle's own, "full", or what else is timed."""
    if isinstance(threshold, str) and threshold != "full":
        return threshold
    if threshold is None or np.ndim(threshold):
        return "threshold per exit"
    full = threshold == "full" or float(threshold) > 1
    return "full depth" if full else f"threshold {threshold:g}"


def table(result: dict[str, Any]) -> Table:
    """The result as people read it."""
    layers, metric = result["layers"][-1], result["metric"]
    task = task_with([metric])
    macro = ("macro-F1",) if metric == "accuracy" else ()
    made = numbers(
        f"{result['rows']} texts, {result['dtype']}, {result['hardware']}",
        "threshold", task.metric_name, *macro, "drop, points (95 %)", f"depth of {layers}",
        "texts/s", "predicted", "speed-up", "ideal", "efficiency", "rounding",
    )  # fmt: skip
    full = result["full"]
    made.add_row(
        "full model", f"{full[metric]:.4f}", *(f"{full['macro_f1']:.4f}" for _ in macro), "",
        f"{layers:.2f}",
        f"{full['texts_per_second']:.0f}", "", "1.00", "1.00", "", "",
    )  # fmt: skip
    for p in result["thresholds"]:
        made.add_row(
            describe(p["threshold"]).removeprefix("threshold "),
            f"{p[metric]:.4f}",
            *(f"{p['macro_f1']:.4f}" for _ in macro),
            f"{p['drop']:.2f} ({p['drop_low']:.2f} to {p['drop_high']:.2f})",
            f"{p['mean_depth']:.2f}",
            f"{p['texts_per_second']:.0f}",
            f"{result['rows'] / p['predicted_seconds']:.0f}" if p["predicted_seconds"] else "",
            f"{p['speedup']:.2f}",
            f"{p['ideal_speedup']:.2f}",
            f"{p['efficiency']:.2f}",
            f"{p['tile_rounding']:.3f}",
        )
    shares = zip(result["layers"], result[f"exit_{metric}"], strict=True)
    made.caption = f"{task.metric_name} per exit: " + ", ".join(f"{k}: {v:.4f}" for k, v in shares)
    return made


def save(result: dict[str, Any], path: Path) -> None:
    """The JSON at `path`, and beside it a PNG of accuracy against measured time."""
    write_json(result, path)
    save_png(partial(draw, result), path.with_suffix(".png"))


def write_json(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_text(path, json.dumps(result, indent=2) + "\n")


def save_png(draw: Callable[[Any], None], path: Path) -> None:
    """What `draw` puts on one pair of axes, written whole or not at all."""
    save_figure(lambda panels: draw(panels[0]), path, size=(7, 4.5))


def save_figure(
    draw: Callable[[Sequence[Any]], None],
    path: Path,
    *,
    size: tuple[float, float],
    panels: tuple[int, int] = (1, 1),
) -> None:
    """What `draw` puts on several, rows by columns."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(*panels, squeeze=False).ravel().tolist()
    draw(axes)
    for one in axes:
        one.grid(alpha=0.3)
    with storage.becoming(path) as fresh:
        figure.savefig(fresh, dpi=150, format="png")


def plain(name: str) -> str:
    """A name as matplotlib shows it: what stands between two dollars would be a formula."""
    return name.replace("$", r"\$")


def draw(result: dict[str, Any], axes: Any) -> None:
    points = sorted(result["thresholds"], key=lambda p: p["seconds"]["median"])
    metric = result["metric"]

    def per_text(entry: dict[str, Any], which: str = "median") -> float:
        return 1000 * entry["seconds"][which] / result["rows"]

    ladder = [p for p in points if not isinstance(p["threshold"], list)]
    own = [p for p in points if isinstance(p["threshold"], list)]
    for some, label, style in ((ladder, "one number", "o-C0"), (own, "per exit", "DC3")):
        if not some:
            continue
        x = np.array([per_text(p) for p in some])
        low, high = (np.array([per_text(p, end) for p in some]) for end in ("min", "max"))
        axes.errorbar(
            x, [100 * p[metric] for p in some], xerr=(x - low, high - x), fmt=style,
            capsize=2, label=label,
        )  # fmt: skip
    for p in ladder:
        axes.annotate(
            describe(p["threshold"]).removeprefix("threshold "),
            (per_text(p), 100 * p[metric]),
            textcoords="offset points",
            xytext=(4, -11),
            fontsize=8,
        )
    full = result["full"]
    axes.plot([per_text(full)], [100 * full[metric]], "s", color="black", label="full model")
    axes.set(xlabel="milliseconds per text, measured", ylabel=f"100 x {metric}", xlim=(0, None))
    axes.set_title(f"{result['rows']} texts, {result['dtype']}, {result['date']}", fontsize=10)
    axes.legend(loc="lower right")
