"""Operations by hand, and against XLA's own count of one layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ejax.bundle import load_bundle
from ejax.config import BertConfig, ExitConfig
from ejax.evaluation import profile
from ejax.inference.cost import (
    Profile,
    Seconds,
    exit_flops,
    head_flops,
    ideal_speedup,
    layer_flops,
    load_profile,
    save_profile,
    tile_rows,
)
from ejax.inference.schedule import tiles
from ejax.models.bert import EncoderLayer

CFG = BertConfig(hidden_size=128, num_attention_heads=4, intermediate_size=512, num_hidden_layers=4)
EXITS = ExitConfig((1, 3, 4), 5)


def test_by_hand():
    small = dataclasses.replace(CFG, hidden_size=2, num_attention_heads=1, intermediate_size=3)
    # Per token 4 products of 2 x 2 and 2 of 2 x 3; per pair of tokens 2 of width 2.
    assert layer_flops(small, 5) == 2 * 5 * (16 + 12) + 2 * 25 * 2 * 2
    assert head_flops(small, EXITS) == 2 * (4 + 10)
    pair = dataclasses.replace(EXITS, pooling="pair")
    assert head_flops(small, pair) == 2 * (16 + 10)


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
    head = head_flops(CFG, EXITS)
    np.testing.assert_allclose(flops[1], 3 * layer_flops(CFG, tokens) + 2 * head)
    # Full depth through all exits is a little dearer than the full model with one head.
    assert 0.98 < ideal_speedup(CFG, EXITS, tokens, [2, 2]) < 1
    assert 3.9 < ideal_speedup(CFG, EXITS, tokens, [0, 0]) <= 4


def test_rows_that_fill_no_tile_go_in_small_ones():
    assert tiles(64, 32) == [(32, 2)]
    assert tiles(70, 32) == [(32, 2), (8, 1)]
    assert tiles(88, 32) == [(32, 2), (8, 3)]
    assert tiles(89, 32) == [(32, 3)]
    assert tiles(9, 8) == [(8, 2)]
    assert tiles(0, 8) == [(8, 0)]
    assert tile_rows([0, 2, 2, 1], 8, 3).tolist() == [8, 8, 8]
    assert tile_rows([0] * 30 + [1] * 9, 32, 3).tolist() == [40, 16, 0]


PROFILE = Profile(
    "a machine", "2026-01-01", "bfloat16", "float32", {16: 32},
    {(32, 16): Seconds(10.0, 2.0, 1.0), (8, 16): Seconds(3.0, 0.5, 0.25)}, 0.9,
)  # fmt: skip


def test_a_profile_is_what_its_pieces_took(monkeypatch):
    """One layer of four, a step of eight, the smallest tile within 2 % of the best."""
    per_row = {1: 3.0, 32: 1.0, 64: 0.96, 128: 0.95}
    pieces = {"head": 0.5, "step": 8 * 0.75}
    types = iter(({"float32": 2.0, "bfloat16": 1.0}, {"float32": 1.0, "bfloat16": 2.0}))

    def seconds(runs):
        (first, *_) = runs
        if isinstance(first, str):
            return {"whole": 774.0} if first == "whole" else next(types)
        if isinstance(first[0], str):
            return {(part, s): pieces.get(part, 4.0 * s[0]) for part, s in runs}
        return {(rows, length): per_row[rows] * rows for rows, length in runs}

    monkeypatch.setattr(profile, "median_seconds", seconds)
    found = profile.measure(load_bundle(tiny.trained()[0]))  # exits after layers 1 and 3
    assert (found.dtype, found.single_dtype) == ("bfloat16", "float32")
    assert found.tile == {16: 64}
    assert found.seconds == {(rows, 16): Seconds(float(rows), 0.5, 0.25) for rows in (64, 16, 1)}
    # 8 tiles at full depth: 8 * (64 + 0.75) and 8 * (2 * 64 + 0.75), twice what the whole took.
    assert found.whole == pytest.approx(0.5)


def test_a_profile_predicts_any_exits():
    """40 rows after layer 1, 9 of them on to layer 3 and none to layer 4."""
    left = np.array([0] * 31 + [1] * 9)
    first = (10 + 2 + 1) + (3 + 0.5 + 0.25)  # a tile and a small one, one layer
    second = 2 * (2 * 3 + 0.5 + 0.25)  # two small ones, two layers
    assert PROFILE.predict(EXITS, left, 32, 16) == pytest.approx(0.9 * (first + second))
    with pytest.raises(ValueError, match="no tile of 8 rows of 24 tokens: run `ejax profile`"):
        PROFILE.predict(EXITS, left, 8, 24)


def test_a_profile_is_read_back(tmp_path):
    path = tmp_path / "new" / "profile.json"
    assert load_profile(path) is None
    save_profile(PROFILE, path)
    assert load_profile(path) == PROFILE
    other = dataclasses.replace(
        PROFILE, tile={128: 8}, seconds={(8, 128): Seconds(9.0, 1.0, 1.0)}, date="later"
    )
    both = other.beside(PROFILE)
    assert both.tile == PROFILE.tile | {128: 8}
    assert both.seconds == PROFILE.seconds | other.seconds
    assert dataclasses.replace(other, dtype="float32").beside(PROFILE).tile == {128: 8}
    path.write_text(path.read_text().replace("gather", "father"))
    with pytest.raises(ValueError, match=r"profile.json is damaged: KeyError.*run `ejax profile`"):
        load_profile(path)
