"""Orbax checkpoints: the newest for resuming, the best for the bundle."""

import fcntl
import json
import math
import shutil
import time
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from ejax import storage
from ejax.config import TrainConfig, to_json
from ejax.errors import UserError
from ejax.hardware import environment
from ejax.training.processes import barrier

METRIC = "mean_accuracy"
NONE = -1.0  # of a checkpoint that was not evaluated; a correlation may be below 0
SEEN_WITHIN = 60  # seconds for which an NFS client may remember that a file was not there
COMMITTED = "commit_success.txt"  # what Orbax writes last where a rename is not atomic
# How a run is carried, not what it computes: it may go on with others. Where files lie is one of
# them: the fingerprints of their rows are compared. A named set has an order of labels of its own.
CARRIED = (
    "parallel", "accumulate", "remat", "checkpoint_steps", "data.cache_dir", "data.path",
    "data.train", "data.dev", "data.test", "data.unlabelled", "wandb_project",
)  # fmt: skip

GONE = {"alternate": False}  # fields that older configs hold, with the value that changed nothing


class Checkpoints:
    """What a run saves under `workdir/checkpoints`; use as a context manager.

    Saving goes on in the background. `save(step, state, metrics)` with metrics
    {"mean_accuracy": …} competes for the best; of equal ones the later wins. Without
    metrics it counts as the worst. The best and the two newest are kept, and each holds
    a checksum of every array, so that a damaged one is known and set aside.
    """

    def __init__(self, workdir: Any) -> None:
        self.workdir = workdir if storage.is_remote(workdir) else workdir.absolute()
        self.folder = self.workdir / "checkpoints"
        unscored: dict[int, Exception] = {}
        for step in self._steps_on_disk():
            try:
                _score(json.loads((self.folder / str(step) / "metrics" / "metrics").read_text()))
            except (OSError, ValueError, LookupError, TypeError) as error:  # Orbax would open none
                if not storage.is_damage(error):
                    raise
                unscored[step] = error
        barrier("looked")  # every host before one moves anything
        for step, problem in unscored.items():
            self._set_aside(step, problem)
        barrier("set aside")
        policy = AnyPreservationPolicy([LatestN(2), BestN(get_metric_fn=_score, n=1)])
        with storage.reaching(self.folder):
            self.manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=policy, best_fn=_score, cleanup_tmp_directories=True
                ),
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.manager.wait_until_finished()
        self.manager.close()

    def save(self, step: int, state: Any, metrics: dict[str, float] | None = None) -> None:
        """Args: state: whole on every local device, and the same on every host."""
        need = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        remote = storage.is_remote(self.workdir)
        free = math.inf if remote else shutil.disk_usage(self.workdir).free
        if free < 1.1 * need:
            raise UserError(
                f"{self.workdir} has {free / 1e6:.0f} MB free and a checkpoint needs "
                f"{need / 1e6:.0f} MB: make room and repeat the command, which resumes."
            )
        metrics = metrics or {METRIC: NONE}
        about = {
            "checksums": checksums(state),
            "metrics": metrics,
            "versions": environment()["versions"],
        }
        self.manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(to_global(state)),
                about=ocp.args.JsonSave(about),
            ),
            metrics=metrics,
        )

    def restore(self, step: int, like: Any) -> Any:
        """The state saved at `step`, with the shapes, types and placement of `like`.

        Every host reads alone: one that cannot leaves nobody waiting.

        Raises:
          ValueError: when it is not what was saved.
        """
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"host{me}"
        )
        handler = ocp.CompositeCheckpointHandler(
            state=ocp.StandardCheckpointHandler(multiprocessing_options=alone),
            about=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
            composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
        )
        blank = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
            found = reader.restore(
                self.folder / str(step),
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(blank), about=ocp.args.JsonRestore()
                ),
            )
        wanted = found["about"]["checksums"] | found["about"]["metrics"]
        read = checksums(found["state"]) | dict(self.manager.metrics(step))
        differ = [name for name, value in read.items() if wanted.get(name) != value]
        if differ:
            raise UserError(f"checkpoint {step}: {differ[0]} is not what was saved")
        return jax.tree.map(_placed, found["state"], like)

    @property
    def none(self) -> bool:
        """Whether nothing was saved yet."""
        return not self.manager.all_steps()

    def best(self) -> tuple[float, int]:
        """(score, step) of the best one that was evaluated; (-1, 0) where there is none."""
        steps = self._best_first()
        score = _score(self.manager.metrics(steps[0])) if steps else NONE
        return (score, steps[0]) if score > NONE else (NONE, 0)

    def restore_newest(self, like: Any) -> tuple[int, Any]:
        """(step, state) of the newest that can be read, (0, `like`) where there is none.

        Newer ones that cannot be read are moved to `workdir/damaged`, with a warning.

        Raises:
          ValueError: where there are some and none can be read; nothing is moved then.
        """
        steps = _as_the_first(sorted(self.manager.all_steps(), reverse=True))
        return self._first_readable(steps, like) if steps else (0, like)

    def restore_best(self, like: Any) -> tuple[int, Any]:
        """(step, state) of the best that can be read.

        Better ones that cannot be read are moved to `workdir/damaged`, with a warning.

        Raises:
          ValueError: where none can be read; nothing is moved then.
        """
        self.manager.wait_until_finished()
        return self._first_readable(self._best_first(), like)

    def _first_readable(self, steps: list[int], like: Any) -> tuple[int, Any]:
        problems: dict[int, Any] = {}
        for step in steps:
            state, problem = self._try(step, like)
            if problem is None:
                for worse, why in problems.items():
                    self._set_aside(worse, why)
                barrier("set aside")
                if problems:
                    self.manager.reload()
                return step, state
            problems[step] = problem
        step, why = next(iter(problems.items()), (0, "there is none"))
        raise UserError(
            f"{self.folder} holds checkpoints that cannot be read (step {step}: {_short(why)}): "
            f"mend it, or move it away to start anew."
        )

    def _best_first(self) -> list[int]:
        """The steps, those whose score cannot be read first: to be tried, and found damaged."""

        def score(step: int) -> tuple[float, int]:
            try:
                return _score(self.manager.metrics(step)), step
            except Exception as error:  # damage shows in many ways
                if not storage.is_damage(error):
                    raise
                return math.inf, step

        return _as_the_first(sorted(self.manager.all_steps(), key=score, reverse=True))

    def _try(self, step: int, like: Any) -> tuple[Any, Any]:
        """(state, None), or (None, why some host cannot read it)."""
        try:
            state, problem = self.restore(step, like), None
        except Exception as error:  # damage shows in many ways
            if not storage.is_damage(error):
                raise
            state, problem = None, error
        if _all_hosts(problem is None):
            return state, None
        return None, problem or "another host cannot read it"

    def _steps_on_disk(self) -> list[int]:
        """Those that were saved to their end: on gs:// a marker says so, elsewhere the name."""
        paths = self.folder.iterdir() if self.folder.exists() else ()
        steps = [path for path in paths if path.name.isdigit()]
        if storage.is_remote(self.folder):
            steps = [path for path in steps if (path / COMMITTED).exists()]
        return [int(path.name) for path in steps]

    def _set_aside(self, step: int, problem: Any) -> None:
        source, target = self.folder / str(step), self.workdir / "damaged" / str(step)
        if jax.process_index() == 0:
            storage.move(source, target)
        warnings.warn(
            f"{source} is damaged ({_short(problem)}): moved to {target}, the next best or "
            f"next newest is used.",
            stacklevel=3,
        )


