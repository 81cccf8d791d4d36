"""python -m train.sets --data ROOT [--cells 'sst2-*'] [--train-only] [--show]

What `ejax train` with its defaults makes of seven data sets and of few and many rows, compared with
the linear models that anyone would try first. ROOT holds a folder per data set with train, dev and
test files; the BBC articles are fetched. Cells that have a result are not run again. `--train-only`
leaves the measuring for later, when the machine is quiet.
"""

import dataclasses
import fnmatch
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from rich.console import Console

from ejax.calibration.metrics import lost_points
from ejax.calibration.thresholds import drop_thresholds
from ejax.classifier import EarlyExitClassifier
from ejax.cli.run import keep_programs, run
from ejax.config import DataConfig, Problem, TrainConfig, to_json
from ejax.data import sources
from ejax.data.rows import encode
from ejax.data.tokenizer import Encoded, Tokenizer
from ejax.errors import UserError
from ejax.evaluation.evaluate import evaluate, exit_measures, write_json
from ejax.evaluation.labelled import labelled_rows
from ejax.evaluation.quickstart import data_config
from ejax.evaluation.targets import rows_for_thresholds, table_of
from ejax.provenance import CHOSEN
from ejax.rivals import FROZEN, TFIDF, draw, fit_rivals, fit_tfidf
from ejax.training.finetune import finetune
from ejax.training.outcome import public

MODEL = "all-MiniLM-L6-v2"
ALL = 0
CELLS = {  # training rows, of each set that has so many
    "sst2": (10_000, ALL, 3_000, 500),
    "trec6": (ALL, 3_000, 500),
    "clinc150": (ALL, 10_000, 3_000, 500),
    "bbc": (ALL, 500),
    "snli": (10_000, 3_000, 500),
    "ag_news": (10_000, 3_000, 500),
    "imdb": (10_000, 3_000, 500),
    "mnli": (10_000,),
    "goemotions": (10_000,),
    "sst5": (ALL,),
    "stsb": (ALL,),
}
SEVERAL: Problem = "multi_label_classification"
SCORE: Problem = "regression"
PROBLEMS: dict[str, Problem] = {"goemotions": SEVERAL, "sst5": SCORE, "stsb": SCORE}
TEST_ROWS = 4_000  # at most
POINTS = {"no loss": 0.0, "0.5 points": 0.5, "1 point": 1.0}  # expected to be lost, on dev rows
CUT = f"{TFIDF}, on the text as the encoder reads it"
ACCURACY = (
    "accuracy", "training rows", "TF-IDF", "frozen encoder", "exit 0", "full depth",
    "points above linear",
)  # fmt: skip
SPEED = ("texts per second", "TF-IDF", "frozen encoder", "exit 0", "default", "full depth")
GAIN_DIGITS = {"mean_depth": 2, "speedup": 1, "ideal_speedup": 1}
ADDED = (
    "accuracy", "exit 0", "layer 1 alone", "with exit 0", "full depth alone", "with exit 0",
)  # fmt: skip
GAIN = ("data", "thresholds for", "accuracy", "points lost", "layers run", "speed-up", "ideal")
app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@dataclasses.dataclass(frozen=True)
class Cell:
    """A training: a data set and how many of its training rows, 0 for all."""

    data: str
    rows: int

    @property
    def name(self) -> str:
        return f"{self.data}-{self.rows or 'all'}"


