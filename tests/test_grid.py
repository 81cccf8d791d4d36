"""The comparison's cells on a tiny model: what they hold, that they are run once."""

import io
import json
import shutil
from pathlib import Path

import pytest
import tiny
from matplotlib.figure import Figure
from rich.console import Console

from ejax.command import run
from train import grid

pytestmark = pytest.mark.filterwarnings("ignore:exit .*:UserWarning")  # forty rows are few


def test_cells_are_measured_once_and_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grid, "EXITS", {"minilm": (1, 3), "twelve": (1, 3)})
    monkeypatch.setattr(grid, "ROWS", 60)
    monkeypatch.setattr(grid, "TIMED_TOKENS", 100)
    folder = tmp_path / "data" / "sst2"
    shutil.copytree(tiny.data(), folder)
    own = (folder / "test.tsv").read_text().splitlines(keepends=True)
    with (folder / "test.tsv").open("a") as file:  # 30 rows of its own, and all of dev
        file.writelines((folder / "dev.tsv").read_text().splitlines(keepends=True)[1:])
    results = tmp_path / "grid"
    args = [
        *("--data", tmp_path / "data", "--twelve", tiny.model(), "--results", results),
        *("--workdir", tmp_path / "runs", "--cells", "sst2-twelve-[ec][xu]*"),
    ]
    assert run(grid.app, "train.grid", list(map(str, args))) == 0
    names = {f"sst2-twelve-{name}-0" for name in ("exits", "cut1")}
    assert {path.stem for path in results.iterdir()} == names
    exits, cut = (
        json.loads((results / f"sst2-twelve-{name}-0.json").read_text())
        for name in ("exits", "cut1")
    )
    assert (exits["layers"], cut["layers"]) == ([1, 3], [1])
    assert 60 - 41 <= exits["rows"] <= len(own) - 1
    chosen = exits["chosen"]
    assert chosen["rows"] == exits["rows"] == cut["rows"]
    assert exits["oracle"]["accuracy"] >= chosen["accuracy"]
    assert exits["at_budget"]["1"]["cost"] == pytest.approx(1 / 3)
    assert exits["at_budget"]["1"]["speed"]["mean_depth"] == 1
    assert exits["at_budget"]["1"]["accuracy"] == exits["exits"][0]["accuracy"]
    assert exits["curve"][-1]["accuracy"] == exits["exits"][-1]["accuracy"]
    assert exits["calibration"]["temperatures, per exit"] == chosen
    low, high = (exits["exits"][0][f"ece_minus_floor_{end}"] for end in ("low", "high"))
    assert low < high
    assert all(exits["speed"][name] > 0 for name in ("speedup", "single_ms", "single_full_ms"))
    assert 0 < exits["speed"]["rows"] < exits["rows"]
    assert results.with_suffix(".png").exists()
    shown = capsys.readouterr().out
    assert f"{cut['exits'][0]['accuracy']:.4f}" in shown
    before = {path: path.read_bytes() for path in results.iterdir()}
    assert run(grid.app, "train.grid", list(map(str, args))) == 0
    assert before == {path: path.read_bytes() for path in results.iterdir()}
    done = results / "sst2-twelve-cut1-0.json"
    done.unlink()  # of a training that had been resumed once and took long: both are kept
    trained = tmp_path / "runs/sst2-twelve-cut1-0/result.json"
    long = json.loads(trained.read_text()) | {"seconds": 9e6, "resumed_from_step": 7}
    trained.write_text(json.dumps(long))
    assert run(grid.app, "train.grid", list(map(str, args))) == 0
    of_older = json.loads(done.read_text())
    assert 9e6 < of_older["seconds"] < 9e6 + 3600
    assert of_older["resumed_from_step"] == 7
    of_older["config"]["epochs"] += 1
    done.write_text(json.dumps(of_older))
    assert run(grid.app, "train.grid", list(map(str, args))) == 2
    assert "sst2-twelve-cut1-0.json was trained with other epochs" in capsys.readouterr().err
    other = [arg if arg is not tiny.model() else "another/model" for arg in args]
    assert run(grid.app, "train.grid", list(map(str, other))) == 2
    assert "and another/model was asked for" in capsys.readouterr().err


