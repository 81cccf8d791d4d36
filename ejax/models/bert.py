"""BERT (Devlin et al., "BERT", NAACL 2019) in Flax Linen, one scanned stack.

Axes: B batch, T tokens, D width, H heads, K head size, F feed-forward, L layers.
Without dropout keys there is no dropout.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ejax.config import BertConfig
from ejax.errors import UserError
from ejax.hardware import target

Array = jax.Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


@partial(jax.tree_util.register_dataclass, data_fields=["ids", "mask", "types"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Batch:
    """Token ids, mask (1 = real) and token types, each int [B, T], or equal-length lists.

    `mask` defaults to all ones and `types` to zeros.
    """

    ids: Any
    mask: Any = None
    types: Any = None

    def __post_init__(self) -> None:
        # Lists become arrays at once: to jit, a list is a tree of numbers.
        for name in ("ids", "mask", "types"):
            values = getattr(self, name)
            if isinstance(values, list | tuple):
                object.__setattr__(self, name, _from_lists(name, values))

    def arrays(self) -> "Batch":
        """The same with every field an int32 array [B, T]; numpy stays numpy.

        Raises:
          ValueError: when the fields are not rectangular or differ in shape.
        """
        ids = _as_ids("ids", self.ids)
        shape = ids.shape
        mask = np.ones(shape, np.int32) if self.mask is None else _as_ids("mask", self.mask)
        types = np.zeros(shape, np.int32) if self.types is None else _as_ids("types", self.types)
        for name, array in (("mask", mask), ("types", types)):
            if array.shape != shape:
                raise UserError(f"batch.{name} must have shape {shape}. Got {array.shape}.")
        return Batch(ids, mask, types)


def _from_lists(name: str, values: Any) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.asarray(None)
    if array.ndim != 2 or array.dtype.kind not in "iub":
        raise UserError(
            f"batch.{name} must be rows of whole numbers of equal length: pad them first."
        )
    return array.astype(np.int32)


def _as_ids(name: str, values: Any) -> Any:
    if values.ndim != 2 or np.dtype(values.dtype).kind not in "iub":
        raise UserError(
            f"batch.{name} must be whole numbers of shape [B, T]. "
            f"Got {values.dtype} of shape {values.shape}."
        )
    if isinstance(values, np.ndarray):
        return values.astype(np.int32, copy=False)
    return jnp.asarray(values, jnp.int32)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def einsum(spec: str, dtype: str, x: Array, w: Array) -> Array:
    """A product of two arrays: operands in `dtype`, accumulated and returned in float32.

    Both directions round their operands only, so a weight's gradient stays float32.
    Every letter of `spec` must stand in at least two of its three terms.
    """
    return _product(spec, dtype, x, w)


def _product(spec: str, dtype: str, x: Array, w: Array) -> Array:
    precision = lax.Precision.HIGHEST if dtype == "float32" else None
    return jnp.einsum(
        spec,
        x.astype(dtype),
        w.astype(dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _einsum_fwd(spec: str, dtype: str, x: Array, w: Array) -> tuple[Array, tuple[Any, ...]]:
    saved = (x.astype(dtype), w.astype(dtype), jnp.empty((0,), x.dtype), jnp.empty((0,), w.dtype))
    return _product(spec, dtype, x, w), saved


def _einsum_bwd(spec: str, dtype: str, saved: tuple[Any, ...], grad: Array) -> tuple[Array, Array]:
    x, w, like_x, like_w = saved
    terms, out = spec.split("->")
    left, right = terms.split(",")
    grad_x = _product(f"{out},{right}->{left}", dtype, grad, w)
    grad_w = _product(f"{left},{out}->{right}", dtype, x, grad)
    return grad_x.astype(like_x.dtype), grad_w.astype(like_w.dtype)


einsum.defvjp(_einsum_fwd, _einsum_bwd)


FEW_ROWS = 40  # at 32 the swapped operands measured faster than XLA's own order, at 48 not


def turn(kernel: Array, outputs: int) -> Array:
    """A kernel [..., outputs in one or more axes] as [outputs, inputs]: what CPUs read fastest.

    XLA's CPU backend packs a float32 kernel anew for every product. Turned, it is read as it
    stands: 512 rows take the same time, 32 rows half of it.
    """
    return kernel.reshape(-1, outputs).T


def _turned_product(x: Array, kernel: Array) -> Array:
    """float32 [..., inputs] by `turn`ed [outputs, inputs] -> float32 [..., outputs]."""
    rows = x.astype(jnp.float32).reshape(-1, kernel.shape[1])
    product = lax.dot_general(kernel, rows, (((1,), (1,)), ((), ())))
    if len(rows) <= FEW_ROWS:
        product = lax.optimization_barrier(product)  # else XLA swaps the operands back
    return product.T


def _few_rows_feed_forward(
    x: Array, first: Any, second: Any, activation: Callable[[Array], Array]
) -> Array:
    """Both `turned` projections, rows as columns between them: float32 [..., D] -> [..., D].

    Turned back after the first product, its F outputs per row would be read with a stride: 9 % of
    a layer's time at 32 rows of width 384, 4 % at 16, nothing at 24.
    """
    hidden = activation(_turned_product(x, first["turned"]).T + first["bias"][:, None])
    out = lax.optimization_barrier(second["turned"] @ hidden)
    return (out + second["bias"][:, None]).T.reshape(x.shape)


class Projection(nn.Module):
    """`einsum(x, kernel) + bias`, in float32.

    The engine may store the kernel `turn`ed, as "turned" in place of "kernel".
    """

    spec: str
    shape: tuple[int, ...]  # of the kernel
    bias_shape: tuple[int, ...]
    cfg: BertConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        bias = self.param("bias", nn.initializers.zeros, self.bias_shape, jnp.float32)
        turned: Any = self.get_variable("params", "turned")
        if turned is None:
            init = nn.initializers.normal(self.cfg.initializer_range)
            kernel = self.param("kernel", init, self.shape, jnp.float32)
            product = einsum(self.spec, self.cfg.dtype, x, kernel)
        else:
            leading = x.shape[: x.ndim - len(self.shape) + len(self.bias_shape)]
            product = _turned_product(x, turned).reshape(*leading, *self.bias_shape)
        return product + bias.reshape((1,) * (product.ndim - bias.ndim) + bias.shape)


def layer_norm(cfg: BertConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon=cfg.layer_norm_eps, dtype=jnp.float32, use_fast_variance=False, name=name
    )


def dropout(x: Array, rate: float, keys: Array | None, site: int) -> Array:
    """Inverted dropout with one key per row, so that it does not depend on the devices.

    Each element takes 8 random bits; the rate is rounded to a multiple of 1/256
    and the kept ones are scaled by that rounded rate.

    Args:
      x: <float>[B, ...].
      keys: typed keys [B]; None means no dropout.
      site: tells the places of one layer apart.
    """
    drop = min(round(rate * 256), 255)
    if keys is None or drop == 0:
        return x
    first, *rest = x.shape[1:]

    def row_bits(key: Array) -> Array:
        """uint8 [first, *rest]: the four bytes of a word lie far apart, in whole rows.

        Side by side they would be an axis of 4, which a TPU pads to 128: half of a layer's bytes.
        """
        shape = (-(-first // 4), *rest)
        words = jax.random.bits(jax.random.fold_in(key, site), shape, jnp.uint32)
        return jnp.concatenate([(words >> n).astype(jnp.uint8) for n in (0, 8, 16, 24)])[:first]

    keep = jax.vmap(row_bits)(keys) >= jnp.uint8(drop)
    return jnp.where(keep, x * jnp.asarray(256 / (256 - drop), x.dtype), jnp.zeros((), x.dtype))


class Embeddings(nn.Module):
    """Word + position + token type, normalised: <residual dtype>[B, T, D]."""

    cfg: BertConfig

    @nn.compact
    def __call__(self, batch: Batch, keys: Array | None = None) -> Array:
        cfg = self.cfg
        length = batch.ids.shape[1]
        if length > cfg.max_position_embeddings:
            raise UserError(
                f"a batch must have at most {cfg.max_position_embeddings} tokens per row, the "
                f"positions of this model. Got {length}: truncate the texts."
            )

        def table(name: str, rows: int) -> nn.Embed:
            init = nn.initializers.normal(cfg.initializer_range)
            return nn.Embed(rows, cfg.hidden_size, embedding_init=init, name=name)

        x = table("word", cfg.vocab_size)(batch.ids)
        x = x + table("position", cfg.max_position_embeddings)(jnp.arange(length))[None]
        x = x + table("token_type", cfg.type_vocab_size)(batch.types)
        x = layer_norm(cfg, "norm")(x)
        x = dropout(x, cfg.hidden_dropout_prob, keys, 0)
        return x.astype(cfg.residual_dtype)


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each with a residual and a norm after it."""

    cfg: BertConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array, keys: Array | None = None) -> Array:
        """Args: x <residual dtype>[B, T, D]; mask int [B, T]; keys [B] or None."""
        cfg = self.cfg
        d, h, k, f = cfg.hidden_size, cfg.num_attention_heads, cfg.head_size, cfg.intermediate_size

        def project(name: str, spec: str, shape: tuple[int, ...], bias: tuple[int, ...]) -> Any:
            return Projection(spec, shape, bias, cfg, name=name)

        residual = x.astype(jnp.float32)
        with jax.named_scope("attention"):
            q, key, v = (
                project(name, "btd,dhk->bthk", (d, h, k), (h, k))(x).swapaxes(1, 2)
                for name in ("query", "key", "value")
            )
            # [B, H, T, K]: XLA's CPU backend has bfloat16 kernels for this order, both ways.
            scores = einsum("bhqk,bhtk->bhqt", cfg.dtype, q * jnp.float32(k**-0.5), key)
            real = mask[:, None, None, :] > 0
            probs = jax.nn.softmax(jnp.where(real, scores, jnp.finfo(jnp.float32).min), axis=-1)
            probs = dropout(probs, cfg.attention_probs_dropout_prob, keys, 1)
            context = einsum("bhqt,bhtk->bhqk", cfg.dtype, probs, v).swapaxes(1, 2)
            out = project("attention_output", "bthk,hkd->btd", (h, k, d), (d,))(context)
            out = dropout(out, cfg.hidden_dropout_prob, keys, 2)
            x = layer_norm(cfg, "attention_norm")(residual + out)
        with jax.named_scope("feed_forward"):
            activation = ACTIVATIONS[cfg.hidden_act]
            first: Any = self.get_variable("params", "intermediate", {})
            if "turned" in first and x.shape[0] * x.shape[1] <= FEW_ROWS:
                second: Any = self.get_variable("params", "output")
                out = _few_rows_feed_forward(x, first, second, activation)
            else:
                hidden = activation(project("intermediate", "btd,df->btf", (d, f), (f,))(x))
                out = project("output", "btf,fd->btd", (f, d), (d,))(hidden)
            out = dropout(out, cfg.hidden_dropout_prob, keys, 3)
            x = layer_norm(cfg, "output_norm")(x + out)
        return x.astype(cfg.residual_dtype)


