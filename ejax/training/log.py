"""What a run writes while it goes, and whether it still makes sense."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

import jax
import numpy as np

from ejax import storage
from ejax.data.batches import Step
from ejax.errors import UserError


class Log:
    """metrics.jsonl and TensorBoard files; `cut(step)` forgets what came after a step.

    Those of a workdir on gs:// are written here and copied there by `sync`, as nothing can be
    appended to an object.
    """

    def __init__(self, workdir: Any) -> None:
        self.workdir = workdir
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
        for name, value in values.items():
            for i, item in enumerate(np.ravel(value)):
                suffix = f"/{i}" if np.ndim(value) else ""
                self.board.add_scalar(f"{kind}/{name}{suffix}", item, step)
        return values


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
