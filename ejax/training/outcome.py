"""What a training leaves: calibrated exits, the bundle, result.json, and doubts about them.

Axes: E exits, N rows, C classes.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ejax import storage
from ejax.bundle import Bundle
from ejax.calibration.calibrate import Answers, calibrate
from ejax.calibration.drift import depth_of
from ejax.calibration.evidence import fit_evidence, with_evidence
from ejax.config import ExitConfig, TrainConfig, to_json
from ejax.data.rows import TokenizedSplit
from ejax.hardware import environment
from ejax.models.ngrams import ragged_logits
from ejax.rivals import below_rival
from ejax.tasks import task_of
from ejax.training.checkpoint import METRIC
from ejax.training.checks import no_better_than_chance, still_rising, warn
from ejax.training.loop import Trained
from ejax.training.setup import Setup

ZERO_SAVES = 0.02  # of the layers run on dev-A, for exit 0 to be kept


def answers(split: TokenizedSplit, zero: dict[str, np.ndarray], logits: np.ndarray) -> Answers:
    """Every exit's answers.

    Args:
      zero: the parameters of exit 0, {} where there is none.
      logits: float32 [E, N, C], of the exits after layers.
    """
    if zero:
        whole = split.encoded.whole
        assert whole is not None
        logits_of_zero = ragged_logits(zero, whole.ids, whole.types, whole.offsets)
        logits = np.concatenate([logits_of_zero[None], logits])
    return Answers(logits, split.labels, split.encoded.lengths)


def calibrated(
    exits: ExitConfig,
    parts: dict[str, Answers],
    config: TrainConfig,
    *,
    exit0_cost: float,
    console: Console,
) -> tuple[ExitConfig, np.ndarray, dict[str, Answers], dict[str, Any]]:
    """Temperatures and thresholds, and the exits: without exit 0 where it saves next to nothing.

    That is decided on dev-A, and only where no exits were asked for.

    Returns:
      The exits kept; exit 0's weights in the later ones, [E - 1]; the answers of the exits kept,
      with what exit 0 adds to them; what `calibrate` chose.
    """
    evidence = np.zeros(len(exits.encoder.layers), np.float32)

    task = task_of(exits)

    def choose(exits: ExitConfig, parts: dict[str, Answers], exit0_cost: float) -> dict[str, Any]:
        return calibrate(
            parts, "dev_a", exits.layers, max_drop=config.max_drop,
            where="dev-A, half of dev", task=task, exit0_cost=exit0_cost,
        )  # fmt: skip

    if not exits.has_zero:
        return exits, evidence, parts, choose(exits, parts, 0.0)
    evidence = fit_evidence(parts["dev_a"].logits, parts["dev_a"].labels, task)
    parts_with = {
        name: part._replace(logits=with_evidence(part.logits, evidence))
        for name, part in parts.items()
    }
    with_zero = choose(exits, parts_with, exit0_cost)
    if config.layers:
        return exits, evidence, parts_with, with_zero
    parts_without = {name: part._replace(logits=part.logits[1:]) for name, part in parts.items()}
    without_zero = choose(exits.encoder, parts_without, 0.0)
    depth_with, depth_without = (
        chosen["operating_points"]["dev_a"]["mean_depth"] for chosen in (with_zero, without_zero)
    )
    helps = depth_with <= (1 - ZERO_SAVES) * depth_without
    console.print(
        f"exit 0, on n-grams, is {'kept' if helps else 'left out'}: with it the default thresholds "
        f"run {depth_with:.2f} layers on dev-A, without it {depth_without:.2f}"
    )
    if helps:
        return exits, evidence, parts_with, with_zero
    return exits.encoder, evidence, parts_without, without_zero


def bundle_of(
    setup: Setup,
    exits: ExitConfig,
    zero: dict[str, np.ndarray],
    trained: Trained,
    chosen: dict[str, Any],
) -> Bundle:
    """The bundle, and in it where everything comes from.

    Args:
      exits: those that `calibrated` kept.
      zero: the parameters of exit 0; read only where `exits` has one.
      chosen: what `calibrate` chose for `exits`.
    """
    config, splits = setup.config, setup.splits
    origins = {name: split.origin for name, split in splits.items()}
    if config.data.unlabelled:
        origins["unlabelled"] = short_path(config.data.unlabelled)
    rows = {name: split.hashes for name, split in setup.held_out.items()}
    return Bundle(
        setup.cfg,
        exits,
        {"params": trained.params | ({"ngrams": zero} if exits.has_zero else {})},
        setup.tokenizer,
        setup.labels,
        tuple(tuple(t) if isinstance(t, list) else t for t in chosen["temperatures"]),
        tuple(chosen["thresholds"]),
        setup.max_length,
        config.data.buckets,
        {name: chosen[name] for name in ("thresholds_from", "operating_points", "metrics")}
        | {
            "model": short_path(config.model),
            "teacher": short_path(config.teacher),
            "data": "; ".join(f"{name}: {origin}" for name, origin in origins.items()),
            "best_step": trained.best_step,
            "depth": depth_of(chosen["operating_points"]["dev_b"]),  # dev-B chose nothing
            "text_columns": list(splits["train"].text_columns),
            "label_column": splits["train"].label_column,
            "config": to_json(public(setup.given)),
            "versions": environment()["versions"],
        },
        setup.behind.with_training(rows | {"train": setup.train.hashes}),
    )


def write_result(
    setup: Setup, trained: Trained, chosen: dict[str, Any], workdir: Any, started: float
) -> None:
    """result.json; where nothing was trained since the last one, that of the training stays.

    Args:
      started: seconds since the epoch.
    """
    path = workdir / "result.json"
    if trained.first_step == trained.last_step and path.exists():
        return
    names = ("temperatures", "thresholds", "metrics", "operating_points")
    result = {
        "config": to_json(public(setup.given)),
        "command": command(),
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.time() - started, 1),  # since `resumed_from_step`
        "resumed_from_step": trained.first_step,
        "best_step": trained.best_step,
        **{name: chosen[name] for name in names},
        **environment(),
    }
    storage.write_text(path, json.dumps(result, indent=2) + "\n")


def warn_of_doubts(
    setup: Setup, dev_a: Answers, exits: ExitConfig, chosen: dict[str, Any], workdir: Any
) -> None:
    """Says what a result may be worth less for, one sentence each."""
    task = task_of(exits)
    answers = [
        task.answers(logits, np.array(calibration, np.float32))
        for logits, calibration in zip(dev_a.logits, chosen["temperatures"], strict=True)
    ]
    reached = [task.measure(of_exit, dev_a.labels) for of_exit in answers]
    path = workdir / "metrics.jsonl"
    with storage.reaching(path):
        lines = path.read_text().splitlines() if path.exists() else []
    evaluated = [line for line in map(json.loads, lines) if line["kind"] == "dev_a"]
    labelled = setup.train.take(setup.train.labelled)
    for sentence in (
        still_rising([line[METRIC] for line in evaluated], len(dev_a.labels), task),
        no_better_than_chance(exits.layers, reached, dev_a.labels, task),
        below_rival(
            labelled.encoded, labelled.labels,
            setup.held_out["dev_a"].encoded, dev_a.labels, answers[-1], task,
            cfg=setup.whole_cfg, bert=setup.bert, tokenizer=setup.tokenizer,
            pairs=len(setup.splits["train"].text_columns) == 2, max_length=setup.max_length,
        ),
    ):  # fmt: skip
        warn(sentence)


def short_path(path: str) -> str:
    """A path without the folders above, which are nobody else's business."""
    known = path and (storage.is_remote(path) or Path(path).exists())
    return "/".join(Path(path).parts[-2:]) if known else path


def public(config: TrainConfig) -> TrainConfig:
    """The config as it travels in a bundle."""
    names = ("path", "train", "dev", "test", "unlabelled")
    paths: dict[str, Any] = {name: short_path(getattr(config.data, name)) for name in names}
    data = dataclasses.replace(config.data, cache_dir="", **paths)
    models: dict[str, Any] = {
        name: short_path(getattr(config, name)) for name in ("model", "teacher")
    }
    return dataclasses.replace(config, data=data, **models)


def command() -> str:
    """The command that started this process."""
    program = Path(sys.argv[0])
    module = program.name == "__main__.py"
    name = f"python -m {program.parent.name}" if module else program.name
    return " ".join([name, *sys.argv[1:]])
