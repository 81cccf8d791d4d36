"""python -m train.guarantee BUNDLE --data DATA [--loss LOSS] [--case BOUND,DELTA,ROWS …]

Whether `ejax thresholds` keeps its promises, of a risk or, with the loss "drop", of points of
accuracy: rows are drawn with replacement from a fixed table of a bundle's real answers, thresholds
are chosen on them, and what those truly lose is read off the table. A promise may fail in a share
delta of the draws.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table as Shown
from rich.text import Text
from scipy.stats import binomtest

from ejax.calibration.risk import Refused, promised_drop, risk_policy
from ejax.calibration.thresholds import ROUNDING, Table, check_loss, policies, totals
from ejax.classifier import EarlyExitClassifier
from ejax.cli.options import Bundle, Data, check_json, check_split, optional
from ejax.cli.run import run
from ejax.data.rows import encode
from ejax.errors import UserError
from ejax.evaluation.describe import numbers
from ejax.evaluation.evaluate import write_json
from ejax.evaluation.labelled import labelled_rows
from ejax.evaluation.targets import table_of, with_tolerance
from ejax.hardware import environment
from ejax.tasks import Regression
from ejax.training.loop import progress_bar
from ejax.training.outcome import short_path

CASES = {
    "drop": ("0.5,0.05,2000", "1,0.05,500", "1,0.05,2000", "2,0.1,500"),
    "wrong": ("0.1,0.05,2000", "0.15,0.05,500", "0.15,0.05,2000", "0.2,0.1,500"),
}
RISKS = ("0.01,0.05,1000", "0.02,0.05,500", "0.02,0.05,2000", "0.05,0.1,500")
app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(epilog="Example: `python -m train.guarantee sentiment --data test.tsv`")
def main(
    bundle: Bundle,
    data: Data,
    split: Annotated[str, typer.Option(help="dev or test.")] = "test",
    case: Annotated[
        list[str] | None,
        typer.Option(help="RISK,DELTA,ROWS, or POINTS,DELTA,ROWS of a drop; repeatable."),
    ] = None,
    loss: Annotated[str, typer.Option(help="disagreement, error, wrong or drop.")] = "disagreement",
    tolerance: Annotated[
        float | None, optional("Of a number per text: how far apart answers are the same.")
    ] = None,
    draws: Annotated[int, typer.Option(min=1)] = 10_000,
    output: Annotated[Path, typer.Option(help="JSON.")] = Path("guarantee.json"),
) -> None:
    """Count the broken promises of thresholds for a risk or a drop, on draws from real answers."""
    check_json(output)
    check_split(split)
    if loss != "drop":
        check_loss(loss)
    cases = [parse_case(text, loss) for text in case or CASES.get(loss, RISKS)]
    clf = EarlyExitClassifier.from_pretrained(bundle)
    rows = labelled_rows(clf.bundle, data, split)
    table = with_tolerance(table_of(clf, encode(rows, clf.bundle.encode)), tolerance)
    found: list[dict[str, Any]] = []
    name = short_path(bundle)
    result = {
        "command": f"python -m train.guarantee {name} --data {short_path(data)} "
        f"--split {split} --loss {loss} --draws {draws}"
        + ("" if tolerance is None else f" --tolerance {tolerance:g}")
        + "".join(f" --case {text}" for text in case or ()),
        "date": time.strftime("%Y-%m-%d"),
        "bundle": name,
        "data": rows.origin,
        "rows": len(rows),
        "layers": list(clf.bundle.exits.layers),
        "loss": loss,
        **({"tolerance": table.task.tolerance} if isinstance(table.task, Regression) else {}),
        "draws": draws,
        "cases": found,
        **environment(onnx=bool(clf.bundle.graph)),
    }
    with progress_bar(Console(stderr=True)) as bar:
        for bound, delta, count in cases:
            shown = bar.add_task(f"{bound:g}, {delta:g}, {count} rows", total=draws)
            advance = partial(bar.update, shown, advance=1)
            found.append(broken(table, bound, delta, count, loss, draws, advance))
            write_json(result, output)  # what is known, should a later case be cut off
    Console(width=120).print(table_of_cases(result))


def parse_case(text: str, loss: str) -> tuple[float, float, int]:
    try:
        bound, delta, count = text.split(",")
        found = float(bound), float(delta), int(count)
    except ValueError:
        found = 0.0, 0.0, 0
    most = 100 if loss == "drop" else 1
    if not (0 < found[0] < most and 0 < found[1] < 1 and found[2] > 1):
        what = "RISK,DELTA,ROWS, such as 0.02,0.05,2000"
        if loss == "drop":
            what = "POINTS,DELTA,ROWS, such as 1,0.05,2000"
        raise UserError(f"--case must be {what}. Got {text!r}.")
    return found


def broken(
    table: Table, bound: float, delta: float, count: int, loss: str, draws: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:  # fmt: skip
    """How often the truth on the table is above `bound`, and what the promise costs.

    Args:
      bound: a share of texts; of the loss "drop", points of accuracy.

    Returns:
      `violations` of `draws`, their `share` with its exact 95 % interval; `refused`, the share of
      draws that promise nothing; of the others `full_depth`, the share that let nobody leave
      early, and over draws, on the whole table, `mean_depth`, `mean_loss` in the unit of `bound`
      and `exit_share`, the rows per exit (all null where every draw is refused);
      `hindsight_depth`: of the fastest policy whose true loss is within `bound`, ordered on the
      whole table (null where none is).
    """
    every = np.arange(table.tokens.size)
    if loss == "drop":
        lost = 100.0 * (table.correct[-1].astype(float) - table.correct)
    else:
        lost = table.lost(check_loss(loss)).astype(float)

    def choose(drawn: Table, seed: int) -> list[float]:
        if loss == "drop":
            return promised_drop(drawn, bound, delta, seed=seed)["threshold"]
        return risk_policy(drawn, bound, delta, loss=check_loss(loss), seed=seed)[0]

    rng = np.random.default_rng(0)
    chosen: Counter[tuple[float, ...]] = Counter()
    for draw in range(draws):
        drawn = table.take(rng.integers(every.size, size=count))
        with suppress(Refused):
            chosen[tuple(choose(drawn, draw))] += 1
        advance()
    taken = [table.leave(policy) for policy in chosen]
    true = np.array([lost[exits, every].mean() for exits in taken])
    depths = [table.depth(exits) for exits in taken]
    shares = [np.bincount(exits, minlength=len(table.layers)) / every.size for exits in taken]
    times, promised = np.array(list(chosen.values())), chosen.total()
    full = times[[exits.min() == len(table.layers) - 1 for exits in taken]].sum()

    def mean(values: Any) -> Any:
        return np.average(values, axis=0, weights=times).tolist() if promised else None

    best = policies(table, "per exit")
    within = totals(table, best, lost) <= (bound + ROUNDING) * every.size
    violations = int(times[true > bound + ROUNDING].sum()) if promised else 0
    interval = binomtest(violations, draws).proportion_ci()  # Clopper and Pearson
    return {
        "bound": bound, "delta": delta, "rows": count, "violations": violations,
        "share": violations / draws, "low": float(interval.low), "high": float(interval.high),
        "refused": 1 - promised / draws, "full_depth": float(full / promised) if promised else None,
        "mean_loss": mean(true), "mean_depth": mean(depths), "exit_share": mean(shares),
        "hindsight_depth": float(table.depths(best)[within].min()) if within.any() else None,
    }  # fmt: skip


def table_of_cases(result: dict[str, Any]) -> Shown:
    title = f"{result['draws']:,} draws from {result['rows']} rows of {result['data']}"
    made = numbers(
        Text(f"{title}: {result['loss']}", "italic"),
        "at most", "delta", "rows", "broken (95 %)", "refused", "full depth", "mean loss",
        f"depth of {result['layers'][-1]}", "in hindsight",
        f"leave at {', '.join(map(str, result['layers']))}",
    )  # fmt: skip
    for c in result["cases"]:
        made.add_row(
            f"{c['bound']:g}", f"{c['delta']:g}", str(c["rows"]),
            f"{c['share']:.4f} ({c['low']:.4f} to {c['high']:.4f})",
            *(shown(c[name], digits) for name, digits in (
                ("refused", 3), ("full_depth", 3), ("mean_loss", 4), ("mean_depth", 2),
                ("hindsight_depth", 2),
            )),
            ", ".join(f"{share:.2f}" for share in c["exit_share"] or ()),
        )  # fmt: skip
    return made


def shown(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    sys.exit(run(app, "train.guarantee", sys.argv[1:]))
