"""One page on a bundle: what early exit gains and loses on labelled rows, and for whom.

The rows that fitted it, or a bundle beside it, or chose its thresholds are left out.

Axes: P policies, E exits, N rows, C classes.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ejax.base import TextClassifier
from ejax.calibration import honesty, metrics
from ejax.calibration.thresholds import (
    FULL,
    Family,
    Table,
    describe,
    operating_point,
    oracle,
    policies,
    totals,
)
from ejax.data.rows import encode
from ejax.data.sources import Example, Split
from ejax.data.tokenizer import Text
from ejax.evaluation.evaluate import LADDER, best_full_depth, evaluate, timing
from ejax.evaluation.labelled import check_beside, check_single
from ejax.evaluation.targets import FAMILIES, table_of
from ejax.hardware import environment
from ejax.inference.cost import exit_flops, full_flops
from ejax.provenance import CHOSEN, FITTED, UNKNOWN
from ejax.rivals import fit_rivals
from ejax.timing import timed

POINTS = 40  # of a curve
RESAMPLES = 200  # of the rows, for a band of 95 %
EXAMPLES = 5
LONGEST = 500  # characters of an example's text, and of its pair
MOST_LABELS = 20  # slices; of more classes the most frequent


def make_report(
    clf: TextClassifier,
    split: Split,
    *,
    beside: Mapping[str, TextClassifier] | None = None,
    train: Sequence[Example] = (),
    encoder: str = "",
    repeats: int = 3,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """All that the page shows, ready for JSON.

    Args:
      beside: other bundles for the same labels, at full depth, by name.
      train: rows that two linear models of scikit-learn are fitted to; () means none.
      encoder: of the second of these, as in `ejax.rivals.fit_rivals`.
      repeats: timed passes.

    Returns:
      `measured`: as `ejax.evaluation.evaluate.evaluate`; `curves`: accuracy and macro-F1 with
      their bands against the share of full depth's operations, per family of thresholds, and
      of rows that leave at random as often at each exit; `oracle`; `beside`; `exits`: per exit
      quality on all rows and on those that leave there, calibration before and after
      temperature, and who leaves; `overthinking`; `slices`: accuracy, drop and depth by label
      and by length at each operating point; `examples`; `notes` on the linear models and
      on what is not known;
      `inference_seconds`: of all that ran through models, compiling and timed passes included.

    Raises:
      ValueError: when no rows are left, a model beside has other labels, or `train` has one label.
    """
    bundle = clf.bundle
    check_single(bundle, "report")
    check_beside(bundle, beside or {})
    progress("tokenising")
    rows = list(split)
    task = encode(rows, bundle.encode)
    ledgers = [other.bundle.ledger for other in (beside or {}).values()]
    seen = bundle.ledger.among(task.hashes, CHOSEN).union(
        *(ledger.among(task.hashes, FITTED) for ledger in ledgers)
    )
    whose = "this bundle or one beside it" if beside else "this bundle"
    kept = task.without(
        seen,
        f"every row of {split.origin} fitted or chose the thresholds of {whose}: a report needs "
        f"other rows.",
    )  # fmt: skip
    task = task.take(kept)
    inputs = [rows[i].inputs for i in kept]
    texts = [shown(one) for one in inputs]
    rivals, notes = fit_rivals(bundle, train, set(task.hashes), encoder=encoder, progress=progress)
    if not all(ledger.complete for ledger in (bundle.ledger, *ledgers)):
        notes.append(UNKNOWN)
    started = time.perf_counter()
    progress("every exit's answers")
    logits = clf.exit_logits(task.encoded)
    table = table_of(clf, task, logits)
    measured = evaluate(
        clf, task.encoded, task.labels, [*LADDER, None, FULL],
        repeats=repeats, exit_logits=logits, texts=inputs, rivals=rivals, progress=progress,
    )  # fmt: skip
    others = {
        name: full_depth_of(other, inputs, task.labels, repeats)
        for name, other in (beside or {}).items()
    }
    inference = time.perf_counter() - started
    progress("sums")
    flops = exit_flops(bundle.cfg, bundle.exits, table.tokens, task.encoded.whole_lengths)
    whole = full_flops(bundle.cfg, bundle.exits, table.tokens).sum()
    taken = table.leave(bundle.thresholds)
    return {
        "bundle": "",
        "data": split.origin,
        "rows": len(kept),
        "rows_left_out": len(rows) - len(kept),
        "labels": list(bundle.labels),
        "layers": list(bundle.exits.layers),
        "thresholds": list(bundle.thresholds),
        "thresholds_from": bundle.provenance.get("thresholds_from", ""),
        "measured": measured,
        "curves": {family: curve(table, family, flops / whole) for family in FAMILIES},
        "oracle": describe(table, oracle(table)) | {"flops": share(flops, oracle(table)) / whole},
        "beside": others,
        "exits": per_exit(table, logits, bundle.temperatures, taken),
        "overthinking": overthinking(table, texts, bundle.labels),
        "slices": slices(table, bundle.labels, [*LADDER, tuple(bundle.thresholds)]),
        "examples": examples(table, taken, texts, bundle.labels),
        "notes": notes,
        "inference_seconds": inference,
        "date": time.strftime("%Y-%m-%d"),
        **environment(onnx=bool(clf.bundle.graph)),
    }


def shown(given: str | tuple[str, str]) -> str:
    """A text, or a text and its pair, each cut where it is long."""
    parts = (given,) if isinstance(given, str) else given
    return " | ".join(one if len(one) <= LONGEST else f"{one[:LONGEST]}…" for one in parts)


def share(values: Any, taken: Any) -> float:
    """The sum over rows of `values` [E, N] at the exit each takes."""
    return float(values[taken, np.arange(taken.size)].sum())


def curve(table: Table, family: Family, cost: np.ndarray) -> list[dict[str, Any]]:
    """Accuracy and macro-F1 along a family of thresholds, surest first.

    The family per exit is tied together by probabilities (`Table.expected`): of these rows' labels
    it takes two numbers per exit.

    Args:
      cost: [E, N], shares of the whole.

    Returns:
      Per point `flops`, `accuracy`, `macro_f1`, each of the two with `_low` and `_high` (95 % by
      resampling rows), `disagreement`, and `random`: the accuracy of as many rows at each exit,
      drawn at random, and `random_flops`, what those spend.
    """
    ordered = policies(table, family)
    spent = totals(table, ordered, cost)
    wanted = np.linspace(spent.max(), spent.min(), POINTS)
    chosen = np.unique(np.searchsorted(-spent, -wanted))
    draws = np.random.default_rng(0).multinomial(
        table.labels.size, np.full(table.labels.size, 1 / table.labels.size), RESAMPLES
    )
    weights = np.concatenate([np.ones((1, table.labels.size)), draws]).T  # [N, 1 + resamples]
    exit_accuracy = table.correct.mean(axis=1)
    rows = np.arange(table.labels.size)
    points = []
    for policy in ordered[chosen]:
        taken = table.leave(policy)
        answers = table.answers[taken, rows]
        right = (answers == table.labels) @ weights / rows.size
        f1 = metrics.weighted_f1(answers, table.labels, weights)
        shares = np.bincount(taken, minlength=len(table.layers)) / rows.size
        points.append(
            {
                "threshold": policy.tolist(),
                "flops": share(cost, taken),
                **banded("accuracy", right),
                **banded("macro_f1", f1),
                "disagreement": float((answers != table.answers[-1]).mean()),
                "random": float(shares @ exit_accuracy),
                "random_flops": float(shares @ cost.sum(axis=1)),
            }
        )
    return points


def banded(name: str, values: np.ndarray) -> dict[str, float]:
    """The first value, of the rows themselves, and the middle 95 % of the others."""
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return {name: float(values[0]), f"{name}_low": float(low), f"{name}_high": float(high)}


def full_depth_of(
    clf: TextClassifier, inputs: Sequence[Text], labels: np.ndarray, repeats: int
) -> dict[str, Any]:
    """Accuracy and time of another bundle's full depth on the same texts."""
    encoded = clf.encode(inputs)
    best = best_full_depth(clf.on_one_device(), encoded)
    answers = best.full_logits(encoded).argmax(axis=1)
    seconds = [timed(partial(best.full_logits, encoded)) for _ in range(repeats)]
    layers = clf.bundle.exits.num_layers
    return {
        "layers": layers,
        "accuracy": metrics.accuracy(answers, labels),
        "macro_f1": metrics.macro_f1(answers, labels),
        **timing(seconds, len(labels)),
    }


