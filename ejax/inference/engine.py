"""Early exit for a whole batch as one compiled `lax.while_loop`.

N rows wait on the device; tiles of B rows run through one segment (the layers
between one exit and the next) at a time. A tile is gathered from where its rows stood
and written to the front, so that the work done is that of the rows still alive: nobody
waits for the slowest row, no shape changes, nothing returns to the host before the end.

Axes: N rows of the pool, B rows of a tile, T tokens, D width, L layers, E exits,
C classes.
"""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ejax.hardware import free_bytes, target
from ejax.inference.policy import (
    Agreed,
    Decision,
    broadcast_thresholds,
    check_rule,
    check_temperatures,
    nothing_agreed,
    score_exit,
)
from ejax.models.bert import Batch, BertModel, EncoderLayer, turn
from ejax.models.early_exit import EarlyExitBert, cut
from ejax.models.heads import ExitHead, mix_columns
from ejax.models.heads import pool as pool_tokens
from ejax.models.ngrams import NGramExit

Array = jax.Array


SMALL_TILE = 8  # rows; below it a row's score would depend on the tile
CHECKED_BYTES = 1 << 28  # smaller pools are not asked whether they fit


class Rows(NamedTuple):
    """What is known of the rows still alive, packed to the front; whole tiles (N')."""

    row: Array  # int32 [N'], the row's place in the input
    place: Array  # int32 [N'], where the row stood in the segment before
    agreed: Agreed  # int32 [N'] each