@jax.custom_vjp
def pass_back(x: Array, share: Array) -> Array:
    """x as it is, <float>[...]; of its gradient a share passes, float32 broadcast to x."""
    # A rule of its own: written as a sum with stop_gradient, XLA's fusion changes x's last bits.
    return x


def _pass_back_fwd(x: Array, share: Array) -> tuple[Array, Array]:
    return x, share


def _pass_back_bwd(share: Array, grad: Array) -> tuple[Array, Array]:
    return (share * grad).astype(grad.dtype), jnp.zeros_like(share)


pass_back.defvjp(_pass_back_fwd, _pass_back_bwd)


def fold_in(keys: Array | None, number: Array | int) -> Array | None:
    """`jax.random.fold_in` for one key per row, or None."""
    return None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, number)


Read = Callable[[Any, Array, Any], tuple[Any, Any]]


class BertModel(nn.Module):
    """The encoder: `BertModel(cfg).apply({"params": bert}, batch)` -> hidden [B, T, D].

    The layers are one module whose parameters are stacked [L, ...] and scanned. With
    `remat` a backward pass keeps the stream between layers alone and runs each layer again.
    """

    cfg: BertConfig
    remat: bool = False

    def __call__(
        self, batch: Batch, *, output_hidden_states: bool = False, keys: Array | None = None
    ) -> Any:
        """Encodes a batch.

        Args:
          batch: a `Batch`, int [B, T] each.
          output_hidden_states: also return the embeddings and every layer's output.
          keys: typed dropout keys [B], one per row; None means no dropout.

        Returns:
          <residual dtype>[B, T, D], or (that, <residual dtype>[L + 1, B, T, D]).
        """
        embedded = self.embed(batch, keys)
        if not output_hidden_states:
            return self.encode(embedded, batch.arrays().mask, keys)[0]
        x, _, seen = self.encode(
            embedded, batch.arrays().mask, keys, read=lambda carry, x, _: (carry, x)
        )
        return x, jnp.concatenate([embedded[None], seen])

    def setup(self) -> None:
        self.embeddings = Embeddings(self.cfg)
        self.layers = EncoderLayer(self.cfg)

    def embed(self, batch: Batch, keys: Array | None = None) -> Array:
        """<residual dtype>[B, T, D], the stream below layer 1."""
        return self.embeddings(batch.arrays(), fold_in(keys, 0))

    def encode(
        self,
        x: Array,
        mask: Array,
        keys: Array | None = None,
        *,
        carry: Any = None,
        columns: Any = None,
        passes: Any = None,
        read: Read = lambda carry, x, _: (carry, None),
    ) -> tuple[Array, Any, Any]:
        """Scans the layers; `read(carry, x, column)` sees the output of each.

        Args:
          x: <residual dtype>[B, T, D].
          mask: int [B, T].
          carry: what `read` hands from layer to layer, such as the exits' mix.
          columns: a pytree of arrays [L, ...]; `read` gets one row per layer.
          passes: float32 [L], the share of the gradient that flows back into each layer's output
            from the layers above; None means all.

        Returns:
          The last layer's output, the last carry, and what `read` gave, stacked [L, ...].
        """

        def body(
            layer: EncoderLayer, state: tuple[Array, Any], inputs: tuple[Array, Any, Any]
        ) -> tuple[tuple[Array, Any], Any]:
            x, carry = state
            number, column, share = inputs
            x = layer(x, mask, fold_in(keys, number))
            carry, seen = read(carry, x, column)
            if share is not None:
                x = pass_back(x, share)
            return (x, carry), seen

        length = self.cfg.num_hidden_layers
        # On a CPU a training step of the rolled loop measures up to 1.2 times slower; unrolled,
        # though, XLA merges what remat repeats with what it repeats.
        rolled = self.remat or target() != "cpu"
        scan = nn.scan(
            nn.remat(body, prevent_cse=False) if self.remat else body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=length,
            unroll=1 if rolled else length,
        )
        # 0 stands for the embeddings.
        numbers = jnp.arange(1, length + 1)
        (x, carry), seen = scan(self.layers, (x, carry), (numbers, columns, passes))
        return x, carry, seen
