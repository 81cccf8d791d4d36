"""Damaged and messy data files: one short sentence, or exactly the rows that are there.

`EJAX_FUZZ=1000 python -m pytest tests/test_fuzz_data.py` tries so many damaged files of each
format, and so many messy ones.
"""

import contextlib
import csv
import gzip
import io
import json
import os
import random
import re
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from ejax.classifier import EarlyExitClassifier
from ejax.config import DataConfig
from ejax.data import sources
from ejax.data.columns import plain
from ejax.data.files import HEADERLESS, read_rows
from ejax.data.labels import LIKELY_MARKS, REGRESSION, SEVERAL, SINGLE, WRITTEN_MARKS
from ejax.errors import UserError
from ejax.predict import predict_file

FILES = int(os.environ.get("EJAX_FUZZ", "25"))
MESSY = int(os.environ.get("EJAX_FUZZ", "60"))
EVERY = 5  # so many files to one that is also loaded for a training, which takes longer
TEXTS = ("a fine film", "dull", 'say "hi", he said', "crème 🎬", "x\u2028y", "NA", "-1.5", "")
LABELS = ("good", "bad", "0", "1.0", "so so")
BITS = (
    b"\t", b",", b'"', b'""', b"\n", b"\r", b"\r\n", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"{",
    b"[", b"}", b"|", b"nan", b"label", b"text", b"1e999", b"\\ud83d", b"9" * 5000, b" ",
    b"\xe2\x80\x8b", b"null",
)  # fmt: skip


def whole(kind: str, draw: random.Random) -> bytes:
    columns = draw.choice([("label", "text"), ("id", "text", "label"), ("text", "label", "n")])
    rows = [
        {
            "id": str(i), "n": draw.choice(["", "3"]), "text": draw.choice(TEXTS),
            "label": draw.choice(LABELS),
        }
        for i in range(draw.randint(2, 8))
    ]  # fmt: skip
    rows = [{name: row[name] for name in columns} for row in rows]
    if kind == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if kind == "parquet":
        out = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), out, compression="none")
        return out.getvalue()
    out_text = io.StringIO()
    cells = [columns, *(tuple(row.values()) for row in rows)]
    if kind == "csv":
        csv.writer(out_text, lineterminator="\n").writerows(cells)
    else:
        out_text.writelines("\t".join(row) + "\n" for row in cells)
    return out_text.getvalue().encode()


def damaged(content: bytes, draw: random.Random) -> bytes:
    at, end = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    how = draw.randrange(5)
    if how == 0:
        return content[:at] + draw.choice(BITS) + content[at:]
    if how == 1:
        return content[:at] + content[min(end, at + draw.randint(1, 9)) :]
    if how == 2:
        return content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :]
    if how == 3:
        return content[:end] + content[at:end] + content[end:]
    return content[:at]


def there(kind: str, content: bytes) -> list[list[Any]]:
    """The rows by another way: the values of each, the header, where there is one, first."""
    if kind == "parquet":
        found = pq.read_table(io.BytesIO(content))
        return [[*found.column_names], *([*row.values()] for row in found.to_pylist())]
    text = content.decode().lstrip("\ufeff")
    if kind == "jsonl":
        lines = [line for line in text.split("\n") if line.strip()]
        return [[], *([*json.loads(line).values()] for line in lines)]
    if kind == "csv":
        return [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    lines = [line.rstrip("\r") for line in text.split("\n")]
    return [line.split("\t") for line in lines[: len(lines) - (lines[-1] == "")]]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "parquet"])
def test_a_damaged_file_loses_no_row_in_silence(tmp_path, kind):
    path = tmp_path / f"t.{kind}"
    read = 0
    for seed in range(FILES):
        draw = random.Random(f"{kind} {seed}")
        content = whole(kind, draw)
        for _ in range(1 if kind == "parquet" else draw.randint(1, 3)):
            content = damaged(content, draw)
        path.write_bytes(content)
        try:
            rows = [row for _, row in read_rows(path)]
            read += 1
            expected = there(kind, content)
            headerless = kind == "tsv" and rows and tuple(rows[0]) in HEADERLESS.values()
            if not headerless or [plain(name) for name in expected[0]] == [*rows[0]]:
                expected = expected[1:]
            if kind in ("tsv", "csv"):
                expected = [row for row in expected if row != [""] or len(rows[0]) == 1]
            assert repr([[*row.values()] for row in rows]) == repr(expected), (seed, content)
        except UserError as error:
            check(error, path, seed)
        if seed % EVERY == 0:
            load(path, tmp_path, seed)
    assert read > 0


def load(path: Path, tmp_path: Path, seed: int) -> None:
    config = DataConfig(train=str(path), dev=str(path), cache_dir=str(tmp_path))
    try:
        split = sources.load(config)["train"]
    except UserError as error:
        check(error, path, seed)
        return
    rows = [row for _, row in read_rows(path)]
    assert [row.text for row in split] == [row[split.text_columns[0]] for row in rows]


