"""python -m train.unknown BUNDLE --data DATA --unknown FILE

How well a bundle's scores tell texts of its classes from texts of none of them, as a classifier
that abstains has to.
"""

import sys
import time
from math import sqrt
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table as Shown
from rich.text import Text
from scipy.special import logsumexp, softmax
from sklearn.metrics import roc_auc_score

from ejax.answers import certainty
from ejax.base import TextClassifier
from ejax.calibration.metrics import accuracy
from ejax.classifier import EarlyExitClassifier
from ejax.cli.options import Bundle, Data, TextColumns, check_json, check_split, count_fitted
from ejax.cli.run import run
from ejax.data.rows import encode
from ejax.data.tokenizer import Encoded
from ejax.errors import UserError
from ejax.evaluation.evaluate import write_json
from ejax.evaluation.labelled import labelled_rows
from ejax.hardware import environment
from ejax.inference.policy import Decision
from ejax.predict import read_texts
from ejax.training.outcome import short_path

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


def scores(clf: TextClassifier, encoded: Encoded, decision: Decision) -> dict[str, np.ndarray]:
    """By name, each float [N], higher is surer.

    The largest logit is that of Hendrycks et al., "Scaling Out-of-Distribution Detection for
    Real-World Settings" (2022), the energy that of Liu et al., "Energy-based Out-of-distribution
    Detection" (2020), negated, at temperature 1 and at that of the exit.
    """
    logits = clf.exit_logits(encoded)  # [E, N, C]
    temperatures = np.array(clf.bundle.temperatures)[:, None, None]
    probabilities = softmax(logits / temperatures, axis=-1)
    rows, answer = np.arange(len(encoded)), logits[-1].argmax(axis=-1)
    made = {
        "certainty of the answer given": certainty(clf.bundle, decision),
        "mean over exits, of full depth's answer": probabilities[:, rows, answer].mean(axis=0),
    }
    for name, of_exits in {
        "largest probability": probabilities.max(axis=-1),
        "largest logit": logits.max(axis=-1),
        "energy": logsumexp(logits, axis=-1),
        "energy, by temperature": temperatures[..., 0] * logsumexp(logits / temperatures, axis=-1),
    }.items():
        for layer, of_exit in zip(clf.bundle.exits.layers, of_exits, strict=True):
            made[f"{name}, layer {layer}"] = of_exit
    return made


def auroc(known: np.ndarray, unknown: np.ndarray) -> dict[str, float]:
    """The share of pairs in which the known text is the surer one, with its 95 % interval.

    The standard error is that of Hanley and McNeil, "The meaning and use of the area under a ROC
    curve", Radiology 143 (1982).
    """
    truth = np.repeat([1, 0], [len(known), len(unknown)])
    a = float(roc_auc_score(truth, np.concatenate([known, unknown])))
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    variance = a * (1 - a) + (len(known) - 1) * (q1 - a * a) + (len(unknown) - 1) * (q2 - a * a)
    half = 1.96 * sqrt(max(variance, 0.0) / (len(known) * len(unknown)))
    return {"auroc": a, "low": max(a - half, 0.0), "high": min(a + half, 1.0)}


@app.command(epilog="Example: `python -m train.unknown intents --data test.tsv --unknown oos.tsv`")
def main(
    bundle: Bundle,
    data: Data,
    unknown: Annotated[str, typer.Option(help="A file of texts of no class; labels are ignored.")],
    split: Annotated[str, typer.Option(help="dev or test.")] = "test",
    text_column: TextColumns = None,
    output: Annotated[Path, typer.Option(help="JSON.")] = Path("unknown.json"),
) -> None:
    """AUROC of a bundle's scores between texts of its classes and texts of none of them."""
    check_json(output)
    check_split(split)
    clf = EarlyExitClassifier.from_pretrained(bundle)
    columns = tuple(text_column or ())
    rows = labelled_rows(clf.bundle, data, split, text_columns=columns)
    task = encode(rows, clf.bundle.encode)
    read = read_texts(clf, unknown, columns, "", "jsonl", (), None, lambda _: None)
    other = clf.encode([text for _, text, _ in read])
    if not len(other):
        raise UserError(f"{unknown} holds no text.")
    decided, decided_other = clf.decide_encoded(task.encoded), clf.decide_encoded(other)
    known, others = scores(clf, task.encoded, decided), scores(clf, other, decided_other)
    layers = np.array(clf.bundle.exits.layers)
    name = short_path(bundle)
    result = {
        "command": f"python -m train.unknown {name} --data {short_path(data)} --split {split} "
        f"--unknown {short_path(unknown)}",
        "date": time.strftime("%Y-%m-%d"),
        "bundle": name,
        "data": rows.origin,
        "rows": len(rows),
        "rows_fitted_on": count_fitted([clf.bundle], task.hashes),
        "accuracy": accuracy(decided.logits.argmax(axis=1), task.labels),
        "unknown": short_path(unknown),
        "unknown_rows": len(other),
        "mean_depth": float(layers[decided.exit].mean()),
        "unknown_mean_depth": float(layers[decided_other.exit].mean()),
        "scores": {name: auroc(known[name], others[name]) for name in known},
        **environment(),
    }
    write_json(result, output)
    Console(width=110).print(table_of(result))


def table_of(result: dict[str, Any]) -> Shown:
    title = f"{result['rows']} rows of {result['data']}, {result['unknown_rows']} unknown"
    made = Shown("score", title=Text(title, "italic"))
    made.add_column("AUROC (95 %)", justify="right")
    for name, found in result["scores"].items():
        made.add_row(name, f"{found['auroc']:.4f} ({found['low']:.4f} to {found['high']:.4f})")
    made.caption = (
        f"accuracy on its classes {result['accuracy']:.4f}; mean depth {result['mean_depth']:.2f} "
        f"layers, of the unknown {result['unknown_mean_depth']:.2f}"
    )
    return made


if __name__ == "__main__":
    sys.exit(run(app, "train.unknown", sys.argv[1:]))
