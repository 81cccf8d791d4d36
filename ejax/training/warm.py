"""The heads first, on the encoder as it is; then all together.

Kumar, Raghunathan, Jones, Ma, Liang, "Fine-Tuning can Distort Pretrained Features and
Underperform Out-of-Distribution" (ICLR 2022), section 4: heads that start from noise pull the
encoder away from what it knows. A pass over the encoder's vectors is cheap: they are computed
once.

Axes: N rows, L layers, E exits, B batch, P numbers pooled of a row, C classes.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from rich.console import Console

from ejax.config import TrainConfig
from ejax.data.rows import TokenizedSplit
from ejax.models.early_exit import EarlyExitBert
from ejax.tasks import task_of
from ejax.training.losses import joint_loss
from ejax.training.optim import MIX_RATE, decayed, is_mix
from ejax.training.parallel import make_all_logits
from ejax.training.processes import barrier
from ejax.training.setup import Setup, initial_params

Array = jax.Array

BATCH, PASSES, FEWEST_STEPS, MOST_STEPS = 64, 40, 300, 3000
# Of weights: strong, since heads of a high gain make of the encoder's first steps a loss that grows
# (3,000 rows of SST-2, where dev accuracy fell to 0.57 of 0.78 before it rose; with this to 0.74).
DECAY = 1.0
# Of the rows, whose loss says when to stop: heads that know all of their rows by heart leave the
# encoder gradients of noise, which Adam makes steps of full size.
HELD_OUT, LOOKS = 0.1, 30
RATE, MIX = 1e-3, 5e-5 * MIX_RATE  # where the learning rates start
WARM_ROWS = 10_000  # of train, whose vectors the heads start on
EMBEDDED_ROWS = 32  # of these at a time


def warm_start(setup: Setup, console: Console) -> Any:
    """The pretrained encoder under heads that fit it as it is; the same on every host.

    Each host's first device runs batches of one size, so that the vectors have the same bits
    however many devices there are: heads are trained far enough to tell.
    """
    model, config = setup.model, setup.config
    params = initial_params(model, setup.bert, config)
    with console.status("the heads, on the encoder as it is"):
        rows = setup.train.teaching()
        order = np.random.default_rng([config.seed, 2]).permutation(len(rows.labels))
        some = rows.take(np.sort(order[:WARM_ROWS]))
        vectors = vectors_of(setup, params, some)
        heads = warm_heads(model, params["heads"], vectors, some.labels, config, some.teacher)
        if jax.process_count() > 1:
            barrier("warmed")
            heads = multihost_utils.broadcast_one_to_all(heads)
    return params | {"heads": jax.tree.map(np.asarray, heads)}


def vectors_of(setup: Setup, params: Any, rows: TokenizedSplit) -> np.ndarray:
    """What the exits mix of these rows, float32 [L, N, P], see `EarlyExitBert.layer_vectors`."""
    plan = setup.eval_plan(rows.encoded, EMBEDDED_ROWS)
    embed = make_all_logits(setup.model, jax.local_devices()[:1], method="layer_vectors")
    return embed({"params": params}, rows.encoded, plan)


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
      vectors: float32 [L, N, P], see `EarlyExitBert.layer_vectors`.
      labels: as the task has them, [N, ...].
      teacher: its probabilities, float32 [N, C]; None where there is no teacher.
    """
    rng = np.random.default_rng([config.seed, 1])
    order = rng.permutation(len(labels))
    held, rest = np.split(order, [max(1, round(HELD_OUT * len(order)))])
    steps = min(max(PASSES * len(rest) // BATCH, FEWEST_STEPS), MOST_STEPS) // LOOKS * LOOKS
    orders = [rng.permutation(rest) for _ in range(-(-steps * BATCH // len(rest)))]
    picks = np.concatenate(orders)[: steps * BATCH].reshape(LOOKS, -1, BATCH)
    trained = _train(model, heads, vectors, labels, picks, held, config, teacher)
    return jax.device_get(trained)


@partial(jax.jit, static_argnums=(0, 6))
def _train(
    model: EarlyExitBert,
    heads: Any,
    vectors: Array,
    labels: Array,
    picks: Array,
    held: Array,
    config: TrainConfig,
    teacher: Array | None,
) -> Any:
    """The heads of the look at which the loss on the rows held out was least."""
    schedule = optax.cosine_decay_schedule(1.0, picks.shape[0] * picks.shape[1])
    optimizer = optax.chain(
        optax.adamw(lambda step: RATE * schedule(step), weight_decay=DECAY, mask=decayed),
        optax.masked(optax.scale(MIX / RATE), is_mix),
    )

    def loss(heads: Any, rows: Array, keys: Array | None = None) -> Array:
        logits: Any = model.apply(
            {"params": {"heads": heads}}, vectors[:, rows], keys, method="from_vectors"
        )
        total, count = joint_loss(
            logits, labels[rows], jnp.ones(len(rows)), exit_weights=config.exit_weights,
            class_weights=config.weights_of_classes,
            teacher=None if teacher is None else teacher[rows],
            distillation=0.0 if teacher is None else config.distillation,
            task=task_of(model.exits),
        )  # fmt: skip
        return total / count

    def step(state: tuple[Any, Any], inputs: tuple[Array, Array]) -> tuple[Any, None]:
        heads, opt_state = state
        rows, number = inputs
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(BATCH))
        grads = jax.grad(loss)(heads, rows, keys)
        updates, opt_state = optimizer.update(grads, opt_state, heads)
        return (optax.apply_updates(heads, updates), opt_state), None

    def look(state: tuple[Any, Any, Any], inputs: tuple[Array, Array]) -> tuple[Any, None]:
        heads, opt_state, (least, best) = state
        heads, opt_state = jax.lax.scan(step, (heads, opt_state), inputs)[0]
        found = loss(heads, held)
        better = found < least
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), heads, best)
        return (heads, opt_state, (jnp.minimum(found, least), best)), None

    numbers = jnp.arange(picks.shape[0] * picks.shape[1]).reshape(picks.shape[:2])
    start = heads, optimizer.init(heads), (jnp.float32(jnp.inf), heads)
    return jax.lax.scan(look, start, (picks, numbers))[0][2][1]
