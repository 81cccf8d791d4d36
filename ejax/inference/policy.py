"""The exit rule, and the plain reference that the engine is tested against.

Axes: N rows, E exits, C classes.
"""

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ejax.errors import UserError
from ejax.tasks import Task

if TYPE_CHECKING:  # a runtime without jax has these rules too
    from jax import Array

ABOVE_1 = np.nextafter(np.float32(1), np.float32(2))


class Decision(NamedTuple):
    """What early exit answers, one entry per row."""

    logits: Any  # float32 [N, C], of the exit taken, before temperature
    exit: Any  # int32 [N], index into ExitConfig.layers
    score: Any  # float32 [N], its score at that exit


def select_exit(
    logits: Any, thresholds: Any, temperatures: Any = None, *, task: Task | None = None
) -> Decision:
    """The first exit whose score reaches its threshold; else the last one.

    Args:
      logits: float32 [E, N, C], every exit's.
      thresholds: a number, [E] (one per exit) or [N, E].
      temperatures: the calibration: float32 [E], positive, or [E, K]; None means none.
      task: None means one of several labels.

    Raises:
      ValueError: on a wrong shape, a threshold that is not a number.
    """
    import jax.numpy as jnp

    logits = jnp.asarray(logits, jnp.float32)
    if logits.ndim != 3:
        raise UserError(f"logits must have shape [E, N, C]. Got {logits.shape}.")
    exits, rows, _ = logits.shape
    thresholds = broadcast_thresholds(thresholds, rows, exits)
    task = task or Task(logits.shape[-1])
    calibration = check_calibration(task, temperatures, exits)
    scores = exit_scores(task, logits, calibration)
    leave = (scores >= thresholds.T).at[-1].set(True)
    exit = jnp.argmax(leave, axis=0).astype(jnp.int32)
    row = jnp.arange(rows)
    return Decision(logits[exit, row], exit, scores[exit, row])


def exit_scores(task: Task, logits: Any, calibration: np.ndarray) -> "Array":
    """Of every row at every exit: float32 [E, N], logits [E, N, O], calibration [E] or [E, K]."""
    import jax.numpy as jnp

    return task.score(jnp.asarray(logits, jnp.float32), jnp.asarray(calibration)[:, None])


def broadcast_thresholds(thresholds: Any, rows: int, exits: int) -> Any:
    """A number, [E] or [N, E] as float32 [N, E]; a bare vector means per exit.

    Traced inside a caller's jit it stays so.
    """
    try:
        values = as_float32(thresholds)
    except (TypeError, ValueError):
        values = np.asarray(np.nan)
    if isinstance(values, np.ndarray) and np.isnan(values).any():
        raise UserError(
            f"thresholds must be numbers: one, one per exit [{exits}], or one per row and exit. "
            f"Got {thresholds!r}."
        )
    if values.shape not in ((), (exits,), (rows, exits)):
        raise UserError(
            f"thresholds must have shape (), ({exits},) or ({rows}, {exits}). Got {values.shape}."
        )
    return values.__array_namespace__().broadcast_to(values, (rows, exits))


def is_traced(values: Any) -> bool:
    """Whether it is part of a caller's jit; where jax was never imported nothing is."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(values, jax.core.Tracer)


def as_float32(thresholds: Any) -> Any:
    """What scores are compared with: above 1, where nobody leaves, stays above 1 in float32.

    Traced inside a caller's jit it stays so, and nothing is known of its values.
    """
    if is_traced(thresholds):
        jnp = thresholds.__array_namespace__()
        return jnp.where(thresholds > 1, jnp.maximum(thresholds, ABOVE_1), thresholds).astype(
            np.float32
        )
    given = np.asarray(thresholds, np.float64)
    return np.where(given > 1, np.maximum(given, ABOVE_1), given).astype(np.float32)


def check_calibration(task: Task, values: Any, exits: int) -> Any:
    """float32 [E], or of several labels [E, 2 C]; None means as they come.

    Traced ones stay so, whatever their values.
    """
    plain = task.uncalibrated
    shape = (exits, *plain.shape)
    if is_traced(values) and values.shape in (plain.shape, shape):
        return values.__array_namespace__().broadcast_to(values.astype(np.float32), shape)
    try:
        given = np.asarray(plain if values is None else values, np.float32)
    except (TypeError, ValueError):
        given = np.asarray(np.nan)
    if given.shape not in (plain.shape, shape) or not (np.isfinite(given) & (given > 0)).all():
        if not plain.ndim:
            raise UserError(
                f"temperatures must be {exits} positive numbers, one per exit. Got {values!r}."
            )
        raise UserError(
            f"temperatures must have shape {shape}: of each exit a positive temperature for each "
            f"label, then a decision threshold for each. Got shape {given.shape}."
        )
    if plain.ndim and (decisions := given[..., task.labels :]).max() >= 1:
        raise UserError(f"decision thresholds must be below 1. Got {decisions.max()}.")
    return np.broadcast_to(given, shape)


def check_temperatures(temperatures: Any, exits: int) -> Any:
    """float32 [E], of one label; None means 1 for every exit."""
    return check_calibration(Task(2), temperatures, exits)
