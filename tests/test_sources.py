"""Labelled data: local files, TFDS names, the rows of `ejax predict`, and bad input."""

import collections
import csv
import gzip
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ejax.config import DataConfig
from ejax.data import files, named, sources

REAL = Path(__file__).parents[2] / "shared" / "data"
# Text that a careless reader would change: quotes, commas, spaces at the ends, characters
# that Python's str.splitlines takes for line ends, and a character of four bytes.
HARD = ['say "hi', '""', " a, b ", "x\u2028y\x85z\x0c", "crème 🎬", "'", "a\\tb", "\ufeffq", "NA"]


def write(path: Path, text: str, newline: str = "\n") -> Path:
    data = text.replace("\n", newline).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def load(tmp_path: Path, splits=sources.SPLITS, seed=0, labels=(), **fields):
    config = DataConfig(cache_dir=str(tmp_path / "cache"), **fields)
    return sources.load(config, splits=splits, seed=seed, labels=labels)


def train_error(tmp_path: Path, name: str, text: str | bytes, **fields) -> str:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load(tmp_path, train=str(path), **fields)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path)) or "text_columns must" in message
    return message.removeprefix(str(path))


# Local files


def serialise(kind: str, rows: list[tuple[str, ...]], columns: tuple[str, ...]) -> str:
    if kind == "jsonl":
        return "".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)
    if kind == "tsv":
        return "".join("\t".join(row) + "\n" for row in [columns, *rows])
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([columns, *rows])
    return out.getvalue()


@pytest.mark.parametrize("ending", ["tsv", "csv", "jsonl", "tsv.gz", "csv.gz", "jsonl.gz"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_every_format_gives_the_same_rows(tmp_path, ending, newline):
    rows = [(f"c{i % 2}", f"pair {i}", text) for i, text in enumerate(HARD)]
    text = serialise(ending.split(".")[0], rows, ("label", "hypothesis", "premise"))
    train = write(tmp_path / f"train.{ending}", text, newline)
    dev = write(tmp_path / f"dev.{ending}", "\ufeff" + text, newline)  # a byte order mark
    found = load(tmp_path, train=str(train), dev=str(dev))
    expected = [sources.Example(text, pair, int(label[1])) for label, pair, text in rows]
    for name in ("train", "dev"):
        assert list(found[name]) == expected
        assert found[name].labels == ("c0", "c1")
        assert found[name].name == name
    assert "test" not in found
    assert found["train"].origin == f"{tmp_path.name}/train.{ending}"


def test_a_split_is_a_sequence(tmp_path):
    write(tmp_path / "train.tsv", "text\tlabel\n" + "".join(f"t{i}\t{i % 3}\n" for i in range(11)))
    write(tmp_path / "dev.tsv", "text\tlabel\na\t2\n")
    split = load(tmp_path, path=str(tmp_path))["train"]
    assert len(split) == 11
    assert split[4] == ("t4", None, 1)
    assert split[-1] == split[10] == list(split)[10]
    assert split[2:9:3] == [split[2], split[5], split[8]]
    with pytest.raises(IndexError):
        split[11]


def test_csv_keeps_line_breaks_and_long_fields(tmp_path):
    long = "w" * 200_000  # above the csv module's own limit
    text = f'label,text\r\na,"one\r\ntwo, ""three"""\r\nb,{long}\r\n\r\na,last\r\n'
    (tmp_path / "train.csv").write_bytes(text.encode())
    (tmp_path / "dev.csv").write_bytes(text.encode())
    split = load(tmp_path, path=str(tmp_path))["train"]
    assert [row.text for row in split] == ['one\r\ntwo, "three"', long, "last"]
    numbers = [line for line, _ in sources.read_rows(tmp_path / "train.csv")]
    assert numbers == [2, 4, 6]  # where each row begins


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (("id", "text", "label", "title"), ("text",)),
        (("label", "sentence", "idx"), ("sentence",)),
        (("text_a", "label"), ("text_a",)),
        (("label", "text_b", "text_a"), ("text_a", "text_b")),
        (("idx", "sentence1", "sentence2", "label"), ("sentence1", "sentence2")),
        (("hypothesis", "premise", "label"), ("premise", "hypothesis")),
        (("question1", "question2", "label"), ("question1", "question2")),
        (("sentence", "question", "label"), ("question", "sentence")),
        (("", "idx", "review", "label"), ("review",)),
        (("review",), ("review",)),
    ],
)
def test_text_columns_are_recognised(columns, expected):
    assert sources.find_text_columns(columns) == expected


@pytest.mark.parametrize("header", ["text;label", "text|label", "one great film"])
def test_a_text_or_another_format_is_no_name_of_a_column(tmp_path, header):
    source = tmp_path / "in.tsv"
    source.write_text(f"{header}\nx\n")
    with pytest.raises(ValueError, match=f"'{re.escape(header)}' does not look like the name"):
        next(sources.read_rows(source))
    assert next(sources.read_rows(source, text_columns=(header,))) == (2, {header: "x"})
    source.with_suffix(".jsonl").write_text(json.dumps({header: "x"}) + "\n")
    assert next(sources.read_rows(source.with_suffix(".jsonl"))) == (1, {header: "x"})


def test_preferred_columns_are_taken_where_they_are():
    columns = ("text", "sentence", "label")
    assert sources.find_text_columns(columns, preferred=("sentence",)) == ("sentence",)
    assert sources.find_text_columns(columns, preferred=("review",)) == ("text",)
    assert sources.find_text_columns(columns, ("text",), preferred=("sentence",)) == ("text",)


