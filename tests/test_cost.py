"""Operations by hand, and against XLA's own count of one layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ejax.config import BertConfig, ExitConfig
from ejax.inference.cost import exit_flops, head_flops, ideal_speedup, layer_flops
from ejax.models.bert import EncoderLayer

CFG = BertConfig(hidden_size=128, num_attention_heads=4, intermediate_size=512, num_hidden_layers=4)
EXITS = ExitConfig((1, 3, 4), 5)


def test_by_hand():
    small = dataclasses.replace(CFG, hidden_size=2, num_attention_heads=1, intermediate_size=3)
    # Per token 4 products of 2 x 2 and 2 of 2 x 3; per pair of tokens 2 of width 2.
    assert layer_flops(small, 5) == 2 * 5 * (16 + 12) + 2 * 25 * 2 * 2
    assert head_flops(small, 5) == 2 * (4 + 10)


@pytest.mark.parametrize("tokens", [16, 64])
def test_a_layer_is_what_xla_counts(tokens):
    """XLA counts the elementwise work too: at this width less than a tenth more."""
    cfg = dataclasses.replace(CFG, dtype="float32")
    x, mask = jnp.zeros((3, tokens, 128)), jnp.ones((3, tokens), jnp.int32)
    params = EncoderLayer(cfg).init(jax.random.key(0), x, mask)
    counted = jax.jit(EncoderLayer(cfg).apply).lower(params, x, mask).compile().cost_analysis()
    ratio = counted["flops"] / (3 * layer_flops(cfg, tokens))
    assert 1 <= ratio < 1.1


def test_heads_on_the_way_are_paid_for():
    tokens = np.array([7, 9])
    flops = exit_flops(CFG, EXITS, tokens)
    assert flops.shape == (3, 2)
    head = head_flops(CFG, 5)
    np.testing.assert_allclose(flops[1], 3 * layer_flops(CFG, tokens) + 2 * head)
    # Full depth through all exits is a little dearer than the full model with one head.
    assert 0.98 < ideal_speedup(CFG, EXITS, tokens, [2, 2]) < 1
    assert 3.9 < ideal_speedup(CFG, EXITS, tokens, [0, 0]) <= 4
