"""What a TPU chip has and what a compiled program asks of it: memory, roofline, collectives."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import SingleDeviceSharding

from ejax.errors import UserError


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
    bytes: float  # between HBM and the core
    xla_bytes: float  # as XLA counts: what stays in the memory on the chip counts too

    def __add__(self, other: Any) -> "Cost":
        return Cost(*(ours + theirs for ours, theirs in zip(self, other, strict=True)))

    def __mul__(self, times: Any) -> "Cost":
        return Cost(*(times * value for value in self))

    def roofline(self, chip: Chip) -> dict[str, float]:
        """The time is the larger of FLOPs over peak and bytes over bandwidth."""
        compute, memory = self.flops / chip.flops, self.bytes / chip.bandwidth
        seconds = max(compute, memory)
        return {
            "flops": self.flops,
            "bytes": self.bytes,
            "seconds": seconds,
            "share_of_peak": compute / seconds,
            "xla_bytes": self.xla_bytes,
        }


class DoesNotFit(UserError):
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
    flops, xla_bytes = float(counted["flops"]), float(counted["bytes accessed"])
    return Cost(flops, min(xla_bytes, hbm_bytes(program.as_text())), xla_bytes)


INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(([^)]*)\)")
SHAPE = re.compile(r"\b(pred|[a-z]+\d+)\[([\d,]*)\](\{[^}]*\})?")
NO_COPY = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-done", "slice-done",
}  # fmt: skip


def hbm_bytes(text: str) -> float:
    """What the instructions of a straight-line TPU program read from HBM and write there.

    The compiler says of every array where it lies; S(1) and S(2) are memories on the chip. An
    array of which only a part is read counts whole, and a program with a loop, whose body stands
    for many, counts as infinite: XLA's own count is the smaller of the two then.
    """
    shapes: dict[str, str] = {}
    total = 0.0
    for line in text[text.index("\nENTRY") :].splitlines()[1:]:
        found = INSTRUCTION.match(line)
        if not found:
            continue
        name, shape, kind, operands = found.groups()
        shapes[name] = shape
        if kind == "while":
            return math.inf
        if kind in NO_COPY:
            continue
        if kind in ("copy-start", "slice-start"):  # (copy, original) and (original, part)
            (size_a, a_in_hbm), (size_b, b_in_hbm) = arrays(shape)[:2]
            total += (a_in_hbm + b_in_hbm) * min(size_a, size_b)
            continue
        given = [shapes.get(operand, "") for operand in re.findall(r"%([\w.-]+)", operands)]
        every = [array for one_shape in (shape, *given) for array in arrays(one_shape)]
        total += sum(size * in_hbm for size, in_hbm in every)
    return total


def arrays(shape: str) -> list[tuple[float, bool]]:
    """(bytes, whether in HBM) of each array in a shape as XLA prints it."""
    return [
        (math.prod(int(side) for side in sides.split(",") if side) * width(kind), "S(" not in where)
        for kind, sides, where in SHAPE.findall(shape)
    ]


def width(kind: str) -> float:
    """Bytes of an element: of pred 1, else by the bits in its name."""
    return 1 if kind == "pred" else int(re.sub(r"\D", "", kind)[:2]) / 8


COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter)(?:-start)?\(")


def collectives(text: str) -> dict[str, float]:
    """How many collectives a program holds, and the bytes that they give."""
    given = [size for shapes, _ in COLLECTIVE.findall(text) for size, _ in arrays(shapes)]
    return {"count": len(COLLECTIVE.findall(text)), "bytes": int(sum(given))}
