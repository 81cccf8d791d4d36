"""The folder that is saved, loaded and shipped.

model.safetensors   the encoder under Hugging Face names, the heads under `heads.`, exit 0
                    under `ngrams.`, its table without rows of zeros
config.json         Hugging Face's, with id2label and the layers kept
tokenizer.json      Hugging Face's
exits.json          exits, temperatures, thresholds (of an answer too, where `abstain` holds
                    one), how they were chosen, and the sha256 of model.safetensors
rows.json           which rows had a part in it, see `ejax.provenance`; may be left out
README.md           the model card
"""

import dataclasses
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from ejax import storage
from ejax.config import BUCKETS, BertConfig, ExitConfig, from_json, to_json
from ejax.data.tokenizer import Encoded, Tokenizer, load_tokenizer
from ejax.ending import partial, whole
from ejax.errors import UserError
from ejax.inference.cost import zero_in_layers
from ejax.models.early_exit import EarlyExitBert, cut
from ejax.models.ngrams import packed_table, unpacked_table
from ejax.models.weights import from_hf, read_config, to_hf
from ejax.provenance import Ledger

FORMAT_VERSION = 4
ROWS_KNOWN = 2  # the first format that knows rows by their text
ROWS_APART = 4  # the first that salts their hashes, and keeps them in a file of their own
WHOLE_TOKENS = 4096  # of a text, for exit 0
FILES = ("model.safetensors", "config.json", "tokenizer.json", "exits.json")
ROWS = "rows.json"
WRITTEN = (ROWS, *FILES, "README.md")
ARCHITECTURE = "EarlyExitBert"  # in config.json
TRAINED = "texts.train"  # a tensor of the formats before ROWS_APART
NGRAMS = "ngrams."  # before the names of exit 0's tensors
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
    temperatures: tuple[float, ...]  # one per exit
    thresholds: tuple[float, ...]  # one per exit; above 1 nobody leaves there
    max_length: int = 128
    buckets: tuple[int, ...] = BUCKETS
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    # The rows that had a part in it; where it was made of arrays, they are not known.
    ledger: Ledger = dataclasses.field(default_factory=Ledger)
    abstain: float = 0.0  # below this certainty a text gets no answer

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


def ledger_behind(folder: Path) -> Ledger:
    """What a training that starts from the weights in a folder, a bundle's or others, must know."""
    path = folder / "exits.json"
    if path.exists():
        ledger = _ledger(folder, _read(path))
    elif ARCHITECTURE in (_read(folder / "config.json").get("architectures") or ()):
        ledger = _older_ledger(folder, {"rows_unknown": True}, ROWS_KNOWN)  # weights alone
    else:
        ledger = Ledger(complete=True)
    return ledger.behind()


def _ledger(folder: Path, meta: dict[str, Any]) -> Ledger:
    """That of the bundle whose exits.json this is."""
    path, version = folder / ROWS, _version(folder, meta)
    if version < ROWS_APART:
        return _older_ledger(folder, meta.get("provenance") or {}, version)
    if not path.exists():
        return Ledger()
    values = _read(path)
    if values.get("sha256") != meta.get("sha256"):
        _check_unchanged(folder, meta)
        raise UserError(
            f"{path} is not of these weights: put back the one that was saved with them, or "
            f"remove it."
        )
    try:
        return Ledger.from_json(values)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error!r}.") from None


