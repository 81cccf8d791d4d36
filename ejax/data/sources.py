"""Labelled text for training: TFDS names and local files, both as ArrayRecord.

`load` gives the splits of a `DataConfig`: rows in order, labels as indices, a dev split
carved from train where there is none. Nothing here needs TensorFlow.
"""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np

from ejax import assets, storage
from ejax.config import DataConfig, Problem
from ejax.data import named
from ejax.data.columns import Columns, find_label_columns, find_text_columns, label_columns
from ejax.data.files import QUOTED, read_rows, texts_of
from ejax.data.folders import SPLITS, find_files
from ejax.data.frames import Shards, Table
from ejax.data.labels import (
    REGRESSION,
    SCORE,
    SEVERAL,
    SINGLE,
    Label,
    check_joined,
    check_known,
    check_names,
    short,
)
from ejax.errors import UserError

if TYPE_CHECKING:  # it imports tensorflow_datasets
    from ejax.data.local import Records

__all__ = [
    "Example", "Split", "find_text_columns", "load", "read_rows", "row_hash", "split_dev",
    "texts_of",
]  # fmt: skip

BLOCK = 4096  # rows read at once when iterating
FEW_ROWS = 20  # of which every second may have a label of its own


class Example(NamedTuple):
    """One row: a text, or a text and its pair, and its label.

    The label is an index; of several labels the indices, ascending, maybe none; of a regression
    a number. Without a label it is as `ejax.data.labels.NO_LABEL` says.
    """

    text: str
    pair: str | None
    label: Any  # a Label

    @property
    def inputs(self) -> str | tuple[str, str]:
        """As a tokenizer takes it."""
        return self.text if self.pair is None else (self.text, self.pair)


class Split(Sequence[Example]):
    """Rows of one split, in order, read from their ArrayRecord when asked for.

    Attributes:
      name: "train", "dev" or "test".
      labels: the label names, into which `Example.label` points; of a regression ("score",).
      origin: where the rows come from, in words, such as "10 % of train, seed 0".
      text_columns: of the text, and of its pair where there is one.
      label_column: of the label, several joined by commas; "" in a named data set.
      problem_type: what a label is.
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
        problem_type: Problem = SINGLE,
    ) -> None:
        self.name, self.labels, self.origin = name, tuple(labels), origin
        self._source, self._rows, self._decode = source, rows, decode
        self.text_columns, self.label_column = tuple(text_columns), label_column
        self.problem_type = problem_type

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
            self.text_columns, self.label_column, self.problem_type,
        )  # fmt: skip


def load(
    config: DataConfig,
    *,
    splits: Sequence[str] = SPLITS,
    seed: int = 0,
    labels: Sequence[str] = (),
    preferred: Sequence[str] = (),
    preferred_label: str = "",
    given: Mapping[str, Table] | None = None,
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
      given: rows of Python by split, instead of the files that the config names.

    Raises:
      ValueError: one sentence; for a file it names the file and the line.
    """
    wrong = [name for name in splits if name not in SPLITS]
    if wrong:
        raise UserError(f"splits must be among {', '.join(SPLITS)}. Got {wrong[0]!r}.")
    root = assets.cache_dir(config.cache_dir) / "data"
    if given and (config.path or config.train or config.dev or config.test or config.name):
        raise UserError("rows were given in Python: data must name no files and no set. Got both.")
    paths: Mapping[str, Path | Table | Shards] = given or find_files(
        config,
        splits if labels and "dev" not in splits else SPLITS,  # dev may be a part of train
    )
    if paths:
        asked = Columns(
            config.text_columns, config.label_column, preferred, preferred_label,
            config.problem_type, labels,
        )  # fmt: skip
        found = _load_files(config, paths, root, splits, asked)
    elif config.name:
        if config.problem_type != SINGLE:
            raise UserError(f"{config.name} has problem_type {SINGLE}. Got {config.problem_type}.")
        found = _load_named(config.name, root, labels)
    else:
        raise UserError(
            f"no data: set data.path to a folder with train.tsv, data.train to a file or such a "
            f"folder, or data.name to one of {', '.join(named.TFDS)}."
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
    paths: Mapping[str, Path | Table | Shards],
    root: Path,
    splits: Sequence[str],
    asked: Columns,
) -> dict[str, Split]:
    from ejax.data import local

    wanted = set(splits)
    if not asked.labels or ("dev" in wanted and "dev" not in paths):
        wanted.add("train")  # for its labels, for its dev part
    if "train" in wanted:
        wanted.add("dev")  # a dev file keeps train whole
    if "train" in wanted and "train" not in paths:
        if any(isinstance(path, Table) for path in paths.values()):
            raise UserError("no rows of train were given: give train.")
        raise UserError("no training file: set data.train, or data.path to a folder with one.")
    found: dict[str, Split] = {}
    for name in (name for name in SPLITS if name in wanted and name in paths):
        path = paths[name]
        with contextlib.ExitStack() as stack:
            file: Path | Table | Shards
            if isinstance(path, Shards):
                here = (stack.enter_context(storage.fetched(shard)) for shard in path.paths)
                file = path._replace(paths=tuple(here))
            else:
                file = (
                    path if isinstance(path, Table) else stack.enter_context(storage.fetched(path))
                )
            # GLUE's test has no public labels; a test file that is named must have some.
            optional = name == "test" and not config.test and not isinstance(path, Table)
            if optional and not _has_labels(file, asked):
                what = (
                    f"column {config.label_column!r}" if config.label_column else "column of labels"
                )
                warnings.warn(f"{path} is left out: it has no {what}.", stacklevel=2)
                continue
            records = local.open_rows(file, root, asked)
        if name == "train":
            _check_train(records, path, asked.problem)
        elif asked.problem != REGRESSION:
            check_joined(records.counts, asked.problem, path)
        labels = asked.labels or _label_names(records, asked.problem)
        if asked.problem != REGRESSION:
            check_known(records.labels, labels, path)
        if records.quoted:
            warnings.warn(f"{path}, line {records.quoted}: {QUOTED}", stacklevel=2)
        width = len(next(iter(found.values())).text_columns) if found else 0
        if width and len(records.text_columns) != width:
            raise UserError(
                f"{path} has {len(records.text_columns)} text columns "
                f"({', '.join(records.text_columns)}), other splits have {width}."
            )
        label_column = ",".join(records.label_columns)
        asked = asked._replace(
            labels=labels, preferred=asked.preferred or records.text_columns,
            preferred_label=asked.preferred_label or label_column,
        )  # fmt: skip
        decode = partial(
            _local_example, {label: i for i, label in enumerate(labels)}, asked.problem
        )
        # The origin travels in the bundle: no home folder.
        origin = str(path) if isinstance(path, Table) else "/".join(str(path).split("/")[-2:])
        found[name] = Split(
            name, labels, origin, records.source, np.arange(len(records.source)), decode,
            records.text_columns, label_column, asked.problem,
        )  # fmt: skip
    return found


