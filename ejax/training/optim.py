"""AdamW with warm-up, linear decay and clipping, as BERT is fine-tuned."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from ejax.config import TrainConfig


def learning_rate(config: TrainConfig, total_steps: int) -> optax.Schedule:
    """Linear from 0 up to `learning_rate`, then linear down to 0 at the last step."""
    warmup = round(config.warmup_fraction * total_steps)
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.learning_rate, warmup),
            optax.linear_schedule(config.learning_rate, 0.0, max(1, total_steps - warmup)),
        ],
        [warmup],
    )


def by_names(params: Any, say: Callable[[list[str]], Any]) -> Any:
    """Of each leaf what is said of the names on its path."""
    return jax.tree_util.tree_map_with_path(lambda path, _: say([key.key for key in path]), params)


def decayed(params: Any) -> Any:
    """True for kernels and embedding tables; biases, norms and the mix are not decayed."""
    return by_names(params, lambda names: names[-1] in ("kernel", "embedding"))


MIX_RATE = 100.0


def is_mix(params: Any) -> Any:
    """True for the exits' mixing scores."""
    return by_names(params, lambda names: names[-1] == "mix")


def is_head(params: Any) -> Any:
    """True for the dense and linear layers of the exits' heads."""
    return by_names(params, lambda names: "exits" in names)


def make_optimizer(config: TrainConfig, total_steps: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019).

    The mixing scores learn at `MIX_RATE` times the rate: a step of Adam moves a number by
    about the learning rate, and a softmax over layers only changes when its scores move by
    about 1, which a rate made for weights near 0.02 would take 20,000 steps for. The heads start
    from nothing and learn at `head_learning_rate`, on the same schedule: at the encoder's they
    are still untrained when the encoder is done, the more so the more classes there are.
    """
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, total_steps), weight_decay=config.weight_decay, mask=decayed
        ),
        optax.masked(optax.scale(MIX_RATE), is_mix),
        optax.masked(optax.scale(config.head_learning_rate / config.learning_rate), is_head),
    )
    still = "embeddings" if config.train_encoder else "bert"
    if config.train_encoder and config.train_embeddings:
        return optimizer

    def train_or_still(params: Any) -> Any:
        return by_names(params, lambda names: "still" if still in names else "train")

    return optax.partition({"train": optimizer, "still": optax.set_to_zero()}, train_or_still)
