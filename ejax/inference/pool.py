"""The loop of early exit: tiles of a pool of rows, segment by segment, as one program.

A segment is the layers between one exit and the next. `Waiting` lists the rows still alive, and
for each the place where the segment before left its hidden states. A tile takes the next B of
the list, gathers their hidden states, runs the segment, and writes the new ones where the tile
started. Rows that stay are listed again at the front; rows that leave go to the answers.
Eight rows in tiles of four, of which B, C and F leave at the first exit:

    segment 0    row     A B C D | E F G H
                 place   0 1 2 3 | 4 5 6 7
                 hidden  A B C D | E F G H     each tile writes where it started
                 leave     B C   |   F         to the answers: B C F

    segment 1    row     A D E G | H . . .     the five that stay, packed to the front
                 place   0 3 4 6 | 7 . . .     where segment 0 left them
                 hidden  A D E G | H . . .     two tiles again; what lies behind is not read

A row never stands before its index in the list: place >= index. So what a tile overwrites has
been read already, and no second copy of the pool is needed. At the end the answers, which lie in
the order in which rows left, go back to the order of the input.

Axes: N rows of the input, N' of whole tiles, B rows of a tile, T tokens, D width, E exits,
C classes.
"""

from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from ejax.config import BertConfig, ExitConfig
from ejax.inference.policy import Decision
from ejax.inference.prepared import Prepared, RunLayer, run_head, run_layer
from ejax.inference.schedule import in_small_tiles, tile_sizes
from ejax.models.bert import Batch, BertModel
from ejax.models.early_exit import EarlyExitBert, cut
from ejax.models.heads import NGramExit, text_of
from ejax.models.heads import pool as pool_tokens
from ejax.tasks import task_of

Array = jax.Array


class Given(NamedTuple):
    """What the loop reads and never changes; all but the last five is known when it compiles."""

    cfg: BertConfig
    exits: ExitConfig  # those after layers; one segment each
    zero: int  # exits before the first layer, 0 or 1
    tile: int  # B
    layer: RunLayer
    weights: Prepared
    batch: Batch  # int [N', T] each
    thresholds: Array  # float32 [N, E]
    temperatures: Array  # float32 [E], or [E, K]
    zero_logits: Array | None  # float32 [N', C], exit 0's, which later exits add to their own

    @property
    def last(self) -> int:
        """The last segment."""
        return len(self.exits.layers) - 1

    @property
    def mixes(self) -> int:
        """How many exits' mixes a row carries along: those of the exits after the next one."""
        return self.last if self.exits.mix == "softmax" else 0


class Waiting(NamedTuple):
    """The rows still alive, packed to the front of [N' + B] entries."""

    row: Array  # int32, the row's number in the input
    place: Array  # int32, where the segment before left its hidden states


class LoopState(NamedTuple):
    hidden: Array  # `stored` <residual dtype>[N' + B, T, D], as tiles of the last segment left it
    mixed: Array  # float32 [N' + B, mixes, P], the later exits' mixes so far, in that order
    waiting: Waiting
    answered_row: Array  # int32 [N' + B], whose answer stands there; N' stands for nobody
    answers: Decision  # [N' + B, ...], in the order in which rows leave
    all_logits: Array | None  # float32 [N' + B, E, C], where every exit's are asked for
    segment: Array  # int32, from 0
    start: Array  # int32, rows of this segment already run
    alive: Array  # int32, rows to run in this segment
    stayed: Array  # int32, rows of this segment already listed for the next
    answered: Array  # int32, rows that have left


@partial(jax.jit, static_argnames=("model", "tile", "every_exit", "layer"))
def run_pool(
    model: EarlyExitBert,
    weights: Prepared,
    batch: Batch,
    thresholds: Array,
    temperatures: Array,
    rows: Array | int,
    zero_logits: Array | None = None,
    *,
    tile: int,
    every_exit: bool = False,
    layer: RunLayer = run_layer,
) -> Any:
    """`early_exit`'s program, on checked arguments.

    Args:
      batch: int [N, T] each.
      thresholds: float32 [N, E].
      temperatures: float32 [E].
      rows: int32, how many at the front are real.
      zero_logits: float32 [N, C] of an exit 0 that ran before, where the model has none.
      every_exit: `exit_logits`'s program; nobody may leave before the last exit.
      layer: stands in for `run_layer`, where the rest of a step is timed.

    Returns:
      A `Decision` [N, ...], or with `every_exit` float32 [N, E, C]; zeros for rows of padding.
    """
    batch, thresholds, temperatures = jax.tree.map(jnp.asarray, (batch, thresholds, temperatures))
    total, padded = batch.ids.shape[0], pad_to_tiles(batch, tile)
    if model.exits.has_zero:
        zero_logits, _ = NGramExit(model.exits).apply({"params": weights.ngrams}, padded)
    elif zero_logits is not None:
        zero_logits = pad_to_tiles(jnp.asarray(zero_logits), tile)
    given = Given(
        cut(model.cfg, model.exits), model.exits.encoder, int(model.exits.has_zero), tile, layer,
        weights, padded, thresholds, temperatures, zero_logits,
    )  # fmt: skip
    state = first_state(given, total, rows, every_exit)
    if given.zero:
        state = leave_at_zero(given, state)
    state = lax.while_loop(
        lambda state: (state.segment <= given.last) & (state.alive > 0), partial(step, given), state
    )
    order = jnp.argsort(state.answered_row)[:total]  # rows 0, 1, ... and then nobody
    in_order = jax.tree.map(lambda leaf: leaf[order], state.answers)
    if state.all_logits is not None:
        in_order = state.all_logits[:total]
    real = jnp.arange(total) < rows
    return jax.tree.map(lambda leaf: jnp.where(like(leaf, real), leaf, 0), in_order)


