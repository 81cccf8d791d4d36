"""The joint loss of all exits.

Axes: E exits, B batch, C classes.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from ejax.tasks import Task

Array = jax.Array


def joint_loss(
    logits: Array,
    labels: Array,
    weights: Array,
    *,
    exit_weights: Any = (),
    class_weights: tuple[float, ...] = (),
    distillation: float = 0.0,
    teacher: Array | None = None,
    task: Task | None = None,
) -> tuple[Array, Array]:
    """The sum of the exits' losses, as a sum over rows and its count.

    `loss / count` is the mean over rows; both add up over devices, so that uneven
    masks stay exact. Schwartz et al. (ACL 2020), section 3.1; with class weights
    the mean is over the weights, as in scikit-learn and PyTorch.

    With `distillation` each exit also learns from a teacher that is not taught back: that many
    times KL(teacher || exit) is added to its loss, and is all the loss of a row without a label.
    Without a `teacher` it is the last exit, which then learns from labels alone. Liu et al.,
    "FastBERT" (ACL 2020), section 3.2.2, here in the same training as the rest, as in Geng et
    al., "RomeBERT" (2021). With class weights a row without a label counts the mean of them
    under its teacher's probabilities.

    Args:
      logits: float32 [E, B, O].
      labels: as the task has them, see `ejax.data.rows.TokenizedSplit`.
      weights: float32 [B], 1 for a real row and 0 for padding.
      exit_weights: one per exit; () means 1 each.
      class_weights: one per class; () means 1 each.
      distillation: 0 means none.
      teacher: its `Task.beliefs`, float32 [B, ...]; None means those of the last exit.
      task: None means one of several labels.

    Returns:
      float32 scalars (loss, count).

    >>> logits = jnp.zeros((2, 3, 4))
    >>> loss, count = joint_loss(logits, jnp.zeros(3, jnp.int32), jnp.array([1.0, 1.0, 0.0]))
    >>> round(float(loss / count), 3) == round(2 * float(jnp.log(4)), 3)
    True
    """
    task = task or Task(logits.shape[-1])
    chex.assert_shape(logits, (None, *weights.shape, task.outputs))
    has_label = task.has_label(labels)
    if teacher is None:
        teacher = task.beliefs(jax.lax.stop_gradient(logits[-1]))
    if class_weights:
        each = jnp.asarray(class_weights, jnp.float32)
        weights = weights * jnp.where(has_label, each[labels], teacher @ each)
    rows = task.losses(logits, labels)
    if distillation:  # of the last exit as its own teacher: 0
        rows = rows + distillation * task.distances(logits, teacher)
    per_exit = (rows * weights[None]).sum(axis=1)
    scale = jnp.asarray(exit_weights if len(exit_weights) else jnp.ones(logits.shape[0]))
    return (per_exit * scale).sum(), weights.sum()
