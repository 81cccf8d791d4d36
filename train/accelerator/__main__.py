"""python -m train.accelerator [--small] [--parts parity,loops] [--output FILE]

What has to be known on a new kind of accelerator, in at most six minutes and without a network:
whether it computes what the CPU computes, how much of its speed the engine reaches, and what
early exit gains there over full depth, PyTorch's too.

Every part runs in a process of its own, with a time limit: what fails or takes too long is noted,
and the rest goes on. What a part had found until then is kept.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ejax.cli.options import check_json
from ejax.cli.run import run
from ejax.errors import UserError
from ejax.evaluation.evaluate import write_json
from ejax.training.outcome import short_path
from train.accelerator.parts import MACHINE, PARTS, Part, told, work

SECONDS = 350.0  # for all parts
RESULTS = Path("configs/results")
app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(epilog="Example: `python -m train.accelerator`")
def main(
    small: Annotated[
        bool, typer.Option("--small", help="Tiny shapes: only whether every part runs.")
    ] = False,
    parts: Annotated[str, typer.Option(help=f"Of {', '.join(PARTS)}; all unless given.")] = "",
    output: Annotated[
        Path | None,
        typer.Option(help="JSON; else configs/results/accelerator.json, or accelerator_small."),
    ] = None,
) -> None:
    """Check an accelerator: parity, speed, early exit compared with full depth and PyTorch."""
    output = output or RESULTS / f"accelerator{'_small' if small else ''}.json"
    check_json(output)
    names = parts.split(",") if parts else list(PARTS)
    for name in names:
        if name not in PARTS:
            raise UserError(f"--parts must be among {', '.join(PARTS)}. Got {name!r}.")
    # Parts are apart from each other in memory too; none may take all of it from the start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    console = Console(stderr=True)
    found: dict[str, Any] = {
        "command": " ".join(["python -m train.accelerator", *map(short_path, sys.argv[1:])]),
        "date": time.strftime("%Y-%m-%d"),
        "small": small,
    }
    start = time.monotonic()
    with console.status("the machine") as status:
        found |= run_part(MACHINE, MACHINE.limit, small, lambda _: None)
        found["parts"] = {}
        for name in names:
            left = SECONDS - (time.monotonic() - start)
            status.update(name)
            found["parts"][name] = run_part(
                PARTS[name], min(PARTS[name].limit, left), small, partial(said, status, name)
            )
            found["seconds"] = time.monotonic() - start
            write_json(found, output)
            console.print(f"{name}: {told(found['parts'][name])}", highlight=False, markup=False)
    console.print(table(found["parts"]))
    console.print(f"written: {output}", highlight=False, markup=False)
    if any("error" in part for part in (found, *found["parts"].values())):
        raise typer.Exit(1)


def said(status: Any, name: str, keys: str) -> None:
    status.update(f"{name}: {keys}")


def run_part(part: Part, limit: float, small: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """What it found, its `process_seconds`, and `error` where it failed or was stopped."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train.accelerator.parts"])  # imported once
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(there, part, small))
    start = time.monotonic()
    process.start()
    there.close()
    found: dict[str, Any] = {}
    try:
        while here.poll(max(0.0, start + limit - time.monotonic())):
            if (more := here.recv()) is None:
                break
            found |= more
            say(", ".join(more))
        else:
            found["error"] = f"stopped after {limit:.0f} s"
    except EOFError:
        process.join()
        found["error"] = f"its process ended with exit code {process.exitcode}"
    finally:
        if "error" in found:
            process.kill()
        process.join()
    return found | {"process_seconds": time.monotonic() - start}


def table(parts: dict[str, Any]) -> Table:
    made = Table("part", "s", "found")
    for name, part in parts.items():
        made.add_row(name, f"{part['process_seconds']:.0f}", told(part))
    return made


if __name__ == "__main__":
    sys.exit(run(app, "train.accelerator", sys.argv[1:]))