def first_state(given: Given, total: int, rows: Array | int, every_exit: bool) -> LoopState:
    """Nothing is run yet; the first `rows` of the batch wait, in their order.

    There is room for B entries more than whole tiles need: a tile may be read and written from any
    entry on, the last one included.
    """
    cfg, exits = given.cfg, given.exits
    size, length = given.batch.ids.shape
    room = size + given.tile

    def zeros(*shape: int, dtype: Any = jnp.int32) -> Array:
        return jnp.zeros(shape, dtype)

    return LoopState(
        hidden=stored(zeros(room, length, cfg.hidden_size, dtype=cfg.residual_dtype)),
        mixed=zeros(room, given.mixes, cfg.hidden_size * exits.pooled, dtype=jnp.float32),
        waiting=Waiting(jnp.minimum(jnp.arange(room), size - 1), zeros(room)),
        answered_row=jnp.full((room,), size),
        answers=Decision(
            zeros(room, task_of(exits).outputs, dtype=jnp.float32),
            zeros(room),
            zeros(room, dtype=jnp.float32),
        ),
        all_logits=(
            zeros(room, given.last + 1 + given.zero, task_of(exits).outputs, dtype=jnp.float32)
            if every_exit
            else None
        ),
        segment=zeros(),
        start=zeros(),
        alive=jnp.minimum(rows, total),
        stayed=zeros(),
        answered=zeros(),
    )


def leave_at_zero(given: Given, state: LoopState) -> LoopState:
    """Rows that exit 0 is sure of leave before the first layer."""
    logits = given.zero_logits
    assert logits is not None
    size = logits.shape[0]
    row = jnp.arange(size)
    state = take_exit(
        given, state, Waiting(row, row), logits, 0,
        threshold=jnp.pad(given.thresholds[:, 0], (0, size - given.thresholds.shape[0])),
        real=row < state.alive, last=False, start=0,
    )  # fmt: skip
    return state._replace(alive=state.stayed, stayed=jnp.zeros_like(state.stayed))


def step(given: Given, state: LoopState) -> LoopState:
    """The body of the loop: one tile through its segment, and its rows to where they go next."""
    tile, last, start = given.tile, given.last, state.start
    rest = state.alive - start
    small = in_small_tiles(rest, tile)
    width = jnp.where(small, tile_sizes(tile)[-1], tile)
    rows = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, tile), state.waiting)
    # One branch per tile size and segment, of which one runs.
    hidden, mixed, logits = lax.switch(
        state.segment + jnp.where(small, last + 1, 0),
        [
            partial(run_segment, given, segment, size)
            for size in tile_sizes(tile)
            for segment in range(last + 1)
        ],
        start, rows, state.hidden, state.mixed,
    )  # fmt: skip
    if given.zero_logits is not None and given.weights.evidence is not None:
        weight = given.weights.evidence[state.segment]
        logits = logits + weight * given.zero_logits[rows.row]
    exit = state.segment + given.zero
    state = take_exit(
        given, state, rows._replace(place=start + jnp.arange(tile)), logits, exit,
        threshold=given.thresholds[rows.row, exit],
        real=jnp.arange(tile) < jnp.minimum(width, rest), last=state.segment == last, start=start,
    )  # fmt: skip
    done = width >= rest  # with this segment
    return state._replace(
        # No row stands before its index: what is overwritten here has been read.
        hidden=lax.dynamic_update_slice_in_dim(state.hidden, hidden, start, 0),
        mixed=lax.dynamic_update_slice_in_dim(state.mixed, mixed, start, 0),
        segment=state.segment + done.astype(jnp.int32),
        start=jnp.where(done, 0, start + width),
        alive=jnp.where(done, state.stayed, state.alive),
        stayed=jnp.where(done, 0, state.stayed),
    )