def test_columns_by_name(tmp_path):
    text = "stars\tbody\thead\ttext\n5\tb1\th1\tx\n1\tb2\th2\tx\n"
    train = str(write(tmp_path / "train.tsv", text))
    fields = {"train": train, "dev": train, "label_column": "stars"}
    found = load(tmp_path, text_columns=("head", "body"), **fields)
    assert list(found["train"]) == [("h1", "b1", 1), ("h2", "b2", 0)]
    found = load(tmp_path, text_columns=("body",), **fields)  # another choice, another copy
    assert list(found["train"]) == [("b1", None, 1), ("b2", None, 0)]
    found = load(tmp_path, **fields)
    assert [row.text for row in found["train"]] == ["x", "x"]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["10", "2", "-1", "2"], ("-1", "2", "10")),
        (["10", "2", "b"], ("10", "2", "b")),
        ([3, 20, 3], ("3", "20")),
        ([True, False], ("false", "true")),
        (["1.1", "1.2"], ("1.1", "1.2")),  # strings in JSON, so names
    ],
)
def test_label_names(tmp_path, labels, expected):
    rows = "".join(json.dumps({"text": "t", "label": label}) + "\n" for label in labels)
    path = str(write(tmp_path / "train.jsonl", rows))
    assert load(tmp_path, train=path, dev=path)["train"].labels == expected


def test_headerless_tsv(tmp_path):
    # label<TAB>text[<TAB>text], as the paper's code reads it
    write(tmp_path / "train.tsv", "good\ta fine film\nbad\tdull\ngood\tlovely\n")
    write(tmp_path / "dev.tsv", "bad\tslow\n")  # one row: seen by the label of train
    write(tmp_path / "test.tsv", "label\ttext\ngood\twith a header\n")
    found = load(tmp_path, path=str(tmp_path))
    assert [tuple(row) for row in found["train"]] == [
        ("a fine film", None, 1), ("dull", None, 0), ("lovely", None, 1),
    ]  # fmt: skip
    assert list(found["dev"]) == [("slow", None, 0)]
    assert list(found["test"]) == [("with a header", None, 1)]
    pairs = str(write(tmp_path / "pairs.tsv", "0\ta\tb\n1\tc\td\n"))
    assert list(load(tmp_path, train=pairs, dev=pairs)["dev"]) == [("a", "b", 0), ("c", "d", 1)]


def test_dev_is_carved_from_train(tmp_path):
    rows = [f"t{i}\tl{i % 2}" for i in range(40)]
    train = str(write(tmp_path / "train.tsv", "text\tlabel\n" + "\n".join(rows)))
    found = load(tmp_path, train=train, dev_fraction=0.2, seed=3)
    assert found["dev"].origin == "20 % of train, seed 3"
    assert len(found["dev"]) == 8
    texts = [[row.text for row in found[name]] for name in ("train", "dev")]
    assert sorted(texts[0] + texts[1]) == sorted(f"t{i}" for i in range(40))
    for part in texts:
        assert part == sorted(part, key=lambda text: int(text[1:]))  # in the order of the file
    again = load(tmp_path, train=train, dev_fraction=0.2, seed=3)
    assert list(again["dev"]) == list(found["dev"])
    other = load(tmp_path, train=train, dev_fraction=0.2, seed=4)
    assert list(other["dev"]) != list(found["dev"])
    alone = load(tmp_path, splits=("train",), train=train, dev_fraction=0.2, seed=3)
    assert list(alone) == ["train"]
    assert list(alone["train"]) == list(found["train"])  # never with the rows of dev
    write(tmp_path / "dev.tsv", "text\tlabel\nx\tl0\n")
    whole = load(tmp_path, splits=("train",), path=str(tmp_path))
    assert len(whole["train"]) == 40  # a dev file leaves train whole, asked for or not


def test_limit_draws_from_the_whole_file(tmp_path):
    text = "text\tlabel\n" + "".join(f"t{i}\t{i // 50}\n" for i in range(100))  # sorted by class
    path = str(write(tmp_path / "train.tsv", text))
    found = load(tmp_path, train=path, dev=path, limit=20)
    assert [len(found[name]) for name in ("train", "dev")] == [20, 20]
    assert {row.label for row in found["train"]} == {0, 1}
    assert found["dev"].origin == f"{tmp_path.name}/train.tsv, 20 of 100 rows"
    other = load(tmp_path, train=path, dev=path, limit=20, seed=9)
    assert list(other["dev"]) == list(found["dev"])  # the same rows for every seed


def test_known_labels_let_a_test_file_stand_alone(tmp_path):
    path = str(write(tmp_path / "mine.csv", "label,text\nham,x\nspam,y\nham,z\n"))
    found = load(tmp_path, splits=("test",), labels=("spam", "ham", "other"), test=path)
    assert list(found) == ["test"]
    assert [row.label for row in found["test"]] == [1, 0, 1]
    assert found["test"].labels == ("spam", "ham", "other")


