"""A file of texts in, the same rows with their labels out.

Rows keep their order and their columns; memory does not grow with the file; an output
file appears whole or not at all.
"""

import csv
import gzip
import io
import json
import os
import re
import sys
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ejax import storage
from ejax.base import TextClassifier
from ejax.bundle import Bundle, check_columns, label_column_of, text_columns_of
from ejax.data.columns import check_still, find_column, find_text_columns
from ejax.data.files import QUOTED, Quoting, Row, path_format, read_rows, texts_of
from ejax.data.frames import ParquetWriter
from ejax.data.tokenizer import Text
from ejax.errors import UserError
from ejax.streaming import arriving, chunks

FORMATS = ("tsv", "csv", "jsonl", "parquet")
ADDED = ("label", "score", "exit_layer", "top_k")
PROGRESS_ROWS = 1000
NAMED = 20  # skipped rows that are named


class Summary(NamedTuple):
    """What was done."""

    rows: int
    exits: Counter[int]  # rows by the layer they left after
    skipped: int
    named: list[str]  # why, for the first `NAMED` rows skipped
    unanswered: int  # rows that got no label
    spaced: int  # rows whose tabs or line breaks became spaces, in a tsv


def predict_file(
    clf: TextClassifier,
    source: str,
    output: str,
    *,
    threshold: float | None = None,
    top_k: int | None = 1,
    abstain: float | None = None,
    text_columns: Sequence[str] = (),
    format: str = "",
    skip_bad_rows: bool = False,
    progress: Callable[[int], None] = lambda rows: None,
) -> Summary:
    """Classifies every row of `source` and writes it to `output` with the answer.

    Every column is kept. Added are `label` (several joined by "|"), `score` (its calibrated
    probability; of a regression the number) and `exit_layer`; with a `top_k` other than 1 also
    `top_k`, a list of {"label", "score"}, likeliest first, as JSON text in tsv and csv. A name that
    the first row has already gets the prefix "predicted_", as often as it takes.

    Without an answer, see `abstain`, the label is empty (null in jsonl), whatever `top_k` lists.

    A tsv cannot hold tabs and line breaks: there they become spaces, and are counted.

    Args:
      source: tsv, csv, jsonl, json or txt, each also .gz, parquet, or "-" for standard input.
      output: tsv, csv or jsonl by its ending, each also .gz, or parquet; "-" is standard output.
        Without an ending: the format of the input, jsonl where that is txt or unknown.
      threshold: None means the bundle's; above 1 full depth.
      top_k: None means all labels.
      abstain: rows whose certainty is below get no answer; None means the bundle's, 0 answers all.
      text_columns: () means those of the training, or else as many recognised ones.
      format: of `source`, where its ending does not say it.
      skip_bad_rows: leave out rows that cannot be read, instead of stopping.
      progress: called with the rows done so far.

    Raises:
      ValueError: one sentence; for a row it names the file and the line.
    """
    kind = output_format(source, output, format)
    exits: Counter[int] = Counter()
    named: list[str] = []
    skipped = spaced = unanswered = done = 0

    def skip(sentence: str) -> None:
        nonlocal skipped
        skipped += 1
        if len(named) < NAMED:
            named.append(sentence)

    header: list[str] = []  # of a tsv or csv
    added_names = ADDED[:3] if top_k == 1 else ADDED
    rows = read_texts(
        clf, source, text_columns, format, kind, added_names, skip if skip_bad_rows else None,
        header.extend,
    )  # fmt: skip
    waiting: deque[tuple[Row, tuple[str, ...]]] = deque()

    slow = source == "-" or not (storage.is_remote(source) or Path(source).is_file())  # a pipe

    def texts() -> Iterator[list[Text]]:
        for chunk in (arriving if slow else chunks)(rows, lambda read: row_size(read[0])):
            waiting.extend((row, names) for row, _, names in chunk)
            yield [text for _, text, _ in chunk]

    # Which of several labels at once are chosen takes all of them.
    asked = None if clf.bundle.task.answer_ndim == 2 else top_k
    is_number = clf.bundle.task.problem_type == "regression"  # of any size
    digits = of_float32 if is_number else partial(round, ndigits=6)
    with writing(output) as file:
        write: Writer | ParquetWriter | None = None
        for answer in clf.stream_chunks(texts(), threshold, asked, abstain):
            row, names = waiting.popleft()
            row_out = row | dict(zip(names, added(answer, top_k, digits), strict=True))
            if write is None:
                write = writer_of(kind, file, list(row_out), source)
                file.write(write.header())
            line, has_spaces = write.row(row_out)
            file.write(line)
            spaced += has_spaces
            exits[row_out[names[2]]] += 1
            unanswered += row_out[names[0]] is None
            done += 1
            if done % PROGRESS_ROWS == 0:
                progress(done)
            if not waiting:  # no more has come yet
                file.flush()
        if write is None:  # no rows: a file that can still be read back
            given = header or ["text"] * ((format or path_format(source)) == "txt")
            columns = [*given, *free_names(added_names, given)]
            write = writer_of(kind, file, columns, source)
            file.write(write.header())
        if write:
            write.close()
    return Summary(done, exits, skipped, named, unanswered, spaced)