class State(NamedTuple):
    hidden: Array  # `stored` <residual dtype>[N', T, D], in the order of the segment before
    mixed: Array  # float32 [N', E - 1, D], the later exits' mixes so far, in that order
    pool: Rows
    left: Array  # int32 [N' + B], the rows that `out` speaks of; N' stands for nobody
    out: Decision  # [N' + B, ...], in the order in which rows leave
    every: Array | None  # float32 [N' + B, E, C], for `exit_logits`
    segment: Array  # int32, the exit being worked towards
    start: Array  # int32, rows of this segment already run
    alive: Array  # int32, rows to run in this segment
    stayed: Array  # int32, rows of this segment already packed for the next
    gone: Array  # int32, rows that have left


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
      ValueError: on a wrong shape, threshold, temperature, rule or tile, for ids outside the
        vocabulary (unless they are on a device already), and for a pool that does not fit into
        the device's memory.
    """
    found: Decision = _run(
        model, variables, batch, thresholds, temperatures, rule, tile, rows, devices
    )
    return found


def exit_logits(
    model: EarlyExitBert,
    variables: Any,
    batch: Batch,
    *,
    tile: int = 32,
    rows: Any = None,
    devices: Sequence[jax.Device] | None = None,
) -> Array:
    """Every exit's logits, float32 [N, E, C], as `early_exit` computes them, in one run.

    Its loop, with nobody leaving before the end. Arguments and errors as of `early_exit`; what
    is padding gets zeros.
    """
    found: Array = _run(
        model, variables, batch, 2.0, None, "confidence", tile, rows, devices, every=True
    )
    return found


def _run(
    model: EarlyExitBert, variables: Any, batch: Batch, thresholds: Any, temperatures: Any,
    rule: str, tile: int, rows: Any, devices: Sequence[jax.Device] | None, *, every: bool = False,
) -> Any:  # fmt: skip
    batch, tile, rows = _checked(model, batch, tile, rows)
    total, exits = batch.ids.shape[0], len(model.exits.layers)
    weights, levels = prepare(model, variables), broadcast_thresholds(thresholds, total, exits)
    temperatures, rule = check_temperatures(temperatures, exits), check_rule(rule)
    check_memory(model, total, batch.ids.shape[1], tile, devices or jax.local_devices()[:1])
    if devices is None or len(devices) == 1:
        weights = jax.device_put(weights, devices[0]) if devices else weights
        return run_pool(model, weights, batch, levels, temperatures, rows, rule, tile, every)
    count = len(devices)
    run = _on_devices(model, rule, min(tile, -(-total // count)), every, tuple(devices))
    shares = np.maximum(np.asarray(rows) - np.arange(count) + count - 1, 0) // count
    dealt = jax.tree.map(lambda leaf: _deal(leaf, count), (batch, levels))
    found = run(weights, *dealt, temperatures, shares.astype(np.int32))
    return jax.tree.map(
        lambda leaf: leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[2:])[:total], found
    )


@functools.lru_cache
def _on_devices(
    model: EarlyExitBert, rule: str, tile: int, every: bool, devices: tuple[jax.Device, ...]
) -> Callable[..., Any]:
    def one(
        weights: Prepared, batch: Batch, levels: Array, temperatures: Array, rows: Array
    ) -> Any:
        return run_pool(model, weights, batch, levels, temperatures, rows, rule, tile, every)

    return jax.pmap(one, "devices", in_axes=(None, 0, 0, None, 0), devices=devices)


def tile_sizes(tile: int) -> tuple[int, ...]:
    """B, and where it is large enough a smaller size for the rows that fill no whole tile."""
    small = max(SMALL_TILE, tile // 4)
    return (tile, small) if 2 * small <= tile else (tile,)


def in_small_tiles(rest: Any, tile: int) -> Any:
    """Whether rows that fill no whole tile go in small ones, where those are fewer rows."""
    small = tile_sizes(tile)[-1]
    return rest <= (tile // small - 1) * small


def tiles(rows: int, tile: int) -> list[tuple[int, int]]:
    """The (size, count) of the tiles that one segment runs for so many rows."""
    whole, rest = divmod(rows, tile)
    small = tile_sizes(tile)[-1]
    if rest and in_small_tiles(rest, tile):
        return [(tile, whole), (small, -(-rest // small))]
    return [(tile, whole + (rest > 0))]


def _deal(leaf: Array, count: int) -> np.ndarray:
    """[N, ...] -> [devices, n, ...], row i to device i % count; rows of zeros fill up."""
    values = np.asarray(leaf)
    values = np.pad(values, [(0, -len(values) % count)] + [(0, 0)] * (values.ndim - 1))
    return values.reshape(-1, count, *values.shape[1:]).swapaxes(0, 1)


def pool_bytes(model: EarlyExitBert, rows: int, length: int, tile: int) -> int:
    """Memory that the pool [N, T] and one tile at work take, weights apart."""
    cfg, exits = model.cfg, model.exits
    d, f, h = cfg.hidden_size, cfg.intermediate_size, cfg.num_attention_heads
    stream = (2 if cfg.residual_dtype == "bfloat16" else 4) * length * d
    mixes = 4 * (len(exits.encoder.layers) - 1) * d if exits.mix == "softmax" else 0
    grams = 4 * 2 * length * (exits.rank + 1) if exits.has_zero else 0  # of all rows at once
    row = (
        grams + stream + mixes + 4 * (3 * length + 2 * len(exits.layers) + 3 * exits.num_labels + 7)
    )
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
        raise ValueError(
            f"a pool of {rows} rows of {length} tokens needs {needed / 1e9:.1f} GB and "
            f"{devices[0]} has {free / 1e9:.1f} GB free: lower the rows of the pool (of a "
            f"classifier, Shapes.pool_tokens), or residual_dtype to bfloat16."
        )


def replicate(tree: Any, devices: Sequence[jax.Device] | None = None) -> Any:
    """Whole on every device, as a mapped program takes and returns it: else it compiles twice."""
    mesh = Mesh(np.asarray(devices or jax.local_devices()), ("devices",))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def _checked(model: EarlyExitBert, batch: Batch, tile: int, rows: Any) -> tuple[Batch, int, Any]:
    """Numpy stays numpy: an operation before the program costs one text as much as a layer."""
    if tile < 1:
        raise ValueError(f"tile must be at least 1 row. Got {tile}.")
    batch = batch.arrays()
    total = batch.ids.shape[0]
    if total == 0:
        raise ValueError("batch must hold at least one row. Got none.")
    sizes = {"ids": model.cfg.vocab_size, "types": model.cfg.type_vocab_size}
    for name, size in sizes.items():
        values = getattr(batch, name)
        if isinstance(values, np.ndarray) and isinstance(batch.mask, np.ndarray):
            wrong = values[(batch.mask != 0) & ((values < 0) | (values >= size))]
            if wrong.size:
                raise ValueError(
                    f"batch.{name} must be at least 0 and below {size}. Got {wrong[0]}."
                )
    rows = total if rows is None else rows
    if not isinstance(rows, Array) and not 0 <= rows <= total:
        raise ValueError(f"rows must be between 0 and the {total} of the batch. Got {rows}.")
    rows = jnp.asarray(rows, jnp.int32) if isinstance(rows, Array) else np.int32(rows)
    return batch, min(tile, total), rows


class Prepared(NamedTuple):
    """A model's weights as the engine reads them: see `prepare`."""

    bert: Any  # {"embeddings": …}
    layers: tuple[Any, ...]  # L trees
    columns: Array  # float32 [L, E], `mix_columns`, of the exits after layers
    heads: tuple[Any, ...]  # one tree per exit after a layer
    ngrams: Any = None  # of exit 0


