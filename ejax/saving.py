"""A bundle takes the place of the one that was there: all of it or nothing."""

import ctypes
import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ejax import storage
from ejax.bundle import Bundle
from ejax.bundle_files import (
    ARCHITECTURE,
    EXITS,
    FORMAT_VERSION,
    GRAPH,
    NGRAMS,
    OWNED,
    ROWS,
    SUMMED,
    WEIGHTS,
    ZERO,
    digest_of,
)
from ejax.card import model_card
from ejax.config import to_json
from ejax.ending import partial, whole
from ejax.errors import UserError
from ejax.models.ngrams import packed_table
from ejax.models.weights import to_hf
from ejax.storage import sha256_of

WRITTEN = (*OWNED, "README.md")
HERE, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


def save_bundle(bundle: Bundle, folder: str | Path, *, rows: bool = True) -> Path:
    """Writes the folder under a temporary name and renames it: all of it or nothing.

    On gs:// the old bundle is gone from the start; exits.json comes last and makes it whole.

    Args:
      rows: whether to write rows.json, by which anyone can test whether a text was trained on.

    Raises:
      ValueError: when `folder` exists and is neither a bundle nor empty, or cannot be written.
    """
    between = bundle.tokenizer.separator
    if bundle.exits.pooling == "pair" and bundle.exits.separator != between:
        raise UserError(
            f"ExitConfig.separator must be {between}, as the tokenizer of this bundle tells the "
            f"texts of a pair apart. Got {bundle.exits.separator}."
        )
    with replacing(folder) as fresh:
        weights = {"sha256": sha256_of(_write_weights(bundle, fresh))}
        bundle.tokenizer.save(fresh)
        _write(fresh / "config.json", hf_config(bundle))
        if rows and (bundle.ledger.trainings or bundle.ledger.complete):
            (fresh / ROWS).write_text(json.dumps(weights | bundle.ledger.to_json()) + "\n")
        sums = {name: sha256_of(fresh / name) for name in SUMMED if (fresh / name).exists()}
        values = _exits(bundle) | weights | {"files": sums}
        _write(fresh / EXITS, values | {"values": digest_of(json.loads(_text(values)))})
        (fresh / "README.md").write_text(model_card(bundle), encoding="utf-8", errors="replace")
    return storage.path_of(folder)


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder`, a bundle or nothing, at the end."""
    folder = check_output(folder)
    if storage.is_remote(folder):
        with storage.temporary_folder() as made:
            yield made
            storage.upload(made, folder, first="config.json", last=EXITS, owned=OWNED)
        return
    folder = Path(os.path.realpath(folder))  # a link stays one
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if (old := storage.set_aside(folder)) is not None:
            old.rename(folder)  # a kill came between two renames
        with storage.temporary_folder(folder.parent, folder.name) as fresh:
            yield fresh
            fresh.chmod(0o755)
            for path in fresh.glob("*.safetensors"):
                path.chmod(0o644)  # safetensors makes it private
            if folder.exists():
                _swap(folder, fresh)
            else:
                fresh.rename(folder)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{folder} cannot be written: {why}. Nothing was changed.") from error


def _swap(folder: Path, fresh: Path) -> None:
    """`fresh` takes the place of the bundle, whose other files it keeps."""
    for item in folder.iterdir():
        if item.name not in WRITTEN:
            if item.is_dir() and not item.is_symlink():
                shutil.copytree(item, fresh / item.name, symlinks=True)
            else:
                shutil.copy2(item, fresh / item.name, follow_symlinks=False)
    if _exchange(folder, fresh):
        return
    # As `storage.set_aside` knows it.
    with partial(fresh.with_name(fresh.name + "-old")) as old, whole():
        try:
            folder.rename(old)
            fresh.rename(folder)
        except BaseException:  # Ctrl-C too, in a program that does not end by it
            if old.exists() and not folder.exists():
                old.rename(folder)
            raise


def _exchange(one: Path, other: Path) -> bool:
    """Two folders take each other's name at once; False where the system has no such call."""
    rename = (
        getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if os.name == "posix"
        else None
    )
    if rename is None:
        return False
    if rename(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY):
        return False
    raise OSError(code, os.strerror(code), str(one))


def check_output(folder: str | Path) -> Path:
    """Raises ValueError, before any work, where a bundle must not be written."""
    folder = storage.path_of(folder)
    with storage.reaching(folder):
        taken = folder.exists() and not (folder / EXITS).exists() and _taken(folder)
    if taken:
        raise UserError(f"{folder} exists and is not a bundle: choose another output folder.")
    if not storage.is_remote(folder):
        above = Path(os.path.realpath(folder)).parent  # a link stays one
        above = next(one for one in (above, *above.parents) if one.exists())
        if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
            raise UserError(f"{folder} cannot be written: {above} takes no new folder.")
        if os.path.ismount(folder):
            raise UserError(f"{folder} cannot be replaced: it is a mount. Give a folder in it.")
    return folder


def _taken(folder: Any) -> bool:
    """By anything but, on gs://, a bundle whose writing was cut off: its config.json came first."""
    if not folder.is_dir():
        return True
    held = {path.name for path in folder.iterdir()}
    if not storage.is_remote(folder):
        return bool(held)
    held.discard(folder.name)  # a console marks an empty folder by an object of its name
    cut_off = (
        "config.json" in held
        and held <= set(WRITTEN)
        and ARCHITECTURE in (folder / "config.json").read_text()
    )
    return bool(held) and not cut_off


def _write_weights(bundle: Bundle, folder: Path) -> Path:
    """The file of the weights, or of the graph in their place; next to it exit 0."""
    params, zero = bundle.variables["params"], {}
    if bundle.exits.has_zero:
        packed = packed_table(params["ngrams"])
        zero = {f"{NGRAMS}{name}": tensor for name, tensor in packed.items()}
    if bundle.graph:
        if zero:
            save_file(zero, folder / ZERO)
        (folder / GRAPH).write_bytes(bundle.graph.content)
        return folder / GRAPH
    from flax import traverse_util  # which imports jax

    heads = traverse_util.flatten_dict({"heads": params["heads"]}, sep=".")
    made = {name: np.ascontiguousarray(leaf, np.float32) for name, leaf in heads.items()}
    tensors = to_hf(params["bert"], bundle.cfg) | made | zero
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder / WEIGHTS


def hf_config(bundle: Bundle) -> dict[str, Any]:
    """The `config.json` of the encoder, under the names of Hugging Face."""
    values = to_json(bundle.cfg)
    for name in ("dtype", "residual_dtype"):
        del values[name]
    return values | {
        "model_type": "bert",
        "architectures": [ARCHITECTURE],
        "id2label": {str(i): label for i, label in enumerate(bundle.labels)},
        "label2id": {label: i for i, label in enumerate(bundle.labels)},
        "problem_type": bundle.exits.problem_type,
        "position_embedding_type": "absolute",
        "torch_dtype": "float32",
    }


def _exits(bundle: Bundle) -> dict[str, Any]:
    exits, graph = bundle.exits, bundle.graph
    optional: dict[str, Any] = {}
    if exits.problem_type != "single_label_classification":
        optional["problem_type"] = exits.problem_type
    if exits.problem_type == "regression":
        optional |= {"center": exits.center, "spread": exits.spread}
    if bundle.abstain:
        optional["abstain"] = bundle.abstain
    if exits.has_zero:
        optional["ngram_buckets"] = exits.buckets
    if graph:
        named = {"precision": graph.precision, "operators": graph.operators}
        optional["runtime"] = {"name": "onnx"} | named
    return {
        "format_version": FORMAT_VERSION,
        "layers": list(exits.layers),
        "pooling": exits.pooling,
        "mix": exits.mix,
        "temperatures": list(bundle.temperatures),
        "thresholds": list(bundle.thresholds),
        "max_length": bundle.max_length,
        "buckets": list(bundle.buckets),
        "dtype": bundle.cfg.dtype,
        "residual_dtype": bundle.cfg.residual_dtype,
        "provenance": bundle.provenance,
    } | optional


def _text(values: Any) -> bytes:
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8", "replace")  # of a path that is not


def _write(path: Path, values: Any) -> None:
    path.write_bytes(_text(values))
