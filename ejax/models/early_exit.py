"""BERT with exit heads: the logits of every exit in one pass over the layers.

Axes: B batch, E exits, C classes, D width.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ejax.config import BertConfig, ExitConfig, check_layers
from ejax.models.bert import Batch, BertModel
from ejax.models.heads import ExitHeads, mix_in

Array = jax.Array


def cut(cfg: BertConfig, exits: ExitConfig) -> BertConfig:
    """The encoder kept: the layers above the last exit are never run, nor stored."""
    check_layers(exits.layers, cfg.num_hidden_layers)
    return dataclasses.replace(cfg, num_hidden_layers=exits.num_layers)


class EarlyExitBert(nn.Module):
    """BERT with a classifier after some layers; variables {"params": {"bert": …, "heads": …}}.

    With one exit, mix "last" and pooling "cls" this is the standard BERT classifier,
    or a cut one; with several it is the model of Schwartz et al. (ACL 2020). `gradient_stop`
    changes training only: the classifiers do not pull at the same layers, as in SWEET (Rotem,
    Hassid, Mamou, Schwartz, "Finding the SWEET Spot", Findings of ACL 2023, section 4).
    """

    cfg: BertConfig
    exits: ExitConfig
    remat: bool = False  # layers run again in a backward pass, which then holds less
    gradient_stop: bool = False  # an exit teaches only the layers since the exit before

    def setup(self) -> None:
        cfg = cut(self.cfg, self.exits)
        self.bert = BertModel(cfg, self.remat)
        self.heads = ExitHeads(cfg, self.exits)

    def __call__(self, batch: Batch, *, keys: Array | None = None) -> Array:
        """Logits of all exits.

        Args:
          batch: a `Batch`, int [B, T] each.
          keys: typed dropout keys [B], one per row; None means no dropout.

        Returns:
          float32 [E, B, C], before temperature.
        """
        batch = batch.arrays()
        mixed = jnp.zeros((batch.ids.shape[0], len(self.exits.layers), self.cfg.hidden_size))
        teaches = stops = None
        if self.gradient_stop:
            layer, ends = np.arange(1, self.exits.num_layers + 1), np.asarray(self.exits.layers)
            segment = np.searchsorted(ends, layer)  # the exit that each layer leads to
            teaches = jnp.asarray(segment[:, None] == np.arange(len(ends)))  # [L, E]
            stops = jnp.asarray(np.isin(layer, ends))
        _, mixed, _ = self.bert.encode(
            self.bert.embed(batch, keys),
            batch.mask,
            keys,
            carry=mixed,
            columns=(self.heads.columns(), teaches),
            stops=stops,
            read=lambda mixed, x, column: (
                mix_in(mixed, column[0], x, batch.mask, self.exits, column[1]),
                None,
            ),
        )
        return self.heads(mixed, keys)
