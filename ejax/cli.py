"""The `ejax` command: a short function per verb."""

import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ejax import storage
from ejax.command import (
    FULL,
    Beside,
    Bundle,
    Data,
    Encoder,
    LabelColumn,
    ListsFields,
    RowsAreNew,
    TextColumns,
    Train,
    check_json,
    check_output_file,
    check_split,
    count_fitted,
    in_its_type,
    keep_programs,
    load_beside,
    name_of,
    note,
    parse_threshold,
    parse_top_k,
    rows_of,
    run,
    save_chosen,
    setting,
    train_rows_of,
)
from ejax.errors import UserError
from ejax.storage import path_of

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="markdown",
    help="BERT classifiers that stop at the first layer that is sure.",
)


def main() -> None:
    """The `ejax` command."""
    keep_programs()
    # An exception, so that what is half written goes; training stops in its own way.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(run(app, "ejax", sys.argv[1:]))


@app.callback(invoke_without_command=True)
def version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from importlib import metadata

        print(f"ejax {metadata.version('ejax')}")
        raise typer.Exit


@app.command(
    cls=ListsFields,
    epilog="Example: `ejax train --model all-MiniLM-L6-v2 --train train.tsv --dev dev.tsv "
    "--output sentiment --layers 1,2,4,6 epochs=3`",
)
def train(
    model: Annotated[str, setting("model")],
    output: Annotated[Path, typer.Option(help="The bundle's folder.", parser=path_of)],
    train_file: Annotated[str, setting("data.train")] = "",
    dev: Annotated[str, setting("data.dev")] = "",
    test: Annotated[str, setting("data.test")] = "",
    unlabelled: Annotated[str, setting("data.unlabelled")] = "",
    teacher: Annotated[str, setting("teacher")] = "",
    layers: Annotated[str, setting("layers")] = "",
    pooling: Annotated[str, setting("pooling")] = "",
    epochs: Annotated[str, setting("epochs")] = "",
    batch_size: Annotated[str, setting("batch_size")] = "",
    learning_rate: Annotated[str, setting("learning_rate")] = "",
    max_length: Annotated[str, setting("data.max_length")] = "",
    limit: Annotated[str, setting("data.limit")] = "",
    seed: Annotated[str, setting("seed")] = "",
    text_column: TextColumns = None,
    label_column: Annotated[str, setting("data.label_column")] = "",
    workdir: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoints and logs; else OUTPUT.work.",
            show_default=False,
            parser=path_of,
        ),
    ] = None,
    fields: Annotated[
        list[str] | None,
        typer.Argument(metavar="field=value …", help="Any of the fields below."),
    ] = None,
) -> None:
    """Fine-tune a BERT with exits, calibrate it, and save a bundle.

    The same command again resumes where it was stopped.
    """
    from ejax.config import DataConfig, TrainConfig, override

    columns = tuple(text_column or ())
    data = DataConfig(
        train=train_file, dev=dev, test=test, text_columns=columns, label_column=label_column
    )
    short = {
        "layers": layers, "pooling": pooling, "epochs": epochs, "batch_size": batch_size,
        "learning_rate": learning_rate, "data.max_length": max_length, "data.limit": limit,
        "seed": seed, "teacher": teacher, "data.unlabelled": unlabelled,
    }  # fmt: skip
    given = [f"{name}={value}" for name, value in short.items() if value]
    config = override(TrainConfig(model=model, data=data), [*given, *(fields or ())])
    train_and_show(config, workdir or path_of(f"{output}.work"), output)


def train_and_show(config: Any, workdir: Path, output: Path | None = None) -> None:
    """Fine-tunes, then prints the quality per exit."""
    import jax

    from ejax.bundle import load_bundle
    from ejax.evaluation.describe import exit_tables, show
    from ejax.training.finetune import finetune

    folder = finetune(config, workdir, output=output)
    if jax.process_index() > 0:
        return
    show(*exit_tables(load_bundle(folder)))
    note(f"bundle: {folder}   logs and checkpoints: {workdir}")


