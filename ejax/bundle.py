"""The folder that is saved, loaded and shipped.

model.safetensors   the encoder under Hugging Face names, the heads under `heads.`, exit 0
                    under `ngrams.`, its table without rows of zeros
config.json         Hugging Face's, with id2label and the layers kept
tokenizer.json      Hugging Face's
exits.json          exits, temperatures, thresholds (of an answer too, where `abstain` holds
                    one), how they were chosen, and the sha256 of model.safetensors, of the
                    other files, and of its own values
rows.json           which rows had a part in it, see `ejax.provenance`; may be left out
README.md           the model card
"""

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open

from ejax import storage
from ejax.config import BUCKETS, BertConfig, ExitConfig, from_json, to_json
from ejax.data.tokenizer import Encoded, Tokenizer, read_tokenizer
from ejax.errors import UserError, clipped, shown
from ejax.inference.cost import zero_in_layers
from ejax.inference.policy import check_calibration
from ejax.models.early_exit import EarlyExitBert, cut
from ejax.models.ngrams import unpacked_table
from ejax.models.weights import config_of, from_hf
from ejax.provenance import Ledger
from ejax.records import Whole, misfit, read_json
from ejax.storage import Held
from ejax.tasks import TASKS, Task, task_of

FORMAT_VERSION = 4
ROWS_KNOWN = 2  # the first format that knows rows by their text
ROWS_APART = 4  # the first that salts their hashes, and keeps them in a file of their own
WHOLE_TOKENS = 4096  # of a text, for exit 0
WEIGHTS, CONFIG, TOKENIZER, EXITS = FILES = (
    "model.safetensors", "config.json", "tokenizer.json", "exits.json",
)  # fmt: skip
ROWS = "rows.json"
SUMMED = (CONFIG, TOKENIZER, ROWS)  # whose sha256 stand in exits.json under "files"
TEMPERATURES = (1e-3, 1e3)  # the fit stays within 0.05 and 20
MOST = 1e3  # of a threshold: above 1 all are the same
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
    "spread": float,
}  # fmt: skip
_ROWS = Whole(complete=bool, trainings=[Whole(salt=str, rows={...: [str]})])
UNSALTED = (
    "an older ejax made it, and with its files anyone can test whether a text was trained on. "
    "Load and save it again before you share it."
)
OLDER = (
    " Which rows it was trained and fitted on is not known, and so they cannot be left out: train "
    "it again to have them known."
)


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A trained, calibrated classifier and all that is needed to run it."""

    cfg: BertConfig  # of the layers kept
    exits: ExitConfig
    variables: Any  # {"params": {"bert": …, "heads": …}}, float32
    tokenizer: Tokenizer
    labels: tuple[str, ...]
    temperatures: tuple[Any, ...]  # one per exit; of several labels a row of them, see `Task`
    thresholds: tuple[float, ...]  # one per exit; above 1 nobody leaves there
    max_length: int = 128
    buckets: tuple[int, ...] = BUCKETS
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    # The rows that had a part in it; where it was made of arrays, they are not known.
    ledger: Ledger = dataclasses.field(default_factory=Ledger)
    abstain: float = 0.0  # below this certainty a text gets no answer

    @property
    def task(self) -> Task:
        return task_of(self.exits)

    @property
    def calibration(self) -> np.ndarray:
        """`temperatures` as `Task` reads them: float32 [E] or [E, K]."""
        return np.asarray(self.temperatures, np.float32)

    @property
    def model(self) -> EarlyExitBert:
        return EarlyExitBert(self.cfg, self.exits)

    @property
    def without_zero(self) -> "Bundle":
        """The exits after layers alone: what runs in padded batches."""
        if not self.exits.has_zero:
            return self
        params = {k: v for k, v in self.variables["params"].items() if k != "ngrams"}
        return dataclasses.replace(
            self, exits=self.exits.encoder, variables={"params": params},
            temperatures=self.temperatures[1:], thresholds=self.thresholds[1:],
        )  # fmt: skip

    @property
    def adds_evidence(self) -> bool:
        """Whether later exits add exit 0's logits to their own."""
        return bool(self.exits.has_zero and self.variables["params"]["ngrams"]["evidence"].any())

    def encode(self, texts: Sequence[Any], *, first: int = 0) -> Encoded:
        """Tokenised as this bundle reads them: for exit 0 whole, see `Encoded.whole`."""
        whole = WHOLE_TOKENS if self.exits.has_zero else 0
        return self.tokenizer.encode(texts, self.max_length, whole=whole, first=first)

    def exit0_cost(self, encoded: Encoded) -> float:
        """What exit 0 costs on these texts, in layers of the encoder."""
        return zero_in_layers(self.cfg, self.exits, encoded.lengths, encoded.whole_lengths)


