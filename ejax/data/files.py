"""Rows of files, with line numbers: tsv, csv, jsonl, json and txt, each also .gz, and parquet.

One parser serves training and prediction. Text is kept exactly: in tsv a quote is a
quote, in csv a quoted field may hold line breaks, and only "\\n", with any "\\r" before it, ends a
line. Byte order marks at the start are skipped. Memory does not grow with the file, but for a json
that is one list; no line may be longer than `LONGEST`.
"""

import csv
import difflib
import gzip
import io
import itertools
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from ejax import assets, storage
from ejax.data import frames
from ejax.data.columns import TEXT_COLUMNS, find_column, names_columns, plain, recognised_texts
from ejax.data.labels import INVISIBLE, check_characters, listed, short
from ejax.errors import UserError

FORMATS = ("tsv", "csv", "jsonl", "json", "parquet", "txt")
ENDINGS = ".tsv, .csv, .jsonl, .json or .txt, each also with .gz, or .parquet"
HEADERLESS = {2: ("label", "text"), 3: ("label", "text_a", "text_b")}
PEEK_ROWS = 1000  # rows looked at to tell whether a tsv has a header
LONGEST = 1 << 24  # bytes of a line, or characters of a csv field
QUOTED = (
    "the text looks quoted, as pandas writes it, and in a tsv a quote is a plain character: save "
    "it as .csv."
)
HEADER_AGAIN = "the header stands here again: delete it."

Row = dict[str, Any]
Skip = Callable[[str], None] | None
Cells = Iterator[tuple[int, list[str]]]  # of a tsv or csv, by line


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
      format: one of `FORMATS`; "" means by the file's ending. A txt file has one text per
        line, in the column "text"; a json holds lines of objects or one list of them. In that
        list and in a parquet file the line is the number of the row, from 1.
      text_columns: the columns of text, where they are to be named.
      label_column: the column of labels, where it is to be named.
      labels: known label names; they help to see that a tsv has no header.
      skip: called with the sentence about a row that cannot be read, which is left
        out; None means to raise it. A header, and a csv that is not UTF-8, always raise.
      header: called with the columns of a tsv, csv or parquet before its first row.

    Standard input, jsonl, json and txt may be empty. Spaces and invisible characters around the
    names of a tsv's or csv's columns are left out.

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
    if kind == "parquet":
        yield from frames.parquet_rows(_whole(path), header)
        return
    lines = _lines(path, None if kind == "csv" else skip)
    first = next(lines, None)
    if first is None:
        if path == "-" or kind in ("jsonl", "json", "txt"):
            return
        raise UserError(f"{path} is empty.")
    kind = kind or _sniff(first[1], text_columns)
    lines = itertools.chain([first], lines)
    if kind == "txt":
        yield from ((number, {"text": _strip(line)}) for number, line in lines)
    elif kind == "json" and first[1].lstrip()[:1] in ("[", ""):
        yield from _json_list(lines, path)
    elif kind in ("jsonl", "json"):
        yield from _json_rows(lines, path, skip)
    else:
        cells: Cells = ((number, _strip(line).split("\t")) for number, line in lines)
        if kind == "csv":
            cells = _csv_cells(lines, path, skip)
        columns, cells = _columns(cells, kind, path, text_columns, label_column, labels)
        header(columns)
        yield from _table_rows(cells, columns, kind, path, skip)


def _table_rows(
    cells: Cells, columns: tuple[str, ...], kind: str, path: str, skip: Skip
) -> Iterator[tuple[int, Row]]:
    names = [plain(name) for name in columns]
    opened = 0  # the line of a tsv where a cell began with a quote that it does not end
    for number, row in cells:
        if row == [""] and len(columns) > 1:
            continue  # a blank line
        if len(columns) > 1 and [plain(cell) for cell in row] == names:
            _refuse(f"{path}, line {number}: {HEADER_AGAIN}", skip)
            continue
        if kind == "tsv" and not opened and _opens_quote(row[-1]):
            opened = number
        if len(row) != len(columns):
            hint = (
                f" The quote that opens in line {opened} seems to hold a line break, which a tsv "
                f"cannot: save as .csv."
            )
            _refuse(
                f"{path}, line {number}: expected {len(columns)} columns "
                f"({listed(columns)}). Got {len(row)}.{hint if opened else ''}",
                skip,
            )
            continue
        yield number, dict(zip(columns, row, strict=True))


class Quoting:
    """Tells a tsv that a program quoted, as pandas does, from one whose quotes are text.

    In the first every text with a quote has quotes around it, and those inside doubled.
    """

    def __init__(self) -> None:
        self.first, self.plain = 0, False

    def see(self, line: int, cell: str) -> None:
        if '"' in cell:
            inner = cell[1:-1]
            around = len(cell) > 1 and cell[0] == cell[-1] == '"'
            if not around or '"' in inner.replace('""', ""):
                self.plain = True
            elif '""' in inner:
                self.first = self.first or line

    @property
    def line(self) -> int:
        """The first that was quoted by a program; 0 for none."""
        return 0 if self.plain else self.first


def _opens_quote(cell: str) -> bool:
    return cell[:1] == '"' and cell.count('"') % 2 == 1


def _whole(path: str) -> str:
    """The path of a parquet file, which cannot be read from a pipe."""
    if path == "-" or not storage.path_of(path).is_file():
        raise UserError(f"{path}: parquet cannot be read from a pipe: give a file.")
    with storage.path_of(path).open("rb") as file:
        assets.check_start(file.read(len(assets.LFS_POINTER)), path)
    return path


