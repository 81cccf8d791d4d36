"""This bundle beside what a user would run instead, on the same rows, in one run.

Each contender is built, compiled and warmed up, and a small sweep finds its best batch size
and number of threads; then every repeat of a scenario runs each of them in turn. Scenarios
follow MLPerf's LoadGen: offline (all rows at once), single stream (one text at a time), and
requests of a fixed number of texts.
"""

import dataclasses
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ejax.bundle import Bundle
from ejax.classifier import EarlyExitClassifier
from ejax.data.tokenizer import Encoded
from ejax.errors import UserError
from ejax.evaluation import contenders
from ejax.evaluation.contenders import CORES, Run, Setting, Texts
from ejax.evaluation.evaluate import (
    LADDER,
    best_full_depth,
    compared_with_full,
    exit_measures,
    plain,
    quality,
    save_png,
    timing,
    write_json,
)
from ejax.evaluation.labelled import check_beside, check_single
from ejax.hardware import environment
from ejax.inference.cost import ideal_speedup
from ejax.rivals import Rival, enough
from ejax.storage import first_line
from ejax.timing import interleaved, timed, with_seconds

BATCHES = (8, 16, 32, 64, 128)
REQUESTS = (8, 32)
STREAM_ROWS, REQUEST_ROWS, SWEEP_ROWS, TRIAL_ROWS = 200, 256, 512, 32
SLOWEST = 4.0  # times slower than our full depth in a trial: left out, and said so
TOKENISING = "tokenising"
LIBRARIES = ("torch", "transformers", "onnx", "onnxruntime")
AGAINST: dict[str, tuple[tuple[str, ...], str]] = {  # libraries, what it is
    "torch-float32": (LIBRARIES[:2], "transformers in PyTorch, full depth, float32"),
    "torch-bfloat16": (LIBRARIES[:2], "the same under bfloat16 autocast"),
    "onnx-float32": (LIBRARIES, "ONNX Runtime, float32"),
    "onnx-int8": (LIBRARIES, "the same, dynamic INT8"),
    "torch-exit": (LIBRARIES[:2], "early exit in PyTorch, one text at a time"),
}


@dataclasses.dataclass
class Contender:
    """One way to run a model on the rows."""

    name: str
    run: Run
    encoded: Encoded | Texts
    setting: Setting  # the best, for all rows at once
    logits: np.ndarray  # float32 [N, C], of all rows
    peak_bytes: int | None  # resident memory from before it was built to its peak
    rival: Rival | None = None  # a linear model, and all its times are from text

    def offline(self) -> None:
        self.run(self.encoded, self.setting)

    def seconds_of(self, parts: Sequence[Encoded | Texts], setting: Setting) -> float:
        """One after the other."""
        return timed(lambda: [self.run(part, setting) for part in parts])