def load_bundle(folder: str | Path, **overrides: Any) -> Bundle:
    """Reads what `save_bundle` wrote.

    Args:
      folder: a bundle.
      **overrides: fields of `BertConfig`, such as dtype="float32".

    Raises:
      ValueError: when a file is missing, damaged or of another bundle, or the format is newer
        than this ejax.

    Warns:
      UserWarning: where it is of an older format, or a file is not the one that was saved.
    """
    names = (ROWS, *FILES)
    with storage.fetched(folder, names) as copy, storage.held(copy, names) as files:
        _check_whole(copy, files)
        meta = _exits_of(files)
        _check_weights(files, meta)
        try:
            bundle = _bundle(files, meta, overrides)
        except ValueError as error:
            if str(copy) in str(error):
                raise
            raise UserError(f"{copy}: {error}") from error
        _check(bundle, files)
        changed = _changed(files, meta)
    if meta["format_version"] < ROWS_APART:
        unknown = "" if bundle.ledger.complete else OLDER
        warnings.warn(f"{folder}: {UNSALTED}{unknown}", stacklevel=2)
    if changed:
        warnings.warn(
            f"{folder}: {' and '.join(changed)} changed after the bundle was saved: it may answer "
            f"otherwise than it did when it was measured.",
            stacklevel=2,
        )
    return bundle


def ledger_behind(folder: Path) -> Ledger:
    """What a training that starts from the weights in a folder, a bundle's or others, must know."""
    with storage.held(folder, (ROWS, *FILES)) as files:
        made_by = read_json(files[CONFIG]).get("architectures") if CONFIG in files else None
        if EXITS in files:
            ledger = _ledger(files, _exits_of(files))
        elif isinstance(made_by, list) and ARCHITECTURE in made_by:
            ledger = _older_ledger(files, {"rows_unknown": True})  # weights alone
        else:
            ledger = Ledger(complete=True)
    return ledger.behind()


def _check_whole(folder: Path, files: Mapping[str, Held]) -> None:
    missing = [name for name in FILES if name not in files]
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


def _exits_of(files: Mapping[str, Held]) -> dict[str, Any]:
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


def _check_weights(files: Mapping[str, Held], meta: Mapping[str, Any]) -> None:
    path, name = files[WEIGHTS]
    if meta["format_version"] >= ROWS_APART and sha256_of(path) != meta.get("sha256"):
        raise UserError(
            f"{name} is damaged or of another bundle: its sha256 is not that in exits.json. Save "
            f"or copy the bundle again."
        )


@contextmanager
def _opened(weights: Held) -> Iterator[Any]:
    try:
        with safe_open(weights.path, "numpy") as tensors:
            yield tensors
    except (SafetensorError, OSError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{weights.name} is damaged: {clipped(error)}. Save or copy the bundle again."
        ) from None


def _bundle(files: Mapping[str, Held], meta: dict[str, Any], overrides: dict[str, Any]) -> Bundle:
    config = read_json(files[CONFIG])
    labels = _labels(config, files[CONFIG].name)
    names = {"ngram_buckets": "buckets", "problem_type": "problem_type", "center": "center"}
    names |= {"spread": "spread"}
    more: dict[str, Any] = {names[name]: meta[name] for name in names if name in meta}
    exits = ExitConfig(tuple(meta["layers"]), len(labels), meta["pooling"], meta["mix"], **more)
    numerics = {name: meta[name] for name in ("dtype", "residual_dtype")}
    encoder = to_json(config_of(config, files[CONFIG].name))
    cfg = cut(from_json(BertConfig, {**encoder, **numerics, **overrides}), exits)
    gone = ("rows", "rows_unknown")
    return Bundle(
        cfg,
        exits,
        _variables(files[WEIGHTS], cfg, exits),
        read_tokenizer(*files[TOKENIZER]),
        labels,
        tuple(tuple(t) if isinstance(t, list) else float(t) for t in meta["temperatures"]),
        tuple(map(float, meta["thresholds"])),
        meta["max_length"],
        tuple(meta["buckets"]),
        {name: value for name, value in meta["provenance"].items() if name not in gone},
        _ledger(files, meta),
        float(meta.get("abstain", 0.0)),
    )


def _labels(config: Mapping[str, Any], path: Path) -> tuple[str, ...]:
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


def _ledger(files: Mapping[str, Held], meta: Mapping[str, Any]) -> Ledger:
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
        with _opened(files[WEIGHTS]) as tensors:
            trained = tensors.get_tensor(TRAINED) if TRAINED in set(tensors.keys()) else trained
    if trained.dtype != np.int64 or trained.ndim != 1:
        raise UserError(f"{files[WEIGHTS].name}: {TRAINED} must be a list of int64.")
    rows = {"train": [f"{row:012x}" for row in trained.tolist()], **provenance.get("rows", {})}
    return Ledger(complete="rows_unknown" not in provenance).with_training(rows)