@app.command(epilog="Example: `python -m train.sets --data DATA --cells 'sst2-*'`")
def main(
    data: Annotated[Path, typer.Option(help="A folder with a folder per data set.")],
    cells: Annotated[str, typer.Option(help="Names of cells, with wildcards.")] = "*",
    workdir: Annotated[Path, typer.Option(help="Trainings and bundles; they resume.")] = Path(
        "runs/sets"
    ),
    results: Annotated[Path, typer.Option(help="One JSON per cell.")] = Path(
        "configs/results/sets"
    ),
    train_only: Annotated[bool, typer.Option("--train-only", help="Measure later.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Only the tables so far.")] = False,
) -> None:
    """Train and measure the cells that have no result yet, then print the tables (Markdown)."""
    every = [Cell(name, rows) for name, sizes in CELLS.items() for rows in sizes]
    chosen = [cell for cell in every if fnmatch.fnmatch(cell.name, cells)]
    if not chosen:
        raise UserError(f"--cells {cells!r} names no cell. They are {every[0].name}, ….")
    console = Console(stderr=True)
    for number, cell in enumerate([] if show else chosen, 1):
        path = results / f"{cell.name}.json"
        if path.exists():
            continue
        console.print(f"{cell.name}, {number} of {len(chosen)}")
        jax.clear_caches()  # the programs of one cell after another would fill the address space
        config = TrainConfig(model=MODEL, data=files_of(cell, data, workdir, console))
        folder = finetune(config, workdir / cell.name, console=console)
        if train_only:
            continue
        with console.status("measuring") as status:
            # Speed is told of the largest cell of each set alone.
            repeats = 5 if cell.rows == CELLS[cell.data][0] else 1
            found = measure(folder, config, repeats=repeats, progress=status.update)
        trained = json.loads((workdir / cell.name / "result.json").read_text(encoding="utf-8"))
        write_json(
            {"command": f"python -m train.sets --data DATA --cells {cell.name}"}
            | {
                "data": cell.data,
                "config": to_json(public(config)),
                "training_seconds": trained["seconds"],
            }
            | found,
            path,
        )
    known = [results / f"{cell.name}.json" for cell in every]
    print(tables([json.loads(path.read_text(encoding="utf-8")) for path in known if path.exists()]))


def files_of(cell: Cell, root: Path, workdir: Path, console: Console) -> DataConfig:
    """The rows of a cell; its dev split is no larger than its train split.

    Raises:
      ValueError: where the set's folder is missing.
    """
    if cell.data == "bbc":
        found = data_config("", workdir / "bbc", console)
        return DataConfig(path=found.path, limit=cell.rows)
    if not (root / cell.data).is_dir():
        raise UserError(f"--data {root} must hold a folder {cell.data}. There is none.")
    problem = PROBLEMS.get(cell.data, "single_label_classification")
    return DataConfig(path=str(root / cell.data), limit=cell.rows, problem_type=problem)


def measure(folder: Path, config: TrainConfig, *, repeats: int, progress: Any) -> dict[str, Any]:
    """The result of `evaluate` on test rows, of a bundle and of the linear models.

    The thresholds are the bundle's own, those that lose so many points on dev rows (`POINTS`), and
    0, where all texts leave at the first exit. `linear` has the accuracy of the linear models, also
    of one on texts that are cut as the encoder reads them; `better_than` how many points each exit
    is better than they, with the paired 95 % interval; `evidence` the weights of exit 0's logits
    in the exits after layers, and `alone_accuracy` what these reach without them.
    """
    clf = EarlyExitClassifier.from_pretrained(folder)
    bundle, root = clf.bundle, config.data.path
    train = list(sources.load(config.data, splits=("train",), seed=config.seed)["train"])
    split = labelled_rows(bundle, root, limit=TEST_ROWS)
    dev_task = rows_for_thresholds(bundle, labelled_rows(bundle, root, "dev"))
    dev = table_of(clf, dev_task)
    task = encode(split, bundle.encode)
    seen = bundle.ledger.among(task.hashes, CHOSEN).union(dev_task.hashes)
    kept = task.without(seen, f"every test row of {root} is in train or dev.")
    every, task = list(split), task.take(kept)
    chosen = {name: tuple(drop_thresholds(dev, most)["threshold"]) for name, most in POINTS.items()}
    points = {"default": None, **chosen, "first exit": 0.0}
    texts, logits = [every[i].inputs for i in kept], clf.exit_logits(task.encoded)
    rivals, _ = fit_rivals(
        bundle, train, set(task.hashes), encoder=config.model,
        dev=list(labelled_rows(bundle, root, "dev")), progress=progress,
    )  # fmt: skip
    found = evaluate(
        clf, task.encoded, task.labels, tuple(dict.fromkeys(points.values())), repeats=repeats,
        exit_logits=logits, texts=texts, rivals=rivals, progress=progress,
    )  # fmt: skip
    of = dict(zip(dict.fromkeys(points.values()), found["thresholds"], strict=True))
    found["thresholds"] = {name: of[threshold] for name, threshold in points.items()}
    measured = bundle.task
    answers = {rival.name: rival.answers(rival.scores(texts)) for rival in rivals}
    if measured.metric == "accuracy" and (task.encoded.whole_lengths > task.encoded.lengths).any():
        progress(f"fitting {CUT}")
        drawn = [train[i] for i in draw(len(train))]
        fit = bundle.tokenizer.encode([row.inputs for row in drawn], bundle.max_length)
        labels = np.array([row.label for row in drawn])
        cut = fit_tfidf(as_read(fit, bundle.tokenizer), labels, measured)
        answers[CUT] = cut.answers(cut.scores(as_read(task.encoded, bundle.tokenizer)))
    exits = [measured.answers(*of) for of in zip(logits, bundle.calibration, strict=True)]
    evidence = bundle.variables["params"].get("ngrams", {}).get("evidence", np.zeros(0))
    alone = logits[1:] - evidence[:, None, None] * logits[0] if evidence.size else logits
    ours = dict(zip(map(str, bundle.exits.layers), exits, strict=True))
    return found | {
        "dev_rows": len(dev_task.labels),
        "evidence": evidence.tolist(),
        "alone_accuracy": exit_measures(bundle.without_zero, alone, task.labels),
        "linear": {name: measured.measure(of, task.labels) for name, of in answers.items()},
        "better_than": {
            name: {
                layer: lost_points(measured, of, other, task.labels) for layer, of in ours.items()
            }
            for name, other in answers.items()
        },
    }