@app.command(
    epilog="Example: `ejax predict sentiment --input reviews.tsv --output labelled.tsv "
    "--threshold 0.9`   or   `zcat reviews.jsonl.gz | ejax predict sentiment | head`"
)
def predict(
    bundle: Bundle,
    input: Annotated[str, typer.Option(help="tsv, csv, jsonl, txt, or .gz; - is stdin.")] = "-",
    output: Annotated[str, typer.Option(help="tsv, csv, jsonl, or .gz; - is stdout.")] = "-",
    threshold: Annotated[
        str, typer.Option(help="A number, or full; else the bundle's.", show_default=False)
    ] = "",
    top_k: Annotated[str, typer.Option(help="Likeliest labels: a number, or all.")] = "1",
    abstain: Annotated[
        float | None,
        typer.Option(
            help="Rows whose score is below get no label; 0 labels all; else the bundle's.",
            show_default=False,
        ),
    ] = None,
    text_column: TextColumns = None,
    format: Annotated[
        str, typer.Option(help="Of stdin, where it is not plain: tsv, csv, jsonl, txt.")
    ] = "",
    on_error: Annotated[str, typer.Option(help="At a row that cannot be read: stop, skip.")] = (
        "stop"
    ),
) -> None:
    """Label every row of a file: adds label, score and exit_layer, keeps the other columns.

    A column that is there already keeps its values; the new one is then called
    predicted_label, and so on. With --top-k a column top_k holds a JSON list of labels
    and scores. Rows without an answer, see --abstain, have an empty label. Standard output has
    the format of the input, or jsonl.
    """
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from ejax.calibration.abstain import check_abstain
    from ejax.classifier import EarlyExitClassifier
    from ejax.predict import predict_file

    if on_error not in ("stop", "skip"):
        raise UserError(f"--on-error must be stop or skip. Got {on_error!r}.")
    level, count = parse_threshold(threshold) if threshold else None, parse_top_k(top_k)
    if abstain is not None:
        check_abstain(abstain)
    clf = EarlyExitClassifier.from_pretrained(bundle)
    columns = (SpinnerColumn(), TextColumn("{task.completed:,.0f} rows"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=None)
        done = predict_file(
            clf, input, output, threshold=level, top_k=count, abstain=abstain,
            text_columns=text_column or (), format=format, skip_bad_rows=on_error == "skip",
            progress=lambda rows: bar.update(task, completed=rows),
        )  # fmt: skip
    for sentence in done.named:
        note(f"skipped: {sentence}")
    shares = [f"{layer}: {100 * n / done.rows:.1f} %" for layer, n in sorted(done.exits.items())]
    note(
        f"{done.rows - done.unanswered:,} rows labelled"
        + (f", {done.unanswered:,} without an answer" if done.unanswered else "")
        + (f", {done.skipped:,} skipped" if done.skipped else "")
        + (f", left after layer {', '.join(shares)}" if shares else "")
        + (f"; in {done.spaced:,} tabs or line breaks became spaces" if done.spaced else "")
    )


@app.command(
    epilog="Example: `ejax evaluate sentiment --data test.tsv --thresholds 0.7,0.8,0.9,full`"
)
def evaluate(
    bundle: Bundle,
    data: Data,
    split: Annotated[str, typer.Option(help="train, dev or test.")] = "test",
    thresholds: Annotated[
        str,
        typer.Option(
            help="Numbers, full, default (the bundle's own); else all and a ladder.",
            show_default=False,
        ),
    ] = "",
    repeats: Annotated[int, typer.Option(help="Timed passes; the median counts.", min=1)] = 3,
    output: Annotated[Path, typer.Option(help="JSON; a PNG goes beside it.")] = Path(
        "evaluation.json"
    ),
    text_column: TextColumns = None,
    label_column: LabelColumn = "",
) -> None:
    """Measure accuracy and time per threshold on labelled rows, against full depth."""
    from rich.console import Console

    from ejax.classifier import EarlyExitClassifier
    from ejax.data.rows import encode
    from ejax.evaluation.describe import show
    from ejax.evaluation.evaluate import LADDER, evaluate, save, table

    check_json(output)
    levels = [
        None if text.strip() == "default" else parse_threshold(text)
        for text in thresholds.split(",")
        if thresholds
    ] or [*LADDER, None, FULL]
    clf = EarlyExitClassifier.from_pretrained(bundle)
    rows = rows_of(clf, data, split, text_column, label_column)
    with Console(stderr=True).status("tokenising") as status:
        task = encode(rows, clf.bundle.encode)
        result = evaluate(
            clf, task.encoded, task.labels, list(dict.fromkeys(levels)), repeats=repeats,
            progress=status.update,
        )  # fmt: skip
    result |= {"bundle": name_of(bundle), "data": rows.origin}
    result |= {"rows_fitted_on": count_fitted([clf.bundle], task.hashes)}
    save(result, output)
    show(table(result))
    for sentence in (result.get(name, {}).get("sentence") for name in ("drift", "abstain")):
        if sentence:
            note(sentence)
    note(f"written: {output} and {output.with_suffix('.png')}")


@app.command(epilog="Example: `ejax report sentiment --data test.tsv --output report.html`")
def report(
    bundle: Bundle,
    data: Data,
    split: Annotated[str, typer.Option(help="dev or test.")] = "test",
    beside: Beside = None,
    train: Train = "",
    encoder: Encoder = "",
    repeats: Annotated[int, typer.Option(help="Timed passes; the median counts.", min=1)] = 3,
    output: Annotated[Path, typer.Option(help="HTML; a JSON and PNGs go beside it.")] = Path(
        "report.html"
    ),
    text_column: TextColumns = None,
    label_column: LabelColumn = "",
) -> None:
    """Write one page on what early exit gains and loses on labelled rows, and for whom.

    Rows that fitted the bundle, or one beside it, or chose its thresholds are left out. The page
    needs nothing else: it can be sent and opened anywhere.
    """
    from rich.console import Console

    from ejax.classifier import EarlyExitClassifier
    from ejax.evaluation.page import check_report, write_page
    from ejax.evaluation.report import make_report

    check_split(split)
    check_output_file(output, ".html")
    check_report(output.with_suffix(".json"))
    started = time.perf_counter()
    clf = EarlyExitClassifier.from_pretrained(bundle)
    others = load_beside(beside or ())
    rows = rows_of(clf, data, split, text_column, label_column)
    training = train_rows_of(clf, train, encoder, text_column, label_column)
    with Console(stderr=True).status("") as status:
        made = make_report(
            clf, rows, beside=others, train=training, encoder=encoder, repeats=repeats,
            progress=status.update,
        )  # fmt: skip
    for sentence in (*made["notes"], made["measured"].get("enough", "")):
        if sentence:
            note(sentence)
    for path in write_page(made | {"bundle": name_of(bundle)}, output):
        note(f"written: {path}")
    inference = made["inference_seconds"]
    rest = time.perf_counter() - started - inference
    note(f"{inference:.0f} s of inference, compiling and timing; {rest:.0f} s for the rest")


@app.command(
    epilog="Example: `ejax bench sentiment --data test.tsv --against torch-float32,onnx-int8`"
)
def bench(
    bundle: Bundle,
    data: Data,
    split: Annotated[str, typer.Option(help="train, dev or test.")] = "test",
    threshold: Annotated[str, typer.Option(help="Else the bundle's own.", show_default=False)] = "",
    against: Annotated[
        str,
        typer.Option(
            help="Of torch-float32, torch-bfloat16, onnx-float32, onnx-int8, torch-exit; else all.",
            show_default=False,
        ),
    ] = "",
    beside: Beside = None,
    train: Train = "",
    encoder: Encoder = "",
    limit: Annotated[
        int, typer.Option(help="At most so many rows, evenly over all; 0 is all.", min=0)
    ] = 0,
    repeats: Annotated[int, typer.Option(help="Timed passes; the median counts.", min=1)] = 3,
    output: Annotated[Path, typer.Option(help="JSON; a PNG goes beside it.")] = Path("bench.json"),
    text_column: TextColumns = None,
    label_column: LabelColumn = "",
) -> None:
    """Time this bundle, PyTorch and ONNX Runtime on the same rows in one run.

    With --train two linear models of scikit-learn join them.

    Their libraries come with `pip install '.[bench]'` in ejax's folder; what is not installed
    is left out.
    """
    from rich.console import Console

    from ejax.classifier import EarlyExitClassifier
    from ejax.data.sources import row_hash
    from ejax.evaluation.bench import AGAINST, bench, bench_table, save_bench, spread
    from ejax.evaluation.describe import show
    from ejax.rivals import fit_rivals

    check_json(output)
    clf = EarlyExitClassifier.from_pretrained(bundle)
    others = load_beside(beside or ())
    rows = rows_of(clf, data, split, text_column, label_column)
    every = list(rows)
    chosen = [every[i] for i in spread(len(every), limit or len(every))]
    texts, hashes = [row.inputs for row in chosen], [row_hash(row) for row in chosen]
    training = train_rows_of(clf, train, encoder, text_column, label_column)
    with Console(stderr=True).status("") as status:
        rivals, notes = fit_rivals(
            clf.bundle, training, set(hashes), encoder=encoder, progress=status.update
        )
        result = bench(
            clf, texts, [row.label for row in chosen],
            threshold=parse_threshold(threshold) if threshold else None,
            against=against.split(",") if against else tuple(AGAINST),
            beside=others, rivals=rivals,
            repeats=repeats, progress=status.update,
        )  # fmt: skip
    result |= {"bundle": name_of(bundle), "data": rows.origin, "notes": notes}
    bundles = [clf.bundle, *(other.bundle for other in others.values())]
    result |= {"rows_fitted_on": count_fitted(bundles, hashes)}
    save_bench(result, output)
    show(bench_table(result))
    for name, why in result["left_out"].items():
        note(f"left out: {name} ({why})")
    for sentence in (*notes, result["enough"]):
        if sentence:
            note(sentence)
    note(f"written: {output} and {output.with_suffix('.png')}")


@app.command(epilog="Example: `ejax profile sentiment`")
def profile(
    bundle: Bundle,
    output: Annotated[
        Path | None, typer.Option(help="Also write the JSON here.", show_default=False)
    ] = None,
) -> None:
    """Time the pieces of the engine on this machine, and keep the result for this user.

    From then on every bundle with layers of this shape takes its compute type and its
    tiles from it, and `ejax evaluate` prints the cost it predicts.
    """
    from rich.console import Console

    from ejax.bundle import load_bundle
    from ejax.evaluation.describe import show
    from ejax.evaluation.profile import measure, profile_table
    from ejax.inference.cost import load_profile, profile_path, save_profile

    if output:
        check_json(output)
    loaded = load_bundle(bundle)
    with Console(stderr=True).status("") as status:
        found = measure(loaded, progress=status.update)
    kept = profile_path(loaded.cfg)
    try:
        whole = found.beside(load_profile(kept))
    except ValueError:  # a damaged one is replaced
        whole = found
    for path, profile in [(kept, whole), *([(output, found)] if output else [])]:
        save_profile(profile, path)
        note(f"written: {path}")
    show(profile_table(found))


@app.command(epilog="Example: `ejax export sentiment --output sentiment-hf`")
def export(
    bundle: Bundle,
    output: Annotated[Path, typer.Option(help="The folder to write.", parser=path_of)],
    format: Annotated[str, typer.Option(help="hf.")] = "hf",
) -> None:
    """Write the last exit as a plain Hugging Face classifier, full depth.

    Only for bundles with pooling cls and mix last: others read what it has no place for.
    """
    from ejax.bundle import load_bundle
    from ejax.export import export_hf

    if format != "hf":
        raise UserError(f"--format must be hf. Got {format!r}.")
    loaded = load_bundle(bundle)
    note(f"written: {export_hf(loaded, output)}")
    if loaded.adds_evidence:
        note("What exit 0 adds to the last exit is left out, so answers may differ.")


@app.command(
    epilog="Example: `ejax calibrate sentiment --data new_domain.tsv --output sentiment-news`"
)
def calibrate(
    bundle: Bundle,
    data: Data,
    split: Annotated[str, typer.Option(help="dev or test.")] = "dev",
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Points of accuracy the thresholds may lose; else as in training.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="A new bundle; else in place.", show_default=False, parser=path_of),
    ] = None,
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
    bundle: Bundle,
    data: Data,
    split: Annotated[str, typer.Option(help="dev or test.")] = "dev",
    max_drop: Annotated[
        float | None, typer.Option(help="Points of accuracy to lose.", show_default=False)
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Share of full depth to spend.", show_default=False)
    ] = None,
    budget_ms: Annotated[
        float | None,
        typer.Option(help="Milliseconds of one text alone, in the mean.", show_default=False),
    ] = None,
    risk: Annotated[
        float | None,
        typer.Option(help="Share of texts that may lose, guaranteed.", show_default=False),
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(
            help="How often the promise may fail: of --risk, else 0.05; of --max-drop, else it is "
            "an estimate.",
            show_default=False,
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help="Of --risk: disagreement with full depth (the default), error where that is "
            "right, or wrong: any wrong answer.",
            show_default=False,
        ),
    ] = None,
    abstain: Annotated[
        float | None,
        typer.Option(
            help="Share of the answers given that is to be right, an estimate: what is not certain "
            "enough gets none.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="A new bundle; else in place.", show_default=False, parser=path_of),
    ] = None,
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
    given = (max_drop, budget, budget_ms, risk, delta, loss)
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
    bundle: Bundle,
    data: Data,
    exits: Annotated[int, typer.Option(help="At most so many, the last counted.", min=1)],
    output: Annotated[Path, typer.Option(help="The new bundle.", parser=path_of)],
    split: Annotated[str, typer.Option(help="dev or test.")] = "dev",
    max_drop: Annotated[float, typer.Option(help="Points of accuracy to lose.")] = 0.5,
    repeats: Annotated[int, typer.Option(help="Timed passes; the median counts.", min=1)] = 3,
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


@app.command(epilog="Example: `ejax info sentiment`   or   `ejax info all-MiniLM-L6-v2`")
def info(
    name: Annotated[str, typer.Argument(metavar="BUNDLE|MODEL", help="A bundle, or a model.")],
) -> None:
    """Show what a bundle, or a model to start from, is."""
    from ejax.bundle import load_bundle
    from ejax.evaluation.describe import exit_tables, facts, model_facts, show
    from ejax.models.weights import load_bert

    if storage.is_remote(name) or (Path(name) / "exits.json").exists():
        bundle = load_bundle(name)
        show(facts(bundle), *exit_tables(bundle))
    else:
        show(model_facts(*load_bert(name)))


@app.command(epilog="Example: `ejax quickstart --workdir quickstart`")
def quickstart(
    workdir: Annotated[Path, typer.Option(help="Everything goes here.")],
    model: Annotated[str, typer.Option(help="The encoder.")] = "all-MiniLM-L6-v2",
    data: Annotated[str, typer.Option(help="A folder or a TFDS name; else a small set.")] = "",
    smoke: Annotated[bool, typer.Option("--smoke", help="Only whether it runs.")] = False,
    fields: Annotated[
        list[str] | None,
        typer.Argument(metavar="field=value …", help="Any field that `ejax train --help` lists."),
    ] = None,
) -> None:
    """From nothing to a measured speed-up: fetch, train, calibrate, evaluate."""
    from rich.console import Console

    from ejax.evaluation.quickstart import quickstart

    console = Console(stderr=True)
    path_of(workdir)  # not on gs://
    quickstart(workdir, model=model, data=data, small=smoke, fields=fields or (), console=console)
