"""Thresholds from a target, and what thresholds cost and lose on labelled rows.

A target is an accuracy drop, a budget, or a risk with a guarantee. All choose from a family of
policies ordered from the surest to the fastest: one threshold per exit, tied together by one
bound on what a row may lose by leaving, or one number for all exits.

Axes: E exits, N rows, C classes, P policies.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from scipy.special import bdtr, bdtri

from ejax.calibration.metrics import Float, Int, check_rows, paired_interval, softmax
from ejax.config import check_layers
from ejax.inference.policy import as_float32, check_rule, check_temperatures, exit_scores

FULL = 2.0  # above every score: nobody leaves early
# On the loss of a row that leaves, for an accuracy drop.
BOUNDS = np.append(np.geomspace(5e-4, 0.5, 61), np.linspace(0.55, 0.95, 9))
ROUNDING = 1e-9  # of sums that are equal, or nothing, written down exactly
STEPS = 401  # policies to choose from, for a budget or a risk

Thresholds = float | Sequence[float]  # one for all exits, or one per exit
Family = Literal["per exit", "one number"]
Loss = Literal["disagreement", "error"]


@dataclasses.dataclass(frozen=True)
class Table:
    """What every exit says on N rows: all that a choice of thresholds needs."""

    scores: npt.NDArray[np.float32]  # [E, N], by the rule
    answers: Int  # [E, N], the class
    labels: Int  # [N]
    expected_lost: Float  # [E, N], see `_expected_lost`
    layers: Int  # [E]
    tokens: Int  # [N]
    rule: str

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        return self.answers == self.labels

    def lost(self, loss: Loss) -> npt.NDArray[np.bool_]:
        """[E, N]: another answer than full depth's, or a wrong one where full depth is right."""
        if check_loss(loss) == "error":
            return self.correct[-1] & ~self.correct
        return np.asarray(self.answers != self.answers[-1])

    def take(self, rows: Int) -> "Table":
        of_exits = ("scores", "answers", "expected_lost")
        cut = {name: getattr(self, name)[:, rows] for name in of_exits}
        return dataclasses.replace(self, labels=self.labels[rows], tokens=self.tokens[rows], **cut)

    def leave(self, policy: Any) -> Int:
        """Where rows leave under a threshold, or one per exit: int [N], index into `layers`."""
        reached = self.scores >= np.reshape(as_float32(policy), (-1, 1))
        reached[-1] = True
        return reached.argmax(axis=0)

    def depth(self, taken: Int) -> float:
        """Mean layers per token."""
        return float((self.tokens * self.layers[taken]).sum() / self.tokens.sum())


def make_table(
    logits: Any,
    labels: Any,
    temperatures: Any,
    layers: tuple[int, ...],
    tokens: Any,
    rule: str = "confidence",
) -> Table:
    """Checked rows.

    Args:
      logits: <float>[E, N, C], every exit's, before temperature.
      labels: <int>[N] in 0..C-1.
      temperatures: <float>[E], positive.
      layers: the exits' layers, 1-based, ascending, E of them.
      tokens: <int>[N], real tokens per row, at least 1.
      rule: a name in `ejax.inference.policy.RULE_NAMES`.

    Raises:
      ValueError: on a wrong shape, label, token count, layer, temperature or rule.
    """
    values, checked = check_rows(logits, labels)
    exits, rows, _ = values.shape
    check_layers(tuple(layers))
    if len(layers) != exits:
        raise ValueError(
            f"layers must hold one layer per exit ({exits}). Got {len(layers)}: {tuple(layers)}."
        )
    counts = np.asarray(tokens)
    if counts.shape != (rows,) or counts.dtype.kind not in "iu" or (counts < 1).any():
        raise ValueError(
            f"tokens must be {rows} integers of at least 1, the real tokens of each row. "
            f"Got shape {counts.shape}, dtype {counts.dtype}, smallest {counts.min(initial=1)}."
        )
    per_exit = check_temperatures(temperatures, exits)
    scores = exit_scores(jnp.asarray(logits, jnp.float32), jnp.asarray(per_exit), check_rule(rule))
    return Table(
        np.asarray(scores),
        values.argmax(axis=2),
        checked,
        _expected_lost(values, per_exit),
        np.asarray(layers, np.int64),
        counts.astype(np.int64),
        rule,
    )


