"""`python -m train.accelerator`: every part in its small form, and parts that fail or hang."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import train.accelerator.__main__ as check
from ejax.cli.run import run
from ejax.config import ExitConfig
from ejax.models.early_exit import EarlyExitBert
from train.accelerator import parity
from train.accelerator.common import TINY, random_batch, random_variables
from train.accelerator.parts import PARTS, Part

ROOT = Path(__file__).parents[1]


def fails(given):
    yield {"before": 1}
    raise RuntimeError("no such kernel")


def hangs(given):
    yield {"before": 1}
    time.sleep(60)


def dies(given):
    yield {"before": 1}
    os._exit(7)


def works(given):
    yield {"summary": "done"}


@pytest.mark.slow
def test_every_part_runs_here(tmp_path: Path) -> None:
    """As on a machine without a network and without tensorflow_datasets, from the working tree."""
    missing = tmp_path / "missing" / "tensorflow_datasets.py"
    missing.parent.mkdir()
    missing.write_text("raise ImportError('not on this machine')\n")
    output = tmp_path / "accelerator.json"
    done = subprocess.run(
        [sys.executable, "-m", "train.accelerator", "--small", "--output", output],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": f"{missing.parent}:{ROOT}"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert found["small"]
    assert found["platform"] == "cpu"
    assert {"jax", "jaxlib", "torch"} <= set(found["versions"])
    parts = found["parts"]
    assert list(parts) == list(PARTS)
    for name, part in parts.items():
        assert part["summary"]
        assert f"{name}: " in done.stderr
    # The device is the CPU itself here: the same program twice.
    for of_type in parts["parity"]["errors"].values():
        for name in ("hidden", "score", "gradient"):
            assert of_type[name]["error"] <= of_type[name]["bound"]
        assert of_type["exits"]["wrong"] == 0
    for name in ("engine_base", "engine_large", "rivals"):
        part = parts[name]
        assert 1 < part["mean_depth"] < part["layers"][-1]
        # Few layers of few rows: heads count for little.
        assert part["ideal_speedup"] == pytest.approx(
            part["layers"][-1] / part["mean_depth"], rel=0.1
        )
        assert part["texts_per_second"]["early_exit"] > 0
    assert parts["attention"]["equal_everywhere"] == ["xla_mask", "xla_lengths"]
    assert "cudnn" in parts["attention"]["left_out"]
    assert set(parts["training"]["seconds"]) == {"joint", "last"}


def test_a_part_that_fails_is_noted_and_what_it_found_is_kept() -> None:
    for run_of, limit, error in (
        (fails, 60, "RuntimeError: no such kernel"),
        (hangs, 8, "stopped after 8 s"),
        (dies, 60, "its process ended with exit code 7"),
    ):
        found = check.run_part(Part(run_of, limit), limit, True, lambda _: None)
        assert found["before"] == 1
        assert found["error"] == error
        assert found["process_seconds"] < 50


def test_the_rest_goes_on_and_the_code_is_1(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(check, "PARTS", {"one": Part(fails, 60), "two": Part(works, 60)})
    output = tmp_path / "found.json"
    arguments = ["--small", "--output", str(output)]
    assert run(check.app, "train.accelerator", arguments) == 1
    parts = json.loads(output.read_text())["parts"]
    assert parts["one"]["error"] == "RuntimeError: no such kernel"
    assert parts["two"]["summary"] == "done"
    assert run(check.app, "train.accelerator", ["--parts", "two,three", *arguments]) == 2
    assert "--parts must be among one, two. Got 'three'." in capsys.readouterr().err


def test_parity_sees_what_is_wrong() -> None:
    """A gradient off by TF32's error, a hidden state, a score, and rows that leave elsewhere."""
    cfg, exits = dataclasses.replace(TINY, dtype="float32"), ExitConfig((0, 1, 2), 3, buckets=16)
    variables = random_variables(EarlyExitBert(cfg, exits), 0.1)
    batch = random_batch(cfg, 16, 11, ragged=True)
    golden = parity.computed(cfg, exits, variables, batch, jax.devices()[0])
    assert set(parity.distances(golden, golden).values()) == {0.0}
    changed = jax.tree.map(lambda leaf: leaf * (1 + 5e-4), golden)
    found = parity.distances(golden, changed)
    assert found["gradient"] == pytest.approx(5e-4, rel=0.01)
    assert found["hidden"] > 1e-4
    assert found["score"] > 1e-5
    assert parity.wrong_exits(golden, 1e-5, cfg, exits, variables, batch) == 0
    other = golden | {"logits": np.roll(golden["logits"], 1, axis=1)}
    assert parity.wrong_exits(other, 1e-5, cfg, exits, variables, batch) > 0
