"""Early exit for a whole batch as one compiled `lax.while_loop`, and its baseline, full depth.

Here arguments are checked, rows are dealt to devices, and memory is asked for; the loop itself,
with a drawing of how rows are packed, is `ejax.inference.pool`.

Axes: N rows of the pool, B rows of a tile, T tokens, D width, E exits, C classes.
"""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ejax.errors import UserError
from ejax.hardware import free_bytes
from ejax.inference.policy import Decision, broadcast_thresholds, check_calibration
from ejax.inference.pool import pad_to_tiles, run_pool
from ejax.inference.prepared import Prepared, prepare, run_head, run_layer
from ejax.inference.schedule import in_small_tiles, tile_sizes
from ejax.models.bert import Batch, BertModel
from ejax.models.early_exit import EarlyExitBert, cut
from ejax.models.heads import NGramExit, text_of
from ejax.models.heads import pool as pool_tokens
from ejax.tasks import task_of

Array = jax.Array


CHECKED_BYTES = 1 << 28  # smaller pools are not asked whether they fit
NOBODY = 2.0  # a threshold above every score


def early_exit(
    model: EarlyExitBert,
    variables: Any,
    batch: Batch,
    thresholds: Any,
    *,
    temperatures: Any = None,
    tile: int = 32,
    rows: Any = None,
    zero_logits: Any = None,
    devices: Sequence[jax.Device] | None = None,
) -> Decision:
    """Runs every row to the first exit that is sure, in one compiled program.

    A new threshold, temperature or number of `rows` never recompiles; a new
    shape [N, T] or tile does.

    Args:
      model: the module; its variables as `model.init` or a bundle gives them, or
        `prepare`d once for many calls.
      batch: a `Batch`, int [N, T] each.
      thresholds: a number, [E] or [N, E]; a row leaves at the first exit whose
        score is at or above it. Above 1: nobody leaves early.
      temperatures: float32 [E], positive; of several labels [E, 2 C], see
        `ejax.tasks.SeveralLabels`; None means as they come.
      tile: rows per step, B.
      rows: only so many rows at the front are real, the others are padding: they
        are not run and get exit 0, score 0 and logits 0. None means all.
      zero_logits: float32 [N, C] of an exit 0 that ran before, on whole texts, where the model
        has none: the exits add them to their own with the weights in `variables`.
      devices: several share the rows, dealt in turn; each runs its own loop on its own rows
        and waits for no other. `replicate` variables that are prepared. None means the
        device of the variables.

    Returns:
      A `Decision`: logits [N, C], exit [N], score [N], in the order of the input.

    Raises:
      ValueError: on a wrong shape, threshold, temperature or tile, for ids outside the
        vocabulary (unless they are on a device already), and for a pool that does not fit into
        the device's memory.
    """
    with jax.enable_x64(False):  # float32, whatever else the caller's program computes in
        return _run(
            model, variables, batch, thresholds, temperatures, rows, zero_logits, devices,
            tile=tile,
        )  # fmt: skip


def exit_logits(
    model: EarlyExitBert,
    variables: Any,
    batch: Batch,
    *,
    tile: int = 32,
    rows: Any = None,
    zero_logits: Any = None,
    devices: Sequence[jax.Device] | None = None,
) -> Array:
    """Every exit's logits, float32 [N, E, C], as `early_exit` computes them, in one run.

    Its loop, with nobody leaving before the end. Arguments and errors as of `early_exit`; what
    is padding gets zeros.
    """
    with jax.enable_x64(False):
        return _run(
            model, variables, batch, NOBODY, None, rows, zero_logits, devices,
            tile=tile, every_exit=True,
        )  # fmt: skip


