"""What rows cost in floating-point operations, from shapes alone.

A product of [m, k] and [k, n] counts 2 m k n; norms, activations and softmax, some percent
of the time of a layer, are left out. Axes: T tokens, D width, F feed-forward, C classes.
"""

from typing import Any

import numpy as np

from ejax.config import BertConfig, ExitConfig


def layer_flops(cfg: BertConfig, tokens: Any) -> Any:
    """Of one encoder layer for rows of `tokens` tokens (a number or an array): the same shape."""
    d, f = cfg.hidden_size, cfg.intermediate_size
    return 2 * tokens * (4 * d * d + 2 * d * f) + 4 * np.square(tokens) * d


def head_flops(cfg: BertConfig, num_labels: int) -> int:
    """Of one exit head for one row."""
    return 2 * cfg.hidden_size * (cfg.hidden_size + num_labels)


def exit_flops(cfg: BertConfig, exits: ExitConfig, tokens: Any) -> np.ndarray:
    """Of rows that leave at each exit, all heads on their way counted: float64 [E, N].

    Args:
      tokens: int [N], real tokens per row.
    """
    layers, heads = np.asarray(exits.layers), np.arange(1, len(exits.layers) + 1)
    per_layer = layer_flops(cfg, np.asarray(tokens, np.float64))
    return layers[:, None] * per_layer + heads[:, None] * head_flops(cfg, exits.num_labels)


def ideal_speedup(cfg: BertConfig, exits: ExitConfig, tokens: Any, exit: Any) -> float:
    """Operations of full depth, the last head alone, over those of rows that leave so.

    Args:
      tokens: int [N].
      exit: int [N], index into `exits.layers`.
    """
    flops = exit_flops(cfg, exits, tokens)
    spent = flops[np.asarray(exit), np.arange(flops.shape[1])].sum()
    unused = (len(exits.layers) - 1) * head_flops(cfg, exits.num_labels)
    return float((flops[-1] - unused).sum() / spent)
