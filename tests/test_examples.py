"""Every example runs, on the tiny model."""

import csv
import json
import re
import runpy
from pathlib import Path

import pytest
import tiny

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.slow


@pytest.fixture
def example(monkeypatch, capsys):
    """Runs an example as a script, and returns what it printed."""

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def write_csv(path: Path, count: int) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("label", "text"), *tiny.rows(count, seed=5)])
    return path


def test_train_and_predict(example, tmp_path: Path) -> None:
    fields = (f"model={tiny.model()}", "layers=1,3", *tiny.FIELDS)
    said = example("train_and_predict.py", tiny.data(), tmp_path / "run", *fields).splitlines()
    assert re.fullmatch(r"good \(\d\.\d\d\), exit [13]: a film that is great", said[0])
    assert said[1].startswith("bad (")
    assert said[-1] == "threshold 2.0: exits after layers [3, 3]"


def test_thresholds_with_a_guarantee(example, tmp_path: Path) -> None:
    enough, few = (write_csv(tmp_path / f"{count}.csv", count) for count in (120, 20))
    said = example("thresholds_with_guarantee.py", tiny.trained()[0], enough)
    assert float(re.search(r"layers run: (\d\.\d\d) of 3", said)[1]) < 3
    assert "show nothing" not in said
    said = example("thresholds_with_guarantee.py", tiny.trained()[0], few, 0.01)
    assert "20 rows show nothing for this risk: it takes " in said
    assert "layers run: 3.00 of 3" in said


def test_flax_training_loop(example, tmp_path: Path) -> None:
    said = example("flax_training_loop.py", write_csv(tmp_path / "rows.csv", 160), tiny.model(), 30)
    losses = [float(loss) for loss in re.findall(r"loss (\d\.\d+)", said)]
    assert len(losses) == 30
    assert losses[-1] < losses[0] / 2
    assert float(re.search(r"accuracy (\d\.\d+)", said)[1]) > 0.8


def test_the_notebook(tmp_path: Path, monkeypatch, capsys) -> None:
    rows = [json.dumps({"label": label, "text": text}) for label, text in tiny.rows(30, seed=6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    monkeypatch.setenv("EJAX_BUNDLE", str(tiny.trained()[0]))
    monkeypatch.setenv("EJAX_ROWS", str(tmp_path / "rows.jsonl"))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names: dict = {}
    notebook = json.loads((EXAMPLES / "thresholds.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert "threshold 2.0: 3.00 layers" in capsys.readouterr().out
    assert min(names["depth"]) < 3