def _short(problem: Any) -> str:
    return " ".join(str(problem).split())[:200]


def checksums(state: Any) -> dict[str, int]:
    """CRC-32 of every array, by its path; a scalar's bytes are its array's."""
    return {
        jax.tree_util.keystr(path): zlib.crc32(np.ascontiguousarray(jax.device_get(leaf)))
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def to_global(state: Any) -> Any:
    """Arrays of this host's devices -> arrays of all hosts' devices, as Orbax wants them."""
    if jax.process_count() == 1:
        return state
    devices = jax.sharding.Mesh(np.asarray(jax.devices()), ("devices",))
    whole = jax.sharding.PartitionSpec()
    return multihost_utils.host_local_array_to_global_array(state, devices, whole)


def _placed(array: np.ndarray, like: Any) -> jax.Array:
    """On the devices of `like`, of which each host fills its own."""
    return jax.make_array_from_callback(array.shape, like.sharding, lambda part: array[part])


def _as_the_first(steps: list[int]) -> list[int]:
    """The steps that the first host sees, for all hosts to try in its order."""
    if jax.process_count() == 1:
        return steps
    barrier("listed")
    sent = np.full(64, -1, np.int32)  # far more than are ever kept
    sent[: len(steps)] = steps[: sent.size]
    return [int(step) for step in multihost_utils.broadcast_one_to_all(sent) if step >= 0]


def _all_hosts(yes: bool) -> bool:
    if jax.process_count() == 1:
        return yes
    barrier("asked")
    return bool(np.all(multihost_utils.process_allgather(np.array(yes))))


def _score(metrics: Any) -> float:
    return float(metrics[METRIC])


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """A config with the fields of `data` and `rows` among the others, as "data.path"."""
    made: dict[str, Any] = {}
    for key, value in config.items():
        nested = value if isinstance(value, dict) else {}
        made |= {f"{key}.{name}": part for name, part in nested.items()} or {key: value}
    return made


def claim_workdir(workdir: Any, config: TrainConfig, data: dict[str, str]) -> None:
    """Writes the config into a new workdir; refuses one of another config or other rows.

    Args:
      data: a fingerprint of the rows of each split.

    Raises:
      ValueError: naming the fields that differ from what the workdir belongs to, or among hosts.
    """
    path = workdir / "config.json"
    mine = json.loads(json.dumps(to_json(config) | {"rows": data}))
    default = json.loads(json.dumps(to_json(TrainConfig())))
    with storage.reaching(path):
        text = path.read_text() if path.exists() else json.dumps(mine)
    try:
        theirs = _flat(json.loads(text))
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({error}): restore it, or choose a new workdir."
        ) from error
    asked, was = GONE | _flat(mine), GONE | _flat(default) | theirs  # a field may be newer
    differ = [key for key in asked | was if key not in CARRIED and asked.get(key) != was.get(key)]
    if differ:
        raise UserError(
            f"{workdir} belongs to another training config (it differs in "
            f"{', '.join(differ)}): choose a new workdir, or repeat the first command."
        )
    barrier("claim")  # every host has looked before one writes
    check_alike(mine)
    if jax.process_index() == 0 and not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        storage.write_text(path, json.dumps(mine, indent=2) + "\n")
    barrier("claimed")
    for _ in range(SEEN_WITHIN):
        if path.exists():
            return
        time.sleep(1)
    raise UserError(f"{workdir} must be a folder that all hosts share; this one sees none.")