def test_the_copy_follows_the_content(tmp_path):
    path = write(tmp_path / "train.tsv", "text\tlabel\nold\ta\nx\tb\n")
    assert load(tmp_path, train=str(path), dev=str(path))["dev"][0].text == "old"
    write(path, "text\tlabel\nnew\ta\nx\tb\n")
    assert load(tmp_path, train=str(path), dev=str(path))["dev"][0].text == "new"
    copies = list((tmp_path / "cache" / "data" / "local_text").iterdir())
    assert len(copies) == 2
    records = list((tmp_path / "cache").rglob("*.array_record*"))
    before = {record: record.stat().st_mtime_ns for record in records}
    load(tmp_path, train=str(path), dev=str(path))
    assert {record: record.stat().st_mtime_ns for record in records} == before


def test_loading_prints_nothing(tmp_path, capfd):
    path = str(write(tmp_path / "train.tsv", "text\tlabel\nx\ta\ny\tb\n"))
    load(tmp_path, train=path, dev=path)
    assert capfd.readouterr() == ("", "")


RACE = """
import pathlib, sys, time
import ejax.data.local  # the slow imports come before the start signal
from ejax.config import DataConfig
from ejax.data import sources
print("ready", flush=True)
sys.stdin.readline()
config = DataConfig(train=sys.argv[1], dev=sys.argv[1], cache_dir=sys.argv[2])
split = sources.load(config)["train"]
print(len(split), sources.row_hash(split[len(split) - 1]), flush=True)
"""


def test_two_processes_load_the_same_file_at_once(tmp_path):
    text = "text\tlabel\n" + "".join(f"row {i}\t{i % 2}\n" for i in range(5000))
    path = write(tmp_path / "train.tsv", text)
    command = [sys.executable, "-c", RACE, str(path), str(tmp_path / "cache")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    root = Path(__file__).parents[1]
    running = [subprocess.Popen(command, cwd=root, text=True, **pipes) for _ in range(2)]
    for process in running:
        assert process.stdout.readline() == "ready\n"
    for process in running:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=50) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    expected = sources.row_hash(sources.Example("row 4999", None, 1))
    assert [out for out, _ in said] == [f"5000 {expected}\n"] * 2
    assert len(list((tmp_path / "cache").rglob("*.array_record*"))) == 1


# Bad input: one sentence that names the file, the line and the mend

TWO = "expected 2 columns (text, label)."


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("t.tsv", "", " is empty."),
        ("t.tsv.gz", gzip.compress(b"", mtime=0), " is empty."),
        ("t.tsv", "text\tlabel\n", " has no rows."),
        ("t.csv", "text,label\n\n", " has no rows."),
        ("t.jsonl", "\n", " has no rows."),
        ("t.tsv", "\ntext\tlabel\n", ", line 1: expected a header with the column names."),
        (
            "t.csv",
            "text,stars\nx,1\n",
            ": which column holds the label? Its columns: text, stars. "
            "Name it with label_column (--label-column).",
        ),
        (
            "t.csv",
            "title,body,label\nx,y,1\n",
            ": which column holds the text? Its columns: title, body, label. "
            "Name one or two with text_columns (--text-column).",
        ),
        ("t.csv", "text,text,label\nx,y,1\n", ": the header names column 'text' twice."),
        ("t.csv", "text,label\nx,a\n", " has only the label 'a': a classifier needs two classes."),
        ("t.tsv", "text\tlabel\nx\ta\ny\n", f", line 3: {TWO} Got 1."),
        ("t.tsv", "text\tlabel\nx\ta\ny\tb\tc\n", f", line 3: {TWO} Got 3."),
        ("t.tsv", "text\tlabel\nx\ta\n\ny\tb\tc\n", f", line 4: {TWO} Got 3."),
        ("t.csv", 'text,label\n"x\nx",a\ny\n', f", line 4: {TWO} Got 1."),
        (
            "t.csv",
            'text,label\nx,a\n"open,b\ny,a\n',
            ", line 3: not csv (unexpected end of data). A field with a quote, comma or line "
            'break must stand in quotes, its own quotes doubled ("").',
        ),
        (
            "t.tsv",
            b"text\tlabel\nx\ta\ncaf\xe9\tb\n",
            ", line 3: not UTF-8 (byte 4 of the line is 0xe9). Save the file as UTF-8.",
        ),
        (
            "t.csv",
            "text,label\nx,a\n".encode("utf-16"),
            " is UTF-16: save the file as UTF-8.",
        ),
        (
            "t.jsonl",
            '{"text": "x", "label": 1}\n{"text": \n',
            ", line 2: not JSON: Expecting value at column 10.",
        ),
        ("t.jsonl", "[1, 2]\n", ', line 1: expected an object such as {"text": "…"}. Got [1, 2].'),
        (
            "t.jsonl",
            '{"text": "x", "label": ["a", "b"]}\n',
            ", line 1: the label is a list: for several labels per text set problem_type="
            "multi_label_classification (--problem-type). Got ['a', 'b'].",
        ),
        (
            "t.jsonl",
            '{"text": "x", "label": 1}\n{"text": "x", "label": 2.5}\n',
            ", line 2: the label 2.5 is a number with a fraction: for numbers set "
            "problem_type=regression (--problem-type).",
        ),
        (
            "t.tsv",
            "sentence1\tsentence2\tlabel\na\tb\t3.8\n",
            ", line 2: the label 3.8 is a number with a fraction: for numbers set "
            "problem_type=regression (--problem-type).",
        ),
        (
            "t.jsonl",
            '{"text": "x", "label": 1}\n{"text": "x", "label": null}\n',
            ", line 2: the label is missing: expected a name. Got None. Leave the row out.",
        ),
        (
            "t.csv",
            "text,label\nx,\n",
            ", line 2: the label is missing: expected a name. Got ''. Leave the row out.",
        ),
        (
            "t.tsv",
            "text\tlabel\nx\ta\ny\ta \n",
            ", line 3: the label must not begin or end with a space. Got 'a '.",
        ),
        (
            "t.jsonl",
            '{"text": "x", "label": ' + "9" * 5000 + "}\n",
            ", line 1: JSON that cannot be read: Exceeds the limit (4300 digits) for integer "
            "string conversion: value has 5000 digits; use sys.set_int_max_str_digits() to "
            "increase the limit.",
        ),
        (
            "t.jsonl",
            '{"text": "x", "label": 1}\n{"txt": "x", "label": 2}\n',
            ", line 2: no column 'text'. Its columns: txt, label.",
        ),
        (
            "t.jsonl",
            '{"text": "x", "label": 1}\n{"text": null, "label": 2}\n',
            ", line 2: column 'text' must hold text. Got None.",
        ),
        (
            "t.jsonl",
            '{"text": "x", "label": "\\ud83d"}\n',
            ", line 1: the label holds half a surrogate pair, which is no character.",
        ),
        (
            "t.jsonl",
            '{"text": "\\ud83d", "label": 1}\n',
            ", line 1: column 'text' holds half a surrogate pair, which is no character.",
        ),
        ("t.txt", "x\n", ": a .txt file has no labels. Expected .tsv, .csv or .jsonl."),
        (
            "t.xlsx",
            "x\n",
            ": cannot tell the format by the ending. "
            "Expected .tsv, .csv, .jsonl, .json or .txt, each also with .gz, or .parquet.",
        ),
        ("t.tsv.gz", "text\tlabel\n", " cannot be read: Not a gzipped file (b'te')."),
        (
            "t.jsonl.gz",
            "",
            " cannot be read: it is empty, and even nothing takes some bytes as gzip.",
        ),
        (
            "t.csv",
            'text,stars,"a\nb"\nx,1,2\n',
            ": which column holds the label? Its columns: 'text', 'stars', 'a\\nb'. "
            "Name it with label_column (--label-column).",
        ),
        (
            "t.csv",
            f"text,label\nx,{'y' * 999}\n",
            f" has only the label '{'y' * 59}…: a classifier needs two classes.",
        ),
        (
            "t.tsv.gz",
            gzip.compress(b"text\tlabel\nx\ta\ny\tb\n", mtime=0)[:-9],
            " cannot be read: Compressed file ended before the end-of-stream marker was reached.",
        ),
    ],
)  # fmt: skip
def test_bad_training_file(tmp_path, name, text, expected):
    assert train_error(tmp_path, name, text) == expected