def operating_point(table: Table, threshold: Thresholds) -> dict[str, Any]:
    """What a threshold costs and loses on these rows, against the full model.

    Args:
      threshold: one number, or one per exit [E]; above 1 is the full model.

    Returns:
      Ready for JSON: `threshold`, `rule`, `rows`; `accuracy` and `full_accuracy` (of the last
      exit) in [0, 1]; `drop`, `drop_low`, `drop_high`: accuracy lost in points with its
      95 % interval (`paired_interval`); `expected_drop`: the same by the calibrated
      probabilities of full depth instead of the labels; `disagreement`: the share of rows
      with another answer than full depth's; `mean_depth`: layers per token,
      sum(tokens * depth) / sum(tokens); `cost`: mean_depth / L, without heads and overhead;
      `exit_share`: fraction of rows that leave at each exit.

    Raises:
      ValueError: on a wrong shape, or a threshold that is not a number.
    """
    values = np.asarray(threshold, np.float64)
    if values.shape not in ((), (len(table.layers),)) or np.isnan(values).any():
        raise ValueError(
            f"threshold must be one number, or one per exit ({len(table.layers)}). "
            f"Got {threshold!r}."
        )
    return describe(table, table.leave(threshold)) | {"threshold": values.tolist()}


def describe(table: Table, taken: Int) -> dict[str, Any]:
    """`operating_point` of rows that leave at `taken`, int [N], whatever sent them there."""
    rows = np.arange(taken.size)
    early = table.correct[taken, rows]
    drop, low, high = paired_interval(table.correct[-1], early)
    mean_depth = table.depth(taken)
    return {
        "rule": table.rule,
        "rows": taken.size,
        "accuracy": float(early.mean()),
        "full_accuracy": float(table.correct[-1].mean()),
        "drop": drop,
        "drop_low": low,
        "drop_high": high,
        "expected_drop": 100 * float(table.expected_lost[taken, rows].mean()),
        "disagreement": float((table.answers[taken, rows] != table.answers[-1]).mean()),
        "mean_depth": mean_depth,
        "cost": mean_depth / float(table.layers[-1]),
        "exit_share": (np.bincount(taken, minlength=table.layers.size) / taken.size).tolist(),
    }


def oracle(table: Table) -> Int:
    """The first exit that is right, or the first where none is: no rule is more accurate.

    Of Schwartz et al. (2020), section 5.
    """
    return table.correct.argmax(axis=0)


def drop_thresholds(
    table: Table, max_drop: float = 0.5, *, family: Family = "per exit"
) -> dict[str, Any]:
    """The fastest thresholds that lose at most `max_drop` points on these rows.

    What leaving at an exit would lose of full depth's accuracy is fitted from the score
    there, by full depth's calibrated probabilities: a logistic curve of two numbers per
    exit (as Platt, 1999, maps scores to probabilities). One bound on that loss, the same
    for all exits, then gives each exit its threshold: an exit that agrees with full depth
    lets unsure rows go too, since the layers above would not make them surer. The bound is
    one of `BOUNDS`; or all leave at the first exit, or nobody leaves early. On 60 random draws
    of 436 of SST-2's dev and test rows (MiniLM-L6) the fastest single number within 0.5 points
    lost 0.56 (standard deviation 0.31) on the other rows at a mean depth of 3.35 layers, one
    per exit so chosen 0.59 (0.36) at 2.49.

    Both `drop` and `expected_drop` have to keep within `max_drop`: on few rows the measured
    drop alone is a poor guide, since the fastest of many choices is then the one whose
    errors happened to cancel out. The choice fits these rows, so its drop there is
    optimistic: report `operating_point` on other rows.

    Args:
      max_drop: in points, 0 or above.

    Returns:
      The dict of `operating_point` at the thresholds chosen, and `max_drop`.

    Raises:
      ValueError: on a `max_drop` below 0.
    """
    check_max_drop(max_drop)
    ordered = policies(table, family, table.expected_lost, BOUNDS)
    correct, work = table.correct.astype(float), np.outer(table.layers, table.tokens)
    lost = correct[-1].sum() - totals(table, ordered, correct)
    expected = totals(table, ordered, table.expected_lost)
    allowed = within_drop(lost, expected, max_drop, table.tokens.size)
    spent = np.where(allowed, totals(table, ordered, work), np.inf)
    chosen = ordered[spent.argmin()].tolist()
    return operating_point(table, chosen) | {"max_drop": float(max_drop)}


def within_drop(lost: Float, expected: Float, max_drop: float, rows: int) -> Any:
    """Whether so many rows lost, and expected to be, are at most `max_drop` points: bool [P]."""
    return 100 * np.maximum(lost, expected) <= max_drop * rows + ROUNDING


