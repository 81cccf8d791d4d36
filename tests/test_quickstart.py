"""The parts of the main job that need no network; the whole of it runs in `.ci/run`."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny

from ejax.evaluation.quickstart import check_exits, quickstart, read_articles, write_splits
from ejax.tasks import Task


def test_articles_are_read_once_each_with_their_class(tmp_path: Path) -> None:
    for name, raw in {
        "sport/1.txt": b"A  goal\n\nfor nothing.\n",
        "sport/2.txt": b"A goal for nothing.",
        "tech/1.txt": "costs £5".encode("latin-1"),
        "tech/2.txt": "costs €5".encode(),
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(raw)
    rows = read_articles(tmp_path)
    assert [(row["text"], row["label"]) for row in rows] == [
        ("A goal for nothing.", "sport"),
        ("costs £5", "tech"),
        ("costs €5", "tech"),
    ]


def test_the_split_is_fixed_and_loses_no_row(tmp_path: Path) -> None:
    rows = [{"text": str(i), "label": "ab"[i % 2]} for i in range(25)]
    write_splits(rows, tmp_path)
    parts = [
        (tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("train", "dev", "test")
    ]
    assert [len(part) for part in parts] == [15, 5, 5]
    texts = [json.loads(line)["text"] for part in parts for line in part]
    assert sorted(texts, key=int) == [row["text"] for row in rows]
    assert texts != sorted(texts, key=int)


def test_an_exit_at_chance_fails_loudly() -> None:
    labels = np.array([0, 1, 1, 0])
    check_exits({"layers": [1, 3], "exit_accuracy": [0.75, 1.0]}, labels, Task(2))
    with pytest.raises(ValueError, match=r"for every text \(0.500\). Got layer 1: 0.500:"):
        check_exits({"layers": [1, 3], "exit_accuracy": [0.5, 0.75]}, labels, Task(2))


def test_the_whole_of_it_on_own_data_and_model(tmp_path: Path, capsys, monkeypatch) -> None:
    def written_before(*args) -> None:
        assert (tmp_path / "evaluation.json").exists()
        assert "full depth" in capsys.readouterr().out
        raise ValueError("an exit is no better than chance")

    data = shutil.copytree(tiny.data(), tmp_path / "texts")
    with (data / "test.tsv").open("a") as file:  # rows of train prove nothing
        file.writelines((data / "train.tsv").read_text().splitlines(keepends=True)[1:6])
    result = quickstart(tmp_path, model=str(tiny.model()), data=str(data), fields=tiny.FIELDS)
    shown = capsys.readouterr().out
    assert "who leaves early" in shown
    assert "full depth" in shown
    for name in ("evaluation.json", "evaluation.png", "bundle/exits.json"):
        assert (tmp_path / name).stat().st_size > 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["rows"] == 30
    # A newcomer's table: six columns, and a linear model for comparison.
    head = next(line for line in shown.splitlines() if "threshold" in line)
    assert head.count("┃") - 1 == 6
    rows = [line for line in shown.splitlines() if line.startswith("│")]
    names = [row.split("│")[1].strip() for row in rows]
    expected = ["full depth", "0.7", "0.8", "0.9", "0.95", "0.99", "default", "TF-IDF, linear"]
    assert names[:9] == [*expected, "frozen encoder, linear"]
    linear = {one["name"]: one for one in result["rivals"]}
    assert linear["TF-IDF, linear"]["fitted_rows"] == 96
    assert f"{linear['TF-IDF, linear']['accuracy']:.3f}" in rows[7]
    assert result["enough"].split(":")[0] in " ".join(shown.split())
    # What was measured is kept and shown where an exit learned nothing. The training is there.
    (tmp_path / "evaluation.json").unlink()
    monkeypatch.setattr("ejax.evaluation.quickstart.check_exits", written_before)
    with pytest.raises(ValueError, match="no better than chance"):
        quickstart(tmp_path, model=str(tiny.model()), data=str(data), fields=tiny.FIELDS)
    *_, default = result["thresholds"]
    assert default["threshold"] == result["default"]
    assert all(0.5 < share <= 1 for share in result["exit_accuracy"])
