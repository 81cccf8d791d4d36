"""Checkpoints that are damaged, and a workdir that a host sees late."""

import os
import shutil
import sys
import warnings
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ejax.config import TrainConfig
from ejax.errors import UserError
from ejax.training.checkpoint import Checkpoints


def test_a_host_may_see_the_workdir_late(tmp_path: Path, monkeypatch) -> None:
    """As on NFS; but not never."""
    module = sys.modules[Checkpoints.__module__]
    monkeypatch.setattr(jax, "process_index", lambda: 1)  # of a first that writes
    waits = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    with pytest.raises(ValueError, match="a folder that all hosts share; this one sees none"):
        module.claim_workdir(tmp_path, TrainConfig(), {})
    assert sum(waits) == 60
    monkeypatch.setattr(module.time, "sleep", lambda _: (tmp_path / "config.json").touch())
    module.claim_workdir(tmp_path, TrainConfig(), {})


def damage(path: Path, how: str) -> None:
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        os.truncate(path, path.stat().st_size // 2)
    else:
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 0x10
        path.write_bytes(raw)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's reads
def test_a_damaged_checkpoint_is_set_aside(tmp_path: Path, monkeypatch) -> None:
    """Each file of the newest one, damaged in each way: what is restored was saved so."""
    like = {"x": jnp.zeros(3000), "n": jnp.int32(0)}
    made = tmp_path / "made"
    made.mkdir()
    with Checkpoints(made) as checkpoints:
        for step in (1, 2):
            x = jax.random.normal(jax.random.key(step), (3000,))
            checkpoints.save(step, {"x": x, "n": np.int32(step)}, {"mean_accuracy": 0.5})
    newest = made / "checkpoints" / "2"
    files = [path.relative_to(made) for path in sorted(newest.rglob("*")) if path.is_file()]
    aside = []
    for i, (file, how) in enumerate(
        (file, how) for file in files for how in ("truncate", "flip", "delete")
    ):
        workdir = tmp_path / str(i)
        shutil.copytree(made, workdir)
        damage(workdir / file, how)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with Checkpoints(workdir) as checkpoints:
                step, state = checkpoints.restore_newest(like)
                checkpoints.save(3, state)  # it can go on
        wanted = jax.random.normal(jax.random.key(step), (3000,))
        assert state["n"] == step > 0, (file, how)
        np.testing.assert_array_equal(state["x"], wanted, err_msg=f"{file}, {how}")
        told = [str(one.message) for one in said if "is damaged" in str(one.message)]
        assert len(told) == (step == 1), (file, how, told)
        if told:
            assert str(workdir / "checkpoints" / "2") in told[0]
            assert (workdir / "damaged" / "2").is_dir()
            aside.append(file)
    better = tmp_path / "better"
    better.mkdir()
    with Checkpoints(better) as checkpoints:
        for step, score in ((1, 0.9), (2, 0.5), (3, 0.4)):
            checkpoints.save(
                step, {"x": jnp.zeros(3000), "n": np.int32(step)}, {"mean_accuracy": score}
            )
    damage(better / "checkpoints" / "1" / "about" / "metadata", "flip")
    with Checkpoints(better) as checkpoints:
        assert checkpoints.restore_newest(like)[0] == 3
        with pytest.warns(UserWarning, match="1 is damaged .* is used"):
            step, state = checkpoints.restore_best(like)
    assert step == state["n"] == 2
    with Checkpoints(better) as checkpoints:
        full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        with monkeypatch.context() as patched:
            patched.setattr(ocp.Checkpointer, "restore", mock.Mock(side_effect=full))
            with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
                checkpoints.restore_best(like)
    for step in ("2", "3"):
        damage(better / "checkpoints" / step / "about" / "metadata", "flip")
    with Checkpoints(better) as checkpoints, pytest.raises(UserError, match="cannot be read"):
        checkpoints.restore_best(like)
    assert {path.name for path in (better / "checkpoints").iterdir()} >= {"2", "3"}
    shutil.rmtree(made / "checkpoints" / "1")
    damage(made / "checkpoints" / "2" / "about" / "metadata", "flip")
    with (
        Checkpoints(made) as checkpoints,
        pytest.raises(UserError, match="checkpoints that cannot be read"),
    ):
        checkpoints.restore_newest(like)
    assert (made / "checkpoints" / "2").is_dir()
    names = {file.parts[-2:] for file in files if aside.count(file) == 3}
    kept = {("about", "metadata"), ("metrics", "metrics"), ("state", "manifest.ocdbt")}
    assert names >= kept
    assert sum(folder == "d" for folder, _ in names) >= 2  # an index and the arrays


def test_a_correlation_below_0_is_a_score_too(tmp_path: Path) -> None:
    """The best of those evaluated, whatever was saved for resuming alone."""
    like = {"x": jnp.zeros(3)}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best() == (-1.0, 0)
        for step, score in ((1, -0.2), (2, -0.5), (3, None)):
            metrics = None if score is None else {"mean_accuracy": score}
            checkpoints.save(step, {"x": jnp.full(3, float(step))}, metrics)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best() == (-0.2, 1)
        assert checkpoints.restore_best(like)[0] == 1
