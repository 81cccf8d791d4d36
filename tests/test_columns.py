"""Columns are found by their usual names, by one rule, and never guessed between two."""

import json
from pathlib import Path

import pytest

from ejax.config import DataConfig
from ejax.data import sources
from ejax.data.columns import find_column, find_label_column, find_text_columns
from ejax.data.files import read_rows


def load(tmp_path: Path, **fields: object) -> dict[str, sources.Split]:
    return sources.load(DataConfig(cache_dir=str(tmp_path / "cache"), **fields))


def test_a_name_is_exact_or_the_only_one_but_for_case_and_spaces():
    assert find_column((" Label", "label"), "label") == "label"
    assert find_column(("text", " LABEL "), "label") == " LABEL "
    assert find_column(("Label", "LABEL"), "label") == ""  # which of the two?
    assert find_column(("label",), "Label") == "label"  # as someone may type it
    assert find_column(("labels",), "label") == ""


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (("text", "labels"), "labels"),
        (("text", "category"), "category"),
        (("text", "class"), "class"),
        (("text", "intent"), "intent"),
        (("text", "target"), "target"),
        (("text", "gold_label"), "gold_label"),
        (("text", " Label"), " Label"),
        (("Category", "text"), "Category"),
        (("class", "label", "text"), "label"),
        (("label", "Label", "text"), "label"),
    ],
)
def test_label_columns_are_recognised(columns, expected):
    assert find_label_column(columns) == expected


@pytest.mark.parametrize("columns", [("category", "class", "text"), ("Label", "intent", "text")])
def test_two_label_columns_are_not_guessed_between(columns):
    with pytest.raises(ValueError, match="which column holds the label") as caught:
        find_label_column(columns, path="in.csv")
    assert str(caught.value) == (
        f"in.csv: which column holds the label, {columns[0]} or {columns[1]}? "
        f"Name it with label_column (--label-column)."
    )
    assert find_label_column(columns, columns[1].upper()) == columns[1]
    assert find_label_column(columns, preferred=columns[1]) == columns[1]  # as in training


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ((" Text ", "label", "title"), (" Text ",)),
        (("Premise", "Hypothesis", "review", "label"), ("Premise", "Hypothesis")),
        (("sentence", "review", "label"), ("sentence",)),
        (("user", "Tweet", "date", "target"), ("Tweet",)),
        (("id", "query", "intent"), ("query",)),
        (("text", "comment", "class"), ("text",)),
        (("opinion", "class", "category", "label"), ("opinion",)),  # no label is a text
        (("Unnamed: 0", "opinion", "label"), ("opinion",)),
    ],
)
def test_text_columns_are_recognised(columns, expected):
    assert find_text_columns(columns) == expected


@pytest.mark.parametrize(
    "columns",
    [
        ("review", "comment", "label"),
        ("title", "body", "label"),  # the text, or half of it?
        ("title", "article", "label"),
        ("Text", "TEXT", "label"),
    ],
)
def test_two_texts_are_not_guessed_between(columns):
    with pytest.raises(ValueError, match="which column holds the text"):
        find_text_columns(columns)


def test_training_on_usual_names(tmp_path):
    """dev has both columns, and is read as train was."""
    (tmp_path / "train.csv").write_text("Category,Message\nham,hello\nspam,win\n")
    (tmp_path / "dev.csv").write_text("label,Category,text,Message\nx,spam,y,buy\n")
    found = load(tmp_path, path=str(tmp_path))
    assert [(row.text, row.label) for row in found["train"]] == [("hello", 0), ("win", 1)]
    assert [(row.text, row.label) for row in found["dev"]] == [("buy", 1)]
    assert (found["train"].label_column, found["train"].text_columns) == ("Category", ("Message",))
    named = {"text_columns": ("CATEGORY",), "label_column": "message"}
    turned = load(tmp_path, train=str(tmp_path / "train.csv"), **named)["train"]
    assert (turned.label_column, turned.text_columns) == ("Message", ("Category",))
    with pytest.raises(ValueError, match=r"train.csv has no column 'stars' for the label. Its col"):
        load(tmp_path, path=str(tmp_path), label_column="stars")


def test_a_label_that_changes_its_column_is_refused(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [{"text": "a", "class": "x"}, {"text": "b", "class": "y", "label": "z"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="line 2: the label is in label, and was read from class"):
        load(tmp_path, train=str(path))
    assert load(tmp_path, train=str(path), dev=str(path), label_column="class")


def test_a_file_without_a_header_is_told_so(tmp_path):
    hint = "If its first line is a row, put a header above it, such as label and text."
    for name, text in (("a.csv", "1,A title,A story\n2,T,B\n"), ("b.tsv", "a film\t0\nb\t1\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name}: which column .* {hint}"):
            load(tmp_path, train=str(tmp_path / name))


def test_a_class_called_as_a_column_makes_no_header(tmp_path):
    """`label<TAB>text`, where "query" is a class; a header has a label and a text."""
    path = tmp_path / "in.tsv"
    path.write_text("query\thow late is it\nquery\twhere am I\norder\tsome tea\n")
    assert next(read_rows(path)) == (1, {"label": "query", "text": "how late is it"})
    path.write_text("class\tmessage\nclass\twhere am I\nother\tsome tea\n")
    assert next(read_rows(path)) == (2, {"class": "class", "message": "where am I"})


def test_unnamed_columns_are_called_as_pandas_does(tmp_path):
    path = tmp_path / "spam.csv"
    path.write_text("v1,v2,,\nham,hello,,\nspam,win,,x\n")
    assert list(read_rows(path))[1][1] == {
        "v1": "spam", "v2": "win", "Unnamed: 2": "", "Unnamed: 3": "x",
    }  # fmt: skip
    found = load(tmp_path, train=str(path), text_columns=("v2",), label_column="v1")
    assert found["train"].labels == ("ham", "spam")


def test_a_second_header_is_no_row(tmp_path):
    """Files that were joined by `cat`."""
    path = tmp_path / "both.csv"
    path.write_text("label,text\na,x\nlabel,text\nb,y\n")
    with pytest.raises(ValueError, match=r"both.csv, line 3: the header stands here again: delete"):
        load(tmp_path, train=str(path))
    skipped: list[str] = []
    assert [row["text"] for _, row in read_rows(path, skip=skipped.append)] == ["x", "y"]
    assert len(skipped) == 1
