"""The heads first, on the encoder as it is; then all together.

Kumar, Raghunathan, Jones, Ma, Liang, "Fine-Tuning can Distort Pretrained Features and
Underperform Out-of-Distribution" (ICLR 2022), section 4: heads that start from noise pull the
encoder away from what it knows. A pass over the encoder's vectors is cheap: they are computed
once.

Axes: N rows, L layers, E exits, B batch, D width, C classes.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ejax.config import TrainConfig
from ejax.models.early_exit import EarlyExitBert
from ejax.training.losses import joint_loss
from ejax.training.optim import MIX_RATE, decayed, is_mix

Array = jax.Array

BATCH, PASSES, FEWEST_STEPS, MOST_STEPS = 64, 40, 300, 3000
RATE, MIX = 1e-3, 5e-5 * MIX_RATE  # where the learning rates start


def warm_heads(
    model: EarlyExitBert,
    heads: Any,
    vectors: np.ndarray,
    labels: np.ndarray,
    config: TrainConfig,
    teacher: np.ndarray | None = None,
) -> Any:
    """The heads, trained on what the encoder says of some rows.

    Args:
      heads: the parameters under "heads".
      vectors: float32 [L, N, D], see `EarlyExitBert.layer_vectors`.
      labels: int [N], -1 for a row without one.
      teacher: its probabilities, float32 [N, C]; None where there is no teacher.
    """
    rows = len(labels)
    steps = min(max(PASSES * rows // BATCH, FEWEST_STEPS), MOST_STEPS)
    rng = np.random.default_rng([config.seed, 1])
    orders = [rng.permutation(rows) for _ in range(-(-steps * BATCH // rows))]
    picks = np.concatenate(orders)[: steps * BATCH].reshape(steps, BATCH)
    trained = _train(model, heads, vectors, labels.astype(np.int32), picks, config, teacher)
    return jax.device_get(trained)


@partial(jax.jit, static_argnums=(0, 5))
def _train(
    model: EarlyExitBert,
    heads: Any,
    vectors: Array,
    labels: Array,
    picks: Array,
    config: TrainConfig,
    teacher: Array | None,
) -> Any:
    schedule = optax.cosine_decay_schedule(1.0, len(picks))
    optimizer = optax.chain(
        optax.adamw(lambda step: RATE * schedule(step), weight_decay=0.01, mask=decayed),
        optax.masked(optax.scale(MIX / RATE), is_mix),
    )

    def loss(heads: Any, rows: Array, key: Array) -> Array:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(BATCH))
        logits: Any = model.apply(
            {"params": {"heads": heads}}, vectors[:, rows], keys, method="from_vectors"
        )
        total, count = joint_loss(
            logits, labels[rows], jnp.ones(BATCH), exit_weights=config.exit_weights,
            class_weights=config.class_weights, teacher=None if teacher is None else teacher[rows],
            distillation=0.0 if teacher is None else config.distillation,
        )  # fmt: skip
        return total / count

    def step(state: tuple[Any, Any], inputs: tuple[Array, Array]) -> tuple[Any, None]:
        heads, opt_state = state
        rows, number = inputs
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        grads = jax.grad(loss)(heads, rows, key)
        updates, opt_state = optimizer.update(grads, opt_state, heads)
        return (optax.apply_updates(heads, updates), opt_state), None

    start = heads, optimizer.init(heads)
    return jax.lax.scan(step, start, (picks, jnp.arange(len(picks))))[0][0]
