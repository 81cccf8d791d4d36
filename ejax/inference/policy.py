"""Exit rules, and the plain reference that the engine is tested against.

Axes: N rows, E exits, C classes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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


RULES: dict[str, Callable[[Array, Array], Array]] = {"confidence": confidence}


class Decision(NamedTuple):
    """What early exit answers, one entry per row."""

    logits: Any  # float32 [N, C], of the exit taken, before temperature
    exit: Any  # int32 [N], index into ExitConfig.layers
    score: Any  # float32 [N], the rule's score at that exit


def select_exit(
    logits: Any, thresholds: Any, temperatures: Any = None, *, rule: str = "confidence"
) -> Decision:
    """The first exit whose score reaches its threshold; else the last one.

    Args:
      logits: float32 [E, N, C], every exit's.
      thresholds: a number, [E] (one per exit) or [N, E].
      temperatures: float32 [E], positive; None means 1.
      rule: a name in `RULES`.

    Raises:
      ValueError: on a wrong shape, a threshold that is not a number, an unknown rule.
    """
    logits = jnp.asarray(logits, jnp.float32)
    if logits.ndim != 3:
        raise ValueError(f"logits must have shape [E, N, C]. Got {logits.shape}.")
    exits, rows, _ = logits.shape
    thresholds = broadcast_thresholds(thresholds, rows, exits)
    temperatures = check_temperatures(temperatures, exits)
    scores = RULES[check_rule(rule)](logits, temperatures[:, None])
    leave = (scores >= thresholds.T).at[-1].set(True)
    taken = jnp.argmax(leave, axis=0).astype(jnp.int32)
    row = jnp.arange(rows)
    return Decision(logits[taken, row], taken, scores[taken, row])


def broadcast_thresholds(thresholds: Any, rows: int, exits: int) -> Array:
    """A number, [E] or [N, E] as float32 [N, E]; a bare vector means per exit."""
    try:
        values = np.asarray(thresholds, np.float32)
    except (TypeError, ValueError):
        values = np.asarray(np.nan)
    if np.isnan(values).any():
        raise ValueError(
            f"thresholds must be numbers: one, one per exit [{exits}], or one per row and exit. "
            f"Got {thresholds!r}."
        )
    if values.shape not in ((), (exits,), (rows, exits)):
        raise ValueError(
            f"thresholds must have shape (), ({exits},) or ({rows}, {exits}). Got {values.shape}."
        )
    return jnp.asarray(np.broadcast_to(values, (rows, exits)))


def check_temperatures(temperatures: Any, exits: int) -> Array:
    """float32 [E]; None means 1 for every exit."""
    try:
        values = np.asarray(1.0 if temperatures is None else temperatures, np.float32)
    except (TypeError, ValueError):
        values = np.asarray(np.nan)
    if values.shape not in ((), (exits,)) or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(
            f"temperatures must be {exits} positive numbers, one per exit. Got {temperatures!r}."
        )
    return jnp.asarray(np.broadcast_to(values, (exits,)))


def check_rule(rule: str) -> str:
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}. Got {rule!r}.")
    return rule