def prepare(model: EarlyExitBert, variables: Any) -> Prepared:
    """Weights ready for many calls: cast to the compute dtype, one tree per layer, on the device.

    Biases, norms, embeddings and the mix stay float32. Layers stand apart because reading
    layer i of a stack inside a loop copies it for every tile: 5 % of the time at 1024 tokens
    of width 384 on a CPU. What is prepared already is returned as it is.
    """
    if isinstance(variables, Prepared):
        return variables
    params, dtype = variables["params"], jnp.dtype(model.cfg.dtype)
    turns = target() == "cpu" and dtype == jnp.float32

    def projection(leaf: Any) -> bool:
        return isinstance(leaf, Mapping) and "kernel" in leaf

    def ready(leaf: Any) -> Any:
        """A projection, {"kernel", "bias"}, or an array."""
        if not projection(leaf):
            return leaf
        kernel = jnp.asarray(leaf["kernel"], dtype)
        if turns:
            return {"turned": turn(kernel, leaf["bias"].size), "bias": leaf["bias"]}
        return {"kernel": kernel, "bias": leaf["bias"]}

    def unstacked(tree: Any, count: int) -> tuple[Any, ...]:
        tree = jax.tree.map(jnp.asarray, tree)
        rows = (jax.tree.map(operator.itemgetter(i), tree) for i in range(count))
        return tuple(jax.tree.map(ready, row, is_leaf=projection) for row in rows)

    return Prepared(
        {"embeddings": jax.tree.map(jnp.asarray, params["bert"]["embeddings"])},
        unstacked(params["bert"]["layers"], model.exits.num_layers),
        mix_columns(jnp.asarray(params["heads"]["mix"]), model.exits.encoder),
        unstacked(params["heads"]["exits"], len(model.exits.encoder.layers)),
        jax.tree.map(jnp.asarray, params["ngrams"]) if model.exits.has_zero else None,
    )


