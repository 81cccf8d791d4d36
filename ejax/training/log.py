"""What a run writes while it goes, and whether it still makes sense."""

import json
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from ejax.data.batches import Step


class Log:
    """metrics.jsonl and TensorBoard files; `cut(step)` forgets what came after a step."""

    def __init__(self, workdir: Path) -> None:
        self.workdir = workdir
        self.path = workdir / "metrics.jsonl"
        self.file: TextIO | None = None  # none but on the first host, which alone writes

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.file:
            self.file.close()
            self.board.close()

    def cut(self, step: int) -> None:
        if jax.process_index() > 0:
            return
        from tensorboardX import SummaryWriter

        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        fresh = self.path.with_suffix(".tmp")
        fresh.write_text("".join(line + "\n" for line in kept))
        fresh.replace(self.path)
        self.file = self.path.open("a")
        self.board = SummaryWriter(str(self.workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, kind: str, metrics: dict[str, Any]) -> dict[str, Any]:
        values = {name: np.asarray(value).tolist() for name, value in metrics.items()}
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
            raise ValueError(
                f"training diverged at step {done} ({values}), on rows {shown} of train, counted "
                f"from 0. Lower learning_rate, in a new workdir; {workdir} keeps the last good "
                f"checkpoint."
            )
