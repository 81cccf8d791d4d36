"""What a TPU chip has and what a compiled program asks of it: memory, roofline, collectives."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import SingleDeviceSharding


class Chip(NamedTuple):
    """Google's figures, from the system architecture pages of the Cloud TPU documentation."""

    flops: float  # bfloat16, per second
    bandwidth: float  # bytes of HBM per second
    memory: float  # bytes of HBM


CHIPS = {
    "v4": Chip(275e12, 1228e9, 32 * 2**30),
    "v5e": Chip(197e12, 819e9, 16 * 2**30),
    "v5p": Chip(459e12, 2765e9, 95 * 2**30),
    "v6e": Chip(918e12, 1640e9, 32 * 2**30),
}


class Cost(NamedTuple):
    """Of one chip."""

    flops: float
    bytes: float

    def __add__(self, other: Any) -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: Any) -> "Cost":
        return Cost(times * self.flops, times * self.bytes)

    def roofline(self, chip: Chip) -> dict[str, float]:
        """The time is the larger of FLOPs over peak and bytes over bandwidth."""
        compute, memory = self.flops / chip.flops, self.bytes / chip.bandwidth
        seconds = max(compute, memory)
        return {
            "flops": self.flops,
            "bytes": self.bytes,
            "seconds": seconds,
            "share_of_peak": compute / seconds,
        }


class DoesNotFit(ValueError):
    """The compiler's own word that a program needs more memory than the chip has."""


def compiled(lowered: Any) -> Any:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(re.sub(r"\s+", " ", str(error))[:300]) from None


def memory(program: Any) -> dict[str, float]:
    """Bytes of a compiled program: what goes in, what it needs meanwhile, all at once."""
    stats = program.memory_analysis()
    total = (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )
    return {
        "arguments": stats.argument_size_in_bytes,
        "activations": stats.temp_size_in_bytes,
        "total": total,
    }


def size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def cost(f: Callable[..., Any], device: jax.Device, *given: Any) -> Cost:
    """FLOPs and bytes of one straight-line program on one chip, after fusion."""
    here = SingleDeviceSharding(device)
    program = compiled(jax.jit(f, in_shardings=here, out_shardings=here).lower(*given))
    counted = program.cost_analysis()
    return Cost(float(counted["flops"]), float(counted["bytes accessed"]))


COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter)(?:-start)?\(")
ARRAY = re.compile(r"\b([a-z]+\d+)\[([\d,]*)\]")


def collectives(text: str) -> dict[str, float]:
    """How many collectives a program holds, and the bytes that they give."""
    count, total = 0, 0
    for shapes, _ in COLLECTIVE.findall(text):
        count += 1
        for kind, sides in ARRAY.findall(shapes):
            items = math.prod(int(side) for side in sides.split(",") if side)
            total += items * int(re.sub(r"\D", "", kind)) // 8
    return {"count": count, "bytes": total}
