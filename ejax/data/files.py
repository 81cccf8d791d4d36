"""Rows of text files, with line numbers: tsv, csv, jsonl and txt, each also .gz.

One parser serves training and prediction. Text is kept exactly: in tsv a quote is a
quote, in csv a quoted field may hold line breaks, and only "\\n" or "\\r\\n" ends a
line. A byte order mark at the start is skipped. Memory does not grow with the file.
"""

import csv
import difflib
import gzip
import itertools
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from ejax import assets, storage
from ejax.data.columns import TEXT_COLUMNS, find_column, names_columns, recognised_texts
from ejax.errors import UserError

FORMATS = ("tsv", "csv", "jsonl", "txt")
HEADERLESS = {2: ("label", "text"), 3: ("label", "text_a", "text_b")}
PEEK_ROWS = 1000  # rows looked at to tell whether a tsv has a header

Row = dict[str, Any]
Skip = Callable[[str], None] | None


def read_rows(
    path: str | Path,
    *,
    format: str = "",
    text_columns: Sequence[str] = (),
    label_column: str = "",
    labels: Sequence[str] = (),
    skip: Skip = None,
    header: Callable[[tuple[str, ...]], None] = lambda columns: None,
) -> Iterator[tuple[int, Row]]:
    """Yields (line number, row) in order; a row holds every column of the file.

    Args:
      path: a file, or "-" for standard input. Without `format`, standard input is one
        text per line unless its first line is a JSON object or a tsv header that
        holds a text column.
      format: "tsv", "csv", "jsonl" or "txt"; "" means by the file's ending. A txt file
        has one text per line, in the column "text".
      text_columns: the columns of text, where they are to be named.
      label_column: the column of labels, where it is to be named.
      labels: known label names; they help to see that a tsv has no header.
      skip: called with the sentence about a row that cannot be read, which is left
        out; None means to raise it. A header, and a csv that is not UTF-8, always raise.
      header: called with the columns of a tsv or csv before its first row.

    Standard input, jsonl and txt may be empty.

    A tsv without a header is `label<TAB>text` or `label<TAB>text<TAB>text`: its first
    line names no known column, and its first cell is an integer, a known label, or
    stands in the first column again.

    Raises:
      ValueError: naming the file and, where there is one, the line.
    """
    path = str(path)
    kind = format or (path != "-" and format_of(path)) or ""
    if kind and kind not in FORMATS:
        raise UserError(f"format must be one of {', '.join(FORMATS)}. Got {format!r}.")
    lines = _lines(path, None if kind == "csv" else skip)
    first = next(lines, None)
    if first is None:
        if path == "-" or kind in ("jsonl", "txt"):
            return
        raise UserError(f"{path} is empty.")
    kind = kind or _sniff(first[1], text_columns)
    lines = itertools.chain([first], lines)
    if kind == "txt":
        yield from ((number, {"text": _strip(line)}) for number, line in lines)
    elif kind == "jsonl":
        yield from _json_rows(lines, path, skip)
    else:
        cells = _csv_cells(lines, path, skip) if kind == "csv" else _tsv_cells(lines)
        columns, cells = _columns(cells, kind, path, text_columns, label_column, labels)
        header(columns)
        for number, row in cells:
            if row == [""] and len(columns) > 1:
                continue  # a blank line
            if len(columns) > 1 and tuple(row) == columns:
                _refuse(f"{path}, line {number}: the header stands here again: delete it.", skip)
                continue
            if len(row) != len(columns):
                _refuse(
                    f"{path}, line {number}: expected {len(columns)} columns "
                    f"({', '.join(columns)}). Got {len(row)}.",
                    skip,
                )
                continue
            yield number, dict(zip(columns, row, strict=True))


def _refuse(sentence: str, skip: Skip) -> None:
    if skip is None:
        raise UserError(sentence) from None
    skip(sentence)


