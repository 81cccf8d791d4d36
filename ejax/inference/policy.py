"""Exit rules, and the plain reference that the engine is tested against.

Axes: N rows, E exits, C classes.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import entr

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


def margin(logits: Array, temperature: Array) -> Array:
    """The largest probability less the second largest, with `confidence`'s arguments.

    Returns:
      float32 [...] in [0, 1]; with many classes a sharper sign of doubt than the largest alone.
    """
    first, second = jnp.moveaxis(lax.top_k(probabilities(logits, temperature), 2)[0], -1, 0)
    return first - second


def entropy(logits: Array, temperature: Array) -> Array:
    """1 - the normalised entropy of the `TOP_K` largest probabilities, `confidence`'s arguments.

    The exit rule of DeeBERT (Xin et al., ACL 2020), turned so that higher is surer. The
    probabilities are scaled to sum to 1, so that a tail of many classes adds no doubt.

    Returns:
      float32 [...] in [0, 1].
    """
    k = min(TOP_K, logits.shape[-1])
    top = lax.top_k(probabilities(logits, temperature), k)[0]
    top = top / top.sum(axis=-1, keepdims=True)
    nats = entr(top).sum(axis=-1)
    return jnp.clip(1.0 - nats / math.log(k), 0.0, 1.0)


def probabilities(logits: Array, temperature: Array) -> Array:
    """softmax(logits / temperature), float32 [..., C]."""
    return jax.nn.softmax(logits / jnp.broadcast_to(temperature, logits.shape[:-1])[..., None])


TOP_K = 10
ABOVE_1 = np.nextafter(np.float32(1), np.float32(2))
RULES: dict[str, Callable[[Array, Array], Array]] = {
    "confidence": confidence,
    "margin": margin,
    "entropy": entropy,
}
AGREEMENT = "agreement"
RULE_NAMES = (*RULES, AGREEMENT)


class Agreed(NamedTuple):
    """What the rule "agreement" remembers of a row."""

    label: Array  # int32 [...], of the exit before; -1 before the first
    times: Array  # int32 [...], exits directly before that one with the same label


def nothing_agreed(shape: tuple[int, ...]) -> Agreed:
    """The memory before the first exit."""
    return Agreed(jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.int32))


def score_exit(
    rule: str, logits: Array, temperature: Array, before: Agreed, exits: int
) -> tuple[Array, Agreed]:
    """A row's score at one exit, in [0, 1], higher is surer, and its memory after it.

    "agreement" counts the exits directly before this one that chose the same label, over
    E - 1: patience p (Zhou et al., "BERT Loses Patience", NeurIPS 2020) is any threshold in
    ((p - 1) / (E - 1), p / (E - 1)), such as (p - 0.5) / (E - 1). Temperature plays no part.

    Args:
      rule: a name in `RULE_NAMES`.
      logits: float32 [..., C].
      temperature: float32, broadcastable to `logits.shape[:-1]`; positive.
      before: of shape `logits.shape[:-1]`.
      exits: E.

    Returns:
      float32 [...], `Agreed` of the same shape.
    """
    label = logits.argmax(axis=-1).astype(jnp.int32)
    times = jnp.where(label == before.label, before.times + 1, 0)
    after = Agreed(label, times)
    if rule == AGREEMENT:
        return times.astype(jnp.float32) / jnp.float32(max(exits - 1, 1)), after
    return RULES[rule](logits, temperature), after


def exit_scores(logits: Array, temperatures: Array, rule: str) -> Array:
    """The rule's score of every row at every exit: float32 [E, N], logits [E, N, C]."""
    agreed, scores = nothing_agreed(logits.shape[1:-1]), []
    for exit_logits, temperature in zip(logits, temperatures, strict=True):
        score, agreed = score_exit(rule, exit_logits, temperature, agreed, len(logits))
        scores.append(score)
    return jnp.stack(scores)


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
      rule: a name in `RULE_NAMES`.

    Raises:
      ValueError: on a wrong shape, a threshold that is not a number, an unknown rule.
    """
    logits = jnp.asarray(logits, jnp.float32)
    if logits.ndim != 3:
        raise UserError(f"logits must have shape [E, N, C]. Got {logits.shape}.")
    exits, rows, _ = logits.shape
    thresholds = broadcast_thresholds(thresholds, rows, exits)
    temperatures = check_temperatures(temperatures, exits)
    scores = exit_scores(logits, temperatures, check_rule(rule))
    leave = (scores >= thresholds.T).at[-1].set(True)
    exit = jnp.argmax(leave, axis=0).astype(jnp.int32)
    row = jnp.arange(rows)
    return Decision(logits[exit, row], exit, scores[exit, row])


def broadcast_thresholds(thresholds: Any, rows: int, exits: int) -> Any:
    """A number, [E] or [N, E] as float32 [N, E]; a bare vector means per exit.

    Traced inside a caller's jit it stays so.
    """
    try:
        values = as_float32(thresholds)
    except (TypeError, ValueError):
        values = np.asarray(np.nan)
    if not isinstance(values, jax.Array) and np.isnan(values).any():
        raise UserError(
            f"thresholds must be numbers: one, one per exit [{exits}], or one per row and exit. "
            f"Got {thresholds!r}."
        )
    if values.shape not in ((), (exits,), (rows, exits)):
        raise UserError(
            f"thresholds must have shape (), ({exits},) or ({rows}, {exits}). Got {values.shape}."
        )
    return (np if isinstance(values, np.ndarray) else jnp).broadcast_to(values, (rows, exits))


def as_float32(thresholds: Any) -> Any:
    """What scores are compared with: above 1, where nobody leaves, stays above 1 in float32.

    Traced inside a caller's jit it stays so, and nothing is known of its values.
    """
    if isinstance(thresholds, jax.core.Tracer):
        return jnp.where(thresholds > 1, jnp.maximum(thresholds, ABOVE_1), thresholds).astype(
            jnp.float32
        )
    given = np.asarray(thresholds, np.float64)
    return np.where(given > 1, np.maximum(given, ABOVE_1), given).astype(np.float32)


def check_temperatures(temperatures: Any, exits: int) -> Any:
    """float32 [E]; None means 1 for every exit. Traced ones stay so, whatever their values."""
    if isinstance(temperatures, jax.core.Tracer) and temperatures.shape in ((), (exits,)):
        return jnp.broadcast_to(temperatures.astype(jnp.float32), (exits,))
    try:
        values = np.asarray(1.0 if temperatures is None else temperatures, np.float32)
    except (TypeError, ValueError):
        values = np.asarray(np.nan)
    if values.shape not in ((), (exits,)) or not (np.isfinite(values) & (values > 0)).all():
        raise UserError(
            f"temperatures must be {exits} positive numbers, one per exit. Got {temperatures!r}."
        )
    return np.broadcast_to(values, (exits,))


def check_rule(rule: str) -> str:
    if rule not in RULE_NAMES:
        raise UserError(f"rule must be one of {', '.join(RULE_NAMES)}. Got {rule!r}.")
    return rule