def check(error: UserError, path: Path, seed: int) -> None:
    sentence = str(error).replace(str(path), path.name)
    assert len(sentence) < 500, (seed, sentence)
    assert path.name in sentence, (seed, sentence)
    assert "\n" not in sentence, (seed, sentence)


# Files as people and programs write them. Every row has a mark of its own, such as r007x, by which
# it is found again: in a row that was read, or in a line that a sentence names.

MARK = re.compile(r"r\d{3}x")
HANG = 10  # seconds; a file takes about 10 ms
NAMES = (
    ("label", "text"), ("text", "label"), ("", "text", "label"), ("Label", " Text\ufeff"),
    ("v1", "v2", "", "", ""), ("label", "text", "text"), ("id", "review", "sentiment", "score"),
    ("label", "premise", "hypothesis"), ("Unnamed: 0", "text", "class"), ("text",),
    ("\u200btext", "label"),
)  # fmt: skip
MESSY_LABELS = (
    ("good", "bad"), ("0", "1"), ("0.0", "1.0"), ("good", "good "), ("a|b", "b", ""),
    ("Good", "good"), ("e\u0301", "\xe9"), ("nan", "good"), ("1", "2", "inf"), (None, "x"),
    ("3.5", "-1e3"), (True, False),
    ("['a']", "b"), (1.5, 2, 10**400), ([], ["a", "b"]), (["a", None], "c"), ({"a": 1}, "b"),
    *(("good", "bad", mark) for mark in (*LIKELY_MARKS, *WRITTEN_MARKS)),
)  # fmt: skip
MESSY_TEXTS = (
    "", "a fine film", 'say "hi"', '"', '""', "it's", "a,b;c|d", "x\u2028y\x85z", "\ufeff",
    "\u200b", "\x1a", "NA", "naïve \U0001f3ac", "\\n", " edges ", "9" * 400, "y" * 200_000, "{}",
    "[1]", "label", "text",
)  # fmt: skip
ENCODINGS = (*("utf-8",) * 9, "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp949")
ENDS = (*("\n",) * 5, "\r\n", "\r\r\n", "\r", "\n\n")
ODD_LINES = ("", "{", '{"text": "\\ud83d"}', "[" * 2000, "1e999", '{"a": NaN}')
STORED = (*("plain",) * 5, "gz", "gz", "gz of two", "gz cut", "gz and more", "gz by name alone")


def messy(draw: random.Random) -> tuple[str, bytes, bytes]:
    """(the ending of its name, its content, and that before compression)."""
    kind = draw.choice(("csv", "csv", "tsv", "tsv", "jsonl", "json", "parquet", "txt"))
    names, labels = list(draw.choice(NAMES)), draw.choice(MESSY_LABELS)
    rows = []
    for i in range(draw.choice((0, 1, 2, 5, 12))):
        values = [f"{draw.choice(MESSY_TEXTS)} r{i:03}x" if j else draw.choice(labels)
                  for j in range(len(names))]  # fmt: skip
        if names[0] != "label":
            values = values[::-1]
        rows.append(values)
    if kind == "parquet":
        return "parquet", *[of_parquet(names, rows, draw)] * 2
    if kind in ("json", "jsonl"):
        text = of_json(kind, names, rows, draw)
    else:
        text = of_table(kind, names, rows, draw)
    encoding = draw.choice(ENCODINGS)
    plain = text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")
    plain = draw.choice((b"",) * 9 + (b"\xef\xbb\xbf" * 2, b"\xef\xbb\xbf")) + plain
    for _ in range(draw.choice((0, 0, 0, 1, 2))):
        plain = damaged(plain, draw)
    return stored(kind, plain, draw)


def stored(kind: str, plain: bytes, draw: random.Random) -> tuple[str, bytes, bytes]:
    how = draw.choice(STORED)
    if how == "plain":
        return kind, plain, plain
    packed = plain if how == "gz by name alone" else gzip.compress(plain)
    if how == "gz of two":
        half = len(plain) // 2
        packed = gzip.compress(plain[:half]) + gzip.compress(plain[half:])
    elif how == "gz cut":
        packed = packed[: draw.randrange(len(packed))]
    elif how == "gz and more":
        packed += draw.choice((b"\0" * 9, b"more"))
    return f"{kind}.gz", packed, plain


def of_parquet(names: list[str], rows: list[list[Any]], draw: random.Random) -> bytes:
    out = io.BytesIO()
    names = [name or f"c{i}" for i, name in enumerate(names)]
    try:
        columns = [pa.array(column) for column in zip(*rows, strict=True)]
        table = pa.Table.from_arrays(columns or [pa.array([], pa.string()) for _ in names], names)
    except (pa.ArrowException, OverflowError, TypeError):  # of several types
        columns = [pa.array([str(cell) for cell in column]) for column in zip(*rows, strict=True)]
        table = pa.Table.from_arrays(columns, names)
    pq.write_table(table, out, row_group_size=draw.choice((1, 99)))
    return out.getvalue()


