"""Exit heads: token pooling, a mix over the layers below, a classifier.

Schwartz et al., "The Right Tool for the Job" (ACL 2020), section 3.1: every exit
reads a learned, weighted sum of the pooled outputs of all layers up to its own.
Here the weights are a softmax, where the paper's code normalises them to length 1.

Axes: B batch, T tokens, D width, P numbers pooled of a row (D, or 2 D of a pair), L layers, E
exits, C classes; of exit 0 G buckets, R rank.
"""

import math
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ejax.config import BertConfig, ExitConfig
from ejax.models.bert import Batch, Projection, dropout, fold_in, pass_back
from ejax.models.ngrams import TINY, exits_after, hashed
from ejax.tasks import task_of

Array = jax.Array


def text_of(batch: Batch, exits: ExitConfig) -> Array:
    """A mask that tells the texts of a pair apart, if the exits do, int [B, T].

    0 is padding, 1 the first text and 2 the second, which token types tell, or the first tokens
    that are the separator.
    """
    if exits.pooling != "pair":
        return batch.mask
    second = batch.types
    if exits.separator:
        ends = jnp.ones(batch.ids.shape, bool)
        for i, token in enumerate(exits.separator):
            ends &= jnp.roll(batch.ids, -i, axis=1) == token
        count = jnp.cumsum(ends.astype(jnp.int32), axis=1)
        second = (count > ends.astype(jnp.int32)).astype(jnp.int32)
    return jnp.where(batch.mask > 0, 1 + second, 0)


def pool(x: Array, mask: Array, exits: ExitConfig) -> Array:
    """One vector per row, float32 [B, P]: the first token, or the mean of the real ones.

    Of a pair the mean of the first text, with the frame before and after it, and of the second.

    Args:
      x: <float>[B, T, D].
      mask: int [B, T], see `text_of`.
    """
    chex.assert_shape(x, (*mask.shape, None))
    if exits.pooling == "cls":
        return x[:, 0].astype(jnp.float32)
    texts = [mask == 1, mask == 2] if exits.pooling == "pair" else [mask > 0]
    means = []
    for text in texts:
        real = text.astype(jnp.float32)
        total = (x.astype(jnp.float32) * real[:, :, None]).sum(axis=1)
        means.append(total / jnp.maximum(real.sum(axis=1), 1.0)[:, None])
    return jnp.concatenate(means, axis=1)


def read(mixed: Any, exits: ExitConfig) -> Array:
    """What a head reads of a mix <float>[..., P]: of a pair `compared`, else the mix."""
    return compared(*jnp.split(mixed, 2, axis=-1)) if exits.pooling == "pair" else mixed


def compared(u: Any, v: Any) -> Array:
    """[u, v, |u - v|, u v] of the vectors <float>[..., D] of two texts: [..., 4 D].

    Conneau et al., "Supervised Learning of Universal Sentence Representations" (EMNLP 2017),
    section 3.1. In a head both texts have seen each other in the layers.
    """
    return jnp.concatenate([u, v, jnp.abs(u - v), u * v], axis=-1)


def mix_columns(mix: Array, exits: ExitConfig) -> Array:
    """What each layer adds to each exit's mix: float32 [L, E], columns sum to 1.

    Args:
      mix: float32 [E, L], the learned scores; layers above an exit are not read.
    """
    layer = np.arange(1, exits.num_layers + 1)
    below = layer[:, None] <= np.asarray(exits.layers)
    if exits.mix == "last":
        return jnp.asarray(layer[:, None] == np.asarray(exits.layers), jnp.float32)
    return jax.nn.softmax(jnp.where(below, mix.T, -jnp.inf), axis=0)


def mix_in(
    mixed: Array,
    column: Array,
    x: Array,
    mask: Array,
    exits: ExitConfig,
    teaches: Array | None = None,
) -> Array:
    """Adds one layer's pooled output to every exit's mix.

    Args:
      mixed: float32 [B, E, P].
      column: float32 [E], this layer's row of `mix_columns`.
      x: <float>[B, T, D], the layer's output.
      mask: int [B, T], see `text_of`.
      teaches: float32 [E], the share of each exit's gradient that reaches this layer; None means
        all.
    """
    pooled = pool(x, mask, exits)[:, None, :]
    chex.assert_shape(mixed, (len(x), *column.shape, pooled.shape[-1]))
    if teaches is not None:
        pooled = pass_back(jnp.broadcast_to(pooled, mixed.shape), teaches[None, :, None])
    return mixed + column[None, :, None] * pooled


