"""Thresholds from a target, and what thresholds cost and lose on labelled rows.

A target is an accuracy drop or a budget; `ejax.calibration.risk` has those with a guarantee. All
choose from a family of policies, ordered from full depth to the fastest: one threshold per exit,
tied together by one bound on what a row may lose by leaving, or one number for all exits.

Axes: E exits, N rows, C classes, P policies.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax

from ejax.calibration.drops import expected_drop
from ejax.calibration.fits import LEAST, curve, pooled
from ejax.calibration.metrics import Float, Int, check_rows, lost_points
from ejax.config import check_layers
from ejax.errors import UserError
from ejax.inference.policy import as_float32, check_calibration, exit_scores
from ejax.tasks import SeveralLabels, Task

FULL = 2.0  # above every score: nobody leaves early
ROUNDING = 1e-9  # of sums that are equal, or nothing, written down exactly
STEPS = 401  # policies to choose from

# How policies are ordered, and one is chosen. At each exit a curve is fitted: what a row of a score
# loses by leaving there, less what it gains. One bound on that loss cuts all curves, and where it
# cuts the curve of an exit, there is the threshold of this exit:
#
#   loss |  .     *
#        |    .     *
#  bound |------.-----*-------
#        |      | .   | *       .  a deep exit: it rarely differs from full depth
#        |      |   . |   *     *  the first exit
#        +------|-----|------ score
#               t1    t0        their thresholds
#
# A larger bound lowers all thresholds together, so that policies have an order:
#
#              t0    t1   last
#   policy 0   2     2     0     no score reaches 2: full depth
#          1   0.99  0.95  0     the least bound
#          2   0.96  0.90  0     the next one
#          …   …     …     0
#        P-1   0     0     0     all leave at the first exit
#
# A drop takes the policy that runs least deep of those that lose no more than it; a budget takes
# the one expected to lose least of those that cost no more. A bound may be negative: an exit that
# errs on other rows than full depth, as one on n-grams does, also gains.

Thresholds = float | Sequence[float]  # one for all exits, or one per exit
Family = Literal["per exit", "one number"]
Loss = Literal["disagreement", "error", "wrong"]


@dataclasses.dataclass(frozen=True)
class Table:
    """What every exit says on N rows: all that a choice of thresholds needs."""

    scores: npt.NDArray[np.float32]  # [E, N]
    log_probs: Float | None  # [E, N, C], calibrated, of one label
    answers: Any  # [E, N, ...], by the task
    labels: Any  # [N, ...]
    layers: Int  # [E]
    tokens: Int  # [N]
    task: Task
    exit0_cost: float = 0.0  # in layers, of rows that pass exit 0
    log_odds: Float | None = None  # [E, N, C], calibrated, of several labels

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """[E, N]; of a regression: within its tolerance."""
        return np.asarray(self.task.right(self.answers, self.labels))

    @cached_property
    def expected(self) -> tuple[Float, Float]:
        """[E, N] twice: how likely leaving loses a right answer, and how likely it gains one.

        By the probabilities of full depth and the exit together (`pooled`), 0 where they agree.
        Of other tasks by the labels: how much more wrong it is than full depth, and less.
        """
        if self.log_probs is None:
            losses = self.task.row_loss(self.answers, self.labels)
            more = losses - losses[-1]
            return np.maximum(more, 0.0), np.maximum(-more, 0.0)
        each, n = range(len(self.layers)), np.arange(self.tokens.size)
        together = [pooled(self.log_probs[-1], self.log_probs[e], self.labels) for e in each[:-1]]
        lost, gained = np.zeros((2, *self.scores.shape))
        for e, probs in enumerate(together):
            differ = self.answers[e] != self.answers[-1]
            lost[e] = differ * probs[n, self.answers[-1]]
            gained[e] = differ * probs[n, self.answers[e]]
        return lost, gained

    @property
    def expected_lost(self) -> Float:
        """[E, N], losses less gains: its mean is the drop that probabilities expect."""
        lost, gained = self.expected
        return lost - gained

    def lost(self, loss: Loss) -> npt.NDArray[np.bool_]:
        """[E, N]: another answer than full depth's, wrong where full depth is right, or wrong."""
        if check_loss(loss) == "disagreement":
            return np.asarray(self.task.differ(self.answers, self.answers[-1]))
        return ~self.correct if loss == "wrong" else self.correct[-1] & ~self.correct

    def take(self, rows: Int) -> "Table":
        return dataclasses.replace(
            self, scores=self.scores[:, rows], answers=self.answers[:, rows],
            log_probs=None if self.log_probs is None else self.log_probs[:, rows],
            labels=self.labels[rows], tokens=self.tokens[rows],
            log_odds=None if self.log_odds is None else self.log_odds[:, rows],
        )  # fmt: skip

    def taken(self, exits: Int) -> Any:
        """The answers of rows that leave at int [N]: [N, ...]."""
        return self.answers[exits, np.arange(exits.size)]

    def leave(self, policy: Any) -> Int:
        """Where rows leave under a threshold, or one per exit: int [N], index into `layers`."""
        reached = self.scores >= np.reshape(as_float32(policy), (-1, 1))
        reached[-1] = True
        return reached.argmax(axis=0)

    def depth(self, taken: Int) -> float:
        """Mean layers per token; where no row leaves at exit 0, it need not run."""
        layers = (self.tokens * self.layers[taken]).sum() / self.tokens.sum()
        return float(layers + self.exit0_cost * (taken.min() == 0))

    def depths(self, ordered: Float) -> Float:
        """The same under every policy: [P]."""
        layers = totals(self, ordered, np.outer(self.layers, self.tokens)) / self.tokens.sum()
        left_first = np.zeros(self.scores.shape)
        left_first[0] = 1
        return layers + self.exit0_cost * (totals(self, ordered, left_first) > 0.5)


