"""gs://, against a stand-in for Cloud Storage that runs here."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_processes import child_of, finish, start, start_two, weights, write_config

from ejax import storage
from ejax.bundle import load_bundle
from ejax.cli.run import explain
from ejax.saving import save_bundle
from ejax.storage import files_in, move, path_of, upload
from ejax.training.checkpoint import Checkpoints

pytest.importorskip("gcp_storage_emulator", reason="pip install '.[dev]'")


@pytest.fixture(scope="module")
def bucket():
    """gs://bucket of a server on this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("object_storage.py"), port],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert server.stdout
    assert server.stdout.readline() == b"ready\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{port}")
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://localhost:{port}")
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks Google about the bucket
        yield path_of("gs://bucket")
    server.kill()
    server.wait()


@pytest.fixture(scope="module")
def whole(bucket: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(config of data on gs://, workdir of a run with the same rows that used only folders)."""
    upload(tiny.data(), bucket / "data")
    folder = tmp_path_factory.mktemp("whole")
    config = write_config(folder, checkpoint_steps=5)  # each save takes the bucket a second
    finish(start(config, folder / "run", f"data.path={tiny.data()}"))
    return config, folder / "run"


def lines(workdir: Any) -> list[Any]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def fetch(remote: Any, target: Path) -> Path:
    for path in files_in(remote):
        copy = target / path.relative_to(remote)
        copy.parent.mkdir(parents=True, exist_ok=True)
        path.copy(copy)
    return target


def assert_same_run(remote: Any, local: Path, tmp_path: Path) -> None:
    found, wanted = weights(fetch(remote, tmp_path / "fetched")), weights(local)
    for key, value in wanted.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)
    assert lines(remote) == lines(local)
    assert any(path.name.startswith("events") for path in (remote / "tensorboard").iterdir())
    assert json.loads((remote / "result.json").read_text())["best_step"]


def wait_for_save(remote: Any, process: Any) -> None:
    deadline = time.time() + 300
    while time.time() < deadline:
        if (remote / "checkpoints").exists() and any(
            (path / "commit_success.txt").exists() for path in (remote / "checkpoints").iterdir()
        ):
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise AssertionError(f"no checkpoint in {remote} in time")


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(whole: Any, bucket: Any, tmp_path: Path) -> None:
    """Data, checkpoints, logs and bundle on gs://; then the bundle is used from there."""
    config, run = whole
    workdir = bucket / "killed"
    process = start(config, workdir, f"data.path={bucket}/data")
    wait_for_save(workdir, process)
    process.kill()
    process.wait()
    assert not (workdir / "bundle" / "exits.json").exists()
    assert "resuming" in finish(start(config, workdir, f"data.path={bucket}/data"))
    assert_same_run(workdir, run, tmp_path)

    rows = tmp_path / "rows.tsv"
    shutil.copy(tiny.data() / "test.tsv", rows)
    upload(tmp_path, bucket / "rows")
    there = tiny.ejax(
        "predict", workdir / "bundle", "--input", bucket / "rows" / "rows.tsv",
        "--output", bucket / "out" / "labelled.tsv.gz",
    )  # fmt: skip
    assert there.code == 0, there.err
    here = tiny.ejax(
        "predict", run / "bundle", "--input", rows, "--output", tmp_path / "labelled.tsv.gz"
    )
    assert here.code == 0, here.err
    wanted = (tmp_path / "labelled.tsv.gz").read_bytes()
    assert (bucket / "out" / "labelled.tsv.gz").read_bytes() == wanted


@pytest.mark.slow
def test_two_processes_share_a_bucket(whole: Any, bucket: Any, tmp_path: Path) -> None:
    """SIGTERM to one, both go on later, each has read its own copy of the rows."""
    config, _ = whole
    local = tmp_path / "local"
    for process in start_two(config, local):
        finish(process)
    workdir = bucket / "two"
    first, second = start_two(config, workdir)
    wait_for_save(workdir, first)
    os.kill(child_of(second.pid), signal.SIGTERM)
    assert "the same command resumes at" in finish(first, 75)
    finish(second, 75)
    for process in start_two(config, workdir):
        finish(process)
    assert_same_run(workdir, local, tmp_path)


@pytest.mark.parametrize("how", ["delete", "truncate"])
def test_a_damaged_checkpoint_is_set_aside(bucket: Any, how: str) -> None:
    workdir = bucket / how
    like = {"x": jnp.zeros(3000), "n": jnp.int32(0)}
    with Checkpoints(workdir) as checkpoints:
        for step in (1, 2, 3):
            state = {"x": jnp.full(3000, step, jnp.float32), "n": np.int32(step)}
            checkpoints.save(step, state, {"mean_accuracy": 1 / step})
    about = workdir / "checkpoints" / "3" / "metrics" / "metrics"
    if how == "delete":
        about.unlink()
    else:
        about.write_text("{")
    (workdir / "checkpoints" / "2" / "commit_success.txt").unlink()  # cut off while it was saved
    with pytest.warns(UserWarning, match="checkpoints/3 is damaged"):
        checkpoints = Checkpoints(workdir)
    with checkpoints:
        step, state = checkpoints.restore_newest(like)
        assert step == state["n"] == 1
        checkpoints.save(2, state)
    assert (workdir / "damaged" / "3" / "state").is_dir()
    assert not (workdir / "checkpoints" / "3").exists()


def test_a_folder_takes_the_place_of_one_set_aside_before(bucket: Any, tmp_path: Path) -> None:
    for root in (tmp_path, bucket / "aside"):
        for text in ("first", "second"):
            (root / "from").mkdir(parents=True, exist_ok=True)
            (root / "from" / "file").write_text(text)
            move(root / "from", root / "to" / "7")
        assert (root / "to" / "7" / "file").read_text() == "second"
        assert not (root / "from").exists()


def test_half_a_bundle_is_none(bucket: Any, tmp_path: Path) -> None:
    """exits.json is written last; what came before it may be written over."""
    folder = bucket / "half"
    upload(tiny.trained()[0], folder)
    (folder / "exits.json").unlink()
    sentence = tiny.refused("predict", folder)
    assert sentence.startswith("gs://bucket/half is not a whole bundle: exits.json missing.")
    done = tiny.ejax("calibrate", tiny.trained()[0], "--data", tiny.data(), "--output", folder)
    assert done.code == 0, done.err
    assert tiny.ejax("calibrate", folder, "--data", tiny.data()).code == 0  # in place
    shown = tiny.ejax("info", folder)
    assert shown.code == 0, shown.err
    assert "layer" in shown.out
    save_bundle(load_bundle(folder), folder, rows=False)
    assert not (folder / "rows.json").exists()
    assert "--rows-are-new" in tiny.refused("calibrate", folder, "--data", tiny.data())
    beside = ("--beside", folder, "--against", "none", "--data", tiny.data())
    assert "--beside bucket/half is given twice" in tiny.refused(
        "bench", tiny.trained()[0], *beside, "--beside", folder, "--output", tmp_path / "b.json"
    )


def test_a_warning_names_the_bundle_and_not_its_copy(bucket: Any) -> None:
    upload(Path(__file__).parent / "goldens" / "bundle_format_1", bucket / "older")
    with pytest.warns(UserWarning, match="^gs://bucket/older: an older ejax made it"):
        load_bundle(str(bucket / "older"))


def test_rows_never_stand_beside_a_bundle_they_are_not_of(tmp_path: Path, monkeypatch) -> None:
    """exits.json, which makes it whole, goes before the rows do, and comes last."""
    names = ("exits.json", "rows.json", "config.json")
    for folder, held in (("there", names), ("fresh", ("exits.json", "config.json"))):
        (tmp_path / folder).mkdir()
        for name in held:
            (tmp_path / folder / name).write_text(folder)
    there, seen, unlink = tmp_path / "there", [], Path.unlink

    def watched(path: Path, **kwargs: bool) -> None:
        unlink(path, **kwargs)
        seen.append(sorted(one.name for one in there.iterdir()))

    monkeypatch.setattr(Path, "unlink", watched)
    upload(tmp_path / "fresh", there, first="config.json", last="exits.json", owned=["rows.json"])
    assert seen == [["config.json", "rows.json"], ["config.json"]]
    assert {path.name: path.read_text() for path in there.iterdir()} == dict.fromkeys(
        ("exits.json", "config.json"), "fresh"
    )


def test_a_model_of_others_is_not_written_over(bucket: Any) -> None:
    """It has the names of a bundle's files, and no exits.json either."""
    folder = bucket / "hf"
    upload(tiny.model(), folder)
    sentence = tiny.refused(
        "calibrate", tiny.trained()[0], "--data", tiny.data(), "--output", folder
    )
    assert sentence.startswith("gs://bucket/hf exists and is not a bundle")


def test_a_bundle_that_is_being_written_is_not_read(bucket: Any, monkeypatch) -> None:
    folder = bucket / "busy"
    upload(tiny.trained()[0], folder)
    seen = iter([b"old", b"new"])
    monkeypatch.setattr(storage, "contents", lambda path: next(seen))
    assert "gs://bucket/busy is being written" in tiny.refused("predict", folder)


def test_out_of_reach_is_not_damage(bucket: Any) -> None:
    from gcsfs.retry import HttpError

    rights = HttpError({"message": "no rights", "code": 401})
    for error, damaged in (
        (rights, False), (OSError("Forbidden"), False), (ValueError("UNAVAILABLE: x"), False),
        (OSError(errno.EIO, "Input/output error"), False), (MemoryError(), False),
        (RuntimeError("RESOURCE_EXHAUSTED: out of memory"), False),
        (FileNotFoundError("x"), True), (ValueError("checkpoint 3: …"), True),
    ):  # fmt: skip
        assert storage.is_damage(error) is damaged
    assert explain(rights) == "object storage cannot be reached: no rights, 401."


def test_wrong_input(bucket: Any) -> None:
    upload(tiny.data(), bucket / "other")
    for arguments, text in (
        (["predict", bucket / "none"], "gs://bucket/none is not a whole bundle"),
        (["predict", "s3://bucket/x"], "only folders and gs:// are known here"),
        (["evaluate", tiny.trained()[0], "--data", bucket / "none"], "No such file or folder"),
        (["predict", tiny.trained()[0], "--input", bucket / "other" / "tset.tsv"],
         "Did you mean gs://bucket/other/test.tsv?"),
        (["calibrate", tiny.trained()[0], "--data", tiny.data(), "--output", bucket / "other"],
         "gs://bucket/other exists and is not a bundle"),
        (["predict", tiny.trained()[0], "--input", tiny.data() / "test.tsv", "--output",
          bucket / "other"], "gs://bucket/other is a folder"),
        (["evaluate", tiny.trained()[0], "--data", tiny.data(), "--output", bucket / "e.json"],
         "must be a folder here"),
        (["quickstart", "--workdir", bucket / "q"], "must be a folder here"),
    ):  # fmt: skip
        assert text in tiny.refused(*arguments)
    (bucket / "other" / "dev.tsv").write_text("label\ttext\ngood\ta film\nbad\n")
    sentence = tiny.refused(
        "train", "--model", tiny.model(), "--output", bucket / "bad", f"data.path={bucket}/other"
    )
    assert "gs://bucket/other/dev.tsv, line 3: expected 2 columns" in sentence
