"""The encoder against a float64 numpy reference; its rows, its keys, its gradients.

Bounds: 1e-5 in float32 (measured 2e-6 at most). With bfloat16 operands or a bfloat16
stream, 0.1 on hidden states of unit size: about four layers of 2^-8 relative rounding.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import hidden_states, random_batch, random_variables

from ejax.config import BertConfig, ExitConfig
from ejax.models.bert import Batch, BertModel, dropout, einsum

pytestmark = pytest.mark.usefixtures("strict")

# Every size is another number, so that a swapped axis cannot pass.
CFG = BertConfig(
    vocab_size=41, hidden_size=15, num_hidden_layers=4, num_attention_heads=3,
    intermediate_size=23, max_position_embeddings=17, dtype="float32",
)  # fmt: skip
B, T = 6, 9
F32, BF16 = 1e-5, 0.1


def params_of(cfg, seed=0):
    exits = ExitConfig((cfg.num_hidden_layers,), 2)
    return random_variables(cfg, exits, seed)["params"]["bert"]


@pytest.fixture(scope="module")
def params():
    return params_of(CFG)


@pytest.fixture(scope="module")
def arrays():
    return random_batch(CFG, B, T, seed=1)


@functools.lru_cache
def program(cfg):
    return jax.jit(
        lambda p, b, k: BertModel(cfg).apply({"params": p}, b, output_hidden_states=True, keys=k)
    )


def states(cfg, params, batch, keys=None):
    """float32 [L + 1, B, T, D]."""
    return np.asarray(program(cfg)(params, batch, keys)[1], np.float32)


def worst(a, b):
    return float(np.abs(np.asarray(a, np.float64) - b).max())


# Parity


@pytest.mark.parametrize(
    ("act", "eps"),
    [("gelu", 1e-12), ("gelu_new", 1e-3), ("gelu_pytorch_tanh", 1e-12), ("relu", 1e-12)],
)
def test_every_layer_is_the_references(params, arrays, act, eps):
    cfg = dataclasses.replace(CFG, hidden_act=act, layer_norm_eps=eps)
    ours, theirs = states(cfg, params, Batch(*arrays)), hidden_states(params, cfg, *arrays)
    assert ours.shape == (5, B, T, 15)
    for layer in range(5):
        assert worst(ours[layer], theirs[layer]) <= F32, f"layer {layer}"


def test_the_reference_tells_settings_apart(params, arrays):
    """Else parity would say little."""
    ids, mask, types = arrays
    plain = hidden_states(params, CFG, *arrays)
    for act in ("gelu_new", "relu"):
        other = hidden_states(params, dataclasses.replace(CFG, hidden_act=act), *arrays)
        assert worst(other[1], plain[1]) > 10 * F32
    real = mask[None, :, :, None] > 0
    for other in ((ids, np.ones_like(mask), types), (ids, mask, 1 - types)):
        assert worst(hidden_states(params, CFG, *other) * real, plain * real) > 0.1
    eps = hidden_states(params, dataclasses.replace(CFG, layer_norm_eps=1e-3), *arrays)
    assert worst(eps, plain) > 10 * F32


@pytest.mark.parametrize(
    ("dtype", "residual"),
    [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")],
)
def test_bfloat16_stays_near_the_reference(params, arrays, dtype, residual):
    cfg = dataclasses.replace(CFG, dtype=dtype, residual_dtype=residual)
    assert program(cfg)(params, Batch(*arrays), None)[0].dtype == residual
    ours, theirs = states(cfg, params, Batch(*arrays)), hidden_states(params, cfg, *arrays)
    # Narrower numbers are really used: the error is not float32's.
    assert 1e-4 < worst(ours, theirs) <= BF16


def test_plain_call_with_lists_and_defaults(params, arrays):
    """Without hidden states, the answer is the last layer; mask is ones, types are zeros."""
    ids = arrays[0]
    expected = hidden_states(params, CFG, ids, np.ones_like(ids), np.zeros_like(ids))[-1]
    run = jax.jit(lambda p, b: BertModel(CFG).apply({"params": p}, b))
    assert worst(run(params, Batch(ids.tolist())), expected) <= F32


# Rows and padding


def test_padding_is_never_read(params, arrays):
    """Other tokens under the padding change nothing, to the bit."""
    ids, mask, types = arrays
    assert (mask == 0).any()
    a = states(CFG, params, Batch(ids, mask, types))
    other = np.where(mask > 0, ids, (ids + 7) % 41).astype(np.int32)
    b = states(CFG, params, Batch(other, mask, np.where(mask > 0, types, 1 - types)))
    real = mask > 0
    np.testing.assert_array_equal(a[:, real], b[:, real])


@pytest.mark.parametrize("length", [10, 17])
def test_a_longer_bucket_gives_the_same_states(params, arrays, length):
    ids, mask, types = arrays
    pad = ((0, 0), (0, length - T))
    long = Batch(np.pad(ids, pad, constant_values=3), np.pad(mask, pad), np.pad(types, pad))
    a, b = states(CFG, params, Batch(*arrays)), states(CFG, params, long)[:, :, :T]
    assert worst(a[:, mask > 0], b[:, mask > 0]) <= F32


def test_a_row_of_padding_alone_is_finite(params):
    ids = np.full((B, T), 5, np.int32)
    mask = np.arange(B)[:, None].repeat(T, 1).astype(np.int32)  # row 0 has none
    assert np.isfinite(states(CFG, params, Batch(ids, mask))).all()


def test_each_layer_has_its_own_weights(params, arrays):
    """Another layer 3 leaves the states below it alone and changes all above."""
    changed = jax.tree.map(np.copy, params)
    changed["layers"]["intermediate"]["kernel"][2] *= 1.5
    a, b = states(CFG, params, Batch(*arrays)), states(CFG, changed, Batch(*arrays))
    np.testing.assert_array_equal(a[:3], b[:3])
    for layer in (3, 4):
        assert worst(a[layer], b[layer]) > 1e-2


def test_initial_layers_and_heads_differ():
    """Split keys: no layer starts as a copy of another."""
    made = jax.jit(BertModel(CFG).init)(
        jax.random.key(0, impl="unsafe_rbg"), Batch(np.zeros((2, 3), np.int32))
    )
    kernels = made["params"]["layers"]["query"]["kernel"]
    for i in range(3):
        assert worst(kernels[i], kernels[i + 1]) > 1e-3
    assert jax.tree.structure(made["params"]) == jax.tree.structure(params_of(CFG))
    assert jax.tree.map(jnp.shape, made["params"]) == jax.tree.map(jnp.shape, params_of(CFG))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(made)} == {"float32"}


# The product with its own backward pass


SPECS = {  # every product of the model
    "btd,dhk->bthk": ((2, 5, 6), (6, 3, 4)),
    "bhqk,bhtk->bhqt": ((2, 3, 5, 4), (2, 3, 7, 4)),
    "bhqt,bhtk->bhqk": ((2, 3, 5, 7), (2, 3, 7, 4)),
    "bthk,hkd->btd": ((2, 5, 3, 4), (3, 4, 6)),
    "btd,df->btf": ((2, 5, 6), (6, 11)),
    "btf,fd->btd": ((2, 5, 11), (11, 6)),
    "bd,de->be": ((5, 6), (6, 7)),
    "bd,dc->bc": ((5, 6), (6, 3)),
}


def vjp(product, x, w, grad):
    out, back = jax.vjp(product, x, w)
    return out, *back(grad)


@pytest.mark.parametrize("spec", SPECS)
def test_a_product_and_its_gradients_are_autodiffs(spec):
    """float32: 1e-6 relative. bfloat16: both operands rounded, 2^-8 each; sums kept in float32."""
    rng = np.random.default_rng(2)
    x, w = (rng.normal(size=shape).astype(np.float32) for shape in SPECS[spec])

    def plain(x, w):
        return jnp.einsum(spec, x, w, precision="highest")

    grad = rng.normal(size=jax.eval_shape(plain, x, w).shape).astype(np.float32)

    @jax.jit
    def run(x, w, grad):
        f32, bf16 = (
            vjp(lambda x, w, d=dtype: einsum(spec, d, x, w), x, w, grad)
            for dtype in ("float32", "bfloat16")
        )
        # The last: what rounding can move at most, the sum of absolute products.
        return f32, bf16, vjp(plain, x, w, grad), vjp(plain, abs(x), abs(w), abs(grad))

    f32, bf16, expected, room = run(x, w, grad)
    for found, unit in ((f32, 1e-6), (bf16, 2.01 * 2.0**-8)):
        for ours, theirs, bound in zip(found, expected, room, strict=True):
            assert ours.dtype == jnp.float32
            assert (np.abs(ours - theirs) <= unit * np.asarray(bound)).all()
    assert np.abs(bf16[0] - expected[0]).max() > 1e-4  # the operands are rounded


def test_a_weights_gradient_keeps_float32_precision():
    """Its sum is not rounded to bfloat16, and its type is the weight's."""
    x, w = jnp.ones((3, 5, 300), jnp.bfloat16), jnp.ones((300, 7), jnp.float32)
    x = x.at[0, 0].set(1.0078125)
    _, grad_x, grad_w = vjp(
        lambda x, w: einsum("btd,df->btf", "bfloat16", x, w), x, w, jnp.ones((3, 5, 7))
    )
    assert grad_x.dtype == jnp.bfloat16
    assert grad_w.dtype == jnp.float32
    assert (grad_w == 15.0078125).all()  # bfloat16 would hold 15.0


