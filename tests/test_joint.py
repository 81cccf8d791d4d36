"""What all exits cost in training, measured on a tiny model."""

import json

import numpy as np
from test_processes import write_config

from ejax.cli.run import run
from train.joint import app


def joint(*arguments: object) -> int:
    return run(app, "train.joint", list(map(str, arguments)))


def test_both_steps_run_in_turns_on_the_same_batches(tmp_path, capsys):
    config, output = write_config(tmp_path, exit_weights=(0.5, 2.0)), tmp_path / "joint.json"
    assert joint("--config", config, "--steps", 3, "--repeats", 2, "--output", output) == 0
    found = json.loads(output.read_text())
    assert (found["joint"]["layers"], found["last"]["layers"]) == ([1, 3], [3])
    assert found["batches"] == [[11, 16]] * 3
    times = [np.array(found[name]["milliseconds"]) for name in ("joint", "last")]
    np.testing.assert_allclose(found["ratios"], times[0] / times[1])
    assert len(found["ratios"]) == 2
    assert f"{np.median(found['ratios']):.3f}" in capsys.readouterr().out


def test_one_exit_has_nothing_to_compare(tmp_path, capsys):
    config, output = write_config(tmp_path, layers=(3,)), tmp_path / "joint.json"
    assert joint("--config", config, "--output", output) == 2
    assert "two exits or more" in capsys.readouterr().err
    assert not output.exists()
    assert joint("--config", config, "--output", tmp_path / "no" / "joint.json") == 2
    assert "a folder that exists" in capsys.readouterr().err
