"""Inputs that people have: parquet, JSON lists, rows of Python, and tables that are not tidy."""

import dataclasses
import datetime
import gzip
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from ejax.assets import LFS_POINTER
from ejax.bundle import load_bundle
from ejax.config import DataConfig, TrainConfig
from ejax.data import files, sources
from ejax.data.files import read_rows
from ejax.data.frames import as_rows, as_splits
from ejax.evaluation.labelled import labelled_rows
from ejax.predict import writing
from ejax.training.finetune import finetune

ROWS = [{"text": "a fine film", "label": "good"}, {"text": "dull", "label": "bad"}] * 3
CLASSES = {"info": {"features": {"label": {"names": ["bad", "good"], "_type": "ClassLabel"}}}}


def load(tmp_path: Path, **fields: Any) -> dict[str, sources.Split]:
    return sources.load(DataConfig(cache_dir=str(tmp_path / "cache"), **fields))


def train(tmp_path: Path, name: str, content: str | bytes, **fields: Any) -> sources.Split:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load(tmp_path, train=str(path), dev=str(path), **fields)["train"]


def refused(tmp_path: Path, name: str, content: str | bytes, **fields: Any) -> str:
    with pytest.raises(ValueError, match=name) as caught:
        train(tmp_path, name, content, **fields)
    return str(caught.value).removeprefix(str(tmp_path / name))


def warned(tmp_path: Path, name: str, content: str) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        train(tmp_path, name, content)
    return [str(one.message).removeprefix(str(tmp_path / name)) for one in seen]


def table(name: str, *labels: str) -> str:
    """A tsv or csv of these labels, with texts of their own."""
    between = "\t" if name.endswith("tsv") else ","
    rows = [("label", "text"), *((label, f"text {i}") for i, label in enumerate(labels))]
    return "".join(between.join(row) + "\n" for row in rows)


# Parquet and JSON


def test_parquet_is_read_as_the_same_rows_of_a_csv(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "train.parquet")
    (tmp_path / "train.json").write_text(json.dumps(ROWS))
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "lines.json.gz").write_bytes(gzip.compress(json.dumps(ROWS, indent=1).encode()))
    expected = train(tmp_path, "a.csv", "text,label\n" + "a fine film,good\ndull,bad\n" * 3)
    for name in ("train.parquet", "train.json", "lines.json", "lines.json.gz"):
        path = str(tmp_path / name)
        found = load(tmp_path, train=path, dev=path)["train"]
        assert (list(found), found.labels) == (list(expected), expected.labels)
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "train.parquet").rename(folder / "train.parquet")
    assert len(load(tmp_path, path=str(folder))["train"]) == 5  # and one for dev


def test_a_class_label_of_hugging_face_is_read_by_name(tmp_path):
    metadata = {b"huggingface": json.dumps(CLASSES).encode()}
    rows = [{"text": row["text"], "label": int(row["label"] == "good")} for row in ROWS]
    given = pa.Table.from_pylist(rows).replace_schema_metadata(metadata)
    pq.write_table(given, tmp_path / "train.parquet")
    path = str(tmp_path / "train.parquet")
    split = load(tmp_path, train=path, dev=path)["train"]
    assert (split.labels, split[0].label) == (("bad", "good"), 1)


