"""Orbax checkpoints: the newest for resuming, the best for the bundle."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    BestN,
    LatestN,
)

from ejax.config import TrainConfig, to_json

METRIC = "mean_accuracy"


class Checkpoints:
    """What a run saves under `workdir/checkpoints`; use as a context manager.

    `save(step, state, metrics)` with metrics {"mean_accuracy": …} competes for the
    best; of equal ones the later wins. Without metrics it counts as the worst.
    """

    def __init__(self, workdir: Path) -> None:
        policy = AnyPreservationPolicy([LatestN(1), BestN(get_metric_fn=_score, n=1)])
        self.workdir = workdir
        self.manager = ocp.CheckpointManager(
            (workdir / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(preservation_policy=policy, best_fn=_score),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.manager.wait_until_finished()
        self.manager.close()

    def save(self, step: int, state: Any, metrics: dict[str, float] | None = None) -> None:
        need = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.workdir).free
        if free < 1.1 * need:
            raise ValueError(
                f"{self.workdir} has {free / 1e6:.0f} MB free and a checkpoint needs "
                f"{need / 1e6:.0f} MB: make room and repeat the command, which resumes."
            )
        self.manager.save(
            step, args=ocp.args.StandardSave(state), metrics=metrics or {METRIC: -1.0}
        )

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def best(self) -> int:
        self.manager.wait_until_finished()
        step = self.manager.best_step()
        if step is None:
            raise ValueError(f"{self.manager.directory} holds no checkpoint.")
        return step

    def restore(self, step: int, like: Any) -> Any:
        """The state saved at `step`, with the shapes, types and placement of `like`."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self.manager.restore(step, args=ocp.args.StandardRestore(abstract))


def _score(metrics: Any) -> float:
    return metrics[METRIC]


def claim_workdir(workdir: Path, config: TrainConfig, data: dict[str, str]) -> None:
    """Writes the config into a new workdir; refuses one of another config or other rows.

    Args:
      data: a fingerprint of the rows of each split.

    Raises:
      ValueError: naming the fields that differ.
    """
    path = workdir / "config.json"
    mine = json.loads(json.dumps(to_json(config) | {"rows": data}))
    if path.exists():
        theirs = json.loads(path.read_text())
        differ = [key for key in mine | theirs if mine.get(key) != theirs.get(key)]
        if differ:
            raise ValueError(
                f"{workdir} belongs to another training config (it differs in "
                f"{', '.join(differ)}): choose a new workdir, or repeat the first command."
            )
        return
    workdir.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(mine, indent=2) + "\n")
    fresh.replace(path)
