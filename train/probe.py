"""python -m train.probe BUNDLE --data DATA --train FILE [--dev FILE] [--limit N]

Whether the heads of a bundle are fully trained: every exit compared with a logistic regression,
fitted to the training rows, on the very vectors that the exit's head reads.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ejax.base import TextClassifier
from ejax.calibration.metrics import accuracy, paired_interval
from ejax.classifier import EarlyExitClassifier
from ejax.cli.options import Bundle, Data, LabelColumn, TextColumns, check_json, check_split
from ejax.cli.run import run
from ejax.data.rows import TokenizedSplit, encode
from ejax.data.sources import Split
from ejax.errors import UserError
from ejax.evaluation.describe import numbers, show
from ejax.evaluation.evaluate import write_json
from ejax.evaluation.labelled import labelled_rows
from ejax.hardware import environment
from ejax.models.heads import read
from ejax.provenance import CHOSEN, TRAINED
from ejax.rivals import draw, make_mixes, regression
from ejax.training.outcome import short_path

LADDER = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of C
app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(epilog="Example: `python -m train.probe sentiment --data test.tsv --train train.tsv`")
def main(
    bundle: Bundle,
    data: Data,
    train: Annotated[str, typer.Option(help="The rows that trained the bundle: file or folder.")],
    dev: Annotated[
        str, typer.Option(help="Rows to choose C on; else those of --train that did not train it.")
    ] = "",
    split: Annotated[str, typer.Option(help="dev or test.")] = "test",
    limit: Annotated[
        int, typer.Option(help="At most so many rows of each file, drawn; 0 is all.", min=0)
    ] = 0,
    output: Annotated[Path, typer.Option(help="JSON.")] = Path("probe.json"),
    text_column: TextColumns = None,
    label_column: LabelColumn = "",
) -> None:
    """Compare every exit with a logistic regression on the vectors that its head reads.

    At most 10,000 rows of --train are fitted. Rows that fitted the bundle, or are used here for
    fitting, are not reported on.
    """
    check_json(output)
    check_split(split)
    clf = EarlyExitClassifier.from_pretrained(bundle)

    def rows(name: str, part: str) -> Split:
        return labelled_rows(
            clf.bundle, name, part, text_columns=text_column or (), label_column=label_column,
            limit=limit,
        )  # fmt: skip

    given = {"train": rows(train, "train"), "test": rows(data, split)}
    if dev:
        given["dev"] = rows(dev, "dev")
    with Console(stderr=True).status("") as status:
        found = probe(clf, given, progress=status.update)
    name = short_path(bundle)
    found |= {
        "command": " ".join(["python -m train.probe", *map(short_path, sys.argv[1:])]),
        "date": time.strftime("%Y-%m-%d"),
        "bundle": name,
        "data": {part: split.origin for part, split in given.items()},
        "config": clf.bundle.provenance.get("config", {}),
        **environment(),
    }
    write_json(found, output)
    show(probe_table(found), *sentences(found))


def probe(
    clf: TextClassifier, given: dict[str, Split], *, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Per exit of the encoder, its accuracy and that of the regression on other rows.

    Args:
      given: rows "train", to fit to; "test", to report on; and "dev", or none, to choose C on.

    Returns:
      Ready for JSON. `exits`: of each `layer`, `accuracy`, `probe` (the regression's accuracy),
      `gap` (points the exit is below it, with its paired 95 % interval), `c`; `mean_gap`; the
      numbers of rows, `c_from`: what C was chosen on, and `notes`.

    Raises:
      ValueError: where no rows are left to report on, or those to fit to have one label.
    """
    bundle = clf.bundle
    progress("tokenising")
    tasks = {part: encode(split, bundle.encode) for part, split in given.items()}
    train, hashes = tasks["train"], [name for task in tasks.values() for name in task.hashes]
    trained = bundle.ledger.among(hashes, TRAINED)
    ours = np.array([name in trained for name in train.hashes])
    if not ours.any():
        raise UserError(
            f"no row of {given['train'].origin} is known to have trained this bundle: --train "
            f"takes the rows that did, which its rows.json names."
        )
    if "dev" in tasks:
        dev, c_from = tasks["dev"], given["dev"].origin
        dev = dev.take(dev.without(trained, f"every row of {c_from} trained this bundle."))
    else:
        dev = train.take(np.flatnonzero(~ours))
        c_from = "rows of --train that did not train the bundle" if len(dev.labels) else ""
    fitted = train.take(np.flatnonzero(ours))
    fitted = fitted.take(draw(len(fitted.labels)))
    if len(set(fitted.labels.tolist())) < 2:
        raise UserError("--train must hold rows of two labels or more. Got one label.")
    test = tasks["test"]
    seen = bundle.ledger.among(test.hashes, CHOSEN).union(train.hashes, dev.hashes)
    test = test.take(
        test.without(
            seen, f"every row of {given['test'].origin} fitted this bundle: give other rows."
        )
    )
    progress("the heads' own answers")
    heads = EarlyExitClassifier(bundle.without_zero, shapes=clf.shapes)  # nothing from exit 0
    logits = heads.exit_logits(test.encoded)
    run = make_mixes(bundle.model, bundle.variables, bundle.max_length, bundle.buckets)

    def mixes(task: TokenizedSplit, part: str) -> np.ndarray:
        progress(f"vectors of {len(task.labels)} {part} rows")
        return run(task.encoded)

    x, x_test = mixes(fitted, "training"), mixes(test, "test")
    x_dev = mixes(dev, "dev") if c_from else None
    exits = []
    layers = bundle.exits.layers[-x.shape[1] :]  # those that read a mix
    for e, (layer, answers) in enumerate(
        zip(layers, logits[-len(layers) :].argmax(axis=2), strict=True)
    ):
        progress(f"the regression after layer {layer}")
        mixed, mixed_dev, mixed_test = (
            None if of is None else np.asarray(read(of[:, e], bundle.exits))
            for of in (x, x_dev, x_test)
        )
        model, c = regression(
            mixed, fitted.labels, LADDER,
            dev=None if mixed_dev is None else (mixed_dev, dev.labels),
        )  # fmt: skip
        linear = model.predict(mixed_test)
        gap, low, high = paired_interval(linear == test.labels, answers == test.labels)
        exits.append(
            {
                "layer": int(layer), "accuracy": accuracy(answers, test.labels),
                "probe": accuracy(linear, test.labels), "gap": gap, "gap_low": low,
                "gap_high": high, "c": c,
            }
        )  # fmt: skip
    return {
        "exits": exits,
        "mean_gap": float(np.mean([row["gap"] for row in exits])),
        "rows": len(test.labels),
        "rows_left_out": len(given["test"]) - len(test.labels),
        "fitted_rows": len(fitted.labels),
        "dev_rows": len(dev.labels),
        "c_from": c_from or "cross-validation on the rows fitted to",
    }