def _run(
    model: EarlyExitBert,
    variables: Any,
    batch: Batch,
    thresholds: Any,
    temperatures: Any,
    rows: Any,
    zero_logits: Any,
    devices: Sequence[jax.Device] | None,
    *,
    tile: int,
    every_exit: bool = False,
) -> Any:
    batch, tile, rows = _checked(model, batch, tile, rows)
    total, exits = batch.ids.shape[0], len(model.exits.layers)
    weights, thresholds = prepare(model, variables), broadcast_thresholds(thresholds, total, exits)
    temperatures = check_calibration(task_of(model.exits), temperatures, exits)
    check_memory(model, total, batch.ids.shape[1], tile, devices or jax.local_devices()[:1])
    if devices is None or len(devices) == 1:
        weights = jax.device_put(weights, devices[0]) if devices else weights
        return run_pool(
            model, weights, batch, thresholds, temperatures, rows, zero_logits,
            tile=tile, every_exit=every_exit,
        )  # fmt: skip
    count = len(devices)
    run = _on_devices(
        model, tuple(devices), tile=min(tile, -(-total // count)), every_exit=every_exit
    )
    shares = np.maximum(np.asarray(rows) - np.arange(count) + count - 1, 0) // count
    batch, thresholds, zero_logits = jax.tree.map(
        lambda leaf: _deal(leaf, count), (batch, thresholds, zero_logits)
    )
    out = run(weights, batch, thresholds, temperatures, shares.astype(np.int32), zero_logits)
    return jax.tree.map(lambda leaf: _gather(leaf)[:total], out)


@functools.lru_cache
def _on_devices(
    model: EarlyExitBert, devices: tuple[jax.Device, ...], **settings: Any
) -> Callable[..., Any]:
    """`run_pool` on each device: weights and temperatures are whole, all else [devices, ...]."""
    run = partial(run_pool, model, **settings)
    return jax.pmap(run, "devices", in_axes=(None, 0, 0, None, 0, 0), devices=devices)


def replicate(tree: Any, devices: Sequence[jax.Device] | None = None) -> Any:
    """Whole on every device, as a mapped program takes and returns it: else it compiles twice."""
    mesh = Mesh(np.asarray(devices or jax.local_devices()), ("devices",))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def _deal(leaf: Array, count: int) -> np.ndarray:
    """[N, ...] -> [devices, n, ...], row i to device i % count; rows of zeros fill up."""
    values = np.asarray(leaf)
    values = np.pad(values, [(0, -len(values) % count)] + [(0, 0)] * (values.ndim - 1))
    return values.reshape(-1, count, *values.shape[1:]).swapaxes(0, 1)


def _gather(leaf: Array) -> Array:
    """The inverse of `_deal`, the rows that filled up included."""
    return leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[2:])


def pool_bytes(model: EarlyExitBert, rows: int, length: int, tile: int) -> int:
    """Memory that the pool [N, T] and one tile at work take, weights apart."""
    cfg, exits = model.cfg, model.exits
    d, f, h = cfg.hidden_size, cfg.intermediate_size, cfg.num_attention_heads
    stream = (2 if cfg.residual_dtype == "bfloat16" else 4) * length * d
    mixes = 4 * (len(exits.encoder.layers) - 1) * d * exits.pooled if exits.mix == "softmax" else 0
    outputs = task_of(exits).outputs
    grams = 4 * 2 * length * (exits.rank + 1) if exits.has_zero else 0  # of all rows at once
    row = grams + stream + mixes + 4 * (3 * length + 2 * len(exits.layers) + 4 * outputs + 7)
    at_work = 4 * (length * (8 * d + 2 * f) + 2 * h * length * length)
    return (rows + tile) * row + tile * at_work


def check_memory(
    model: EarlyExitBert, rows: int, length: int, tile: int, devices: Sequence[jax.Device]
) -> None:
    """Raises ValueError where a pool shared by these devices cannot fit."""
    needed = pool_bytes(model, -(-rows // len(devices)), length, tile)
    if needed < CHECKED_BYTES:
        return
    if devices[0].platform == "cpu":
        needed *= len(devices)  # which share one memory
    free = free_bytes(devices[0])
    if free is not None and needed > free:
        raise UserError(
            f"a pool of {rows} rows of {length} tokens needs {needed / 1e9:.1f} GB and "
            f"{devices[0]} has {free / 1e9:.1f} GB free: lower the rows of the pool (of a "
            f"classifier, Shapes.pool_tokens), or residual_dtype to bfloat16."
        )


def _checked(model: EarlyExitBert, batch: Batch, tile: int, rows: Any) -> tuple[Batch, int, Any]:
    """Numpy stays numpy: an operation before the program costs one text as much as a layer."""
    if tile < 1:
        raise UserError(f"tile must be at least 1 row. Got {tile}.")
    if not isinstance(batch, Batch):
        raise UserError(f"batch must be an ejax.Batch(ids, mask). Got {type(batch).__name__}.")
    if batch.types is None and model.exits.pooling == "pair" and not model.exits.separator:
        raise UserError(
            "batch.types must be given, 1 for the tokens of the second text: these heads compare "
            "the two texts of a pair. Got None."
        )
    batch = batch.arrays()
    total = batch.ids.shape[0]
    if total == 0:
        raise UserError("batch must hold at least one row. Got none.")
    sizes = {"ids": model.cfg.vocab_size, "types": model.cfg.type_vocab_size}
    for name, size in sizes.items():
        values = getattr(batch, name)
        if isinstance(values, np.ndarray) and isinstance(batch.mask, np.ndarray):
            wrong = values[(batch.mask != 0) & ((values < 0) | (values >= size))]
            if wrong.size:
                raise UserError(
                    f"batch.{name} must be at least 0 and below {size}. Got {wrong[0]}."
                )
    rows = total if rows is None else rows
    if not isinstance(rows, Array) and not 0 <= rows <= total:
        raise UserError(f"rows must be between 0 and the {total} of the batch. Got {rows}.")
    rows = jnp.asarray(rows, jnp.int32) if isinstance(rows, Array) else np.int32(rows)
    return batch, min(tile, total), rows


def full_depth(
    model: EarlyExitBert,
    variables: Any,
    batch: Batch,
    *,
    tile: int = 32,
    rows: Any = None,
    zero_logits: Any = None,
) -> Array:
    """The last exit's logits by a straight scan over the layers, tile by tile.

    The baseline of every speed-up: no early head, no packing, of exit 0 what it adds to the last
    exit; the rows that fill no whole tile go in small ones, as in `early_exit`.

    Args:
      batch: a `Batch`, int [N, T] each.
      tile: rows per step, B.
      rows: only so many rows at the front are real; None means all.
      zero_logits: as of `early_exit`.

    Returns:
      float32 [N, C]; what padding rows get is not said.
    """
    batch, tile, rows = _checked(model, batch, tile, rows)
    with jax.enable_x64(False):
        return _full_depth(model, prepare(model, variables), batch, rows, zero_logits, tile=tile)


@partial(jax.jit, static_argnames=("model", "tile"))
def _full_depth(
    model: EarlyExitBert,
    weights: Prepared,
    batch: Batch,
    rows: Array,
    zero_logits: Array | None,
    *,
    tile: int,
) -> Array:
    if model.exits.has_zero:
        zero_logits, _ = NGramExit(model.exits).apply({"params": weights.ngrams}, batch)
    cfg, exits = cut(model.cfg, model.exits), model.exits.encoder
    total = batch.ids.shape[0]
    batch = pad_to_tiles(batch, tile)
    widths = tile_sizes(tile)

    def run(width: int, start: Array, logits: Array) -> Array:
        tokens = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, width), batch)
        x: Any = BertModel(cfg).apply({"params": weights.bert}, tokens, method="embed")
        texts = text_of(tokens, exits)
        mixed = jnp.zeros((width, cfg.hidden_size * exits.pooled))
        for layer in range(exits.num_layers):
            x = run_layer(cfg, weights, layer, x, texts)
            mixed = mixed + weights.columns[layer, -1] * pool_tokens(x, texts, exits)
        of_tile = run_head(cfg, weights, len(exits.layers) - 1, exits, mixed)
        return lax.dynamic_update_slice_in_dim(logits, of_tile, start, 0)

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        start, logits = state
        small = in_small_tiles(rows - start, tile)
        branches = [partial(run, width) for width in widths]
        logits = lax.switch(small.astype(jnp.int32), branches, start, logits)
        return start + jnp.where(small, widths[-1], tile), logits

    logits = jnp.zeros((batch.ids.shape[0], task_of(exits).outputs), jnp.float32)
    logits = lax.while_loop(lambda state: state[0] < rows, step, (jnp.int32(0), logits))[1][:total]
    if zero_logits is None or weights.evidence is None:
        return logits
    return logits + weights.evidence[-1] * zero_logits
