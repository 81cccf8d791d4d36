"""Use a bundle: `ejax predict`, `ejax info`, `ejax export`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ejax.cli.options import (
    Bundle,
    LabelColumn,
    NewSplit,
    TextColumns,
    check_split,
    optional,
    parse_threshold,
    parse_top_k,
)
from ejax.cli.run import note
from ejax.errors import UserError
from ejax.storage import path_of

app = typer.Typer()


@app.command(
    epilog="Example: `ejax predict sentiment --input reviews.tsv --output labelled.tsv "
    "--threshold 0.9`   or   `zcat reviews.jsonl.gz | ejax predict sentiment | head`"
)
def predict(
    bundle: Bundle,
    input: Annotated[str, typer.Option(help="tsv, csv, jsonl, parquet, txt; - is stdin.")] = "-",
    output: Annotated[str, typer.Option(help="tsv, csv, jsonl, parquet; - is stdout.")] = "-",
    threshold: Annotated[str, optional("A number, or full; else the bundle's.")] = "",
    top_k: Annotated[str, typer.Option(help="Likeliest labels: a number, or all.")] = "1",
    abstain: Annotated[
        float | None,
        optional("Rows whose score is below get no label; 0 labels all; else the bundle's."),
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


@app.command(epilog="Example: `ejax info sentiment`   or   `ejax info all-MiniLM-L6-v2`")
def info(
    name: Annotated[str, typer.Argument(metavar="BUNDLE|MODEL", help="A bundle, or a model.")],
) -> None:
    """Show what a bundle, or a model to start from, is."""
    from ejax.bundle import load_bundle
    from ejax.evaluation.describe import exit_tables, facts, model_facts, show
    from ejax.hub import bundle_at, is_bundle
    from ejax.models.weights import load_bert

    if is_bundle(name):
        bundle = load_bundle(bundle_at(name))
        show(facts(bundle), *exit_tables(bundle))
    else:
        show(model_facts(*load_bert(name)))


@app.command(
    epilog="Example: `ejax export sentiment --format onnx --output sentiment-onnx`   or   `ejax "
    "export sentiment --format onnx --int8 --data dev.tsv --output sentiment-int8`   or   "
    "`ejax export sentiment --format jax --output sentiment-jax`"
)
def export(
    bundle: Bundle,
    output: Annotated[Path, typer.Option(help="The folder to write.", parser=path_of)],
    format: Annotated[str, typer.Option(help="hf, onnx or jax.")] = "hf",
    int8: Annotated[bool, typer.Option("--int8", help="Of onnx: products in INT8.")] = False,
    data: Annotated[
        str, optional("Texts for the ranges of --int8: a file, a folder with dev and test files.")
    ] = "",
    split: NewSplit = "dev",
    operators: Annotated[
        str, typer.Option(help="Of onnx: onnxruntime, or standard, which other engines know too.")
    ] = "onnxruntime",
    text_column: TextColumns = None,
    label_column: LabelColumn = "",
) -> None:
    """Write a bundle for other runtimes.

    hf is a plain Hugging Face classifier, the last exit at full depth; only for bundles with
    pooling cls and mix last: others read what it has no place for. onnx is a bundle with all exits
    in one graph, where every row leaves at its own. jax is early exit as one program that JAX runs
    without ejax, on CPUs, CUDA GPUs and TPUs.
    """
    from ejax.bundle import load_bundle
    from ejax.hub import bundle_at

    if format not in ("hf", "onnx", "jax"):
        raise UserError(f"--format must be hf, onnx or jax. Got {format!r}.")
    if int8 != bool(data) or (format != "onnx" and int8):
        raise UserError(
            "--int8 goes with --format onnx and --data, the texts that its ranges come from, and "
            "--data with --int8."
        )
    if operators not in ("onnxruntime", "standard"):
        raise UserError(f"--operators must be onnxruntime or standard. Got {operators!r}.")
    if format != "onnx" and operators != "onnxruntime":
        raise UserError("--operators goes with --format onnx.")
    check_split(split)
    if format == "onnx":
        _export_onnx(bundle, output, operators, (data, split, text_column, label_column))
        return
    loaded = load_bundle(bundle_at(bundle))
    if format == "jax":
        from ejax.export.jax import export_jax

        note(f"written: {export_jax(loaded, output)}")
        if loaded.exits.has_zero:
            note("Exit 0 reads the tokens that the program is given, not the whole text.")
        _note_promise(loaded)
        return
    from ejax.export.hf import export_hf

    note(f"written: {export_hf(loaded, output)}")
    if loaded.adds_evidence:
        note("What exit 0 adds to the last exit is left out, so answers may differ.")


def _export_onnx(bundle: str, output: Path, operators: Any, rows: tuple[Any, ...]) -> None:
    from rich.console import Console

    from ejax.bundle import load_bundle
    from ejax.evaluation.labelled import unlabelled_rows
    from ejax.export.onnx import export_onnx
    from ejax.hub import bundle_at

    loaded = load_bundle(bundle_at(bundle))
    data, split, text, label = rows
    given: Any = None
    origin = ""
    if data:
        given, origin = unlabelled_rows(
            loaded, data, split, text_columns=text or (), label_column=label
        )
    with Console(stderr=True).status("writing the graph") as status:
        report = export_onnx(
            loaded, output, rows=given, origin=origin, operators=operators,
            progress=status.update,
        )  # fmt: skip
    note(f"written: {output}")
    if report:
        note(
            f"Of {report['rows']} rows, {report['answers_as_before']} are answered as in float32, "
            f"and {report['at_another_exit']} left at another exit." + loaded.ledger.doubt()
        )
    if report.get("layers_in_float32"):
        layers = ", ".join(map(str, report["layers_in_float32"]))
        note(f"Layers that do not stand INT8, and stay float32: {layers}.")
    _note_promise(loaded)


def _note_promise(loaded: Any) -> None:
    from ejax.provenance import promises_risk

    if promises_risk(loaded.provenance):
        note(
            "What its thresholds promise was shown for another runtime, and holds for that one: "
            "`ejax thresholds` shows it for an ONNX folder."
        )
