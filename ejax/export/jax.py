"""A bundle's early exit as one program that JAX loads and runs without ejax.

The program is `jax.export`'s: StableHLO for CPUs, CUDA GPUs and TPUs in one file, in which the
number of rows and of tokens are symbols. JAX compiles it once for each shape it is called with.
The weights lie next to it and are an argument: inside, each of those compiled programs would hold
a copy.

Axes: N rows, T tokens, E exits, O outputs of a head.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from safetensors.numpy import save_file

from ejax.bundle import Bundle
from ejax.bundle_files import WEIGHTS
from ejax.export.hf import folder_of_no_bundle
from ejax.hardware import compiling_for
from ejax.inference.pool import run_pool, stored
from ejax.inference.prepared import Prepared, prepare
from ejax.models.bert import Batch
from ejax.saving import replacing

PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAM, ABOUT = "program.jax", "export.json"
TILE = 32  # rows; a rest of up to 24 rows runs in tiles of 8


def export_jax(bundle: Bundle, folder: str | Path) -> Path:
    """Writes program.jax, model.safetensors, tokenizer.json and export.json.

    The program is (weights, ids, types, mask, thresholds) -> (logits, exit, score): the weights
    as they are in the file, by name, int32 [N, T] three times, float32 [N, E]; float32 [N, O],
    int32 [N], float32 [N], as of `ejax.Decision`. Any N, and any T up to the encoder's positions.
    It computes in the bundle's types with its temperatures. An exit 0 reads the T tokens, where a
    classifier's reads the whole text.

    Raises:
      ValueError: when the bundle has no weights, or `folder` is a bundle or cannot be written.
    """
    folder = folder_of_no_bundle(folder)
    bundle.check_weights("ejax export")
    with jax.enable_x64(False):
        with compiling_for(PLATFORMS[-1]):  # weights in the one order that suits all
            weights = prepare(bundle.model, bundle.variables)
        tensors = named(weights)
        program = exported(bundle, weights)
    with replacing(folder) as fresh:
        save_file(tensors, fresh / WEIGHTS)
        (fresh / PROGRAM).write_bytes(program.serialize())
        bundle.tokenizer.save(fresh)
        text = json.dumps(about(bundle, program), indent=2, ensure_ascii=False)
        (fresh / ABOUT).write_text(text + "\n", encoding="utf-8")
    return folder


def exported(bundle: Bundle, weights: Prepared) -> export.Exported:
    """The program, traced and lowered for all platforms at once."""
    like, layout = jax.eval_shape(lambda: weights), jax.tree.structure(weights)
    types = [leaf.dtype for leaf in jax.tree.leaves(like)]
    names = list(named(weights))

    def early_exit(tensors: Any, ids: Any, types_of: Any, mask: Any, thresholds: Any) -> Any:
        leaves = (
            lax.bitcast_convert_type(tensors[name], dtype) if dtype == jnp.bfloat16
            else tensors[name]
            for name, dtype in zip(names, types, strict=True)
        )  # fmt: skip
        return tuple(
            run_pool(
                bundle.model, jax.tree.unflatten(layout, leaves), Batch(ids, mask, types_of),
                thresholds, bundle.calibration, jnp.int32(ids.shape[0]), tile=TILE,
            )
        )  # fmt: skip

    most = bundle.cfg.max_position_embeddings
    n, t = export.symbolic_shape("rows, tokens", constraints=[f"tokens <= {most}"])
    tokens = jax.ShapeDtypeStruct((n, t), jnp.int32)
    thresholds = jax.ShapeDtypeStruct((n, len(bundle.exits.layers)), jnp.float32)
    of_file = {name: jax.eval_shape(partial(jnp.asarray, x)) for name, x in named(weights).items()}
    make = export.export(jax.jit(early_exit), platforms=PLATFORMS)
    return make(of_file, tokens, tokens, tokens, thresholds)


def named(weights: Prepared) -> dict[str, np.ndarray]:
    """Every array under a name such as layers.0.query.kernel, in the order of the tree.

    bfloat16 as its bits, uint16, which safetensors reads into numpy.
    """
    paths = jax.tree_util.tree_leaves_with_path(weights)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(stored(leaf))
        for path, leaf in paths
    }


def about(bundle: Bundle, program: export.Exported) -> dict[str, Any]:
    """What a caller needs besides the program; ready for JSON."""
    return {
        "problem_type": bundle.exits.problem_type,
        "labels": bundle.labels,
        "layers": bundle.exits.layers,
        "thresholds": bundle.thresholds,
        "temperatures": bundle.temperatures,
        "max_length": bundle.max_length,
        "dtype": bundle.cfg.dtype,
        "platforms": program.platforms,
        "jax": jax.__version__,
    }
