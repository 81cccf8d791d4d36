"""Thresholds for a trained bundle from a target: an accuracy drop, a budget, a risk.

What is chosen is tried on the outputs of the very engine, tiles and compute type that run.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
from rich.table import Table as Shown
from rich.text import Text

from ejax.base import TextClassifier
from ejax.bundle import Bundle
from ejax.calibration import risk, thresholds
from ejax.calibration.calibrate import estimated
from ejax.calibration.drift import depth_of
from ejax.calibration.thresholds import FULL, Family, Table
from ejax.card import describe_threshold
from ejax.data.rows import TokenizedSplit, encode
from ejax.data.sources import Split
from ejax.data.tokenizer import Encoded, bucket_of
from ejax.errors import UserError
from ejax.evaluation.describe import numbers
from ejax.evaluation.evaluate import predicted
from ejax.evaluation.scenarios import spread
from ejax.hardware import describe as machine
from ejax.inference.cost import Profile
from ejax.provenance import FITTED, check_known, promises_risk
from ejax.tasks import Regression, Task, task_with
from ejax.timing import interleaved, medians

SAMPLE, PASSES = 200, 3  # texts that are timed alone, and how often
FAMILIES: tuple[Family, ...] = ("per exit", "one number")


@dataclasses.dataclass(frozen=True)
class Target:
    """What thresholds are for; exactly one of the first four is given.

    Attributes:
      max_drop: points of accuracy that may be lost, or hundredths of another task's metric.
      budget: the share of full depth's layers per token that may be spent, in (0, 1].
      budget_ms: mean milliseconds of one text alone on this machine, its tokens given.
      risk: the share of texts that may lose, with probability 1 - delta.
      delta: of `risk`, where None means 0.05; of `max_drop`, where None means an estimate and no
        promise.
      loss: of `risk` alone: "disagreement" with full depth (None means that), "error", where
        full depth is right, or "wrong", whatever full depth says.
      tolerance: of a risk of a regression: numbers this far apart, or less, are the same; None
        means half of the standard deviation of the scores in training.
    """

    max_drop: float | None = None
    budget: float | None = None
    budget_ms: float | None = None
    risk: float | None = None
    delta: float | None = None
    loss: str | None = None
    tolerance: float | None = None

    def __post_init__(self) -> None:
        names = ("max_drop", "budget", "budget_ms", "risk")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserError(
                f"a target must be one of max_drop, budget, budget_ms and risk. "
                f"Got {' and '.join(given) or 'none'}."
            )
        if self.risk is None and self.loss is not None:
            raise UserError(f"loss goes with risk alone. Got {given[0]}.")
        if self.tolerance is not None and (self.risk is None or not 0 <= self.tolerance < math.inf):
            raise UserError(
                f"tolerance goes with risk, and is a number of at least 0. Got {self.tolerance}."
            )
        if self.max_drop is not None:
            thresholds.check_max_drop(self.max_drop)
            if self.delta is not None:
                risk.check_promise(self.max_drop, self.delta)
        elif self.risk is None and self.delta is not None:
            raise UserError(f"delta goes with risk or max_drop. Got {given[0]}.")
        for budget in (self.budget, self.budget_ms):
            if budget is not None:
                thresholds.check_budget(budget)
        if self.budget is not None and self.budget > 1:
            raise UserError(
                f"budget must be a share of full depth, above 0 and at most 1. Got {self.budget}."
            )
        if self.risk is not None:
            risk.check_share("risk", self.risk)
            risk.check_share("delta", 0.05 if self.delta is None else self.delta)
            thresholds.check_loss(self.loss or "disagreement")

    @property
    def promises(self) -> bool:
        """Whether it is shown with probability 1 - delta, not estimated."""
        return self.risk is not None or self.delta is not None

    def to_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self).items()
        return {name: value for name, value in values if value is not None}


def choose(
    clf: TextClassifier,
    split: Split,
    target: Target,
    *,
    rows_are_new: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Bundle, dict[str, Any]]:
    """The bundle with thresholds chosen for `target` on these rows, and a report on the choice.

    Rows that fitted the bundle are left out, and the rows used are recorded, so that
    `ejax evaluate` can name and `ejax report` leave out those in turn: temperatures, thresholds
    and reports each have rows of their own.

    Args:
      rows_are_new: that none of the rows fitted the bundle, where it does not know all that did.

    Returns:
      The bundle, and, ready for JSON: `target`; `chosen`, the operating point; `one_number`,
      the same by one threshold for all exits (not for the loss "wrong" where that cannot be
      shown by one); `full`; `oracle`; all four of the same rows, for a
      risk the tested ones; each with `ms_together`, predicted milliseconds per text of all rows at
      once on one device (null without a profile) and, for `budget_ms`, `ms_alone`, of one text;
      `ms_alone_measured` at the thresholds chosen; `differ`, rows that left elsewhere when the
      engine ran; `copies`, rows that repeat the text of another; `sentence`.

    Raises:
      ValueError: where there is one exit, no rows are left, a budget cannot be met, too many
        answers are wrong, `budget_ms` has no profile, or a promise is asked for and which rows
        fitted the bundle is not known.
    """
    bundle = clf.bundle
    if target.promises:
        check_known(bundle.ledger, rows_are_new, "a promise")
    # A promise is for one compute type; one that ends here no longer asks for it.
    one_type = target.promises or (clf.one_type and not promises_risk(bundle.provenance))
    clf = clf.in_one_type(one_type)
    if len(bundle.exits.layers) == 1:
        raise UserError("this bundle has one exit: there are no thresholds to choose.")
    if target.budget_ms is not None:
        needed_profile(clf, "budget-ms", 1)
    task = rows_for_thresholds(bundle, split)
    progress("every exit's answers")
    table = with_tolerance(table_of(clf, task), target.tolerance)
    costs = Costs(clf, task.encoded)
    if target.budget_ms is not None:
        progress("timing single texts")
        costs.measure_call()
    progress("choosing")
    chosen, points = _points(table, target, costs)
    progress("trying them in the engine")
    taken = clf.decide_encoded(task.encoded, threshold=chosen["threshold"]).exit
    differ = int((taken != table.leave(chosen["threshold"])).sum())
    copies = len(task.hashes) - len(set(task.hashes))
    sentence = in_words(chosen, split.origin, table.task, target.budget_ms is not None)
    sentence += bundle.ledger.doubt(rows_are_new)
    if copies and target.promises:
        sentence += (
            f" {copies} of the {len(task.hashes)} rows repeat the text of another: the promise is "
            f"for texts drawn one by one, and does not hold where rows were copied."
        )
    report: dict[str, Any] = {
        "target": target.to_json(),
        "data": split.origin,
        "rows": len(task.labels),
        "rows_left_out": len(split) - len(task.labels),
        "copies": copies,
        "dtype": bundle.numerics,
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        **points,
        "differ": differ,
        "sentence": sentence,
    }
    if target.budget_ms is not None:
        report["ms_alone_measured"] = costs.measured(chosen["threshold"])
    provenance = bundle.provenance | {
        "thresholds_from": sentence,
        "target": report,
        "operating_points": {"thresholds": chosen},
        "depth": depth_of(chosen),
    }
    provenance.pop("abstain", None)  # of answers at other thresholds
    changed = dataclasses.replace(
        bundle,
        thresholds=tuple(chosen["threshold"]),
        provenance=provenance,
        ledger=bundle.ledger.with_rows("thresholds", task.hashes, free=["thresholds"]),
        abstain=0.0,
    )
    return changed, report


def rows_for_thresholds(bundle: Bundle, split: Split) -> TokenizedSplit:
    """The rows that, for all it knows, had no part in the bundle but its thresholds, tokenised.

    Raises:
      ValueError: where none are left.
    """
    task = encode(split, bundle.encode)
    refusal = f"every row of {split.origin} fitted this bundle: thresholds need other rows."
    return task.take(task.without(bundle.ledger.among(task.hashes, FITTED), refusal))


def table_of(clf: TextClassifier, task: TokenizedSplit, logits: np.ndarray | None = None) -> Table:
    """Every exit's answers, as the engine gives them, or gave them: `logits` [E, N, O]."""
    return thresholds.make_table(
        clf.exit_logits(task.encoded) if logits is None else logits, task.labels,
        clf.bundle.temperatures, clf.bundle.exits.layers, task.encoded.lengths,
        task=clf.bundle.task, exit0_cost=clf.bundle.exit0_cost(task.encoded),
    )  # fmt: skip


