"""Early exit for a whole batch as one compiled `lax.while_loop`.

N rows wait on the device; tiles of B rows run through one segment (the layers
between one exit and the next) at a time. Rows that stay are written back packed
together, so that the work done is the sum over segments of ceil(alive / B) tiles:
nobody waits for the slowest row, no shape changes, nothing returns to the host
before the end.

Axes: N rows of the pool, B rows of a tile, T tokens, D width, L layers, E exits,
C classes.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ejax.inference.policy import (
    Agreed,
    Decision,
    broadcast_thresholds,
    check_rule,
    check_temperatures,
    nothing_agreed,
    score_exit,
)
from ejax.models.bert import Batch, BertModel, EncoderLayer
from ejax.models.early_exit import EarlyExitBert, cut
from ejax.models.heads import ExitHead, mix_columns
from ejax.models.heads import pool as pool_tokens

Array = jax.Array


class Pool(NamedTuple):
    """The rows still alive, packed to the front; padded to whole tiles (N')."""

    hidden: Array  # `stored` <residual dtype>[N', T, D]
    mask: Array  # int32 [N', T]
    row: Array  # int32 [N'], the row's place in the input
    agreed: Agreed  # int32 [N'] each


class State(NamedTuple):
    pool: Pool
    pooled: Array  # float32 [L, N, D], every layer's vector of a row, in the order of the input
    out: Decision  # [N, ...], filled as rows leave
    segment: Array  # int32, the exit being worked towards
    tile: Array  # int32, next tile of this segment
    alive: Array  # int32, rows to run in this segment
    stayed: Array  # int32, rows of this segment already packed for the next


def early_exit(
    model: EarlyExitBert,
    variables: Any,
    batch: Batch,
    thresholds: Any,
    *,
    temperatures: Any = None,
    rule: str = "confidence",
    tile: int = 32,
    rows: Any = None,
    devices: Sequence[jax.Device] | None = None,
) -> Decision:
    """Runs every row to the first exit that is sure, in one compiled program.

    A new threshold, temperature or number of `rows` never recompiles; a new
    shape [N, T], tile or rule does.

    Args:
      model: the module; its variables as `model.init` or a bundle gives them, or
        `prepare`d once for many calls.
      batch: a `Batch`, int [N, T] each.
      thresholds: a number, [E] or [N, E]; a row leaves at the first exit whose
        score is at or above it. Above 1: nobody leaves early.
      temperatures: float32 [E], positive; None means 1.
      rule: a name in `ejax.inference.policy.RULE_NAMES`.
      tile: rows per step, B.
      rows: only so many rows at the front are real, the others are padding: they
        are not run and get exit 0, score 0 and logits 0. None means all.
      devices: several share the rows, dealt in turn; each runs its own loop on its own rows
        and waits for no other. `replicate` variables that are prepared. None means the
        device of the variables.

    Returns:
      A `Decision`: logits [N, C], exit [N], score [N], in the order of the input.

    Raises:
      ValueError: on a wrong shape, threshold, temperature, rule or tile.
    """
    batch, tile, rows = _checked(batch, tile, rows)
    total, exits = batch.ids.shape[0], len(model.exits.layers)
    weights, levels = prepare(model, variables), broadcast_thresholds(thresholds, total, exits)
    temperatures, rule = check_temperatures(temperatures, exits), check_rule(rule)
    if devices is None or len(devices) == 1:
        return _early_exit(model, weights, batch, levels, temperatures, rows, rule, tile)
    count = len(devices)
    run = _on_devices(model, rule, min(tile, -(-total // count)), tuple(devices))
    shares = np.maximum(np.asarray(rows) - np.arange(count) + count - 1, 0) // count
    dealt = jax.tree.map(lambda leaf: _deal(leaf, count), (batch, levels))
    found = run(weights, *dealt, temperatures, shares.astype(np.int32))
    return jax.tree.map(
        lambda leaf: leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[2:])[:total], found
    )


@functools.lru_cache
def _on_devices(
    model: EarlyExitBert, rule: str, tile: int, devices: tuple[jax.Device, ...]
) -> Callable[..., Decision]:
    def one(
        weights: Prepared, batch: Batch, levels: Array, temperatures: Array, rows: Array
    ) -> Any:
        return _early_exit(model, weights, batch, levels, temperatures, rows, rule, tile)

    return jax.pmap(one, "devices", in_axes=(None, 0, 0, None, 0), devices=devices)


def _deal(leaf: Array, count: int) -> np.ndarray:
    """[N, ...] -> [devices, n, ...], row i to device i % count; rows of zeros fill up."""
    values = np.asarray(leaf)
    values = np.pad(values, [(0, -len(values) % count)] + [(0, 0)] * (values.ndim - 1))
    return values.reshape(-1, count, *values.shape[1:]).swapaxes(0, 1)


def replicate(tree: Any, devices: Sequence[jax.Device] | None = None) -> Any:
    """Whole on every device, as a mapped program takes and returns it: else it compiles twice."""
    mesh = Mesh(np.asarray(devices or jax.local_devices()), ("devices",))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def _checked(batch: Batch, tile: int, rows: Any) -> tuple[Batch, int, Array]:
    if tile < 1:
        raise ValueError(f"tile must be at least 1 row. Got {tile}.")
    batch = batch.arrays()
    total = batch.ids.shape[0]
    if total == 0:
        raise ValueError("batch must hold at least one row. Got none.")
    return batch, min(tile, total), jnp.asarray(total if rows is None else rows, jnp.int32)


class Prepared(NamedTuple):
    """A model's weights as the engine reads them: see `prepare`."""

    bert: Any  # {"embeddings": …}
    layers: tuple[Any, ...]  # L trees
    columns: Array  # float32 [L, E], `mix_columns`
    heads: tuple[Any, ...]  # E trees


def prepare(model: EarlyExitBert, variables: Any) -> Prepared:
    """Weights ready for many calls: cast to the compute dtype, one tree per layer, on the device.

    Biases, norms, embeddings and the mix stay float32. Layers stand apart because reading
    layer i of a stack inside a loop copies it for every tile: 5 % of the time at 1024 tokens
    of width 384 on a CPU. What is prepared already is returned as it is.
    """
    if isinstance(variables, Prepared):
        return variables
    params, dtype = variables["params"], jnp.dtype(model.cfg.dtype)

    def cast(path: Any, leaf: Any) -> Any:
        return jnp.asarray(leaf, dtype if path[-1].key == "kernel" else None)

    def unstacked(tree: Any, count: int) -> tuple[Any, ...]:
        tree = jax.tree_util.tree_map_with_path(cast, tree)
        return tuple(jax.tree.map(operator.itemgetter(i), tree) for i in range(count))

    return Prepared(
        {"embeddings": jax.tree.map(jnp.asarray, params["bert"]["embeddings"])},
        unstacked(params["bert"]["layers"], model.exits.num_layers),
        mix_columns(jnp.asarray(params["heads"]["mix"]), model.exits),
        unstacked(params["heads"]["exits"], len(model.exits.layers)),
    )


@partial(jax.jit, static_argnums=(0, 6, 7))
def _early_exit(
    model: EarlyExitBert,
    weights: Prepared,
    batch: Batch,
    thresholds: Array,
    temperatures: Array,
    rows: Array,
    rule: str,
    tile: int,
) -> Decision:
    cfg, exits = cut(model.cfg, model.exits), model.exits
    total, last, mixes = batch.ids.shape[0], len(exits.layers) - 1, exits.mix == "softmax"

    firsts = (0, *exits.layers[:-1])
    longest = max(b - a for a, b in zip(firsts, exits.layers, strict=True))

    def run_segment(
        number: int, x: Array, mask: Array, row: Array, pooled: Array
    ) -> tuple[Array, Array, Array]:
        """The stream after the segment, its layers' vectors [longest, B, D], the logits."""
        first = firsts[number]
        vectors = [pooled.at[i, row].get(mode="clip") for i in range(first if mixes else 0)]
        if not mixes:
            vectors = [jnp.zeros((tile, cfg.hidden_size))] * first
        for i in range(first, exits.layers[number]):
            x = run_layer(cfg, weights, i, x, mask)
            vectors.append(pool_tokens(x, mask, exits))
        logits = run_head(cfg, weights, number, exits, vectors)
        seen = vectors[first:]
        return x, jnp.stack(seen + seen[-1:] * (longest - len(seen))), logits

    segments = [partial(run_segment, number) for number in range(last + 1)]

    def step(state: State) -> State:
        pool, out, segment = state.pool, state.out, state.segment
        start = state.tile * tile
        part = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, tile), pool)
        stream = unstored(part.hidden, cfg.residual_dtype)
        hidden, seen, logits = lax.switch(
            segment, segments, stream, part.mask, part.row, state.pooled
        )
        score, agreed = score_exit(rule, logits, temperatures[segment], part.agreed, last + 1)
        needed = thresholds.at[part.row, segment].get(mode="clip")
        leave = (score >= needed) | (segment == last)

        real = start + jnp.arange(tile) < state.alive
        pooled = state.pooled
        if mixes:
            layer = jnp.asarray(firsts)[segment] + jnp.arange(longest)
            layer = jnp.where(layer < jnp.asarray(exits.layers)[segment], layer, exits.num_layers)
            place = jnp.where(real, part.row, total)
            pooled = pooled.at[layer[:, None], place[None]].set(seen, mode="drop")
        target = jnp.where(real & leave, part.row, total)  # past the end: dropped
        out = Decision(
            out.logits.at[target].set(logits, mode="drop"),
            out.exit.at[target].set(segment, mode="drop"),
            out.score.at[target].set(score, mode="drop"),
        )
        # Rows that stay move to the front of the tile, and the tile is written behind
        # those that stayed before. What follows them there has been run already.
        stay = real & ~leave
        order = jnp.argsort(~stay, stable=True)
        written = Pool(stored(hidden), part.mask, part.row, agreed)
        packed = jax.tree.map(lambda leaf: leaf[order], written)
        pool = jax.tree.map(
            lambda whole, piece: lax.dynamic_update_slice_in_dim(whole, piece, state.stayed, 0),
            pool,
            packed,
        )
        stayed = state.stayed + stay.sum(dtype=jnp.int32)
        done = start + tile >= state.alive
        return State(
            pool,
            pooled,
            out,
            segment + done.astype(jnp.int32),
            jnp.where(done, 0, state.tile + 1),
            jnp.where(done, stayed, state.alive),
            jnp.where(done, 0, stayed),
        )

    zero = jnp.zeros((), jnp.int32)
    state = State(
        _first_pool(cfg, weights.bert, batch, tile),
        jnp.zeros((exits.num_layers if mixes else 0, total, cfg.hidden_size), jnp.float32),
        Decision(
            jnp.zeros((total, exits.num_labels), jnp.float32),
            jnp.zeros((total,), jnp.int32),
            jnp.zeros((total,), jnp.float32),
        ),
        zero,
        zero,
        jnp.minimum(rows, total),
        zero,
    )
    return lax.while_loop(lambda s: (s.segment <= last) & (s.alive > 0), step, state).out


def run_layer(cfg: Any, weights: Prepared, i: int, x: Array, mask: Array) -> Array:
    """The output of layer i, from 0: [B, T, D]."""
    out: Any = EncoderLayer(cfg).apply({"params": weights.layers[i]}, x, mask)
    return out


def run_head(
    cfg: Any, weights: Prepared, number: int, exits: Any, vectors: Sequence[Array]
) -> Array:
    """Logits [B, C] of one exit, from the pooled vectors [B, D] of the layers up to its own."""
    mixed = jnp.zeros_like(vectors[-1])
    for i, vector in enumerate(vectors):
        mixed = mixed + weights.columns[i, number] * vector
    head = ExitHead(cfg, exits.num_labels)
    logits: Any = head.apply({"params": weights.heads[number]}, mixed)
    return logits


def _first_pool(cfg: Any, bert: Any, batch: Batch, tile: int) -> Pool:
    """The embedded rows, padded to whole tiles so that no slice is ever clamped."""
    batch = _pad_to_tiles(batch, tile)
    rows = batch.ids.shape[0]
    hidden: Any = BertModel(cfg).apply({"params": bert}, batch, method="embed")
    row = jnp.arange(rows, dtype=jnp.int32)
    return Pool(stored(hidden), batch.mask, row, nothing_agreed((rows,)))


def stored(x: Array) -> Array:
    """bfloat16 as its bits, uint16: XLA's CPU backend widens the whole pool to update bfloat16."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def unstored(x: Array, dtype: str) -> Array:
    """The inverse of `stored`."""
    return lax.bitcast_convert_type(x, dtype) if x.dtype == jnp.uint16 else x


def full_depth(
    model: EarlyExitBert, variables: Any, batch: Batch, *, tile: int = 32, rows: Any = None
) -> Array:
    """The last exit's logits by a straight scan over the layers, tile by tile.

    The baseline of every speed-up: no early head, no packing.

    Args:
      batch: a `Batch`, int [N, T] each.
      tile: rows per step, B.
      rows: only so many rows at the front are real; None means all.

    Returns:
      float32 [N, C]; zeros for padding rows of tiles that were not run.
    """
    batch, tile, rows = _checked(batch, tile, rows)
    return _full_depth(model, prepare(model, variables), batch, rows, tile)


@partial(jax.jit, static_argnums=(0, 4))
def _full_depth(
    model: EarlyExitBert, weights: Prepared, batch: Batch, rows: Array, tile: int
) -> Array:
    cfg, exits = cut(model.cfg, model.exits), model.exits
    total = batch.ids.shape[0]
    batch = _pad_to_tiles(batch, tile)

    def run(i: Array, logits: Array) -> Array:
        part = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, i * tile, tile), batch)
        x: Any = BertModel(cfg).apply({"params": weights.bert}, part, method="embed")
        vectors = []
        for layer in range(exits.num_layers):
            x = run_layer(cfg, weights, layer, x, part.mask)
            vectors.append(pool_tokens(x, part.mask, exits))
        found = run_head(cfg, weights, len(exits.layers) - 1, exits, vectors)
        return lax.dynamic_update_slice_in_dim(logits, found, i * tile, 0)

    logits = jnp.zeros((batch.ids.shape[0], exits.num_labels), jnp.float32)
    return lax.fori_loop(0, (rows + tile - 1) // tile, run, logits)[:total]


def _pad_to_tiles(batch: Batch, tile: int) -> Batch:
    extra = -batch.ids.shape[0] % tile
    return jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, extra), (0, 0))), batch)
