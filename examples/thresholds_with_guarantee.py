"""Choose thresholds that change few answers, with a guarantee.

    python examples/thresholds_with_guarantee.py BUNDLE ROWS.csv [RISK]

With probability 0.95, at most RISK (0.05) of all texts like these get another answer than from all
layers. ROWS.csv has the columns `label` and `text`. None of its rows may have been used before, be
it for training or to compare models. `ejax thresholds BUNDLE --data ROWS.csv --risk RISK` does the
same, checks that the rows are new, and saves the thresholds in the bundle.
"""

import csv
import sys

import ejax
from ejax.calibration.risk import risk_thresholds
from ejax.calibration.thresholds import make_table

folder, file, *more = sys.argv[1:]
risk = float(more[0]) if more else 0.05
with open(file, encoding="utf-8", newline="") as lines:
    rows = list(csv.DictReader(lines))

# The guarantee holds for one compute type, so it is named here and wherever the bundle is used.
clf = ejax.EarlyExitClassifier.from_pretrained(folder, dtype="float32")
encoded = clf.encode([row["text"] for row in rows])
labels = [clf.bundle.labels.index(row["label"]) for row in rows]

# One run through all layers gives every exit's logits [E, N, C]; all else is arithmetic on them.
table = make_table(
    clf.exit_logits(encoded),
    labels,
    clf.bundle.temperatures,
    clf.bundle.exits.layers,
    encoded.lengths,
    exit0_cost=clf.bundle.exit0_cost(encoded),
)
chosen = risk_thresholds(table, risk, delta=0.05)

if len(rows) < chosen["rows_needed"]:
    print(f"{len(rows)} rows show nothing for this risk: it takes {chosen['rows_needed']}.")
print(f"thresholds of the exits: {chosen['threshold']} (above 1: no text exits there)")
print(f"answers changed: {chosen['losses']} of {chosen['rows']} rows")
print(f"layers run: {chosen['mean_depth']:.2f} of {clf.bundle.exits.num_layers}")
print(clf(rows[0]["text"], threshold=chosen["threshold"]))