@partial(jax.jit, static_argnums=(0, 6, 7, 8, 9))
def run_pool(
    model: EarlyExitBert,
    weights: Prepared,
    batch: Batch,
    thresholds: Array,
    temperatures: Array,
    rows: Array | int,
    rule: str,
    tile: int,
    every: bool = False,
    layer: "RunLayer | None" = None,
) -> Any:
    """`early_exit`'s program, on checked arguments, or that of `exit_logits`.

    `layer` stands in for `run_layer`.
    """
    run_one = layer or run_layer
    batch, thresholds, temperatures = jax.tree.map(jnp.asarray, (batch, thresholds, temperatures))
    cfg, exits, zero = cut(model.cfg, model.exits), model.exits.encoder, int(model.exits.has_zero)
    total, last, mixes = batch.ids.shape[0], len(exits.layers) - 1, exits.mix == "softmax"
    batch = _pad_to_tiles(batch, tile)
    size, length = batch.ids.shape
    firsts = (0, *exits.layers[:-1])
    carried = last if mixes else 0
    widths = tile_sizes(tile)
    small = widths[-1]

    def run_segment(
        number: int, width: int, start: Array, pool: Rows, hidden: Array, mixed: Array
    ) -> tuple[Array, Array, Array]:
        """The first `width` rows of a tile through one segment.

        Returns the tile's stream [B, T, D], its mixes [B, E - 1, D] and the logits [B, C]; the
        rows that were not run keep their stream and mixes.
        """
        old = lax.dynamic_slice_in_dim(hidden, start, tile)
        old_mixed = lax.dynamic_slice_in_dim(mixed, start, tile)
        pool = jax.tree.map(lambda leaf: leaf[:width], pool)
        part = jax.tree.map(lambda leaf: leaf[pool.row], batch)
        x: Any
        sums = jnp.zeros((width, last + 1 - number, cfg.hidden_size))  # of this exit and later ones
        if number == 0:
            x = BertModel(cfg).apply({"params": weights.bert}, part, method="embed")
        else:
            x = unstored(hidden[pool.place], cfg.residual_dtype)
            if mixes:
                sums = mixed[pool.place, number - 1 :]
        for i in range(firsts[number], exits.layers[number]):
            x = run_one(cfg, weights, i, x, part.mask)
            vector = pool_tokens(x, part.mask, exits)
            sums = sums + weights.columns[None, i, number:, None] * vector[:, None]
        logits = run_head(cfg, weights, number, exits, sums[:, 0])
        seen = jnp.pad(sums[:, 1:], ((0, 0), (number, 0), (0, 0)))[:, :carried]
        return (
            jnp.concatenate([stored(x), old[width:]]),
            jnp.concatenate([seen, old_mixed[width:]]),
            jnp.pad(logits, ((0, tile - width), (0, 0))),
        )

    segments = [partial(run_segment, n, width) for width in widths for n in range(last + 1)]

    def step(state: State) -> State:
        segment, start, rest = state.segment, state.start, state.alive - state.start
        few = in_small_tiles(rest, tile)
        width = jnp.where(few, small, tile)
        pool = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, tile), state.pool)
        stream, seen, logits = lax.switch(
            segment + jnp.where(few, last + 1, 0),
            segments, start, pool, state.hidden, state.mixed,
        )  # fmt: skip
        exit = segment + zero
        score, agreed = score_exit(rule, logits, temperatures[exit], pool.agreed, last + 1 + zero)
        real = jnp.arange(tile) < jnp.minimum(width, rest)
        leave = real & ((score >= thresholds[pool.row, exit]) | (segment == last))
        stay = real & ~leave

        # No row stands before its index: what is overwritten here has been read.
        hidden = lax.dynamic_update_slice_in_dim(state.hidden, stream, start, 0)
        mixed = lax.dynamic_update_slice_in_dim(state.mixed, seen, start, 0)
        place = start + jnp.arange(tile)
        found = Decision(logits, jnp.full((tile,), exit), score)
        left, out = _append((state.left, state.out), (pool.row, found), leave, state.gone)
        all_logits = state.every
        if all_logits is not None:  # nobody leaves before the end: rows stand as in the input
            corner = (start, exit, 0)
            all_logits = lax.dynamic_update_slice(all_logits, logits[:, None], corner)
        stayed = state.stayed + stay.sum(dtype=jnp.int32)
        done = width >= rest
        return State(
            hidden,
            mixed,
            _append(state.pool, Rows(pool.row, place, agreed), stay, state.stayed),
            left,
            out,
            all_logits,
            segment + done.astype(jnp.int32),
            jnp.where(done, 0, start + width),
            jnp.where(done, stayed, state.alive),
            jnp.where(done, 0, stayed),
            state.gone + leave.sum(dtype=jnp.int32),
        )

    def zeros(*shape: int, dtype: Any = jnp.int32) -> Array:
        return jnp.zeros(shape, dtype)

    state = State(
        hidden=stored(zeros(size + tile, length, cfg.hidden_size, dtype=cfg.residual_dtype)),
        mixed=zeros(size + tile, carried, cfg.hidden_size, dtype=jnp.float32),
        pool=Rows(
            jnp.minimum(jnp.arange(size + tile), size - 1),
            zeros(size + tile),
            nothing_agreed((size + tile,)),
        ),
        left=jnp.full((size + tile,), size),
        out=Decision(
            zeros(size + tile, exits.num_labels, dtype=jnp.float32),
            zeros(size + tile),
            zeros(size + tile, dtype=jnp.float32),
        ),
        every=(
            zeros(size + tile, last + 1 + zero, exits.num_labels, dtype=jnp.float32)
            if every
            else None
        ),
        segment=zeros(),
        start=zeros(),
        alive=jnp.minimum(rows, total),
        stayed=zeros(),
        gone=zeros(),
    )
    if zero:
        logits: Any = NGramExit(model.exits).apply({"params": weights.ngrams}, batch)
        state = _leave_at_zero(state, logits, thresholds, temperatures[0], rule, last + 2)
    state = lax.while_loop(lambda s: (s.segment <= last) & (s.alive > 0), step, state)
    order = jnp.argsort(state.left)[:total]  # rows 0, 1, ... and then nobody
    ordered = jax.tree.map(lambda leaf: leaf[order], state.out)
    if state.every is not None:
        ordered = state.every[:total]
    real = jnp.arange(total) < rows
    return jax.tree.map(
        lambda leaf: jnp.where(real.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, 0), ordered
    )


