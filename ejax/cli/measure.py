"""Measure a bundle: `ejax evaluate`, `ejax report`, `ejax bench`, `ejax profile`."""

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from ejax.cli.options import (
    FULL,
    Beside,
    Bundle,
    Data,
    Encoder,
    LabelColumn,
    NewSplit,
    Repeats,
    Split,
    TextColumns,
    Train,
    check_json,
    check_output_file,
    check_split,
    count_fitted,
    load_beside,
    name_of,
    optional,
    parse_threshold,
    rows_of,
    train_rows_of,
)
from ejax.cli.run import note
from ejax.storage import path_of

app = typer.Typer()


@app.command(
    epilog="Example: `ejax evaluate sentiment --data test.tsv --thresholds 0.7,0.8,0.9,full`"
)
def evaluate(
    bundle: Bundle,
    data: Data,
    split: Split = "test",
    thresholds: Annotated[
        str, optional("Numbers, full, default (the bundle's own); else all and a ladder.")
    ] = "",
    repeats: Repeats = 3,
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
    split: NewSplit = "test",
    beside: Beside = None,
    train: Train = "",
    encoder: Encoder = "",
    repeats: Repeats = 3,
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
    split: Split = "test",
    threshold: Annotated[str, optional("Else the bundle's own.")] = "",
    against: Annotated[
        str,
        optional(
            "Of torch-float32, torch-bfloat16, torch-compile, onnx-float32, onnx-int8, "
            "onnx-int8-static, openvino-bfloat16, openvino-int8, torch-exit; else all."
        ),
    ] = "",
    beside: Beside = None,
    train: Train = "",
    encoder: Encoder = "",
    limit: Annotated[
        int, typer.Option(help="At most so many rows, evenly over all; 0 is all.", min=0)
    ] = 0,
    cores: Annotated[
        int | None,
        optional("Run all contenders on so many cores, with as many threads; else on all."),
    ] = None,
    repeats: Repeats = 3,
    output: Annotated[Path, typer.Option(help="JSON; a PNG goes beside it.")] = Path("bench.json"),
    text_column: TextColumns = None,
    label_column: LabelColumn = "",
) -> None:
    """Time this bundle, PyTorch, ONNX Runtime and OpenVINO on the same rows in one run.

    With --train two linear models of scikit-learn join them, and what needs texts for the ranges of
    its INT8 activations.

    Their libraries come with `pip install '.[bench]'` in ejax's folder; what is not installed
    is left out.
    """
    from rich.console import Console

    from ejax.hardware import use_cores

    check_json(output)
    if cores is not None:
        use_cores(cores)
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # kept programs are for all cores
    # What counts the cores is imported after that.
    from ejax.classifier import EarlyExitClassifier
    from ejax.data.sources import row_hash
    from ejax.evaluation.bench import AGAINST, bench
    from ejax.evaluation.bench_page import bench_table, save_bench
    from ejax.evaluation.describe import show
    from ejax.evaluation.labelled import check_single
    from ejax.evaluation.scenarios import spread
    from ejax.rivals import fit_rivals

    # What `ejax profile` found is of all cores.
    profile = "auto" if cores is None else None
    clf = EarlyExitClassifier.from_pretrained(bundle, profile=profile)
    check_single(clf.bundle, "bench")
    others = load_beside(beside or (), profile)
    rows = rows_of(clf, data, split, text_column, label_column)
    every = list(rows)
    chosen = [every[i] for i in spread(len(every), limit or len(every))]
    texts, hashes = [row.inputs for row in chosen], [row_hash(row) for row in chosen]
    training = train_rows_of(clf, train, encoder, text_column, label_column)
    tested = set(hashes)
    with Console(stderr=True).status("") as status:
        rivals, notes = fit_rivals(
            clf.bundle, training, tested, encoder=encoder, progress=status.update
        )
        result = bench(
            clf, texts, [row.label for row in chosen],
            threshold=parse_threshold(threshold) if threshold else None,
            against=against.split(",") if against else tuple(AGAINST),
            beside=others, rivals=rivals,
            ranges=[row.inputs for row in training if row_hash(row) not in tested],
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
    output: Annotated[Path | None, optional("Also write the JSON here.")] = None,
    onnx: Annotated[
        list[Path] | None,
        optional("A folder exported from it, to say which is fastest; repeatable.", parser=path_of),
    ] = None,
) -> None:
    """Time the pieces of the engine on this machine, and keep the result for this user.

    From then on every bundle with layers of this shape takes its compute type and its
    tiles from it, and `ejax evaluate` prints the cost it predicts. Of a folder that
    `ejax export --format onnx` wrote it times texts alone, for `ejax thresholds --budget-ms`.
    """
    from rich.console import Console

    from ejax.bundle import load_bundle
    from ejax.classifier import EarlyExitClassifier
    from ejax.evaluation.describe import show
    from ejax.evaluation.profile import compare, measure, measure_graph, profile_table
    from ejax.hub import bundle_at
    from ejax.inference.cost import load_profile, profile_path, save_profile
    from ejax.onnx import OnnxClassifier

    if output:
        check_json(output)
    exported = {str(path): OnnxClassifier.from_pretrained(path) for path in onnx or ()}
    loaded = load_bundle(bundle_at(bundle))
    with Console(stderr=True).status("") as status:
        if loaded.graph:
            graph = OnnxClassifier(loaded)
            found = measure_graph(graph, progress=status.update)
            kept = profile_path(loaded.cfg, *graph.runtime)
        else:
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
    if exported:
        clf = EarlyExitClassifier.from_pretrained(bundle)
        table, sentences = compare({str(bundle): clf, **exported})
        show(table)
        for sentence in sentences:
            note(sentence)