def test_predict_keeps_the_columns_and_types_of_a_parquet(tmp_path):
    day = datetime.date(2026, 11, 30)
    rows = [
        {"id": 7, "text": "great film", "day": day, "label": None},
        {"id": 8, "text": "awful film", "day": None, "label": None},
    ]
    schema = pa.schema(
        [("id", pa.int16()), ("text", pa.string()), ("day", pa.date32()), ("label", pa.string())]
    )
    source, output = tmp_path / "in.parquet", tmp_path / "out.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema), source)
    bundle = tiny.trained()[0]
    done = tiny.ejax("predict", bundle, "--input", source, "--output", output, "--top-k", "all")
    assert done.code == 0, done.err
    written = pq.read_table(output)
    assert written.schema.names == [
        "id", "text", "day", "label", "predicted_label", "score", "exit_layer", "top_k",
    ]  # fmt: skip
    assert written.schema.field("id").type == pa.int16()
    assert written.column("day").to_pylist() == [day, None]
    assert written.column("predicted_label").to_pylist() == ["good", "bad"]
    assert len(written.column("top_k")[0].as_py()) == 2
    done = tiny.ejax("predict", bundle, "--input", source)  # to standard output
    assert [json.loads(line)["day"] for line in done.out.splitlines()] == ["2026-11-30", None]
    pq.write_table(schema.empty_table(), source)
    assert tiny.ejax("predict", bundle, "--input", source, "--output", output).code == 0
    assert pq.read_table(output).num_rows == 0
    mixed = tmp_path / "in.jsonl"
    mixed.write_text('{"text": "a", "n": 1}\n{"text": "b", "n": "one"}\n')
    sentence = tiny.refused("predict", bundle, "--input", mixed, "--output", output)
    assert f"{mixed}: a column has values of several types" in sentence
    assert pq.read_table(output).num_rows == 0  # the old one


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.parquet", b"PAR1", " cannot be read as parquet: "),
        ("t.parquet", LFS_POINTER + b"v1\n", " is a Git LFS pointer, not the file itself"),
        ("t.csv", LFS_POINTER + b"v1\noid\n", " is a Git LFS pointer, not the file itself"),
        ("t.json", '[{"text": "a", "label": 1}, 3]', ", row 2: expected an object"),
        ("t.json", '[{"text": "a"},\n {"text" 3}]', ", line 2: not JSON: Expecting ':'"),
        ("t.json", '{\n "text": "a"\n}\n', ", line 1: not JSON"),
        ("t.csv", table("csv", "a", "b").encode("utf-16"), " is UTF-16: save the file as UTF-8."),
        ("t.csv", table("csv", "a", "b").encode("utf-16-be"), ", line 1: holds a zero byte, so it"),
        ("t.tsv", table("tsv", "a", "b", "a\0"), ", line 4: holds a zero byte, so it is"),
        ("t.tsv", table("tsv", "a", "b").replace("\n", "\r"), ": its lines end with a carriage"),
        ("t.csv", table("csv", "a", "b").replace("\n", "\r"), ": its lines end with a carriage"),
    ],
)  # fmt: skip
def test_what_is_no_table(tmp_path, name, content, expected):
    assert refused(tmp_path, name, content).startswith(expected)


def test_lines_and_quotes_without_an_end_have_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST", 1 << 20)
    for name, body in (("t.tsv", table("tsv", "a")), ("t.jsonl", json.dumps(ROWS[0]) + "\n")):
        assert "longer than 1 MiB" in refused(tmp_path, name, body + "x" * (1 << 21))
    sentence = refused(
        tmp_path, "t.csv", table("csv", "a", "b") + 'a,"open\n' + "text 3\n" * (1 << 18)
    )
    assert sentence.startswith(", line 4: not csv (field larger than field limit (1048576)).")


def test_a_link_to_itself_is_told(tmp_path):
    (tmp_path / "loop.tsv").symlink_to(tmp_path / "loop.tsv")
    with pytest.raises(ValueError, match=r"is a link to .* which leads nowhere"):
        load(tmp_path, train=str(tmp_path / "loop.tsv"))


# Rows of Python


class Frame:
    """Like pandas' DataFrame, where it is read."""

    columns = ("text", "label")

    def to_dict(self, orient: str) -> list[dict[str, Any]]:
        assert orient == "records"
        return ROWS