def texts_of(
    row: Mapping[str, Any], columns: Sequence[str], path: str | Path, line: int
) -> tuple[str, str | None]:
    """(text, pair) of a row; pair is None where there is one text column.

    Raises:
      ValueError: when a column is missing or holds no text.
    """
    for name in columns:
        if name not in row:
            raise UserError(
                f"{path}, line {line}: no column {name!r}. Its columns: {', '.join(row)}."
            )
        if not isinstance(row[name], str):
            raise UserError(
                f"{path}, line {line}: column {name!r} must hold text. Got {row[name]!r}."
            )
        _check_characters(row[name], f"{path}, line {line}: column {name!r}")
    return row[columns[0]], row[columns[1]] if len(columns) == 2 else None


def label_of(row: Mapping[str, Any], column: str, path: str | Path, line: int) -> str:
    """The label name of a row: a string, or an integer or boolean of a jsonl.

    Raises:
      ValueError: when there is no label, or one of another kind of problem.
    """
    if column not in row:
        raise UserError(
            f"{path}, line {line}: no column {column!r} for the label. "
            f"Its columns: {', '.join(row)}. Name it with label_column (--label-column)."
        )
    label, typed = row[column], path_format(path) == "jsonl"
    where = f"{path}, line {line}: the label"
    if isinstance(label, list):
        raise UserError(
            f'{where} is a list: problem_type "multi_label_classification" is not supported yet.'
        )
    if isinstance(label, float) or (
        isinstance(label, str) and not typed and re.fullmatch(r"[-+]?(\d+\.\d*|\.\d+)", label)
    ):
        raise UserError(
            f"{where} {label} is a number with a fraction: "
            f'problem_type "regression" is not supported yet.'
        )
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, int):
        return str(label)
    if not isinstance(label, str) or not label:
        raise UserError(f"{where} is missing: expected a name. Got {label!r}.")
    if label != label.strip():
        raise UserError(f"{where} must not begin or end with a space. Got {label!r}.")
    _check_characters(label, where)
    return label