def test_a_label_for_rows_without_one_is_warned_of(tmp_path):
    for labels, warned in ((range(-1, 3), True), ((-1, 1), False)):
        rows = "".join(f"{label}\ttext {label}\n" for label in [*labels] * 3)
        (tmp_path / "train.tsv").write_text(f"label\ttext\n{rows}")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            load(tmp_path, path=str(tmp_path))
        assert any("has the label -1" in str(one.message) for one in seen) == warned


def test_a_test_file_without_labels_is_left_out(tmp_path):
    """Where the folder holds it; one that is named has to have them."""
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + "fine\t1\npoor\t0\n" * 9)
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\tfine\n")
    with pytest.warns(UserWarning, match=r"test.tsv is left out: it has no column of labels"):
        assert set(load(tmp_path, path=str(tmp_path))) == {"train", "dev"}
    with pytest.raises(ValueError, match="which column holds the label"):
        load(tmp_path, path=str(tmp_path), test=str(tmp_path / "test.tsv"))


def test_dev_may_be_called_val(tmp_path):
    for name in ("train", "val"):
        (tmp_path / f"{name}.csv").write_text(f"label,text\na,{name}\nb,y\n")
    dev = load(tmp_path, path=str(tmp_path))["dev"]
    assert [row.text for row in dev] == ["val", "y"]


def test_a_label_per_row_is_warned_of(tmp_path):
    rows = "".join(f"{i}\t{'ab'[i % 2]}\ttext {i}\n" for i in range(30))
    (tmp_path / "train.tsv").write_text(rows)  # id, label and text, without a header
    with pytest.warns(UserWarning, match=r"train.tsv has 30 labels in 30 rows: 'label' \(in a tsv"):
        load(tmp_path, path=str(tmp_path))


def test_bad_columns(tmp_path):
    text = "label\tbody\tx\na\tb\tc\n"
    message = train_error(tmp_path, "t.tsv", text, text_columns=("bodi",))
    assert message == " has no column 'bodi'. Its columns: label, body, x."
    message = train_error(tmp_path, "t.tsv", text, text_columns=("body", "x", "label"))
    assert message == "text_columns must be one or two columns. Got body, x, label."


def test_a_failed_file_leaves_no_copy(tmp_path):
    bad = "text\tlabel\n" + "x\ta\ny\tb\n" * 50 + "z\n"
    message = train_error(tmp_path, "t.tsv", bad)
    assert message == ", line 102: expected 2 columns (text, label). Got 1."
    assert message == train_error(tmp_path, "t.tsv", bad)  # and again: nothing was kept
    assert not list((tmp_path / "cache").rglob("*.array_record*"))