def probe_table(found: dict[str, Any]) -> Table:
    """The result as people read it."""
    made = numbers(
        Text(f"{found['rows']} rows of {found['data']['test']}", "italic"),
        "layer", "exit", "regression", "gap, points", "95 %", "C",
    )  # fmt: skip
    made.caption = Text(
        f"mean gap {found['mean_gap']:z.2f} points; regressions fitted to "
        f"{found['fitted_rows']:,} rows, C from {found['c_from']}"
    )
    for row in found["exits"]:
        made.add_row(
            str(row["layer"]), f"{row['accuracy']:.4f}", f"{row['probe']:.4f}",
            f"{row['gap']:z.2f}", f"{row['gap_low']:z.2f} to {row['gap_high']:z.2f}",
            f"{row['c']:g}",
        )  # fmt: skip
    return made


def sentences(found: dict[str, Any]) -> list[str]:
    """One for each exit whose gap is beyond its interval; or that there is none."""
    return [
        f"The head after layer {row['layer']} is under-trained: it is right on "
        f"{row['accuracy']:.3f}, a logistic regression on the same vectors on {row['probe']:.3f}."
        for row in found["exits"]
        if row["gap_low"] > 0
    ] or ["No head is below a logistic regression on the same vectors by more than chance."]


if __name__ == "__main__":
    sys.exit(run(app, "train.probe", sys.argv[1:]))