def test_seeds_have_a_mean():
    kept = Path(grid.__file__).parents[1] / "configs/results/grid"
    one, cut = (
        json.loads((kept / f"sst2-minilm-{k}-0.json").read_text()) for k in ("exits", "cut1")
    )
    other = one | {"seed": 1, "random": one["random"] + 0.02}
    printed = io.StringIO()
    Console(file=printed, width=250).print(grid.summary([one, other, cut]))
    line = next(line for line in printed.getvalue().splitlines() if "mean" in line)
    assert f"{one['random'] + 0.01:.4f} ± 0.0141" in line
    assert f"{one['at_budget']['1']['accuracy']:.4f} ± 0.0000 / –" in line  # one seed has no cut1


def test_a_depth_stands_beside_the_model_cut_there():
    """Also where there are more exits than cut models."""
    kept = Path(grid.__file__).parents[1] / "configs/results/grid"
    one, cut = (
        json.loads((kept / f"sst2-twelve-{k}-0.json").read_text()) for k in ("every", "cut4")
    )
    printed = io.StringIO()
    Console(file=printed, width=250).print(grid.summary([one, cut]))
    at_4 = one["at_budget"]["4"]["accuracy"]
    assert f"{at_4:.4f} / {cut['exits'][0]['accuracy']:.4f}" in printed.getvalue()


def test_random_exits_are_drawn_at_their_own_mean_depth():
    """Not at what the chosen thresholds spend, which depends on the texts' lengths too."""
    kept = Path(grid.__file__).parents[1] / "configs/results/grid/sst2-twelve-exits-0.json"
    result = json.loads(kept.read_text())
    result["chosen"] |= {"exit_share": [0.5, 0.25, 0, 0.25], "cost": 0.9, "mean_depth": 4.5}
    axes = Figure().subplots()
    grid.draw([result | {"random": 0.75}], [axes])
    point = next(line for line in axes.lines if line.get_label() == "random exit")
    share = (0.5 * 1 + 0.25 * 4 + 0.25 * 12) / 12
    assert point.get_xydata().tolist() == [[pytest.approx(share), 75]]


def test_every_cell_has_a_name_of_its_own():
    cells = grid.all_cells()
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.data for cell in cells} == set(grid.DATA)
    by_name = {cell.name: cell for cell in cells}
    assert by_name["imdb-twelve-cut6-0"].layers == (6,)
    assert by_name["snli-minilm-standard-2"].layers == (6,)
    recipes = [
        (config.distillation, config.gradient_stop)
        for kind in ("exits", "sum", "partial", "stop")
        for config in [by_name[f"snli-minilm-{kind}-0"].config(tiny.HOME, "", tiny.HOME)]
    ]
    assert recipes == [(1, 0), (0, 0), (1, 0.5), (0, 1)]
    long = by_name["snli-minilm-long-0"].config(tiny.HOME, "", tiny.HOME)
    assert (long.epochs, long.distillation) == (4, 1)
    assert by_name["snli-twelve-long-0"].config(tiny.HOME, "", tiny.HOME).epochs == 2
    assert by_name["mnli-twelve-longer-0"].config(tiny.HOME, "", tiny.HOME).epochs == 4
    every = by_name["sst2-twelve-every-0"].config(tiny.HOME, "", tiny.HOME)
    assert (every.epochs, every.layers) == (2, tuple(range(1, 13)))
    assert by_name["mnli-twelve-shallow-0"].layers == (1, 3, 5, 12)


def test_the_frozen_cell_starts_from_the_standard_model(tmp_path, capsys):
    """Its result is known by that cell, not by where the bundle lay."""
    (tmp_path / "snli").mkdir()
    args = [
        *("--data", str(tmp_path), "--workdir", str(tmp_path / "runs")),
        *("--results", str(tmp_path / "grid"), "--cells", "snli-minilm-frozen-0"),
    ]
    assert run(grid.app, "train.grid", args) == 2
    assert (
        "there is none: run snli-minilm-standard-0 first (with other --results"
        in capsys.readouterr().err
    )
    (tmp_path / "grid").mkdir()
    (tmp_path / "sst2").mkdir()
    kept = Path(grid.__file__).parents[1] / "configs/results/grid/sst2-minilm-frozen-0.json"
    shutil.copy(kept, tmp_path / "grid")
    args[-1] = "sst2-minilm-frozen-0"
    assert run(grid.app, "train.grid", args) == 0


def test_a_cell_that_is_not(tmp_path, capsys):
    args = ["--data", str(tmp_path), "--cells", "sst3-*"]
    assert run(grid.app, "train.grid", args) == 2
    assert "--cells 'sst3-*' names no cell" in capsys.readouterr().err
    assert run(grid.app, "train.grid", [*args[:-1], "sst2-minilm-cut1-0"]) == 2
    assert f"--data {tmp_path} must hold a folder sst2" in capsys.readouterr().err
