"""Our attention compared with `jax.nn.dot_product_attention`, by XLA and by cuDNN.

Axes: B rows, T tokens, D width, H heads, K head size, F feed-forward.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ejax.config import BertConfig
from ejax.inference.prepared import Prepared, RunLayer, prepare, run_layer
from ejax.models.bert import ACTIVATIONS, einsum, layer_norm
from ejax.models.early_exit import EarlyExitBert
from train.accelerator import common

Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def attend_by(implementation: Any, *, lengths: bool = False) -> Attend:
    """`jax.nn.dot_product_attention` on [B, T, H, K]; padding as a mask, or as lengths.

    Lengths hold for rows that are padded on the right alone, which all of a tokenizer are.
    """

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        padding: dict[str, Any]
        if lengths:
            padding = {"key_value_seq_lengths": mask.sum(axis=1, dtype=jnp.int32)}
        else:
            padding = {"mask": mask[:, None, None, :] > 0}
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation, **padding)

    return attend


def layer_with(attend: Attend) -> RunLayer:
    """`run_layer` with another attention, for prepared weights that are not turned."""

    def layer(cfg: Any, weights: Prepared, i: int, x: jax.Array, mask: jax.Array) -> jax.Array:
        p = weights.layers[i]

        def project(name: str, spec: str, x: jax.Array) -> jax.Array:
            return einsum(spec, cfg.dtype, x, p[name]["kernel"]) + p[name]["bias"]

        def norm(name: str, x: jax.Array) -> Any:
            return layer_norm(cfg, name).apply({"params": p[name]}, x)

        q, k, v = (
            project(name, "btd,dhk->bthk", x).astype(cfg.dtype)
            for name in ("query", "key", "value")
        )
        out = project("attention_output", "bthk,hkd->btd", attend(q, k, v, mask))
        x = norm("attention_norm", x.astype(jnp.float32) + out)
        hidden = ACTIVATIONS[cfg.hidden_act](project("intermediate", "btd,df->btf", x))
        out = norm("output_norm", x + project("output", "btf,fd->btd", hidden))
        return out.astype(cfg.residual_dtype)

    return layer


def attention(given: common.Sizes) -> common.Found:
    """A layer with our attention, with JAX's and with cuDNN's: time, and how far from float32.

    One is equal when its largest error at real tokens is at most `LIMIT` times our own.
    """
    layers: dict[str, RunLayer] = {
        "ours": run_layer,
        "xla_mask": layer_with(attend_by("xla")),
        "xla_lengths": layer_with(attend_by("xla", lengths=True)),
    }
    left_out = {}
    if jax.default_backend() == "gpu":
        layers["cudnn_mask"] = layer_with(attend_by("cudnn"))
        layers["cudnn_lengths"] = layer_with(attend_by("cudnn", lengths=True))
    else:
        left_out["cudnn"] = "needs a CUDA device"
    bundle = common.bundle_of(given.base, given.base_exits)
    weights = jax.device_put(prepare(bundle.model, bundle.variables))
    exact = dataclasses.replace(bundle.cfg, dtype="float32")
    exact_weights = prepare(EarlyExitBert(exact, bundle.exits), bundle.variables)
    shapes: list[dict[str, Any]] = []
    for rows, length in given.attention:
        mask = jnp.asarray(common.random_batch(bundle.cfg, rows, length, ragged=True).mask)
        x = common.stream(bundle.cfg, rows, length)
        golden = once(exact, run_layer)(exact_weights, x, mask)
        runs, errors = {}, {}
        for name, layer in layers.items():
            try:
                apart = jnp.abs(once(bundle.cfg, layer)(weights, x, mask) - golden)
                errors[name] = float((apart * mask[:, :, None]).max())
                run = common.layer_runs(bundle.cfg, weights, x, mask, layer)
                jax.block_until_ready(run())
                runs[name] = run
            except Exception as error:
                if not name.startswith("cudnn"):  # which takes some shapes and devices alone
                    raise
                left_out[f"{name} {rows} x {length}"] = f"{type(error).__name__}: {error}"[:300]
        seconds = common.timings(given, runs)
        shapes.append(
            {
                "rows": rows,
                "tokens": length,
                "errors": errors,
                "seconds": {
                    name: {which: value / common.LAYERS for which, value in of.items()}
                    for name, of in seconds.items()
                },
                "equal": {name: errors[name] <= common.LIMIT * errors["ours"] for name in runs},
            }
        )
        yield {"shapes": shapes, "left_out": left_out}
    equal = [
        name for name in layers if name != "ours" and all(of["equal"].get(name) for of in shapes)
    ]
    yield {"equal_everywhere": equal, "summary": "; ".join(map(fastest_attention, shapes))}


def once(cfg: BertConfig, layer: RunLayer) -> Callable[..., jax.Array]:
    """The first layer as a program: (weights, x, mask) -> float32 [B, T, D]."""
    return jax.jit(lambda weights, x, mask: layer(cfg, weights, 0, x, mask).astype(jnp.float32))


def fastest_attention(shape: Mapping[str, Any]) -> str:
    seconds = {name: of["median"] for name, of in shape["seconds"].items() if shape["equal"][name]}
    name = min(seconds, key=seconds.__getitem__)
    ratio = seconds["ours"] / seconds[name]
    return (
        f"{shape['rows']} x {shape['tokens']}: {name} fastest of the equal, {ratio:.2f} times ours"
    )