class Dataset(list):
    """Like the one of Hugging Face's datasets, where it is read."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        super().__init__(rows)
        self.features = {"text": SimpleNamespace(), "label": SimpleNamespace(names=["x", "y"])}


def test_rows_of_python_are_those_of_a_file(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    of_file = load(tmp_path, train=str(tmp_path / "a.jsonl"))
    for given in (ROWS, Frame(), tuple(ROWS)):
        found = sources.load(DataConfig(cache_dir=str(tmp_path)), given=as_splits(given))
        for name, split in of_file.items():
            assert list(map(sources.row_hash, found[name])) == list(map(sources.row_hash, split))
            assert list(found[name]) == list(split)


def test_a_dataset_has_names_and_a_dict_splits(tmp_path):
    rows = Dataset([{"text": "a", "label": 1}, {"text": "b", "label": 0}])
    assert [row["label"] for row in as_rows(rows).rows] == ["y", "x"]
    splits = as_splits({"train": rows, "validation": rows}, test=ROWS[:2])
    assert sorted(splits) == ["dev", "test", "train"]
    with pytest.raises(ValueError, match="line 1: label 'good' is not among the labels of train"):
        sources.load(DataConfig(cache_dir=str(tmp_path)), given=splits)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"train": "text"}, "the rows of train must be a list of dicts or a table. Got a str."),
        ({"train": 3}, "the rows of train must be a list of dicts, a DataFrame or a Dataset."),
        ({"train": [ROWS[0], "x"]}, "the rows of train, line 2: expected a dict such as"),
        ({"train": {"text": ["a"]}}, "by train, dev \\(or validation\\) and test"),
        ({"train": {"dev": ROWS}, "dev": ROWS}, "each given once"),
        ({"dev": ROWS}, "no rows of train were given"),
        ({"train": []}, "the rows of train has no rows"),
        ({"train": [{"text": "a", "label": None}]}, "line 1: the label is missing"),
        ({"train": [{"text": float("nan"), "label": "a"}]}, "column 'text' must hold text"),
    ],
)
def test_what_are_no_rows(tmp_path, given, expected):
    with pytest.raises(ValueError, match=expected):
        sources.load(DataConfig(cache_dir=str(tmp_path)), given=as_splits(**given))


def test_rows_or_files_but_not_both(tmp_path):
    with pytest.raises(ValueError, match="data must name no files and no set"):
        sources.load(DataConfig(name="snli"), given=as_splits(ROWS))


def test_labelled_rows_of_python(tmp_path):
    bundle = load_bundle(tiny.trained()[0])
    assert [row.label for row in labelled_rows(bundle, ROWS)] == [1, 0] * 3
    assert labelled_rows(bundle, {"test": ROWS[:2]})[0].text == "a fine film"
    with pytest.raises(ValueError, match="the rows, line 1: label 'meh' is not among"):
        labelled_rows(bundle, [{"text": "x", "label": "meh"}])


# Tables that are not tidy


@pytest.mark.parametrize("mark", ["nan", "NaN", "<NA>", "null", "#N/A"])
def test_marks_of_programs_for_no_label_are_refused(tmp_path, mark):
    sentence = refused(tmp_path, "t.tsv", table("tsv", "a", "b", mark, mark))
    assert sentence.startswith(f", line 4: label {mark!r} (2 rows) marks a row without a label: ")


@pytest.mark.parametrize("mark", ["-", "?", "NA", "None", "n/a"])
def test_marks_that_may_be_classes_are_warned_of(tmp_path, mark):
    said = warned(tmp_path, "t.tsv", table("tsv", "a", "b", mark))
    assert said == [
        f", line 4: label {mark!r} (1 rows) marks rows without one in some data: here it is a "
        f"class. Leave such rows out."
    ]
    (tmp_path / "dev.tsv").write_text(table("tsv", "a", mark))
    (tmp_path / "train.tsv").write_text(table("tsv", "a", "b"))
    with pytest.raises(ValueError, match="If it marks a row without a label, leave the row out"):
        load(tmp_path, path=str(tmp_path))


def test_a_header_that_stands_in_the_file_again(tmp_path):
    again = ": the header stands here again: delete it."
    text = "id,label,text\n1,a,x\nID, label,text\n2,b,y\n"
    assert refused(tmp_path, "t.csv", text) == f", line 3{again}"
    rows = [*ROWS, {"text": "text", "label": "label"}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    assert refused(tmp_path, "t.jsonl", text) == f", line 7{again}"


def test_invisible_characters_around_names_are_left_out(tmp_path):
    text = "\ufeff\ufeff text\u200b,\u00a0label \nx,a\ny,b\n"
    split = train(tmp_path, "t.csv", text)
    assert (split.text_columns, split.label_column) == (("text",), "label")


@pytest.mark.parametrize("name", ["t.tsv", "t.csv", "t.jsonl"])
def test_two_carriage_returns_end_a_line(tmp_path, name):
    text = table(name, "a", "b")
    if name == "t.jsonl":
        text = "".join(json.dumps(row) + "\n" for row in ROWS)
    split = train(tmp_path, name, text.replace("\n", "\r\r\n"))
    assert not any("\r" in row.text for row in split)
    assert len(split) == len(train(tmp_path, f"plain.{name}", text))


def test_twins_among_labels_are_warned_of_by_name(tmp_path):
    said = warned(tmp_path, "t.tsv", table("tsv", "Bad", "good", "bad", "so so", "soso"))
    assert len(said) == 2
    assert ": labels 'Bad' (line 2) and 'bad' (line 4) differ only in case" in said[0]
    said = warned(tmp_path, "t.tsv", table("tsv", "caf\u00e9", "tea", "cafe\u0301"))
    assert "labels 'caf\\xe9' (line 2) and 'cafe\\u0301' (line 4) differ only" in said[0]


def test_a_tsv_that_pandas_wrote(tmp_path):
    rows = ["a\tplain", 'b\t"he said ""yes"""', 'a\t"""no"""']
    text = "label\ttext\n" + "\n".join(rows) + "\n"
    for _ in range(2):  # from the copy as well
        said = warned(tmp_path, "t.tsv", text)[0]
        assert said.startswith(", line 3: the text looks quoted, as pandas writes it")
    # A quote elsewhere shows that quotes are text.
    assert not warned(tmp_path, "t.tsv", text + 'a\tsay "hi" now\n')
    broken = 'label\ttext\nb\tfine\na\t"first\nsecond"\n'
    assert "The quote that opens in line 3 seems to hold a line break" in refused(
        tmp_path, "t.tsv", broken
    )


