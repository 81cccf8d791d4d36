"""The programs that `train.aot` compiles, and their straight-line pieces.

XLA counts a loop's body once, so operations and bytes come from the pieces of the program, each
compiled in a straight line, times how often they run; memory comes from the whole program.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding

from ejax import assets
from ejax.config import BertConfig, ExitConfig, TrainConfig
from ejax.data.named import TFDS
from ejax.errors import UserError
from ejax.inference.cost import exit_flops, layer_flops
from ejax.inference.engine import prepare, run_head, run_layer, run_pool
from ejax.models.bert import Batch, BertModel, EncoderLayer
from ejax.models.early_exit import EarlyExitBert, cut
from ejax.models.heads import ExitHeads, mix_in
from ejax.models.weights import read_config
from ejax.training.losses import joint_loss
from ejax.training.optim import make_optimizer
from ejax.training.parallel import mapped_step
from ejax.training.setup import build, exits_of, numerics, shapes_of, with_pooling
from ejax.training.step import Rows, first_state, make_train_step
from train.roofline import Chip, Cost, DoesNotFit, collectives, compiled, cost, memory, size

# Shapes of the encoders that configs/ names by hub id: no weights are needed here.
SHAPES = {
    "google-bert/bert-base-uncased": BertConfig(),
    "google-bert/bert-large-uncased": BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
}
STEPS = 1000  # of the schedule; changes no shape


def once(kept: dict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
    if key not in kept:
        kept[key] = make()
    return kept[key]


def models_of(config: TrainConfig, labels: int) -> tuple[EarlyExitBert, EarlyExitBert]:
    """The model that the steps of a config train and, with its exit 0, the one that answers."""
    cfg = SHAPES.get(config.model) or read_config(assets.resolve(config.model))
    known = TFDS.get(config.data.name)
    classes = labels or (known.classes if known else 0)
    if not classes:
        raise UserError("--labels must be given: the config names no data set of known classes.")
    if config.dtype == "float32":
        raise UserError(
            'dtype must be "bfloat16" or "auto": the peaks it is measured against are of bfloat16. '
            "Got 'float32'."
        )
    cfg = dataclasses.replace(cfg, **numerics(config, "bfloat16"))
    two = known is not None and len(known.texts) == 2
    config = with_pooling(config, pairs=two or config.pooling == "pair")
    exits = exits_of(config, cfg, classes)
    return build(config, cfg, exits), EarlyExitBert(cut(cfg, exits), exits)


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def floats(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def step_program(
    config: TrainConfig, model: EarlyExitBert, devices: list[jax.Device], rows: int, length: int
) -> tuple[Any, Any]:
    """(the compiled step of a training on all chips, its abstract state)."""
    optimizer = make_optimizer(config, STEPS)
    params = shapes_of(model)
    state = jax.eval_shape(lambda params: first_state_like(params, optimizer, config), params)
    step = mapped_step(make_train_step(model, optimizer, config), devices, config.parallel)
    n = (len(devices), rows) if config.parallel == "pmap" else (len(devices) * rows,)
    batch = Batch(*(ints(*n, length) for _ in range(3)))
    teacher = floats(*n, model.exits.num_labels) if config.teacher else None
    given = Rows(batch, ints(*n), floats(*n), ints(*n), teacher)
    return compiled(step.lower(state, given)), state


def first_state_like(params: Any, optimizer: Any, config: TrainConfig) -> Any:
    state = first_state(params, optimizer, dataclasses.replace(config, average_decay=0.0))
    return state._replace(average=params if config.average_decay else (), step=jnp.int32(0))


def training(
    config: TrainConfig,
    model: EarlyExitBert,
    chip: Chip,
    devices: list[jax.Device],
    rows: int,
    length: int,
    kept: dict[Any, Any],
) -> dict[str, Any]:
    try:
        program, state = step_program(config, model, devices, rows, length)
    except DoesNotFit as error:
        return {"fits": False, "why": str(error)}
    held = memory(program)
    micro = rows // config.accumulate
    pieces = once(
        kept, (chip, micro), lambda: training_pieces(config, model, devices[0], micro, length)
    )
    micro_step = pieces["layer"] * model.exits.num_layers + pieces["ends"]
    total = micro_step * config.accumulate + pieces["optimizer"]
    bound = total.roofline(chip)
    analytic = 3 * rows * last_exit_flops(model.cfg, model.exits, length)
    if config.remat:
        analytic += rows * model.exits.num_layers * layer_flops(model.cfg, length)
    return {
        "fits": held["total"] <= chip.memory,
        "memory": held
        | {
            "parameters": size(state.params),
            "optimizer": size(state.opt_state),
            "average": size(state.average),
        },
        "step": bound,
        "tokens_per_second": len(devices) * rows * length / bound["seconds"],
        "analytic_flops": float(analytic),
        "layer_forward": pieces["forward"].roofline(chip)
        | {"least_bytes": least_bytes(model.cfg, micro, length, 1)},
        "layer": pieces["layer"].roofline(chip)
        | {"least_bytes": least_bytes(model.cfg, micro, length, 3)},
        "collectives": collectives(program.as_text()),
    }


def last_exit_flops(cfg: BertConfig, exits: ExitConfig, length: int) -> float:
    """Of one row that passes all heads."""
    return float(exit_flops(cfg, exits, [length])[-1, 0])


def least_bytes(cfg: BertConfig, rows: int, length: int, passes: int) -> float:
    """Of one layer with nothing kept between its operations but what it is given and gives.

    Per pass the kernels once in the compute type, the stream read and written.
    """
    d, f = cfg.hidden_size, cfg.intermediate_size
    kernels = 2 * (4 * d * d + 2 * d * f)
    stream = (2 if cfg.residual_dtype == "bfloat16" else 4) * rows * length * d
    return passes * (kernels + 2 * stream)


def training_pieces(
    config: TrainConfig, model: EarlyExitBert, device: jax.Device, rows: int, length: int
) -> dict[str, Cost]:
    """Straight-line parts of one micro-step: a layer, all that is not a layer, the optimizer."""
    cfg, exits = model.cfg, model.exits
    params = shapes_of(model)
    batch = Batch(*(ints(rows, length) for _ in range(3)))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    layer = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params["bert"]["layers"]
    )
    x = floats(rows, length, cfg.hidden_size, dtype=cfg.residual_dtype)
    mixed = floats(rows, len(exits.layers), cfg.hidden_size * exits.pooled)
    column = floats(len(exits.layers))

    def layer_and_mix(layer: Any, x: Any, mixed: Any, column: Any, mask: Any, keys: Any) -> Any:
        x = EncoderLayer(cfg).apply({"params": layer}, x, mask, keys)
        return x, mix_in(mixed, column, x, mask, exits)

    def forward(layer: Any, x: Any, mixed: Any, column: Any, mask: Any, keys: Any) -> Any:
        """With what the backward pass will read."""
        return jax.vjp(
            lambda a, b, c, d: layer_and_mix(a, b, c, d, mask, keys), layer, x, mixed, column
        )

    given = (layer, x, mixed, column, batch.mask, keys)
    alone = cost(layer_and_mix, device, *given)
    if config.remat:

        def both(grad: Any, *given: Any) -> Any:
            return forward(*given)[1](grad)

        layer_cost = alone + cost(both, device, (x, mixed), *given)
    else:
        kept = jax.eval_shape(forward, *given)[1]
        back = cost(lambda back, grad: back(grad), device, kept, (x, mixed))
        layer_cost = cost(forward, device, *given) + back

    def ends(bert: Any, heads: Any, x_grad: Any, mixed: Any, rows: Rows, keys: Any) -> Any:
        """Embeddings, heads and loss, both ways."""

        def embed(bert: Any) -> Any:
            return BertModel(cfg).apply({"params": bert}, rows.batch, keys, method="embed")

        def loss(heads: Any, mixed: Any) -> Any:
            logits: Any = ExitHeads(cfg, exits).apply({"params": heads}, mixed, keys)
            return joint_loss(
                logits, rows.labels, rows.weights, exit_weights=config.exit_weights,
                class_weights=config.weights_of_classes, distillation=config.distillation,
                teacher=rows.teacher,
            )[0]  # fmt: skip

        x, back = jax.vjp(embed, bert)
        return x, back(x_grad), jax.value_and_grad(loss, argnums=(0, 1))(heads, mixed)

    teacher = floats(rows, exits.num_labels) if config.teacher else None
    labelled = Rows(batch, ints(rows), floats(rows), ints(rows), teacher)
    embeddings = {"embeddings": params["bert"]["embeddings"]}
    optimizer = make_optimizer(config, STEPS)

    def update(params: Any, opt_state: Any, grads: Any) -> Any:
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, optax.tree.norm(grads)

    opt_state = jax.eval_shape(optimizer.init, params)
    return {
        "forward": alone,
        "layer": layer_cost,
        "ends": cost(ends, device, embeddings, params["heads"], x, mixed, labelled, keys),
        "optimizer": cost(update, device, params, opt_state, params),
    }


def inference(
    model: EarlyExitBert, chip: Chip, device: jax.Device, rows: int, length: int, tile: int
) -> dict[str, Any]:
    """The engine's program; its bound is that of full depth, when nobody leaves early."""
    cfg, exits = model.cfg, model.exits.encoder
    here = SingleDeviceSharding(device)

    def placed(tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), tree
        )

    weights = placed(jax.eval_shape(partial(prepare, model), {"params": shapes_of(model)}))
    count = len(exits.layers)
    batch = Batch(*(ints(rows, length) for _ in range(3)))
    every = len(model.exits.layers)
    given = placed((batch, floats(rows, every), floats(every), ints()))
    try:
        program = compiled(run_pool.lower(model, weights, *given, tile=tile))
    except DoesNotFit as error:
        return {"fits": False, "why": str(error)}
    x = floats(tile, length, cfg.hidden_size, dtype=cfg.residual_dtype)
    mixed = floats(tile, cfg.hidden_size * exits.pooled)
    layer = cost(
        lambda weights, x, mask: run_layer(cfg, weights, 0, x, mask),
        device, weights, x, ints(tile, length),
    )  # fmt: skip
    head = cost(
        lambda weights, mixed: run_head(cfg, weights, count - 1, exits, mixed),
        device, weights, mixed,
    )  # fmt: skip
    # A step also reads and writes the stream of its tile.
    step = head + Cost(0.0, 2 * size(x), 2 * size(x))
    tiles = -(-rows // tile)
    total = (layer * exits.num_layers + step * count) * tiles
    bound = total.roofline(chip)
    held = memory(program)
    return {
        "fits": held["total"] <= chip.memory,
        "memory": held | {"parameters": size(weights)},
        "full_depth": bound,
        "tokens_per_second": rows * length / bound["seconds"],
        "layer_forward": layer.roofline(chip) | {"least_bytes": least_bytes(cfg, tile, length, 1)},
        "analytic_flops": float(rows * last_exit_flops(cfg, exits, length)),
    }


def largest_rows(
    config: TrainConfig,
    model: EarlyExitBert,
    chip: Chip,
    devices: list[jax.Device],
    rows: int,
    length: int,
) -> int:
    """Rows per chip, the most of `accumulate` doubled over and over that fit; 0 where none do."""

    def fits(rows: int) -> bool:
        try:
            program, _ = step_program(config, model, devices, rows, length)
        except DoesNotFit:
            return False
        return bool(memory(program)["total"] <= chip.memory)

    rows = config.accumulate << max(0, (rows // config.accumulate).bit_length() - 1)
    if fits(rows):
        while fits(2 * rows):
            rows *= 2
        return rows
    while rows > config.accumulate and not fits(rows):
        rows //= 2
    return rows if fits(rows) else 0
