"""Seconds per layer, head and gather for each shape of tile on this machine.

The engine takes its tiles from here, and `Profile.predict` the cost of any thresholds.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from ejax.bundle import Bundle
from ejax.config import Dtype
from ejax.data.batches import bucket_of
from ejax.hardware import describe
from ejax.inference.cost import Profile, Seconds
from ejax.inference.engine import (
    SMALL_TILE,
    Prepared,
    prepare,
    run_head,
    run_layer,
    run_pool,
    tile_sizes,
)
from ejax.inference.policy import broadcast_thresholds, check_temperatures
from ejax.models.bert import Batch
from ejax.models.heads import pool as pool_tokens

TILE_TOKENS = (512, 1024, 2048)
SECONDS, LEAST_RUNS = 0.15, 5  # measured per piece: at least so long, and so often
PREFERENCE = 0.02  # a smaller tile that costs so little more wastes less at the ends of pools
STEP_TILES = 4  # in the pool that shows what a step of the engine costs beside its layers


def measure(bundle: Bundle, *, progress: Callable[[str], None] = lambda _: None) -> Profile:
    """Times the pieces of the engine for every length that this bundle pads to.

    One piece after the other runs alone, after a run that compiles; the median counts.
    The compute dtype is chosen first, on a tile and on one row.
    """
    lengths = reachable(bundle)
    middle = min(lengths, key=lambda length: abs(length - 32))
    best: dict[int, Dtype] = {}
    for rows in (max(SMALL_TILE, 1024 // middle), 1):
        taken: dict[Dtype, float] = {}
        for dtype in ("float32", "bfloat16"):
            progress(f"choosing a type for {rows} rows: {dtype}")
            taken[dtype] = Pieces(in_dtype(bundle, dtype)).layer(rows, middle)
        best[rows] = min(taken, key=taken.__getitem__)
    dtype, single_dtype = best.values()
    many, single = (Pieces(in_dtype(bundle, kind)) for kind in (dtype, single_dtype))
    seconds: dict[tuple[int, int], Seconds] = {}
    tile: dict[int, int] = {}
    for length in lengths:
        layer = {}
        for rows in candidates(length):
            progress(f"layers of {rows} rows of {length} tokens")
            layer[rows] = many.layer(rows, length)
        per_row = {rows: taken / rows for rows, taken in layer.items() if rows >= SMALL_TILE}
        least = min(per_row.values())
        tile[length] = min(r for r, one in per_row.items() if one <= (1 + PREFERENCE) * least)
        for rows in sorted({1, SMALL_TILE, *tile_sizes(tile[length])}):
            progress(f"steps of {rows} rows of {length} tokens")
            pieces = single if rows == 1 else many
            one_layer = layer[rows] if rows in layer and rows > 1 else pieces.layer(rows, length)
            head = pieces.head(rows, length)
            seconds[rows, length] = Seconds(one_layer, head, pieces.step(rows, length) - head)
    return Profile(describe(), time.strftime("%Y-%m-%d"), dtype, single_dtype, tile, seconds)


def reachable(bundle: Bundle) -> list[int]:
    """The lengths that rows of this bundle are padded to."""
    tokens = np.arange(1, bundle.max_length + 1)
    return np.unique(bucket_of(tokens, bundle.buckets, bundle.max_length)).tolist()


def candidates(length: int) -> list[int]:
    """Tiles to choose from, in rows."""
    return sorted({max(SMALL_TILE, tokens // length) for tokens in TILE_TOKENS})


def in_dtype(bundle: Bundle, dtype: Dtype) -> Bundle:
    return dataclasses.replace(bundle, cfg=dataclasses.replace(bundle.cfg, dtype=dtype))


class Pieces:
    """What the engine is made of, each to be timed alone."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.model, self.exits = bundle, bundle.model, bundle.exits
        self.cfg = bundle.cfg
        self.weights = jax.device_put(prepare(self.model, bundle.variables), jax.devices()[0])

    def layer(self, rows: int, length: int) -> float:
        x = self.stream(rows, length)
        mask = jnp.ones((rows, length), jnp.int32)
        run = jax.jit(lambda weights, x: run_layer(self.cfg, weights, 0, x, mask))
        return median_seconds(partial(run, self.weights, x))

    def head(self, rows: int, length: int) -> float:
        """The last exit's, with the pooling of one layer; the mixes of fewer cost less."""
        x = self.stream(rows, length)
        mask = jnp.ones((rows, length), jnp.int32)

        def logits(weights: Prepared, x: jax.Array, before: jax.Array) -> jax.Array:
            vectors = [*before, pool_tokens(x, mask, self.exits)]
            return run_head(self.cfg, weights, len(self.exits.layers) - 1, self.exits, vectors)

        before = jnp.zeros((self.exits.num_layers - 1, rows, self.cfg.hidden_size))
        return median_seconds(partial(jax.jit(logits), self.weights, x, before))

    def step(self, rows: int, length: int) -> float:
        """One of the engine, its layers left out."""
        count = 1 if rows == 1 else STEP_TILES
        ids = np.random.default_rng(0).integers(self.cfg.vocab_size, size=(count * rows, length))
        exits = len(self.exits.layers)
        run = partial(
            run_pool, self.model, self.weights, Batch(ids.astype(np.int32)).arrays(),
            broadcast_thresholds(2.0, count * rows, exits), check_temperatures(None, exits),
            jnp.int32(count * rows), "confidence", rows, no_layer,
        )  # fmt: skip
        return median_seconds(run) / (count * exits)

    def stream(self, rows: int, length: int) -> jax.Array:
        shape = (rows, length, self.cfg.hidden_size)
        return jax.random.normal(jax.random.key(0), shape).astype(self.cfg.residual_dtype)


def no_layer(cfg: Any, weights: Prepared, i: int, x: jax.Array, mask: jax.Array) -> jax.Array:
    return x


def median_seconds(run: Callable[[], Any]) -> float:
    """Of repeats, after one that compiles."""
    jax.block_until_ready(run())
    taken: list[float] = []
    while len(taken) < LEAST_RUNS or sum(taken) < SECONDS:
        start = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def profile_table(profile: Profile) -> Table:
    """The profile as people read it."""
    single = "" if profile.single_dtype == profile.dtype else f" ({profile.single_dtype} alone)"
    made = Table(title=f"{profile.machine}; fastest type: {profile.dtype}{single}")
    for heading in ("tokens", "rows", "layer ms", "head ms", "gather ms", "layer µs per token", ""):
        made.add_column(heading, justify="right")
    for (rows, length), part in sorted(profile.seconds.items(), key=lambda item: item[0][::-1]):
        per_token = 1e6 * part.layer / (rows * length)
        cells = [f"{1e3 * value:.2f}" for value in part]
        chosen = "tile" if profile.tile[length] == rows else ""
        made.add_row(str(length), str(rows), *cells, f"{per_token:.1f}", chosen)
    return made
