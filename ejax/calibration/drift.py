"""Whether new texts leave where those did that a bundle's thresholds are for: a drift alarm.

It costs nothing, since a classifier knows where each text left. Axes: E exits.
"""

from typing import Any, NamedTuple

import numpy as np
from scipy.special import gammaln

FALSE_ALARMS = 1e-3  # at most, of texts drawn as those were, each time that one looks
DEEPER = 0.2  # of the mean depth there, or of one layer where that is more
MOVED = 0.1  # of the texts, from one side of an exit to the other


class Drift(NamedTuple):
    """How deep texts went, and those that the thresholds are for."""

    depth: float  # mean layers per text
    depth_then: float
    p_value: float  # that they would differ so, were they drawn alike
    sentence: str  # "" where nothing is wrong


def depth_of(point: dict[str, Any]) -> dict[str, Any]:
    """What a bundle keeps of an operating point of its thresholds, to compare new texts with."""
    return {
        "rows": point["rows"],
        "exit_share": list(point["exit_share"]),
        "thresholds": list(point["threshold"]),
    }


def compare(left: Any, depth: dict[str, Any], layers: Any) -> Drift:
    """Texts by where they left, against the record that `depth_of` made.

    For each exit but the last, how many have left by it is compared by Fisher's exact test on
    both samples, two-sided; the least p-value times their number (Bonferroni) is at most
    `FALSE_ALARMS` in at most that share of draws of like texts, however few they are. So that many
    texts do not alarm on little, the mean depth also has to differ by `DEEPER` or one such share
    by `MOVED`. It holds for texts drawn one by one, and for one look at them.

    Args:
      left: <int>[E], how many left at each exit, at least one in all.
      layers: <int>[E].
    """
    now = np.asarray(left, np.int64)
    then = np.rint(np.array(depth["exit_share"]) * depth["rows"]).astype(np.int64)
    by_now, by_then = now.cumsum()[:-1], then.cumsum()[:-1]
    tests = [_fisher(a, now.sum(), b, then.sum()) for a, b in zip(by_now, by_then, strict=True)]
    p_value = min([1.0, *(len(tests) * p for p in tests)])
    mean, was = (float(counts @ np.asarray(layers) / counts.sum()) for counts in (now, then))
    moved = np.abs(by_now / now.sum() - by_then / then.sum()).max(initial=0)
    much = abs(mean - was) > DEEPER * max(was, 1.0) or moved > MOVED
    if p_value > FALSE_ALARMS or not much:
        return Drift(mean, was, p_value, "")
    where = "later" if mean > was else "earlier"
    if f"{mean:.2f}" == f"{was:.2f}":
        where = "at other exits"
    return Drift(
        mean, was, p_value,
        f"These texts leave {where} than those the thresholds are for: after "
        f"{mean:.2f} layers in the mean, there {was:.2f}; accuracy and promises may not hold: "
        f"`ejax calibrate` or `ejax thresholds` on labelled rows like these.",
    )  # fmt: skip


def _fisher(a: int, rows: int, b: int, others: int) -> float:
    """Two-sided p-value of `a` of `rows` against `b` of `others`, twice the smaller tail."""
    k = np.arange(max(0, a + b - rows), min(others, a + b) + 1)  # what b might have been
    logs = _log_choose(others, k) + _log_choose(rows, a + b - k) - _log_choose(rows + others, a + b)
    share = np.exp(logs)
    return float(min(1.0, 2 * min(share[k <= b].sum(), share[k >= b].sum())))


def _log_choose(n: int, k: Any) -> Any:
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
