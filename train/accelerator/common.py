"""What the parts of the check share: sizes, timings, models of random weights.

Which rows leave where is told by their thresholds, 0 or 2. All times are in seconds, the median of
several turns with the lowest and the highest. Matrices are bfloat16 where nothing else is said.

Axes: N rows, B rows of a tile, T tokens, D width.
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ejax.bundle import Bundle
from ejax.config import BertConfig, ExitConfig
from ejax.inference.prepared import Prepared, RunLayer, run_layer
from ejax.models.bert import Batch
from ejax.models.early_exit import EarlyExitBert
from ejax.timing import interleaved
from train.aot_programs import SHAPES

Found = Iterator[dict[str, Any]]  # what a part yields, ready for JSON
LAYERS = 4  # that a timed layer runs, one behind another
LIMIT = 2.0  # times the error that bfloat16 has on the CPU, or in our own attention
BASE, LARGE = SHAPES["google-bert/bert-base-uncased"], SHAPES["google-bert/bert-large-uncased"]
FEW_LAYERS = BertConfig(
    vocab_size=1000, hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
    intermediate_size=1024,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is run: all of it on an accelerator, less on a CPU, next to nothing in tests."""

    parity: BertConfig = FEW_LAYERS
    base: BertConfig = BASE
    base_exits: tuple[int, ...] = (1, 4, 6, 12)
    large: BertConfig = LARGE
    large_exits: tuple[int, ...] = (1, 5, 13, 24)
    rows: int = 4096  # of BERT-base's pool; half of it of BERT-large's
    length: int = 128
    tiles: tuple[int, ...] = (8, 32, 128, 512)
    square: int = 8192  # of the product that tells the peak
    step_rows: int = 128
    attention: tuple[tuple[int, int], ...] = ((128, 128), (32, 512))  # [B, T]
    loops: int = 2000
    repeats: int = 5
    turn: float = 0.05  # seconds of a turn, at least
    compiles_torch: bool = True


ON_CPU = Sizes(
    rows=16, tiles=(8,), square=1024, step_rows=8, attention=((8, 128),), repeats=3,
    compiles_torch=False,
)  # fmt: skip
TINY = BertConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=48, max_position_embeddings=32,
)  # fmt: skip
SMALL = dataclasses.replace(
    ON_CPU, parity=TINY, base=TINY, base_exits=(1, 2), large=TINY, large_exits=(1, 2), length=12,
    square=64, attention=((4, 16),), loops=100, repeats=1, turn=0.0,
)  # fmt: skip


def sizes(small: bool) -> Sizes:
    """Those for this device."""
    if small:
        return SMALL
    return ON_CPU if jax.default_backend() == "cpu" else Sizes()


def spread(seconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "low": min(seconds), "high": max(seconds)}


def timings(given: Sizes, runs: Mapping[Any, Callable[[], Any]]) -> dict[Any, dict[str, float]]:
    """Of runs in turns, after one of each that compiles."""
    found = interleaved(runs, given.repeats, at_least=given.turn)
    return {name: spread(seconds) for name, seconds in found.items()}


def random_variables(model: EarlyExitBert, deviation: float = 0.02) -> Any:
    """As `model.init` shapes them, every leaf normal; norms about 1, n-gram weights positive."""
    rng = np.random.default_rng(0)
    start = partial(model.init, batch=Batch(np.zeros((1, 2), np.int32)))

    def leaf(path: Any, like: Any) -> np.ndarray:
        values = deviation * rng.standard_normal(like.shape, np.float32)
        name = path[-1].key
        return 1 + values if name == "scale" else np.abs(values) if name == "table" else values

    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(start, jax.random.key(0)))


def random_batch(cfg: BertConfig, rows: int, length: int, *, ragged: bool = False) -> Batch:
    """int32 [rows, length]; ragged: from a quarter of the length on, else every token real."""
    rng = np.random.default_rng(1)
    ids = rng.integers(cfg.vocab_size, size=(rows, length), dtype=np.int32)
    least = length // 4 if ragged else length
    mask = np.arange(length) < rng.integers(least, length + 1, (rows, 1))
    return Batch(ids, mask.astype(np.int32)).arrays()


def bundle_of(cfg: BertConfig, layers: tuple[int, ...], **exits: Any) -> Bundle:
    """bfloat16, of two labels; it reads no text."""
    cfg, heads = dataclasses.replace(cfg, dtype="bfloat16"), ExitConfig(layers, 2, **exits)
    model, ones = EarlyExitBert(cfg, heads), (1.0,) * len(heads.layers)
    tokenizer: Any = None
    return Bundle(cfg, heads, random_variables(model), tokenizer, ("no", "yes"), ones, ones)


def matmul_flops(given: Sizes) -> float:
    """Of a square bfloat16 product, per second: the peak that shares are of."""
    n, times = given.square, 8
    x, y = (
        jax.random.normal(key, (n, n), jnp.bfloat16) for key in jax.random.split(jax.random.key(0))
    )
    y = y * n**-0.5
    run = jax.jit(lambda x, y: lax.fori_loop(0, times, lambda _, x: x @ y, x))
    seconds = timings(given, {"product": partial(run, x, y)})["product"]
    return 2 * n**3 * times / seconds["low"]


def stream(cfg: BertConfig, rows: int, length: int) -> jax.Array:
    """Hidden states as they are between layers: [rows, length, D]."""
    shape = (rows, length, cfg.hidden_size)
    return jax.random.normal(jax.random.key(0), shape).astype(cfg.residual_dtype)


def layer_runs(
    cfg: BertConfig, weights: Prepared, x: jax.Array, mask: Any, layer: RunLayer = run_layer
) -> Callable[[], Any]:
    """The first layer, `LAYERS` times over."""

    def program(weights: Prepared, x: jax.Array, mask: Any) -> jax.Array:
        return lax.fori_loop(0, LAYERS, lambda _, x: layer(cfg, weights, 0, x, mask), x)

    return partial(jax.jit(program), weights, x, jnp.asarray(mask))
