"""Exits: what they read, their maths against numpy, any number of them, what is learned.

Logits of a few units at 1e-5 in float32 (measured 1e-6).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import random_batch, random_variables

from ejax.config import BertConfig, ExitConfig
from ejax.models.bert import Batch
from ejax.models.early_exit import EarlyExitBert, cut
from ejax.models.heads import mix_columns, mix_in, pool, read, text_of

pytestmark = pytest.mark.usefixtures("strict")

CFG = BertConfig(
    vocab_size=41, hidden_size=12, num_hidden_layers=6, num_attention_heads=3,
    intermediate_size=23, max_position_embeddings=17, dtype="float32",
)  # fmt: skip
B, T = 7, 9


@functools.lru_cache
def program(exits):
    return jax.jit(EarlyExitBert(CFG, exits).apply)


@pytest.fixture(scope="module")
def arrays():
    return random_batch(CFG, B, T, seed=5)


# By hand


def test_columns_by_hand():
    exits = ExitConfig((2, 3), 2)
    mix = np.log(np.array([[1, 3, 99], [1, 1, 2]], np.float32))
    expected = [[0.25, 0.25], [0.75, 0.25], [0, 0.5]]
    np.testing.assert_allclose(mix_columns(mix, exits), expected, atol=1e-6)
    last = mix_columns(mix, ExitConfig((2, 3), 2, mix="last"))
    np.testing.assert_array_equal(last, [[0, 0], [1, 0], [0, 1]])


@pytest.mark.parametrize("layers", [(1,), (5,), (1, 4, 6), (2, 3, 4, 5, 7)])
def test_columns_sum_to_one_and_stop_at_the_exit(layers):
    scores = np.random.default_rng(0).normal(size=(len(layers), layers[-1])).astype(np.float32)
    for mix in ("softmax", "last"):
        columns = np.asarray(mix_columns(scores * 9, ExitConfig(layers, 3, mix=mix)))
        assert columns.shape == (layers[-1], len(layers))
        np.testing.assert_allclose(columns.sum(axis=0), 1, atol=1e-6)
        for e, layer in enumerate(layers):
            assert (columns[layer:, e] == 0).all()
            assert columns[layer - 1, e] > 0


def test_pooling_by_hand():
    x = jnp.asarray([[[1.0, 2], [3, 6], [50, 70]], [[4, 5], [60, 80], [90, 100]]])
    mask = jnp.asarray([[1, 1, 0], [1, 0, 0]])
    cls, mean = (ExitConfig((1,), 2, pooling=name) for name in ("cls", "mean"))
    np.testing.assert_array_equal(pool(x, mask, cls), [[1, 2], [4, 5]])
    np.testing.assert_array_equal(pool(x, mask, mean), [[2, 4], [4, 5]])
    assert np.isfinite(pool(x, mask * 0, mean)).all()  # a row of padding alone
    assert pool(x.astype("bfloat16"), mask, mean).dtype == jnp.float32
    pair = ExitConfig((1,), 2, pooling="pair")
    types = jnp.asarray([[0, 1, 1], [0, 0, 0]])
    told = text_of(Batch(mask, mask, types), pair)
    np.testing.assert_array_equal(told, [[1, 2, 0], [1, 0, 0]])
    np.testing.assert_array_equal(pool(x, told, pair), [[1, 2, 3, 6], [4, 5, 0, 0]])
    np.testing.assert_array_equal(
        read(pool(x, told, pair), pair), [[1, 2, 3, 6, 2, 4, 3, 12], [4, 5, 0, 0, 4, 5, 0, 0]]
    )
    mixed = jnp.ones((2, 3, 2))
    column = jnp.asarray([0.0, 1, 0.5])
    np.testing.assert_array_equal(
        mix_in(mixed, column, x, mask, mean),
        [[[1, 1], [3, 5], [2, 3]], [[1, 1], [5, 6], [3, 3.5]]],
    )


# Against the reference


@pytest.mark.parametrize("separator", [(), (7,), (7, 7), (7, 5)])
def test_of_a_pair_each_text_is_read_apart(arrays, separator):
    """By token types, or by the first separator; a row without one is a first text alone."""
    exits = ExitConfig((1, 3), 4, "pair", separator=separator)
    ids, mask, types = arrays
    ids = np.where(ids == 7, 8, ids)
    ids[:-1, 3] = ids[1, 4] = ids[:2, 6] = 7  # alone in most rows, and twice in one
    ids[:-1, 4:6][ids[:-1, 4:6] % 2 == 0] = 5
    variables = random_variables(CFG, exits, seed=6)
    ours = program(exits)(variables, Batch(ids, mask, types))
    theirs = reference.model_logits(variables, cut(CFG, exits), exits, ids, mask, types)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("layers", "classes", "pooling", "mix"),
    [
        ((1, 2, 3, 4, 5), 2, "cls", "softmax"),
        ((1, 3, 4), 5, "mean", "softmax"),
        ((2, 3), 4, "mean", "last"),
        ((2,), 3, "mean", "softmax"),
        ((1, 3, 4), 5, "pair", "softmax"),
        ((2, 3), 2, "pair", "last"),
    ],
)
def test_any_exits_and_classes_give_the_references_logits(arrays, layers, classes, pooling, mix):
    exits = ExitConfig(layers, classes, pooling=pooling, mix=mix)
    variables = random_variables(CFG, exits, seed=6)
    ours = program(exits)(variables, Batch(*arrays))
    theirs = reference.model_logits(variables, cut(CFG, exits), exits, *arrays)
    assert ours.shape == (len(layers), B, classes)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_the_mixes_are_what_the_heads_read(arrays):
    """By the reference's hidden states, and the heads in numpy on them give the logits."""
    exits = ExitConfig((1, 3), 4, pooling="mean")
    variables = random_variables(CFG, exits, seed=9)
    ids, mask, types = arrays
    params = variables["params"]
    model = EarlyExitBert(CFG, exits)
    apply = jax.jit(functools.partial(model.apply, method="mixes"))
    mixes = np.asarray(apply(variables, Batch(*arrays)))
    assert (mixes.shape, mixes.dtype) == ((B, 2, 12), np.float32)
    hidden = reference.hidden_states(params["bert"], cut(CFG, exits), ids, mask, types)[1:]
    pooled = [(x * mask[..., None]).sum(axis=1) / mask.sum(axis=1)[:, None] for x in hidden]
    np.testing.assert_allclose(mixes[:, 0], pooled[0], atol=1e-5)
    weights = reference.softmax(np.asarray(params["heads"]["mix"][1], np.float64))
    expected = sum(weight * x for weight, x in zip(weights, pooled, strict=True))
    np.testing.assert_allclose(mixes[:, 1], expected, atol=1e-5)
    logits = np.asarray(program(exits)(variables, Batch(*arrays)))
    for e in range(2):
        dense, linear = (reference.at(params["heads"]["exits"][name], e) for name in
                         ("dense", "classifier"))  # fmt: skip
        inner = np.tanh(mixes[:, e] @ dense["kernel"] + dense["bias"])
        head = inner @ linear["kernel"] + linear["bias"]
        np.testing.assert_allclose(logits[e], head, atol=1e-5)