def per_exit(
    table: Table, logits: np.ndarray, temperatures: Any, taken: np.ndarray
) -> list[dict[str, Any]]:
    """Per exit: quality on all rows, on those that leave there, calibration, who they are."""
    found = []
    for e, quality in enumerate(honesty.report(logits, table.labels, temperatures)):
        rows = np.flatnonzero(taken == e)
        before, after = (
            metrics.softmax(logits[e], temperature=t) for t in (1.0, float(temperatures[e]))
        )
        found.append(
            quality
            | honesty.ece_bounds(logits[e], table.labels, float(temperatures[e]))
            | {
                "layer": int(table.layers[e]),
                "leave": rows.size,
                "accuracy_of_leavers": float(table.correct[e, rows].mean()) if rows.size else None,
                "full_accuracy_of_leavers": (
                    float(table.correct[-1, rows].mean()) if rows.size else None
                ),
                "tokens_of_leavers": float(table.tokens[rows].mean()) if rows.size else None,
                "labels_of_leavers": np.bincount(
                    table.labels[rows], minlength=logits.shape[2]
                ).tolist(),
                "reliability_before": honesty.reliability(before, table.labels),
                "reliability_after": honesty.reliability(after, table.labels),
            }
        )
    return found


def overthinking(table: Table, texts: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """Rows that an early exit gets right and the last one wrong (Kaya et al., ICML 2019)."""
    lost = table.correct[:-1] & ~table.correct[-1]
    rows = np.flatnonzero(lost.any(axis=0))
    surest = rows[np.argsort(-table.scores[-1, rows], kind="stable")][:EXAMPLES]
    return {
        "rows": rows.size,
        "per_exit": lost.sum(axis=1).tolist(),
        "gained_per_exit": (~table.correct[:-1] & table.correct[-1]).sum(axis=1).tolist(),
        "examples": [
            {
                "text": texts[row],
                "label": labels[table.labels[row]],
                "answers": [labels[answer] for answer in table.answers[:, row]],
            }
            for row in surest
        ],
    }


def slices(table: Table, labels: Sequence[str], thresholds: Sequence[Any]) -> list[dict[str, Any]]:
    """Accuracy, drop and depth of rows by label and by length, at each threshold."""
    counts = np.bincount(table.labels, minlength=len(labels))
    frequent = np.sort(np.argsort(-counts, kind="stable")[:MOST_LABELS])
    parts = {f"label {labels[c]}": np.flatnonzero(table.labels == c) for c in frequent.tolist()}
    parts["all other labels"] = np.flatnonzero(~np.isin(table.labels, frequent))
    edges = np.unique(np.quantile(table.tokens, (1 / 3, 2 / 3)).astype(int))
    third = np.searchsorted(edges, table.tokens)
    for i in np.unique(third):
        rows = np.flatnonzero(third == i)
        low, high = table.tokens[rows].min(), table.tokens[rows].max()
        parts[f"{low} to {high} tokens"] = rows
    keep = ("threshold", "accuracy", "full_accuracy", "drop", "drop_low", "drop_high", "mean_depth")
    found = []
    for name, rows in parts.items():
        if rows.size:
            part = table.take(rows)
            points = [operating_point(part, threshold) for threshold in thresholds]
            shown = [{field: point[field] for field in keep} for point in points]
            found.append({"slice": name, "rows": rows.size, "points": shown})
    return found


def examples(
    table: Table, taken: np.ndarray, texts: Sequence[str], labels: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """The surest rows of the first exit, and the least sure of the last rows to leave."""
    score = table.scores[taken, np.arange(taken.size)]
    first = np.lexsort((-score, taken))[:EXAMPLES]
    last = np.lexsort((score, -taken))[:EXAMPLES]
    return {
        name: [
            {
                "text": texts[row],
                "layer": int(table.layers[taken[row]]),
                "score": float(score[row]),
                "answer": labels[table.answers[taken[row], row]],
                "label": labels[table.labels[row]],
            }
            for row in rows
        ]
        for name, rows in (("first", first), ("last", last))
    }
