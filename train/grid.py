"""python -m train.grid --data ROOT --twelve MODEL [--cells 'sst2-minilm-*'] [--show]

The paper's comparison on its five tasks, cell by cell: a model with exits against the standard
model with one head and against models cut at each exit layer and trained alone; and ways to train
the exits, side by side. Cells whose result is there are not run again; they come in the order of
what they teach. ROOT holds a folder per data set with train, dev and test files.
"""

import dataclasses
import fnmatch
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from rich.console import Console
from rich.table import Table as Shown

from ejax.bundle import load_bundle
from ejax.calibration import metrics
from ejax.calibration.thresholds import (
    Table,
    budget_thresholds,
    describe,
    drop_thresholds,
    make_table,
    operating_point,
    oracle,
)
from ejax.classifier import EarlyExitClassifier
from ejax.command import run
from ejax.config import DataConfig, TrainConfig, to_json
from ejax.data.tokenizer import Encoded
from ejax.evaluation.bench import spread
from ejax.evaluation.evaluate import evaluate, save_figure, write_json
from ejax.evaluation.labelled import labelled_rows
from ejax.evaluation.targets import FAMILIES, rows_for_thresholds, trained_on
from ejax.hardware import environment
from ejax.training.finetune import Task, encode, finetune, short_path

DATA = ("sst2", "snli", "ag_news", "mnli", "imdb")
EXITS = {"minilm": (1, 2, 4, 6), "twelve": (1, 4, 6, 12)}
MORE_SEEDS = ("sst2", "snli")  # of the 6-layer model, three in all
ROWS, TOKENS = 10_000, 128  # of each split, of each text
TIMED_TOKENS, SINGLES, REPEATS = 65_536, 100, 5
MAX_DROP = 1.0  # points, on dev-B
SUM: dict[str, Any] = {"distillation": 0.0}  # of the exits' own losses
RECIPES: dict[str, dict[str, Any]] = {  # of all exits together
    "exits": {},  # the default of `TrainConfig`, self-distillation: FastBERT, RomeBERT
    "sum": SUM,  # the paper
    "weights": SUM | {"exit_weights": EXITS["minilm"]},  # by depth: PABEE
    "stop": SUM | {"gradient_stop": 1.0},  # SWEET
    "partial": {"gradient_stop": 0.5},
    "alternate": SUM | {"alternate": True},  # BERxiT
    "frozen": SUM | {"train_encoder": False},  # of the standard model: DeeBERT
    "long": {},  # twice the epochs: about as long as all the models that it stands for
    "longer": {},  # twice that
    "every": {},  # as "long", with an exit after every layer
    "shallow": {},  # as "long", with the middle exits one layer lower
    "halved": {"gradient_stop": 0.5},  # as "long"
}
MORE_EPOCHS = {"long": 2, "longer": 4, "every": 2, "shallow": 2, "halved": 2}  # times all others'
OTHER_EXITS = {"every": tuple(range(1, 13)), "shallow": (1, 3, 5, 12)}  # of the 12-layer model
LINES = {
    "exits": ("early exit", "C0"),
    "long": ("early exit, twice the epochs", "C4"),
    "longer": ("early exit, four times the epochs", "C5"),
}
app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training: a recipe for exits, "standard", or "cut4" for four layers and one head."""

    data: str
    encoder: str
    kind: str
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.data}-{self.encoder}-{self.kind}-{self.seed}"

    @property
    def standard(self) -> str:
        return dataclasses.replace(self, kind="standard").name

    @property
    def layers(self) -> tuple[int, ...]:
        exits = EXITS[self.encoder]
        if self.kind in RECIPES:
            return OTHER_EXITS.get(self.kind, exits)
        return exits[-1:] if self.kind == "standard" else (int(self.kind.removeprefix("cut")),)

    def config(self, root: Path, twelve: str, workdir: Path) -> TrainConfig:
        model = "all-MiniLM-L6-v2" if self.encoder == "minilm" else twelve
        if self.kind == "frozen":
            model = str(workdir / self.standard / "bundle")
        config = TrainConfig(
            model=model,
            data=DataConfig(path=str(root / self.data), limit=ROWS, max_length=TOKENS),
            layers=self.layers,
            epochs=(2 if self.encoder == "minilm" else 1) * MORE_EPOCHS.get(self.kind, 1),
            batch_size=32,
            learning_rate=1.5e-4,
            train_embeddings=False,
            average_decay=0.99,
            max_drop=MAX_DROP,
            seed=self.seed,
        )
        return dataclasses.replace(config, **RECIPES.get(self.kind, {}))

    def model(self, root: Path, twelve: str, workdir: Path) -> str:
        """The encoder, as its result names it."""
        if self.kind == "frozen":
            return f"{self.standard}/bundle"
        return short_path(self.config(root, twelve, workdir).model)


def all_cells() -> list[Cell]:
    """In the order of what they teach."""

    def group(data: str, encoder: str, seed: int = 0) -> list[Cell]:
        cuts = [f"cut{layer}" for layer in EXITS[encoder][:-1]]
        return [Cell(data, encoder, kind, seed) for kind in ("exits", "standard", *cuts)]

    cells = [cell for data in DATA for cell in group(data, "minilm")]
    others = [kind for kind in RECIPES if kind not in ("exits", *MORE_EPOCHS)]
    cells += [Cell(data, "minilm", kind) for data in MORE_SEEDS for kind in others]
    cells += [Cell(data, "minilm", "long") for data in DATA]
    cells += [cell for data in DATA for cell in group(data, "twelve")]
    cells += [Cell(data, "twelve", "long") for data in DATA]
    cells += [
        cell for seed in (1, 2) for data in MORE_SEEDS for cell in group(data, "minilm", seed)
    ]
    cells += [Cell(data, "twelve", "longer") for data in ("sst2", "mnli")]
    cells += [Cell("sst2", "twelve", "halved")]
    cells += [Cell(data, "twelve", "every") for data in ("sst2", "mnli")]
    return [*cells, Cell("mnli", "twelve", "shallow")]


@app.command(epilog="Example: `python -m train.grid --data DATA --cells 'sst2-minilm-*'`")
def main(
    data: Annotated[Path, typer.Option(help="A folder with a folder per data set.")],
    twelve: Annotated[str, typer.Option(help="The 12-layer encoder.")] = "intfloat/e5-small",
    cells: Annotated[str, typer.Option(help="Names of cells, with wildcards.")] = "*",
    workdir: Annotated[Path, typer.Option(help="Trainings and bundles.")] = Path("runs/grid"),
    results: Annotated[Path, typer.Option(help="One JSON per cell.")] = Path(
        "configs/results/grid"
    ),
    show: Annotated[
        bool, typer.Option("--show", help="Only the table and picture so far.")
    ] = False,
) -> None:
    """Run the cells that have no result yet, then show the table and write its picture."""
    chosen = [cell for cell in all_cells() if fnmatch.fnmatch(cell.name, cells)]
    if not chosen:
        raise ValueError(f"--cells {cells!r} names no cell. They are {all_cells()[0].name}, ….")
    console = Console(stderr=True)
    todo: dict[str, tuple[Cell, Path, str]] = {}
    for cell in [] if show else chosen:
        if not (data / cell.data).is_dir():
            raise ValueError(f"--data {data} must hold a folder {cell.data}. There is none.")
        path = results / f"{cell.name}.json"
        model = cell.model(data, twelve, workdir)
        if not path.exists():
            base = Path(cell.config(data, twelve, workdir).model)
            if cell.kind == "frozen" and not base.exists() and cell.standard not in todo:
                raise ValueError(
                    f"{cell.name} starts from {base}, and there is none: run {cell.standard} "
                    f"first (with other --results, where its result is kept already)."
                )
            todo[cell.name] = cell, path, model
            continue
        done = json.loads(path.read_text())
        if (theirs := done["model"]) != model:
            raise ValueError(
                f"{path} is of the encoder {theirs}, and {model} was asked for: choose other "
                f"--results, or give that encoder by --twelve."
            )
        fields = settings(cell.config(data, twelve, workdir))
        known = done.get("config", {})
        changed = [name for name in known if known[name] != fields.get(name)]
        if changed:
            raise ValueError(
                f"{path} was trained with other {', '.join(changed)}: choose other --results, or "
                f"delete it to train it again."
            )
    for number, (cell, path, model) in enumerate(todo.values(), 1):
        config = cell.config(data, twelve, workdir)
        console.print(f"{cell.name}, {number} of {len(todo)}")
        jax.clear_caches()  # the programs of one cell after another would fill the address space
        folder = finetune(config, workdir / cell.name)
        start = time.time()
        found = measure(folder, data / cell.data)
        trained = json.loads((workdir / cell.name / "result.json").read_text(encoding="utf-8"))
        write_json(
            {
                "command": f"python -m train.grid --data DATA --cells {cell.name}"
                + (f" --twelve {model}" if cell.encoder == "twelve" else "")
            }
            | dataclasses.asdict(cell)
            | {"model": model, "rows_at_most": ROWS, "max_length": TOKENS}
            | {"config": settings(config)}
            | {"seconds": trained["seconds"] + time.time() - start}  # since that step
            | {"resumed_from_step": trained["resumed_from_step"]}
            | found
            | {"date": time.strftime("%Y-%m-%d"), **environment()},
            path,
        )
    known = load_results(results)
    if known:
        Console(width=190).print(summary(known))
        save_figure(
            lambda panels: draw(known, panels), results.with_suffix(".png"),
            size=(4 * len({r["data"] for r in known}), 3.6 * len({r["encoder"] for r in known})),
            panels=(len({r["encoder"] for r in known}), len({r["data"] for r in known})),
        )  # fmt: skip


def settings(config: TrainConfig) -> dict[str, Any]:
    """What tells trainings of one cell apart, ready for JSON: all but where things lie."""
    fields: dict[str, Any] = json.loads(json.dumps(to_json(config)))
    del fields["model"], fields["data"]["path"]
    return fields


def load_results(folder: Path) -> list[dict[str, Any]]:
    paths = [folder / f"{cell.name}.json" for cell in all_cells()]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def measure(folder: Path, data: Path) -> dict[str, Any]:
    """What a cell's bundle is worth on test.

    Temperatures are of dev-A, thresholds of dev-B, figures of test.
    """
    bundle = load_bundle(folder)
    clf = EarlyExitClassifier.from_pretrained(folder)
    test = encode(labelled_rows(bundle, str(data), limit=ROWS), bundle.encode)
    rows = bundle.provenance["rows"]
    seen = trained_on(bundle).union(rows["dev_a"], rows["dev_b"])
    test = test.take(test.without(seen, f"every test row of {data} is in train or dev."))
    logits = clf.exit_logits(test.encoded)
    exits = [
        {"layer": layer, "temperature": t, **quality["after"]}
        | metrics.ece_bounds(one, test.labels, t)
        for layer, quality, one, t in zip(
            bundle.exits.layers, metrics.report(logits, test.labels, bundle.temperatures),
            logits, bundle.temperatures, strict=True,
        )
    ]  # fmt: skip
    found: dict[str, Any] = {
        "layers": list(bundle.exits.layers),
        "rows": len(test.labels),
        "exits": exits,
    }
    if len(exits) == 1:
        return found
    dev = rows_for_thresholds(bundle, labelled_rows(bundle, str(data), "dev", limit=ROWS))
    dev_logits = clf.exit_logits(dev.encoded)

    def tables(temperatures: Any) -> tuple[Table, Table]:
        layers = bundle.exits.layers
        return (
            make_table(dev_logits, dev.labels, temperatures, layers, dev.encoded.lengths),
            make_table(logits, test.labels, temperatures, layers, test.encoded.lengths),
        )

    fit, report = tables(bundle.temperatures)
    thresholds = drop_thresholds(fit, MAX_DROP)["threshold"]
    at_budget = {}
    for layer in bundle.exits.layers[:-1]:
        share = layer / bundle.exits.num_layers
        at_budget[layer] = operating_point(report, budget_thresholds(fit, share)["threshold"])
    calibration = {}
    for name, temperatures in (("temperatures", bundle.temperatures), ("none", None)):
        a, b = tables(temperatures or np.ones(len(exits)))
        for family in FAMILIES:
            chosen = drop_thresholds(a, MAX_DROP, family=family)["threshold"]
            calibration[f"{name}, {family}"] = operating_point(b, chosen)
    policies = [thresholds, *(p["threshold"] for p in at_budget.values())]
    times, *others = speed(clf, policies, test, logits)
    for point, measured in zip(at_budget.values(), others, strict=True):
        point |= {"speed": measured}
    taken = report.leave(thresholds)
    shares = np.bincount(taken, minlength=len(exits)) / taken.size
    return found | {
        "chosen": operating_point(report, thresholds),
        "random": float(shares @ report.correct.mean(axis=1)),
        "oracle": describe(report, oracle(report)),
        "at_budget": at_budget,
        "calibration": calibration,
        "curve": [operating_point(report, t) for t in curve_of(fit)],
        "speed": times,
    }


def curve_of(fit: Table) -> list[Sequence[float]]:
    """Thresholds of even budgets, chosen on these rows."""
    least = float(fit.layers[0] / fit.layers[-1])
    return [budget_thresholds(fit, b)["threshold"] for b in np.linspace(least, 1, 15)]


def speed(
    clf: EarlyExitClassifier, policies: Sequence[Sequence[float]], test: Task, logits: np.ndarray
) -> list[dict[str, Any]]:
    """Each policy measured against the straight scan, in turns, on rows spread over the test rows.

    They come all at once; the first policy, which is the one chosen, also one text alone.
    """
    first, *others = map(tuple, policies)
    bundle = dataclasses.replace(clf.bundle, thresholds=first)
    timed = EarlyExitClassifier(bundle, shapes=clf.shapes, devices=clf.devices[:1])
    total = len(test.labels)
    chosen = spread(total, int(total * TIMED_TOKENS / test.encoded.lengths.sum()))
    rows = test.take(chosen)
    offline = evaluate(
        timed, rows.encoded, rows.labels, [None, *others],
        repeats=REPEATS, exit_logits=logits[:, chosen],
    )  # fmt: skip
    alone = [rows.encoded.subset(np.array([row])) for row in spread(chosen.size, SINGLES)]
    runs: dict[str, Callable[[Encoded], Any]] = {
        "single_full_ms": timed.full_logits,
        "single_ms": timed.decide_encoded,
    }
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(REPEATS + 1):  # the first compiles
        for name, run_one in runs.items():
            start = time.perf_counter()
            for row in alone:
                run_one(row)
            if repeat:
                taken[name].append(1000 * (time.perf_counter() - start) / len(alone))
    kept = ("speedup", "ideal_speedup", "mean_depth", "drop", "texts_per_second")
    found = [{name: point[name] for name in kept} for point in offline["thresholds"]]
    found[0] |= {name: statistics.median(values) for name, values in taken.items()}
    found[0] |= {"full_texts_per_second": offline["full"]["texts_per_second"], "rows": chosen.size}
    return found


def summary(known: list[dict[str, Any]]) -> Shown:
    """A row per data set, encoder, recipe and seed: exits at equal depth beside the cut models.

    Where there are several seeds, one more row: mean and standard deviation.
    """
    by_name = {(r["data"], r["encoder"], r["kind"], r["seed"]): r for r in known}
    made = Shown(title=f"test accuracy, {ROWS:,} training rows; exits / cut model at equal depth")
    digits = {
        "standard": 4, "exits, full": 4, "at layer 1": 4, "at layer 2 or 4": 4,
        "at layer 4 or 6": 4, f"{MAX_DROP:g} point lost on dev-B": 4, "drop": 2, "depth": 2,
        "at random": 4, "oracle": 4, "speed-up": 2, "alone": 2,
    }  # fmt: skip
    for heading in ("data", "encoder", "recipe", "seed", *digits):
        made.add_column(heading, justify="right")
    groups: dict[tuple[str, str, str], dict[str, list[tuple[float | None, ...]]]] = {}
    for (data, encoder, kind, seed), r in by_name.items():
        if kind not in RECIPES:
            continue

        def single_head(
            kind: str, key: tuple[str, str, int] = (data, encoder, seed)
        ) -> float | None:
            other = by_name.get((key[0], key[1], kind, key[2]))
            return other["exits"][-1]["accuracy"] if other else None

        budgets = r["at_budget"]
        beside = [
            (budgets[layer]["accuracy"], single_head(f"cut{layer}"))
            for layer in map(str, EXITS[encoder])
            if layer in budgets
        ]
        chosen, times = r["chosen"], r["speed"]
        groups.setdefault((data, encoder, kind), {})[str(seed)] = [
            (single_head("standard"),),
            (r["exits"][-1]["accuracy"],),
            *(*beside, (None,), (None,))[:3],  # fewer exits, fewer columns
            (chosen["accuracy"],),
            (chosen["drop"],),
            (chosen["mean_depth"],),
            (r["random"],),
            (r["oracle"]["accuracy"],),
            (times["speedup"],),
            (times["single_full_ms"] / times["single_ms"],),
        ]

    def shown(values: Sequence[float | None], digits: int) -> str:
        found = [x for x in values if x is not None]
        if len(found) < len(values):
            return "–"
        spread = f" ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else ""
        return f"{statistics.mean(found):.{digits}f}{spread}"

    for key, seeds in groups.items():
        rows = {seed: [found] for seed, found in seeds.items()}
        if len(seeds) > 1:
            rows["mean"] = list(seeds.values())
        for seed, members in rows.items():
            made.add_row(
                *key, seed,
                *(
                    " / ".join(shown(values, places) for values in zip(*cells, strict=True))
                    for *cells, places in zip(*members, digits.values(), strict=True)
                ),
            )  # fmt: skip
    return made


def draw(known: list[dict[str, Any]], panels: Sequence[Any]) -> None:
    """A panel per encoder and data set, seed 0: accuracy against the share of full depth."""
    encoders = [name for name in EXITS if any(r["encoder"] == name for r in known)]
    names = [name for name in DATA if any(r["data"] == name for r in known)]
    for number, axes in enumerate(panels):
        encoder, data = encoders[number // len(names)], names[number % len(names)]
        cuts = []
        for r in known:
            if (r["data"], r["encoder"], r["seed"]) != (data, encoder, 0):
                continue
            if r["kind"] in LINES:
                x, y = zip(*((p["cost"], 100 * p["accuracy"]) for p in r["curve"]), strict=True)
                name, colour = LINES[r["kind"]]
                axes.plot(x, y, ".-", color=colour, label=name)
            if r["kind"] == "exits":
                oracle_ = r["oracle"]
                axes.plot([oracle_["cost"]], [100 * oracle_["accuracy"]], "*", label="oracle")
                share = np.dot(r["chosen"]["exit_share"], r["layers"]) / r["layers"][-1]
                axes.plot([share], [100 * r["random"]], "x", label="random exit")
            elif r["kind"] not in RECIPES:
                share = r["layers"][-1] / EXITS[encoder][-1]
                cuts.append((share, 100 * r["exits"][-1]["accuracy"]))
        if cuts:
            axes.plot(
                *zip(*sorted(cuts), strict=True), "s--", color="C3", label="standard and cut models"
            )
        axes.set_title(f"{data}, {encoder}", fontsize=10)
        axes.set(xlabel="share of full depth", ylabel="accuracy, %")
        axes.set_visible(bool(axes.lines))  # a data set may have nothing but other recipes yet
        if axes.lines:
            axes.legend(fontsize=7)


if __name__ == "__main__":
    sys.exit(run(app, "train.grid", sys.argv[1:]))
