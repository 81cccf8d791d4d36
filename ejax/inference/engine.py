"""Early exit for a whole batch as one compiled `lax.while_loop`.

N rows wait on the device; tiles of B rows run through one segment (the layers
between one exit and the next) at a time. Rows that stay are written back packed
together, so that the work done is the sum over segments of ceil(alive / B) tiles:
nobody waits for the slowest row, no shape changes, nothing returns to the host
before the end.

Axes: N rows of the pool, B rows of a tile, T tokens, D width, L layers, E exits,
C classes.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ejax.inference.policy import (
    RULES,
    Decision,
    broadcast_thresholds,
    check_rule,
    check_temperatures,
)
from ejax.models.bert import Batch, BertModel, EncoderLayer
from ejax.models.early_exit import EarlyExitBert, cut
from ejax.models.heads import ExitHead, mix_columns, mix_in

Array = jax.Array


class Pool(NamedTuple):
    """The rows still alive, packed to the front; padded to whole tiles (N')."""

    hidden: Array  # `stored` <residual dtype>[N', T, D]
    mixed: Array  # float32 [N', E, D]
    mask: Array  # int32 [N', T]
    row: Array  # int32 [N'], the row's place in the input


class State(NamedTuple):
    pool: Pool
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
      rule: a name in `ejax.inference.policy.RULES`.
      tile: rows per step, B.
      rows: only so many rows at the front are real, the others are padding: they
        are not run and get exit 0, score 0 and logits 0. None means all.

    Returns:
      A `Decision`: logits [N, C], exit [N], score [N], in the order of the input.

    Raises:
      ValueError: on a wrong shape, threshold, temperature, rule or tile.
    """
    batch, tile, rows = _checked(batch, tile, rows)
    total, exits = batch.ids.shape[0], len(model.exits.layers)
    return _early_exit(
        model,
        prepare(model, variables),
        batch,
        broadcast_thresholds(thresholds, total, exits),
        check_temperatures(temperatures, exits),
        rows,
        check_rule(rule),
        tile,
    )


def _checked(batch: Batch, tile: int, rows: Any) -> tuple[Batch, int, Array]:
    if tile < 1:
        raise ValueError(f"tile must be at least 1 row. Got {tile}.")
    batch = batch.arrays()
    total = batch.ids.shape[0]
    if total == 0:
        raise ValueError("batch must hold at least one row. Got none.")
    return batch, min(tile, total), jnp.asarray(total if rows is None else rows, jnp.int32)


def prepare(model: EarlyExitBert, variables: Any) -> Any:
    """Kernels in the compute dtype and everything on the device, once instead of per call.

    Biases, norms, embeddings and the mix stay float32. A second call changes nothing.
    """
    dtype = jnp.dtype(model.cfg.dtype)

    def cast(path: Any, leaf: Any) -> Any:
        if path[-1].key == "kernel" and leaf.dtype != dtype:
            return jnp.asarray(leaf, dtype)
        return leaf if isinstance(leaf, Array) else jnp.asarray(leaf)

    return jax.tree_util.tree_map_with_path(cast, variables)


@partial(jax.jit, static_argnums=(0, 6, 7))
def _early_exit(
    model: EarlyExitBert,
    variables: Any,
    batch: Batch,
    thresholds: Array,
    temperatures: Array,
    rows: Array,
    rule: str,
    tile: int,
) -> Decision:
    cfg, exits = cut(model.cfg, model.exits), model.exits
    params = variables["params"]
    total = batch.ids.shape[0]
    columns = mix_columns(params["heads"]["mix"], exits)
    ends = jnp.asarray(exits.layers, jnp.int32)
    starts = jnp.asarray((0, *exits.layers[:-1]), jnp.int32)
    last = len(exits.layers) - 1

    def run_layers(x: Array, mixed: Array, mask: Array, segment: Array) -> tuple[Array, Array]:
        def one(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            x, mixed = state
            layer = jax.tree.map(lambda leaf: leaf[i], params["bert"]["layers"])
            out: Any = EncoderLayer(cfg).apply({"params": layer}, x, mask)
            return out, mix_in(mixed, columns[i], out, mask, exits)

        return lax.fori_loop(starts[segment], ends[segment], one, (x, mixed))

    def leave_or_stay(mixed: Array, row: Array, segment: Array) -> tuple[Array, Array, Array]:
        head = jax.tree.map(lambda leaf: leaf[segment], params["heads"]["exits"])
        vector = lax.dynamic_index_in_dim(mixed, segment, axis=1, keepdims=False)
        logits: Any = ExitHead(cfg, exits.num_labels).apply({"params": head}, vector)
        score = RULES[rule](logits, temperatures[segment])
        needed = thresholds.at[row, segment].get(mode="clip")
        return logits, score, (score >= needed) | (segment == last)

    def step(state: State) -> State:
        pool, out, segment = state.pool, state.out, state.segment
        start = state.tile * tile
        part = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, tile), pool)
        stream = unstored(part.hidden, cfg.residual_dtype)
        hidden, mixed = run_layers(stream, part.mixed, part.mask, segment)
        logits, score, leave = leave_or_stay(mixed, part.row, segment)

        real = start + jnp.arange(tile) < state.alive
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
        written = Pool(stored(hidden), mixed, part.mask, part.row)
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
            out,
            segment + done.astype(jnp.int32),
            jnp.where(done, 0, state.tile + 1),
            jnp.where(done, stayed, state.alive),
            jnp.where(done, 0, stayed),
        )

    zero = jnp.zeros((), jnp.int32)
    state = State(
        _first_pool(cfg, len(exits.layers), params["bert"], batch, tile),
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


def _first_pool(cfg: Any, exits: int, bert: Any, batch: Batch, tile: int) -> Pool:
    """The embedded rows, padded to whole tiles so that no slice is ever clamped."""
    batch = _pad_to_tiles(batch, tile)
    rows = batch.ids.shape[0]
    hidden: Any = BertModel(cfg).apply({"params": bert}, batch, method="embed")
    mixed = jnp.zeros((rows, exits, cfg.hidden_size), jnp.float32)
    return Pool(stored(hidden), mixed, batch.mask, jnp.arange(rows, dtype=jnp.int32))


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
    model: EarlyExitBert, variables: Any, batch: Batch, rows: Array, tile: int
) -> Array:
    cfg, params = cut(model.cfg, model.exits), variables["params"]
    column = mix_columns(params["heads"]["mix"], model.exits)[:, -1:]
    head = jax.tree.map(lambda leaf: leaf[-1], params["heads"]["exits"])
    encoder = BertModel(cfg).bind({"params": params["bert"]})
    total = batch.ids.shape[0]
    batch = _pad_to_tiles(batch, tile)

    def run(i: Array, logits: Array) -> Array:
        part = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, i * tile, tile), batch)
        _, mixed, _ = encoder.encode(
            encoder.embed(part),
            part.mask,
            carry=jnp.zeros((tile, 1, cfg.hidden_size), jnp.float32),
            columns=column,
            read=lambda mixed, x, col: (mix_in(mixed, col, x, part.mask, model.exits), None),
        )
        found: Any = ExitHead(cfg, model.exits.num_labels).apply({"params": head}, mixed[:, 0])
        return lax.dynamic_update_slice_in_dim(logits, found, i * tile, 0)

    logits = jnp.zeros((batch.ids.shape[0], model.exits.num_labels), jnp.float32)
    return lax.fori_loop(0, (rows + tile - 1) // tile, run, logits)[:total]


def _pad_to_tiles(batch: Batch, tile: int) -> Batch:
    extra = -batch.ids.shape[0] % tile
    return jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, extra), (0, 0))), batch)
