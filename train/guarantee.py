"""python -m train.guarantee BUNDLE --data DATA [--case RISK,DELTA,ROWS …]

Whether `ejax thresholds --risk` keeps its promise: rows are drawn with replacement from a fixed
table of a bundle's real answers, thresholds are chosen on them, and the true risk of those
thresholds is read off the table. A promise may fail in a share delta of the draws.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table as Shown
from rich.text import Text
from scipy.special import bdtri

from ejax.calibration.thresholds import Loss, Table, check_loss, policies, risk_thresholds, totals
from ejax.classifier import EarlyExitClassifier
from ejax.command import Bundle, Data, check_json, check_split, run
from ejax.evaluation.evaluate import write_json
from ejax.evaluation.labelled import labelled_rows
from ejax.evaluation.targets import table_of
from ejax.hardware import environment
from ejax.training.finetune import encode, progress_bar, short_path

CASES = ("0.01,0.05,1000", "0.02,0.05,500", "0.02,0.05,2000", "0.05,0.1,500")
app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(epilog="Example: `python -m train.guarantee sentiment --data test.tsv`")
def main(
    bundle: Bundle,
    data: Data,
    split: Annotated[str, typer.Option(help="dev or test.")] = "test",
    case: Annotated[list[str] | None, typer.Option(help="RISK,DELTA,ROWS; repeatable.")] = None,
    loss: Annotated[str, typer.Option(help="disagreement or error.")] = "disagreement",
    draws: Annotated[int, typer.Option(min=1)] = 10_000,
    output: Annotated[Path, typer.Option(help="JSON.")] = Path("guarantee.json"),
) -> None:
    """Count the broken promises of thresholds chosen for a risk, on draws from real answers."""
    check_json(output)
    check_split(split)
    cases = [parse_case(text) for text in case or CASES]
    kind = check_loss(loss)
    clf = EarlyExitClassifier.from_pretrained(bundle)
    rows = labelled_rows(clf.bundle, data, split)
    table = table_of(clf, encode(rows, clf.bundle.encode))
    found: list[dict[str, Any]] = []
    name = short_path(str(bundle))
    result = {
        "command": f"python -m train.guarantee {name} --data {short_path(data)} "
        f"--split {split} --loss {loss} --draws {draws}"
        + "".join(f" --case {text}" for text in case or ()),
        "date": time.strftime("%Y-%m-%d"),
        "bundle": name,
        "data": rows.origin,
        "rows": len(rows),
        "layers": list(clf.bundle.exits.layers),
        "loss": loss,
        "draws": draws,
        "cases": found,
        **environment(),
    }
    with progress_bar(Console(stderr=True)) as bar:
        for risk, delta, count in cases:
            shown = bar.add_task(f"{risk:g}, {delta:g}, {count} rows", total=draws)
            advance = partial(bar.update, shown, advance=1)
            found.append(broken(table, risk, delta, count, kind, draws, advance))
            write_json(result, output)  # what is known, should a later case be cut off
    Console(width=120).print(table_of_cases(result))


def parse_case(text: str) -> tuple[float, float, int]:
    try:
        risk, delta, count = text.split(",")
        found = float(risk), float(delta), int(count)
    except ValueError:
        found = 0.0, 0.0, 0
    if not (0 < found[0] < 1 and 0 < found[1] < 1 and found[2] > 0):
        raise ValueError(f"--case must be RISK,DELTA,ROWS, such as 0.02,0.05,2000. Got {text!r}.")
    return found


def broken(
    table: Table, risk: float, delta: float, count: int, loss: Loss, draws: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:  # fmt: skip
    """How often the true risk on the table is above `risk`, and what the promise costs.

    Returns:
      `violations` of `draws`, their `share` with its exact 95 % interval; `full_depth`, the
      share of draws that let nobody leave early; `mean_depth` and `mean_risk` over the draws,
      on the whole table; `hindsight_depth`: of the fastest policy whose true risk is within
      `risk`, ordered on the whole table.
    """
    every = np.arange(table.tokens.size)
    lost = table.lost(loss)
    rng = np.random.default_rng(0)
    true: list[float] = []
    depths: list[float] = []
    known: dict[tuple[float, ...], tuple[float, float]] = {}
    full = 0
    for draw in range(draws):
        chosen = risk_thresholds(
            table.take(rng.integers(every.size, size=count)), risk, delta, loss=loss, seed=draw
        )
        policy = tuple(chosen["threshold"])
        if policy not in known:
            taken = table.leave(policy)
            known[policy] = float(lost[taken, every].mean()), table.depth(taken)
        full += known[policy][1] == table.layers[-1]
        true.append(known[policy][0])
        depths.append(known[policy][1])
        advance()
    best = policies(table, "per exit", lost)
    within = totals(table, best, lost.astype(float)) <= risk * every.size
    depths_of_best = totals(table, best, np.outer(table.layers, table.tokens)) / table.tokens.sum()
    violations = int((np.array(true) > risk).sum())
    low = float(1 - bdtri(draws - violations, draws, 0.025)) if violations else 0.0
    high = float(bdtri(violations, draws, 0.025)) if violations < draws else 1.0
    return {
        "risk": risk, "delta": delta, "rows": count, "violations": violations,
        "share": violations / draws, "low": low,
        "high": high, "full_depth": full / draws,
        "mean_risk": float(np.mean(true)), "mean_depth": float(np.mean(depths)),
        "hindsight_depth": depths_of_best[within].min(),
    }  # fmt: skip


def table_of_cases(result: dict[str, Any]) -> Shown:
    title = f"{result['draws']:,} draws from {result['rows']} rows of {result['data']}"
    made = Shown(title=Text(title, "italic"))
    for heading in (
        "risk", "delta", "rows", "broken (95 %)", "full depth", "mean risk",
        f"depth of {result['layers'][-1]}", "in hindsight",
    ):  # fmt: skip
        made.add_column(heading, justify="right")
    for c in result["cases"]:
        made.add_row(
            f"{c['risk']:g}", f"{c['delta']:g}", str(c["rows"]),
            f"{c['share']:.4f} ({c['low']:.4f} to {c['high']:.4f})", f"{c['full_depth']:.3f}",
            f"{c['mean_risk']:.4f}", f"{c['mean_depth']:.2f}", f"{c['hindsight_depth']:.2f}",
        )  # fmt: skip
    return made


if __name__ == "__main__":
    sys.exit(run(app, "train.guarantee", sys.argv[1:]))
