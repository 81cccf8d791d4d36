"""Several processes as one run, and runs that are stopped, killed or damaged."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file
from test_checkpoints import damage

from ejax.bundle import load_bundle
from ejax.classifier import EarlyExitClassifier
from ejax.config import DataConfig, TrainConfig, to_json
from ejax.training.processes import LOST

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


def write_config(folder: Path, **changes: object) -> Path:
    """Uneven batches of at most 11 rows, with dropout."""
    fields = {
        "data": DataConfig(path=str(tiny.data()), max_length=16, buckets=(16,)),
        "model": str(tiny.model()), "layers": (0, 1, 3), "epochs": 3, "batch_size": 11,
        "learning_rate": 0.01, "dropout": 0.1, "checkpoint_steps": 2, "evals": 3,
        "head_learning_rate": 0.01,
        "dtype": "float32",
    } | changes  # fmt: skip
    path = folder / "config.py"
    path.write_text(
        "from ejax.config import TrainConfig, from_json\n"
        f"config = from_json(TrainConfig, {to_json(TrainConfig(**fields))!r})\n"
    )
    return path


def start(config: Path, workdir: Path, *more: str, devices: int = 1, **env: str):
    command = [sys.executable, "-m", "train", "--config", config, "--workdir", workdir, *more]
    return launch(command, devices, **env)


def launch(command: list, devices: int, **env: str) -> subprocess.Popen:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(config: Path, workdir: Path, *more: str):
    command = [sys.executable, "-m", "train", "--config", config, "--workdir", workdir]
    return launch_two([*command, "--distributed", *more])


def launch_two(command: list, *more_of_second: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        launch(
            [*command, *more_of_second * i], 2, JAX_NUM_PROCESSES="2",
            JAX_COORDINATOR_ADDRESS=address, JAX_PROCESS_ID=str(i),
        )
        for i in range(2)
    ]  # fmt: skip


def finish(process: subprocess.Popen, code: int = 0, seconds: float = 300) -> str:
    _, err = process.communicate(timeout=seconds)
    assert process.returncode == code, err
    return err


def wait_for(path: Path, process: subprocess.Popen, pattern: str = "[0-9]*") -> None:
    """Until something complete stands there."""
    deadline = time.time() + 300
    while time.time() < deadline:
        if any("tmp" not in found.name for found in path.glob(pattern)):
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    raise AssertionError(f"nothing in {path} in time")


def child_of(parent: int) -> int:
    """The training process under its supervisor."""
    (child,) = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return int(child)


def weights(workdir: Path) -> dict[str, np.ndarray]:
    return load_file(workdir / "bundle" / "model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit."""
    files = ("model.safetensors", "exits.json", "rows.json")
    for name in (*(f"bundle/{file}" for file in files), "metrics.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(config, workdir) of a run on one device that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    config = write_config(folder)
    finish(start(config, folder / "run"))
    return config, folder / "run"


@pytest.fixture(scope="module")
def whole_two(whole, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by two processes of two devices."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    for process in start_two(whole[0], workdir):
        finish(process)
    return workdir


def test_processes_and_devices_change_nothing_but_rounding(
    whole, whole_two, tmp_path: Path
) -> None:
    """Two processes of two devices, and one of four otherwise carried, against one device."""
    config, run = whole
    ways = ("parallel=shard_map", "accumulate=2", "remat=True")
    finish(start(config, tmp_path / "four", *ways, devices=4))
    wanted = weights(run)
    for path in (whole_two, tmp_path / "four"):
        found = weights(path)
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            # Sums in another order: see test_training's four devices. Here 27 steps of Adam at
            # 0.01, 100 times that for the mixing scores, where gradients are near zero.
            limit = 2e-2 if "mix" in key else 5e-4
            if not key.endswith("key.bias"):  # softmax cancels it: Adam makes steps of its rounding
                np.testing.assert_allclose(found[key], value, atol=limit, err_msg=f"{path}, {key}")
        one, other = (
            EarlyExitClassifier(load_bundle(at / "bundle", dtype="float32")) for at in (run, path)
        )
        texts = one.encode([text for _, text in tiny.rows(13, seed=9)])
        apart = np.abs(other.exit_logits(texts) - one.exit_logits(texts))
        assert apart.max() < 1e-3  # of logits near 1: the weights' limits, which key biases share
        logs = [
            [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()]
            for one in (run, path)
        ]
        assert [(x["step"], x["kind"]) for x in logs[0]] == [
            (x["step"], x["kind"]) for x in logs[1]
        ]


LATE = """
import sys, time
import jax, numpy as np
from ejax.training import processes
from ejax.training.parallel import parallel_step, place
from ejax.training.step import AXIS

def late(where):
    time.sleep(40 * (jax.process_index() and where == sys.argv[2]))

def run():
    def step(state, rows):
        late("compiling")
        return state + jax.lax.psum((rows * state).sum(), AXIS), {}

    late("loading")
    state = place(np.float32(1), sys.argv[1])
    state, _ = parallel_step(step, parallel=sys.argv[1])(state, np.arange(8, dtype=np.float32))
    print(float(state))

processes.join(run)
"""


def test_a_slow_process_is_waited_for() -> None:
    """Longer than the 30 seconds after which a collective gives up; all pairs sleep at once."""
    cases = [("pmap", "compiling"), ("shard_map", "loading"), ("shard_map", "compiling")]
    pairs = [launch_two([sys.executable, "-c", LATE, *case]) for case in cases]
    for case, pair in zip(cases, pairs, strict=True):
        for process in pair:
            out, err = process.communicate(timeout=300)
            assert process.returncode == 0, (case, err)
            assert float(out.splitlines()[-1]) == 1 + sum(range(8)), case


def test_two_processes_are_stopped_and_resume(whole, whole_two, tmp_path: Path) -> None:
    """SIGTERM to one stops both at one step; together they go on to the same weights."""
    config, _ = whole
    first, second = start_two(config, tmp_path / "run")
    wait_for(tmp_path / "run" / "checkpoints", second)
    second.send_signal(signal.SIGTERM)
    assert "the same command resumes at" in finish(first, 75)
    finish(second, 75)
    for process in start_two(config, tmp_path / "run"):
        finish(process)
    assert_same_run(tmp_path / "run", whole_two)


def test_two_processes_set_a_damaged_checkpoint_aside(whole, whole_two, tmp_path: Path) -> None:
    """Both see the damage before one of them moves it."""
    config, _ = whole
    shutil.copytree(whole_two, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "bundle")
    newest = max((tmp_path / "run" / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    damage(newest / "metrics" / "metrics", "truncate")
    for process in start_two(config, tmp_path / "run"):
        assert f"{newest} is damaged" in finish(process)
    assert_same_run(tmp_path / "run", whole_two)


def test_a_checkpoint_that_one_host_cannot_read_leaves_none_waiting(tmp_path: Path) -> None:
    """All take the one before it; and what the first sees, should another see less."""
    code = f"""
import os, pathlib, jax, jax.numpy as jnp, numpy as np, orbax.checkpoint as ocp
from ejax.training import processes
from ejax.training.checkpoint import Checkpoints
read = ocp.StandardCheckpointHandler.restore
def restore(self, directory, *args, **kwargs):
    if jax.process_index() and directory.parent.name == "2":
        raise FileNotFoundError("not in this host's listing")
    return read(self, directory, *args, **kwargs)
def run():
    with Checkpoints(pathlib.Path({str(tmp_path)!r})) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {{"x": jnp.full(3000, step, jnp.float32)}})
        checkpoints.manager.wait_until_finished()
        if jax.process_index():
            checkpoints.manager.all_steps = lambda: [1]  # an old listing
        assert checkpoints.restore_newest({{"x": jnp.zeros(3000)}})[0] == 2
        ocp.StandardCheckpointHandler.restore = restore
        step, state = checkpoints.restore_newest({{"x": jnp.zeros(3000)}})
        assert step == 1 and (np.asarray(state["x"]) == 1).all()
processes.join(run)
"""
    for process in launch_two([sys.executable, "-c", code]):
        said = finish(process)
        assert "checkpoints/2 is damaged" in said
    assert (tmp_path / "damaged" / "2").exists()


def test_the_first_may_take_longer_at_the_end(tmp_path: Path) -> None:
    """It saves, loads and shows; the others wait longer than jax would."""
    code = """
import os, time
from ejax.training import processes
processes.HEARTBEAT = 10
def run():
    processes.barrier("made")
    time.sleep(14 if os.environ["JAX_PROCESS_ID"] == "0" else 0)
processes.join(run)
"""
    for process in launch_two([sys.executable, "-c", code]):
        finish(process)


def test_processes_of_different_configs_do_not_train(tmp_path: Path) -> None:
    """In a new workdir too, where neither finds a config to differ from; both say why."""
    command = [
        sys.executable, "-m", "train", "--config", write_config(tmp_path),
        "--workdir", tmp_path / "run", "--distributed",
    ]  # fmt: skip
    for process in launch_two(command, "learning_rate=0.5", "accumulate=4"):
        said = finish(process, 2)
        assert "they differ in learning_rate, accumulate" in " ".join(said.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_process_ends_the_other_in_time(tmp_path: Path, victim: int) -> None:
    config = write_config(tmp_path, epochs=3000)
    processes = start_two(config, tmp_path / "run")
    wait_for(tmp_path / "run" / "checkpoints", processes[0])
    os.kill(child_of(processes[victim].pid), signal.SIGKILL)
    killed = time.time()
    err = finish(processes[1 - victim], LOST, seconds=90)
    assert time.time() - killed < 90
    assert "another process of this run is gone" in err
    processes[victim].wait(30)


def test_sigterm_saves_and_the_same_command_goes_on(whole, tmp_path: Path) -> None:
    config, run = whole
    process = start(config, tmp_path)
    wait_for(tmp_path / "checkpoints", process)
    process.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM, all saved: the same command resumes at" in finish(process, 75)
    assert not (tmp_path / "bundle").exists()
    assert "resuming" in finish(start(config, tmp_path))
    assert_same_run(tmp_path, run)
