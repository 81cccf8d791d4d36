"""Seconds per layer, head and gather for each shape of tile on this machine.

The engine takes its tiles from here, and `Profile.predict` the cost of any thresholds.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.table import Table
from scipy.optimize import nnls

from ejax.base import FULL, TextClassifier
from ejax.bundle import Bundle
from ejax.config import Dtype
from ejax.data.batches import bucket_of
from ejax.data.tokenizer import Encoded
from ejax.hardware import describe
from ejax.inference.cost import Profile, Seconds
from ejax.inference.policy import broadcast_thresholds, check_temperatures
from ejax.inference.pool import run_pool
from ejax.inference.prepared import Prepared, RunLayer, prepare, run_head, run_layer
from ejax.inference.schedule import SMALL_TILE, tile_sizes
from ejax.models.bert import Batch
from ejax.models.heads import pool as pool_tokens
from ejax.models.ngrams import ragged_logits
from ejax.onnx import OnnxClassifier
from ejax.timing import Run, interleaved, medians

TILE_TOKENS = (512, 1024, 2048)
TURNS, TURN_SECONDS = 7, 0.05  # of a piece, compared with the others in turn
LAYERS = 4
MANY, MANY_TOKENS = 256, 32  # texts, and tokens of each, that runtimes are compared on
ZERO_ROWS, ZERO_TOKENS = 64, 128  # that exit 0 is timed on
PREFERENCE = 0.02  # a smaller tile that costs so little more wastes less at the ends of pools
STEP_TILES, POOL_TILES = 4, 8  # in the pools that show a step without layers, and the whole


def measure(bundle: Bundle, *, progress: Callable[[str], None] = lambda _: None) -> Profile:
    """Times the pieces of the engine for every length that this bundle pads to.

    What is compared takes turns, after a run that compiles; the medians count. The compute
    dtype is chosen first, on a tile and on one row.
    """
    given, bundle = bundle, bundle.without_zero
    lengths = reachable(bundle)
    middle = min(lengths, key=lambda length: abs(length - 32))
    best: dict[int, Dtype] = {}
    for rows in (max(SMALL_TILE, 1024 // middle), 1):
        progress(f"choosing a type for {rows} rows")
        kinds: tuple[Dtype, ...] = ("float32", "bfloat16")
        by_kind = median_seconds(
            {kind: Pieces(in_dtype(bundle, kind)).layer(rows, middle) for kind in kinds}
        )
        best[rows] = min(kinds, key=by_kind.__getitem__)
    dtype, single_dtype = best.values()
    many, single = (Pieces(in_dtype(bundle, kind)) for kind in (dtype, single_dtype))
    progress("layers")
    layer = median_seconds(
        {
            (rows, length): (single if rows == 1 else many).layer(rows, length)
            for length in lengths
            for rows in {1, *candidates(length)}
        }
    )
    tile: dict[int, int] = {}
    for length in lengths:
        per_row = {rows: layer[rows, length] / rows for rows in candidates(length)}
        least = min(per_row.values())
        tile[length] = min(r for r, one in per_row.items() if one <= (1 + PREFERENCE) * least)
    shapes = [(rows, length) for length in lengths for rows in (1, *tile_sizes(tile[length]))]
    progress("heads and steps")
    parts = ("layer", "head", "step")
    taken = median_seconds(
        {
            (part, shape): getattr(single if shape[0] == 1 else many, part)(*shape)
            for shape in shapes
            for part in parts
        }
    )
    seconds = {}
    for shape in shapes:
        one_layer, head, step = (taken[part, shape] for part in parts)
        one_layer /= LAYERS
        step /= STEP_TILES * len(bundle.exits.layers)
        seconds[shape] = Seconds(one_layer, head, max(0.0, step - head))
    found = Profile(describe(), time.strftime("%Y-%m-%d"), dtype, single_dtype, tile, seconds)
    zero = 0.0
    if given.exits.has_zero:
        zero = median_seconds({"zero": zero_run(given)})["zero"] / (ZERO_ROWS * ZERO_TOKENS)
    progress("the whole")
    whole = median_seconds({"whole": many.pool(tile[middle], middle)})["whole"]
    exit = np.full(POOL_TILES * tile[middle], len(bundle.exits.layers) - 1)
    parts_of_it = found.predict(bundle.exits, exit, tile[middle], middle)
    return dataclasses.replace(found, whole=whole / parts_of_it, zero=zero)


def measure_graph(
    clf: OnnxClassifier, *, progress: Callable[[str], None] = lambda _: None
) -> Profile:
    """Times a text alone, of every length that this bundle pads to, at every exit of a graph.

    What a layer takes, and what an exit, are the numbers of least squares that are not negative.
    """
    bundle = clf.bundle
    exits, lengths = bundle.exits.encoder.layers, reachable(bundle)
    parts = np.array([(layer, passed) for passed, layer in enumerate(exits, start=1)], float)
    progress("texts alone")
    runs: dict[Any, Run] = {
        (length, exit): partial(sent_to, clf, exit, random_rows(bundle, 1, length))
        for length in lengths
        for exit in range(len(exits))
    }
    taken = median_seconds(runs)
    seconds = {}
    for length in lengths:
        of_exits = np.array([taken[length, exit] for exit in range(len(exits))])
        layer, head = nnls(parts, of_exits)[0].tolist()
        seconds[1, length] = Seconds(layer, head, 0.0)
    zero = 0.0
    if bundle.exits.has_zero:
        zero = median_seconds({"zero": zero_run(bundle)})["zero"] / (ZERO_ROWS * ZERO_TOKENS)
    kind, date = bundle.numerics, time.strftime("%Y-%m-%d")
    return Profile(describe(), date, kind, kind, {}, seconds, zero=zero)


def sent_to(clf: OnnxClassifier, exit: int, rows: Encoded) -> None:
    """Runs the exits after layers of a graph on rows that all leave at the same."""
    thresholds = np.where(np.arange(len(clf.bundle.exits.encoder.layers)) == exit, 0.0, 2.0)
    added = np.zeros((len(rows), clf.bundle.task.outputs), np.float32)
    for _ in clf.after_layers(rows, thresholds, added):
        pass


def random_rows(bundle: Bundle, rows: int, length: int) -> Encoded:
    """Rows of so many tokens, drawn by a fixed seed."""
    ids = np.random.default_rng(0).integers(bundle.cfg.vocab_size, size=rows * length)
    offsets = np.arange(rows + 1, dtype=np.int64) * length
    texts = Encoded(ids.astype(np.int32), np.zeros(ids.size, np.int8), offsets)
    return dataclasses.replace(texts, whole=texts)


def compare(clfs: Mapping[str, TextClassifier]) -> tuple[Table, list[str]]:
    """Runtimes of one model, on one text and on many of one length, in turns.

    At full depth, and with early exit: random tokens have no scores to go by, so they leave in the
    shares that each bundle recorded with its own thresholds.

    Returns:
      A table, and sentences: whose shares are not known, and which is fastest for each.
    """
    length = min(MANY_TOKENS, *(clf.bundle.max_length for clf in clfs.values()))
    shares = {name: np.array(clf.depth_record.get("exit_share", ())) for name, clf in clfs.items()}
    runs: dict[Any, Run] = {}
    for name, clf in clfs.items():
        one, many = (random_rows(clf.bundle, rows, length) for rows in (1, MANY))
        runs[name, "full", 1] = partial(clf.full_logits, one)
        runs[name, "full", MANY] = partial(clf.full_logits, many)
        if len(share := shares[name]):
            runs[name, "early", MANY] = leaving(clf, many, exits_by(share, MANY))
            for exit in np.flatnonzero(share):
                runs[name, exit, 1] = leaving(clf, one, np.array([exit]))
    taken = median_seconds(runs)
    for name, share in shares.items():
        if len(share):
            of_exits = [share[exit] * taken[name, exit, 1] for exit in np.flatnonzero(share)]
            taken[name, "early", 1] = sum(of_exits) / share.sum()
    table = Table(title=f"one text, and {MANY}, of {length} tokens")
    for heading in (
        "", "numerics", "full depth\none, ms", "full depth\nmany, texts/s",
        "early exit\nmean layer", "early exit\none, ms", "early exit\nmany, texts/s",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for name, clf in clfs.items():
        cells = [name, clf.bundle.numerics]
        for kind in ("full", "early") if len(shares[name]) else ("full",):
            if kind == "early":
                mean = shares[name] @ clf.bundle.exits.layers / shares[name].sum()
                cells.append(f"{mean:.2f}")
            cells.append(f"{1000 * taken[name, kind, 1]:.2f}")
            cells.append(f"{MANY / taken[name, kind, MANY]:.0f}")
        table.add_row(*cells)
    unknown = [name for name, share in shares.items() if not len(share)]
    sentences = [
        f"{name} does not know where texts leave at its thresholds: `ejax thresholds` or `ejax "
        f"calibrate` records it."
        for name in unknown
    ]
    kind, how = ("full", "at full depth") if unknown else ("early", "with early exit")
    first, most = (min(clfs, key=lambda name: taken[name, kind, rows]) for rows in (1, MANY))
    return table, [*sentences, f"Fastest here {how}: for one text {first}, for many {most}."]


def exits_by(share: np.ndarray, count: int) -> np.ndarray:
    """Exits of so many texts in shares [E], in an order drawn by a fixed seed: int [count].

    >>> np.bincount(exits_by(np.array([0.5, 0.3, 0.2]), 10)).tolist()
    [5, 3, 2]
    """
    upto = share.cumsum() / share.sum()
    exits = np.searchsorted(upto, (np.arange(count) + 0.5) / count)
    return np.random.default_rng(0).permutation(exits)


def leaving(clf: TextClassifier, rows: Encoded, exits: np.ndarray) -> Run:
    """Early exit on rows that are sent to exits, int [N]: each at a threshold of 0 leaves there."""
    thresholds = np.where(np.arange(len(clf.bundle.thresholds)) == exits[:, None], 0.0, FULL)
    if clf.bundle.exits.has_zero and clf.bundle.thresholds[0] <= 1:
        thresholds[exits > 0, 0] = 1  # exit 0 is computed for all, as at the bundle's own
    return partial(clf.decide_encoded, rows, threshold=thresholds)


def zero_run(bundle: Bundle) -> Run:
    """Exit 0 on some rows, on the host."""
    ids = np.random.default_rng(0).integers(bundle.cfg.vocab_size, size=ZERO_ROWS * ZERO_TOKENS)
    offsets = np.arange(ZERO_ROWS + 1) * ZERO_TOKENS
    params = bundle.variables["params"]["ngrams"]
    return partial(ragged_logits, params, ids.astype(np.int32), np.zeros_like(ids), offsets)


def reachable(bundle: Bundle) -> list[int]:
    """The lengths that rows of this bundle are padded to."""
    tokens = np.arange(1, bundle.max_length + 1)
    return np.unique(bucket_of(tokens, bundle.buckets, bundle.max_length)).tolist()


def candidates(length: int) -> list[int]:
    """Tiles to choose from, in rows."""
    whole = (tokens // length // SMALL_TILE * SMALL_TILE for tokens in TILE_TOKENS)
    return sorted({max(SMALL_TILE, rows) for rows in whole})


def in_dtype(bundle: Bundle, dtype: Dtype) -> Bundle:
    return dataclasses.replace(bundle, cfg=dataclasses.replace(bundle.cfg, dtype=dtype))


class Pieces:
    """What the engine is made of, each to be timed alone."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.model, self.exits = bundle, bundle.model, bundle.exits
        self.cfg = bundle.cfg
        self.weights = jax.device_put(prepare(self.model, bundle.variables), jax.devices()[0])

    def layer(self, rows: int, length: int) -> Run:
        """One layer `LAYERS` times over, its memory laid out once as in the engine."""
        x = self.stream(rows, length)
        mask = jnp.ones((rows, length), jnp.int32)

        def layers(weights: Prepared, x: jax.Array) -> jax.Array:
            one = partial(run_layer, self.cfg, weights, 0)
            return lax.fori_loop(0, LAYERS, lambda _, x: one(x, mask), x)

        return partial(jax.jit(layers), self.weights, x)

    def head(self, rows: int, length: int) -> Run:
        """The last exit's, with the pooling of one layer."""
        x = self.stream(rows, length)
        mask = jnp.ones((rows, length), jnp.int32)

        def logits(weights: Prepared, x: jax.Array) -> jax.Array:
            mixed = weights.columns[-1, -1] * pool_tokens(x, mask, self.exits)
            return run_head(self.cfg, weights, len(self.exits.layers) - 1, self.exits, mixed)

        return partial(jax.jit(logits), self.weights, x)

    def step(self, rows: int, length: int) -> Run:
        """`STEP_TILES` tiles through all of the engine but its layers."""
        return self.pool(rows, length, STEP_TILES, no_layer)

    def pool(
        self, rows: int, length: int, tiles: int = POOL_TILES, layer: RunLayer = run_layer
    ) -> Run:
        """The engine at full depth."""
        count = tiles * rows
        ids = np.random.default_rng(0).integers(self.cfg.vocab_size, size=(count, length))
        exits = len(self.exits.layers)
        return partial(
            run_pool, self.model, self.weights, Batch(ids.astype(np.int32)).arrays(),
            broadcast_thresholds(2.0, count, exits), check_temperatures(None, exits),
            jnp.int32(count), tile=rows, layer=layer,
        )  # fmt: skip

    def stream(self, rows: int, length: int) -> jax.Array:
        shape = (rows, length, self.cfg.hidden_size)
        return jax.random.normal(jax.random.key(0), shape).astype(self.cfg.residual_dtype)


def no_layer(cfg: Any, weights: Prepared, i: int, x: jax.Array, mask: jax.Array) -> jax.Array:
    return x


def median_seconds(runs: Mapping[Any, Run]) -> dict[Any, float]:
    """Of turns, after one run of each that compiles; a turn is as many runs as fill its time."""
    return medians(interleaved(runs, TURNS, at_least=TURN_SECONDS))


def profile_table(profile: Profile) -> Table:
    """The profile as people read it."""
    single = "" if profile.single_dtype == profile.dtype else f" ({profile.single_dtype} alone)"
    made = Table(title=f"{profile.machine}; fastest type: {profile.dtype}{single}")
    for heading in ("tokens", "rows", "layer ms", "head ms", "gather ms", "layer µs per token", ""):
        made.add_column(heading, justify="right")
    for (rows, length), part in sorted(profile.seconds.items(), key=lambda item: item[0][::-1]):
        per_token = 1e6 * part.layer / (rows * length)
        cells = [f"{1e3 * value:.2f}" for value in part]
        chosen = "tile" if profile.tile.get(length) == rows else ""
        made.add_row(str(length), str(rows), *cells, f"{per_token:.1f}", chosen)
    return made
