"""python -m train.teacher --data FOLDER --labelled 10000 --unlabelled 50000 [--teacher BUNDLE]

What texts without labels are worth: a training on few labelled rows and on more texts, compared
with one on the labelled rows alone with as many steps. The labels of the texts are dropped here.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from ejax.bundle import load_bundle
from ejax.cli.options import check_json
from ejax.cli.run import keep_programs, run
from ejax.config import DataConfig, TrainConfig, epochs_of, override, to_json
from ejax.data import sources
from ejax.errors import UserError
from ejax.evaluation.evaluate import write_json
from ejax.hardware import environment
from ejax.training.finetune import finetune
from ejax.training.outcome import public

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(
    epilog="Example: `python -m train.teacher --data data/sst2 --labelled 10000 --unlabelled 50000 "
    "--model all-MiniLM-L6-v2 --workdir runs/teacher layers=1,2,4,6`"
)
def main(
    data: Annotated[str, typer.Option(help="A folder with train, dev and test files.")],
    labelled: Annotated[int, typer.Option(min=2, help="Rows of train that keep their labels.")],
    unlabelled: Annotated[int, typer.Option(min=1, help="Rows of train that lose them.")],
    model: Annotated[str, typer.Option(help="The encoder.")],
    workdir: Annotated[Path, typer.Option(help="The files, both runs; they resume.")],
    teacher: Annotated[str, typer.Option(help="A bundle; else the run's own last exit.")] = "",
    output: Annotated[Path, typer.Option(help="JSON.")] = Path("teacher.json"),
    fields: Annotated[
        list[str] | None, typer.Argument(metavar="field=value …", help="Of both runs.")
    ] = None,
) -> None:
    """Compare a training with unlabelled rows to one without them, step for step."""
    check_json(output)
    plain = override(TrainConfig(model=model, data=DataConfig(path=data)), fields or ())
    # All steps are taken: where one run stopped early they would not be as many.
    plain = dataclasses.replace(plain, patience=0)
    folder, rows = write_files(plain, labelled, unlabelled, workdir / "data")
    files = dataclasses.replace(plain.data, path=str(folder), text_columns=(), label_column="")
    more = dataclasses.replace(files, unlabelled=str(folder / "unlabelled.jsonl"))
    with_more = dataclasses.replace(plain, data=more, teacher=teacher)
    batches = [-(-count // plain.batch_size) for count in (rows, labelled)]
    epochs = epochs_of(plain, rows)
    steps = [epochs * batches[0], max(round(epochs * batches[0] / batches[1]), 1) * batches[1]]
    runs = {
        "with unlabelled rows": (dataclasses.replace(with_more, epochs=epochs), steps[0]),
        "without": (
            dataclasses.replace(plain, data=files, epochs=steps[1] // batches[1]), steps[1],
        ),
    }  # fmt: skip
    made = {
        name: train_and_measure(*pair, workdir / name.split()[0]) for name, pair in runs.items()
    }
    command = " ".join(["python -m train.teacher", *sys.argv[1:]])
    found = {"data": data, "labelled": labelled, "unlabelled": rows - labelled, "runs": made}
    found |= {"command": command, "date": time.strftime("%Y-%m-%d"), **environment()}
    write_json(found, output)
    table = Table("", "steps", "rows", "accuracy after layer …", title=f"{data}, {labelled} labels")
    for name, result in made.items():
        part, per_exit = next(iter(result["accuracy"].items()))
        cells = ", ".join(f"{layer}: {share:.4f}" for layer, share in per_exit.items())
        table.add_row(name, str(result["steps"]), part, cells)
    Console().print(table)


def write_files(
    config: TrainConfig, labelled: int, unlabelled: int, folder: Path
) -> tuple[Path, int]:
    """train, dev, test and unlabelled, jsonl, of the data of a config; the rows to learn from.

    The labelled rows are those that `limit` would keep.
    """
    splits = sources.load(config.data, seed=config.seed)
    order = np.random.default_rng(0).permutation(len(splits["train"]))
    if len(order) < labelled + 1:
        raise UserError(
            f"train must have more than {labelled} rows (--labelled). Got {len(order)}."
        )
    chosen = [np.sort(order[:labelled]), np.sort(order[labelled:][:unlabelled])]
    every = list(splits["train"])
    parts = {name: list(split) for name, split in splits.items()}
    parts |= {
        name: [every[i] for i in rows]
        for name, rows in zip(("train", "unlabelled"), chosen, strict=True)
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        with (folder / f"{name}.jsonl").open("w") as file:
            for row in rows:
                texts = {"text": row.text}
                if row.pair is not None:
                    texts = {"text_a": row.text, "text_b": row.pair}
                label = {} if name == "unlabelled" else {"label": splits["train"].labels[row.label]}
                file.write(json.dumps(label | texts) + "\n")
    return folder, sum(map(len, chosen))


def train_and_measure(config: TrainConfig, steps: int, workdir: Path) -> dict[str, Any]:
    """One run, and its accuracy per exit on test and dev-B."""
    bundle = load_bundle(finetune(config, workdir))
    metrics = bundle.provenance["metrics"]
    accuracy = {
        name: {
            str(layer): row["after"]["accuracy"]
            for layer, row in zip(bundle.exits.layers, metrics[name], strict=True)
        }
        for name in ("test", "dev_b")
        if name in metrics
    }
    return {
        "config": to_json(public(config)),
        "steps": steps,
        "best_step": bundle.provenance["best_step"],
        "seconds": json.loads((workdir / "result.json").read_text())["seconds"],
        "accuracy": accuracy,
        "rows": {n: bundle.provenance["operating_points"][n]["rows"] for n in accuracy},
    }


if __name__ == "__main__":
    keep_programs()
    sys.exit(run(app, "train.teacher", sys.argv[1:]))
