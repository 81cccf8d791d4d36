"""The training loop: its steps, and around them logs, evaluation, checkpoints, early stopping.

Axes: E exits, N rows, C classes.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ejax.calibration.decisions import fit_decisions
from ejax.config import TrainConfig, epochs_of
from ejax.data.batches import Step, take, train_plan
from ejax.data.rows import TokenizedSplit
from ejax.tasks import task_of
from ejax.training.checkpoint import METRIC, Checkpoints, alone_in
from ejax.training.log import Callback, Log, check_finite, with_wandb
from ejax.training.optim import make_optimizer
from ejax.training.parallel import make_all_logits, parallel_step, place
from ejax.training.processes import Stopped, Terminated
from ejax.training.setup import Setup, blank_params
from ejax.training.step import Rows, TrainState, first_state, make_train_step
from ejax.training.warm import warm_start

LOG_STEPS = 20

Logits = Callable[[TokenizedSplit, Any], np.ndarray]


class Trained(NamedTuple):
    """What the loop leaves."""

    params: Any  # of the best checkpoint, on the host
    best_step: int
    first_step: int  # where this run went on from
    last_step: int  # before the end where dev-A had not been better for `patience` evaluations


def make_logits(setup: Setup) -> Logits:
    """A function (split, params) -> logits of the exits after layers, float32 [E, N, C]."""
    config, all_logits = setup.config, make_all_logits(setup.model)
    micro_batch = -(-config.batch_size // (jax.device_count() * config.accumulate))

    def logits(split: TokenizedSplit, params: Any) -> np.ndarray:
        batch_size = 4 * micro_batch * jax.local_device_count()  # hosts take turns
        plan = setup.eval_plan(split.encoded, batch_size)
        return all_logits({"params": params}, split.encoded, plan)

    return logits


def train(
    setup: Setup,
    logits_of: Logits,
    workdir: Any,
    console: Console,
    callbacks: Sequence[Callback] = (),
) -> Trained:
    """Runs the steps that are left.

    Args:
      logits_of: as `make_logits` gives it.
      callbacks: they hear of what is logged.

    Raises:
      ValueError: where another training runs in the workdir, or this one diverges.
      Stopped: after SIGTERM, once all is saved.
    """
    config, split = setup.config, setup.train
    per_epoch = -(-len(split.labels) // config.batch_size)
    total = epochs_of(config, len(split.labels)) * per_epoch
    optimizer = make_optimizer(config, total)
    run_step = parallel_step(
        make_train_step(setup.model, optimizer, config),
        parallel=config.parallel,
        accumulate=config.accumulate,
    )
    with (
        alone_in(workdir),
        Checkpoints(workdir) as checkpoints,
        with_wandb(config, workdir, callbacks) as told,
        Log(workdir, told) as log,
        Terminated() as terminated,
        progress_bar(console) as bar,
    ):
        fresh = checkpoints.none
        params = warm_start(setup, console) if fresh else blank_params(setup.model)
        state = place(first_state(params, optimizer, config), config.parallel)
        first, state = checkpoints.restore_newest(state)
        log.cut(first)
        if not fresh:
            console.print(f"resuming {workdir} from step {first} of {total}", markup=False)
        hooks = Hooks(
            config, total, workdir, task_of(setup.exits).metric_name,
            partial(dev_a_scores, setup, logits_of),
            checkpoints, log, terminated, bar, console,
        )  # fmt: skip
        hooks.start(first, state if fresh else None)
        last = first
        for planned, rows in batches(setup, first, per_epoch, total):
            if hooks.stopped_early(last):
                break
            state, metrics = run_step(state, rows)
            last += 1
            hooks.after(last, planned, state, metrics)
        best, state = checkpoints.restore_best(state)
        return Trained(jax.device_get(state.kept), best, first, last)


def batches(setup: Setup, first: int, per_epoch: int, total: int) -> Iterator[tuple[Step, Rows]]:
    """The batches of the steps from `first` on: a function of seed and step alone."""
    config, split = setup.config, setup.train
    for step in range(first, total):
        epoch, position = divmod(step, per_epoch)
        if position == 0 or step == first:
            plan = train_plan(
                split.encoded.lengths,
                buckets=setup.buckets,
                max_length=setup.max_length,
                batch_size=config.batch_size,
                seed=config.seed,
                epoch=epoch,
            )
        planned = plan[position]
        batch, labels, weights = take(split.encoded, split.labels, planned)
        numbers = np.maximum(planned.rows, 0).astype(np.int32)
        teacher = None if split.teacher is None else split.teacher[numbers]
        yield planned, Rows(batch, labels, weights, numbers, teacher)


def dev_a_scores(setup: Setup, logits_of: Logits, params: Any) -> dict[str, float]:
    """The metric per exit on dev-A; its mean over the exits that are trained picks the checkpoint.

    Several labels at once are decided by thresholds fitted to these rows.
    """
    dev_a, task = setup.held_out["dev_a"], task_of(setup.exits)
    logits = logits_of(dev_a, params)
    several = task.answer_ndim == 2
    each = fit_decisions(logits, dev_a.labels) if several else [task.uncalibrated] * len(logits)
    per_exit = [
        task.measure(task.answers(*of_exit), dev_a.labels)
        for of_exit in zip(logits, each, strict=True)
    ]
    names = [f"{task.metric}/layer_{layer}" for layer in setup.exits.encoder.layers]
    trained = np.array(setup.config.exit_weights or [1.0] * len(per_exit)) > 0
    mean = float(np.mean(np.array(per_exit)[trained]))
    return dict(zip(names, per_exit, strict=True)) | {METRIC: mean}


@dataclasses.dataclass
class Hooks:
    """What happens before, between and after the steps of a run."""

    config: TrainConfig
    total: int  # steps
    workdir: Any
    metric: str  # in words
    scores_of: Callable[[Any], dict[str, float]]  # of params, on dev-A
    checkpoints: Checkpoints
    log: Log
    terminated: Terminated
    bar: Progress
    console: Console

    def start(self, first: int, fresh: TrainState | None) -> None:
        """Before the first step; a fresh run first says what training is to improve."""
        evals = self.config.evals
        self.eval_steps = {-(-i * self.total // evals) for i in range(1, evals + 1)}
        self.best_score, self.best_step = self.checkpoints.best()
        self.unchecked: list[tuple[int, Step, dict[str, Any]]] = []
        if fresh is not None:
            self.save(0, fresh, self.evaluate(0, fresh))
        self.shown = self.bar.add_task("training", total=self.total, completed=first)

    def stopped_early(self, step: int) -> bool:
        """Whether dev-A has not been better for `patience` evaluations.

        Not while the heads on the encoder as it came are best: what the encoder loses where the
        rate is highest, it gains back where that falls.
        """
        since_best = sum(self.best_step < at <= step for at in self.eval_steps)
        waits = self.config.train_encoder and not self.best_step
        if not self.config.patience or waits or since_best < self.config.patience:
            return False
        self.console.print(f"stopped at step {step}: dev-A was best at step {self.best_step}")
        return True

    def after(self, step: int, planned: Step, state: TrainState, metrics: dict[str, Any]) -> None:
        """After a step: all that is due at it.

        Raises:
          ValueError: where the run has diverged.
          Stopped: after SIGTERM, once all is saved.
        """
        self.unchecked.append((step, planned, metrics))
        evaluates = step in self.eval_steps
        saves = evaluates or step % self.config.checkpoint_steps == 0
        logs = saves or step % LOG_STEPS == 0
        stops = self.terminated.at(step)
        if logs or stops:
            check_finite(self.unchecked, self.workdir)  # nothing is saved that has diverged
            self.unchecked.clear()
        if logs:
            line = self.log.write(step, "train", metrics)
            self.bar.update(self.shown, description=f"training, loss {line['loss']:.3f}")
        self.bar.update(self.shown, completed=step)
        scores = self.evaluate(step, state) if evaluates else None
        if saves or stops:
            self.save(step, state, scores)
        if stops and step < self.total:
            raise Stopped(f"stopped by SIGTERM, all saved: the same command resumes at {step}.")

    def evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        """The scores on dev-A, logged and shown."""
        scores = self.scores_of(state.kept)
        self.log.write(step, "dev_a", scores)
        if scores[METRIC] >= self.best_score:
            self.best_score, self.best_step = scores[METRIC], step
        cells = " ".join(f"{score:.3f}" for name, score in scores.items() if name != METRIC)
        self.console.print(f"step {step}: dev-A {self.metric} per exit {cells}")
        return scores

    def save(self, step: int, state: TrainState, scores: dict[str, float] | None) -> None:
        """A checkpoint, which without scores is there for resuming alone."""
        self.log.sync()  # a run that resumes here finds the lines so far
        self.checkpoints.save(step, state, scores)


def progress_bar(console: Console) -> Progress:
    """How far something of known length is, gone once it is done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