def as_read(encoded: Encoded, tokenizer: Tokenizer) -> list[str]:
    """The texts, cut as the encoder reads them."""
    return [
        tokenizer.decode(encoded.ids[start:end].tolist())
        for start, end in zip(encoded.offsets[:-1], encoded.offsets[1:], strict=True)
    ]


def tables(known: Sequence[dict[str, Any]]) -> str:
    """Accuracy of all cells, and speed of each set's first, as Markdown."""
    accuracies = [
        [
            of["data"], f"{of['config']['data']['limit'] or 'all'}",
            *(f"{of['linear'][name]:.3f}" for name in (TFIDF, FROZEN)),
            f"{per_exit(of)[0]:.3f}" if of["layers"][0] == 0 else "",
            f"{of['full'][of['metric']]:.3f}", least_gain(of),
        ]
        for of in known
    ]  # fmt: skip
    # Small cells are run once, and what they take is not told.
    timed = [of for of in known if of["repeats"] > 1]
    largest = list({of["data"]: of for of in reversed(timed)}.values())[::-1]
    speeds = [
        [
            of["data"],
            *(f"{rival['from_text']:,.0f}" for rival in of["rivals"]),
            f"{of['thresholds']['first exit']['from_text']:,.0f}" if of["layers"][0] == 0 else "",
            f"{of['thresholds']['default']['from_text']:,.0f}", f"{of['full']['from_text']:,.0f}",
        ]
        for of in largest
    ]  # fmt: skip
    gains = [
        [
            of["data"], name, f"{point[of['metric']]:.3f}",
            f"{point['drop']:.1f} ({point['drop_low']:.1f} to {point['drop_high']:.1f})",
            *(f"{point[field]:.{digits}f}" for field, digits in GAIN_DIGITS.items()),
        ]
        for of in largest
        for name, point in of["thresholds"].items()
        if name != "first exit"
    ]  # fmt: skip
    added = [
        [
            of["data"], f"{per_exit(of)[0]:.3f}",
            f"{of['alone_accuracy'][0]:.3f}", f"{per_exit(of)[1]:.3f}",
            f"{of['alone_accuracy'][-1]:.3f}", f"{per_exit(of)[-1]:.3f}",
        ]
        for of in largest
        if of["evidence"]
    ]  # fmt: skip
    return "\n\n".join(
        markdown(headings, rows)
        for headings, rows in (
            (ACCURACY, accuracies),
            (SPEED, speeds),
            (GAIN, gains),
            (ADDED, added),
        )
    )


def per_exit(of: dict[str, Any]) -> list[float]:
    """Of every exit: accuracy, or the metric of another task."""
    found: list[float] = of[f"exit_{of['metric']}"]
    return found


def least_gain(of: dict[str, Any]) -> str:
    """Full depth less the best linear model that reads what it reads, in points."""
    names = [FROZEN, CUT if CUT in of["linear"] else TFIDF]
    best = max((name for name in names if name in of["linear"]), key=of["linear"].get)
    gain, low, high = of["better_than"][best][str(of["layers"][-1])]
    return f"{gain:.1f} ({low:.1f} to {high:.1f})"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


if __name__ == "__main__":
    keep_programs()
    sys.exit(run(app, "train.sets", sys.argv[1:]))