def writer_of(
    kind: str, file: BinaryIO, columns: list[str], source: str
) -> "Writer | ParquetWriter":
    """What turns rows of these columns into a file of that kind."""
    return ParquetWriter(file, columns, source) if kind == "parquet" else Writer(kind, columns)


def output_format(source: str, output: str, format: str = "") -> str:
    """One of `FORMATS`: by the ending of `output`, or else that of the input."""
    kind = path_format(output) if output != "-" else ""
    if kind and (kind not in FORMATS or output.lower().endswith(".parquet.gz")):
        raise UserError(
            f"{output}: cannot write that format. Expected an ending .tsv, .csv or .jsonl, "
            f"each also with .gz, or .parquet."
        )
    kind = kind or format or path_format(source)
    return kind if kind in FORMATS and (output, kind) != ("-", "parquet") else "jsonl"


def read_texts(
    clf: TextClassifier,
    source: str,
    text_columns: Sequence[str],
    format: str,
    kind: str,
    added_names: Sequence[str],
    skip: Callable[[str], None] | None,
    header: Callable[[Sequence[str]], None],
) -> Iterator[tuple[Row, Text, tuple[str, ...]]]:
    """Yields (row, its text or pair, the names of the added columns)."""
    known: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    refused: ValueError | None = None
    quoting = Quoting()
    by_row = (format or path_format(source) or "jsonl") in ("jsonl", "json")

    def find(row: Row) -> tuple[str, ...]:
        return columns_of(clf.bundle, text_columns, tuple(row), source)

    for line, row in read_rows(
        source, format=format, labels=clf.bundle.labels, text_columns=tuple(text_columns),
        skip=skip, header=header,
    ):  # fmt: skip
        try:
            chosen = columns or find(row)
            text, pair = texts_of(row, chosen, source, line)
            if not columns:
                columns, known = chosen, tuple(row)
                names = free_names(added_names, known)
            _check_columns(row, known, names, kind, f"{source}, line {line}")
        except ValueError as error:
            if skip is None or not (columns or by_row):
                raise
            refused = refused or error
            skip(str(error))
            continue
        check_still(row, known, columns, find, f"{source}, line {line}")
        quoting.see(line, text)
        yield row, text if pair is None else (text, pair), names
    if refused and not columns:
        raise refused
    if quoting.line and (format or path_format(source)) == "tsv":
        warnings.warn(f"{source}, line {quoting.line}: {QUOTED}", stacklevel=2)