def test_no_such_file(tmp_path):
    write(tmp_path / "train.tsv", "text\tlabel\nx\ta\ny\tb\n")
    with pytest.raises(
        ValueError, match=r"No such file: .*/trian.tsv. Did you mean .*/train.tsv[?]"
    ):
        load(tmp_path, train=str(tmp_path / "trian.tsv"))
    with pytest.raises(ValueError, match=r"No such file: .*/zzz.csv[.]$"):
        load(tmp_path, train=str(tmp_path / "zzz.csv"))
    with pytest.raises(ValueError, match=r"there is no folder .*/nowhere\)"):
        load(tmp_path, train=str(tmp_path / "nowhere" / "train.tsv"))
    with pytest.raises(ValueError, match=r"is a folder: expected a file"):
        load(tmp_path, train=str(tmp_path / "train.tsv"), dev=str(tmp_path))


def shard(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("inside", ["", "data"])
def test_files_named_as_on_the_hub_are_the_splits(tmp_path, inside):
    hub = tmp_path / "hub" / inside
    for i in range(3):
        rows = [{"text": f"{name} {i}", "label": name} for name in ("a", "b")]
        shard(hub / f"train-0000{i}-of-00003.parquet", *rows)
    shard(hub / "validation-00000-of-00001-0123456789abcdef.parquet", {"label": "b", "text": "v"})
    shard(hub / "test-00000-of-00001.parquet", {"text": "t", "label": "a"})
    for fields in ({"path": str(tmp_path / "hub")}, {"train": str(tmp_path / "hub")}):
        found = load(tmp_path, **fields)
        texts = [[row.text for row in found[name]] for name in sources.SPLITS]
        assert texts == [["a 0", "b 0", "a 1", "b 1", "a 2", "b 2"], ["v"], ["t"]]
        assert found["train"].origin == f"{inside or 'hub'}/train-*-of-00003.parquet"
    shard(hub / "train-00001-of-00003.parquet", {"text": "new", "label": "a"})
    assert "new" in [row.text for row in load(tmp_path, path=str(tmp_path / "hub"))["train"]]


def test_all_files_of_a_split_must_be_there(tmp_path):
    rows = [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}]

    def refused(expected: str) -> None:
        with pytest.raises(ValueError, match=expected):
            load(tmp_path, path=str(tmp_path))

    first = shard(tmp_path / "train-00000-of-00003.parquet", *rows)
    third = shard(tmp_path / "train-00002-of-00003.parquet", *rows)
    refused(r"lacks 1 of the 3 files of train, such as train-00001-of-00003.parquet: fetch the")
    second = shard(tmp_path / "train-00001-of-00003.parquet", {"body": "x", "label": "a"})
    refused(r"train-00001-of-00003.parquet has the columns body, label, and train-00000-of-00003")
    shard(second, {"text": "x", "label": None})
    refused(r"train-\*-of-00003.parquet, line 3: the label is missing")
    second.write_bytes(third.read_bytes()[:-9])
    refused(r"train-00001-of-00003.parquet cannot be read as parquet")
    again = shutil.copy(first, tmp_path / f"{first.stem}-0123456789abcdef.parquet")
    refused("holds 4 files of train, and their names say 3: keep those of one version")
    Path(again).rename(tmp_path / "train-00000-of-00001.parquet")
    refused(r"holds train-00000-of-00001.parquet and train-\*-of-00003.parquet: set data.train")


def test_only_the_splits_that_are_read_must_be_whole(tmp_path):
    shard(tmp_path / "train-00000-of-00002.parquet", {"text": "x", "label": "a"})
    shard(tmp_path / "test-00000-of-00001.parquet", {"text": "t", "label": "a"})
    config = DataConfig(path=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    found = sources.load(config, splits=("test",), labels=("a", "b"))
    assert [row.text for row in found["test"]] == ["t"]
    with pytest.raises(ValueError, match="lacks 1 of the 2 files of train"):
        sources.load(config, splits=("dev",), labels=("a", "b"))  # a part of train


def test_the_file_to_use_of_two_may_be_all_that_a_folder_holds(tmp_path):
    write(tmp_path / "train.csv", "text,label\nx,a\ny,b\n")
    named = write(tmp_path / "train.tsv", "text\tlabel\nx\ta\nz\tb\nu\ta\nv\tb\n")
    found = load(tmp_path, path=str(tmp_path), train=str(named), dev_fraction=0.5)
    assert {row.text for split in found.values() for row in split} == set("xzuv")


def test_bad_folder(tmp_path):
    with pytest.raises(ValueError, match=r"No such folder: .*/nowhere"):
        load(tmp_path, path=str(tmp_path / "nowhere"))
    notes = write(tmp_path / "notes.md", "x")
    with pytest.raises(ValueError, match=r"has no train.tsv, .* It holds: notes.md."):
        load(tmp_path, path=str(tmp_path))
    with pytest.raises(ValueError, match=f"must be a folder: set data.train={notes} for a file"):
        load(tmp_path, path=str(notes))
    write(tmp_path / "dev.tsv", "text\tlabel\nx\ta\n")
    with pytest.raises(ValueError, match=r"no training file: set data.train"):
        load(tmp_path, path=str(tmp_path))
    write(tmp_path / "train.csv", "text,label\nx,a\ny,b\n")
    write(tmp_path / "train.tsv.gz", "text\tlabel\nx\ta\ny\tb\n")
    with pytest.raises(ValueError, match=r"holds train.csv and train.tsv.gz: set data.train"):
        load(tmp_path, path=str(tmp_path))
    found = load(tmp_path, path=str(tmp_path), train=str(tmp_path / "train.csv"))
    assert len(found["train"]) == 2


def test_unknown_label_in_dev(tmp_path):
    write(tmp_path / "train.tsv", "text\tlabel\nx\tgood\ny\tbad\n")
    dev = write(tmp_path / "dev.tsv", "text\tlabel\nx\tgood\ny\tmeh\nz\tmeh\n")
    with pytest.raises(ValueError, match=r"is not among") as caught:
        load(tmp_path, path=str(tmp_path))
    assert str(caught.value) == (
        f"{dev}, line 3: label 'meh' is not among the labels of train: bad, good."
    )


def test_splits_must_agree_on_pairs(tmp_path):
    write(tmp_path / "train.tsv", "text_a\ttext_b\tlabel\nx\ty\t0\ny\tz\t1\n")
    write(tmp_path / "dev.tsv", "text\tlabel\nx\t0\n")
    with pytest.raises(
        ValueError, match=r"dev.tsv has 1 text columns \(text\), other splits have 2"
    ):
        load(tmp_path, path=str(tmp_path))


def test_nothing_to_load(tmp_path):
    with pytest.raises(ValueError, match=r"no data: set data.path to a folder"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"data.name must be one of glue/sst2, .* Got 'sst2'"):
        load(tmp_path, name="sst2")
    with pytest.raises(ValueError, match=r"splits must be among train, dev, test. Got 'valid'"):
        load(tmp_path, splits=("valid",), name="snli")


def test_cache_that_cannot_be_written(tmp_path):
    path = str(write(tmp_path / "train.tsv", "text\tlabel\nx\ta\ny\tb\n"))
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ValueError, match=r"cannot be written .* set data.cache_dir or EJAX_CACHE"):
        load(tmp_path, train=path)


