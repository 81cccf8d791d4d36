"""Hugging Face BERT checkpoints ↔ parameters.

Axes: D width, H heads, K head size, F feed-forward, L layers, E exits,
V vocabulary, P positions.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  teaches numpy the name "bfloat16"
import numpy as np

from ejax import assets
from ejax.config import BertConfig, ExitConfig, check_layers, field_types, from_json, to_json
from ejax.errors import UserError, clipped, shown

Params = dict[str, Any]
NAMED = 3  # tensors that do not fit, in one error
WEIGHTS = "model.safetensors"
FLOATS = ("float32", "float16", "bfloat16", "float64")

# Keys that would change the maths, and the only values the encoder here computes.
_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("bert",),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "quantization_config": ({},),
}
# Ours alone: a checkpoint's own "dtype" says how it is stored, not how to compute.
_NOT_IN_HF = ("dtype", "residual_dtype")


class _Leaf(NamedTuple):
    """One leaf of the parameters and its tensor; {} in `name` is the layer, from 0."""

    path: tuple[str, ...]
    shape: tuple[int, ...]  # of one layer
    name: str
    hf_shape: tuple[int, ...]

    @property
    def stacked(self) -> bool:
        return self.path[0] == "layers"

    def from_hf(self, tensor: np.ndarray) -> np.ndarray:
        return (tensor.T if self.path[-1] == "kernel" else tensor).reshape(self.shape)

    def to_hf(self, leaf: np.ndarray) -> np.ndarray:
        if self.path[-1] == "kernel":  # Linear keeps [out, in]
            return np.ascontiguousarray(leaf.reshape(self.hf_shape[::-1]).T)
        return np.ascontiguousarray(leaf.reshape(self.hf_shape))


def _leaves(cfg: BertConfig, *, pooler: bool) -> list[_Leaf]:
    """Every leaf of the parameter tree, with its Hugging Face name and shape."""
    d, h, k, f = cfg.hidden_size, cfg.num_attention_heads, cfg.head_size, cfg.intermediate_size
    leaves = []

    def table(name: str, hf: str, rows: int) -> None:
        path = ("embeddings", name, "embedding")
        leaves.append(_Leaf(path, (rows, d), f"embeddings.{hf}_embeddings.weight", (rows, d)))

    def norm(path: tuple[str, ...], hf: str) -> None:
        leaves.append(_Leaf((*path, "scale"), (d,), f"{hf}.weight", (d,)))
        leaves.append(_Leaf((*path, "bias"), (d,), f"{hf}.bias", (d,)))

    def linear(
        path: tuple[str, ...], hf: str, inner: tuple[int, ...], outer: tuple[int, ...]
    ) -> None:
        hf_shape = (math.prod(outer), math.prod(inner))
        leaves.append(_Leaf((*path, "kernel"), (*inner, *outer), f"{hf}.weight", hf_shape))
        leaves.append(_Leaf((*path, "bias"), outer, f"{hf}.bias", hf_shape[:1]))

    table("word", "word", cfg.vocab_size)
    table("position", "position", cfg.max_position_embeddings)
    table("token_type", "token_type", cfg.type_vocab_size)
    norm(("embeddings", "norm"), "embeddings.LayerNorm")
    layer = "encoder.layer.{}"
    for name in ("query", "key", "value"):
        linear(("layers", name), f"{layer}.attention.self.{name}", (d,), (h, k))
    linear(("layers", "attention_output"), f"{layer}.attention.output.dense", (h, k), (d,))
    norm(("layers", "attention_norm"), f"{layer}.attention.output.LayerNorm")
    linear(("layers", "intermediate"), f"{layer}.intermediate.dense", (d,), (f,))
    linear(("layers", "output"), f"{layer}.output.dense", (f,), (d,))
    norm(("layers", "output_norm"), f"{layer}.output.LayerNorm")
    if pooler:
        linear(("pooler",), "pooler.dense", (d,), (d,))
    return leaves


def load_bert(name: str | Path, **overrides: Any) -> tuple[BertConfig, Params]:
    """Reads a Hugging Face BERT.

    Args:
      name: a folder with config.json and model.safetensors or its shards, a hub id, or a name in
        `ejax.assets.PACKAGES`.
      **overrides: fields of `BertConfig`, such as dtype="float32".

    Returns:
      The config and the parameters of `BertModel`: numpy float32, whatever type the
      file has, plus "pooler" if the checkpoint has one. Heads are not read.

    Raises:
      ValueError: when the folder, the config or any tensor of the encoder does not
        fit; the first tensors that do not are listed.
    """
    folder = assets.resolve(str(name))
    cfg = from_json(BertConfig, {**to_json(read_config(folder)), **overrides})
    tensors = _read_tensors(folder)
    try:
        return cfg, from_hf(tensors, cfg)
    except ValueError as error:
        raise UserError(f"{folder / WEIGHTS}: {error}") from None


def read_config(folder: str | Path) -> BertConfig:
    """The `BertConfig` in a Hugging Face folder's config.json.

    Keys that do not change what the encoder computes are ignored.

    Raises:
      ValueError: for a missing or broken file, or a setting that is not supported.
    """
    path = Path(folder) / "config.json"
    values = assets.read_object(path)
    if "hidden_size" not in values:
        for inside in sorted(Path(folder).glob("*_Transformer/config.json")):
            raise UserError(
                f"{folder} is of an old sentence-transformers, which keeps the BERT in a folder "
                f"of its own: give {inside.parent}."
            )
        if not path.is_file():
            raise UserError(f"{folder} has no config.json: give the folder of a Hugging Face BERT.")
    return config_of(values, path)


def config_of(values: Mapping[str, Any], path: Path) -> BertConfig:
    """The `BertConfig` in the values of the config.json at `path`, see `read_config`."""
    for key, allowed in _ONLY.items():
        value = values.get(key)
        if value is not None and value not in allowed:
            raise UserError(
                f"{path}: {key} must be {' or '.join(map(repr, allowed))}, the only one supported. "
                f"Got {shown(value)}."
            )
    known = [name for name in field_types(BertConfig) if name not in _NOT_IN_HF]
    given = {name: values[name] for name in known if values.get(name) is not None}
    try:
        return from_json(BertConfig, given)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def cut(cfg: BertConfig, exits: ExitConfig) -> BertConfig:
    """The encoder kept: the layers above the last exit are never run, nor stored."""
    check_layers(exits.layers, cfg.num_hidden_layers)
    return dataclasses.replace(cfg, num_hidden_layers=exits.num_layers)


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, from one file or from the shards that an index names."""
    path = folder / WEIGHTS
    index = path.with_name(f"{WEIGHTS}.index.json")
    if assets.held(path):
        return _read_file(path)
    if not assets.held(index):
        if (folder / "model.onnx").exists():
            raise UserError(
                f"{folder} holds an ONNX graph, not the weights that a training starts from: give "
                f"the bundle that it was exported from."
            )
        names = ", ".join(sorted(file.name for file in folder.iterdir())) or "nothing"
        raise UserError(
            f"{folder} has no {WEIGHTS}, the one format read; it holds {names}. Convert "
            f"pytorch_model.bin and the like once, where PyTorch and transformers are installed: "
            f"AutoModel.from_pretrained(name).save_pretrained(folder)."
        )
    where = assets.read_object(index).get("weight_map")
    shards = sorted({str(shard) for shard in where.values()}) if isinstance(where, dict) else []
    if not shards or any(Path(shard).name != shard or len(shard) > 255 for shard in shards):
        raise UserError(
            f"{index} must hold weight_map, the file next to it that has each tensor. Got "
            f"{str(where)[:60]}: fetch it again."
        )
    missing = [shard for shard in shards if not assets.held(folder / shard)]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of the {len(shards)} files that {index.name} names, "
            f"such as {clipped(missing[0], 80)}: fetch the rest."
        )
    return {name: x for shard in shards for name, x in _read_file(folder / shard).items()}


