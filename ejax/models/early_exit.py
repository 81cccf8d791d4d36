"""BERT with exit heads: the logits of every exit in one pass over the layers.

Axes: B batch, E exits, C classes, D width.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

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
    or a cut one; with several it is the model of Schwartz et al. (ACL 2020).
    """

    cfg: BertConfig
    exits: ExitConfig
    remat: bool = False  # layers run again in a backward pass, which then holds less

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
        _, mixed, _ = self.bert.encode(
            self.bert.embed(batch, keys),
            batch.mask,
            keys,
            carry=mixed,
            columns=self.heads.columns(),
            read=lambda mixed, x, column: (mix_in(mixed, column, x, batch.mask, self.exits), None),
        )
        return self.heads(mixed, keys)
