"""Rows that are no lines of text: parquet, lists in JSON, and what Python holds.

An integer of a Hugging Face `ClassLabel` is read as the name of its class.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ejax import storage
from ejax.data.labels import listed, short
from ejax.errors import UserError

Row = dict[str, Any]
WRITTEN_ROWS = 4096  # of a parquet file, at once
Name = Callable[[Any], Any]  # from a value of a column to one with names


class Table(NamedTuple):
    """Rows given in Python; in sentences the first one is line 1."""

    name: str
    rows: list[Row]

    def __str__(self) -> str:
        return self.name

    def numbered(self) -> Iterator[tuple[int, Row]]:
        return enumerate(self.rows, 1)

    def digest(self) -> str:
        """The sha256 of its rows."""
        content = hashlib.sha256()
        for row in self.rows:
            content.update(json.dumps(row, default=str).encode())
        return content.hexdigest()


class Shards(NamedTuple):
    """The parquet files of one split, in order; in sentences its rows are numbered through."""

    name: str
    paths: tuple[Path, ...]

    def __str__(self) -> str:
        return self.name

    def numbered(self) -> Iterator[tuple[int, Row]]:
        """Raises ValueError where a file cannot be read, or has columns of its own."""
        number = 0
        first: tuple[str, ...] = ()

        def check(columns: tuple[str, ...]) -> None:
            nonlocal first
            first = first or columns
            if {*columns} != {*first}:
                raise UserError(
                    f"{path} has the columns {listed(columns)}, and {self.paths[0].name} has "
                    f"{listed(first)}: all files of a split must have the same."
                )

        for path in self.paths:
            for _, row in parquet_rows(path, check):
                number += 1
                yield number, {column: row[column] for column in first}

    def digest(self) -> str:
        """The sha256 of the files' own."""
        content = hashlib.sha256()
        for path in self.paths:
            with path.open("rb") as file:
                content.update(hashlib.file_digest(file, "sha256").digest())
        return content.hexdigest()


def as_rows(source: Any, name: str = "the rows") -> Table:
    """The rows of a list of dicts, a pandas DataFrame, or a Hugging Face `Dataset`.

    Args:
      name: what they are called in sentences.

    Raises:
      ValueError: where it is none of these, or a row is no dict.
    """
    names: dict[str, Name] = {}
    if isinstance(source, Mapping | str | bytes):
        raise UserError(f"{name} must be a list of dicts or a table. Got a {_kind(source)}.")
    for way, args in (("to_dicts", ()), ("to_pylist", ()), ("to_dict", ("records",))):
        if hasattr(source, way) and hasattr(source, "columns"):  # polars, pyarrow, pandas
            source = getattr(source, way)(*args)
            break
    features = getattr(source, "features", None)
    if isinstance(features, Mapping):  # a Dataset
        names = {
            column: named for column, feature in features.items() if (named := _names(feature))
        }
    try:
        rows = list(source)
    except TypeError:
        raise UserError(
            f"{name} must be a list of dicts, a DataFrame or a Dataset. Got a {_kind(source)}."
        ) from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping) or not all(isinstance(column, str) for column in row):
            raise UserError(
                f'{name}, line {number}: expected a dict such as {{"text": "…", "label": "…"}}. '
                f"Got a {_kind(row)}."
            )
    return Table(name, [_plain(row, names) for row in rows])


def as_splits(train: Any = None, dev: Any = None, test: Any = None) -> dict[str, Table] | None:
    """Rows of Python by split; None where none are given.

    Args:
      train: as for `as_rows`, or a dict of splits such as a `DatasetDict`.

    Raises:
      ValueError: as `as_rows`, or where a split is given twice or is not known.
    """
    given = {"train": train, "dev": dev, "test": test}
    if isinstance(train, Mapping):
        alike = {"validation": "dev", "valid": "dev", "val": "dev"}
        given["train"] = None
        for name, rows in ((alike.get(name, name), rows) for name, rows in train.items()):
            if name not in given or given[name] is not None:
                raise UserError(
                    f"train must be rows, or their dict by train, dev (or validation) and test, "
                    f"each given once. Got {', '.join(map(str, train))}."
                )
            given[name] = rows
    found = {
        name: as_rows(rows, f"the rows of {name}")
        for name, rows in given.items()
        if rows is not None
    }
    return found or None