def _read_file(path: Path) -> dict[str, np.ndarray]:
    import safetensors
    import safetensors.numpy

    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, OSError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read, it may be damaged or cut short: {clipped(error)}. Download it "
            f"again."
        ) from None


def from_hf(tensors: Mapping[str, np.ndarray], cfg: BertConfig) -> Params:
    """Parameters of `BertModel` from tensors under their Hugging Face names.

    Names may have the prefix "bert." or not, norms may be called gamma and beta; what
    lies outside the encoder and its pooler, such as other heads, is ignored.

    Args:
      tensors: float32, float16, bfloat16 or float64.
      cfg: the shapes.

    Returns:
      numpy float32, new memory; "pooler" only if there is one.

    Raises:
      ValueError: lists the first tensors that are missing, unexpected, not finite or of a wrong
        shape or type.
    """
    from flax.traverse_util import unflatten_dict  # which imports jax

    found, problems = _encoder_tensors(tensors)
    leaves = _leaves(cfg, pooler=any(name.startswith("pooler.") for name in found))
    params: dict[tuple[str, ...], np.ndarray] = {}
    known = set()
    # Of layers that are not there the first is named. Nothing is allocated that no tensor fills.
    layers = min(cfg.num_hidden_layers, len(_layer_numbers(found)) + 1)
    for leaf in leaves:
        names = [leaf.name.format(i) for i in range(layers if leaf.stacked else 1)]
        known.update(names)
        wrong = [_misfit(name, found.get(name), leaf.hf_shape) for name in names]
        problems += [problem for problem in wrong if problem]
        if any(wrong):
            continue
        out = np.empty((len(names), *leaf.shape), np.float32)
        with np.errstate(over="ignore"):  # of float64: what is then infinite is told
            for i, name in enumerate(names):
                out[i] = leaf.from_hf(found[name])
        if not np.isfinite(out).all():
            bad = [name for name, one in zip(names, out, strict=True) if not np.isfinite(one).all()]
            problems += [f"not finite: {name}" for name in bad]
        params[leaf.path] = out if leaf.stacked else out[0]
    problems += [f"unexpected: {clipped(name, 80)}" for name in found if name not in known]
    if problems:
        _raise_misfits(problems, found, cfg)
    return unflatten_dict(params)


