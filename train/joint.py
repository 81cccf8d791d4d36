"""python -m train.joint --config configs/NAME.py [field=value …]

What it costs to train all exits together: the step of a config and the step of the same model
with its last exit alone, in turns on the same real batches, dropout and optimizer included.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from rich.console import Console

from ejax.cli.options import Overrides, check_json
from ejax.cli.run import run
from ejax.config import ExitConfig, TrainConfig, override, to_json
from ejax.data import sources
from ejax.data.batches import take, train_plan
from ejax.data.rows import encode
from ejax.errors import UserError
from ejax.evaluation.describe import numbers
from ejax.evaluation.evaluate import write_json
from ejax.evaluation.scenarios import spread
from ejax.hardware import environment
from ejax.training.loop import progress_bar
from ejax.training.optim import make_optimizer
from ejax.training.outcome import public
from ejax.training.parallel import parallel_step, place
from ejax.training.setup import (
    build,
    exits_of,
    initial_params,
    load_encoder,
    with_pooling,
    with_weights,
)  # fmt: skip
from ejax.training.step import Rows, first_state, make_train_step
from train.__main__ import load_config

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(epilog="Example: `python -m train.joint --config configs/sst2_minilm.py`")
def main(
    config: Annotated[Path, typer.Option(help="As of python -m train.")],
    steps: Annotated[int, typer.Option(min=1, help="Batches, spread over an epoch.")] = 20,
    repeats: Annotated[int, typer.Option(min=1, help="Timed passes over them.")] = 5,
    output: Annotated[Path, typer.Option(help="JSON.")] = Path("joint.json"),
    fields: Overrides = None,
) -> None:
    """Measure the training step with all exits, and the one with the last exit alone."""
    check_json(output)
    chosen = override(load_config(config), fields or ())
    found = measure(chosen, steps, repeats, Console(stderr=True))
    command = " ".join(["python -m train.joint", *sys.argv[1:]])
    write_json(found | {"command": command, "date": time.strftime("%Y-%m-%d")}, output)
    table = numbers(f"training step, {found['hardware']}", "exits", "ms (spread)")
    for name in ("joint", "last"):
        times = found[name]["milliseconds"]
        spread = f"{np.median(times):.1f} ({min(times):.1f} to {max(times):.1f})"
        table.add_row(", ".join(map(str, found[name]["layers"])), spread)
    Console().print(table)
    low, high = min(found["ratios"]), max(found["ratios"])
    print(f"joint over last alone: {found['ratio']:.3f} ({low:.3f} to {high:.3f})")


def measure(config: TrainConfig, steps: int, repeats: int, console: Console) -> dict[str, Any]:
    """Mean milliseconds per step of each pass, compilation apart, and their ratios.

    Raises:
      ValueError: as `finetune`, and for a config with one exit.
    """
    split = sources.load(config.data, seed=config.seed)["train"]
    cfg, bert, tokenizer = load_encoder(config)
    config = with_pooling(config, pairs=len(split.text_columns) == 2)
    exits = exits_of(config, cfg, len(split.labels), separator=tokenizer.separator).encoder
    layers = exits.layers
    if len(layers) < 2:
        raise UserError(f"{config.model}: layers must name two exits or more. Got {layers}.")
    max_length = min(config.data.max_length, cfg.max_position_embeddings)
    with console.status("tokenising"):
        rows = encode(split, lambda texts: tokenizer.encode(texts, max_length))
    config = with_weights(config, rows.labels, len(split.labels))
    plan = train_plan(
        rows.encoded.lengths,
        buckets=config.data.buckets,
        max_length=max_length,
        batch_size=config.batch_size,
        seed=config.seed,
        epoch=0,
    )
    plan = [plan[i] for i in spread(len(plan), steps)]
    batches = [
        Rows(*take(rows.encoded, rows.labels, step), np.maximum(step.rows, 0).astype(np.int32))
        for step in plan
    ]

    def start(exits: ExitConfig, config: TrainConfig) -> list[Any]:
        """[step function, state]; the state moves on with every step."""
        model = build(config, cfg, exits)
        optimizer = make_optimizer(config, len(plan) * (repeats + 1))
        state = first_state(initial_params(model, bert, config), optimizer, config)
        step = make_train_step(model, optimizer, config)
        mapped = parallel_step(step, parallel=config.parallel, accumulate=config.accumulate)
        return [mapped, place(state, config.parallel)]

    last = dataclasses.replace(config, exit_weights=config.exit_weights[-1:])
    runs = {
        "joint": start(exits, config),
        "last": start(dataclasses.replace(exits, layers=layers[-1:]), last),
    }

    def once() -> dict[str, float]:
        """Mean milliseconds per step, the two in turns."""
        taken = dict.fromkeys(runs, 0.0)
        for batch in batches:
            for name, pair in runs.items():
                began = time.perf_counter()
                pair[1], _ = jax.block_until_ready(pair[0](pair[1], batch))
                taken[name] += time.perf_counter() - began
        return {name: 1000 * seconds / len(batches) for name, seconds in taken.items()}

    with console.status("compiling"):
        once()
    with progress_bar(console) as bar:
        passes = [once() for _ in bar.track(range(repeats), description="timing")]
    ratios = [taken["joint"] / taken["last"] for taken in passes]
    return {
        "joint": {"layers": layers, "milliseconds": [taken["joint"] for taken in passes]},
        "last": {"layers": layers[-1:], "milliseconds": [taken["last"] for taken in passes]},
        "ratio": float(np.median(ratios)),
        "ratios": ratios,
        "batches": [list(batch.batch.ids.shape) for batch in batches],
        "config": to_json(public(config)),
        **environment(),
    }


if __name__ == "__main__":
    sys.exit(run(app, "train.joint", sys.argv[1:]))
