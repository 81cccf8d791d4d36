"""What `ejax thresholds` promises, counted on draws from a tiny model's answers."""

import json

import pytest
import tiny
from scipy.stats import binom

from ejax.cli.run import run
from train.guarantee import app


def guarantee(*arguments: object) -> int:
    return run(app, "train.guarantee", list(map(str, arguments)))


def test_broken_promises_are_counted(tmp_path, capsys):
    output = tmp_path / "guarantee.json"
    cases = ("--case", "0.2,0.1,120", "--case", "0.01,0.1,120")
    args = (tiny.trained()[0], "--data", tiny.data(), *cases, "--draws", 60, "--output", output)
    assert guarantee(*args) == 0
    found = json.loads(output.read_text())
    assert (found["rows"], found["draws"], found["loss"]) == (30, 60, "disagreement")
    assert found["bundle"] == f"{tiny.HOME.name}/bundle"
    possible, impossible = found["cases"]
    assert possible["violations"] <= binom.ppf(1 - 1e-4, 60, 0.1)
    assert possible["full_depth"] < 1
    assert 0 < possible["exit_share"][0] <= 1
    assert sum(possible["exit_share"]) == pytest.approx(1)
    assert 1 <= possible["hindsight_depth"] <= possible["mean_depth"] < 3
    # 230 rows would be needed to show 1 % at all.
    assert impossible["full_depth"] == 1
    assert (impossible["mean_depth"], impossible["mean_loss"]) == (3, 0)
    assert (impossible["exit_share"], impossible["refused"]) == ([0, 1], 0)
    assert impossible["violations"] == 0 == impossible["low"]
    assert impossible["high"] == pytest.approx(
        1 - 0.025 ** (1 / 60)
    )  # none of 60 (Clopper, Pearson)
    assert "0.2" in capsys.readouterr().out


@pytest.mark.parametrize(("loss", "bounds"), [("drop", (30, 0.5)), ("wrong", (0.7, 0.001))])
def test_of_a_drop_and_of_wrong_answers(tmp_path, loss, bounds):
    output = tmp_path / "guarantee.json"
    cases = [f"--case={bound},0.1,120" for bound in bounds]
    asked = ("--loss", loss, *cases, "--draws", 60, "--output", output)
    assert guarantee(tiny.trained()[0], "--data", tiny.data(), *asked) == 0
    possible, impossible = json.loads(output.read_text())["cases"]
    assert possible["violations"] <= binom.ppf(1 - 1e-4, 60, 0.1)
    assert possible["mean_loss"] <= possible["bound"]
    assert possible["mean_depth"] < 3
    # Full depth loses nothing, but is wrong as often as it is.
    assert (impossible["refused"], impossible["full_depth"]) == (
        (0, 1) if loss == "drop" else (1, None)
    )


def test_a_case_that_cannot_be_read(tmp_path, capsys):
    args = (tiny.trained()[0], "--data", tiny.data(), "--case", "0.1", "--output")
    assert guarantee(*args, tmp_path / "out.json") == 2
    assert "--case must be RISK,DELTA,ROWS" in capsys.readouterr().err
    assert guarantee(*args[:4], "0.1,0.1,-5", "--output", tmp_path / "out.json") == 2
    assert "--case must be RISK,DELTA,ROWS" in capsys.readouterr().err
    assert guarantee(*args[:3], "--loss", "both", "--output", tmp_path / "out.json") == 2
    assert "loss must be one of disagreement, error, wrong" in capsys.readouterr().err
