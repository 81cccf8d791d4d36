"""Thresholds with a guarantee: a promised risk, or a promised drop in accuracy.

A quarter of the rows orders the policies of `ejax.calibration.thresholds`, the others test them:

    policy    0      1      2      3      4     …      full depth first, each faster than the last
    shown   as is   yes    yes    no   not looked at
                            ^ chosen: the fastest before the first that is not shown

Each test may be wrong with probability delta at most. As testing ends at the first policy that
fails, so may the choice as a whole, however many policies there are.

Axes: E exits, N rows, C classes, P policies.
"""

import math
from typing import Any

import numpy as np
from scipy.special import bdtr, bdtri

from ejax.calibration.metrics import Int
from ejax.calibration.thresholds import (
    FULL,
    Family,
    Loss,
    Table,
    check_loss,
    operating_point,
    policies,
    rounded_up,
    totals,
)
from ejax.errors import UserError


class Refused(UserError):
    """A promise that not even full depth was shown to keep."""


def risk_thresholds(
    table: Table,
    risk: float,
    delta: float = 0.05,
    *,
    loss: Loss = "disagreement",
    family: Family = "per exit",
    seed: int = 0,
) -> dict[str, Any]:
    """The fastest thresholds that are shown to lose at most `risk` of texts.

    With probability 1 - delta over the draw of these rows the share of all texts, drawn as
    these were, that loses is at most `risk`, whatever the model and for any number of rows: Learn
    then Test (Angelopoulos et al., 2021, section 2 and fixed-sequence testing in section 3) with
    exact binomial p-values. The policies are ordered on a quarter of the rows, full depth
    first; on the others each in turn has to reject "its risk is above `risk`" at level `delta`, and
    the first that does not ends the sequence. Full depth loses nothing and needs no test, but
    for the loss "wrong": there the first tested is the one expected to be wrong least often, or,
    where labels are not one per text, full depth.

    Args:
      risk: in (0, 1), a share of texts.
      delta: in (0, 1).
      loss: "disagreement" counts texts with another answer than full depth's, "error" those
        that full depth gets right and early exit does not, "wrong" those that early exit gets
        wrong.
      seed: which rows order the policies.

    Returns:
      The dict of `operating_point` of the tested rows at the thresholds chosen, and `risk`,
      `delta`, `loss`; `rows_for_order`, 0 where there were too few to test any; `losses`, the
      tested rows that lost; `p_value` (null where full depth is kept untested); `upper`, the
      share that the loss is below with probability 1 - delta, were this policy the only one tested
      (Clopper and Pearson, 1934);
      `rows_needed`, without which nothing can be shown.

    Raises:
      ValueError: on a risk or a delta outside (0, 1).
      Refused: for "wrong", where nothing can be shown.
    """
    chosen, tested, facts = risk_policy(table, risk, delta, loss=loss, family=family, seed=seed)
    return operating_point(tested, chosen) | facts


def risk_policy(
    table: Table, risk: float, delta: float, *, loss: Loss, family: Family = "per exit", seed: int
) -> tuple[list[float], Table, dict[str, Any]]:
    """Of `risk_thresholds` the thresholds, the tested rows, and what else it returns of them."""
    check_share("risk", risk)
    check_share("delta", delta)
    check_loss(loss)
    first, rest = split_rows(table, seed)
    needed = math.ceil(math.log(delta) / math.log1p(-risk))
    chosen, losses, p_value, tested = [FULL] * len(table.layers), 0, None, table
    enough = rest.size >= needed
    if not enough and loss == "wrong":
        raise Refused(
            f"to show that at most {100 * risk:g} % of texts are wrong, with probability "
            f"{1 - delta:g}, takes at least {_with_order(needed)} rows. Got {table.tokens.size}."
        )
    if enough:
        ordering, tested = table.take(first), table.take(rest)
        if loss == "wrong" and table.log_probs is None:
            # From full depth on: so few labels alone do not tell which policy is better than it.
            ordered = policies(ordering, family, ordering.lost("error"))
        elif loss == "wrong":
            ordered = policies(ordering, family)
            ordered = ordered[totals(ordering, ordered, ordering.expected_lost).argmin() :]
        else:
            ordered = policies(ordering, family, ordering.lost(loss))[1:]
        counts = totals(tested, ordered, tested.lost(loss).astype(float)).round()
        p_values = bdtr(counts, rest.size, risk)
        passed = int((p_values <= delta).cumprod().sum())
        if passed:
            chosen, p_value = ordered[passed - 1].tolist(), float(p_values[passed - 1])
            losses = int(counts[passed - 1])
        elif loss == "wrong":
            least = 100 * rounded_up(_at_most(counts[0], rest.size, delta))
            raise Refused(
                f"full depth is wrong on {100 * (1 - table.correct[-1].mean()):.3g} % of "
                f"{table.tokens.size} rows: that at most {100 * risk:g} % of texts are wrong could "
                f"not be shown with probability {1 - delta:g}, {least:g} % could. Ask for more, "
                f"on other rows, or train a better model."
            )
    return chosen, tested, {
        "risk": float(risk),
        "delta": float(delta),
        "loss": loss,
        "rows_for_order": first.size if enough else 0,
        "losses": losses,
        "p_value": p_value,
        "upper": 0.0 if p_value is None else float(_at_most(losses, rest.size, delta)),
        "rows_needed": _with_order(needed),
    }  # fmt: skip