def _has_labels(file: Path | Table | Shards, asked: Columns) -> bool:
    """Whether the first row of a file has a column for the label; an empty file says so later."""
    from ejax.data import local

    _, first = next(local.read(file, asked), (0, {}))
    if not first:
        return True
    try:
        find_label_columns(
            first, asked.label, preferred=asked.preferred_label, problem=asked.problem,
            texts=asked.texts or asked.preferred,
        )  # fmt: skip
    except UserError:
        return bool(label_columns(first, asked.label, asked.preferred_label, asked.problem))
    return True


def _check_train(records: "Records", path: Path | Table | Shards, problem: Problem) -> None:
    """Raises ValueError where train can teach nothing; warns of what may be no label."""
    if problem == REGRESSION:
        low, high = records.span
        if low == high:
            raise UserError(f"{path} has only the number {low:g}: a regression needs two.")
        return
    names, rows = len(records.labels), len(records.source)
    if not records.labels:
        raise UserError(f"{path} has no row with a label.")
    if problem == SINGLE and names < 2:
        raise UserError(
            f"{path} has only the label {short(next(iter(records.labels)))}: "
            f"a classifier needs two classes."
        )
    said = check_names(records.labels, records.counts, problem, path)
    if 2 * names > rows >= FEW_ROWS:
        said.append(
            f"{path} has {names} labels in {rows} rows: {records.label_columns[0]!r} (in a tsv "
            f"without a header the first column) may not be the label; label_column "
            f"(--label-column) names another."
        )
    if {*records.labels} == {*map(str, range(-1, names - 1))}:
        said.append(
            f"{path} has the label -1, which in some data marks rows without one: here it is a "
            f"class. Leave such rows out."
        )
    for sentence in said:
        warnings.warn(sentence, stacklevel=2)


def _label_names(records: "Records", problem: Problem) -> tuple[str, ...]:
    """Sorted, by value where all are integers: 2 before 10; one column for each keeps its place."""
    if problem == REGRESSION:
        return (SCORE,)
    if len(records.label_columns) > 1:
        return records.label_columns
    with contextlib.suppress(ValueError):
        return tuple(sorted(records.labels, key=lambda label: (int(label), label)))
    return tuple(sorted(records.labels))


def _local_example(index: dict[str, int], problem: Problem, row: dict[str, bytes]) -> Example:
    pair = row["pair"].decode() if "pair" in row else None
    label: Label
    if problem == REGRESSION:
        label = float(row["label"])
    elif problem == SEVERAL:
        label = tuple(sorted(index[name] for name in json.loads(row["label"])))
    else:
        label = index[row["label"].decode()]
    return Example(row["text"].decode(), pair, label)


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
