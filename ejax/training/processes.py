"""One process per host, and how a run ends before its end: told to stop, or a process is gone.

A process that has lost the first one is aborted from C++, without a word. So the training
runs in a child, and the parent says what happened.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ejax import storage
from ejax.errors import UserError

CHILD = "EJAX_TRAINING_PROCESS"
LOST = 76  # exit code: another process is gone, to be repeated
HEARTBEAT = 30  # seconds without a sign of life after which a process counts as dead
PATIENCE = 24 * 60 * 60 * 1000  # milliseconds at a barrier, where only signs of life count
GONE = (
    "another process of this run is gone. Start all of them again: they resume from the last "
    "checkpoint."
)
LOST_WORDS = ("Gloo", "closed by peer", "heartbeat", "DEADLINE_EXCEEDED", "UNAVAILABLE")


class Stopped(Exception):
    """SIGTERM came and everything is saved."""

    exit_code = 75  # EX_TEMPFAIL: not done, to be repeated


class Lost(Exception):
    """Another process of the run is gone."""

    exit_code = LOST


class Terminated:
    """Whether to stop, asked after every step; hosts of one run agree on the step."""

    def __enter__(self) -> "Terminated":
        import jax

        self.came = False
        self.alone = jax.process_count() == 1  # else jax watches for SIGTERM itself
        if self.alone and threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        if hasattr(self, "before"):
            signal.signal(signal.SIGTERM, self.before)

    def _note(self, *_: Any) -> None:
        self.came = True

    def at(self, step: int) -> bool:
        if self.alone:
            return self.came
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        return reached_preemption_sync_point(step)


def supervise(command: Sequence[str]) -> int:
    """Runs the command as a child, hands SIGTERM on, and returns its exit code.

    A child that jax has aborted because another process is gone gives `LOST`, and a line on
    standard error.
    """
    child = subprocess.Popen(command, env=os.environ | {CHILD: "1"})
    before = signal.signal(signal.SIGTERM, lambda *_: child.send_signal(signal.SIGTERM))
    try:
        code = child.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    if code == -signal.SIGABRT:
        print(f"train: {GONE}", file=sys.stderr)
        return LOST
    return code if code >= 0 else 128 - code


def join(run: Callable[[], None]) -> None:
    """`run` as one process of several.

    `jax.distributed` finds the others by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID where they are set, or else by itself on TPU pods, Slurm and Kubernetes.

    Raises:
      ValueError: where neither says who the others are.
      Lost: where a collective failed because a process is gone.
    """
    import jax

    try:
        numbers: dict[str, Any] = {
            name.lower(): int(os.environ[f"JAX_{name}"])
            for name in ("NUM_PROCESSES", "PROCESS_ID")
            if f"JAX_{name}" in os.environ
        }
        jax.distributed.initialize(
            **numbers, heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=HEARTBEAT
        )
    except ValueError as error:
        raise UserError(
            f"--distributed needs JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, "
            f"or a TPU pod, Slurm or Kubernetes that tell them. Got: {error}"
        ) from error
    try:
        run()
        barrier("finished")  # the first has more to do at the end than jax would wait for
    except jax.errors.JaxRuntimeError as error:
        if not any(word in str(error) for word in LOST_WORDS):
            raise
        raise Lost(f"{GONE} ({' '.join(str(error).split())[:200]})") from error


def barrier(name: str) -> None:
    """Waits for the other processes, however late one comes; one that died ends the wait.

    Not by a collective: those give up after half a minute, and one host may load or compile that
    much longer than another.
    """
    from orbax.checkpoint import multihost

    multihost.get_barrier_sync_fn()(key=name, timeout_ms=PATIENCE)


def made_by_first(path: Any, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What the first host makes once and keeps in the workdir, which all share.

    So a run that resumes has the same.
    """
    import jax
    from safetensors.numpy import load, save

    if jax.process_index() == 0 and not path.exists():
        # safetensors writes the memory as it lies, columns first where an array is so.
        made = {name: np.ascontiguousarray(array) for name, array in make().items()}
        storage.write_bytes(path, save(made))
    barrier(f"{path.name} is made")
    with storage.reaching(path):
        content = path.read_bytes()
    return load(content)


def leave(code: int) -> None:
    """Ends this process; after a failure at once, as jax would wait for the others."""
    if code and CHILD in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