def with_tolerance(table: Table, tolerance: float | None) -> Table:
    """The same rows, where answers of a regression may be so far apart; None: as they are."""
    if tolerance is None:
        return table
    if not isinstance(table.task, Regression):
        raise UserError("tolerance is for regressions, and this bundle has labels.")
    return dataclasses.replace(table, task=dataclasses.replace(table.task, tolerance=tolerance))


class Costs:
    """Milliseconds per text: by this machine's profile, and by trial."""

    def __init__(self, clf: TextClassifier, encoded: Encoded) -> None:
        self.clf, self.encoded = clf, encoded
        self.pools = list(clf.pools(encoded.lengths))
        bundle = clf.bundle
        bucket = bucket_of(encoded.lengths, bundle.buckets, bundle.max_length)
        self.lengths, self.bucket = np.unique(bucket, return_inverse=True)
        self.sample = spread(len(encoded), SAMPLE)
        self.call: float | None = None

    def measure_call(self) -> None:
        """What a call with one text takes beyond what the profile knows."""
        by_profile = self._alone(self.sample, np.zeros_like(self.sample))
        self.call = self.measured([0.0] * len(self.clf.bundle.exits.layers)) - by_profile

    def measured(self, threshold: Any) -> float:
        """Of a sample of the rows, one by one: the median pass, after one that compiles."""
        rows = [self.encoded.subset(np.array([row])) for row in self.sample]

        def one_by_one() -> None:
            for row in rows:
                self.clf.decide_encoded(row, threshold=threshold)

        return 1000 * medians(interleaved({"alone": one_by_one}, PASSES))["alone"] / len(rows)

    def alone(self, taken: np.ndarray) -> float:
        """Of one text alone, in the mean over these rows."""
        assert self.call is not None
        return self.call + self._alone(np.arange(taken.size), taken)

    def _alone(self, rows: np.ndarray, taken: np.ndarray) -> float:
        return float(self._ms[taken, self.bucket[rows]].mean())

    @cached_property
    def _ms(self) -> np.ndarray:
        """Of one text alone that leaves at an exit, by its padded length: [E, lengths]."""
        profile, exits = needed_profile(self.clf, "budget-ms", 1), self.clf.bundle.exits
        lengths, each = self.lengths.tolist(), range(len(exits.layers))
        seconds = [[profile.predict(exits, np.array([e]), 1, t) for t in lengths] for e in each]
        return 1000 * np.array(seconds)

    def of(self, taken: np.ndarray) -> dict[str, float | None]:
        together = predicted(self.clf, self.pools, taken, self.encoded)
        ms = {"ms_together": None if together is None else 1000 * together / taken.size}
        return ms if self.call is None else ms | {"ms_alone": self.alone(taken)}


