"""The machine a program runs on: what it is, what it multiplies fast, what it can hold.

jax is imported late: a command reads `cpu_type` before jax may start.
"""

import importlib
import math
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ejax.config import Dtype
from ejax.errors import UserError

if TYPE_CHECKING:
    import jax

CPUINFO = Path("/proc/cpuinfo")
CGROUP = Path("/sys/fs/cgroup")
# As Linux names them, x86 and Arm. AVX-512's instruction was faster than float32 on
# an AMD EPYC, and slower on an Intel Xeon (155 to 260 GFLOP/s at 512 rows of width 384).
BF16_FLAGS = {"amx_bf16", "bf16"}
AMD_BF16_FLAGS = BF16_FLAGS | {"avx512_bf16"}

_TARGET: ContextVar[str] = ContextVar("_TARGET", default="")


def target() -> str:
    """What programs are compiled for: "cpu", "gpu" or "tpu"; the default backend."""
    import jax

    return _TARGET.get() or jax.default_backend()


@contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Another `target`, for programs that are compiled ahead and run elsewhere."""
    token = _TARGET.set(platform)
    try:
        yield
    finally:
        _TARGET.reset(token)


def local_devices() -> "list[jax.Device]":
    """Those of this process.

    Raises:
      ValueError: where JAX_PLATFORMS names what is not here.
    """
    import jax

    try:
        return jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # the latter where nothing else was asked for
        raise UserError(
            f"jax finds no device for JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}: unset it, "
            f"or name what is here, such as cpu. {' '.join(str(error).split())[:200]}".strip()
        ) from error


def fastest_dtype() -> Dtype:
    """ "bfloat16" where the default device multiplies it faster than float32, else "float32".

    On a CPU without such instructions bfloat16 is widened first and measures 1.4 times slower
    than float32; on an Intel Xeon with AVX-512's alone 1.4 to 1.7 times.
    """
    device = local_devices()[0]
    if device.platform == "cpu":
        fast = AMD_BF16_FLAGS if _cpuinfo("vendor_id") == "AuthenticAMD" else BF16_FLAGS
        return "bfloat16" if fast & set(_cpuinfo("flags", "Features").split()) else "float32"
    capability = str(getattr(device, "compute_capability", ""))  # CUDA's, a name on ROCm, or none
    return "float32" if re.fullmatch(r"[1-7]\.\d+", capability) else "bfloat16"


def _note_fork() -> None:
    global _forked
    bridge = sys.modules.get("jax._src.xla_bridge")
    _forked = _forked or bool(getattr(bridge, "_backends", False))


_forked = False  # from a process in which jax had started: its threads are not here
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def check_not_forked() -> None:
    """Raises ValueError in a forked process in which jax would wait without end."""
    if _forked:
        raise UserError(
            "this process was forked after jax had started in its parent, and jax would hang "
            'here: start workers with multiprocessing.get_context("spawn"), or load the '
            "classifier in each worker and in no parent."
        )


def usable_cores() -> int:
    """Those that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # of Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def use_cores(count: int) -> None:
    """Keeps this process, and the threads that it starts, on so many of its cores.

    To be called before a runtime starts, since each takes as many threads as it finds cores.

    Raises:
      ValueError: where there are fewer cores, or the system does not let a process choose.
    """
    from threadpoolctl import threadpool_limits

    if not hasattr(os, "sched_setaffinity"):
        raise UserError("--cores needs Linux: here a process cannot choose its cores.")
    if not 1 <= count <= usable_cores():
        raise UserError(f"--cores must be from 1 to {usable_cores()} here. Got {count}.")
    kept = sorted(os.sched_getaffinity(0))[:count]
    for thread in Path("/proc/self/task").iterdir():  # numpy has started some
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), kept)
    threadpool_limits(count)


def processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_type() -> str:
    """Tells apart the CPUs between which compiled programs and timings do not carry over."""
    parts = (_cpuinfo(name) for name in ("cpu family", "model", "stepping", "flags", "Features"))
    return " ".join((platform.machine(), processor(), *parts))


def _cpuinfo(*names: str) -> str:
    """The first value of one of these fields of the first CPU; "" where there is none."""
    for line in CPUINFO.read_text().splitlines() if CPUINFO.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""


def describe() -> str:
    """One line for reports: devices, cores and what they are."""
    devices = local_devices()
    word = "fast" if fastest_dtype() == "bfloat16" else "no fast"
    return (
        f"{len(devices)} x {devices[0].device_kind}, "
        f"{os.cpu_count()} cores of {processor()}, {word} bfloat16"
    )


def environment(*, onnx: bool = False) -> dict[str, Any]:
    """What a reader needs to know about where a number came from.

    Args:
      onnx: whether ONNX Runtime had a part in it.
    """
    from ejax import __version__

    packages = ("jax", "flax", "optax", "orbax-checkpoint")
    runtime = importlib.import_module("onnxruntime") if onnx else None  # of several packages
    return {
        "hardware": describe(),
        "versions": {"python": platform.python_version(), "ejax": __version__}
        | {name: metadata.version(name) for name in packages}
        | ({"onnxruntime": runtime.__version__} if runtime else {}),
    }


def free_bytes(device: "jax.Device") -> int | None:
    """Memory that a program may still take on a device; None where nobody tells."""
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        return None if limit is None else limit - stats.get("bytes_in_use", 0)
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text().splitlines() if meminfo.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(min(1024 * int(line.split()[1]), _left_to_container()))
    return None


def _left_to_container() -> float:
    """Bytes below the limit of this control group, version 2 or 1; inf where there is none."""
    for used, limit in (
        ("memory.current", "memory.max"),
        ("memory/memory.usage_in_bytes", "memory/memory.limit_in_bytes"),
    ):
        try:
            most, taken = ((CGROUP / name).read_text().strip() for name in (limit, used))
            stat = (CGROUP / limit).with_name("memory.stat").read_text().split()
        except OSError:
            continue
        if most.isdecimal():
            cache = int(stat[stat.index("inactive_file") + 1]) if "inactive_file" in stat else 0
            return int(most) - int(taken) + cache
    return math.inf