def _variables(weights: Held, cfg: BertConfig, exits: ExitConfig) -> Any:
    """float32 parameters; nothing is allocated that the tensors do not fill."""
    path = weights.name
    with _opened(weights) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    e, n, d = len(exits.encoder.layers), exits.num_layers, cfg.hidden_size
    c = task_of(exits).outputs
    shapes = {
        "heads.mix": (e, n),
        "heads.exits.dense.kernel": (e, d, d),
        "heads.exits.dense.bias": (e, d),
        "heads.exits.classifier.kernel": (e, d, c),
        "heads.exits.classifier.bias": (e, c),
    }
    found = {name: tensors.get(name, np.zeros(())) for name in shapes}
    wrong = [name for name in shapes if found[name].shape != shapes[name]]
    if wrong:
        raise UserError(
            f"{path} does not fit exits.json: {', '.join(wrong)} missing or of another shape."
        )
    for name, tensor in found.items():
        if tensor.dtype != np.float32 or not np.isfinite(tensor).all():
            got = tensor.dtype if tensor.dtype != np.float32 else "NaN or infinity"
            raise UserError(f"{path}: {name} must hold finite float32. Got {got}.")
    saved = {k.removeprefix(NGRAMS): v for k, v in tensors.items() if k.startswith(NGRAMS)}
    others = {k: v for k, v in tensors.items() if k not in shapes and not k.startswith(NGRAMS)}
    try:
        zero = {"ngrams": unpacked_table(saved, exits)} if exits.has_zero else {}
        bert = from_hf(others, cfg)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return {"params": {"bert": bert, **traverse_util.unflatten_dict(found, sep="."), **zero}}


def _check(bundle: Bundle, files: Mapping[str, Held]) -> None:
    """Raises ValueError for what the model or the other files do not allow."""
    path, count, cfg = files[EXITS].name, len(bundle.exits.layers), bundle.cfg
    if not 4 <= bundle.max_length <= cfg.max_position_embeddings:
        raise UserError(
            f"{path}: max_length must be at least 4 and at most the "
            f"{cfg.max_position_embeddings} positions of the encoder. Got {bundle.max_length}."
        )
    if bundle.tokenizer.vocab_size > cfg.vocab_size:
        raise UserError(
            f"{files[TOKENIZER].name} must be of this encoder, which embeds {cfg.vocab_size} "
            f"tokens. Got one of {bundle.tokenizer.vocab_size}."
        )
    try:
        check_calibration(bundle.task, bundle.temperatures, count)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    several = bundle.task.answer_ndim == 2
    scales = tuple(
        t for of in bundle.temperatures for t in (of[: len(bundle.labels)] if several else [of])
    )
    many = count * len(bundle.labels) if several else count
    for values, count_of, low, high, what in (
        (bundle.thresholds, count, 0, MOST, f"thresholds from 0 to {MOST:g}"),
        (scales, many, *TEMPERATURES, "positive temperatures from {:g} to {:g}"),
    ):
        if len(values) != count_of or not all(low <= value <= high for value in values):
            raise UserError(
                f"{path} must hold {count_of} {what.format(low, high)}, one per exit. "
                f"Got {shown(list(values))}."
            )
    if not bundle.buckets or min(bundle.buckets) < 1:
        raise UserError(f"{path}: buckets must be lengths. Got {shown(bundle.buckets)}.")
    if not 0 <= bundle.abstain <= 1:
        raise UserError(
            f"{path} must hold an abstain threshold from 0 to 1, or none. Got {bundle.abstain}."
        )
    for name, rows in bundle.provenance.get("metrics", {}).items():
        if len(rows) != count:
            raise UserError(
                f"{path} is damaged: the metrics of {clipped(name, 40)} are of {len(rows)} exits, "
                f"not {count}."
            )


def _changed(files: Mapping[str, Held], meta: Mapping[str, Any]) -> list[str]:
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


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_columns_of(bundle: Bundle) -> tuple[str, ...]:
    """Those of the training; () where they were not recorded."""
    p = bundle.provenance
    asked = p.get("config", {}).get("data", {}).get("text_columns", ())  # of older bundles
    return tuple(p.get("text_columns", asked))


def label_column_of(bundle: Bundle) -> str:
    """That of the training; "" where it was recognised and not recorded."""
    p = bundle.provenance
    asked = p.get("config", {}).get("data", {}).get("label_column", "")
    return str(p.get("label_column", asked))


def check_columns(bundle: Bundle, columns: Sequence[str], source: str) -> None:
    """Raises ValueError for pairs of texts where single ones were trained on, or the reverse."""
    trained = text_columns_of(bundle) or columns
    if len(trained) != len(columns):
        raise UserError(
            f"{source} has {len(columns)} text columns ({', '.join(columns)}), and this bundle was "
            f"trained on {len(trained)} ({', '.join(trained)}): give other rows, or of a file name "
            f"the columns with text_columns (--text-column)."
        )