# Rows for prediction


def test_read_rows_keeps_every_column(tmp_path):
    path = write(tmp_path / "in.csv", 'id,text,note\n7,"a, b",\n8,c,"x\ny"\n')
    assert list(sources.read_rows(path)) == [
        (2, {"id": "7", "text": "a, b", "note": ""}),
        (3, {"id": "8", "text": "c", "note": "x\ny"}),
    ]
    path = write(tmp_path / "in.jsonl.gz", '{"text": "a", "n": [1]}\n\n{"text": "b", "m": null}\n')
    assert list(sources.read_rows(path)) == [
        (1, {"text": "a", "n": [1]}),
        (3, {"text": "b", "m": None}),
    ]


def test_a_txt_file_has_one_text_per_line(tmp_path):
    path = write(tmp_path / "in.txt", 'label\tx\n\n  "q" \nlast')
    texts = ["label\tx", "", '  "q" ', "last"]
    assert [row for _, row in sources.read_rows(path)] == [{"text": text} for text in texts]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one film\nid\ttext\n", [{"text": "one film"}, {"text": "id\ttext"}]),
        ("id\ttext\n3\tx\n", [{"id": "3", "text": "x"}]),
        ('{"text": "x", "id": 3}\n', [{"text": "x", "id": 3}]),
        ("id\tMessage\n3\tx\n", [{"id": "3", "Message": "x"}]),
        ("Review\nx\n", [{"text": "Review"}, {"text": "x"}]),
        ("17\n", [{"text": "17"}]),  # JSON, but no object
        ("", []),
    ],
)
def test_standard_input(monkeypatch, text, expected):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert [row for _, row in sources.read_rows("-")] == expected
    assert not sys.stdin.buffer.closed


def test_standard_input_with_a_format_or_a_column(monkeypatch):
    text = "title,body\nx,y\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert list(sources.read_rows("-", format="csv")) == [(2, {"title": "x", "body": "y"})]
    text = "title\tbody\nx\ty\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    rows = sources.read_rows("-", text_columns=("body",))
    assert list(rows) == [(2, {"title": "x", "body": "y"})]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ok\nna\xefve\n")))
    with pytest.raises(ValueError, match=r"standard input, line 2: not UTF-8 .byte 3 of the line"):
        list(sources.read_rows("-"))
    with pytest.raises(ValueError, match=r"format must be one of tsv, .* Got 'xml'"):
        list(sources.read_rows("-", format="xml"))


def test_read_rows_streams(monkeypatch):
    """The first row comes out although the second has not come in."""

    class Endless(io.RawIOBase):
        lines = 0

        def readable(self):
            return True

        def readinto(self, buffer):
            self.lines += 1
            buffer[:2] = b"x\n"
            return 2

    endless = Endless()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(endless)))
    rows = sources.read_rows("-")
    assert next(rows) == (1, {"text": "x"})
    assert endless.lines < 10


# Hashes and halves


def test_row_hash_tells_texts_apart_and_not_labels():
    rows = [("a", None), ("a", ""), ("a", "b"), ("ab", None), ("", "ab")]
    hashes = [sources.row_hash(sources.Example(*row, 0)) for row in rows]
    assert len(set(hashes)) == len(rows)
    assert hashes[0] == "df14bf1df5b1"
    assert sources.row_hash(sources.Example("a", None, 1)) == hashes[0]


