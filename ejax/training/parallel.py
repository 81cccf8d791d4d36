"""One program on every local device: `jax.pmap` around the per-device functions."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from ejax.data.batches import Step, take
from ejax.data.tokenizer import Encoded
from ejax.inference.engine import replicate
from ejax.models.early_exit import EarlyExitBert
from ejax.training.step import AXIS, Rows, TrainState

Array = jax.Array


def shard(tree: Any, devices: int) -> Any:
    """[B, ...] -> [devices, b, ...] for every leaf; rows of zeros fill up the last device."""

    def split(leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        extra = -len(leaf) % devices
        leaf = np.pad(leaf, [(0, extra)] + [(0, 0)] * (leaf.ndim - 1))
        return leaf.reshape(devices, -1, *leaf.shape[1:])

    return jax.tree.map(split, tree)


def parallel_step(
    step: Callable[[TrainState, Rows], tuple[TrainState, dict[str, Array]]],
    devices: list[jax.Device] | None = None,
) -> Callable[[TrainState, Rows], tuple[TrainState, dict[str, Array]]]:
    """The per-device step on all local devices; the state is whole, the rows are [B, ...].

    The state that goes in is given away: the one that comes out takes its memory.
    """
    devices = devices or jax.local_devices()
    mapped = jax.pmap(
        step, AXIS, in_axes=(None, 0), out_axes=None, devices=devices, donate_argnums=0
    )

    def run(state: TrainState, rows: Rows) -> tuple[TrainState, dict[str, Array]]:
        return mapped(state, shard(rows, len(devices)))

    return run


def make_all_logits(
    model: EarlyExitBert, devices: list[jax.Device] | None = None
) -> Callable[[Any, Encoded, list[Step]], np.ndarray]:
    """A function (variables, encoded, plan) -> logits of every exit, float32 [E, N, C].

    Every row of `encoded` has to be in the plan exactly once; rows come back in the
    order of `encoded`.
    """
    devices = devices or jax.local_devices()
    forward = jax.pmap(model.apply, in_axes=(None, 0), devices=devices)

    def run(variables: Any, encoded: Encoded, plan: list[Step]) -> np.ndarray:
        shape = (len(model.exits.layers), len(encoded), model.exits.num_labels)
        logits = np.full(shape, np.nan, np.float32)
        variables = replicate(variables, devices)
        for step, batch in batches(encoded, plan):
            out = np.asarray(forward(variables, shard(batch, len(devices))))
            out = np.moveaxis(out, 1, 0).reshape(shape[0], -1, shape[2])
            real = step.rows >= 0
            logits[:, step.rows[real]] = out[:, : len(step.rows)][:, real]
        return logits

    return run


def batches(encoded: Encoded, plan: list[Step]) -> Iterator[tuple[Step, Any]]:
    none = np.zeros(len(encoded), np.int32)
    for step in plan:
        yield step, take(encoded, none, step)[0]
