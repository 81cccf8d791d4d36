"""The exit rule, and the plain reference that the engine is tested against.

Axes: N rows, E exits, C classes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ejax.errors import UserError

Array = jax.Array


def confidence(logits: Array, temperature: Array) -> Array:
    """The largest softmax probability of `logits / temperature`.

    Schwartz et al., "The Right Tool for the Job" (ACL 2020), section 3.2.

    Args:
      logits: float32 [..., C].
      temperature: float32, broadcastable to `logits.shape[:-1]`; positive.

    Returns:
      float32 [...] in [1/C, 1].
    """
    scaled = logits / jnp.broadcast_to(temperature, logits.shape[:-1])[..., None]
    shifted = scaled - scaled.max(axis=-1, keepdims=True)
    return 1.0 / jnp.exp(shifted).sum(axis=-1)


ABOVE_1 = np.nextafter(np.float32(1), np.float32(2))


class Decision(NamedTuple):
    """What early exit answers, one entry per row."""

    logits: Any  # float32 [N, C], of the exit taken, before temperature
    exit: Any  # int32 [N], index into ExitConfig.layers
    score: Any  # float32 [N], its score at that exit


def select_exit(logits: Any, thresholds: Any, temperatures: Any = None) -> Decision:
    """The first exit whose score reaches its threshold; else the last one.

    Args:
      logits: float32 [E, N, C], every exit's.
      thresholds: a number, [E] (one per exit) or [N, E].
      temperatures: float32 [E], positive; None means 1.

    Raises:
      ValueError: on a wrong shape, a threshold that is not a number.
    """
    logits = jnp.asarray(logits, jnp.float32)
    if logits.ndim != 3:
        raise UserError(f"logits must have shape [E, N, C]. Got {logits.shape}.")
    exits, rows, _ = logits.shape
    thresholds = broadcast_thresholds(thresholds, rows, exits)
    temperatures = check_temperatures(temperatures, exits)
    scores = confidence(logits, temperatures[:, None])
    leave = (scores >= thresholds.T).at[-1].set(True)
    exit = jnp.argmax(leave, axis=0).astype(jnp.int32)
    row = jnp.arange(rows)
    return Decision(logits[exit, row], exit, scores[exit, row])


def broadcast_thresholds(thresholds: Any, rows: int, exits: int) -> np.ndarray:
    """A number, [E] or [N, E] as float32 [N, E]; a bare vector means per exit."""
    try:
        values = as_float32(thresholds)
    except (TypeError, ValueError):
        values = np.asarray(np.nan)
    if np.isnan(values).any():
        raise UserError(
            f"thresholds must be numbers: one, one per exit [{exits}], or one per row and exit. "
            f"Got {thresholds!r}."
        )
    if values.shape not in ((), (exits,), (rows, exits)):
        raise UserError(
            f"thresholds must have shape (), ({exits},) or ({rows}, {exits}). Got {values.shape}."
        )
    return np.broadcast_to(values, (rows, exits))


def as_float32(thresholds: Any) -> np.ndarray:
    """What scores are compared with: above 1, where nobody leaves, stays above 1 in float32."""
    given = np.asarray(thresholds, np.float64)
    return np.where(given > 1, np.maximum(given, ABOVE_1), given).astype(np.float32)


def check_temperatures(temperatures: Any, exits: int) -> np.ndarray:
    """float32 [E]; None means 1 for every exit."""
    try:
        values = np.asarray(1.0 if temperatures is None else temperatures, np.float32)
    except (TypeError, ValueError):
        values = np.asarray(np.nan)
    if values.shape not in ((), (exits,)) or not (np.isfinite(values) & (values > 0)).all():
        raise UserError(
            f"temperatures must be {exits} positive numbers, one per exit. Got {temperatures!r}."
        )
    return np.broadcast_to(values, (exits,))