@pytest.mark.parametrize("n", [2, 7, 400])
def test_split_dev(n):
    a, b = sources.split_dev(n, 5)
    assert sorted([*a, *b]) == list(range(n))
    assert len(a) - len(b) == n % 2
    assert a.dtype == b.dtype == np.int64
    for half in (a, b):
        assert (np.diff(half) > 0).all()
    for again, half in zip(sources.split_dev(n, 5), (a, b), strict=True):
        np.testing.assert_array_equal(again, half)


def test_split_dev_depends_on_the_seed():
    assert not np.array_equal(sources.split_dev(50, 0)[0], sources.split_dev(50, 1)[0])
    with pytest.raises(ValueError, match=r"dev must have at least 2 rows to be halved. Got 1"):
        sources.split_dev(1, 0)


# TFDS names: the real builders read small archives that are laid out as those they download


def zipped(files_: dict[str, str]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, text in files_.items():
            archive.writestr(name, text)
    return out.getvalue()


def tarred(files_: dict[str, str]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, text in files_.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return out.getvalue()


def stand_in(monkeypatch, cache: Path, name: str, data: bytes) -> None:
    """Puts an archive where TFDS looks for one downloaded by hand, and its checksum on record."""
    import importlib

    from tensorflow_datasets.core.download import checksums

    spec = named.TFDS[name]
    folder = cache / "data" / "downloads" / "manual"
    folder.mkdir(parents=True)
    (folder / spec.archive).write_bytes(data)
    module = importlib.import_module(f"tensorflow_datasets.{spec.module}")
    builder = getattr(module, "Builder", None) or module.Glue
    for infos in (checksums.get_all_url_infos(), builder.url_infos or {}):
        for url, info in infos.items():
            if info.filename == spec.archive:
                made = checksums.compute_url_info(folder / spec.archive)
                monkeypatch.setitem(infos, url, made)


def triples(split: sources.Split) -> collections.Counter:
    return collections.Counter((text, pair, split.labels[label]) for text, pair, label in split)


def table(header: str, rows: list[str]) -> str:
    return "\n".join([header, *rows]) + "\n"


def test_sst2(tmp_path, monkeypatch, capfd):
    train = [(f'{i} "quoted {i} ', "positive" if i % 3 else "negative") for i in range(50)]
    dev = [("crème , \u2028 brûlée", "positive"), ("dull ", "negative"), ("'s", "positive")]

    def lines(rows):
        return table("sentence\tlabel", [f"{t}\t{int(n == 'positive')}" for t, n in rows])

    data = {
        "SST-2/train.tsv": lines(train),
        "SST-2/dev.tsv": lines(dev),
        "SST-2/test.tsv": table("index\tsentence", ["0\tno label", "1\tnone"]),
        "SST-2/original/README.txt": "x",
    }
    stand_in(monkeypatch, tmp_path / "cache", "glue/sst2", zipped(data))
    found = load(tmp_path, name="glue/sst2")
    assert list(found) == ["train", "dev"]
    for name, rows in (("train", train), ("dev", dev)):
        assert found[name].labels == ("negative", "positive")
        assert triples(found[name]) == collections.Counter((t, None, n) for t, n in rows)
    left_out = "; the test split has no gold labels and is left out"
    assert found["dev"].origin == f"glue/sst2 validation{left_out}"
    again = load(tmp_path, name="glue/sst2", limit=2)
    assert [len(split) for split in again.values()] == [2, 2]
    assert capfd.readouterr() == ("", "")


def test_mnli(tmp_path, monkeypatch):
    labels = ("entailment", "neutral", "contradiction")
    data, expected = {}, {}
    for name, n in (("train", 20), ("dev_matched", 7), ("dev_mismatched", 5)):
        rows = [(f"{name} p {i} .", f'h "{i}', labels[i % 3]) for i in range(n)]
        expected[name] = collections.Counter(rows)
        lines = [f"{i}\t31193n\ttravel\t{p}\t{h}\tneutral\t{g}" for i, (p, h, g) in enumerate(rows)]
        header = "index\tpromptID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label"
        data[f"MNLI/{name}.tsv"] = table(header, lines)
    for name in ("test_matched", "test_mismatched"):
        data[f"MNLI/{name}.tsv"] = table("index\tsentence1\tsentence2", ["0\tp\th"])
    stand_in(monkeypatch, tmp_path / "cache", "glue/mnli", zipped(data))
    found = load(tmp_path, name="glue/mnli")
    assert list(found) == ["train", "dev", "test"]
    assert triples(found["train"]) == expected["train"]
    assert triples(found["dev"]) == expected["dev_matched"]
    assert triples(found["test"]) == expected["dev_mismatched"]
    assert found["train"].labels == labels
    assert found["dev"].origin == "glue/mnli validation_matched"
    assert found["test"].origin == "glue/mnli validation_mismatched"


def test_snli(tmp_path, monkeypatch):
    names = ["contradiction", "-", "entailment", "neutral", "-", "neutral"]
    rows = [(g, f"A man {i} .", f"Someone {i}") for i, g in enumerate(names)]
    header = "gold_label\tsentence1_binary_parse\tsentence1\tsentence2\tcaptionID"
    lines = [f"{g}\t( A man )\t{p}\t{h}\t{i}.jpg" for i, (g, p, h) in enumerate(rows)]
    data = {f"snli_1.0/snli_1.0_{n}.txt": table(header, lines) for n in ("train", "dev", "test")}
    data["__MACOSX/snli_1.0/._README.txt"] = "x"
    stand_in(monkeypatch, tmp_path / "cache", "snli", zipped(data))
    found = load(tmp_path, name="snli")
    gold = collections.Counter((p, h, g) for g, p, h in rows if g != "-")
    for name in sources.SPLITS:
        assert triples(found[name]) == gold
        assert found[name].labels == ("entailment", "neutral", "contradiction")
    assert found["train"].origin == "snli train, 2 rows without a gold label dropped"
    again = load(tmp_path, name="snli")  # from the cache, the same rows in the same order
    assert list(again["train"]) == list(found["train"])
    # A model whose labels have another order: rows follow its order.
    other = load(tmp_path, name="snli", labels=("contradiction", "entailment", "neutral"))
    assert triples(other["dev"]) == gold
    with pytest.raises(ValueError, match=r"snli has the label 'neutral', which is not among"):
        load(tmp_path, name="snli", labels=("contradiction", "entailment"))


def test_ag_news_subset(tmp_path, monkeypatch):
    names = ("World", "Sports", "Business", "Sci/Tech")
    rows = [(i % 4, f"Title {i}", f'Text, "of" {i}\\news') for i in range(30)]
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerows((label + 1, title, text) for label, title, text in rows)
    data = {f"ag_news_csv/{name}.csv": out.getvalue() for name in ("train", "test")}
    data["ag_news_csv/classes.txt"] = "\n".join(names)
    stand_in(monkeypatch, tmp_path / "cache", "ag_news_subset", tarred(data))
    found = load(tmp_path, name="ag_news_subset", seed=2)
    expected = collections.Counter((f"{title} {text}", None, names[i]) for i, title, text in rows)
    assert triples(found["test"]) == expected
    assert triples(found["train"]) + triples(found["dev"]) == expected
    assert len(found["dev"]) == 3
    assert found["dev"].origin == "10 % of train, seed 2"
    assert found["train"].origin == "ag_news_subset train, without dev"
    assert found["train"].labels == names


def test_imdb_reviews(tmp_path, monkeypatch):
    def text(split, label, i):
        return f"{split} {label} {i}<br /><br />é"

    data = {
        f"aclImdb/{split}/{label}/{i}_{i % 10}.txt": text(split, label, i) + "\n"
        for split, labels in (("train", ("neg", "pos", "unsup")), ("test", ("neg", "pos")))
        for label in labels
        for i in range(12)
    }
    data |= {"aclImdb/README": "x", "aclImdb/train/urls_neg.txt": "x"}
    stand_in(monkeypatch, tmp_path / "cache", "imdb_reviews", tarred(data))
    found = load(tmp_path, name="imdb_reviews", dev_fraction=0.25)

    def expected(split):
        return collections.Counter(
            (text(split, label, i), None, label) for label in ("neg", "pos") for i in range(12)
        )

    assert triples(found["test"]) == expected("test")
    assert triples(found["train"]) + triples(found["dev"]) == expected("train")
    assert len(found["dev"]) == 6
    assert found["train"].labels == ("neg", "pos")


def test_a_damaged_archive_is_refused(tmp_path, monkeypatch):
    stand_in(monkeypatch, tmp_path / "cache", "snli", zipped({"snli_1.0/x": "y"}))
    monkeypatch.undo()  # the checksum on record is that of the real archive again
    with pytest.raises(ValueError, match=r"snli could not be downloaded and prepared .*checksum"):
        load(tmp_path, name="snli")


def test_without_a_network(tmp_path, monkeypatch):
    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(ValueError, match=r"imdb_reviews could not be downloaded") as caught:
        load(tmp_path, name="imdb_reviews")
    message = str(caught.value)
    assert "\n" not in message
    manual = tmp_path / "cache" / "data" / "downloads" / "manual"
    assert message.endswith(
        f": put aclImdb_v1.tar.gz into {manual} by hand, or use local files (data.path)."
    )


def test_tensorflow_is_never_imported(tmp_path):
    path = write(tmp_path / "train.tsv", "text\tlabel\nx\ta\ny\tb\n")
    code = (
        "import sys; from ejax.config import DataConfig; from ejax.data import sources; "
        "assert 'tensorflow_datasets' not in sys.modules; "
        f"sources.load(DataConfig(train={str(path)!r}, cache_dir={str(tmp_path / 'c')!r})); "
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


# Real files


@pytest.mark.skipif(not REAL.is_dir(), reason="the development data sets are not here")
@pytest.mark.parametrize(
    ("name", "rows", "labels"),
    [
        ("trec6", (4952, 500, 500), ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")),
        ("mrpc", (3667, 408, 1725), ("0", "1")),
        ("rte", (2490, 277), ("entailment", "not_entailment")),
    ],
)
def test_real_files_to_the_last_row(tmp_path, name, rows, labels):
    found = load(tmp_path, path=str(REAL / name))
    assert tuple(len(split) for split in found.values()) == rows
    for split in found.values():
        assert split.labels == labels
        raw = gzip.decompress((REAL / name / f"{split.name}.tsv.gz").read_bytes()).decode()
        cells = [line.split("\t") for line in raw.split("\n")[1:] if line]
        expected = [(c[1], c[2] if len(c) == 3 else None, labels.index(c[0])) for c in cells]
        assert [tuple(row) for row in split] == expected


def test_formats_are_told_by_the_ending():
    assert [files.path_format(n) for n in ("a.TSV.gz", "b.c.jsonl", "x", "a.gz")] == [
        "tsv", "jsonl", "", "",
    ]  # fmt: skip
