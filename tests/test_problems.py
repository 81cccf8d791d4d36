"""Several labels per text, numbers, and what in one label per text tells that they were meant."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest

from ejax.config import DataConfig
from ejax.data import sources
from ejax.data.rows import encode, label_array
from ejax.data.sources import Example

REAL = Path(__file__).parents[2] / "shared" / "data"
SEVERAL, NUMBERS = "multi_label_classification", "regression"


def load(tmp_path: Path, text: str, name: str, problem: str, **fields: object) -> sources.Split:
    (tmp_path / name).write_text(text)
    path = str(tmp_path / name)
    config = DataConfig(
        cache_dir=str(tmp_path / "cache"), train=path, dev=path, problem_type=problem, **fields
    )
    return sources.load(config, splits=("train",))["train"]


def refused(tmp_path: Path, text: str, name: str, problem: str, **fields: object) -> str:
    with pytest.raises(ValueError, match=name) as caught:
        load(tmp_path, text, name, problem, **fields)
    return str(caught.value).removeprefix(str(tmp_path / name))


LISTS = [["joy", "fear"], [], ["anger"]]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.tsv", "labels\ttext\njoy|fear\tx\n\ty\nanger\tz\n"),
        ("a.csv", "text,labels\nx,joy | fear\ny,\nz,anger\n"),
        (
            "a.jsonl",
            "".join(
                json.dumps({"text": t, "labels": names}) + "\n"
                for t, names in zip("xyz", LISTS, strict=True)
            ),
        ),
        ("flags.csv", "id,text,anger,fear,joy\n7,x,0,1,1\n8,y,0,0,0\n9,z,1,0,0\n"),
        ("float.csv", "id,opinion,anger,fear,joy\n7,x,0.0,1.0,1.0\n8,y,0.0,0.0,0.0\n9,z,1,0,0\n"),
    ],
)
def test_several_labels_in_each_format(tmp_path, name, text):
    split = load(tmp_path, text, name, SEVERAL)
    assert split.problem_type == SEVERAL
    assert split.labels == ("anger", "fear", "joy")
    assert list(split) == [("x", None, (1, 2)), ("y", None, ()), ("z", None, (0,))]


def test_columns_of_flags_by_name_keep_their_order_and_those_without_a_row(tmp_path):
    text = "text,toxic,rude,n\nx,1,0,5\ny,1,0,6\n"
    split = load(tmp_path, text, "a.csv", SEVERAL, label_column="toxic,rude")
    assert split.labels == ("toxic", "rude")
    assert [row.label for row in split] == [(0,), (0,)]
    (tmp_path / "mine.csv").write_text("text,rude,toxic\nz,1,0\n")
    config = DataConfig(test=str(tmp_path / "mine.csv"), problem_type=SEVERAL)
    found = sources.load(
        config, splits=("test",), labels=split.labels, preferred_label=split.label_column
    )
    assert found["test"][0].label == (1,)  # columns as in training, without naming them


def test_integers_name_labels_too(tmp_path):
    text = "".join(f'{{"text": "t", "label": {label}}}\n' for label in ([10, 2], [2], []))
    split = load(tmp_path, text, "a.jsonl", SEVERAL)
    assert (split.labels, split[0].label) == (("2", "10"), (0, 1))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.tsv", "label\ttext\na\tx\na|a\ty\n", ", line 3: the label names 'a' twice"),
        ("a.tsv", "label\ttext\na||b\tx\n", ", line 2: the label is missing"),
        ("a.csv", "label,text\n\"['a', 'b']\",x\n", ", line 2: the label is a list in a cell: "),
        ("a.tsv", "label\ttext\n2,5\tx\n2\ty\n5\tz\n2,7\tz\n", "joined by ',': join them by |."),
        ("a.csv", "text,a,b\nx,0,1\ny,2,0\n", ", line 3: column 'a' must hold 0 or 1"),
        ("a.jsonl", '{"text": "x", "label": null}\n', ", line 1: the label is missing"),
        ("a.tsv", "label\ttext\n\tx\n", " has no row with a label."),
        ("a.jsonl", '{"text": "x", "label": ["a|b", "a"]}\n', ": label 'a|b' must not hold |"),
    ],
)
def test_several_labels_that_cannot_be_read(tmp_path, name, text, expected):
    assert expected in refused(tmp_path, text, name, SEVERAL)


def test_numbers(tmp_path):
    split = load(tmp_path, "score\ttext\n2.50\tx\n-1\ty\n1e1\tz\n", "a.tsv", NUMBERS)
    assert (split.problem_type, split.labels) == (NUMBERS, ("score",))
    assert [row.label for row in split] == [2.5, -1.0, 10.0]
    text = '{"text": "x", "label": 0.25}\n{"text": "y", "label": 3}\n'
    assert [row.label for row in load(tmp_path, text, "a.jsonl", NUMBERS)] == [0.25, 3.0]


@pytest.mark.parametrize("label", ["good", "", "nan", "inf", "3,5", "0x1"])
def test_what_is_no_number(tmp_path, label):
    sentence = refused(tmp_path, f"label\ttext\n1\tx\n{label}\ty\n", "a.tsv", NUMBERS)
    assert sentence == f", line 3: the label must be a finite number, such as 3.5. Got {label!r}."


def test_numbers_that_float32_cannot_square_are_refused(tmp_path):
    sentence = refused(tmp_path, "label\ttext\n1\tx\n1e300\ty\n", "a.tsv", NUMBERS)
    assert sentence == ", line 3: the label must be a number up to 1e+15. Got '1e300'."


def test_one_number_is_none_to_learn(tmp_path):
    assert "only the number 3" in refused(tmp_path, "label\ttext\n3\tx\n3\ty\n", "a.tsv", NUMBERS)


def test_one_label_each_tells_what_else_was_meant(tmp_path):
    single = "single_label_classification"
    sentence = refused(tmp_path, "label\ttext\na|b\tx\na\ty\nb\tz\n", "a.tsv", single)
    assert "joined by '|'" in sentence
    assert "problem_type=multi_label_classification (--problem-type)" in sentence
    # A bar in a name is none where nothing else looks so.
    assert load(tmp_path, "label\ttext\nyes|no\tx\na\ty\nb\tz\n", "b.tsv", single).labels == (
        "a", "b", "yes|no",
    )  # fmt: skip
    # Whole numbers with a point are classes: pandas writes 0.0 where a column had a hole.
    assert load(tmp_path, "label\ttext\n1.0\tx\n0.0\ty\n", "c.tsv", single).labels == ("0", "1")


def test_arrays_of_labels():
    def rows(*labels: object) -> list[Example]:
        return [Example("t", None, label) for label in labels]

    several = label_array(rows((0, 2), (), (-1,)), SEVERAL, 3)
    assert several.dtype == np.float32
    assert several.tolist() == [[1, 0, 1], [0, 0, 0], [-1, -1, -1]]
    numbers = label_array(rows(0.5, math.nan), NUMBERS, 1)
    assert (numbers.dtype, numbers[0], math.isnan(numbers[1])) == (np.float32, 0.5, True)
    assert label_array(rows(1, -1), "single_label_classification", 2).dtype == np.int32


def test_rows_with_a_label_and_their_fingerprint(tmp_path):
    split = load(tmp_path, "label\ttext\na|b\tx\n\ty\n", "a.tsv", SEVERAL)
    unlabelled = [*split, Example("z", None, (-1,))]
    rows = encode(unlabelled, FakeEncoded, split)
    assert rows.labelled.tolist() == [0, 1]
    assert len(rows.teaching().hashes) == 2
    other = load(tmp_path, "label\ttext\na\tx\na|b\ty\n", "b.tsv", SEVERAL)
    assert encode(other, FakeEncoded).fingerprint() != encode(split, FakeEncoded).fingerprint()
    numbers = load(tmp_path, "label\ttext\n1\tx\n2\ty\n", "c.tsv", NUMBERS)
    assert encode([*numbers, Example("z", None, math.nan)], FakeEncoded, numbers).labelled.size == 2


class FakeEncoded(list):
    """Texts as they are, in place of their tokens."""

    def subset(self, rows: np.ndarray) -> "FakeEncoded":
        return FakeEncoded(self[row] for row in rows)


@pytest.mark.skipif(not REAL.is_dir(), reason="the development data sets are not here")
@pytest.mark.filterwarnings("ignore:.*the text looks quoted")  # as those of goemotions are
def test_real_files_of_several_labels_and_of_numbers(tmp_path):
    def dev(name: str, problem: str) -> sources.Split:
        path = str(REAL / name / "dev.tsv.gz")
        config = DataConfig(cache_dir=str(tmp_path), train=path, dev=path, problem_type=problem)
        return sources.load(config)["dev"]

    def cells(name: str) -> list[str]:
        raw = gzip.decompress((REAL / name / "dev.tsv.gz").read_bytes()).decode()
        return [line.split("\t")[0] for line in raw.split("\n")[1:] if line]

    split = dev("goemotions", SEVERAL)
    named = ["|".join(split.labels[i] for i in row.label) for row in split]
    assert len(split.labels) == 28
    assert [sorted(name.split("|")) for name in named] == [
        sorted(cell.split("|")) for cell in cells("goemotions")
    ]
    for name in ("stsb", "sst5"):
        assert [row.label for row in dev(name, NUMBERS)] == [float(cell) for cell in cells(name)]
    with pytest.raises(ValueError, match=r"goemotions.* set problem_type=multi_label"):
        dev("goemotions", "single_label_classification")