def test_one_last_cls_exit_is_the_standard_classifier(arrays):
    """BertForSequenceClassification: pooler (dense, tanh) on [CLS], then a linear layer."""
    exits = ExitConfig((6,), 3, pooling="cls", mix="last")
    variables = random_variables(CFG, exits, seed=7)
    ids, mask, types = arrays
    params = variables["params"]
    cls = reference.hidden_states(params["bert"], CFG, ids, mask, types)[-1][:, 0]
    pooler, classifier = (params["heads"]["exits"][name] for name in ("dense", "classifier"))
    pooled = np.tanh(cls @ pooler["kernel"][0] + pooler["bias"][0])
    expected = pooled @ classifier["kernel"][0] + classifier["bias"][0]
    ours = program(exits)(variables, Batch(*arrays))
    np.testing.assert_allclose(ours[0], expected, rtol=0, atol=1e-5)


def test_an_exit_reads_no_layer_above_it(arrays):
    exits = ExitConfig((1, 3, 4), 5)
    variables = random_variables(CFG, exits, seed=8)
    plain = np.asarray(program(exits)(variables, Batch(*arrays)))
    moved = jax.tree.map(np.copy, variables)
    for leaf in jax.tree.leaves(moved["params"]["bert"]["layers"]):
        leaf[3:] *= 1.7  # layer 4
    shifted = np.asarray(program(exits)(moved, Batch(*arrays)))
    np.testing.assert_array_equal(shifted[:2], plain[:2])
    assert np.abs(shifted[2] - plain[2]).max() > 1e-2


