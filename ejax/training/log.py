"""What a run writes while it goes, and whether it still makes sense."""

import json
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, TextIO

import jax
import numpy as np

from ejax import storage
from ejax.config import TrainConfig, to_json
from ejax.data.batches import Step
from ejax.errors import UserError


class Callback(Protocol):
    """What hears of a training while it goes, on the first host alone."""

    def on_log(self, step: int, kind: str, metrics: dict[str, Any]) -> None:
        """A line of metrics.jsonl.

        Args:
          step: from 0; a run that resumes may tell some steps again.
          kind: "train" or "dev_a".
          metrics: finite numbers, or lists of them with one per exit.
        """


class WandbCallback:
    """Sends the metrics to a run of Weights & Biases, as `wandb.init` gives it."""

    def __init__(self, run: Any) -> None:
        self.run = run
        run.define_metric("*", step_metric="step")  # its own must never go back

    def on_log(self, step: int, kind: str, metrics: dict[str, Any]) -> None:
        self.run.log(
            {f"{kind}/{name}": value for name, value in _scalars(metrics)} | {"step": step}
        )


@contextmanager
def with_wandb(
    config: TrainConfig, workdir: Any, callbacks: Sequence[Callback]
) -> Iterator[Sequence[Callback]]:
    """The callbacks, and a `WandbCallback` where the config names a project.

    A training that resumes goes on in the run whose id its workdir holds.

    Raises:
      ValueError: where wandb is not installed.
    """
    if not config.wandb_project or jax.process_index() > 0:
        yield callbacks
        return
    try:
        import wandb
    except ImportError:
        raise UserError(
            "wandb_project needs Weights & Biases, which is not installed: `pip install wandb`."
        ) from None
    path = workdir / "wandb_id"
    if not path.exists():
        storage.write_text(path, secrets.token_hex(8))
    with wandb.init(
        project=config.wandb_project, id=path.read_text(), resume="allow", config=to_json(config)
    ) as run:
        yield [*callbacks, WandbCallback(run)]


class Log:
    """metrics.jsonl and TensorBoard files; `cut(step)` forgets what came after a step.

    Those of a workdir on gs:// are written here and copied there by `sync`, as nothing can be
    appended to an object.
    """

    def __init__(self, workdir: Any, callbacks: Sequence[Callback] = ()) -> None:
        self.workdir, self.callbacks = workdir, callbacks
        self.path = workdir / "metrics.jsonl"
        self.local = Path(workdir)
        if storage.is_remote(workdir):
            self.copy = TemporaryDirectory(prefix="ejax-log-")
            self.local = Path(self.copy.name)
        self.file: TextIO | None = None  # none but on the first host, which alone writes

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.file:
            self.file.close()
            self.board.close()
            self.sync()
        if storage.is_remote(self.workdir):
            self.copy.cleanup()

    def sync(self) -> None:
        if self.file and storage.is_remote(self.workdir):
            self.board.flush()
            storage.upload(self.local, self.workdir)

    def cut(self, step: int) -> None:
        if jax.process_index() > 0:
            return
        from tensorboardX import SummaryWriter

        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        path = self.local / self.path.name
        storage.write_text(path, "".join(line + "\n" for line in kept))
        self.file = path.open("a")
        self.board = SummaryWriter(str(self.local / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, kind: str, metrics: dict[str, Any]) -> dict[str, Any]:
        arrays = {name: np.asarray(value) for name, value in metrics.items()}
        # A batch without labels has no accuracy, and JSON no NaN.
        values = {
            name: value.tolist() for name, value in arrays.items() if not np.isnan(value).any()
        }
        if not self.file:
            return values
        self.file.write(json.dumps({"step": step, "kind": kind} | values) + "\n")
        self.file.flush()
        for name, value in _scalars(values):
            self.board.add_scalar(f"{kind}/{name}", value, step)
        for callback in self.callbacks:
            callback.on_log(step, kind, values)
        return values


def _scalars(metrics: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Those of a list are numbered from 0."""
    for name, value in metrics.items():
        for i, item in enumerate(np.ravel(value).tolist()):
            yield f"{name}/{i}" if np.ndim(value) else name, item


def check_finite(held: list[tuple[int, Step, dict[str, Any]]], workdir: Path) -> None:
    """Raises ValueError for the first step whose loss or gradient is not finite."""
    names = ("loss", "gradient_norm")
    found = jax.device_get([{name: metrics[name] for name in names} for _, _, metrics in held])
    for (done, batch, _), metrics in zip(held, found, strict=True):
        values = {name: float(metrics[name]) for name in names}
        if not all(np.isfinite(list(values.values()))):
            rows = sorted(int(row) for row in batch.rows if row >= 0)
            shown = ", ".join(map(str, rows[:8])) + (", …" if len(rows) > 8 else "")
            raise UserError(
                f"training diverged at step {done} ({values}), on rows {shown} of train, counted "
                f"from 0. Lower learning_rate, in a new workdir; {workdir} keeps the last good "
                f"checkpoint."
            )