def budget_thresholds(
    table: Table,
    budget: float,
    *,
    cost: Callable[[Int], float] | None = None,
    family: Family = "per exit",
) -> dict[str, Any]:
    """The surest thresholds that spend at most `budget` on these rows.

    Args:
      budget: a share of full depth's layers per token, above 0; with `cost`, milliseconds.
      cost: what rows that leave at int [N] spend; None means mean depth / L.

    Returns:
      The dict of `operating_point` at the thresholds chosen, `budget`, and `spent` in its unit.

    Raises:
      ValueError: where even the first exit costs more.
    """
    spend = cost or (lambda taken: table.depth(taken) / float(table.layers[-1]))
    check_budget(budget)
    spent = math.inf
    for policy in policies(table, family, table.expected_lost).tolist():
        spent = spend(table.leave(policy))
        if spent <= budget:
            return operating_point(table, policy) | {"budget": float(budget), "spent": spent}
    unit = " ms" if cost else ""
    raise ValueError(
        f"a budget must be at least {rounded_up(spent):g}{unit}, what these rows cost when all "
        f"leave at the first exit. Got {budget:g}{unit}."
    )


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
    these were, that loses by leaving early is at most `risk`, whatever the model and for any
    number of rows: Learn then Test (Angelopoulos et al., 2021, section 2 and fixed-sequence
    testing in section 3) with exact binomial p-values. The policies are ordered on a quarter of
    the rows, from the surest on; on the others each in turn has to reject "its risk is above
    `risk`" at level `delta`, and the first that does not ends the sequence. Full depth loses
    nothing and needs no test.

    Args:
      risk: in (0, 1), a share of texts.
      delta: in (0, 1).
      loss: "disagreement" counts texts with another answer than full depth's, "error" those
        that full depth gets right and early exit does not.
      seed: which rows order the policies.

    Returns:
      The dict of `operating_point` of the tested rows at the thresholds chosen, and `risk`,
      `delta`, `loss`; `rows_for_order`, 0 where there were too few to test any; `losses`, the
      tested rows that lost; `p_value` (null where full depth is kept); `upper`, the share that
      the loss is below with probability 1 - delta, were this policy the only one tested
      (Clopper and Pearson, 1934);
      `rows_needed`, without which nothing can be shown.

    Raises:
      ValueError: on a risk or a delta outside (0, 1).
    """
    check_share("risk", risk)
    check_share("delta", delta)
    check_loss(loss)
    first, rest = split_rows(table, seed)
    needed = math.ceil(math.log(delta) / math.log1p(-risk))
    chosen, losses, p_value, tested = [FULL] * len(table.layers), 0, None, table
    enough = rest.size >= needed
    if enough:
        ordering, tested = table.take(first), table.take(rest)
        ordered = policies(ordering, family, ordering.lost(loss))[1:]
        counts = totals(tested, ordered, tested.lost(loss).astype(float)).round()
        p_values = bdtr(counts, rest.size, risk)
        passed = int((p_values <= delta).cumprod().sum())
        if passed:
            chosen, p_value = ordered[passed - 1].tolist(), float(p_values[passed - 1])
            losses = int(counts[passed - 1])
    return operating_point(tested, chosen) | {
        "risk": float(risk),
        "delta": float(delta),
        "loss": loss,
        "rows_for_order": first.size if enough else 0,
        "losses": losses,
        "p_value": p_value,
        "upper": 0.0 if p_value is None else float(bdtri(losses, rest.size, delta)),
        "rows_needed": max(needed + 1, 4 * (needed - 1) // 3 + 1),
    }


def split_rows(table: Table, seed: int = 0) -> tuple[Int, Int]:
    """Rows that order the policies of a risk, a quarter, and the others, which test them."""
    order = np.random.default_rng(seed).permutation(table.tokens.size)
    first, rest = np.split(order, [max(1, order.size // 4)])
    return first, rest


def check_max_drop(points: float) -> None:
    if not (math.isfinite(points) and points >= 0):
        raise ValueError(f"max_drop must be 0 points or above. Got {points}.")


def check_budget(value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"a budget must be a number above 0. Got {value}.")


def check_share(name: str, value: float) -> None:
    if not 1e-9 <= value < 1:
        raise ValueError(f"{name} must be between 0 and 1, and at least 1e-9. Got {value}.")


def rounded_up(value: float) -> float:
    """To four digits, none of them lost: what is asked for again is enough."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return math.ceil(value / unit) * unit


def check_loss(loss: str) -> Loss:
    if loss == "disagreement":
        return "disagreement"
    if loss == "error":
        return "error"
    raise ValueError(f"loss must be disagreement or error. Got {loss!r}.")