def test_gradients_reach_every_parameter(params, arrays):
    cfg = dataclasses.replace(CFG, dtype="bfloat16")
    target = np.random.default_rng(3).normal(size=(B, T, 15)).astype(np.float32)

    @jax.jit
    @jax.grad
    def slope(p):
        return (BertModel(cfg).apply({"params": p}, Batch(*arrays)) * target).sum()

    for path, leaf in jax.tree_util.tree_leaves_with_path(slope(params)):
        assert leaf.dtype == jnp.float32
        assert np.isfinite(leaf).all()
        name = jax.tree_util.keystr(path)
        if "'key']['bias'" in name:  # adds the same to all scores of a query: no effect
            assert np.abs(leaf).max() < 1e-2
        elif "layers" in name:
            assert (np.abs(leaf).reshape(4, -1).max(axis=1) > 1e-2).all(), name
        else:
            assert np.abs(leaf).max() > 1e-2, name


# Dropout


def keys_of(rows, root=0):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(root), jnp.asarray(rows))


def test_a_rows_dropout_depends_on_its_key_alone(params, arrays):
    rows, keys = np.array([4, 1, 5, 0, 2, 3]), keys_of([70, 71, 72, 73, 74, 75])
    a = states(CFG, params, Batch(*arrays), keys)
    moved = states(CFG, params, Batch(*(part[rows] for part in arrays)), keys[rows])
    np.testing.assert_allclose(moved, a[:, rows], rtol=0, atol=F32)
    # Other companions; and the same text under another key is another draw.
    alike = states(CFG, params, Batch(*(part[[0] * B] for part in arrays)), keys)
    np.testing.assert_allclose(alike[:, 0], a[:, 0], rtol=0, atol=F32)
    assert worst(alike[:, 0], alike[:, 1]) > 0.1


