"""This bundle beside what a user would run instead, on the same rows, in one run.

Every repeat runs each contender in turn, after a pass that compiles and warms up and a
small sweep that finds each one's best batch size (offline, on all cores) and number of
threads (single stream). Scenarios follow MLPerf's
LoadGen: offline (all rows at once), single stream (one text at a time), and requests of
a fixed number of texts.
"""

import dataclasses
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ejax.bundle import Bundle
from ejax.calibration.metrics import accuracy, paired_interval
from ejax.classifier import EarlyExitClassifier
from ejax.data.tokenizer import Encoded
from ejax.evaluation import contenders
from ejax.evaluation.contenders import CORES, Run, Setting
from ejax.evaluation.evaluate import best_full_depth, save_png, timing, write_json
from ejax.training.finetune import environment

BATCHES = (16, 64, 128)
REQUESTS = (8, 32)
STREAM_ROWS, REQUEST_ROWS, SWEEP_ROWS = 200, 512, 256
AGAINST: dict[str, tuple[tuple[str, ...], str]] = {  # libraries, what it is
    "torch-float32": (("torch", "transformers"), "transformers in PyTorch, full depth, float32"),
    "torch-bfloat16": (("torch", "transformers"), "the same under bfloat16 autocast"),
    "onnx-float32": (("torch", "transformers", "onnx", "onnxruntime"), "ONNX Runtime, float32"),
    "onnx-int8": (("torch", "transformers", "onnx", "onnxruntime"), "the same, dynamic INT8"),
    "torch-exit": (("torch", "transformers"), "early exit in PyTorch, one text at a time"),
}