def policies(table: Table, family: Family, lost: Any, bounds: Float | None = None) -> Float:
    """Thresholds [P, E] from the surest to the fastest, each at most the one before.

    The first is full depth; by the last all leave at the first exit.

    Args:
      lost: [E, N], what rows lose that leave at each exit, in [0, 1]; for "per exit" only.
      bounds: on that loss, ascending, for "per exit" only; None means its quantiles, so that
        a policy lets about a `STEPS`-th of the rows go one exit earlier than the one before.
    """
    early = len(table.layers) - 1
    scores = table.scores[:-1].astype(np.float64)
    if not early:
        return np.full((1, 1), FULL)
    if family == "one number":
        numbers = np.unique(_rounded(np.quantile(scores, np.linspace(0, 1, STEPS))))[::-1]
        columns = [numbers] * early
    elif family == "per exit":
        curves = [_fit_loss(scores[e], np.asarray(lost[e], np.float64)) for e in range(early)]
        if bounds is None:
            fitted = [
                _logistic(a + b * _logit(x)) for (a, b), x in zip(curves, scores, strict=True)
            ]
            bounds = np.append(np.unique(np.quantile(fitted, np.linspace(0, 1, STEPS))), 1.0)
        columns = [_score_at(c, bounds, x.max()) for c, x in zip(curves, scores, strict=True)]
    else:
        raise ValueError(f"family must be 'per exit' or 'one number'. Got {family!r}.")
    between = np.stack([*columns, np.zeros_like(columns[0])], axis=1)
    none, all_at_first = np.full((1, early + 1), FULL), np.zeros((1, early + 1))
    return np.concatenate([none, between, all_at_first])


def totals(table: Table, ordered: Float, values: Any) -> Float:
    """The sum over rows of `values` [E, N] at the exit each takes, for every policy: [P].

    All policies at once: a row that leaves at an exit from policy p on does so until the
    policy from which it leaves at an earlier one.
    """
    count = len(ordered)
    steps, before = np.zeros(count + 1), np.full(table.tokens.size, count)
    for e, value in enumerate(values):
        since = np.zeros_like(before)
        if e < len(values) - 1:
            rising = ordered[::-1, e].astype(np.float32)
            since = count - np.searchsorted(rising, table.scores[e], side="right")
        since = np.minimum(since, before)
        steps += np.bincount(since, value, count + 1) - np.bincount(before, value, count + 1)
        before = since
    return np.asarray(steps.cumsum()[:-1])


def _fit_loss(scores: Float, lost: Float) -> Float:
    """(intercept, slope) of loss ~ logistic(intercept + slope * logit(score)), by Newton.

    A weak prior, a slope of -1 and an intercept of 0, keeps it finite where nothing is lost.
    """
    x = np.stack([np.ones_like(scores), _logit(scores)], axis=1)
    middle, precision = np.array([0.0, -1.0]), np.array([1e-3, 1.0])

    def objective(weights: Float) -> float:
        z = x @ weights
        prior = (precision * (weights - middle) ** 2).sum() / 2
        return float((np.logaddexp(0, z) - lost * z).sum() + prior)

    weights = np.array([-2.0, -0.5])
    least = objective(weights)
    for _ in range(100):
        p = _logistic(x @ weights)
        gradient = x.T @ (p - lost) + precision * (weights - middle)
        curvature = (x * (p * (1 - p))[:, None]).T @ x + np.diag(precision)
        step = np.linalg.solve(curvature, gradient)
        # Far from the minimum, as with many saturated scores, a whole step may overshoot.
        for scale in 0.5 ** np.arange(30):
            found = objective(weights - scale * step)
            if found <= least:
                break
        else:
            break  # no lower value within rounding
        weights, least = weights - scale * step, found
        if np.abs(step).max() < 1e-9:
            break
    return weights


def _score_at(curve: Float, bounds: Float, surest: float) -> Float:
    """The score at which a row is expected to lose each bound.

    Where the curve rises, the surest rows lose most: an exit lets go all, once the bound holds for
    those, or none.
    """
    intercept, slope = curve
    allowed = _logit(bounds, 1e-13)  # as small as `_logistic` gives
    # 1e-6: far above the rounding of a bound that is the loss at the surest score itself.
    if slope >= 0:
        return np.where(intercept + slope * _logit(surest) <= allowed + 1e-6, 0.0, FULL)
    x = (allowed - intercept) / slope
    return np.where(x > _logit(1.0) + 1e-6, FULL, _rounded(_logistic(x)))


def _rounded(scores: Any) -> Any:
    """Four digits, and of a sure score as many as float32 tells apart."""
    return np.where(scores < 0.999, np.round(scores, 4), np.round(scores, 7))


def _logistic(x: Any) -> Any:
    return 1 / (1 + np.exp(-np.clip(x, -30, 30)))


def _logit(p: Any, least: float = 1e-6) -> Any:
    """Of a score: a saturated one is as sure as one row in a million."""
    p = np.clip(p, least, 1 - least)
    return np.log(p) - np.log1p(-p)


def _expected_lost(values: Float, per_exit: Any) -> Float:
    """[E, N]: how much likelier full depth's label is than this exit's, by full depth.

    Its mean is the drop that calibrated probabilities expect, whatever the labels: 0
    where the two agree.
    """
    full = softmax(values[-1], temperature=float(per_exit[-1]))
    labels = values.argmax(axis=2)
    row = np.arange(values.shape[1])
    return full[row, labels[-1]] - full[row[None], labels]
