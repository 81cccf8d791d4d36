"""The files of a bundle: what they hold, and whether they are those that were saved.

model.safetensors   the encoder under Hugging Face names, the heads under `heads.`, exit 0
                    under `ngrams.`, its table without rows of zeros
config.json         Hugging Face's, with id2label and the layers kept
tokenizer.json      Hugging Face's
exits.json          exits, temperatures, thresholds (of an answer too, where `abstain` holds
                    one), how they were chosen, and the sha256 of model.safetensors, of the
                    other files, and of its own values
rows.json           which rows had a part in it, see `ejax.provenance`; may be left out
README.md           the model card

An exported one, whose exits.json says with which runtime it runs, has instead of model.safetensors:
model.onnx          all exits after layers, see `ejax.onnx`; exits.json holds its sha256
ngrams.safetensors  exit 0, where there is one
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ejax import assets, storage
from ejax.errors import UserError, clipped, shown
from ejax.provenance import Ledger
from ejax.records import Whole, misfit, read_json
from ejax.storage import Held, sha256_of
from ejax.tasks import TASKS, Task

FORMAT_VERSION = 4
ROWS_KNOWN = 2  # the first format that knows rows by their text
ROWS_APART = 4  # the first that salts their hashes, and keeps them in a file of their own
WEIGHTS, CONFIG, TOKENIZER, EXITS = FILES = (
    "model.safetensors", "config.json", "tokenizer.json", "exits.json",
)  # fmt: skip
GRAPH, ZERO = "model.onnx", "ngrams.safetensors"
ROWS = "rows.json"
OWNED = (ROWS, GRAPH, ZERO, *FILES)  # all that may be of a bundle; the last makes it whole
SUMMED = (CONFIG, TOKENIZER, ROWS, ZERO)  # whose sha256 stand in exits.json under "files"
ARCHITECTURE = "EarlyExitBert"  # in config.json
TRAINED = "texts.train"  # a tensor of the formats before ROWS_APART
NGRAMS = "ngrams."  # before the names of exit 0's tensors
_PROVENANCE = {
    "config": {
        "seed": int,
        "max_drop": float,
        "data": {"text_columns": [str], "label_column": str, "dev_fraction": float},
    },
    "text_columns": [str],
    **dict.fromkeys(("label_column", "model", "teacher", "data", "thresholds_from"), str),
    "versions": {...: str},
    "depth": Whole(rows=int, exit_share=[float], thresholds=[float]),
    "target": {"target": {}},
    "calibrated": {},
    "abstain": Whole(sentence=str),
    "rows": {...: [str]},  # of older formats
}
_MORE = {
    "abstain": float, "ngram_buckets": int, "sha256": str, "files": {...: str}, "center": float,
    "spread": float, "runtime": Whole(name=str, precision=str, operators=str),
}  # fmt: skip
_FIELDS = ("precision", "operators")  # of a runtime, see `Graph`
_ROWS = Whole(complete=bool, trainings=[Whole(salt=str, rows={...: [str]})])


@dataclasses.dataclass(frozen=True)
class Graph:
    """The layers and exits as one ONNX graph, instead of weights; see `ejax.onnx`."""

    content: bytes = dataclasses.field(repr=False)  # of model.onnx
    precision: str = "float32"  # of its matrix products: float32 or int8
    operators: str = "onnxruntime"  # that engine's own too, or those of the ONNX standard alone

    def __post_init__(self) -> None:
        for name, known in (
            ("precision", ("float32", "int8")),
            ("operators", ("onnxruntime", "standard")),
        ):
            if (value := getattr(self, name)) not in known:
                raise UserError(
                    f"the {name} of an ONNX graph must be {' or '.join(known)}. Got {shown(value)}."
                )


def graph_of(files: Mapping[str, Held], meta: Mapping[str, Any]) -> Graph | None:
    """That of an exported bundle, where exits.json says that it is one."""
    if "runtime" not in meta:
        return None
    runtime = dict(meta["runtime"])
    if (name := runtime.pop("name")) != "onnx":
        raise UserError(
            f"{files[EXITS].name}: the name of the runtime must be onnx. Got {shown(name)}: "
            f"update ejax to read this bundle."
        )
    return Graph(files[GRAPH].path.read_bytes(), **{k: runtime[k] for k in _FIELDS})


def check_whole(folder: Path, files: Mapping[str, Held]) -> None:
    for name in OWNED:
        assets.held(folder / name)  # a pointer of Git LFS, or a link that leads nowhere, says so
    main = GRAPH if GRAPH in files and WEIGHTS not in files else WEIGHTS
    missing = [name for name in (main, *FILES[1:]) if name not in files]
    if not missing:
        return
    found = f"is not a whole bundle: {', '.join(missing)} missing"
    inside = folder / "bundle"  # of a workdir
    hint = f"Did you mean {inside}? " if (inside / WEIGHTS).is_file() else ""
    if (old := storage.set_aside(folder)) is not None:
        hint = f"What was there before it was to be replaced is {old}: give it its name back. "
    raise UserError(
        f"{folder} {found if folder.exists() else 'does not exist'}. {hint}"
        f"A bundle is the folder that `ejax train --output` writes."
    )


def exits_of(files: Mapping[str, Held]) -> dict[str, Any]:
    """What exits.json holds, of the types that it must have."""
    meta, name = read_json(files[EXITS]), files[EXITS].name
    version = meta.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise UserError(
            f"{name} must have a format_version of at most {FORMAT_VERSION}. Got "
            f"{shown(version)}: update ejax to read this bundle."
        )
    kind = meta.get("problem_type", Task.problem_type)
    if kind not in list(TASKS):
        raise UserError(
            f"{name}: problem_type must be one of {', '.join(TASKS)}. Got {shown(kind)}."
        )
    problem = misfit(meta, _schema(TASKS[kind])) or misfit(meta, _MORE)
    if problem:
        raise UserError(f"{name} is damaged: {problem}.")
    return meta


def _schema(task: type[Task]) -> Whole:
    """Of exits.json."""
    measures = Whole(dict.fromkeys(task.measures, float))
    point: dict[Any, Any] = {task.metric: float, f"full_{task.metric}": float}
    point |= {"rows": int, "mean_depth": float, "exit_share": [float]}
    scores = {"center": float, "spread": float} if task.problem_type == "regression" else {}
    provenance = _PROVENANCE | {
        "metrics": {...: [Whole(after=measures)]}, "operating_points": {...: Whole(point)},
    }  # fmt: skip
    return Whole(
        layers=[int], pooling=str, mix=str, max_length=int, buckets=[int], dtype=str,
        temperatures=[[float]] if task.answer_ndim == 2 else [float], thresholds=[float],
        residual_dtype=str, provenance=provenance, **scores,
    )  # fmt: skip


def check_weights(files: Mapping[str, Held], meta: Mapping[str, Any]) -> None:
    sums = {GRAPH if "runtime" in meta else WEIGHTS: meta.get("sha256")}
    if "runtime" in meta and 0 in meta["layers"]:
        sums[ZERO] = meta.get("files", {}).get(ZERO)
    for file, wanted in sums.items():
        if file not in files:
            raise UserError(
                f"{files[EXITS].name.with_name(file)} is missing, which exits.json speaks of: save "
                f"or copy the bundle again."
            )
        path, name = files[file]
        if meta["format_version"] >= ROWS_APART and sha256_of(path) != wanted:
            raise UserError(
                f"{name} is damaged or of another bundle: its sha256 is not that in exits.json. "
                f"Save or copy the bundle again."
            )


@contextmanager
def opened(weights: Held) -> Iterator[Any]:
    try:
        with safe_open(weights.path, "numpy") as tensors:
            yield tensors
    except (SafetensorError, OSError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{weights.name} is damaged: {clipped(error)}. Save or copy the bundle again."
        ) from None


def labels_of(config: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """In the order of their indices, whatever the order of the file."""
    names = config.get("id2label")
    if (
        not isinstance(names, dict)
        or set(names) != {str(i) for i in range(len(names))}
        or misfit(names, {...: str})
        or len(set(names.values())) < len(names)
    ):
        raise UserError(
            f"{path}: id2label must map 0, 1, … to the names of the labels, each once. "
            f"Got {shown(names)}."
        )
    if any("\ud800" <= sign <= "\udfff" for name in names.values() for sign in name):
        raise UserError(f"{path}: id2label must hold Unicode text. Got {shown(names)}.")
    return tuple(names[str(i)] for i in range(len(names)))


def ledger_of(files: Mapping[str, Held], meta: Mapping[str, Any]) -> Ledger:
    """That of the bundle whose exits.json this is."""
    version = meta["format_version"]
    if version < ROWS_KNOWN or (version >= ROWS_APART and ROWS not in files):
        return Ledger()  # the first format's hashes held labels too
    if version < ROWS_APART:
        return _older_ledger(files, meta["provenance"])
    path, name = files[ROWS]
    values = read_json(files[ROWS], _ROWS)
    same_weights = values.get("sha256") == meta.get("sha256")
    if not same_weights or meta.get("files", {}).get(ROWS) not in (None, sha256_of(path)):
        raise UserError(
            f"{name} is not of these weights: put back the one that was saved with them, or "
            f"remove it."
        )
    try:
        return Ledger.from_json(values)
    except UserError as error:
        raise UserError(f"{name} is damaged: {error}.") from None


def _older_ledger(files: Mapping[str, Held], provenance: Mapping[str, Any]) -> Ledger:
    """Salted, from the unsalted hashes of formats before `ROWS_APART`."""
    trained = np.zeros(0, np.int64)
    if WEIGHTS in files:
        with opened(files[WEIGHTS]) as tensors:
            trained = tensors.get_tensor(TRAINED) if TRAINED in set(tensors.keys()) else trained
    if trained.dtype != np.int64 or trained.ndim != 1:
        raise UserError(f"{files[WEIGHTS].name}: {TRAINED} must be a list of int64.")
    rows = {"train": [f"{row:012x}" for row in trained.tolist()], **provenance.get("rows", {})}
    return Ledger(complete="rows_unknown" not in provenance).with_training(rows)


def ledger_behind(folder: Path) -> Ledger:
    """What a training that starts from the weights in a folder, a bundle's or others, must know."""
    with storage.held(folder, (ROWS, *FILES)) as files:
        made_by = read_json(files[CONFIG]).get("architectures") if CONFIG in files else None
        if EXITS in files:
            ledger = ledger_of(files, exits_of(files))
        elif isinstance(made_by, list) and ARCHITECTURE in made_by:
            ledger = _older_ledger(files, {"rows_unknown": True})  # weights alone
        else:
            ledger = Ledger(complete=True)
    return ledger.behind()


def changed_files(files: Mapping[str, Held], meta: Mapping[str, Any]) -> list[str]:
    """The files that are not those which were saved, as far as their sums tell."""
    sums = meta.get("files", {})
    found = [
        name
        for name in (CONFIG, TOKENIZER)
        if name in sums and sums[name] != sha256_of(files[name].path)
    ]
    return found + [EXITS] * (meta.get("values", digest_of(meta)) != digest_of(meta))


def digest_of(meta: Mapping[str, Any]) -> str:
    """The sha256 of what exits.json holds besides it."""
    values = {name: value for name, value in meta.items() if name != "values"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