def make_table(
    logits: Any,
    labels: Any,
    temperatures: Any,
    layers: tuple[int, ...],
    tokens: Any,
    *,
    task: Task | None = None,
    exit0_cost: float = 0.0,
) -> Table:
    """Checked rows.

    Args:
      logits: <float>[E, N, O], every exit's, before temperature.
      labels: <int>[N] in 0..C-1; of other tasks as `check_rows` has them.
      temperatures: <float>[E], positive, or [E, K], see `Task`.
      layers: the exits' layers, ascending, E of them; 0 is before the first layer.
      tokens: <int>[N], real tokens per row, at least 1.
      task: None means one of several labels.
      exit0_cost: what exit 0 costs each row that passes it, in layers.

    Raises:
      ValueError: on a wrong shape, label, token count, layer or temperature.
    """
    task = task or Task(np.shape(logits)[-1])
    values, checked = check_rows(logits, labels, task)
    exits, rows, _ = values.shape
    check_layers(tuple(layers))
    if len(layers) != exits:
        raise UserError(
            f"layers must hold one layer per exit ({exits}). Got {len(layers)}: {tuple(layers)}."
        )
    counts = np.asarray(tokens)
    if counts.shape != (rows,) or counts.dtype.kind not in "iu" or (counts < 1).any():
        raise UserError(
            f"tokens must be {rows} integers of at least 1, the real tokens of each row. "
            f"Got shape {counts.shape}, dtype {counts.dtype}, smallest {counts.min(initial=1)}."
        )
    if not (math.isfinite(exit0_cost) and exit0_cost >= 0) or (exit0_cost and layers[0]):
        raise UserError(
            f"exit0_cost must be a number of layers, 0 or above, and is for exits that begin with "
            f"layer 0. Got {exit0_cost} and {tuple(layers)}."
        )
    per_exit = check_calibration(task, temperatures, exits)
    log_probs = None
    if task.metric == "accuracy":
        scaled = values / per_exit[:, None, None]
        log_probs = np.maximum(log_softmax(scaled, axis=2), math.log(LEAST))
    return Table(
        np.asarray(exit_scores(task, logits, per_exit)),
        log_probs,
        np.stack([task.answers(of, own) for of, own in zip(logits, per_exit, strict=True)]),
        checked,
        np.asarray(layers, np.int64),
        counts.astype(np.int64),
        task,
        float(exit0_cost),
        task.log_odds(values, per_exit[:, None]) if isinstance(task, SeveralLabels) else None,
    )


