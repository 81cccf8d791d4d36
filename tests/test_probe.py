"""Each exit compared with a regression on its own vectors: a head that is not trained is named."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny

from ejax.bundle import load_bundle
from ejax.cli.run import run
from ejax.saving import save_bundle
from train.probe import app


def probe(*arguments: object) -> int:
    return run(app, "train.probe", list(map(str, arguments)))


@pytest.fixture
def untrained(tmp_path):
    """The bundle, but after layer 3 with a head as it was before training, or worse."""
    bundle = load_bundle(tiny.trained()[0])
    variables = jax.tree.map(np.array, bundle.variables)
    last = variables["params"]["heads"]["exits"]["classifier"]["kernel"][1]
    last[:] = -last
    return save_bundle(dataclasses.replace(bundle, variables=variables), tmp_path / "bundle")


def arguments(bundle, output):
    files = ("--data", tiny.file("test"), "--train", tiny.file("train"))
    return (bundle, *files, "--output", output)


def test_a_head_that_is_not_trained_is_named(untrained, tmp_path, capsys):
    output = tmp_path / "probe.json"
    assert probe(*arguments(untrained, output), "--dev", tiny.file("dev")) == 0
    found, said = json.loads(output.read_text()), capsys.readouterr().out
    first, last = found["exits"]
    assert (first["layer"], last["layer"]) == (1, 3)
    assert last["gap"] == pytest.approx(100 * (last["probe"] - last["accuracy"]))
    assert last["gap_low"] > 0
    assert last["probe"] > 0.75 > 0.5 > last["accuracy"]
    assert first["gap_low"] <= 0
    assert found["mean_gap"] == pytest.approx((first["gap"] + last["gap"]) / 2)
    assert (found["rows"], found["fitted_rows"], found["dev_rows"]) == (30, 96, 41)
    assert "The head after layer 3 is under-trained: it is right on" in said
    assert "layer 1 is" not in said
    assert found["config"]["epochs"] == 12
    assert found["c_from"].endswith("dev.tsv")


def test_heads_that_are_trained_are_said_to_be(tmp_path, capsys):
    output = tmp_path / "probe.json"
    assert probe(*arguments(tiny.trained()[0], output), "--limit", 20) == 0
    found = json.loads(output.read_text())
    assert (found["rows"], found["fitted_rows"], found["dev_rows"]) == (20, 20, 0)
    assert "No head is below" in capsys.readouterr().out


def test_rows_that_trained_are_not_reported_on_and_others_are_not_fitted(tmp_path, capsys):
    """A training file with rows that did not train the bundle: C is chosen on those."""
    bundle, output = tiny.trained()[0], tmp_path / "probe.json"
    lines = tiny.file("train").read_text().splitlines(keepends=True)
    others = tiny.rows(24, seed=77)
    mixed = tiny.write_tsv(tmp_path / "mixed.tsv", others)
    with mixed.open("a") as file:
        file.writelines(lines[1:])
    both = tmp_path / "both.tsv"
    both.write_text(tiny.file("test").read_text() + "".join(lines[1:31]))
    assert probe(bundle, "--data", both, "--train", mixed, "--output", output) == 0
    found = json.loads(output.read_text())
    assert found["fitted_rows"] == 96
    assert found["dev_rows"] == 24
    assert found["rows_left_out"] == 30
    assert found["c_from"] == "rows of --train that did not train the bundle"


def test_what_cannot_be_compared(tmp_path, capsys):
    bundle, output = tiny.trained()[0], tmp_path / "probe.json"
    train, test = ("--train", tiny.file("train")), ("--data", tiny.file("test"))
    assert probe(bundle, *test, "--train", tiny.file("test"), "--output", output) == 2
    assert "known to have trained this bundle: --train takes the rows" in capsys.readouterr().err
    assert probe(bundle, "--data", tiny.file("train"), *train, "--output", output) == 2
    assert "fitted this bundle: give other rows" in capsys.readouterr().err
    assert probe(bundle, *test, *train, "--dev", tiny.file("train"), "--output", output) == 2
    assert "train.tsv trained this bundle." in capsys.readouterr().err
    assert not output.exists()