def _leave_at_zero(
    state: State, logits: Array, thresholds: Array, temperature: Array, rule: str, exits: int
) -> State:
    """The state before the first layer, once the rows that exit 0 is sure of have left.

    Args:
      logits: float32 [N', C], exit 0's; the first `state.alive` rows are real.
    """
    size = len(logits)
    nobody = nothing_agreed((size,))
    score, agreed = score_exit(rule, logits, temperature, nobody, exits)
    real = jnp.arange(size) < state.alive
    surest = jnp.pad(thresholds[:, 0], (0, size - len(thresholds)))
    leave = real & (score >= surest)
    rows, none = jnp.arange(size), jnp.int32(0)
    found = Decision(logits, jnp.zeros(size, jnp.int32), score)
    left, out = _append((state.left, state.out), (rows, found), leave, none)
    pool = _append(state.pool, Rows(rows, rows, agreed), real & ~leave, none)
    every = state.every
    if every is not None:
        every = every.at[:size, 0].set(logits)
    gone = leave.sum(dtype=jnp.int32)
    return state._replace(
        left=left, out=out, pool=pool, every=every, gone=gone, alive=state.alive - gone
    )


def _append(whole: Any, piece: Any, chosen: Array, end: Array) -> Any:
    """Writes the chosen rows of a tile [B, ...] behind the first `end` rows of `whole`."""
    order, count = jnp.argsort(~chosen, stable=True), chosen.sum()

    def write(old: Array, new: Array) -> Array:
        kept = lax.dynamic_slice_in_dim(old, end, len(chosen))
        fits = (jnp.arange(len(chosen)) < count).reshape(-1, *[1] * (new.ndim - 1))
        return lax.dynamic_update_slice_in_dim(old, jnp.where(fits, new[order], kept), end, 0)

    return jax.tree.map(write, whole, piece)


RunLayer = Callable[[Any, Prepared, int, Array, Array], Array]


def run_layer(cfg: Any, weights: Prepared, i: int, x: Array, mask: Array) -> Array:
    """The output of layer i, from 0: [B, T, D]."""
    out: Any = EncoderLayer(cfg).apply({"params": weights.layers[i]}, x, mask)
    return out


def run_head(cfg: Any, weights: Prepared, number: int, exits: Any, mixed: Array) -> Array:
    """Logits [B, C] of one exit, from its mix [B, D] of the pooled layers up to its own."""
    head = ExitHead(cfg, exits.num_labels)
    logits: Any = head.apply({"params": weights.heads[number]}, mixed)
    return logits


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

    The baseline of every speed-up: no exit 0, no early head, no packing; the rows that fill no
    whole tile go in small ones, as in `early_exit`.

    Args:
      batch: a `Batch`, int [N, T] each.
      tile: rows per step, B.
      rows: only so many rows at the front are real; None means all.

    Returns:
      float32 [N, C]; zeros for padding rows of tiles that were not run.
    """
    batch, tile, rows = _checked(model, batch, tile, rows)
    return _full_depth(model, prepare(model, variables), batch, rows, tile)


@partial(jax.jit, static_argnums=(0, 4))
def _full_depth(
    model: EarlyExitBert, weights: Prepared, batch: Batch, rows: Array, tile: int
) -> Array:
    cfg, exits = cut(model.cfg, model.exits), model.exits.encoder
    total = batch.ids.shape[0]
    batch = _pad_to_tiles(batch, tile)
    widths = tile_sizes(tile)
    small = widths[-1]

    def run(width: int, start: Array, logits: Array) -> Array:
        part = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, width), batch)
        x: Any = BertModel(cfg).apply({"params": weights.bert}, part, method="embed")
        mixed = jnp.zeros((width, cfg.hidden_size))
        for layer in range(exits.num_layers):
            x = run_layer(cfg, weights, layer, x, part.mask)
            mixed = mixed + weights.columns[layer, -1] * pool_tokens(x, part.mask, exits)
        found = run_head(cfg, weights, len(exits.layers) - 1, exits, mixed)
        return lax.dynamic_update_slice_in_dim(logits, found, start, 0)

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        start, logits = state
        few = in_small_tiles(rows - start, tile)
        runs = [partial(run, width) for width in widths]
        logits = lax.switch(few.astype(jnp.int32), runs, start, logits)  # one is taken as it is
        return start + jnp.where(few, small, tile), logits

    logits = jnp.zeros((batch.ids.shape[0], exits.num_labels), jnp.float32)
    return lax.while_loop(lambda s: s[0] < rows, step, (jnp.int32(0), logits))[1][:total]


def _pad_to_tiles(batch: Batch, tile: int) -> Batch:
    extra = -batch.ids.shape[0] % tile
    return jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, extra), (0, 0))), batch)