def _check_characters(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # "\ud800" in JSON
        raise UserError(f"{where} holds half a surrogate pair, which is no character.") from None


def path_format(path: str | Path) -> str:
    """ "tsv" for train.tsv and train.tsv.gz; whatever the ending is."""
    name = Path(path).name.lower().removesuffix(".gz")
    return name.rpartition(".")[2] if "." in name else ""


def format_of(path: str | Path) -> str:
    """The format by the file's ending; ValueError when it is none of `FORMATS`."""
    check_file(path)
    kind = path_format(path)
    if kind not in FORMATS:
        raise UserError(
            f"{path}: cannot tell the format by the ending. "
            f"Expected .tsv, .csv, .jsonl or .txt, each also with .gz."
        )
    return kind


def check_file(path: str | Path) -> None:
    """Raises ValueError, with the nearest name in the folder, unless `path` is a file."""
    file = storage.path_of(path)
    if not storage.is_remote(path):
        assets.held(file)  # a link that leads nowhere, or a pointer of Git LFS, says so
    try:
        if file.is_dir():
            raise UserError(f"{path} is a folder: expected a file.")
        if file.is_file() or (not storage.is_remote(path) and file.is_fifo()):
            return
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if not file.parent.is_dir():
        raise UserError(f"No such file: {path} (there is no folder {file.parent}).")
    names = sorted(other.name for other in file.parent.iterdir())
    near = difflib.get_close_matches(file.name, names, n=1)
    hint = f" Did you mean {file.parent / near[0]}?" if near else ""
    raise UserError(f"No such file: {path}.{hint}")


def _open(path: str) -> AbstractContextManager[Iterable[bytes]]:
    if path == "-":
        return nullcontext(sys.stdin.buffer)
    check_file(path)
    packed = path.lower().endswith(".gz")
    if storage.is_remote(path):
        file = storage.path_of(path).open("rb")
        return gzip.open(file) if packed else file
    return gzip.open(path) if packed else open(path, "rb")


def _lines(path: str, skip: Skip = None) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends. Only "\\n" ends a line: U+2028 is text."""
    name = "standard input" if path == "-" else path
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    _refuse(
                        f"{name}, line {number}: not UTF-8 (byte {error.start + 1} of the line "
                        f"is 0x{line[error.start]:02x}). Save the file as UTF-8.",
                        skip if number > 1 else None,
                    )
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{name} cannot be read: {error}.") from error


def _strip(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


def _sniff(line: str, text_columns: Sequence[str]) -> str:
    """The format of standard input, by its first line."""
    with suppress(ValueError, RecursionError):
        if isinstance(json.loads(line), dict):
            return "jsonl"
    cells = _strip(line).split("\t")
    if text_columns:
        header = all(find_column(cells, name) for name in text_columns)
    elif len(cells) > 1:
        header = bool(recognised_texts(cells, alone=False))
    else:  # "Review" is more likely a text than a header
        header = (cells[0],) in TEXT_COLUMNS
    return "tsv" if header else "txt"


def _json_rows(
    lines: Iterable[tuple[int, str]], path: str, skip: Skip
) -> Iterator[tuple[int, Row]]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(_strip(line))
        except json.JSONDecodeError as error:
            _refuse(f"{path}, line {number}: not JSON: {error.msg} at column {error.colno}.", skip)
            continue
        except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
            _refuse(f"{path}, line {number}: JSON that cannot be read: {error}.", skip)
            continue
        if not isinstance(row, dict):
            _refuse(
                f'{path}, line {number}: expected an object such as {{"text": "…"}}. '
                f"Got {_strip(line)[:40]}.",
                skip,
            )
            continue
        yield number, row


def _tsv_cells(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, list[str]]]:
    return ((number, _strip(line).split("\t")) for number, line in lines)


def _csv_cells(
    lines: Iterable[tuple[int, str]], path: str, skip: Skip
) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(2**31 - 1)  # for the whole process; the default is 128 KiB
    reader = csv.reader((line for _, line in lines), strict=True)
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            _refuse(
                f"{path}, line {start}: not csv ({error}). A field with a quote, comma or "
                f'line break must stand in quotes, its own quotes doubled ("").',
                skip if start > 1 and "end of data" not in str(error) else None,
            )
            continue
        if cells:
            yield start, cells


def _columns(
    cells: Iterator[tuple[int, list[str]]],
    kind: str,
    path: str,
    text_columns: Sequence[str],
    label_column: str,
    labels: Sequence[str],
) -> tuple[tuple[str, ...], Iterator[tuple[int, list[str]]]]:
    """The column names, and the rows after the header."""
    number, header = next(cells, (1, [""]))
    if (
        kind == "tsv"
        and path != "-"
        and len(header) in HEADERLESS
        and not text_columns
        and label_column in ("", "label")
        and not names_columns(header)
    ):
        peek = list(itertools.islice(cells, PEEK_ROWS))
        cells = itertools.chain(peek, cells)
        name = header[0]
        if re.fullmatch(r"-?\d+", name) or name in labels or any(row[0] == name for _, row in peek):
            return HEADERLESS[len(header)], itertools.chain([(number, header)], cells)
    if header == [""]:
        raise UserError(f"{path}, line {number}: expected a header with the column names.")
    alone = header[0].strip() if len(header) == 1 else ""
    if re.search(r"[,;|\t ]", alone) and not any(find_column(header, n) for n in text_columns):
        raise UserError(
            f"{path}: {header[0]!r} does not look like the name of a column. A tsv has tabs "
            f"between its columns, a csv commas; one text per line without a header is a txt. If "
            f"it is a name, give it as text_columns (--text-column)."
        )
    if header.count("") > 1:  # as pandas calls them
        header = [name or f"Unnamed: {i}" for i, name in enumerate(header)]
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise UserError(f"{path}: the header names column {twice[0]!r} twice.")
    return tuple(header), cells