def _older_ledger(folder: Path, provenance: dict[str, Any], version: int) -> Ledger:
    """Salted, from the unsalted hashes of formats before `ROWS_APART`."""
    if version < ROWS_KNOWN:  # its hashes held labels too
        return Ledger()
    with safe_open(folder / "model.safetensors", "numpy") as tensors:
        names = tensors.keys()
        trained = tensors.get_tensor(TRAINED).tolist() if TRAINED in names else []
    rows = {"train": [f"{row:012x}" for row in trained], **provenance.get("rows", {})}
    return Ledger(complete="rows_unknown" not in provenance).with_training(rows)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_bundle(bundle: Bundle, folder: str | Path, *, rows: bool = True) -> Path:
    """Writes the folder under a temporary name and renames it: all of it or nothing.

    On gs:// the old bundle is gone from the start; exits.json comes last and makes it whole.

    Args:
      rows: whether to write rows.json, by which anyone can test whether a text was trained on.

    Raises:
      ValueError: when `folder` exists and is neither a bundle nor empty, or cannot be written.
    """
    with replacing(folder) as fresh:
        save_file(_tensors(bundle), fresh / "model.safetensors", metadata={"format": "pt"})
        weights = {"sha256": sha256_of(fresh / "model.safetensors")}
        bundle.tokenizer.save(fresh)
        _write(fresh / "config.json", hf_config(bundle))
        if rows and (bundle.ledger.trainings or bundle.ledger.complete):
            (fresh / ROWS).write_text(json.dumps(weights | bundle.ledger.to_json()) + "\n")
        _write(fresh / "exits.json", _exits(bundle) | weights)
        (fresh / "README.md").write_text(model_card(bundle), encoding="utf-8", errors="replace")
    return storage.path_of(folder)


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder`, a bundle or nothing, at the end."""
    folder = check_output(folder)
    if storage.is_remote(folder):
        with storage.temporary_folder() as made:
            yield made
            if not (made / ROWS).exists():
                with storage.reaching(folder):  # rows of the bundle that was there
                    (folder / ROWS).unlink(missing_ok=True)
            storage.upload(made, folder, first="config.json", last="exits.json")
        return
    folder = Path(os.path.realpath(folder))  # a link stays one
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with storage.temporary_folder(folder.parent) as fresh:
            yield fresh
            fresh.chmod(0o755)
            (fresh / "model.safetensors").chmod(0o644)  # safetensors makes it private
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
            (shutil.copytree if item.is_dir() else shutil.copy2)(item, fresh / item.name)
    with partial(fresh.with_name(fresh.name + "-old")) as old, whole():
        try:
            folder.rename(old)
            fresh.rename(folder)
        except BaseException:  # Ctrl-C too, in a program that does not end by it
            if old.exists() and not folder.exists():
                old.rename(folder)
            raise


def check_output(folder: str | Path) -> Path:
    """Raises ValueError, before any work, where a bundle must not be written."""
    folder = storage.path_of(folder)
    with storage.reaching(folder):
        taken = folder.exists() and not (folder / "exits.json").exists() and _taken(folder)
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


def load_bundle(folder: str | Path, **overrides: Any) -> Bundle:
    """Reads what `save_bundle` wrote.

    Args:
      folder: a bundle.
      **overrides: fields of `BertConfig`, such as dtype="float32".

    Raises:
      ValueError: when a file is missing, damaged or of another bundle, or the format is newer
        than this ejax.
    """
    if storage.is_remote(folder):
        with storage.fetched(folder, (ROWS, *FILES)) as copy:
            return load_bundle(copy, **overrides)
    folder = storage.path_of(folder)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        found = f"is not a whole bundle: {', '.join(missing)} missing"
        inside = folder / "bundle"  # of a workdir
        raise UserError(
            f"{folder} {found if folder.exists() else 'does not exist'}. "
            + (f"Did you mean {inside}? " if (inside / FILES[0]).is_file() else "")
            + "A bundle is the folder that `ejax train --output` writes."
        )
    meta = _read(folder / "exits.json")
    version = _version(folder, meta)
    try:
        _check_weights(folder, meta)
        labels = _labels(folder / "config.json")
        extra = {"buckets": meta["ngram_buckets"]} if "ngram_buckets" in meta else {}
        exits = ExitConfig(
            tuple(meta["layers"]), len(labels), meta["pooling"], meta["mix"], **extra
        )
        numerics = {name: meta[name] for name in ("dtype", "residual_dtype")}
        cfg = from_json(BertConfig, {**to_json(read_config(folder)), **numerics, **overrides})
        provenance = dict(meta["provenance"])
        bundle = Bundle(
            cut(cfg, exits),
            exits,
            _variables(folder, cfg, exits),
            load_tokenizer(folder),
            labels,
            tuple(float(t) for t in meta["temperatures"]),
            tuple(float(t) for t in meta["thresholds"]),
            int(meta["max_length"]),
            tuple(int(length) for length in meta["buckets"]),
            {k: v for k, v in provenance.items() if k not in ("rows", "rows_unknown")},
            _ledger(folder, meta),
            float(meta.get("abstain", 0.0)),
        )
        _check_unchanged(folder, meta)
        if version < ROWS_APART:
            unknown = "" if bundle.ledger.complete else OLDER
            warnings.warn(f"{folder}: {UNSALTED}{unknown}", stacklevel=2)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'exits.json'} is damaged: {error!r}.") from error
    except ValueError as error:
        if str(folder) in str(error):
            raise
        raise UserError(f"{folder}: {error}") from error
    if bundle.max_length > cfg.max_position_embeddings:
        raise UserError(
            f"{folder / 'exits.json'}: max_length must be at most the "
            f"{cfg.max_position_embeddings} positions of the encoder. Got {bundle.max_length}."
        )
    if bundle.tokenizer.vocab_size > cfg.vocab_size:
        raise UserError(
            f"{folder / 'tokenizer.json'} must be of this encoder, which embeds {cfg.vocab_size} "
            f"tokens. Got one of {bundle.tokenizer.vocab_size}."
        )
    if len(bundle.thresholds) != len(exits.layers) or np.isnan(bundle.thresholds).any():
        raise UserError(
            f"{folder / 'exits.json'} must hold {len(exits.layers)} thresholds, one per exit. "
            f"Got {list(bundle.thresholds)}."
        )
    if len(bundle.temperatures) != len(exits.layers) or not all(
        np.isfinite(t) and t > 0 for t in bundle.temperatures
    ):
        raise UserError(
            f"{folder / 'exits.json'} must hold {len(exits.layers)} positive temperatures, one "
            f"per exit. Got {list(bundle.temperatures)}."
        )
    if not 0 <= bundle.abstain <= 1:
        raise UserError(
            f"{folder / 'exits.json'} must hold an abstain threshold from 0 to 1, or none. "
            f"Got {bundle.abstain}."
        )
    return bundle


def _version(folder: Path, meta: dict[str, Any]) -> int:
    version = meta.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UserError(
            f"{folder / 'exits.json'} must have a format_version of at most {FORMAT_VERSION}. "
            f"Got {version!r}: update ejax to read this bundle."
        )
    return version


def _check_weights(folder: Path, meta: dict[str, Any]) -> None:
    """Raises ValueError unless the weights are those that exits.json was saved with."""
    path = folder / "model.safetensors"
    if meta["format_version"] >= ROWS_APART and sha256_of(path) != meta["sha256"]:
        _check_unchanged(folder, meta)
        raise UserError(
            f"{path} is damaged or of another bundle: its sha256 is not that in exits.json. Save "
            f"or copy the bundle again."
        )


def _check_unchanged(folder: Path, meta: dict[str, Any]) -> None:
    if _read(folder / "exits.json") != meta:
        raise UserError(f"{folder} is being written at this moment: try again.")


def _labels(path: Path) -> tuple[str, ...]:
    """In the order of their indices, whatever the order of the file."""
    config = _read(path)
    kind = config.get("problem_type") or "single_label_classification"
    if kind != "single_label_classification":
        raise UserError(
            f'{path}: problem_type "{kind}" is not supported yet: only single labels are.'
        )
    names = config.get("id2label")
    if not isinstance(names, dict) or set(names) != {str(i) for i in range(len(names))}:
        raise UserError(
            f"{path}: id2label must map 0, 1, … to the names of the labels. Got {names!r}."
        )
    return tuple(names[str(i)] for i in range(len(names)))


def _tensors(bundle: Bundle) -> dict[str, np.ndarray]:
    params = bundle.variables["params"]
    heads = traverse_util.flatten_dict({"heads": params["heads"]}, sep=".")
    made = {name: np.ascontiguousarray(leaf, np.float32) for name, leaf in heads.items()}
    if bundle.exits.has_zero:
        saved = packed_table(params["ngrams"])
        made |= {f"{NGRAMS}{name}": tensor for name, tensor in saved.items()}
    return to_hf(params["bert"], bundle.cfg) | made


def _variables(folder: Path, cfg: BertConfig, exits: ExitConfig) -> Any:
    path = folder / "model.safetensors"
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}. Save or copy the bundle again.") from None
    e, n, d, c = len(exits.encoder.layers), exits.num_layers, cfg.hidden_size, exits.num_labels
    shapes = {
        "heads.mix": (e, n),
        "heads.exits.dense.kernel": (e, d, d),
        "heads.exits.dense.bias": (e, d),
        "heads.exits.classifier.kernel": (e, d, c),
        "heads.exits.classifier.bias": (e, c),
    }
    wrong = [name for name in shapes if getattr(tensors.get(name), "shape", 0) != shapes[name]]
    if wrong:
        raise UserError(
            f"{path} does not fit exits.json: {', '.join(wrong)} missing or of another shape."
        )
    heads = traverse_util.unflatten_dict({name: tensors.pop(name) for name in shapes}, sep=".")
    grams = [name for name in tensors if name.startswith(NGRAMS)]
    saved = {name.removeprefix(NGRAMS): tensors.pop(name) for name in grams}
    try:
        zero = {"ngrams": unpacked_table(saved, exits)} if exits.has_zero else {}
        bert = from_hf(tensors, cut(cfg, exits))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return {"params": {"bert": bert, **heads, **zero}}


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
        "problem_type": "single_label_classification",
        "position_embedding_type": "absolute",
        "torch_dtype": "float32",
    }


def _exits(bundle: Bundle) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "layers": list(bundle.exits.layers),
        "pooling": bundle.exits.pooling,
        "mix": bundle.exits.mix,
        "temperatures": list(bundle.temperatures),
        "thresholds": list(bundle.thresholds),
        **({"abstain": bundle.abstain} if bundle.abstain else {}),
        "max_length": bundle.max_length,
        "buckets": list(bundle.buckets),
        **({"ngram_buckets": bundle.exits.buckets} if bundle.exits.has_zero else {}),
        "dtype": bundle.cfg.dtype,
        "residual_dtype": bundle.cfg.residual_dtype,
        "provenance": bundle.provenance,
    }


def _write(path: Path, values: Any) -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8", errors="replace")  # of a path that is not


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: expected a JSON object.")
    return values


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


def describe_thresholds(thresholds: Sequence[float]) -> str:
    """In words: the last exit, which takes everyone, left out."""
    early = sorted(set(thresholds[:-1]))
    if not early or early[0] > 1:
        return "full depth"
    if len(early) == 1:
        return f"{early[0]:.7g}"
    return ", ".join(map(describe_threshold, thresholds[:-1]))


def describe_threshold(threshold: float) -> str:
    """Of one exit: those near 1 are chosen to more digits."""
    if threshold > 1:
        return "none"
    return f"{threshold:.3f}" if threshold < 0.999 else f"{threshold:.7g}"


def exits_in_words(exits: ExitConfig) -> str:
    """Such as "before the first layer and after layers 2, 4"."""
    before = "before the first layer and " if exits.has_zero else ""
    return f"{before}after layers {', '.join(map(str, exits.encoder.layers))}"


def model_card(bundle: Bundle) -> str:
    """What the bundle is, how its thresholds came about, and how to run it."""
    p = bundle.provenance
    zero_gives_away = (
        "Exit 0's table has numbers for the hash of each token and pair of tokens that at least "
        "three training texts hold: it may still show that such a pair occurred."
    )
    lines = [
        "---",
        "library_name: ejax",
        "pipeline_tag: text-classification",
        "---",
        "",
        "# BERT with early exits",
        "",
        f"{bundle.cfg.num_hidden_layers} layers of width {bundle.cfg.hidden_size}, exits "
        f"{exits_in_words(bundle.exits)}; labels: {', '.join(bundle.labels)}.",
        "",
        f"- Started from: {p.get('model', 'not recorded')}",
        *([f"- Taught by: {p['teacher']}"] if p.get("teacher") else []),
        f"- Trained on: {p.get('data', 'not recorded')}",
        f"- Default thresholds: {describe_thresholds(bundle.thresholds)}. "
        f"{p.get('thresholds_from', '')}".rstrip(),
        *([f"- {p['abstain']['sentence']}"] if "abstain" in p else []),
        f"- Pooling {bundle.exits.pooling}, mix {bundle.exits.mix}, at most "
        f"{bundle.max_length} tokens.",
        "",
    ]
    for name in ("calibration", "dev_a", "dev_b", "test"):
        rows = p.get("metrics", {}).get(name)
        if rows:
            lines += [f"## {name.replace('_', '-')}, per exit, after temperature", ""]
            lines += ["| layer | accuracy | macro-F1 | NLL | Brier | ECE |", "|" + "---|" * 6]
            for layer, row in zip(bundle.exits.layers, rows, strict=True):
                columns = ("accuracy", "macro_f1", "nll", "brier", "ece_width")
                cells = " | ".join(f"{row['after'][column]:.4f}" for column in columns)
                lines.append(f"| {layer} | {cells} |")
            lines.append("")
    lines += [
        "## What it gives away",
        "",
        f"`{ROWS}`, where it is there, holds salted hashes of the texts that trained, fitted or "
        "tested this bundle, so that they choose no thresholds and are not reported on.",
        "With it, anyone who has a text can test whether it is among them. Where that must stay "
        "secret, leave the file out: `clf.save_pretrained(folder, rows=False)`.",
        "Then `ejax calibrate` and promises ask for `--rows-are-new`.",
        *([zero_gives_away] if bundle.exits.has_zero else []),
        "",
        "## Use",
        "",
        "```python",
        "import ejax",
        "",
        'clf = ejax.EarlyExitClassifier.from_pretrained("path/to/this/folder")',
        'clf("a text")',
        "```",
        "",
    ]
    return "\n".join(lines)
