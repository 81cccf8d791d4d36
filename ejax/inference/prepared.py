"""A model's weights as the engine reads them, and the parts of the model that it runs.

Axes: B rows of a tile, T tokens, D width, L layers, E exits, C classes.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ejax.hardware import target
from ejax.models.bert import EncoderLayer, turn
from ejax.models.early_exit import EarlyExitBert
from ejax.models.heads import ExitHead, mix_columns

Array = jax.Array


class Prepared(NamedTuple):
    """A model's weights as the engine reads them: see `prepare`."""

    bert: Any  # {"embeddings": …}
    layers: tuple[Any, ...]  # L trees
    columns: Array  # float32 [L, E], `mix_columns`, of the exits after layers
    heads: tuple[Any, ...]  # one tree per exit after a layer
    ngrams: Any = None  # of exit 0, where the model has one
    evidence: Array | None = None  # float32 [E], of exit 0's logits in the exits after layers


def prepare(model: EarlyExitBert, variables: Any) -> Prepared:
    """Weights ready for many calls: cast to the compute dtype, one tree per layer, on the device.

    Biases, norms, embeddings and the mix stay float32. Layers stand apart because reading
    layer i of a stack inside a loop copies it for every tile: 5 % of the time at 1024 tokens
    of width 384 on a CPU. What is prepared already is returned as it is.
    """
    if isinstance(variables, Prepared):
        return variables
    params, dtype = variables["params"], jnp.dtype(model.cfg.dtype)
    grams = params.get("ngrams")
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
        layers = (jax.tree.map(operator.itemgetter(i), tree) for i in range(count))
        return tuple(jax.tree.map(ready, layer, is_leaf=projection) for layer in layers)

    return Prepared(
        {"embeddings": jax.tree.map(jnp.asarray, params["bert"]["embeddings"])},
        unstacked(params["bert"]["layers"], model.exits.num_layers),
        mix_columns(jnp.asarray(params["heads"]["mix"]), model.exits.encoder),
        unstacked(params["heads"]["exits"], len(model.exits.encoder.layers)),
        jax.tree.map(jnp.asarray, grams) if model.exits.has_zero else None,
        None if grams is None else jnp.asarray(grams["evidence"]),
    )


RunLayer = Callable[[Any, Prepared, int, Array, Array], Array]


def run_layer(cfg: Any, weights: Prepared, i: int, x: Array, mask: Array) -> Array:
    """The output of layer i, from 0: [B, T, D]."""
    out: Any = EncoderLayer(cfg).apply({"params": weights.layers[i]}, x, mask)
    return out


def run_head(cfg: Any, weights: Prepared, number: int, exits: Any, mixed: Array) -> Array:
    """Logits [B, C] of one exit, from its mix [B, P] of the pooled layers up to its own."""
    logits: Any = ExitHead(cfg, exits).apply({"params": weights.heads[number]}, mixed)
    return logits