def operating_point(table: Table, threshold: Thresholds) -> dict[str, Any]:
    """What a threshold costs and loses on these rows, against the full model.

    Args:
      threshold: one number, or one per exit [E]; above 1 is the full model.

    Returns:
      Ready for JSON: `threshold`, `rows`; `accuracy` and `full_accuracy` (of the last
      exit) in [0, 1], or the same of another task's `Task.metric`; `drop`, `drop_low`,
      `drop_high`: hundredths of it lost with their 95 % interval (`lost_points`);
      `expected_drop`: the same by calibrated probabilities (`Table.expected`) instead of the
      labels, of other tasks hundredths of `Task.row_loss`; `disagreement`: the share of rows with
      another answer than full depth's; `mean_depth`: layers per token, sum(tokens * depth) /
      sum(tokens), exit 0 counted; `cost`: mean_depth / L, without heads and overhead;
      `exit_share`: fraction of rows that leave at each exit.

    Raises:
      ValueError: on a wrong shape, or a threshold that is not a number.
    """
    values = np.asarray(threshold, np.float64)
    if values.shape not in ((), (len(table.layers),)) or np.isnan(values).any():
        raise UserError(
            f"threshold must be one number, or one per exit ({len(table.layers)}). "
            f"Got {threshold!r}."
        )
    return describe(table, table.leave(threshold)) | {"threshold": values.tolist()}


def describe(table: Table, taken: Int) -> dict[str, Any]:
    """`operating_point` of rows that leave at `taken`, int [N], whatever sent them there."""
    rows, task = np.arange(taken.size), table.task
    early, full = table.taken(taken), table.answers[-1]
    drop, low, high = lost_points(task, full, early, table.labels)
    mean_depth = table.depth(taken)
    return {
        "rows": taken.size,
        task.metric: task.measure(early, table.labels),
        f"full_{task.metric}": task.measure(full, table.labels),
        "drop": drop,
        "drop_low": low,
        "drop_high": high,
        "expected_drop": 100 * float(table.expected_lost[taken, rows].mean()),
        "disagreement": float(task.differ(early, full).mean()),
        "mean_depth": mean_depth,
        "cost": mean_depth / float(table.layers[-1]),
        "exit_share": (np.bincount(taken, minlength=table.layers.size) / taken.size).tolist(),
    }


def oracle(table: Table) -> Int:
    """The first exit that is right, or the first where none is: no rule is more accurate.

    Of Schwartz et al. (2020), section 5. Of other tasks the first of the least loss.
    """
    if table.log_probs is not None:
        return table.correct.argmax(axis=0)
    return np.asarray(table.task.row_loss(table.answers, table.labels)).argmin(axis=0)


def drop_thresholds(
    table: Table, max_drop: float = 0.5, *, family: Family = "per exit"
) -> dict[str, Any]:
    """The fastest thresholds that lose at most `max_drop` points on these rows.

    What leaving at an exit would lose of full depth's accuracy, and gain, is fitted from the
    score there: two logistic curves of two numbers each (as Platt, 1999, maps scores to
    probabilities). One bound on the loss less the gain, the same for all exits, then gives each
    exit its threshold: an exit that agrees with full depth lets unsure rows go too, since the
    layers above would not make them surer. Or all leave at the first exit, or nobody leaves early.

    Both `drop` and `expected_drop` (of other tasks: `ejax.calibration.drops`) have to keep within
    `max_drop`: on few rows the measured drop alone is a poor guide, since the fastest of many
    choices is then the one whose errors happened to cancel out. What is expected takes two numbers
    per exit from the labels, not one per row. Asked for 0.5 points on 60 draws of 436 rows, of each
    of eight sets of exits on AG News and SST-2 (TF-IDF; logistic regression on MiniLM's layers), it
    lost -0.9 to 0.7 on the other rows in the mean, with a standard deviation of 0.1 to 1.0. The
    choice fits these rows: report `operating_point` on other rows.

    Args:
      max_drop: in points, 0 or above.

    Returns:
      The dict of `operating_point` at the thresholds chosen, and `max_drop`.

    Raises:
      ValueError: on a `max_drop` below 0.
    """
    check_max_drop(max_drop)
    ordered = policies(table, family)
    allowed = within_drop(table, ordered, max_drop)
    chosen = ordered[np.where(allowed, table.depths(ordered), np.inf).argmin()].tolist()
    return operating_point(table, chosen) | {"max_drop": float(max_drop)}


def within_drop(table: Table, ordered: Float, max_drop: float) -> npt.NDArray[np.bool_]:
    """Whether policies lose, and are expected to lose, at most `max_drop` points: [P]."""
    if table.log_probs is None:  # of other tasks the metric, which is no sum over rows
        task, full = table.task, table.task.measure(table.answers[-1], table.labels)
        expect = expected_drop(table.answers, table.labels, table.log_odds)
        most = max_drop + ROUNDING
        within = [
            100 * (full - task.measure(table.taken(exits), table.labels)) <= most
            and expect(exits) <= most
            for exits in map(table.leave, ordered)
        ]
        return np.array(within)
    correct = table.correct.astype(float)
    lost = correct[-1].sum() - totals(table, ordered, correct)
    expected = totals(table, ordered, table.expected_lost)
    most = max_drop * table.tokens.size + ROUNDING
    return np.asarray(100 * np.maximum(lost, expected) <= most)