def _layer_numbers(found: Mapping[str, Any]) -> set[str]:
    return {name.split(".")[2] for name in found if name.startswith("encoder.layer.")}


def _encoder_tensors(
    tensors: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The encoder's and pooler's tensors under today's names, and names that stand twice."""
    found: dict[str, np.ndarray] = {}
    problems = []
    for original, tensor in tensors.items():
        name = original.removeprefix("bert.")
        ours = name.startswith(("embeddings.", "encoder.", "pooler.")) or name != original
        if not ours or name in ("embeddings.position_ids", "embeddings.token_type_ids"):
            continue
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if name in found:
            problems.append(f"twice: {clipped(original, 80)}")
        found[name] = tensor
    return found, problems


def _misfit(name: str, tensor: np.ndarray | None, shape: tuple[int, ...]) -> str | None:
    if tensor is None:
        return f"missing: {name}"
    if tensor.shape != shape:
        return f"wrong shape: {name} must be {shape}. Got {shown(tensor.shape, 60)}"
    if tensor.dtype.name not in FLOATS:
        return f"wrong type: {name} must be one of {', '.join(FLOATS)}. Got {tensor.dtype.name}"
    return None


def _raise_misfits(problems: list[str], found: Mapping[str, Any], cfg: BertConfig) -> None:
    if not found:
        raise UserError("holds no tensor of a BERT encoder, such as bert.encoder.layer.0.…")
    count, layers = len(_layer_numbers(found)), ""
    if count != cfg.num_hidden_layers:
        layers = f" ({count} layers found, num_hidden_layers is {cfg.num_hidden_layers})"
    more = [f"… and {len(problems) - NAMED} more"] if len(problems) > NAMED else []
    raise UserError(
        f"{len(problems)} of the encoder's tensors do not fit the config{layers}:\n  "
        + "\n  ".join(problems[:NAMED] + more)
    )


def to_hf(params: Params, cfg: BertConfig) -> dict[str, np.ndarray]:
    """The inverse of `from_hf`: names with the prefix "bert.", float32, bit for bit.

    Raises:
      ValueError: lists every leaf that is missing, unexpected or of a wrong shape.
    """
    from flax.traverse_util import flatten_dict

    leaves = _leaves(cfg, pooler="pooler" in params)
    stack = (cfg.num_hidden_layers,)
    shapes = {leaf.path: (stack if leaf.stacked else ()) + leaf.shape for leaf in leaves}
    given = flatten_dict(params)
    _check_leaves(shapes, {path: x.shape for path, x in given.items()}, "the config")
    tensors = {}
    for leaf in leaves:
        x = np.asarray(given[leaf.path], np.float32)
        for i, layer in enumerate(x if leaf.stacked else x[None]):
            tensors["bert." + leaf.name.format(i)] = leaf.to_hf(layer)
    return tensors


def with_pretrained(variables: Params, bert: Params, *, pooler: bool = False) -> Params:
    """The variables of `EarlyExitBert` with a pretrained encoder in them.

    Args:
      variables: what `EarlyExitBert.init` gave, of the encoder the shapes at least; not changed.
      bert: the parameters `load_bert` gave; layers above those of `variables` are
        left out.
      pooler: also start the dense layer of every exit from the checkpoint's pooler,
        if it has one. It was trained on the first token: use it with pooling "cls".

    Raises:
      ValueError: when the checkpoint has too few layers, or lists every leaf whose
        shape differs.
    """
    if not isinstance(bert, dict) or "layers" not in bert:
        raise UserError("bert must be the parameters, the second value that load_bert returns.")
    import jax.numpy as jnp
    from flax.traverse_util import flatten_dict, unflatten_dict

    if "bert" not in variables.get("params", {}):
        raise UserError('variables must be {"params": {"bert": …}}, as EarlyExitBert.init gives.')
    params = variables["params"]
    ours = flatten_dict(params["bert"])
    needed = ours["layers", "query", "bias"].shape[0]
    theirs = {path: x for path, x in flatten_dict(bert).items() if path[0] != "pooler"}
    held = next(x.shape[0] for path, x in theirs.items() if path[0] == "layers")
    if held < needed:
        raise UserError(
            f"the model needs {needed} layers and the checkpoint has {held}: choose exits up to "
            f"layer {held}."
        )
    theirs = {path: x[:needed] if path[0] == "layers" else x for path, x in theirs.items()}
    shapes = {path: x.shape for path, x in ours.items()}
    given_shapes = {path: x.shape for path, x in theirs.items()}
    copy_pooler = pooler and "pooler" in bert
    if copy_pooler:
        dense = params["heads"]["exits"]["dense"]
        for name in ("kernel", "bias"):
            shapes["pooler", name] = dense[name].shape[1:]
            given_shapes["pooler", name] = bert["pooler"][name].shape
    _check_leaves(shapes, given_shapes, "the model")

    encoder = {path: jnp.array(theirs[path], leaf.dtype) for path, leaf in ours.items()}
    params = {**params, "bert": unflatten_dict(encoder)}
    if copy_pooler:
        dense = {
            name: jnp.array(jnp.broadcast_to(bert["pooler"][name], leaf.shape), leaf.dtype)
            for name, leaf in dense.items()
        }
        exits = {**params["heads"]["exits"], "dense": dense}
        params["heads"] = {**params["heads"], "exits": exits}
    return {**variables, "params": params}


def _check_leaves(
    want: Mapping[tuple[str, ...], tuple[int, ...]],
    got: Mapping[tuple[str, ...], tuple[int, ...]],
    whose: str,
) -> None:
    problems = [f"missing: {'/'.join(path)}" for path in want if path not in got]
    problems += [f"unexpected: {'/'.join(path)}" for path in got if path not in want]
    problems += [
        f"wrong shape: {'/'.join(path)} must be {want[path]}. Got {got[path]}"
        for path in want
        if path in got and want[path] != got[path]
    ]
    if problems:
        raise UserError(
            f"{len(problems)} of the parameters do not fit {whose}:\n  " + "\n  ".join(problems)
        )