@contextmanager
def alone_in(workdir: Any) -> Iterator[None]:
    """Keeps a second training out of a workdir; a process that dies lets go of it.

    On gs://, and on a disk that knows no locks, nothing is held.

    Raises:
      ValueError: when another training runs there.
    """
    if storage.is_remote(workdir) or jax.process_index() > 0:
        yield
        return
    with (workdir / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another training runs in {workdir}: wait until it ends, or choose a new workdir."
            ) from None
        except OSError:  # a disk that knows no locks, as Lustre may be mounted
            pass
        yield


def check_alike(config: dict[str, Any]) -> None:
    """Raises ValueError, on every host, where hosts differ in more than where their files lie."""
    if jax.process_count() == 1:
        return
    data = {key: value for key, value in config["data"].items() if f"data.{key}" not in CARRIED}
    fields = config | {"data": data}
    mine = [zlib.crc32(json.dumps(value).encode()) for value in fields.values()]
    every = np.asarray(multihost_utils.process_allgather(np.array(mine, np.uint32)))
    differ = [name for name, of in zip(fields, every.T, strict=True) if len(set(of.tolist())) > 1]
    if differ:
        raise UserError(
            f"the hosts must train alike; they differ in {', '.join(differ)}: start all of them "
            f"with one command."
        )