def free_names(names: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """The names, each with as many "predicted_" before it as `known` columns ask for."""

    def free(name: str) -> str:
        return free(f"predicted_{name}") if name in known else name

    return tuple(map(free, names))


def row_size(row: Row) -> int:
    """About the characters it holds."""
    return sum(len(value if isinstance(value, str) else repr(value)) for value in row.values())


def columns_of(
    bundle: Bundle, given: Sequence[str], known: Sequence[str], source: str
) -> tuple[str, ...]:
    """The text columns asked for, or those of the training, or else the recognised ones.

    Raises:
      ValueError: where none are found, or two instead of the one trained on, or the reverse.
    """
    columns = find_text_columns(
        known, given, preferred=text_columns_of(bundle),
        labels=(find_column(known, label_column_of(bundle)),), path=source,
    )  # fmt: skip
    if not given:
        check_columns(bundle, columns, source)
    return columns


def _check_columns(
    row: Row, known: Sequence[str], names: Sequence[str], kind: str, where: str
) -> None:
    clash = [name for name in row if name in names]
    if clash:
        raise UserError(
            f"{where}: column {clash[0]!r} would be overwritten; the first row does not have it."
        )
    extra = [name for name in row if name not in known]
    if extra and kind != "jsonl":
        raise UserError(
            f"{where}: column {extra[0]!r} is not in the first row, and a {kind} has the same "
            f"columns in every row: write .jsonl."
        )


def of_float32(number: float) -> float:
    """With the fewest digits that tell it from other numbers of its type."""
    return float(str(np.float32(number)))


def added(answer: Any, top_k: int | None, digits: Callable[[float], float]) -> list[Any]:
    """The values of the added columns, from what the classifier says of a row.

    Several labels at once are joined by "|", and the score is that of the likeliest.

    Args:
      digits: rounds a score.
    """
    top = answer if isinstance(answer, list) else [answer]
    first = [top[0]["label"], digits(top[0]["score"]), top[0]["exit_layer"]]
    if "chosen" in top[0]:  # several labels at once, all of them are here
        first[0] = "|".join(likely["label"] for likely in top if likely["chosen"])
    if top_k == 1:
        return first
    pairs = [(likely["label"], digits(likely["score"])) for likely in top]
    listed = [{"label": label, "score": score} for label, score in pairs if label is not None]
    return [*first, listed[:top_k]]


class Writer:
    """Rows as lines of bytes that `read_rows` reads back."""

    def __init__(self, kind: str, columns: list[str]) -> None:
        self.kind, self.columns = kind, columns

    def header(self) -> bytes:
        if self.kind == "jsonl":
            return b""
        return self.row({name: name for name in self.columns})[0]

    def close(self) -> None:
        """Nothing is held back."""

    def row(self, row: Row) -> tuple[bytes, bool]:
        """(the line, whether tabs or line breaks became spaces)."""
        if self.kind == "jsonl":
            try:
                return (json.dumps(row, ensure_ascii=False, default=str) + "\n").encode(), False
            except UnicodeEncodeError:  # half a surrogate pair, in a column that is passed on
                return (json.dumps(row, default=str) + "\n").encode(), False
        cells = [_cell(row.get(name)) for name in self.columns]
        if self.kind == "csv":
            line = io.StringIO()
            # Python 3.11 quotes "\r" only where it is part of the line's end.
            csv.writer(line, lineterminator="\r\n").writerow(cells)
            return (line.getvalue().removesuffix("\r\n") + "\n").encode(errors="replace"), False
        plain = [re.sub(r"\r\n|[\t\r\n]", " ", cell) for cell in cells]
        return ("\t".join(plain) + "\n").encode(errors="replace"), plain != cells


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False, default=str)


@contextmanager
def writing(output: str) -> Iterator[BinaryIO]:
    """Standard output for "-", else a file that gets its name when it is complete."""
    if output == "-":
        yield sys.stdout.buffer
        sys.stdout.flush()
        return
    if storage.is_remote(output):
        target: Any = storage.path_of(output)
        with storage.reaching(output):
            taken = target.is_dir()
        if taken:
            raise UserError(f"{output} is a folder: give the name of a file to write.")
        probe = target.with_name(f".{target.name}.probe")
        with storage.reaching(output):  # the right to write is asked for before the work
            probe.write_text("")
            probe.unlink()
        with storage.temporary_folder() as folder:
            with writing(f"{folder}/{target.name}") as file:
                yield file
            storage.upload(folder, target.parent)
        return
    path = Path(output)
    if path.is_dir():
        raise UserError(f"{output} is a folder: give the name of a file to write.")
    device = path.exists() and not path.is_file()  # or a pipe: it stays what it is
    if not device:
        path = Path(os.path.realpath(path))
    try:
        with (
            nullcontext(path) if device else storage.becoming(path) as part,
            part.open("wb") as file,
        ):
            if output.lower().endswith(".gz"):
                with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
                    yield packed  # type: ignore[misc]
            else:
                yield file
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(
            f"{output} cannot be written: {error.strerror or error}. Nothing of it was kept."
        ) from error