def test_each_exit_has_its_own_head_and_mix(arrays):
    exits = ExitConfig((1, 3, 4), 5)
    variables = random_variables(CFG, exits, seed=8)
    plain = np.asarray(program(exits)(variables, Batch(*arrays)))
    for path in (("mix",), ("exits", "dense", "kernel"), ("exits", "classifier", "bias")):
        changed = jax.tree.map(np.copy, variables)
        leaf = functools.reduce(dict.__getitem__, path, changed["params"]["heads"])
        leaf[1, 0] += 1
        moved = np.abs(np.asarray(program(exits)(changed, Batch(*arrays))) - plain)
        assert moved[1].max() > 1e-3
        assert moved[[0, 2]].max() == 0


# What is kept, what is learned


def test_the_encoder_is_cut_above_the_last_exit():
    exits = ExitConfig((1, 3), 4)
    shapes = jax.eval_shape(
        EarlyExitBert(CFG, exits).init, jax.random.key(0), Batch(np.zeros((2, 3), np.int32))
    )
    expected = random_variables(CFG, exits, seed=0)
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == jax.tree.map(np.shape, expected)
    assert shapes["params"]["bert"]["layers"]["query"]["kernel"].shape[0] == 3
    assert shapes["params"]["heads"]["mix"].shape == (2, 3)


def test_an_exit_above_the_encoder_is_an_error():
    model = EarlyExitBert(CFG, ExitConfig((2, 7), 2))
    with pytest.raises(ValueError, match=r"exit layers must be at most 6.*Got \(2, 7\)"):
        model.init(jax.random.key(0), Batch(np.zeros((2, 3), np.int32)))


def test_gradients_reach_every_head_and_the_mix(arrays):
    """Also the mixing weights, each up to its exit and none above."""
    exits = ExitConfig((1, 3, 4), 5)
    variables = random_variables(CFG, exits, seed=9)
    target = np.random.default_rng(0).normal(size=(3, B, 5)).astype(np.float32)

    @jax.jit
    @jax.grad
    def slope(variables):
        return (EarlyExitBert(CFG, exits).apply(variables, Batch(*arrays)) * target).sum()

    grads = slope(variables)["params"]["heads"]
    mix = np.abs(grads["mix"])
    below = np.arange(1, 5) <= np.array(exits.layers)[:, None]
    assert (mix[~below] == 0).all()
    assert (mix[1:][below[1:]] > 1e-4).all()  # exit 1 has one layer: its weight is always 1
    for leaf in jax.tree.leaves(grads["exits"]):
        assert (np.abs(leaf).reshape(3, -1).max(axis=1) > 1e-2).all()


def slopes_of(exits, gradient_stop=0.0):
    """One program (params, batch, e) -> the gradient of the squared logits of exit e."""
    model = EarlyExitBert(CFG, exits, gradient_stop=gradient_stop)

    @jax.jit
    @jax.grad
    def slopes(params, batch, e):
        return jnp.square(model.apply({"params": params}, batch)[e]).sum()

    return slopes