def needed_profile(clf: TextClassifier, what: str, rows: int | None = None) -> Profile:
    """This machine's profile, where it holds every length of the bundle.

    Args:
      rows: of the tiles that are needed; None means those of whole pools.

    Raises:
      ValueError: where it does not, or there is none.
    """
    profile, bundle = clf.shapes.profile, clf.bundle
    reached = np.arange(1, bundle.max_length + 1)
    lengths = np.unique(bucket_of(reached, bundle.buckets, bundle.max_length)).tolist()
    if profile is None or not all(
        (rows or clf.shapes.tile(length), length) in profile.seconds for length in lengths
    ):
        raise UserError(
            f"{what} needs this machine's profile of this bundle's lengths: run `ejax profile` "
            f"for this bundle first."
        )
    return profile


def _points(
    table: Table, target: Target, costs: Costs
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What is chosen; and, with what they cost, it and those that it is compared with."""
    chosen = _choose(table, target, costs, "per exit")
    taken = {"chosen": table.leave(chosen["threshold"])}
    points = {"chosen": chosen}
    with suppress(risk.Refused):  # one number may be worse than one per exit
        points["one_number"] = _choose(table, target, costs, "one number")
        taken["one_number"] = table.leave(points["one_number"]["threshold"])
    order = chosen.get("rows_for_order")
    shown = table.take(risk.split_rows(table)[1]) if order else table  # as `chosen`
    points["full"] = thresholds.operating_point(shown, FULL)
    points["oracle"] = thresholds.describe(shown, thresholds.oracle(shown))
    taken |= {"full": table.leave(FULL), "oracle": thresholds.oracle(table)}
    return chosen, {name: point | costs.of(taken[name]) for name, point in points.items()}


def _choose(table: Table, target: Target, costs: Costs, family: Family) -> dict[str, Any]:
    if target.max_drop is not None:
        if target.delta is None:
            return thresholds.drop_thresholds(table, target.max_drop, family=family)
        return risk.promised_drop(table, target.max_drop, target.delta, family=family)
    if target.budget is not None:
        return thresholds.budget_thresholds(table, target.budget, family=family)
    if target.budget_ms is not None:
        return thresholds.budget_thresholds(
            table, target.budget_ms, cost=costs.alone, family=family
        )
    assert target.risk is not None
    return risk.risk_thresholds(
        table,
        target.risk,
        0.05 if target.delta is None else target.delta,
        loss=thresholds.check_loss(target.loss or "disagreement"),
        family=family,
    )


def in_words(chosen: dict[str, Any], origin: str, task: Task, in_ms: bool = False) -> str:
    """What was asked, on which rows, and what can be said for it."""
    where = f"on {chosen['rows']} rows of {origin}"
    unit = "ms of one text alone" if in_ms else "of full depth's layers"
    if "budget" in chosen:
        return (
            f"Of those that spend at most {chosen['budget']:g} ({chosen['spent']:.4g} spent) "
            f"{unit} {where}, the one expected to lose least. It holds for texts like those."
        )
    if "delta" not in chosen:
        return estimated(chosen, origin, task.metric_name)
    if "risk" in chosen:
        far = f" by more than {task.tolerance:g}" if isinstance(task, Regression) else ""
        what = {
            "disagreement": f"disagree with full depth{far}",
            "error": f"are wrong{far} where full depth is right",
            "wrong": f"are wrong{far}",
        }[chosen["loss"]]
        asked = f"at most {100 * chosen['risk']:g} % of texts {what}"
        seen, shown = f"{chosen['losses']} losses", chosen["p_value"] is not None
        bound = f"p = {chosen['p_value']:.2g}; Learn then Test" if shown else ""
        where_none = ""
    else:
        asked = f"at most {chosen['max_drop']:g} points of full depth's accuracy are lost"
        seen = f"{chosen['losses']} losses and {chosen['gains']} gains"
        shown = chosen["upper"] is not None
        bound = f"at most {chosen['upper']:.2f} points; Learn then Test" if shown else ""
        where_none = " where none is gained"
    asked += f", with probability {1 - chosen['delta']:g}"
    if shown:
        return (
            f"The fastest shown to keep the promise that {asked}: {seen} {where} that chose "
            f"nothing else ({bound}). It holds for texts like those."
        )
    used = chosen["rows"] + chosen["rows_for_order"]  # where none orders, all are reported on
    if used < chosen["rows_needed"]:
        return (
            f"Full depth: to show that {asked}, at least {chosen['rows_needed']} rows are "
            f"needed{where_none}, and {used} of {origin} could be used."
        )
    return f"Full depth: no early exit could be shown to keep the promise that {asked}, {where}."


def targets_table(report: dict[str, Any]) -> Shown:
    """The report as people read it."""
    task = task_with(report["full"])
    alone = "ms_alone" in report["full"]
    made = numbers(
        Text(f"{report['chosen']['rows']} rows of {report['data']}", "italic"),
        "", "thresholds", task.metric_name, "drop, points (95 %)", "other answers", "depth", "cost",
        *(["ms alone"] if alone else []), "ms together",
    )  # fmt: skip
    made.columns[0].justify = "left"
    for key in ("chosen", "one_number", "oracle", "full"):
        if key not in report:
            continue
        p = report[key]
        given = p["threshold"][:-1] if key in ("chosen", "one_number") else []
        times = [p[ms] for ms in (["ms_alone"] if alone else []) + ["ms_together"]]
        made.add_row(
            key.replace("_", " "),
            ", ".join(map(describe_threshold, given)),
            f"{p[task.metric]:.4f}",
            f"{p['drop']:.2f} ({p['drop_low']:.2f} to {p['drop_high']:.2f})",
            f"{100 * p['disagreement']:.2f} %",
            f"{p['mean_depth']:.2f}",
            f"{p['cost']:.3f}",
            *("" if ms is None else f"{ms:.2f}" for ms in times),
        )
    if alone:
        made.caption = f"measured at the thresholds chosen: {report['ms_alone_measured']:.2f} ms"
    return made