def parquet_rows(
    path: Path | str, header: Callable[[tuple[str, ...]], None]
) -> Iterator[tuple[int, Row]]:
    """(row number from 1, row); values are those of Python.

    Raises:
      ValueError: where it cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with (
            storage.path_of(path).open("rb") as opened,
            pyarrow.parquet.ParquetFile(opened) as file,
        ):
            schema = file.schema_arrow
            twice = [name for name in schema.names if schema.names.count(name) > 1]
            if twice:
                raise UserError(f"{path}: it has column {short(twice[0])} twice.")
            header(tuple(schema.names))
            names = class_names(schema)
            number = 0
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, _named(row, names)
    except (OSError, pyarrow.ArrowException, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(f"{path} cannot be read as parquet: {reason}.") from error


class ParquetWriter:
    """Rows to a parquet file; the first ones tell the types of the columns.

    Args:
      file: open for bytes.
      columns: of every row.
      source: the file that the rows were read from; if it is parquet, its types are kept.
    """

    def __init__(self, file: BinaryIO, columns: list[str], source: str) -> None:
        self.file, self.columns, self.source, self.rows = file, columns, source, list[Row]()
        self.types: dict[str, Any] = {}  # pyarrow's, by column
        self.writer: Any = None
        if source.lower().endswith(".parquet"):
            import pyarrow.parquet

            with storage.path_of(source).open("rb") as opened:
                schema = pyarrow.parquet.read_schema(opened)
            named = class_names(schema)
            self.types = {field.name: field.type for field in schema if field.name not in named}

    def header(self) -> bytes:
        return b""

    def row(self, row: Row) -> tuple[bytes, bool]:
        """Takes a row; the two are those of a writer of lines."""
        self.rows.append(row)
        if len(self.rows) == WRITTEN_ROWS:
            self._write()
        return b"", False

    def close(self) -> None:
        self._write()
        self.writer.close()

    def _write(self) -> None:
        """Raises ValueError where a column holds values of two types."""
        import pyarrow
        import pyarrow.parquet

        try:
            if self.writer is None:
                arrays = {
                    name: pyarrow.array([row.get(name) for row in self.rows], self.types.get(name))
                    for name in self.columns
                }
                known = {
                    name: pyarrow.string() if pyarrow.types.is_null(array.type) else array.type
                    for name, array in arrays.items()
                }
                self.writer = pyarrow.parquet.ParquetWriter(
                    self.file, pyarrow.schema(list(known.items()))
                )
            table = pyarrow.Table.from_pylist(self.rows, self.writer.schema)
        except (pyarrow.ArrowException, TypeError, ValueError, OverflowError) as error:
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise UserError(
                f"{self.source}: a column has values of several types, which parquet cannot hold "
                f"({reason}): write .jsonl."
            ) from error
        self.writer.write_table(table)
        self.rows.clear()


def class_names(schema: Any) -> dict[str, Name]:
    """Of the columns that Hugging Face's `datasets` wrote as `ClassLabel`, or lists of them."""
    try:
        told = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {column: named for column, feature in told.items() if (named := _names(feature))}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _names(feature: Any) -> Name | None:
    """From a feature, as an object or as JSON tells it, to how its values are named."""
    if isinstance(feature, Mapping):
        names, inner = feature.get("names"), feature.get("feature")
    else:
        names, inner = getattr(feature, "names", None), getattr(feature, "feature", None)
    if isinstance(names, list):
        known = [str(name) for name in names]

        def named(value: Any) -> Any:
            is_index = isinstance(value, int) and 0 <= value < len(known)
            return known[value] if is_index else value

        return named
    if inner is not None and (of_one := _names(inner)):
        return lambda values: [of_one(v) for v in values] if isinstance(values, list) else values
    return None


def _named(row: Row, names: Mapping[str, Name]) -> Row:
    return {c: names[c](value) if c in names else value for c, value in row.items()}


def _plain(row: Mapping[str, Any], names: Mapping[str, Name]) -> Row:
    """A row with Python's own numbers and lists, as one of a jsonl has them."""
    return _named({c: v.tolist() if hasattr(v, "tolist") else v for c, v in row.items()}, names)


def _kind(value: Any) -> str:
    return type(value).__name__