@pytest.mark.parametrize("mix", ["softmax", "last"])
def test_with_gradient_stop_an_exit_teaches_its_own_layers_alone(arrays, mix):
    exits = ExitConfig((2, 3, 6), 4, mix=mix)
    variables = random_variables(CFG, exits, seed=3)
    batch = Batch(*arrays)
    apart = jax.jit(EarlyExitBert(CFG, exits, gradient_stop=1.0).apply)
    np.testing.assert_array_equal(program(exits)(variables, batch), apart(variables, batch))
    slopes = {"plain": slopes_of(exits), "apart": slopes_of(exits, gradient_stop=1.0)}
    for e, own in enumerate([{0, 1}, {2}, {3, 4, 5}]):
        reached = {}
        for name in slopes:
            bert = slopes[name](variables["params"], batch, e)["bert"]
            per_layer = [
                np.abs(leaf).reshape(6, -1).sum(1) for leaf in jax.tree.leaves(bert["layers"])
            ]
            reached[name] = set(np.flatnonzero(sum(per_layer)))
            embedded = any(np.any(leaf) for leaf in jax.tree.leaves(bert["embeddings"]))
            assert embedded == (name == "plain" or e == 0)
        assert reached["plain"] == set(range((2, 3, 6)[e]))
        assert reached["apart"] == own


@pytest.mark.parametrize(
    ("layers", "mix"), [((2, 3, 6), "last"), ((1, 2), "softmax")], ids=["one way", "two ways"]
)
def test_with_gradient_stop_a_share_is_held_back_at_each_exit_below(arrays, layers, mix):
    """Down the stream and through the mix alike: 1 - share per exit between a layer and its own."""
    exits = ExitConfig(layers, 4, mix=mix)
    variables = random_variables(CFG, exits, seed=3)
    given = slopes_of(exits), slopes_of(exits, gradient_stop=0.25)
    for e, last in enumerate(layers):
        between = [sum(layer <= end < last for end in layers) for layer in range(1, layers[-1] + 1)]
        whole, part = (
            jax.tree.leaves(slopes(variables["params"], Batch(*arrays), e)["bert"]["layers"])
            for slopes in given
        )
        # float32 rounding; the slope of a key's bias is nothing but rounding.
        limit = 1e-6 * max(np.abs(leaf).max() for leaf in whole)
        for leaf, less in zip(whole, part, strict=True):
            scale = 0.75 ** np.array(between).reshape(-1, *[1] * (leaf.ndim - 1))
            np.testing.assert_allclose(less, leaf * scale, rtol=1e-4, atol=limit)


def test_heads_drop_out_apart(arrays):
    """A row's draw depends on its key alone; every head has its own; the mean is kept."""
    exits = ExitConfig((1, 3, 4), 5)
    variables = random_variables(CFG, exits, seed=10)
    heads = variables["params"]["heads"]["exits"]
    for name in ("dense", "classifier"):  # three heads alike, on inputs alike
        heads[name] = jax.tree.map(lambda leaf: leaf[:1].repeat(3, axis=0), heads[name])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3), jnp.arange(B))
    cfg = BertConfig(**{**vars(CFG), "hidden_dropout_prob": 0.5})
    model = EarlyExitBert(cfg, exits)

    @jax.jit
    def run(variables, mixed, keys):
        bound = model.bind(variables)
        return bound.heads(mixed, keys)

    mixed = np.random.default_rng(0).normal(size=(B, 1, 12)).astype(np.float32).repeat(3, axis=1)
    a, plain = np.asarray(run(variables, mixed, keys)), np.asarray(run(variables, mixed, None))
    np.testing.assert_array_equal(plain[0], plain[1])
    for i, j in ((0, 1), (1, 2), (0, 2)):
        assert np.abs(a[i] - a[j]).max(axis=-1).min() > 1e-2
    order = np.array([3, 0, 6, 1, 5, 2, 4])
    moved = run(variables, mixed[order], keys[order])
    np.testing.assert_allclose(moved, a[:, order], rtol=0, atol=1e-5)