def test_without_keys_there_is_no_dropout(params, arrays):
    none = dataclasses.replace(CFG, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    plain = states(CFG, params, Batch(*arrays))
    np.testing.assert_array_equal(plain, states(none, params, Batch(*arrays)))
    with_keys = states(none, params, Batch(*arrays), keys_of(range(B)))
    np.testing.assert_allclose(with_keys, plain, rtol=0, atol=F32)


def test_attention_has_a_rate_of_its_own(params, arrays):
    cfg = dataclasses.replace(CFG, hidden_dropout_prob=0.0)
    a, b = (states(cfg, params, Batch(*arrays), k) for k in (None, keys_of(range(B))))
    np.testing.assert_array_equal(a[0], b[0])  # the embeddings have the hidden rate
    assert worst(a[1], b[1]) > 0.05


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_keeps_the_mean_and_the_rate(rate):
    x = jnp.ones((40, 50, 101), jnp.float32)
    out = np.asarray(dropout(x, rate, keys_of(range(40)), 3))
    kept = out > 0
    drop = round(rate * 256) / 256
    n = x.size
    assert abs(kept.mean() - (1 - drop)) < 5 * (drop * (1 - drop) / n) ** 0.5
    assert abs(out.mean() - 1) < 5 * (drop / (1 - drop) / n) ** 0.5
    np.testing.assert_allclose(out[kept], 1 / (1 - drop), rtol=1e-6)
    # Rows, and columns of a row, are drawn apart.
    flat = kept.reshape(40, -1).astype(float)
    assert np.abs(np.corrcoef(flat)[~np.eye(40, dtype=bool)]).max() < 0.08


def test_sites_draw_apart_and_keep_the_type():
    half = jnp.ones((4, 31, 12), jnp.bfloat16)
    assert dropout(half, 0.5, keys_of(range(4)), 0).dtype == jnp.bfloat16
    drawn = [
        np.asarray(dropout(jnp.ones((4, 31, 12)), 0.5, keys_of(range(4)), s)) for s in range(4)
    ]
    for i in range(4):
        for j in range(i):
            assert 0.4 < (drawn[i] == drawn[j]).mean() < 0.6


def test_layers_draw_apart(params, arrays):
    """Layers that forget their input and pass on a constant show their own draw."""
    cfg = dataclasses.replace(CFG, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.0)
    blank = jax.tree.map(np.zeros_like, params)
    blank["layers"]["output"]["bias"][:] = 1
    blank["layers"]["output_norm"]["scale"][:] = 1
    kept = states(cfg, blank, Batch(*arrays), keys_of(range(B)))[1:] > 0
    for i in range(4):
        assert 0.35 < kept[i].mean() < 0.65
        for j in range(i):
            assert 0.4 < (kept[i] == kept[j]).mean() < 0.6


# Wrong input


def zeros(*shape, dtype=np.int32):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ((zeros(2, 18),), "at most 17 tokens per row.*Got 18: truncate"),
        (([[1, 2], [3]],), "batch.ids must be rows of whole numbers of equal length: pad them"),
        (([[1, "a"]],), "batch.ids must be rows of whole numbers"),
        (([[1.5, 2.0]],), "batch.ids must be rows of whole numbers"),
        (([1, 2],), "batch.ids must be rows of whole numbers"),
        (([[1, 2]], [[1], [1]]), r"batch.mask must have shape \(1, 2\). Got \(2, 1\)"),
        ((zeros(2, 3, dtype=float),), r"ids must be whole numbers.*Got float64 of shape \(2, 3\)"),
        ((zeros(3),), r"shape \[B, T\]. Got int32 of shape \(3,\)"),
        ((zeros(2, 3), zeros(2, 4)), r"batch.mask must have shape \(2, 3\). Got \(2, 4\)"),
        ((zeros(2, 3), None, zeros(3, 2)), r"batch.types must have shape \(2, 3\). Got \(3, 2\)"),
        ((zeros(2, 3), zeros(2, 3, dtype=np.float32)), "batch.mask must be whole numbers"),
    ],
)
def test_wrong_batches(params, fields, text):
    with pytest.raises(ValueError, match=text):
        BertModel(CFG).apply({"params": params}, Batch(*fields))