class ExitHead(nn.Module):
    """Dense, tanh, dropout, linear: float32 [B, P] -> logits float32 [B, O].

    O is C, or 2 of a regression: the mean and the logarithm of its deviation, in the unit of the
    scores.
    """

    cfg: BertConfig
    exits: ExitConfig

    @nn.compact
    def __call__(self, mixed: Array, keys: Array | None = None) -> Array:
        d, c = self.cfg.hidden_size, task_of(self.exits).outputs
        shape = (d * self.exits.read, d)
        dense = Projection("bd,de->be", shape, (d,), self.cfg, name="dense")
        x = jnp.tanh(dense(read(mixed, self.exits)))
        x = dropout(x, self.cfg.hidden_dropout_prob, keys, 0)
        out = Projection("bd,dc->bc", (d, c), (c,), self.cfg, name="classifier")(x)
        if self.exits.problem_type == "regression":
            mean, log_deviation = out[:, 0], out[:, 1]
            out = jnp.stack(
                [
                    self.exits.center + self.exits.spread * mean,
                    log_deviation + math.log(self.exits.spread),
                ],
                axis=1,
            )
        return out


class ExitHeads(nn.Module):
    """All heads of a model, parameters stacked [E, ...]."""

    cfg: BertConfig
    config: ExitConfig

    def setup(self) -> None:
        shape = (len(self.config.layers), self.config.num_layers)
        self.mix = self.param("mix", nn.initializers.zeros, shape, jnp.float32)
        stacked = nn.vmap(
            ExitHead,
            in_axes=(1, 0),
            out_axes=0,
            variable_axes={"params": 0},
            split_rngs={"params": True},
        )
        self.exits = stacked(self.cfg, self.config)

    def columns(self) -> Array:
        """float32 [L, E]: what each layer adds to each exit's mix."""
        return mix_columns(self.mix, self.config)

    def __call__(self, mixed: Array, keys: Array | None = None) -> Array:
        """Logits float32 [E, B, C] from the mixes float32 [B, E, P]."""
        if keys is not None:
            first = self.config.num_layers + 1  # the numbers up to L belong to the encoder
            numbers = first + jnp.arange(len(self.config.layers))
            keys = jax.vmap(fold_in, (None, 0))(keys, numbers)
        return self.exits(mixed, keys)


class NGramExit(nn.Module):
    """Exit 0, see `ejax.models.ngrams`: logits float32 [B, C] of a batch, and weights [E - 1].

    Parameters: `table` [G, R + 1], `bias` [C], `evidence` [E - 1], the weights of these logits in
    the later exits, and, where R is not C, `kernel` [R, C].
    """

    exits: ExitConfig

    @nn.compact
    def __call__(self, batch: Batch) -> tuple[Array, Array]:
        g, r, c = self.exits.buckets, self.exits.rank, self.exits.num_labels
        zeros = nn.initializers.zeros
        table = self.param("table", zeros, (g, r + 1), jnp.float32)
        bias = self.param("bias", zeros, (c,), jnp.float32)
        evidence = self.param("evidence", zeros, (exits_after(self.exits),), jnp.float32)
        following, real = jnp.roll(batch.ids, -1, axis=1), batch.mask > 0
        same = (
            real & jnp.roll(real, -1, axis=1) & (batch.types == jnp.roll(batch.types, -1, axis=1))
        )
        grams = jnp.concatenate(hashed(batch.ids, following, batch.types, g), axis=1)
        held = jnp.concatenate([real, same.at[:, -1].set(False)], axis=1)
        sums = jnp.where(held[:, :, None], table[grams], 0.0).sum(axis=1)
        vectors = sums[:, :-1] / jnp.sqrt(jnp.maximum(sums[:, -1:], TINY))
        if r != c:
            kernel = self.param("kernel", zeros, (r, c), jnp.float32)
            vectors = jnp.einsum("br,rc->bc", vectors, kernel, precision="highest")
        return vectors + bias[None], evidence