def bench(
    clf: EarlyExitClassifier,
    texts: Sequence[Any],
    labels: Sequence[int],
    *,
    threshold: float | None = None,
    against: Sequence[str] = tuple(AGAINST),
    repeats: int = 3,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Times full depth, early exit and every contender whose libraries are installed.

    Args:
      texts: strings or pairs, N of them.
      labels: int [N].
      threshold: of the early exits, one number; None means the bundle's.
      against: names in `AGAINST`.
      repeats: timed passes of the offline scenario.

    Returns:
      Ready for JSON. `contenders`: for each `accuracy`, `drop` (points below this model's
      full depth, with its paired 95 % interval), `logit_difference` (largest, to this model
      in float32, first 64 rows), `setting` (batch and threads from the sweep), `offline`,
      `end_to_end` (with tokenisation, timed once for all), `single_stream` (seconds: mean,
      p50, p90, p99) and `requests` (texts per second by texts per request, the better
      of two passes). `left_out`: the
      contenders whose libraries are missing.

    Raises:
      ValueError: for an unknown contender.
    """
    unknown = [name for name in against if name not in AGAINST]
    if unknown:
        raise ValueError(f"--against must be among {', '.join(AGAINST)}. Got {unknown[0]!r}.")
    level = clf.bundle.threshold if threshold is None else float(threshold)
    start = time.perf_counter()
    encoded = clf.encode(texts)
    tokenising = time.perf_counter() - start
    progress("choosing tiles")
    clf = best_full_depth(clf, encoded)

    runs: dict[str, Run] = {
        "ejax full depth": lambda rows, _: clf.full_logits(rows),
        f"ejax, threshold {level:g}": lambda rows, _: (
            clf.decide_encoded(rows, threshold=level).logits
        ),
    }
    left_out = {}
    for name in against:
        missing = [lib for lib in AGAINST[name][0] if importlib.util.find_spec(lib) is None]
        if missing:
            left_out[name] = f"not installed: {', '.join(missing)}"
            continue
        progress(f"building {name}")
        runs[name] = build(name, clf.bundle, level)

    sample = encoded.subset(np.linspace(0, len(encoded) - 1, SWEEP_ROWS).astype(int))
    offline = {name: best_setting(run, sample, name, progress) for name, run in runs.items()}
    logits: dict[str, np.ndarray] = {}
    for name, run in runs.items():
        progress(f"first pass, {name}")
        logits[name] = run(encoded, offline[name])
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name, run in runs.items():
            progress(f"offline, pass {repeat + 1} of {repeats}, {name}")
            seconds[name].append(timed(partial(run, encoded, offline[name])))
    stream = single_stream(runs, encoded, progress)
    by_request = {size: requests(runs, encoded, size, progress) for size in REQUESTS}

    first = encoded.subset(np.arange(min(64, len(encoded))))
    exact = in_float32(clf).full_logits(first)
    truth = np.asarray(labels)
    full = logits["ejax full depth"].argmax(axis=1) == truth
    measured = []
    for name in runs:
        right = logits[name].argmax(axis=1) == truth
        drop, low, high = paired_interval(full, right)
        time_of = timing(seconds[name], len(encoded))
        whole = time_of["seconds"]["median"] + tokenising
        measured.append(
            {
                "name": name,
                "accuracy": accuracy(logits[name].argmax(axis=1), truth),
                "drop": drop,
                "drop_low": low,
                "drop_high": high,
                "logit_difference": float(np.abs(logits[name][: len(first)] - exact).max()),
                "setting": offline[name]._asdict() if not name.startswith("ejax") else None,
                "offline": time_of,
                "end_to_end": {"texts_per_second": len(encoded) / whole},
                "single_stream": stream[name],
                "requests": {str(size): by_request[size][name] for size in REQUESTS},
            }
        )
    return {
        "rows": len(encoded),
        "tokens": int(encoded.lengths.sum()),
        "layers": list(clf.bundle.exits.layers),
        "threshold": level,
        "dtype": clf.bundle.cfg.dtype,
        "tile_tokens": clf.shapes.tile_tokens,
        "tokenising_seconds": tokenising,
        "repeats": repeats,
        "cores": CORES,
        "contenders": measured,
        "left_out": left_out,
        "date": time.strftime("%Y-%m-%d"),
        **environment(),
        "libraries": libraries(),
    }


def build(name: str, bundle: Bundle, threshold: float) -> Run:
    library, _, kind = name.partition("-")
    if kind == "exit":
        return contenders.torch_early_exit(bundle, threshold)
    make = contenders.torch_full if library == "torch" else contenders.onnx_full
    return make(bundle, kind)


def best_setting(run: Run, sample: Encoded, name: str, progress: Callable[[str], None]) -> Setting:
    """The fastest batch size on a sample, on all cores; ours choose tiles instead."""
    settings = [Setting(batch, CORES) for batch in BATCHES]
    if name.startswith("ejax") or name == "torch-exit":
        settings = settings[:1] if name.startswith("ejax") else thread_settings()
    if len(settings) == 1:
        return settings[0]
    progress(f"choosing a setting, {name}")
    run(sample, settings[0])
    return min(settings, key=lambda setting: timed(partial(run, sample, setting)))


def thread_settings() -> list[Setting]:
    return [Setting(1, threads) for threads in sorted({1, CORES})]


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def single_stream(
    runs: dict[str, Run], encoded: Encoded, progress: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Seconds per text, one at a time, by the better number of threads."""
    rows = np.linspace(0, len(encoded) - 1, min(STREAM_ROWS, len(encoded))).astype(int)
    single = [encoded.subset(np.array([row])) for row in rows]
    found: dict[str, dict[str, float]] = {}
    for name, run in runs.items():
        progress(f"single stream, {name}")
        for setting in thread_settings()[-1 if name.startswith("ejax") else 0 :]:
            for one in single:
                run(one, setting)
            taken = [timed(partial(run, one, setting)) for one in single]
            summary = {
                "mean": statistics.fmean(taken),
                **{f"p{p}": float(np.percentile(taken, p)) for p in (50, 90, 99)},
                "threads": setting.threads,
            }
            if name not in found or summary["mean"] < found[name]["mean"]:
                found[name] = summary
    return found


def requests(
    runs: dict[str, Run], encoded: Encoded, size: int, progress: Callable[[str], None]
) -> dict[str, float]:
    """Texts per second where `size` texts arrive together, in the order of the rows."""
    count = min(REQUEST_ROWS, len(encoded)) // size
    parts = [encoded.subset(np.arange(i * size, (i + 1) * size)) for i in range(count)]
    found = {}
    for name, run in runs.items():
        progress(f"requests of {size}, {name}")

        def all_parts(run: Run = run) -> None:
            for part in parts:
                run(part, Setting(size, CORES))

        all_parts()
        found[name] = count * size / min(timed(all_parts) for _ in range(2)) if count else 0.0
    return found


def in_float32(clf: EarlyExitClassifier) -> EarlyExitClassifier:
    cfg = dataclasses.replace(clf.bundle.cfg, dtype="float32", residual_dtype="float32")
    bundle = dataclasses.replace(clf.bundle, cfg=cfg)
    return EarlyExitClassifier(bundle, shapes=clf.shapes, devices=clf.devices)


def libraries() -> dict[str, str]:
    from importlib import metadata

    names = ("torch", "transformers", "onnx", "onnxruntime")
    return {name: metadata.version(name) for name in names if importlib.util.find_spec(name)}


def bench_table(result: dict[str, Any]) -> Table:
    """The result as people read it."""
    made = Table(
        title=f"{result['rows']} texts, {result['layers'][-1]} layers, {result['cores']} cores, "
        f"{result['hardware']}, {result['date']}"
    )
    made.add_column("")
    for heading in (
        "accuracy", "points lost (95 %)", "offline texts/s", "spread", "from text", "p50 ms",
        "p99 ms", *(f"by {size}" for size in REQUESTS),
    ):  # fmt: skip
        made.add_column(heading, justify="right")
    for one in result["contenders"]:
        offline, stream = one["offline"], one["single_stream"]
        low, high = offline["seconds"]["min"], offline["seconds"]["max"]
        made.add_row(
            one["name"], f"{one['accuracy']:.4f}",
            f"{one['drop']:.2f} ({one['drop_low']:.2f} to {one['drop_high']:.2f})",
            f"{offline['texts_per_second']:.0f}",
            f"{result['rows'] / high:.0f} to {result['rows'] / low:.0f}",
            f"{one['end_to_end']['texts_per_second']:.0f}",
            f"{1000 * stream['p50']:.1f}", f"{1000 * stream['p99']:.1f}",
            *(f"{one['requests'][str(size)]:.0f}" for size in REQUESTS),
        )  # fmt: skip
    return made


def save_bench(result: dict[str, Any], path: Path) -> None:
    """The JSON at `path`, and beside it a PNG of accuracy against offline throughput."""
    write_json(result, path)
    save_png(partial(draw, result), path.with_suffix(".png"))


def draw(result: dict[str, Any], axes: Any) -> None:
    for one in result["contenders"]:
        x, y = one["offline"]["texts_per_second"], 100 * one["accuracy"]
        axes.plot([x], [y], "s" if one["name"].startswith("ejax") else "o")
        axes.annotate(one["name"], (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8)
    axes.set(xlabel="texts per second, offline", ylabel="accuracy, %", xlim=(0, None))
    axes.set_title(f"{result['rows']} texts, {result['hardware']}, {result['date']}", fontsize=10)
