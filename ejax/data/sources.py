"""Labelled text for training: TFDS names and local files, both as ArrayRecord.

`load` gives the splits of a `DataConfig`: rows in order, labels as indices, a dev split
carved from train where there is none. Nothing here needs TensorFlow.
"""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from ejax import assets, storage
from ejax.config import DataConfig
from ejax.data import named
from ejax.data.columns import find_text_columns, label_columns
from ejax.data.files import read_rows, texts_of
from ejax.errors import UserError

__all__ = [
    "Example", "Split", "find_text_columns", "load", "read_rows", "row_hash", "split_dev",
    "texts_of",
]  # fmt: skip

SPLITS = ("train", "dev", "test")
FILE_NAMES = {"train": ("train",), "dev": ("dev", "validation", "valid", "val"), "test": ("test",)}
LABELLED = ("tsv", "csv", "jsonl")  # formats that can hold labels
BLOCK = 4096  # rows read at once when iterating
FEW_ROWS = 20  # of which every second may have a label of its own


class Example(NamedTuple):
    """One row: a text, or a text and its pair, and the index of its label."""

    text: str
    pair: str | None
    label: int

    @property
    def inputs(self) -> str | tuple[str, str]:
        """As a tokenizer takes it."""
        return self.text if self.pair is None else (self.text, self.pair)


class Split(Sequence[Example]):
    """Rows of one split, in order, read from their ArrayRecord when asked for.

    Attributes:
      name: "train", "dev" or "test".
      labels: the label names; `Example.label` is an index into them.
      origin: where the rows come from, in words, such as "10 % of train, seed 0".
      text_columns: of the text, and of its pair where there is one.
      label_column: of the label; "" in a named data set.
    """

    def __init__(
        self,
        name: str,
        labels: Sequence[str],
        origin: str,
        source: Any,
        rows: np.ndarray,
        decode: Callable[[dict[str, Any]], Example],
        text_columns: Sequence[str],
        label_column: str = "",
    ) -> None:
        self.name, self.labels, self.origin = name, tuple(labels), origin
        self._source, self._rows, self._decode = source, rows, decode
        self.text_columns, self.label_column = tuple(text_columns), label_column

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return self._read(self._rows[index])
        return self._decode(self._source[int(self._rows[index])])

    def __iter__(self) -> Iterator[Example]:
        for start in range(0, len(self), BLOCK):
            yield from self._read(self._rows[start : start + BLOCK])

    def __repr__(self) -> str:
        return f"Split({self.name!r}, {len(self)} rows, {len(self.labels)} labels: {self.origin})"

    def _read(self, rows: np.ndarray) -> list[Example]:
        return [self._decode(row) for row in self._source.__getitems__(rows.tolist())]

    def take(self, name: str, rows: np.ndarray, origin: str) -> "Split":
        return Split(
            name, self.labels, origin, self._source, self._rows[rows], self._decode,
            self.text_columns, self.label_column,
        )  # fmt: skip


def load(
    config: DataConfig,
    *,
    splits: Sequence[str] = SPLITS,
    seed: int = 0,
    labels: Sequence[str] = (),
    preferred: Sequence[str] = (),
    preferred_label: str = "",
) -> dict[str, Split]:
    """The splits of a data set; the key "test" is absent where there is none.

    Where there is no dev, `config.dev_fraction` of train, drawn with `seed`, becomes
    dev and leaves train. `config.limit` keeps so many rows of each split, drawn with
    seed 0 whatever `seed` is, in their order.

    Args:
      config: what to load, and where copies are kept.
      splits: those wanted, of "train", "dev" and "test".
      seed: of the dev split.
      labels: label names in the order of their indices, those of a trained model say;
        () means those of train: sorted, by value where all are integers. With `labels`
        a test file can be loaded alone.
      preferred, preferred_label: columns of the text and of the label, in local files that have
        them, where the config names none; else those of train.

    Raises:
      ValueError: one sentence; for a file it names the file and the line.
    """
    wrong = [name for name in splits if name not in SPLITS]
    if wrong:
        raise UserError(f"splits must be among {', '.join(SPLITS)}. Got {wrong[0]!r}.")
    root = assets.cache_dir(config.cache_dir) / "data"
    if config.path or config.train or config.dev or config.test:
        found = _load_files(config, root, splits, labels, preferred, preferred_label)
    elif config.name:
        found = _load_named(config.name, root, labels)
    else:
        raise UserError(
            f"no data: set data.path to a folder with train.tsv, data.train to a file, "
            f"or data.name to one of {', '.join(named.TFDS)}."
        )
    if "train" in found and "dev" not in found:
        found |= _carve_dev(found["train"], config.dev_fraction, seed)
    if config.limit:
        found = {name: _limit(split, config.limit) for name, split in found.items()}
    return {name: found[name] for name in splits if name in found}


