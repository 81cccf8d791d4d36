"""python -m train --config configs/NAME.py --workdir DIR [--smoke] [field=value …]"""

import os
import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ejax.cli.options import Overrides
from ejax.cli.run import keep_programs, run
from ejax.cli.train import train_and_show
from ejax.config import TrainConfig, override, smoke
from ejax.errors import UserError
from ejax.storage import path_of
from ejax.training import processes

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(
    epilog="Example: `python -m train --config configs/sst2_minilm.py --workdir runs/sst2 epochs=3`"
)
def main(
    config: Annotated[
        Path,
        typer.Option(help="A Python file with `config = TrainConfig(…)`; of FILE.py:mnli `mnli`."),
    ],
    workdir: Annotated[
        Path,
        typer.Option(help="Checkpoints, logs, result and bundle; gs:// too.", parser=path_of),
    ],
    small: Annotated[bool, typer.Option("--smoke", help="A few steps: only whether it runs.")] = (
        False
    ),
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed",
            envvar="EJAX_DISTRIBUTED",
            help="One of several processes, each started with the same command: found on TPU "
            "pods, Slurm and Kubernetes, or told by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES "
            "and JAX_PROCESS_ID. All share the workdir.",
        ),
    ] = False,
    fields: Overrides = None,
) -> None:
    """Run one experiment; the same command again resumes where it was stopped."""
    chosen = load_config(config)
    chosen = override(smoke(chosen) if small else chosen, fields or ())
    if not distributed:
        train_and_show(chosen, workdir)
    elif processes.CHILD not in os.environ:
        raise typer.Exit(processes.supervise([sys.executable, "-m", "train", *sys.argv[1:]]))
    else:
        processes.join(partial(train_and_show, chosen, workdir))


def load_config(path: Path) -> TrainConfig:
    """The `config` that a Python file defines; of NAME.py:mnli its `mnli`.

    Raises:
      ValueError: for a missing file, an exception inside it, or no such config.
    """
    whole, colon, name = str(path).rpartition(".py:")
    path, name = (Path(f"{whole}.py"), name) if colon else (path, "config")
    if not path.is_file():
        raise UserError(f"No such file: {path} (--config).")
    try:
        found = runpy.run_path(str(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:
        raise UserError(f"{path} cannot be run: {type(error).__name__}: {error}.") from error
    config = found.get(name)
    if not isinstance(config, TrainConfig):
        has = ", ".join(name for name, value in found.items() if isinstance(value, TrainConfig))
        raise UserError(
            f"{path} must define `{name} = TrainConfig(…)`. Got {type(config).__name__}."
            + (f" As {path}:NAME it has {has}." if has else "")
        )
    return config


if __name__ == "__main__":
    keep_programs()
    processes.leave(run(app, "train", sys.argv[1:]))