def take_exit(
    given: Given,
    state: LoopState,
    rows: Waiting,
    logits: Array,
    exit: Array | int,
    *,
    threshold: Array,
    real: Array,
    last: Array | bool,
    start: Array | int,
) -> LoopState:
    """Rows that an exit is sure of go to the answers, the others on the list of the next segment.

    Args:
      rows: [B] each, with the place where their hidden states stand from now on.
      logits: float32 [B, C], of that exit.
      threshold: float32 [B].
      real: bool [B]; the others are padding, and go nowhere.
      last: whether nobody may go on.
      start: of the tile, for `all_logits`.
    """
    score = task_of(given.exits).score(logits, given.temperatures[exit])
    chex.assert_equal_shape([score, threshold, real, rows.row])
    leave = real & ((score >= threshold) | last)
    stay = real & ~leave
    decision = Decision(logits, jnp.full(score.shape, exit), score)
    answered_row, answers = append(
        (state.answered_row, state.answers), (rows.row, decision), leave, state.answered
    )
    all_logits = state.all_logits
    if all_logits is not None:  # nobody leaves before the end: rows stand as in the input
        all_logits = lax.dynamic_update_slice(all_logits, logits[:, None], (start, exit, 0))
    return state._replace(
        waiting=append(state.waiting, rows, stay, state.stayed),
        answered_row=answered_row,
        answers=answers,
        all_logits=all_logits,
        stayed=state.stayed + stay.sum(dtype=jnp.int32),
        answered=state.answered + leave.sum(dtype=jnp.int32),
    )


def run_segment(
    given: Given, segment: int, width: int, start: Array, rows: Waiting, hidden: Array, mixed: Array
) -> tuple[Array, Array, Array]:
    """The first `width` rows of a tile through the layers of one segment and its exit's head.

    Args:
      rows: [B] each.
      hidden, mixed: as in `LoopState`.

    Returns:
      What to write at `start`: hidden [B, T, D] and mixes [B, mixes, P], where the rows that were
      not run keep what stands there; and logits [B, C].
    """
    cfg, exits, weights, last = given.cfg, given.exits, given.weights, given.last
    old_hidden = lax.dynamic_slice_in_dim(hidden, start, given.tile)
    old_mixed = lax.dynamic_slice_in_dim(mixed, start, given.tile)
    rows = jax.tree.map(lambda leaf: leaf[:width], rows)
    tokens = jax.tree.map(lambda leaf: leaf[rows.row], given.batch)
    texts = text_of(tokens, exits)
    x: Any
    sums = jnp.zeros((width, last + 1 - segment, cfg.hidden_size * exits.pooled))  # of this exit on
    if segment == 0:
        x = BertModel(cfg).apply({"params": weights.bert}, tokens, method="embed")
    else:
        x = unstored(hidden[rows.place], cfg.residual_dtype)
        if given.mixes:
            sums = mixed[rows.place, segment - 1 :]
    for i in range((0, *exits.layers)[segment], exits.layers[segment]):
        x = given.layer(cfg, weights, i, x, texts)
        vector = pool_tokens(x, texts, exits)
        sums = sums + weights.columns[None, i, segment:, None] * vector[:, None]
    logits = run_head(cfg, weights, segment, exits, sums[:, 0])
    chex.assert_shape(x, (width, *old_hidden.shape[1:]))
    chex.assert_shape(logits, (width, task_of(exits).outputs))
    later = jnp.pad(sums[:, 1:], ((0, 0), (segment, 0), (0, 0)))[:, : given.mixes]
    return (
        jnp.concatenate([stored(x), old_hidden[width:]]),
        jnp.concatenate([later, old_mixed[width:]]),
        jnp.pad(logits, ((0, given.tile - width), (0, 0))),
    )


def append(packed: Any, rows: Any, chosen: Array, count: Array) -> Any:
    """Writes the chosen rows of a tile [B, ...] behind the first `count` entries of `packed`."""
    rows_of_tile = chosen.shape[0]
    order, number = jnp.argsort(~chosen, stable=True), chosen.sum()

    def write(old: Array, new: Array) -> Array:
        behind = lax.dynamic_slice_in_dim(old, count, rows_of_tile)
        is_new = like(new, jnp.arange(rows_of_tile) < number)
        return lax.dynamic_update_slice_in_dim(old, jnp.where(is_new, new[order], behind), count, 0)

    return jax.tree.map(write, packed, rows)


def like(leaf: Array, of_rows: Array) -> Array:
    """[N] -> [N, 1, ...], one value per row of `leaf`."""
    return of_rows.reshape(-1, *[1] * (leaf.ndim - 1))


def stored(x: Array) -> Array:
    """bfloat16 as its bits, uint16: XLA's CPU backend widens the whole pool to update bfloat16."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def unstored(x: Array, dtype: str) -> Array:
    """The inverse of `stored`."""
    return lax.bitcast_convert_type(x, dtype) if x.dtype == jnp.uint16 else x


def pad_to_tiles(rows: Any, tile: int) -> Any:
    """[N, ...] -> [N', ...] for a batch or an array of two axes; the rows added are zeros."""
    return jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, -leaf.shape[0] % tile), (0, 0))), rows)
