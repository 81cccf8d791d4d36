"""Damaged data files: one short sentence, or exactly the rows that are there.

`EJAX_FUZZ=1000` tries so many files of each format.
"""

import csv
import io
import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ejax.config import DataConfig
from ejax.data import sources
from ejax.data.columns import plain
from ejax.data.files import HEADERLESS, read_rows
from ejax.errors import UserError

FILES = int(os.environ.get("EJAX_FUZZ", "25"))
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
