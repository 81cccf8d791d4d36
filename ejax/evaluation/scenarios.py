"""How a contender is tried, set up and timed: all rows at once, one text, and requests.

Scenarios follow MLPerf's LoadGen: offline (all rows at once), single stream (one text at a time),
and requests of a fixed number of texts.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from ejax.data.tokenizer import Encoded
from ejax.evaluation import contenders
from ejax.evaluation.contenders import CORES, Run, Setting, Texts
from ejax.rivals import Rival
from ejax.timing import timed

BATCHES = (8, 16, 32, 64, 128)
REQUESTS = (8, 32)
STREAM_ROWS, REQUEST_ROWS, SWEEP_ROWS, TRIAL_ROWS = 200, 256, 512, 32
SLOWEST = 4.0  # times slower than our full depth in a trial: left out, and said so


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

    @property
    def answers(self) -> np.ndarray:
        """int [N]."""
        return np.asarray(self.logits.argmax(axis=1))

    def offline(self) -> None:
        self.run(self.encoded, self.setting)

    def seconds_of(self, parts: Sequence[Encoded | Texts], setting: Setting) -> float:
        """One after the other."""
        return timed(lambda: [self.run(part, setting) for part in parts])


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
