"""The table of data sets on a tiny model: what a cell holds, that it is run once."""

import json
import shutil

import numpy as np
import pytest
import tiny

from ejax.cli.run import run
from ejax.config import DataConfig
from ejax.data import sources
from ejax.data.rows import label_array
from train import sets

pytestmark = pytest.mark.filterwarnings("ignore:exit .*:UserWarning")  # forty rows are few


def test_cells_are_measured_once_and_shown(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sets, "CELLS", {"sst2": (sets.ALL, 40), "trec6": (40,)})
    monkeypatch.setattr(sets, "MODEL", str(tiny.model()))
    folder = shutil.copytree(tiny.data(), tmp_path / "data/sst2")
    test = folder / "test.tsv"
    dev = (folder / "dev.tsv").read_text().splitlines(keepends=True)[1:]
    own = test.read_text().splitlines(keepends=True)[1:]
    test.write_text("label\ttext\n" + "".join(own + dev))
    results = tmp_path / "results"
    args = [
        *("--data", tmp_path / "data", "--results", results, "--workdir", tmp_path / "runs"),
        *("--cells", "sst2-*"),
    ]
    args = list(map(str, args))
    assert run(sets.app, "train.sets", [*args, "--train-only"]) == 0
    assert not results.exists()
    assert (tmp_path / "runs/sst2-40/bundle/config.json").exists()
    assert run(sets.app, "train.sets", args) == 0
    assert {path.name for path in results.iterdir()} == {"sst2-all.json", "sst2-40.json"}
    of = json.loads((results / "sst2-all.json").read_text())
    assert of["config"]["layers"] == []  # the defaults of `ejax train`
    assert of["rows"] <= len(own)  # no row of dev is reported on
    points = of["thresholds"]
    assert points["first exit"]["exit_share"][0] == 1
    assert points["first exit"]["accuracy"] == of["exit_accuracy"][0]
    depths = [points[name]["mean_depth"] for name in sets.POINTS]
    assert depths == sorted(depths, reverse=True)  # the more may be lost, the sooner
    shown = capsys.readouterr().out
    assert "| sst2 | all |" in shown
    assert "| sst2 | 40 |" in shown
    assert f"{of['full']['accuracy']:.3f}" in shown
    before = {path: path.read_bytes() for path in results.iterdir()}
    assert run(sets.app, "train.sets", args) == 0
    assert before == {path: path.read_bytes() for path in results.iterdir()}
    assert run(sets.app, "train.sets", [*args[:-1], "trec6-*"]) == 2
    assert "must hold a folder trec6. There is none." in capsys.readouterr().err


@pytest.mark.slow
def test_several_labels_are_compared_with_rivals_of_their_own_thresholds(
    tmp_path, monkeypatch
) -> None:
    """Of goemotions: micro-F1 of full depth and of one-against-rest models, decided on dev."""
    monkeypatch.setattr(sets, "CELLS", {"goemotions": (60,)})
    monkeypatch.setattr(sets, "MODEL", str(tiny.model()))
    shutil.copytree(tiny.problem_data(sets.SEVERAL), tmp_path / "data/goemotions")
    fitted, fit = [], sets.fit_rivals

    def kept(*args, **fields):
        rivals, notes = fit(*args, **fields)
        fitted.extend(rivals)
        return rivals, notes

    monkeypatch.setattr(sets, "fit_rivals", kept)
    paths = {"data": tmp_path / "data", "workdir": tmp_path / "runs", "results": tmp_path / "out"}
    args = [str(part) for name, path in paths.items() for part in (f"--{name}", path)]
    assert run(sets.app, "train.sets", args) == 0
    of = json.loads((tmp_path / "out/goemotions-60.json").read_text())
    assert of["metric"] == "micro_f1"
    assert [rival.name for rival in fitted] == [sets.TFIDF, sets.FROZEN] == [*of["linear"]]
    assert all(0 < found <= 1 for found in of["linear"].values())
    assert [*of["better_than"][sets.TFIDF]] == [str(layer) for layer in of["layers"]]
    # One threshold per label; on dev they are at least as good as 0.5 for all.
    config = DataConfig(path=str(paths["data"] / "goemotions"), problem_type=sets.SEVERAL)
    dev = sources.load(config)["dev"]
    truth = label_array([*dev], sets.SEVERAL, len(dev.labels))
    for rival in fitted:
        scores = rival.scores([row.inputs for row in dev])
        assert np.shape(rival.decisions) == (len(dev.labels),)
        own = rival.task.measure(rival.answers(scores), truth)
        assert own >= rival.task.measure(scores >= 0, truth), rival.name


def test_the_gain_is_over_the_best_linear_model_on_the_same_text() -> None:
    better = {"TF-IDF, linear": 3.0, sets.CUT: 4.0, sets.FROZEN: 5.0}
    of = {
        "layers": [0, 2],
        "linear": {"TF-IDF, linear": 0.9, sets.CUT: 0.8, sets.FROZEN: 0.7},
        "better_than": {name: {"2": [gain, -1.0, 9.0]} for name, gain in better.items()},
    }
    assert sets.least_gain(of) == "4.0 (-1.0 to 9.0)"


def test_the_page_of_results_holds_what_was_measured(capsys) -> None:
    """Accuracies of every committed cell, as `--show` prints them, or in a section of their own."""
    page = (sets.Path(__file__).parents[1] / "configs/results/README.md").read_text()
    assert run(sets.app, "train.sets", ["--data", "never", "--show"]) == 0
    lines = capsys.readouterr().out.split("\n\n")[0].splitlines()[2:]
    assert len(lines) >= 5
    for line in lines:
        data, full = line.split(" | ")[0].removeprefix("| "), line.split(" | ")[5]
        assert line in page or (data in sets.PROBLEMS and f"| full depth | {full} |" in page), line