def of_json(kind: str, names: list[str], rows: list[list[Any]], draw: random.Random) -> str:
    objects: list[Any] = [dict(zip(names, row, strict=True)) for row in rows]
    if draw.random() < 0.3 and objects:  # other keys, or no object
        at = draw.randrange(len(objects))
        odd = objects[at].get("text", "")
        objects[at] = draw.choice(({"body": odd}, [odd], odd, objects[at] | {"title": "t"}))
    texts = [json.dumps(one, ensure_ascii=draw.random() < 0.5) for one in objects]
    if draw.random() < 0.2:
        texts.append(draw.choice(ODD_LINES))
    if kind == "json" and draw.random() < 0.7:
        return draw.choice(("", "\n ")) + "[" + draw.choice((",", ",\n")).join(texts) + "]\n"
    return draw.choice(ENDS).join([*texts, ""])


def of_table(kind: str, names: list[str], rows: list[list[Any]], draw: random.Random) -> str:
    out, end = io.StringIO(), draw.choice(ENDS)
    cells = [[str(cell) for cell in row] for row in rows]
    head = draw.choice(("once", "once", "once", "none", "again"))
    cells = [names] * (head != "none") + cells
    if head == "again":
        cells.insert(draw.randrange(len(cells) + 1), names)
    if draw.random() < 0.2:  # a cell too many, or too few
        odd = draw.choice(cells or [[]])
        odd[:] = draw.choice((odd[:-1], [*odd, "more"]))
    if kind == "csv" or draw.random() < 0.2:  # a tsv as pandas writes it
        mark = draw.choice(",,,,;|") if kind == "csv" else "\t"
        quoting = draw.choice((csv.QUOTE_ALL, csv.QUOTE_MINIMAL, csv.QUOTE_MINIMAL))
        if draw.random() < 0.2 and cells and cells[-1]:
            cells[-1][-1] += "\nof two lines"
        csv.writer(out, delimiter=mark, quoting=quoting, lineterminator=end).writerows(cells)
        text = out.getvalue()
    else:
        text = end.join(["\t".join(row) for row in cells] + [""])
    if draw.random() < 0.2:
        text = text.replace('""', '"', draw.randint(1, 3))
    return text.removesuffix(end) if draw.random() < 0.3 else text


@contextlib.contextmanager
def in_time(what: object) -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError(f"{what}: longer than {HANG} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(HANG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_messy_file_loses_no_row_in_silence(tmp_path: Path) -> None:
    clf = EarlyExitClassifier.from_pretrained(tiny.trained()[0])
    done = dict.fromkeys((read_messy, train_messy, predict_messy), 0)
    for seed in range(MESSY):
        draw = random.Random(f"messy {seed}")
        ending, content, plain = messy(draw)
        path = tmp_path / f"t.{ending}"
        path.write_bytes(content)
        for way in done:
            with in_time(seed), warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                try:
                    way(path, plain, draw, clf, said)
                    done[way] += 1
                except UserError as error:
                    check(error, path, seed)
                except BaseException as error:
                    raise AssertionError((seed, way.__name__, content[:300])) from error
        path.unlink()
    assert all(MESSY > count > MESSY / 20 for count in done.values()), done


def read_messy(path: Path, plain: bytes, draw: random.Random, clf: Any, said: Any) -> None:
    header: list[str] = []
    skipped: list[str] = []
    rows = list(read_rows(path, skip=skipped.append, header=header.extend))
    found = set(MARK.findall(repr(rows) + repr(header)))
    lines = plain.replace(b"\0", b"").split(b"\n")
    for sentence in skipped:
        one = re.search(r"lines? (\d+)(?: to (\d+))?", sentence)
        assert one, sentence
        for line in lines[int(one[1]) - 1 : int(one[2] or one[1])]:
            found |= set(MARK.findall(line.decode("latin-1")))
    if not path.name.endswith("parquet"):
        there = set(MARK.findall(plain.replace(b"\0", b"").decode("latin-1")))
        assert there <= found, (sorted(there - found), skipped, plain[:400])


def train_messy(path: Path, plain: bytes, draw: random.Random, clf: Any, said: Any) -> None:
    problem = draw.choice((SINGLE, SINGLE, SEVERAL, REGRESSION))
    config = DataConfig(
        train=str(path), dev=str(path), cache_dir=str(path.parent / "cache"), problem_type=problem
    )
    split = sources.load(config)["train"]
    assert len(split) == len(list(read_rows(path)))
    if problem == SINGLE:
        names = {name.casefold() for name in split.labels}
        assert not names & {*WRITTEN_MARKS}, names
        told = " ".join(str(one.message) for one in said)
        assert ("marks rows without one" in told) == bool(names & {*LIKELY_MARKS}), names


def predict_messy(path: Path, plain: bytes, draw: random.Random, clf: Any, said: Any) -> None:
    output = path.with_name(f"out.{draw.choice(('jsonl', 'tsv', 'csv', 'csv.gz', 'parquet'))}")
    skipped: list[str] = []
    total = len([*read_rows(path, labels=clf.bundle.labels, skip=skipped.append)])
    summary = predict_file(clf, str(path), str(output), skip_bad_rows=True)
    assert summary.rows + summary.skipped == total + len(skipped), summary
    assert len(list(read_rows(output))) == summary.rows, summary
    output.unlink()