def row_hash(example: Example) -> str:
    """12 hex digits of the sha256 over text and pair: which row this was, whatever its label."""
    content = json.dumps([example.text, example.pair])
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def split_dev(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two seeded halves of range(n), dev-A and dev-B: int64, ascending; A is the larger.

    Raises:
      ValueError: when n is below 2.
    """
    if n < 2:
        raise UserError(f"dev must have at least 2 rows to be halved. Got {n}.")
    order = np.random.default_rng(seed).permutation(n)
    return np.sort(order[: (n + 1) // 2]), np.sort(order[(n + 1) // 2 :])


def _carve_dev(train: Split, fraction: float, seed: int) -> dict[str, Split]:
    n = len(train)
    order = np.random.default_rng(seed).permutation(n)
    count = min(max(round(n * fraction), 1), n - 1)
    share = f"{100 * fraction:g} % of train, seed {seed}"
    return {
        "train": train.take("train", np.sort(order[count:]), f"{train.origin}, without dev"),
        "dev": train.take("dev", np.sort(order[:count]), share),
    }


def _limit(split: Split, limit: int) -> Split:
    n = len(split)
    if n <= limit:
        return split
    rows = np.sort(np.random.default_rng(0).permutation(n)[:limit])
    return split.take(split.name, rows, f"{split.origin}, {limit} of {n} rows")


def _load_files(
    config: DataConfig,
    root: Path,
    splits: Sequence[str],
    labels: Sequence[str],
    preferred: Sequence[str],
    preferred_label: str,
) -> dict[str, Split]:
    from ejax.data import local

    paths = _find_files(config)
    wanted = set(splits)
    if not labels or ("dev" in wanted and "dev" not in paths):
        wanted.add("train")  # for its labels, for its dev part
    if "train" in wanted:
        wanted.add("dev")  # a dev file keeps train whole
    if "train" in wanted and "train" not in paths:
        raise UserError("no training file: set data.train, or data.path to a folder with one.")
    found: dict[str, Split] = {}
    width = 0
    for name in (name for name in SPLITS if name in wanted and name in paths):
        columns: dict[str, Any] = {
            "text_columns": config.text_columns, "label_column": config.label_column,
            "labels": labels,
        }  # fmt: skip
        with storage.fetched(paths[name]) as file:
            if name == "test" and not config.test:  # as GLUE's, whose labels are not public
                first = next((row for _, row in read_rows(file, **columns)), None)
                if first and not label_columns(first, config.label_column, preferred_label):
                    what = (
                        f"column {config.label_column!r}"
                        if config.label_column
                        else "column of labels"
                    )
                    warnings.warn(f"{paths[name]} is left out: it has no {what}.", stacklevel=2)
                    continue
            records = local.open_file(
                file, root, preferred=preferred, preferred_label=preferred_label, **columns
            )
        if name == "train" and len(records.labels) < 2:
            raise UserError(
                f"{paths[name]} has only the label {next(iter(records.labels))!r}: "
                f"a classifier needs two classes."
            )
        if name == "train" and 2 * len(records.labels) > len(records.source) >= FEW_ROWS:
            warnings.warn(
                f"{paths[name]} has {len(records.labels)} labels in {len(records.source)} rows: "
                f"{records.label_column!r} (in a tsv without a header the first column) may not be "
                f"the label; label_column (--label-column) names another.",
                stacklevel=2,
            )
        if name == "train" and {*records.labels} == {*map(str, range(-1, len(records.labels) - 1))}:
            warnings.warn(
                f"{paths[name]} has the label -1, which in some data marks rows without one: here "
                f"it is a class. Leave such rows out.",
                stacklevel=2,
            )
        labels = labels or _sorted_labels(records.labels)
        preferred = preferred or records.text_columns
        preferred_label = preferred_label or records.label_column
        _check_labels(records.labels, labels, paths[name])
        if width and len(records.text_columns) != width:
            raise UserError(
                f"{paths[name]} has {len(records.text_columns)} text columns "
                f"({', '.join(records.text_columns)}), other splits have {width}."
            )
        width = len(records.text_columns)
        rows = np.arange(len(records.source))
        decode = partial(_local_example, {label: i for i, label in enumerate(labels)})
        origin = "/".join(paths[name].parts[-2:])  # travels in the bundle: no home folder
        found[name] = Split(
            name, labels, origin, records.source, rows, decode, records.text_columns,
            records.label_column,
        )  # fmt: skip
    return found


def _local_example(index: dict[str, int], row: dict[str, bytes]) -> Example:
    pair = row["pair"].decode() if "pair" in row else None
    return Example(row["text"].decode(), pair, index[row["label"].decode()])


def _find_files(config: DataConfig) -> dict[str, Path]:
    """The file of each split that has one; a file named by itself wins over the folder."""
    paths: dict[str, Path] = {}
    if config.path:
        folder = storage.path_of(config.path).expanduser()
        if folder.is_file():
            raise UserError(f"data.path must be a folder: set data.train={folder} for a file.")
        if not folder.is_dir():
            raise UserError(f"No such folder: {folder} (data.path).")
        for name, stems in FILE_NAMES.items():
            matches = [
                file
                for file in sorted(folder.iterdir())
                if file.name.removesuffix(".gz") in {f"{s}.{f}" for s in stems for f in LABELLED}
            ]
            if len(matches) > 1 and not getattr(config, name):
                both = " and ".join(match.name for match in matches[:2])
                raise UserError(f"{folder} holds {both}: set data.{name} to the one to use.")
            if matches:
                paths[name] = matches[0]
        if not paths:
            held = ", ".join(sorted(file.name for file in folder.iterdir())[:10]) or "nothing"
            raise UserError(
                f"{folder} has no train.tsv, train.csv or train.jsonl (each also .gz). "
                f"It holds: {held}."
            )
    single = {name: getattr(config, name) for name in SPLITS if getattr(config, name)}
    paths |= {name: storage.path_of(path).expanduser() for name, path in single.items()}
    for name, path in paths.items():
        if not storage.is_remote(path) and path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(
                f"data.{name} must be a file that can be read again. Got {path}, a pipe or a "
                f"device: write its rows to a file first."
            )
    return paths


def _sorted_labels(labels: dict[str, int]) -> tuple[str, ...]:
    """Sorted, by value where all are integers: 2 before 10."""
    with contextlib.suppress(ValueError):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))


def _check_labels(found: dict[str, int], known: Sequence[str], path: Path) -> None:
    for label, line in found.items():
        if label not in known:
            names = ", ".join(known[:20]) + (", …" if len(known) > 20 else "")
            raise UserError(
                f"{path}, line {line}: label {label!r} is not among the labels of train: {names}."
            )


def _load_named(name: str, root: Path, labels: Sequence[str]) -> dict[str, Split]:
    own, parts = named.open_set(name, root)
    known = tuple(labels or own)
    missing = [label for label in own if label not in known]
    if missing:
        raise UserError(
            f"{name} has the label {missing[0]!r}, which is not among: {', '.join(known)}."
        )
    order = tuple(known.index(label) for label in own)
    texts = named.TFDS[name].texts
    decode, columns = partial(_named_example, texts, order), tuple(map(" ".join, texts))
    return {
        part: Split(part, known, records.origin, records.source, records.rows, decode, columns)
        for part, records in parts.items()
    }


def _named_example(
    texts: tuple[tuple[str, ...], ...], order: tuple[int, ...], row: dict[str, Any]
) -> Example:
    parts = [" ".join(row[field].decode() for field in fields) for fields in texts]
    return Example(parts[0], parts[1] if len(parts) == 2 else None, order[row["label"]])