def test_one_column_whose_first_line_may_be_a_text(tmp_path):
    source, output = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("great\nawful\n")
    ask = ("predict", tiny.trained()[0], "--input", source, "--output", output)
    assert "'great', its first line, may be a text or the name of its one column" in tiny.refused(
        *ask
    )
    assert tiny.ejax(*ask, "--text-column", "great").code == 0
    source.write_text("Review\nawful\n")
    assert tiny.ejax(*ask).code == 0
    assert [row["Review"] for _, row in read_rows(output)] == ["awful"]


def test_a_damaged_copy_is_written_anew(tmp_path):
    text = table("tsv", "a", "b", "a")
    expected = list(train(tmp_path, "t.tsv", text))
    copies = [p for p in (tmp_path / "cache" / "data" / "local_text").rglob("*") if p.is_file()]
    assert len(copies) > 3
    for copy in copies:
        for damaged in (b"", copy.read_bytes()[:-9] + b"\0" * 9):
            copy.write_bytes(damaged)
            assert list(train(tmp_path, "t.tsv", text)) == expected
        copy.unlink()
        assert list(train(tmp_path, "t.tsv", text)) == expected


def test_an_output_keeps_its_mode(tmp_path):
    path = tmp_path / "out.tsv"
    path.write_text("old")
    path.chmod(0o640)
    with writing(str(path)) as file:
        file.write(b"new")
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("new", 0o640)


@pytest.mark.slow
def test_a_training_on_rows_of_python_is_that_on_files(tmp_path):
    """To the same weights, and the ledger knows the same rows."""
    config = TrainConfig(
        model=str(tiny.model()), layers=(1, 3), epochs=1, batch_size=16, dtype="float32",
        distillation=0.0, data=DataConfig(max_length=16, buckets=(16,)),
    )  # fmt: skip
    paths = {name: str(tiny.file(name)) for name in ("train", "dev", "test")}
    rows = {name: [row for _, row in read_rows(path)] for name, path in paths.items()}
    of_files = dataclasses.replace(config, data=dataclasses.replace(config.data, **paths))
    made = [finetune(of_files, tmp_path / "a"), finetune(config, tmp_path / "b", **rows)]
    first, second = ((folder / "model.safetensors").read_bytes() for folder in made)
    assert first == second
    trained = {sources.row_hash(sources.Example(row["text"], None, 0)) for row in rows["train"]}
    for folder in made:
        assert load_bundle(folder).ledger.among(trained, ["train"]) == trained