def _refuse(sentence: str, skip: Skip) -> None:
    if skip is None:
        raise UserError(sentence) from None
    skip(sentence)


def texts_of(
    row: Mapping[str, Any], columns: Sequence[str], path: object, line: int
) -> tuple[str, str | None]:
    """(text, pair) of a row; pair is None where there is one text column.

    Raises:
      ValueError: when a column is missing or holds no text.
    """
    for name in columns:
        if name not in row:
            raise UserError(
                f"{path}, line {line}: no column {short(name)}. Its columns: {listed(row)}."
            )
        if not isinstance(row[name], str):
            raise UserError(
                f"{path}, line {line}: column {short(name)} must hold text. Got {short(row[name])}."
            )
        check_characters(row[name], f"{path}, line {line}: column {short(name)}")
    return row[columns[0]], row[columns[1]] if len(columns) == 2 else None


def path_format(path: str | Path) -> str:
    """ "tsv" for train.tsv and train.tsv.gz; whatever the ending is."""
    name = Path(path).name.lower().removesuffix(".gz")
    return name.rpartition(".")[2] if "." in name else ""


def format_of(path: str | Path) -> str:
    """The format by the file's ending; ValueError when it is none of `FORMATS`."""
    check_file(path)
    kind = path_format(path)
    if kind not in FORMATS:
        raise UserError(f"{path}: cannot tell the format by the ending. Expected {ENDINGS}.")
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


@contextmanager
def _open(path: str) -> Iterator[Any]:
    if path == "-":
        yield sys.stdin.buffer
        return
    check_file(path)
    with storage.path_of(path).open("rb") as raw:
        # Of its own a remote file reads a line of any length.
        file: Any = io.BufferedReader(raw) if storage.is_remote(path) else raw
        if not path.lower().endswith(".gz"):
            yield file
        elif file.peek(1):
            with gzip.open(file) as unpacked:
                yield unpacked
        else:  # Python would read no rows, of a download that was cut off
            raise EOFError("it is empty, and even nothing takes some bytes as gzip")


def _lines(path: str, skip: Skip = None) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends. Only "\n" ends a line: U+2028 is text."""
    name = "standard input" if path == "-" else path
    try:
        with _open(path) as file:
            read = partial(file.readline, LONGEST + 1)
            for number, line in enumerate(iter(read, b""), 1):
                where = f"{name}, line {number}"
                if number == 1:
                    assets.check_start(line, name)
                    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                        raise UserError(f"{name} is UTF-16: save the file as UTF-8.")
                if len(line) > LONGEST:
                    raise UserError(
                        f"{where}: longer than {LONGEST >> 20} MiB: is it a text file, one row a "
                        f"line?"
                    )
                if b"\0" in line:
                    _refuse(
                        f"{where}: holds a zero byte, so it is UTF-16 or no text: save the file as "
                        f"UTF-8.",
                        skip if number > 1 else None,
                    )
                    continue
                if number == 1 and b"\r" in line.strip() and not line.endswith(b"\n"):
                    raise UserError(
                        f"{name}: its lines end with a carriage return alone, as on an old Mac: "
                        f"save it with line feeds."
                    )
                try:
                    text = line.decode()
                except UnicodeDecodeError as error:
                    _refuse(
                        f"{where}: not UTF-8 (byte {error.start + 1} of the line "
                        f"is 0x{line[error.start]:02x}). Save the file as UTF-8.",
                        skip if number > 1 else None,
                    )
                    continue
                yield number, text.lstrip("\ufeff") if number == 1 else text
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{name} cannot be read: {error}.") from error


def _strip(line: str) -> str:
    return line.removesuffix("\n").rstrip("\r")


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


def _json_list(lines: Iterable[tuple[int, str]], path: str) -> Iterator[tuple[int, Row]]:
    """The objects of one list; the whole of it is read at once."""
    try:
        rows = json.loads("".join(line for _, line in lines) or "[]")
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}: not JSON: {error.msg} at column {error.colno}."
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: JSON that cannot be read: {error}.") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(
                f'{path}, row {number}: expected an object such as {{"text": "…"}}. '
                f"Got {json.dumps(row, ensure_ascii=False)[:40]}."
            )
        yield number, row


def _csv_cells(lines: Iterable[tuple[int, str]], path: str, skip: Skip) -> Cells:
    csv.field_size_limit(LONGEST)  # for the whole process; the default is 128 KiB
    reader = csv.reader((line for _, line in lines), strict=True)
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            to_end = re.search("end of data|field limit", str(error))
            lines_read = f"line {start}"
            if reader.line_num > start and not to_end:  # all are left out, where it is skipped
                lines_read = f"lines {start} to {reader.line_num}"
            _refuse(
                f"{path}, {lines_read}: not csv ({error}). A field with a quote, comma or "
                f'line break must stand in quotes, its own quotes doubled ("").',
                None if start == 1 or to_end else skip,
            )
            continue
        if cells:
            yield start, cells


def _columns(
    cells: Cells,
    kind: str,
    path: str,
    text_columns: Sequence[str],
    label_column: str,
    labels: Sequence[str],
) -> tuple[tuple[str, ...], Cells]:
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
            f"{path}: {short(header[0])} does not look like the name of a column. A tsv has tabs "
            f"between its columns, a csv commas; one text per line without a header is a txt. If "
            f"it is a name, give it as text_columns (--text-column)."
        )
    header = [INVISIBLE.sub("", name).strip() for name in header]
    if header.count("") > 1:  # as pandas calls them
        header = [name or f"Unnamed: {i}" for i, name in enumerate(header)]
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise UserError(f"{path}: the header names column {short(twice[0])} twice.")
    return tuple(header), cells
