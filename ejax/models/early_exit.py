"""BERT with exit heads: the logits of every exit in one pass over the layers.

Axes: B batch, E exits, C classes, P numbers pooled of a row.
"""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ejax.config import BertConfig, ExitConfig
from ejax.models.bert import Batch, BertModel
from ejax.models.heads import ExitHeads, NGramExit, mix_in, pool, text_of
from ejax.models.weights import cut
from ejax.tasks import task_of

Array = jax.Array


class EarlyExitBert(nn.Module):
    """BERT with a classifier after some layers; variables {"params": {"bert": …, "heads": …}}.

    With an exit 0 there are also {"ngrams": …}, see `ejax.models.ngrams`: no gradient reaches them,
    and later exits add its logits to their own.

    With one exit, mix "last" and pooling "cls" this is the standard BERT classifier,
    or a cut one; with several it is the model of Schwartz et al. (ACL 2020). `gradient_stop`
    changes training only: of the gradient of an exit, this share is held back at each exit below
    it. With 1 no two exits pull at the same layer, as in SWEET (Rotem, Hassid, Mamou, Schwartz,
    "Finding the SWEET Spot", Findings of ACL 2023, section 4); between 0 and 1 the layers below
    listen less to the exits above, as when gradients are scaled to one another (Li, Zhang, Qi,
    Yang, Huang, "Improved Techniques for Training Adaptive Deep Networks", ICCV 2019).
    """

    cfg: BertConfig
    exits: ExitConfig
    remat: bool = False  # layers run again in a backward pass, which then holds less
    gradient_stop: float = 0.0  # share of an exit's gradient held back at each exit below it

    def setup(self) -> None:
        cfg = cut(self.cfg, self.exits)
        self.bert = BertModel(cfg, self.remat)
        self.heads = ExitHeads(cfg, self.exits.encoder)
        if self.exits.has_zero:
            self.ngrams = NGramExit(self.exits)

    def __call__(self, batch: Batch, *, keys: Array | None = None) -> Array:
        """Logits of all exits.

        Args:
          batch: a `Batch`, int [B, T] each.
          keys: typed dropout keys [B], one per row; None means no dropout.

        Returns:
          float32 [E, B, C], before temperature.
        """
        logits = self.heads(self.mixes(batch, keys=keys), keys)
        if self.exits.has_zero:
            zero, evidence = jax.lax.stop_gradient(self.ngrams(batch.arrays()))
            logits = logits + evidence[:, None, None] * zero[None]
            logits = jnp.concatenate([zero[None], logits])
        rows, outputs = len(batch.ids), task_of(self.exits).outputs
        chex.assert_shape(logits, (len(self.exits.layers), rows, outputs))
        return logits

    def mixes(self, batch: Batch, *, keys: Array | None = None) -> Array:
        """Each exit's mix of the pooled layers below, float32 [B, E, P], of which `read` is read.

        Exit 0 has none. Args: as for `__call__`; `model.apply(variables, batch, method="mixes")`.
        """
        batch, exits = batch.arrays(), self.exits.encoder
        shape = (len(batch.ids), len(exits.layers), self.cfg.hidden_size * exits.pooled)
        texts = text_of(batch, exits)
        teaches = passes = None
        if self.gradient_stop:
            layer, ends = np.arange(1, exits.num_layers + 1), np.asarray(exits.layers)
            segment = np.searchsorted(ends, layer)  # the exit that each layer leads to
            below = np.maximum(np.arange(len(ends)) - segment[:, None], 0)  # exits in between
            teaches = jnp.asarray((1 - self.gradient_stop) ** below, jnp.float32)  # [L, E]
            passes = jnp.asarray(1 - self.gradient_stop * np.isin(layer, ends), jnp.float32)
        _, mixed, _ = self.bert.encode(
            self.bert.embed(batch, keys),
            texts,
            keys,
            carry=jnp.zeros(shape),
            columns=(self.heads.columns(), teaches),
            passes=passes,
            read=lambda mixed, x, column: (
                mix_in(mixed, column[0], x, texts, exits, column[1]),
                None,
            ),
        )
        return mixed

    def layer_vectors(self, batch: Batch) -> Array:
        """What the exits mix: the pooled output of every layer, float32 [L, B, P]."""
        batch = batch.arrays()
        texts = text_of(batch, self.exits)
        _, _, vectors = self.bert.encode(
            self.bert.embed(batch),
            texts,
            read=lambda carry, x, _: (carry, pool(x, texts, self.exits)),
        )
        return vectors

    def from_vectors(self, vectors: Array, keys: Array | None = None) -> Array:
        """Logits float32 [E, B, C] of the exits after layers, from `layer_vectors`."""
        mixed = jnp.einsum("le,lbp->bep", self.heads.columns(), vectors, precision="highest")
        return self.heads(mixed, keys)
