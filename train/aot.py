"""python -m train.aot --config configs/NAME.py --topology v5e:4x8[,v5p:2x2x2 …] [field=value …]

Compiles the training step and the early-exit program for a slice of TPU chips with the TPU's own
compiler, on a machine that has none (`pip install '.[tpu]'`), and says what each chip would hold
and do. Nothing runs: a time here is a bound, not a measurement.
"""

import json
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Annotated, Any

# A chip is described, not looked for.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is held: several may compile at once
}

import jax
import numpy as np
import typer
from jax.experimental import topologies
from rich.console import Console

from ejax.cli.options import Overrides, check_json
from ejax.cli.run import run
from ejax.config import TrainConfig, override, to_json
from ejax.data.tokenizer import bucket_of
from ejax.errors import UserError
from ejax.evaluation.evaluate import write_json
from ejax.hardware import compiling_for, environment
from ejax.training.setup import with_weights
from train.__main__ import load_config
from train.aot_programs import inference, largest_rows, models_of, once, training
from train.aot_tables import overview, table
from train.roofline import CHIPS

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(
    epilog="Example: `python -m train.aot --config configs/bert_large.py:mnli --topology v5e:4x8`"
)
def main(
    config: Annotated[Path, typer.Option(help="As of python -m train.")],
    topology: Annotated[
        str,
        typer.Option(help="Generation and chips, such as v5e:4x8 or v4:2x2x2; several by commas."),
    ],
    per_chip: Annotated[
        int, typer.Option(min=0, help="Rows of a chip's step; 0: batch_size over the chips.")
    ] = 0,
    rows: Annotated[int, typer.Option(min=1, help="Of one chip's pool, for early exit.")] = 2048,
    tile: Annotated[int, typer.Option(min=1, help="Rows per tile, for early exit.")] = 32,
    labels: Annotated[int, typer.Option(min=0, help="Classes; 0: those of the TFDS set.")] = 0,
    largest_batch: Annotated[
        bool, typer.Option("--largest-batch", help="Also the largest that fits, in powers of two.")
    ] = False,
    output: Annotated[
        Path, typer.Option(help="JSON; slices that it holds already are not compiled again.")
    ] = Path("aot.json"),
    fields: Overrides = None,
) -> None:
    """Compile a config for TPU chips that are not there; memory, roofline, collectives."""
    check_json(output)
    chosen = override(load_config(config), fields or ())
    slices = {name: slice_of(name) for name in topology.split(",")}
    console = Console(stderr=True)
    compiler = next(iter(slices.values()))[0].client.platform_version.rpartition("\n")[2]
    versions = environment()["versions"] | {"tpu_compiler": compiler}
    asked = {
        "config": to_json(chosen), "rows": [per_chip, rows, tile], "labels": labels,
        "versions": versions,
    }  # fmt: skip
    done = known_slices(output, json.loads(json.dumps(asked)))
    kept: dict[Any, Any] = {}
    for number, (name, devices) in enumerate(slices.items(), 1):
        if name in done and not (largest_batch and "largest_rows" not in done[name]["training"]):
            continue
        with (
            console.status(f"compiling for {name}, {number} of {len(slices)}"),
            compiling_for("tpu"),
        ):
            done[name] = report(
                chosen, name, devices, labels, rows, tile, largest_batch, per_chip, kept
            )
        done[name] |= {
            "command": " ".join(["python -m train.aot", *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%d"),
        }
        write_json({"asked": asked, "slices": list(done.values())}, output)
    for name in slices:
        Console().print(table(chosen.model, done[name]))
    if len(slices) > 1:
        Console(width=140).print(overview(chosen.model, [done[name] for name in slices]))


def known_slices(output: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """By name, what an earlier command for the same found.

    Raises:
      ValueError: where the file is of something else.
    """
    if not output.exists():
        return {}
    try:
        known = json.loads(output.read_text())
        found = {part["topology"]: part for part in known["slices"]}
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{output} is no file of train.aot: choose another --output.") from None
    if known.get("asked") != asked:
        raise UserError(f"{output} is of another config or version: choose another --output.")
    return found


def slice_of(topology: str) -> list[jax.Device]:
    """The chips of a slice.

    Raises:
      ValueError: for an unknown generation or shape, or where libtpu is not installed.
    """
    generation, _, shape = topology.partition(":")
    if generation not in CHIPS or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise UserError(
            f"--topology must be one of {', '.join(CHIPS)} and its chips, such as v5e:4x8. "
            f"Got {topology!r}."
        )
    sides = [int(side) for side in shape.split("x")]
    count = math.prod(sides)
    # A slice smaller than a host is described by what its host then holds.
    given: dict[str, Any] = {}
    if count == 1:
        given["chips_per_host_bounds"] = (*sides, *[1] * (3 - len(sides)))
    if generation == "v4":  # a device is a chip, its two cores as one, as jax has it on a v4
        given["chip_config_name"] = "megacore"
    try:
        made = topologies.get_topology_desc(topology, "tpu", **given)
    except Exception as error:
        raise UserError(
            f"the TPU compiler does not know {topology} ({' '.join(str(error).split())[:160]}): "
            f"choose chips that exist, and pip install '.[tpu]' for the compiler itself."
        ) from None
    return list(made.devices)


def report(
    config: TrainConfig,
    topology: str,
    devices: list[jax.Device],
    labels: int,
    pool_rows: int,
    tile: int,
    largest: bool,
    given_rows: int,
    kept: dict[Any, Any],
) -> dict[str, Any]:
    """Everything that the command prints, ready for JSON; all of it per chip.

    `kept` holds what does not depend on the number of chips, from one slice to the next.
    """
    chip = CHIPS[topology.partition(":")[0]]
    model, served = models_of(config, labels)
    classes = model.exits.num_labels
    config = with_weights(config, np.arange(classes), classes)
    longest = np.array([config.data.max_length])
    length = int(bucket_of(longest, config.data.buckets, config.data.max_length)[0])
    per_chip = given_rows or -(-config.batch_size // len(devices))
    per_chip += -per_chip % config.accumulate
    found: dict[str, Any] = {
        "topology": topology,
        "chips": len(devices),
        "chip": chip._asdict(),
        "tokens_per_row": length,
        "training": {"rows": per_chip}
        | training(config, model, chip, devices, per_chip, length, kept),
        "early_exit": {"rows": pool_rows, "tile": tile}
        | once(kept, chip, lambda: inference(served, chip, devices[0], pool_rows, length, tile)),
    }
    if largest:
        found["training"]["largest_rows"] = largest_rows(
            config, model, chip, devices, per_chip, length
        )
    return found


if __name__ == "__main__":
    sys.exit(run(app, "train.aot", sys.argv[1:]))
