"""One training step of one device; the devices add their sums and counts.

Axes: E exits, B rows of this device, C classes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ejax.config import TrainConfig
from ejax.models.bert import Batch
from ejax.models.early_exit import EarlyExitBert
from ejax.tasks import Task, task_of
from ejax.training.losses import joint_loss

Array = jax.Array
AXIS = "devices"


class TrainState(NamedTuple):
    params: Any
    opt_state: Any
    step: Any  # int32, steps taken
    average: Any  # of the params over the steps; () where none is kept

    @property
    def kept(self) -> Any:
        """The params to evaluate and to keep."""
        return self.average or self.params


class Rows(NamedTuple):
    """One batch of rows to learn from."""

    batch: Batch  # int32 [B, T] each
    labels: Any  # int32 [B], -1 for a row without one
    weights: Any  # float32 [B], 0 for padding
    numbers: Any  # int32 [B], the row's place in the data set: what dropout depends on
    teacher: Any = None  # float32 [B, C], its probabilities; None where there is no teacher


def first_state(
    params: Any, optimizer: optax.GradientTransformation, config: TrainConfig
) -> TrainState:
    """Before the first step, on the host."""
    average = jax.tree.map(np.array, params) if config.average_decay else ()
    return TrainState(params, optimizer.init(params), np.int32(0), average)


def make_train_step(
    model: EarlyExitBert, optimizer: optax.GradientTransformation, config: TrainConfig
) -> Callable[[TrainState, Rows], tuple[TrainState, dict[str, Array]]]:
    """The per-device step, to run under an axis named `AXIS`.

    Gradients are the psum of sums over the psum of counts, so that the result does
    not depend on how rows and padding fall on the devices, nor on the number of
    micro-batches (`accumulate`). Dropout keys are
    `fold_in(fold_in(root, step), row)`. With `average_decay` the running mean of the weights
    is kept too (Polyak and Juditsky, 1992; Izmailov et al., UAI 2018).

    Returns:
      A function (state, rows) -> (state, metrics), with metrics `loss` (joint, mean
      over rows), `exit_loss` and, of one label, `exit_accuracy` [E] (mean over the rows with a
      label; NaN where there are none), `gradient_norm`.
    """

    task = task_of(model.exits)

    def sums(params: Any, step: Array, rows: Rows) -> Any:
        """Of these rows: the gradient of their summed loss, that loss, its count, per exit."""
        root = jax.random.fold_in(jax.random.key(config.seed), step)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(root, rows.numbers)

        def local_loss(params: Any) -> tuple[Array, tuple[Array, Array]]:
            still = jax.lax.stop_gradient(params["bert"])
            if not config.train_encoder:
                params = params | {"bert": still}
            elif not config.train_embeddings:
                embeddings = {"embeddings": still["embeddings"]}
                params = params | {"bert": params["bert"] | embeddings}
            logits: Any = model.apply({"params": params}, rows.batch, keys=keys)
            loss, count = joint_loss(
                logits,
                rows.labels,
                rows.weights,
                exit_weights=config.exit_weights,
                class_weights=config.weights_of_classes,
                distillation=config.distillation,
                teacher=rows.teacher,
                task=task,
            )
            return loss, (count, logits)

        (loss, (count, logits)), grads = jax.value_and_grad(local_loss, has_aux=True)(params)
        return grads, loss, count, exit_sums(task, logits, rows)

    def all_sums(params: Any, step: Array, rows: Rows) -> Any:
        if config.accumulate == 1:
            return sums(params, step, rows)
        parts = jax.tree.map(lambda x: x.reshape(config.accumulate, -1, *x.shape[1:]), rows)
        like = jax.eval_shape(sums, params, step, jax.tree.map(lambda x: x[0], parts))
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

        def add(total: Any, part: Rows) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, sums(params, step, part)), None

        return jax.lax.scan(add, zero, parts)[0]

    def step(state: TrainState, rows: Rows) -> tuple[TrainState, dict[str, Array]]:
        total = jax.lax.psum(all_sums(state.params, state.step, rows), AXIS)
        grads, loss, count, (of_exits, real) = total
        grads = jax.tree.map(lambda g: g / jnp.maximum(count, 1e-9), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {
            "loss": loss / jnp.maximum(count, 1e-9),
            **{name: total_of / real for name, total_of in of_exits.items()},
            "gradient_norm": optax.tree.norm(grads),
        }
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if config.average_decay:
            # Early on the mean is over few steps, as in TensorFlow's moving averages.
            few = (1.0 + state.step) / (10.0 + state.step)
            decay = jnp.minimum(config.average_decay, few)
            average = optax.incremental_update(params, average, 1 - decay)
        return TrainState(params, opt_state, state.step + 1, average), metrics

    return step


def exit_sums(task: Task, logits: Array, rows: Rows) -> tuple[dict[str, Array], Array]:
    """Per exit the summed loss, and of one label the correct rows, [E]; the rows with a label."""
    weights = rows.weights * task.has_label(rows.labels)
    sums = {"exit_loss": (task.losses(logits, rows.labels) * weights[None]).sum(axis=1)}
    if task.metric == "accuracy":
        correct = (logits.argmax(axis=-1) == rows.labels[None]).astype(jnp.float32)
        sums["exit_accuracy"] = (correct * weights[None]).sum(axis=1)
    return sums, weights.sum()
