"""The one clock: it waits for what a run returns, and what is compared takes turns."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax

Name = TypeVar("Name")
Result = TypeVar("Result")
Run = Callable[[], Any]


def with_seconds(run: Callable[[], Result]) -> tuple[Result, float]:
    """What a run returns, once it is computed, and the seconds that took."""
    start = time.perf_counter()
    result = jax.block_until_ready(run())
    return result, time.perf_counter() - start


def timed(run: Run, *, at_least: float = 0.0) -> float:
    """Seconds of one run; or the mean of as many as fill `at_least` seconds."""
    count, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < at_least or not count:
        jax.block_until_ready(run())
        count += 1
    return spent / count


def interleaved(
    runs: Mapping[Name, Run],
    repeats: int,
    *,
    warm_up: bool = True,
    at_least: float = 0.0,
    progress: Callable[[int, Name], None] = lambda repeat, name: None,
) -> dict[Name, list[float]]:
    """Seconds of every run, `repeats` of each.

    In every repeat each has one turn, so that a slow moment of the machine falls on all.

    Args:
      warm_up: one run of each before, which compiles and is not timed.
      at_least: seconds of a turn, see `timed`.
      progress: called before a turn with the repeat, from 1, and the name.
    """
    if warm_up:
        for run in runs.values():
            jax.block_until_ready(run())
    seconds: dict[Name, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name, run in runs.items():
            progress(repeat + 1, name)
            seconds[name].append(timed(run, at_least=at_least))
    return seconds


def medians(seconds: Mapping[Name, Sequence[float]]) -> dict[Name, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}