def bench(
    clf: EarlyExitClassifier,
    texts: Sequence[Any],
    labels: Sequence[int],
    *,
    threshold: float | None = None,
    against: Sequence[str] = tuple(AGAINST),
    beside: Mapping[str, EarlyExitClassifier] | None = None,
    rivals: Sequence[Rival] = (),
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
        full depth here and, where that is among `against`, in ONNX Runtime INT8.
      rivals: linear models for the same labels. They take texts: all their times are from there.
      repeats: timed passes.

    Returns:
      Ready for JSON. `contenders`: for each `accuracy`, `drop` (points below this model's
      full depth, with its paired 95 % interval), `agreement` with its labels, `setting`
      (batch and threads from the sweep), `peak_bytes` (rough: what earlier ones freed may serve
      again, and our own weights were there before), `offline`, `end_to_end` (with
      tokenisation, timed once in every pass), `single_stream` (seconds: mean, p50, p90, p99)
      and `requests` (texts per second by texts per request, medians of the passes); for full
      depth and those that run its weights also `logit_difference`, to this model in float32.
      `early_exit`: `mean_depth`, `exit_share`, `ideal_speedup`. `exit_accuracy`: of every
      exit on all rows. `curve`: accuracy and speed at other thresholds. `left_out`: who did
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

    def full_run(model: EarlyExitClassifier, rows: Encoded) -> Run:
        best = best_full_depth(model, rows)
        return lambda rows, _: best.full_logits(rows)

    def early_run() -> Run:
        return lambda rows, _: clf.decide_encoded(rows, threshold=levels).logits

    enter("ejax full depth", lambda: full_run(clf, encoded), encoded, all_cores)
    enter("ejax early exit", early_run, encoded, all_cores)
    installed = []
    for name in against:
        missing = [lib for lib in AGAINST[name][0] if importlib.util.find_spec(lib) is None]
        if missing:
            left_out[name] = f"not installed: {', '.join(missing)}"
            continue
        installed.append(name)
        enter(name, partial(build, name, clf.bundle, levels), encoded, settings_of(name))
    for name, model in (beside or {}).items():
        other, rows = model.on_one_device(), model.encode(texts)
        enter(f"ejax, {name}", partial(full_run, other, rows), rows, all_cores)
        if "onnx-int8" in installed:
            make = partial(build, "onnx-int8", other.bundle, levels)
            enter(f"onnx-int8, {name}", make, rows, settings_of("onnx-int8"))

    for rival in rivals:
        enter(rival.name, partial(rival_run, rival), Texts(texts), all_cores)
        field[-1].rival, field[-1].peak_bytes = rival, None  # its memory went to fitting

    seconds = interleaved(
        {TOKENISING: partial(clf.encode, texts), **{one.name: one.offline for one in field}},
        repeats, warm_up=False,
        progress=lambda turn, name: progress(f"offline, pass {turn} of {repeats}, {name}"),
    )  # fmt: skip
    stream = single_stream(field, repeats, progress)
    by_request = requests(field, repeats, progress)

    tokenising_seconds = statistics.median(seconds[TOKENISING])
    first = encoded.subset(np.arange(min(64, len(encoded))))
    exact = in_float32(clf).full_logits(first)
    full = field[0].logits
    decision = clf.decide_encoded(encoded, threshold=levels)
    early = quality(clf, encoded.lengths, truth, decision, full.argmax(axis=1))
    measured, task = [], clf.bundle.task
    for one in field:
        time_of = timing(seconds[one.name], len(encoded))
        from_text = time_of["seconds"]["median"] + (0 if one.rival else tokenising_seconds)
        same = one.name != "torch-exit" and one.name in (field[0].name, *against)
        measured.append(
            {
                "name": one.name,
                **compared_with_full(task, one.logits.argmax(axis=1), full.argmax(axis=1), truth),
                "logit_difference": float(np.abs(one.logits[: len(first)] - exact).max())
                if same
                else None,
                "setting": one.setting._asdict() if one.setting.batch else None,
                "peak_bytes": one.peak_bytes,
                "offline": time_of,
                "end_to_end": {"texts_per_second": len(encoded) / from_text},
                "single_stream": stream[one.name],
                "requests": by_request[one.name],
                **({"rival": one.rival.facts()} if one.rival else {}),
            }
        )
    return {
        "rows": len(encoded),
        "tokens": int(encoded.lengths.sum()),
        "layers": list(clf.bundle.exits.layers),
        "thresholds": list(levels),
        "early_exit": {key: early[key] for key in ("mean_depth", "exit_share")}
        | {
            "ideal_speedup": ideal_speedup(
                clf.bundle.cfg,
                clf.bundle.exits,
                encoded.lengths,
                decision.exit,
                encoded.whole_lengths,
            )
        },
        "exit_accuracy": exit_measures(clf.bundle, clf.exit_logits(encoded), truth),
        "curve": curve(clf, encoded, truth, progress),
        "dtype": clf.bundle.cfg.dtype,
        "profiled": clf.shapes.profile is not None,
        "tokenising_seconds": tokenising_seconds,
        "repeats": repeats,
        "cores": CORES,
        "contenders": measured,
        "left_out": left_out,
        "enough": enough(
            full.argmax(axis=1) == truth,
            {one.name: one.logits.argmax(axis=1) == truth for one in field if one.rival},
        ),
        "date": time.strftime("%Y-%m-%d"),
        **environment(),
        "libraries": {
            name: sys.modules[name].__version__ for name in LIBRARIES if name in sys.modules
        },
    }


def build(name: str, bundle: Bundle, thresholds: Sequence[float]) -> Run:
    library, _, kind = name.partition("-")
    if kind == "exit":
        return contenders.torch_early_exit(bundle, thresholds)
    make = contenders.torch_full if library == "torch" else contenders.onnx_full
    return make(bundle, kind)


def rival_run(rival: Rival) -> Run:
    return lambda rows, _: rival.scores(rows.inputs)


def settings_of(name: str) -> list[Setting]:
    """All batch sizes on all cores; the best of them is then tried on one core too."""
    if name == "torch-exit":
        return [Setting(1, CORES)]
    return [Setting(batch, CORES) for batch in BATCHES]


def entered(
    name: str,
    make: Callable[[], Run],
    encoded: Encoded | Texts,
    settings: Sequence[Setting],
    ours: Contender | None,
) -> Contender | str:
    """The contender at its best setting after one pass over all rows; or why not."""
    before = contenders.restart_peak()
    run = make()
    trial = encoded.subset(spread(len(encoded), TRIAL_ROWS))
    run(trial, settings[0])
    if ours is not None:
        own = ours.encoded.subset(spread(len(ours.encoded), TRIAL_ROWS))
        ours.run(own, ours.setting)  # compiles
        # The least of three: one slow moment must not leave a contender out.
        ratio = min(timed(partial(run, trial, settings[0])) for _ in range(3)) / min(
            timed(partial(ours.run, own, ours.setting)) for _ in range(3)
        )
        if ratio > SLOWEST:
            return (
                f"{ratio:.0f} times slower than full depth here, in a trial of {len(trial)} texts"
            )
    sample = encoded.subset(sweep_rows(encoded.lengths)) if isinstance(encoded, Encoded) else trial

    def seconds(setting: Setting) -> float:
        run(sample, setting)  # builds and lays out what this setting needs
        return min(timed(partial(run, sample, setting)) for _ in range(2))

    best = settings[0]
    if best.batch:
        best = min(settings, key=seconds)
        best = min(dict.fromkeys((best, best._replace(threads=1))), key=seconds)
    logits = run(encoded, best)
    peak = contenders.peak_since(before)
    if best.batch:  # what comes later must run too: one text, and requests
        for later in (
            Setting(1, 1),
            Setting(1, CORES),
            *(best._replace(batch=n) for n in REQUESTS),
        ):
            run(trial, later)
    return Contender(name, run, encoded, best, logits, peak)


def sweep_rows(lengths: np.ndarray) -> np.ndarray:
    """Whole batches as the run itself has them, of rows alike in length, from short to long."""
    widest = max(BATCHES)
    order = np.argsort(lengths, kind="stable")
    blocks = order[: order.size // widest * widest].reshape(-1, widest)
    return blocks[spread(len(blocks), SWEEP_ROWS // widest)].ravel() if len(blocks) else order


def spread(total: int, count: int) -> np.ndarray:
    """`count` row numbers evenly over all, or all."""
    return np.linspace(0, total - 1, min(count, total)).astype(int)


def single_stream(
    field: Sequence[Contender], repeats: int, progress: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Seconds per text, one at a time, by the better number of threads."""
    taken: dict[tuple[str, int], list[float]] = {}
    for repeat in range(-1, repeats):  # the first compiles
        for one in field:
            progress(f"single stream, pass {max(repeat, 0) + 1} of {repeats}, {one.name}")
            rows = spread(len(one.encoded), STREAM_ROWS)
            single = [one.encoded.subset(np.array([row])) for row in rows]
            for threads in sorted({1, CORES}) if one.setting.batch else (CORES,):
                setting = Setting(1, threads)
                times = [timed(partial(one.run, text, setting)) for text in single]
                if repeat >= 0:
                    taken.setdefault((one.name, threads), []).extend(times)
    found: dict[str, dict[str, float]] = {}
    for (name, threads), times in taken.items():
        summary = {
            "mean": statistics.fmean(times),
            **{f"p{p}": float(np.percentile(times, p)) for p in (50, 90, 99)},
            "threads": threads,
        }
        found[name] = min(found.get(name, summary), summary, key=lambda each: each["mean"])
    return found


def requests(
    field: Sequence[Contender], repeats: int, progress: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Texts per second where so many texts arrive together, in the order of the rows.

    Who pads all of a batch to its longest row may be sooner done in smaller ones.
    """
    found: dict[str, dict[str, float]] = {one.name: {} for one in field}
    for size in REQUESTS:
        count = min(REQUEST_ROWS, len(field[0].encoded)) // size
        starts = range(0, count * size, size)
        best: dict[str, Setting] = {}
        taken: dict[str, list[float]] = {one.name: [] for one in field}
        for repeat in range(-1, repeats):  # the first compiles, and chooses batches
            for one in field:
                progress(f"requests of {size}, {one.name}")
                parts = [one.encoded.subset(np.arange(i, i + size)) for i in starts]
                if repeat >= 0:
                    taken[one.name].append(one.seconds_of(parts, best[one.name]))
                    continue
                batches = {b for b in (1, 8, 16) if one.setting.batch > 1 and b < size} | {size}
                tried = [one.setting._replace(batch=b) for b in sorted(batches)]
                one.seconds_of(parts, tried[-1])
                best[one.name] = min(tried, key=partial(one.seconds_of, parts))
        for name, times in taken.items():
            found[name][str(size)] = count * size / statistics.median(times) if count else 0.0
    return found


def curve(
    clf: EarlyExitClassifier,
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


def bench_table(result: dict[str, Any]) -> Table:
    """The result as people read it."""
    made = Table(
        title=f"{result['rows']} texts, {result['layers'][-1]} layers, {result['hardware']}, "
        f"{result['date']}",
        caption="accuracy per exit: "
        + ", ".join(
            f"{k}: {v:.4f}" for k, v in zip(result["layers"], result["exit_accuracy"], strict=True)
        )
        + f"; mean depth {result['early_exit']['mean_depth']:.2f}, ideal speed-up "
        f"{result['early_exit']['ideal_speedup']:.2f}",
    )
    made.add_column("", no_wrap=True)
    for heading in (
        "accuracy", "points lost (95 %)", "offline texts/s", "spread", "from text",
        "mean ms", "p50", "p99", *(f"by {size}" for size in REQUESTS), "peak MB",
    ):  # fmt: skip
        made.add_column(heading, justify="right")
    for one in result["contenders"]:
        offline, stream = one["offline"], one["single_stream"]
        low, high = offline["seconds"]["min"], offline["seconds"]["max"]
        made.add_row(
            one["name"], f"{one['accuracy']:.4f}",
            f"{one['drop']:.2f} ({one['drop_low']:.2f} to {one['drop_high']:.2f})",
            "" if "rival" in one else f"{offline['texts_per_second']:.0f}",
            f"{result['rows'] / high:.0f} to {result['rows'] / low:.0f}",
            f"{one['end_to_end']['texts_per_second']:.0f}",
            *(f"{1000 * stream[key]:.1f}" for key in ("mean", "p50", "p99")),
            *(f"{one['requests'][str(size)]:.0f}" for size in REQUESTS),
            f"{one['peak_bytes'] / 1e6:.0f}" if one["peak_bytes"] is not None else "",
        )  # fmt: skip
    return made


def save_bench(result: dict[str, Any], path: Path) -> None:
    """The JSON at `path`, and next to it a PNG of accuracy against offline throughput."""
    write_json(result, path)
    save_png(partial(draw, result), path.with_suffix(".png"))


def draw(result: dict[str, Any], axes: Any) -> None:
    points = sorted(result["curve"], key=lambda p: p["texts_per_second"])
    axes.plot(
        [p["texts_per_second"] for p in points], [100 * p["accuracy"] for p in points],
        ".-", color="tab:blue", label="ejax, other thresholds",
    )  # fmt: skip
    for one in result["contenders"]:
        x, y = one["offline"]["texts_per_second"], 100 * one["accuracy"]
        ours = one["name"].startswith("ejax")
        label = plain(one["name"]) + ", from text" * ("rival" in one)
        axes.plot([x], [y], "s" if ours else "o", label=label, alpha=0.8)
    axes.set(xlabel="texts per second, offline", ylabel="accuracy, %")
    if any("rival" in one for one in result["contenders"]):
        axes.set_xscale("log")
    else:
        axes.set_xlim(0, None)
    axes.set_title(f"{result['rows']} texts, {result['date']}\n{result['hardware']}", fontsize=9)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
