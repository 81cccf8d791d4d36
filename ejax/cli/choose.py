"""Choose for a bundle on labelled rows: `ejax calibrate`, `ejax thresholds`, `ejax place`."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ejax.cli.options import (
    Changed,
    ChangedBundle,
    Data,
    LabelColumn,
    NewSplit,
    Repeats,
    RowsAreNew,
    TextColumns,
    check_split,
    optional,
    rows_of,
)
from ejax.cli.run import note
from ejax.errors import UserError
from ejax.storage import path_of

app = typer.Typer()


@app.command(
    epilog="Example: `ejax calibrate sentiment --data new_domain.tsv --output sentiment-news`"
)
def calibrate(
    bundle: ChangedBundle,
    data: Data,
    split: NewSplit = "dev",
    max_drop: Annotated[
        float | None, optional("Points of accuracy the thresholds may lose; else as in training.")
    ] = None,
    output: Changed = None,
    rows_are_new: RowsAreNew = False,
    text_column: TextColumns = None,
    label_column: LabelColumn = "",
) -> None:
    """Fit temperatures and the default thresholds again, on other labelled rows.

    The weights stay. Rows trained on are left out, and rows of the bundle's dev-B, which is for
    reports, unless they placed the exits.
    """
    from ejax.calibration.thresholds import check_max_drop
    from ejax.classifier import EarlyExitClassifier
    from ejax.evaluation.describe import exit_tables, facts, show
    from ejax.evaluation.recalibrate import recalibrate
    from ejax.saving import check_output, save_bundle

    check_split(split)
    if max_drop is not None:
        check_max_drop(max_drop)
    clf = EarlyExitClassifier.from_pretrained(bundle)
    check_output(output or bundle)
    rows = rows_of(clf, data, split, text_column, label_column)
    after = recalibrate(clf, rows, max_drop=max_drop, rows_are_new=rows_are_new)
    after = in_its_type(after, bundle)
    show(facts(after), *exit_tables(after))
    folder = save_bundle(after, output or bundle)
    left_out = after.provenance["calibrated"]["rows_left_out"]
    why = f"; {left_out} rows left out: trained on, or dev-B" if left_out else ""
    note(f"written: {folder}{why}")


@app.command(epilog="Example: `ejax thresholds sentiment --data dev.tsv --risk 0.01 --delta 0.05`")
def thresholds(
    bundle: ChangedBundle,
    data: Data,
    split: NewSplit = "dev",
    max_drop: Annotated[
        float | None, optional("Points of accuracy (hundredths of F1, of Spearman) to lose.")
    ] = None,
    budget: Annotated[float | None, optional("Share of full depth to spend.")] = None,
    budget_ms: Annotated[
        float | None, optional("Milliseconds of one text alone, in the mean.")
    ] = None,
    risk: Annotated[float | None, optional("Share of texts that may lose, guaranteed.")] = None,
    delta: Annotated[
        float | None,
        optional(
            "How often the promise may fail: of --risk, else 0.05; of --max-drop, else it is an "
            "estimate."
        ),
    ] = None,
    loss: Annotated[
        str | None,
        optional(
            "Of --risk: disagreement with full depth (the default), error where that is "
            "right, or wrong: any wrong answer."
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        optional("Of --risk on scores: numbers this far apart, or less, are the same."),
    ] = None,
    abstain: Annotated[
        float | None,
        optional(
            "Share of the answers given that is to be right, an estimate: what is not certain "
            "enough gets none."
        ),
    ] = None,
    output: Changed = None,
    rows_are_new: RowsAreNew = False,
    text_column: TextColumns = None,
    label_column: LabelColumn = "",
) -> None:
    """Choose the default thresholds for a target: an accuracy drop, a budget, or a risk.

    One of --max-drop, --budget, --budget-ms and --risk. Rows that fitted the bundle are left
    out; the rows used here are recorded, and no report should use them again. What is chosen holds
    for texts like those. A promise that these rows are too few to show gives full depth, or, of
    wrong answers, nothing. --abstain, alone or with one of these, chooses below which certainty a
    text gets no answer.
    """
    from rich.console import Console

    from ejax.calibration.abstain import check_accuracy
    from ejax.classifier import EarlyExitClassifier
    from ejax.evaluation.abstain import choose_abstain
    from ejax.evaluation.describe import show
    from ejax.evaluation.targets import Target, choose, targets_table
    from ejax.saving import check_output

    check_split(split)
    given = (max_drop, budget, budget_ms, risk, delta, loss, tolerance)
    alone = abstain is not None and given == (None,) * len(given)
    target = None if alone else Target(*given)
    if abstain is not None:
        check_accuracy(abstain)
    clf = EarlyExitClassifier.from_pretrained(bundle)
    check_output(output or bundle)
    rows = rows_of(clf, data, split, text_column, label_column)
    with Console(stderr=True).status("tokenising") as status:
        after, reports = clf.bundle, []
        if target:
            after, report = choose(
                clf, rows, target, rows_are_new=rows_are_new, progress=status.update
            )
            reports.append(report)
        if abstain is not None:
            after, report = choose_abstain(
                clf, rows, abstain, bundle=after, rows_are_new=rows_are_new, progress=status.update
            )
            reports.append(report)
    if target:
        show(targets_table(reports[0]))
    save_chosen(after, bundle, output or bundle, *reports)


@app.command(epilog="Example: `ejax place sentiment --data dev.tsv --exits 3 --output sentiment-3`")
def place(
    bundle: ChangedBundle,
    data: Data,
    exits: Annotated[int, typer.Option(help="At most so many, the last counted.", min=1)],
    output: Annotated[Path, typer.Option(help="The new bundle.", parser=path_of)],
    split: NewSplit = "dev",
    max_drop: Annotated[float, typer.Option(help="Points of accuracy to lose.")] = 0.5,
    repeats: Repeats = 3,
    text_column: TextColumns = None,
    label_column: LabelColumn = "",
) -> None:
    """Keep the exits, and thresholds for them, that cost least on this machine.

    Needs `ejax profile`. The layers above the last exit kept are dropped. Rows that fitted the
    bundle are left out; the rows used here are recorded.
    """
    from rich.console import Console

    from ejax.calibration.thresholds import check_max_drop
    from ejax.classifier import EarlyExitClassifier
    from ejax.evaluation.describe import show
    from ejax.evaluation.place import place_exits, placements_table
    from ejax.saving import check_output

    check_split(split)
    check_output(output)
    check_max_drop(max_drop)
    if output.resolve() == bundle.resolve():
        raise UserError(
            f"--output must not be {bundle}: the layers it loses could not be had back."
        )
    clf = EarlyExitClassifier.from_pretrained(bundle)
    rows = rows_of(clf, data, split, text_column, label_column)
    with Console(stderr=True).status("tokenising") as status:
        after, report = place_exits(
            clf, rows, exits, max_drop=max_drop, repeats=repeats, progress=status.update
        )
    show(placements_table(report))
    save_chosen(after, bundle, output, report)


def in_its_type(after: Any, bundle: Path) -> Any:
    """A bundle in the compute type of the one it came from; says so where a promise is gone."""
    from ejax.provenance import promises_risk

    before = json.loads((bundle / "exits.json").read_text(encoding="utf-8"))
    if promises_risk(before["provenance"]) and "target" not in after.provenance:
        note("What its thresholds promised is gone: `ejax thresholds` chooses anew.")
    if "abstain" in before and "abstain" not in after.provenance:
        note("Every text gets an answer again: `ejax thresholds --abstain` chooses when none.")
    cfg = dataclasses.replace(after.cfg, dtype=before["dtype"])
    return dataclasses.replace(after, cfg=cfg)


def save_chosen(after: Any, bundle: Path, output: Path, *reports: dict[str, Any]) -> None:
    """Writes what was chosen on some rows, and says on which."""
    from ejax.saving import save_bundle

    folder = save_bundle(in_its_type(after, bundle), output)
    if left_out := reports[0]["rows_left_out"]:
        note(f"{left_out} rows left out: they fitted this bundle.")
    for report in reports:
        if report.get("differ"):
            note(f"{report['differ']} rows left at another exit when the engine ran.")
        note(report["sentence"])
    note(f"written: {folder}")