def promised_drop(
    table: Table,
    max_drop: float,
    delta: float = 0.05,
    *,
    family: Family = "per exit",
    seed: int = 0,
) -> dict[str, Any]:
    """The fastest thresholds that are shown to lose at most `max_drop` points of accuracy.

    With probability 1 - delta over the draw of these rows, of all texts drawn as these were, the
    share that only full depth gets right less the share that only early exit gets right is at
    most `max_drop` points. Tested in sequence as by `risk_thresholds`, each policy by exact bounds
    (Clopper and Pearson, 1934): the losses' upper one at 0.8 delta less the gains' lower one at
    0.2 delta; either fails with probability delta at most, however the two depend on each other.

    Args:
      max_drop: in points, above 0 and below 100.
      delta: in (0, 1).
      seed: which rows order the policies.

    Returns:
      The dict of `operating_point` of the tested rows at the thresholds chosen, and `max_drop`,
      `delta`; `rows_for_order`; `losses` and `gains`, tested rows; `upper`, the bound in points
      (null where full depth is kept); `rows_needed`, where no row is lost or gained.

    Raises:
      ValueError: on a drop or a delta outside its range.
    """
    check_promise(max_drop, delta)
    if table.task.metric != "accuracy":
        raise UserError(
            f"with delta, max_drop is for bundles of one label per text, not for "
            f"{table.task.metric_name}: promise a risk."
        )
    first, rest = split_rows(table, seed)
    if not rest.size:
        raise UserError("a promise needs at least 2 rows, to order policies and to test them.")
    ordering, tested = table.take(first), table.take(rest)
    # By losses alone, not less gains: in 32 trials 17 ran less deep so, by up to a layer, and 10
    # deeper, by up to half of one.
    ordered = policies(ordering, family, ordering.expected[0])[1:]
    right = tested.correct
    lost, gained = (
        totals(tested, ordered, differs.astype(float)).round()
        for differs in (right[-1] & ~right, ~right[-1] & right)
    )
    not_gained = _at_most(rest.size - gained, rest.size, 0.2 * delta)
    upper = _at_most(lost, rest.size, 0.8 * delta) - (1 - not_gained)
    passed = int((100 * upper <= max_drop).cumprod().sum())
    p = passed - 1
    chosen = ordered[p].tolist() if passed else [FULL] * len(table.layers)
    return operating_point(tested, chosen) | {
        "max_drop": float(max_drop),
        "delta": float(delta),
        "rows_for_order": first.size,
        "losses": int(lost[p]) if passed else 0,
        "gains": int(gained[p]) if passed else 0,
        "upper": 100 * float(upper[p]) if passed else None,
        "rows_needed": _with_order(math.ceil(math.log(0.8 * delta) / math.log1p(-max_drop / 100))),
    }


def _at_most(count: Any, rows: int, delta: float) -> Any:
    """What a share is below with probability 1 - delta, of which so many rows were seen."""
    return np.where(np.less(count, rows), bdtri(count, rows, delta), 1.0)


def _with_order(tested: int) -> int:
    """Rows of which so many are left to test, once a quarter has ordered the policies."""
    return max(tested + 1, 4 * (tested - 1) // 3 + 1)


def split_rows(table: Table, seed: int = 0) -> tuple[Int, Int]:
    """Rows that order the policies of a risk, a quarter, and the others, which test them."""
    order = np.random.default_rng(seed).permutation(table.tokens.size)
    first, rest = np.split(order, [max(1, order.size // 4)])
    return first, rest


def check_promise(points: float, delta: float) -> None:
    """Of a drop that is promised: no number of rows shows that nothing at all is lost."""
    if not 0 < points < 100:
        raise UserError(f"with delta, max_drop must be above 0 and below 100. Got {points}.")
    check_share("delta", delta)


def check_share(name: str, value: float) -> None:
    if not 1e-9 <= value < 1:
        raise UserError(f"{name} must be between 0 and 1, and at least 1e-9. Got {value}.")
