"""Labelled local files as ArrayRecord, written once by a TFDS builder.

Imports tensorflow_datasets: import this module inside functions only.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import tensorflow_datasets as tfds

from ejax import storage
from ejax.data import files
from ejax.data.columns import Columns, check_still, find_label_columns, find_text_columns
from ejax.data.frames import Shards, Table
from ejax.data.labels import read_label
from ejax.errors import UserError

FORMAT_VERSION = "1.1.0"  # of what is written: raise it when rows are read differently
CHECKSUMS = "checksums.json"  # of the files of a copy, which is whole if they are right


class Records(NamedTuple):
    """One file: its rows as an ArrayRecord data source, and its labels."""

    source: Any  # rows {"text": bytes, "label": bytes[, "pair": bytes]}, in file order
    labels: dict[str, int]  # label name -> the first line that holds it
    counts: dict[str, int]  # label name -> its rows
    span: tuple[float, ...]  # the smallest and largest number of a regression
    quoted: int  # the first line of a tsv whose text looks quoted; 0 = none
    text_columns: tuple[str, ...]
    label_columns: tuple[str, ...]


Read = tuple[int, str, str | None, Any]  # line, text, pair, what `read_label` says


@dataclasses.dataclass(eq=False)
class LocalTextConfig(tfds.core.BuilderConfig):
    """`name` is the key of the content."""

    rows: Callable[[], Iterable[Read]] = tuple
    pair: bool = False
    tsv: bool = False


class LocalText(tfds.core.GeneratorBasedBuilder):
    """The rows of one local file, in order; a label is its name, a JSON list of names, or a number.

    The metadata are those of `Records`.
    """

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
        counts: Counter[str] = Counter()
        span: list[float] = []
        quoting = files.Quoting()
        for index, (line, text, pair, label) in enumerate(self.builder_config.rows()):
            names: Sequence[str] = (label,) if isinstance(label, str) else ()
            if isinstance(label, tuple):
                names, label = label, json.dumps(label)
            elif isinstance(label, float):
                span = [min([*span, label]), max([*span, label])]
                label = repr(label)
            for name in names:
                lines.setdefault(name, line)
            counts.update(names)
            if self.builder_config.tsv:
                quoting.see(line, text)
                quoting.see(line, pair or "")
            row = {"text": text, "label": label}
            yield index, row if pair is None else {**row, "pair": pair}
        told = {"labels": lines, "counts": dict(counts), "span": span, "quoted": quoting.line}
        self.info.metadata.update(told)  # written together with the records


def open_rows(source: str | Path | Table | Shards, root: Path, asked: Columns) -> Records:
    """Labelled rows as an ArrayRecord data source, written on first use.

    The copy under `root` is found by the sha256 of the content, the columns, the problem type and
    `FORMAT_VERSION`, so a changed file is read anew; a damaged copy is written anew. Several
    processes may ask for the same file at once: one writes, the others wait.

    Args:
      source: a file, its shards, or rows that were given in Python.
      root: the folder for such copies.

    Raises:
      ValueError: naming the file and, where there is one, the line.
    """
    if isinstance(source, Table | Shards):
        kind = "python" if isinstance(source, Table) else "parquet"
        digest = source.digest()
    elif files.format_of(source) == "txt":
        raise UserError(f"{source}: a .txt file has no labels. Expected .tsv, .csv or .jsonl.")
    else:
        kind, digest = files.path_format(source), storage.sha256_of(source)
    line, first = next(read(source, asked), (0, {}))
    if not line:
        raise UserError(f"{source} has no rows.")

    def find_label(row: files.Row) -> tuple[str, ...]:
        return find_label_columns(
            row, asked.label, preferred=asked.preferred_label, problem=asked.problem,
            texts=asked.texts or asked.preferred, path=str(source),
        )  # fmt: skip

    label = find_label(first)

    def find(row: files.Row) -> tuple[str, ...]:
        return find_text_columns(
            row, asked.texts, preferred=asked.preferred, labels=label, path=str(source)
        )

    columns = find(first)
    read_label(first, label, asked.problem, source, line)  # a clear error before a copy is begun

    def rows() -> Iterator[Read]:
        for line, row in read(source, asked):
            if all(row.get(name) == name for name in (*columns, *label)):
                raise UserError(f"{source}, line {line}: {files.HEADER_AGAIN}")
            text, pair = files.texts_of(row, columns, source, line)
            where = f"{source}, line {line}"
            check_still(row, first, columns, find, where)
            check_still(row, first, label, find_label, where, "label")
            yield line, text, pair, read_label(row, label, asked.problem, source, line)

    choice = [kind, list(first), columns, label, asked.problem]
    key = hashlib.sha256(json.dumps([digest, *choice]).encode()).hexdigest()[:32]
    config = LocalTextConfig(name=key, rows=rows, pair=len(columns) == 2, tsv=kind == "tsv")
    with locked(root, key), quiet():
        builder = _written(root, config)
        told = builder.info.metadata
        names, counts = dict(told["labels"]), dict(told["counts"])
        if len(label) > 1:  # a label that no row has is one too
            names = {name: names.get(name, 0) for name in label}
        return Records(
            builder.as_data_source(split="rows"), names, counts, tuple(told["span"]),
            told["quoted"], columns, label,
        )  # fmt: skip


def read(source: str | Path | Table | Shards, asked: Columns) -> Iterator[tuple[int, files.Row]]:
    """(line, row) of labelled rows."""
    if isinstance(source, Table | Shards):
        return source.numbered()
    return files.read_rows(
        source, text_columns=asked.texts, label_column=asked.label, labels=asked.labels
    )


def _written(root: Path, config: LocalTextConfig) -> Any:
    """The TFDS builder of a copy that is whole: written now, unless there is one."""
    folder = root / LocalText.name / str(config.name) / FORMAT_VERSION
    if folder.exists() and not _is_whole(folder):
        shutil.rmtree(folder)
    builder = LocalText(data_dir=root, config=config)
    if not folder.exists():
        builder.download_and_prepare(file_format="array_record")
        (folder / CHECKSUMS).write_text(json.dumps(_checksums(folder)))
    return builder


def _is_whole(folder: Path) -> bool:
    try:
        expected = json.loads((folder / CHECKSUMS).read_text())
    except (OSError, ValueError):
        return False
    return bool(_checksums(folder) == expected)


def _checksums(folder: Path) -> dict[str, str]:
    paths = (path for path in sorted(folder.iterdir()) if path.name != CHECKSUMS)
    return {path.name: storage.sha256_of(path) for path in paths}


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
