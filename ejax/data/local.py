"""Labelled local files as ArrayRecord, written once by a TFDS builder.

Imports tensorflow_datasets: import this module inside functions only.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import tensorflow_datasets as tfds

from ejax.data import files
from ejax.data.columns import check_still, find_label_column, find_text_columns
from ejax.errors import UserError

FORMAT_VERSION = "1.0.3"  # of what is written: raise it when rows are read differently


class Records(NamedTuple):
    """One file: its rows as an ArrayRecord data source, and its labels."""

    source: Any  # rows {"text": bytes, "label": bytes[, "pair": bytes]}, in file order
    labels: dict[str, int]  # label name -> the first line that holds it
    text_columns: tuple[str, ...]
    label_column: str


@dataclasses.dataclass(eq=False)
class LocalTextConfig(tfds.core.BuilderConfig):
    """`name` is the key of the content; `rows` yields (line, text, pair, label)."""

    rows: Callable[[], Iterable[tuple[int, str, str | None, str]]] = tuple
    pair: bool = False


class LocalText(tfds.core.GeneratorBasedBuilder):
    """The rows of one local file, in order, labels by name."""

    VERSION = tfds.core.Version(FORMAT_VERSION)

    def _info(self) -> tfds.core.DatasetInfo:
        names = ("text", "pair", "label") if self.builder_config.pair else ("text", "label")
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({name: tfds.features.Text() for name in names}),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        return {"rows": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
        lines: dict[str, int] = {}
        for index, (line, text, pair, label) in enumerate(self.builder_config.rows()):
            lines.setdefault(label, line)
            row = {"text": text, "label": label}
            yield index, row if pair is None else {**row, "pair": pair}
        self.info.metadata["labels"] = lines  # written together with the records


def open_file(
    path: str | Path,
    root: Path,
    *,
    text_columns: Sequence[str] = (),
    label_column: str = "",
    labels: Sequence[str] = (),
    preferred: Sequence[str] = (),
    preferred_label: str = "",
) -> Records:
    """A labelled file as an ArrayRecord data source, written on first use.

    The copy under `root` is found by the sha256 of the file's content, the columns and
    `FORMAT_VERSION`, so a changed file is read anew. Several processes may ask for the
    same file at once: one writes, the others wait.

    Args:
      path, text_columns, label_column, labels: as for `files.read_rows`.
      root: the folder for such copies.
      preferred, preferred_label: columns to read, if the file has them and none are named.

    Raises:
      ValueError: naming the file and, where there is one, the line.
    """
    options: dict[str, Any] = {
        "text_columns": text_columns, "label_column": label_column, "labels": labels,
    }  # fmt: skip
    if files.format_of(path) == "txt":
        raise UserError(f"{path}: a .txt file has no labels. Expected .tsv, .csv or .jsonl.")
    line, first = next(files.read_rows(path, **options), (0, {}))
    if not first:
        raise UserError(f"{path} has no rows.")

    def find_label(row: files.Row) -> tuple[str]:
        return (find_label_column(row, label_column, preferred=preferred_label, path=path),)

    (label,) = find_label(first)

    def find(row: files.Row) -> tuple[str, ...]:
        return find_text_columns(
            row, text_columns, preferred=preferred, label_column=label, path=path
        )

    columns = find(first)
    files.label_of(first, label, path, line)  # a clear error before anything is written

    def rows() -> Iterator[tuple[int, str, str | None, str]]:
        for line, row in files.read_rows(path, **options):
            text, pair = files.texts_of(row, columns, path, line)
            check_still(row, first, columns, find, f"{path}, line {line}")
            check_still(row, first, (label,), find_label, f"{path}, line {line}", "label")
            yield line, text, pair, files.label_of(row, label, path, line)

    choice = [files.path_format(path), list(first), columns, label]
    key = hashlib.sha256(json.dumps([_sha256(path), *choice]).encode()).hexdigest()[:32]
    config = LocalTextConfig(name=key, rows=rows, pair=len(columns) == 2)
    with locked(root, key), quiet():
        builder = LocalText(data_dir=root, config=config)
        builder.download_and_prepare(file_format="array_record")
        source = builder.as_data_source(split="rows")
        return Records(source, dict(builder.info.metadata["labels"]), columns, label)


@contextlib.contextmanager
def locked(root: Path, name: str) -> Iterator[None]:
    """A lock between processes, held while one prepares `name` under `root`.

    Raises:
      ValueError: when the folder cannot be written.
    """
    lock = filelock.FileLock(root / "locks" / f"{name}.lock")
    try:
        (root / "locks").mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"the cache folder {root} cannot be written ({error.strerror}): "
            f"set data.cache_dir or EJAX_CACHE to one that can."
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, warnings or printed lines of tensorflow_datasets."""
    tfds.disable_progress_bar()
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
