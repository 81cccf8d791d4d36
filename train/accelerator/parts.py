"""The parts of the check by name, and the process that runs one of them."""

import traceback
from collections.abc import Callable
from importlib import metadata
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import jax

from ejax.hardware import environment
from train.accelerator.attention import attention
from train.accelerator.common import Found, Sizes, sizes
from train.accelerator.parity import parity
from train.accelerator.speed import engine_base, engine_large, loops, rivals, training


class Part(NamedTuple):
    run: Callable[[Sizes], Found]
    limit: float  # seconds, its start and all compiling included


def machine(given: Sizes) -> Found:
    """What it all runs on."""
    found = environment()
    for name in ("jaxlib", "torch", "transformers"):
        try:
            found["versions"][name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found["versions"][name] = "not installed"
    device = jax.devices()[0]
    yield found | {"platform": device.platform, "runtime": device.client.platform_version}


MACHINE = Part(machine, 30)
PARTS = {
    "parity": Part(parity, 60),
    "loops": Part(loops, 30),
    "engine_base": Part(engine_base, 75),
    "attention": Part(attention, 60),
    "rivals": Part(rivals, 110),
    "training": Part(training, 75),
    "engine_large": Part(engine_large, 100),
}


def work(there: Connection, part: Part, small: bool) -> None:
    """Sends what the part yields, then None; or what it stopped at."""
    try:
        for found in part.run(sizes(small)):
            there.send(found)
        there.send(None)
    except Exception as error:
        traceback.print_exc()
        what = " ".join(str(error).split())[:300]
        there.send({"error": f"{type(error).__name__}: {what}"})
        there.send(None)


def told(part: Any) -> str:
    """The one line of a part: its error, or its result."""
    return str(part.get("error") or part.get("summary", ""))
