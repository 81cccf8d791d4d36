"""One program on every device of every host, around the per-device functions.

Every host goes through the same plan; the rows of a step are dealt to all devices in order,
and a host takes the shares of its own. The state is whole on every device.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ejax.config import Parallel
from ejax.data.batches import Step, pad
from ejax.data.tokenizer import Encoded
from ejax.inference.engine import replicate
from ejax.models.early_exit import EarlyExitBert
from ejax.training.processes import barrier
from ejax.training.step import AXIS, Rows, TrainState

Array = jax.Array


def shard(tree: Any, devices: int, multiple: int = 1) -> Any:
    """[B, ...] -> [devices, b, ...] for every leaf, b a multiple; zeros fill up the last ones."""

    def split(leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        extra = -len(leaf) % (devices * multiple)
        leaf = np.pad(leaf, [(0, extra)] + [(0, 0)] * (leaf.ndim - 1))
        return leaf.reshape(devices, -1, *leaf.shape[1:])

    return jax.tree.map(split, tree)


def parallel_step(
    step: Callable[[TrainState, Rows], tuple[TrainState, dict[str, Array]]],
    devices: list[jax.Device] | None = None,
    *,
    parallel: Parallel = "pmap",
    accumulate: int = 1,
) -> Callable[[TrainState, Rows], tuple[TrainState, dict[str, Array]]]:
    """The per-device step on all devices; the state is whole, the rows are [B, ...].

    The state that goes in is given away: the one that comes out takes its memory.

    Args:
      devices: of one host alone; None means all of all hosts.
      parallel: "pmap" or "shard_map", which give the same numbers.
      accumulate: micro-batches that `step` splits a device's rows into.
    """
    count = len(devices or jax.devices())
    local = len(devices or jax.local_devices())
    first = 0 if devices else jax.process_index() * local
    mapped = mapped_step(step, devices, parallel)
    program = mapped if devices else compiled_together(mapped)

    def mine(rows: Rows) -> Rows:
        shares = shard(rows, count, accumulate)
        return jax.tree.map(lambda leaf: leaf[first : first + local], shares)

    if parallel == "pmap":
        return lambda state, rows: program(state, mine(rows))

    mesh = Mesh(np.asarray(devices or jax.devices()), (AXIS,))
    by_row = NamedSharding(mesh, PartitionSpec(AXIS))

    def run(state: TrainState, rows: Rows) -> tuple[TrainState, dict[str, Array]]:
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), mine(rows))
        placed = jax.tree.map(
            lambda leaf: jax.make_array_from_process_local_data(by_row, leaf), flat
        )
        return program(state, placed)

    return run


def mapped_step(step: Any, devices: list[jax.Device] | None, parallel: Parallel) -> Any:
    """The program of all devices, to call or to lower: (state, rows) -> (state, metrics).

    Args:
      step: as `make_train_step` gives it.
      devices: None means all of all hosts.
      parallel: with "pmap" the rows are [devices, b, ...], with "shard_map" [devices * b, ...].
    """
    if parallel == "pmap":
        return jax.pmap(
            step, AXIS, in_axes=(None, 0), out_axes=None, devices=devices, donate_argnums=0
        )
    mapped = jax.shard_map(
        step,
        mesh=Mesh(np.asarray(devices or jax.devices()), (AXIS,)),
        in_specs=(PartitionSpec(), PartitionSpec(AXIS)),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    return jax.jit(mapped, donate_argnums=0)


def compiled_together(jitted: Any) -> Callable[[TrainState, Rows], Any]:
    """`jitted` on the devices of all processes.

    None starts a new program before all have compiled it.
    """
    if jax.process_count() == 1:
        return jitted
    compiled = set()

    def run(state: TrainState, rows: Rows) -> Any:
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(rows))  # the state keeps its own
        if shapes not in compiled:
            jitted.lower(state, rows).compile()
            barrier("compiled")
            compiled.add(shapes)
        return jitted(state, rows)

    return run


def place(state: TrainState, parallel: Parallel = "pmap") -> TrainState:
    """A state on the host -> whole on every device, as `parallel_step` takes and returns it."""
    if parallel == "pmap":
        return replicate(state)
    barrier("to be placed")  # jax compares what the hosts hold
    return replicate(state, jax.devices())


def make_all_logits(
    model: EarlyExitBert, devices: list[jax.Device] | None = None, *, method: str | None = None
) -> Callable[[Any, Encoded, list[Step]], np.ndarray]:
    """A function (variables, encoded, plan) -> logits of every exit, float32 [E, N, C].

    Every row of `encoded` has to be in the plan exactly once; rows come back in the
    order of `encoded`. The hosts take turns with the steps, and all get all logits.

    Args:
      method: another method of the model that gives [K, B, M] for a batch, such as
        "layer_vectors": then [K, N, M] comes back.
    """
    devices = devices or jax.local_devices()
    apply = functools.partial(model.apply, method=method)
    forward = jax.pmap(apply, in_axes=(None, 0), devices=devices)

    def run(variables: Any, encoded: Encoded, plan: list[Step]) -> np.ndarray:
        if jax.process_count() > 1:
            variables = jax.device_get(variables)
        like: Any = jax.eval_shape(apply, variables, pad(encoded, plan[0].rows, plan[0].length))
        found = np.zeros((like.shape[0], len(encoded), like.shape[2]), np.float32)
        seen = np.zeros(len(encoded), np.int32)
        variables = replicate(variables, devices)
        for step in plan[jax.process_index() :: jax.process_count()]:
            batch = pad(encoded, step.rows, step.length)
            out = np.asarray(forward(variables, shard(batch, len(devices))))
            out = np.moveaxis(out, 1, 0).reshape(len(found), -1, found.shape[2])
            real = step.rows >= 0
            found[:, step.rows[real]] = out[:, : len(step.rows)][:, real]
            seen[step.rows[real]] += 1
        if jax.process_count() > 1:
            barrier("evaluated")
            parts = multihost_utils.process_allgather((found, seen))
            found, seen = (np.asarray(part).sum(axis=0) for part in parts)
        if not (seen == 1).all():
            raise RuntimeError(f"rows not run exactly once: {np.flatnonzero(seen != 1)[:8]}")
        return found

    return run
