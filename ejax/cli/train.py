"""Make a bundle: `ejax train`, `ejax quickstart`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ejax.cli.options import ListsFields, TextColumns, optional, setting
from ejax.cli.run import note
from ejax.storage import path_of

app = typer.Typer()


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
    problem_type: Annotated[str, setting("data.problem_type")] = "",
    workdir: Annotated[
        Path | None, optional("Checkpoints and logs; else OUTPUT.work.", parser=path_of)
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
        "data.problem_type": problem_type,
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
