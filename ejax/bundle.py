"""A trained classifier, and the folder that it is loaded from: see `ejax.bundle_files`."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ejax import storage
from ejax.bundle_files import (
    CONFIG,
    EXITS,
    NGRAMS,
    OWNED,
    ROWS_APART,
    TOKENIZER,
    WEIGHTS,
    ZERO,
    Graph,
    changed_files,
    check_weights,
    check_whole,
    exits_of,
    graph_of,
    labels_of,
    ledger_of,
    opened,
)
from ejax.config import BUCKETS, BertConfig, ExitConfig, from_json, to_json
from ejax.data.tokenizer import Encoded, Tokenizer, read_tokenizer
from ejax.errors import UserError, clipped, shown
from ejax.inference.cost import zero_in_layers
from ejax.inference.policy import check_calibration
from ejax.models.ngrams import unpacked_table
from ejax.models.weights import config_of, cut, from_hf
from ejax.provenance import Ledger
from ejax.records import read_json
from ejax.storage import Held
from ejax.tasks import Task, task_of

if TYPE_CHECKING:
    from ejax.models.early_exit import EarlyExitBert

WHOLE_TOKENS = 4096  # of a text, for exit 0
TEMPERATURES = (1e-3, 1e3)  # the fit stays within 0.05 and 20
MOST = 1e3  # of a threshold: above 1 all are the same
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
    variables: Any  # {"params": {"bert": …, "heads": …}}, float32; with a graph exit 0's alone
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
    graph: Graph | None = None  # of an exported one: in place of the weights

    @property
    def task(self) -> Task:
        return task_of(self.exits)

    @property
    def calibration(self) -> np.ndarray:
        """`temperatures` as `Task` reads them: float32 [E] or [E, K]."""
        return np.asarray(self.temperatures, np.float32)

    @property
    def numerics(self) -> str:
        """What its logits are computed in: a dtype, or of a graph such as "onnx-int8"."""
        return f"onnx-{self.graph.precision}" if self.graph else self.cfg.dtype

    def check_weights(self, who: str) -> None:
        """Raises ValueError where there are no weights of the encoder, which `who` needs."""
        if self.graph:
            raise UserError(
                f"{who} needs the weights of the encoder, and an exported folder holds an ONNX "
                f"graph instead: give the bundle that it was exported from."
            )

    @property
    def model(self) -> "EarlyExitBert":
        from ejax.models.early_exit import EarlyExitBert  # which imports jax

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
    with storage.fetched(folder, OWNED) as copy, storage.held(copy, OWNED) as files:
        check_whole(copy, files)
        meta = exits_of(files)
        check_weights(files, meta)
        if "runtime" in meta and overrides:
            raise UserError(
                f"{copy} is an exported ONNX graph, where {' and '.join(overrides)} cannot be set: "
                f"give the bundle that it was exported from."
            )
        try:
            bundle = _bundle(files, meta, overrides)
        except ValueError as error:
            if str(copy) in str(error):
                raise
            raise UserError(f"{copy}: {error}") from error
        _check(bundle, files)
        changed = changed_files(files, meta)
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


def _bundle(files: Mapping[str, Held], meta: dict[str, Any], overrides: dict[str, Any]) -> Bundle:
    config = read_json(files[CONFIG])
    labels = labels_of(config, files[CONFIG].name)
    names = {"ngram_buckets": "buckets", "problem_type": "problem_type", "center": "center"}
    names |= {"spread": "spread"}
    more: dict[str, Any] = {names[name]: meta[name] for name in names if name in meta}
    tokenizer = read_tokenizer(*files[TOKENIZER])
    if meta["pooling"] == "pair":
        more["separator"] = tokenizer.separator
    exits = ExitConfig(tuple(meta["layers"]), len(labels), meta["pooling"], meta["mix"], **more)
    numerics = {name: meta[name] for name in ("dtype", "residual_dtype")}
    encoder = to_json(config_of(config, files[CONFIG].name))
    cfg = cut(from_json(BertConfig, {**encoder, **numerics, **overrides}), exits)
    gone = ("rows", "rows_unknown")
    graph = graph_of(files, meta)
    return Bundle(
        cfg,
        exits,
        _zero_variables(files, exits) if graph else _variables(files[WEIGHTS], cfg, exits),
        tokenizer,
        labels,
        tuple(tuple(t) if isinstance(t, list) else float(t) for t in meta["temperatures"]),
        tuple(map(float, meta["thresholds"])),
        meta["max_length"],
        tuple(meta["buckets"]),
        {name: value for name, value in meta["provenance"].items() if name not in gone},
        ledger_of(files, meta),
        float(meta.get("abstain", 0.0)),
        graph,
    )


def _zero_variables(files: Mapping[str, Held], exits: ExitConfig) -> Any:
    """Exit 0's parameters alone, if there is one."""
    if not exits.has_zero:
        return {"params": {}}
    with opened(files[ZERO]) as file:
        saved = {name.removeprefix(NGRAMS): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    try:
        return {"params": {"ngrams": unpacked_table(saved, exits)}}
    except ValueError as error:
        raise UserError(f"{files[ZERO].name}: {error}") from None


def _variables(weights: Held, cfg: BertConfig, exits: ExitConfig) -> Any:
    """float32 parameters; nothing is allocated that the tensors do not fill."""
    from flax import traverse_util  # which imports jax

    path = weights.name
    with opened(weights) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    e, n, d = len(exits.encoder.layers), exits.num_layers, cfg.hidden_size
    c = task_of(exits).outputs
    shapes = {
        "heads.mix": (e, n),
        "heads.exits.dense.kernel": (e, d * exits.read, d),
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


def text_columns_of(bundle: Bundle) -> tuple[str, ...]:
    """Those of the training; () where they were not recorded."""
    p = bundle.provenance
    asked = p.get("config", {}).get("data", {}).get("text_columns", ())  # of older bundles
    pair = ("text", "text_pair") if bundle.exits.pooling == "pair" else ()
    return tuple(p.get("text_columns", asked)) or pair


def label_column_of(bundle: Bundle) -> str:
    """That of the training; "" where it was recognised and not recorded."""
    p = bundle.provenance
    asked = p.get("config", {}).get("data", {}).get("label_column", "")
    return str(p.get("label_column", asked))


def check_alike(
    who: str,
    bundle: Bundle,
    labels: Sequence[str],
    columns: Sequence[str],
    *,
    in_order: bool = True,
) -> None:
    """Raises ValueError unless the bundle has these labels, and reads as many texts per row."""
    wanted, got = (
        (list(names) if in_order else sorted(names)) for names in (labels, bundle.labels)
    )
    if wanted != got:
        order = ", in this order" if in_order else ""
        raise UserError(
            f"{who} must have the labels {', '.join(wanted)}{order}. Got {', '.join(got)}."
        )
    trained = text_columns_of(bundle)
    if columns and trained and len(columns) != len(trained):
        raise UserError(
            f"{who} must be trained on {len(columns)} text columns ({', '.join(columns)}). "
            f"Got {len(trained)} ({', '.join(trained)})."
        )


def check_columns(bundle: Bundle, columns: Sequence[str], source: str) -> None:
    """Raises ValueError for pairs of texts where single ones were trained on, or the reverse."""
    trained = text_columns_of(bundle) or columns
    if len(trained) != len(columns):
        raise UserError(
            f"{source} has {len(columns)} text columns ({', '.join(columns)}), and this bundle was "
            f"trained on {len(trained)} ({', '.join(trained)}): give other rows, or of a file name "
            f"the columns with text_columns (--text-column)."
        )