def budget_thresholds(
    table: Table,
    budget: float,
    *,
    cost: Callable[[Int], float] | None = None,
    family: Family = "per exit",
) -> dict[str, Any]:
    """The thresholds expected to lose least of those that spend at most `budget` on these rows.

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
    ordered = policies(table, family)
    spent = np.array([spend(table.leave(policy)) for policy in ordered])
    if (spent <= budget).any():
        expected = totals(table, ordered, table.expected_lost).round(9)  # of equals the first
        p = np.where(spent <= budget, expected, np.inf).argmin()
        point = operating_point(table, ordered[p].tolist())
        return point | {"budget": float(budget), "spent": float(spent[p])}
    unit = " ms" if cost else ""
    raise UserError(
        f"a budget must be at least {rounded_up(spent.min()):g}{unit}, what these rows cost when "
        f"all leave at the first exit. Got {budget:g}{unit}."
    )


def check_max_drop(points: float) -> None:
    if not (math.isfinite(points) and points >= 0):
        raise UserError(f"max_drop must be 0 points or above. Got {points}.")


def check_budget(value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"a budget must be a number above 0. Got {value}.")


def rounded_up(value: float) -> float:
    """To four digits, none of them lost: what is asked for again is enough."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return math.ceil(value / unit) * unit


def check_loss(loss: str) -> Loss:
    if loss not in get_args(Loss):
        raise UserError(f"loss must be one of {', '.join(get_args(Loss))}. Got {loss!r}.")
    return cast(Loss, loss)


def policies(table: Table, family: Family, lost: Any = None) -> Float:
    """Thresholds [P, E] from full depth to the fastest, each at most the one before.

    The first is full depth; by the last all leave at the first exit. For "per exit", bounds on
    what is lost are its quantiles, so that a policy lets about a `STEPS`-th of the rows go one
    exit earlier than the one before.

    Args:
      lost: [E, N], what rows lose that leave at each exit, in [0, 1], for "per exit" only; None
        means what is expected to be lost less what is expected to be gained.
    """
    early = len(table.layers) - 1
    scores = table.scores[:-1].astype(np.float64)
    if not early:
        return np.full((1, 1), FULL)
    if family == "one number":
        numbers = np.unique(_rounded(np.quantile(scores, np.linspace(0, 1, STEPS))))[::-1]
        columns = [numbers] * early
    elif family == "per exit":
        losses, gains = table.expected if lost is None else (lost, [None] * early)
        grid = np.sort(scores)[:, ::-1]
        each = zip(grid, scores, losses[:-1], gains[:early], strict=True)
        worst = np.stack([_worst_above(*of_exit) for of_exit in each])
        bounds = np.unique(np.quantile(worst, np.linspace(0, 1, STEPS)))
        columns = [_lowest(worst[e], grid[e], bounds) for e in range(early)]
    else:
        raise UserError(f"family must be 'per exit' or 'one number'. Got {family!r}.")
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


def _worst_above(grid: Float, scores: Float, lost: Float, gained: Float | None) -> Float:
    """The most that rows of a score or a higher one lose, less what they gain, along `grid`.

    The most above, since an exit lets go all from a score on: where the most confident rows lose
    most, all or none.
    """
    net = curve(grid, scores, lost)
    if gained is not None:  # a little less than it is: where both are nothing, scores still order
        net = net - 0.99 * curve(grid, scores, gained)
    return np.maximum.accumulate(net)


def _lowest(worst: Float, grid: Float, bounds: Float) -> Float:
    """From which score on no row loses more than each bound; 0 where none at all does.

    Halfway to the next score below, so that rounding in the engine sends no row elsewhere.
    """
    halfway = _rounded((grid[:-1] + grid[1:]) / 2)
    return np.array([FULL, *halfway, 0.0])[np.searchsorted(worst, bounds, side="right")]


def _rounded(scores: Any) -> Any:
    """Four digits, and of a sure score as many as float32 tells apart."""
    return np.where(scores < 0.999, np.round(scores, 4), np.round(scores, 7))
