"""Losses, optimizer, the parallel step, checkpoints, and a run that is killed."""

import dataclasses
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from rich.console import Console

from ejax.bundle import load_bundle
from ejax.config import BertConfig, DataConfig, ExitConfig, TrainConfig, from_json, to_json
from ejax.inference.engine import replicate
from ejax.models.bert import Batch
from ejax.models.early_exit import EarlyExitBert
from ejax.training import loop, setup, warm
from ejax.training.checkpoint import Checkpoints, claim_workdir
from ejax.training.finetune import finetune
from ejax.training.log import with_wandb
from ejax.training.losses import joint_loss
from ejax.training.optim import MIX_RATE, learning_rate, make_optimizer
from ejax.training.parallel import make_all_logits, parallel_step, place, shard
from ejax.training.step import Rows, TrainState, first_state, make_train_step

ROOT = Path(__file__).parents[1]
CFG = BertConfig(
    vocab_size=23, hidden_size=12, num_hidden_layers=3, num_attention_heads=3,
    intermediate_size=17, max_position_embeddings=9, hidden_dropout_prob=0.2,
    attention_probs_dropout_prob=0.2, dtype="float32",
)  # fmt: skip
EXITS = ExitConfig(layers=(1, 3), num_labels=4)
MODEL = EarlyExitBert(CFG, EXITS)
CONFIG = TrainConfig(
    layers=(1, 3), learning_rate=0.01, head_learning_rate=0.01, warmup_fraction=0.0, dropout=0.2,
    train_embeddings=True, seed=5,
)  # fmt: skip


def labelled(rows: int = 11, length: int = 7, seed: int = 0, padding: int = 3) -> Rows:
    draw = np.random.default_rng(seed)
    mask = np.arange(length)[None] < draw.integers(2, length + 1, rows)[:, None]
    ids = draw.integers(0, CFG.vocab_size, (rows, length)).astype(np.int32)
    weights = np.ones(rows, np.float32)
    weights[rows - padding :] = 0
    batch = Batch(ids, mask.astype(np.int32), np.zeros_like(ids))
    labels = draw.integers(0, EXITS.num_labels, rows).astype(np.int32)
    return Rows(batch, labels, weights, np.arange(100, 100 + rows, dtype=np.int32))


@functools.cache
def fresh_state(config: TrainConfig = CONFIG) -> tuple[TrainState, optax.GradientTransformation]:
    params = jax.jit(MODEL.init)(jax.random.key(1), Batch([[0, 0]]))["params"]
    optimizer = make_optimizer(config, total_steps=10)
    return jax.device_get(first_state(params, optimizer, config)), optimizer


@functools.cache
def stepper(devices: int = 1, config: TrainConfig = CONFIG):
    optimizer = make_optimizer(config, total_steps=10)
    return parallel_step(make_train_step(MODEL, optimizer, config), jax.devices()[:devices])


def take_steps(devices: int, steps: int = 3, config: TrainConfig = CONFIG):
    state, _ = fresh_state(config)
    state = replicate(state, jax.devices()[:devices])
    metrics = {}
    for i in range(steps):
        state, metrics = stepper(devices, config)(state, labelled(seed=i))
    return jax.device_get(state), jax.device_get(metrics)


def test_joint_loss_by_hand() -> None:
    logits = jnp.log(jnp.array([[[0.5, 0.5], [0.9, 0.1]], [[0.25, 0.75], [0.2, 0.8]]]))
    labels = jnp.array([0, 1])
    loss, count = joint_loss(logits, labels, jnp.array([1.0, 0.0]))
    assert count == 1
    np.testing.assert_allclose(loss, -np.log(0.5) - np.log(0.25), rtol=1e-6)
    loss, count = joint_loss(
        logits, labels, jnp.array([1.0, 1.0]), exit_weights=(2.0, 0.0), class_weights=(1.0, 3.0)
    )
    assert count == 4
    np.testing.assert_allclose(loss, 2 * (-np.log(0.5) - 3 * np.log(0.1)), rtol=1e-6)


def test_distillation_by_hand() -> None:
    """KL(last || exit) on top, with no gradient to the last exit's logits."""
    logits = jnp.log(jnp.array([[[0.5, 0.5]], [[0.25, 0.75]]]))
    labels, weights = jnp.array([0]), jnp.array([1.0])
    distance = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
    plain = -np.log(0.5) - np.log(0.25)
    loss, _ = joint_loss(logits, labels, weights, distillation=2.0)
    np.testing.assert_allclose(loss, plain + 2 * distance, rtol=1e-6)

    def gradient(distillation: float) -> jax.Array:
        return jax.grad(lambda x: joint_loss(x, labels, weights, distillation=distillation)[0])(
            logits
        )

    np.testing.assert_allclose(gradient(2.0)[1], gradient(0.0)[1], atol=1e-7)
    np.testing.assert_allclose(gradient(2.0)[0, 0], [-0.5 + 0.5, 0.5 - 0.5], atol=1e-6)


def test_padding_gives_no_gradient() -> None:
    logits = jnp.ones((2, 3, 4))
    weights = jnp.array([1.0, 0.0, 1.0])
    grad = jax.grad(lambda x: joint_loss(x, jnp.array([0, 1, 2]), weights)[0])(logits)
    assert not grad[:, 1].any()
    assert grad[:, 0].any()


def test_schedule_warms_up_and_ends_at_zero() -> None:
    schedule = learning_rate(TrainConfig(learning_rate=0.4, warmup_fraction=0.25), 8)
    values = [round(float(schedule(i)), 6) for i in (0, 1, 2, 5, 8)]
    assert values == [0.0, 0.2, 0.4, 0.2, 0.0]


def test_biases_norms_and_mix_are_not_decayed() -> None:
    config = dataclasses.replace(CONFIG, weight_decay=0.5)
    state, optimizer = fresh_state(config)
    ones = jax.tree.map(jnp.ones_like, state.params)
    zero = jax.tree.map(jnp.zeros_like, ones)
    updates, _ = optimizer.update(zero, optimizer.init(ones), ones)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        decayed = path[-1].key in ("kernel", "embedding")
        assert bool(update.any()) == decayed, path


def test_gradients_are_clipped() -> None:
    config = dataclasses.replace(CONFIG, clip_norm=1e-3)
    state, optimizer = fresh_state(config)
    clip = optimizer.init(state.params)[0]
    grads = jax.tree.map(jnp.ones_like, state.params)
    clipped, _ = optax.clip_by_global_norm(config.clip_norm).update(grads, clip)
    small, _ = optimizer.update(clipped, optimizer.init(state.params), state.params)
    large, _ = optimizer.update(grads, optimizer.init(state.params), state.params)
    chex.assert_trees_all_equal(small, large)


def test_four_devices_equal_one_with_uneven_padding_and_dropout() -> None:
    """11 rows with 3 of padding on 4 devices: 3, 3, 2 and 0 real ones."""
    (one, metrics_one), (four, metrics_four) = take_steps(1), take_steps(4)
    assert one.step == four.step == 3
    # Sums in another order differ by a few float32 roundings; Adam divides small gradients by
    # their own size, so that three steps of 0.01 can turn that into about 1e-5.
    for (path, a), (_, b) in zip(
        *(jax.tree_util.tree_leaves_with_path(state.params) for state in (one, four)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=2e-5 * (MIX_RATE if path[-1].key == "mix" else 1))
    for name in metrics_one:
        np.testing.assert_allclose(metrics_one[name], metrics_four[name], rtol=1e-5)


def test_shard_map_runs_without_pmap_and_takes_the_same_steps(monkeypatch) -> None:
    wanted, _ = take_steps(4)
    state, optimizer = fresh_state()
    monkeypatch.delattr(jax, "pmap")
    step = make_train_step(MODEL, optimizer, CONFIG)
    run = parallel_step(step, jax.devices()[:4], parallel="shard_map")
    state = replicate(state, jax.devices()[:4])
    for i in range(3):
        state, _ = run(state, labelled(seed=i))
    for (path, a), (_, b) in zip(
        *(jax.tree_util.tree_leaves_with_path(x.params) for x in (state, wanted)), strict=True
    ):  # XLA may fuse the two differently: the roundings of four devices against one
        np.testing.assert_allclose(a, b, atol=2e-5 * (MIX_RATE if path[-1].key == "mix" else 1))


def test_the_early_exits_learn_from_the_last_one() -> None:
    """Beyond the exits' own losses the step has the distance to the last one's probabilities."""
    alone, taught = (
        take_steps(1, steps=1, config=dataclasses.replace(CONFIG, distillation=weight))[1]
        for weight in (0.0, 1000.0)  # fresh heads hardly differ
    )
    np.testing.assert_allclose(taught["exit_loss"], alone["exit_loss"])  # the same first weights
    np.testing.assert_allclose(alone["loss"], alone["exit_loss"].sum(), rtol=1e-6)
    assert taught["loss"] > alone["loss"] + 1e-3


def one_step(rows: Rows):
    return stepper()(replicate(fresh_state()[0], jax.devices()[:1]), rows)


def test_padding_rows_change_nothing() -> None:
    """The same real rows with other padding: the same step, dropout included."""
    rows, other = labelled(), labelled()
    other.batch.ids[8:] = 1
    other.labels[8:] = 2
    (first, _), (second, _) = one_step(rows), one_step(other)
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)


def test_dropout_follows_the_row_not_its_place() -> None:
    rows = labelled(padding=0)
    order = np.random.default_rng(3).permutation(len(rows.labels))
    shuffled = jax.tree.map(lambda leaf: leaf[order], rows)
    renumbered = rows._replace(numbers=rows.numbers + 1)
    loss, same, other = (float(one_step(r)[1]["loss"]) for r in (rows, shuffled, renumbered))
    assert same == pytest.approx(loss, rel=1e-6)
    assert abs(other - loss) > 1e-4
    later = fresh_state()[0]._replace(step=np.int32(7))  # another step drops other units
    _, metrics = stepper()(replicate(later, jax.devices()[:1]), rows)
    assert abs(float(metrics["loss"]) - loss) > 1e-4


def test_class_weights_count_in_a_step() -> None:
    config = dataclasses.replace(CONFIG, class_weights=(1.0, 0.0, 0.0, 3.0), distillation=0.0)
    rows = labelled()
    _, metrics = take_steps(1, 1, config)
    params, keys = fresh_state(config)[0].params, jax.random.fold_in(jax.random.key(config.seed), 0)
    each = jax.vmap(jax.random.fold_in, (None, 0))(keys, rows.numbers)
    logits = jax.jit(MODEL.apply)({"params": params}, rows.batch, keys=each)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows.labels[None]).sum(axis=0)
    weights = np.array(config.class_weights)[rows.labels] * rows.weights
    wanted = float((weights * losses).sum() / weights.sum())
    assert float(metrics["loss"]) == pytest.approx(wanted, rel=1e-5)


def test_mixing_weights_move_in_training() -> None:
    """The published code never trained them; at the rate of the weights they would stay uniform."""
    config = dataclasses.replace(CONFIG, learning_rate=1e-4)
    state, _ = take_steps(1, config=config)
    mix = state.params["heads"]["mix"]
    assert np.abs(mix[1]).min() > 10 * config.learning_rate
    assert not mix[0, 1:].any()  # layers above the exit are not read


def test_embeddings_can_stay_as_they_are() -> None:
    config = dataclasses.replace(CONFIG, train_embeddings=False)
    before, after = fresh_state(config)[0], take_steps(1, config=config)[0]
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before.params, after.params)
    assert not any(jax.tree.leaves(moved["bert"]["embeddings"]))
    assert all(jax.tree.leaves([moved["bert"]["layers"], moved["heads"]["exits"]]))
    # Their moments take no memory.
    sizes = [leaf.size for leaf in jax.tree.leaves(after.opt_state)]
    assert CFG.vocab_size * CFG.hidden_size not in sizes


def test_the_encoder_can_stay_as_it_is() -> None:
    config = dataclasses.replace(CONFIG, train_encoder=False)
    before, after = fresh_state(config)[0], take_steps(1, config=config)[0]
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before.params, after.params)
    assert not any(jax.tree.leaves(moved["bert"]))
    assert all(jax.tree.leaves(moved["heads"]["exits"]))


def test_the_mean_of_the_weights_is_kept() -> None:
    """Early on over few steps: after step t the new weights count 9 / (10 + t), from t = 0."""
    config = dataclasses.replace(CONFIG, average_decay=0.15)
    steps = [take_steps(1, count, config)[0] for count in (1, 2, 3)]
    wanted = fresh_state(config)[0].params
    for t, state in enumerate(steps):
        decay = min(0.15, (1 + t) / (10 + t))
        wanted = jax.tree.map(lambda a, b, d=decay: d * a + (1 - d) * b, wanted, state.params)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), state.kept, wanted)
    plain = take_steps(1, 3)[0]
    # But for rounding, by another program; a step moves a weight by up to the learning rate.
    same = functools.partial(np.testing.assert_allclose, atol=1e-4 * config.learning_rate)
    jax.tree.map(same, plain.params, steps[-1].params)
    assert plain.kept is plain.params


def test_an_exit_of_weight_zero_is_not_trained() -> None:
    before, _ = fresh_state()
    after, _ = take_steps(1, config=dataclasses.replace(CONFIG, exit_weights=(0.0, 1.0)))
    for name in ("dense", "classifier"):
        old = before.params["heads"]["exits"][name]["bias"]
        new = after.params["heads"]["exits"][name]["bias"]
        np.testing.assert_array_equal(old[0], new[0])
        assert np.abs(old[1] - new[1]).max() > 1e-4


@pytest.mark.parametrize("changes", [{"accumulate": 4}, {"remat": True}])
def test_a_step_that_does_not_fit_takes_less_memory(changes) -> None:
    """XLA's own count of what a step holds beside its arguments and results."""
    long = BertConfig(
        vocab_size=23, hidden_size=12, num_hidden_layers=6, num_attention_heads=3,
        intermediate_size=48, max_position_embeddings=64, dtype="float32",
    )  # fmt: skip

    def held(config: TrainConfig) -> int:
        model = EarlyExitBert(long, ExitConfig((1, 6), 4), config.remat)
        params = jax.jit(model.init)(jax.random.key(1), Batch([[0, 0]]))["params"]
        optimizer = make_optimizer(config, total_steps=10)
        step = jax.vmap(
            make_train_step(model, optimizer, config), in_axes=(None, 0), axis_name="devices"
        )
        ids = np.zeros((1, 64, 64), np.int32)
        numbers = np.zeros((1, 64), np.int32)
        rows = Rows(Batch(ids, ids + 1, ids), numbers, np.ones((1, 64), np.float32), numbers)
        compiled = jax.jit(step).lower(first_state(params, optimizer, config), rows).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert held(dataclasses.replace(CONFIG, **changes)) < 0.7 * held(CONFIG)


def test_shard_fills_up_with_zeros() -> None:
    out = shard({"x": np.arange(1, 6)}, 4)["x"]
    assert out.tolist() == [[1, 2], [3, 4], [5, 0], [0, 0]]


def test_all_logits_come_back_in_order_from_four_devices() -> None:
    from ejax.data.batches import eval_plan
    from ejax.data.tokenizer import Encoded

    draw = np.random.default_rng(0)
    lengths = draw.integers(2, 9, 13)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = draw.integers(0, CFG.vocab_size, offsets[-1]).astype(np.int32)
    encoded = Encoded(ids, np.zeros(len(ids), np.int8), offsets)
    state, _ = fresh_state()
    variables = {"params": state.params}
    plan = eval_plan(lengths, buckets=(4, 8), max_length=9, batch_size=6)
    logits = make_all_logits(MODEL)(variables, encoded, plan)
    assert logits.shape == (2, 13, 4)
    for i in (0, 7, 12):
        alone = MODEL.apply(variables, Batch(ids[None, offsets[i] : offsets[i + 1]]))
        np.testing.assert_allclose(logits[:, i], alone[:, 0], atol=1e-5)  # DESIGN: across T


def test_the_best_and_the_newest_checkpoint_are_kept(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        for step, score in ((1, 0.5), (2, None), (3, 0.7), (4, 0.7), (5, 0.6), (6, None)):
            metrics = None if score is None else {"mean_accuracy": score}
            checkpoints.save(step, {"x": jnp.full(3, step)}, metrics)
    with Checkpoints(tmp_path) as checkpoints:
        like = {"x": jnp.zeros(3, jnp.int32)}
        newest, _ = checkpoints.restore_newest(like)
        best, state = checkpoints.restore_best(like)
        assert (newest, best) == (6, 4)
    assert state["x"].tolist() == [4, 4, 4]


def test_a_workdir_of_another_config_is_refused(tmp_path: Path) -> None:
    claim_workdir(tmp_path / "run", TrainConfig(seed=1), {"train": "a1"})
    claim_workdir(tmp_path / "run", TrainConfig(seed=1), {"train": "a1"})
    other_hardware = TrainConfig(seed=1, accumulate=2, remat=True, parallel="shard_map")
    claim_workdir(tmp_path / "run", other_hardware, {"train": "a1"})
    with pytest.raises(ValueError, match=r"another training config \(it differs in seed\)"):
        claim_workdir(tmp_path / "run", TrainConfig(seed=2), {"train": "a1"})
    with pytest.raises(ValueError, match=r"it differs in rows.train\)"):
        claim_workdir(tmp_path / "run", TrainConfig(seed=1), {"train": "b2"})
    # The same rows may lie elsewhere.
    moved = DataConfig(path="elsewhere", cache_dir="another")
    claim_workdir(tmp_path / "run", TrainConfig(seed=1, data=moved), {"train": "a1"})
    shorter = TrainConfig(seed=1, data=DataConfig(max_length=8))
    with pytest.raises(ValueError, match=r"it differs in data.max_length\)"):
        claim_workdir(tmp_path / "run", shorter, {"train": "a1"})
    # A run of before a field was there had its default.
    path = tmp_path / "run" / "config.json"
    older = json.loads(path.read_text())
    del older["train_encoder"], older["data"]["dev_fraction"]
    # A field that is gone changed nothing where it was off.
    path.write_text(json.dumps(older | {"alternate": True}))
    with pytest.raises(ValueError, match=r"differs in alternate\)"):
        claim_workdir(tmp_path / "run", TrainConfig(seed=1), {"train": "a1"})
    for gone in ({}, {"alternate": False}):
        path.write_text(json.dumps(older | gone))
        claim_workdir(tmp_path / "run", TrainConfig(seed=1), {"train": "a1"})
    with pytest.raises(ValueError, match=r"differs in train_encoder"):
        claim_workdir(tmp_path / "run", TrainConfig(seed=1, train_encoder=False), {"train": "a1"})
    for half in ("", "{", "[1]"):
        path.write_text(half)
        with pytest.raises(ValueError, match=r"config.json is damaged .*: restore it, or choose"):
            claim_workdir(tmp_path / "run", TrainConfig(seed=1), {"train": "a1"})


def test_thresholds_chosen_since_are_not_lost(tmp_path: Path) -> None:
    """Repeating the command of a finished run, as a watcher of slices does, changes nothing."""
    made = tiny.trained()[0]
    folder = Path(shutil.copytree(made, tmp_path / "bundle"))
    workdir = Path(shutil.copytree(f"{made}.work", tmp_path / "run"))
    values = json.loads((workdir / "config.json").read_text())
    del values["rows"]
    config = from_json(TrainConfig, values)
    data = tiny.write_tsv(tmp_path / "new.tsv", tiny.rows(30, 77))
    trained = (workdir / "result.json").read_bytes()
    (folder / "exits.json").write_text("{")  # damaged, it is made anew
    finetune(config, workdir, output=folder)
    assert (workdir / "result.json").read_bytes() == trained  # its time, date and command
    assert tiny.ejax("thresholds", folder, "--data", data, "--budget", 0.9).code == 0
    before = (folder / "exits.json").read_bytes()
    other = dataclasses.replace(config, seed=1)  # of another run
    for asked, where in ((config, workdir), (other, tmp_path / "other")):
        with pytest.raises(ValueError, match=r"bundle has other thresholds since its training"):
            finetune(asked, where, output=folder)
    assert not (tmp_path / "other").exists()
    assert (folder / "exits.json").read_bytes() == before


@pytest.mark.parametrize("changed", ["calibrated", "target", "abstain"])
def test_what_was_chosen_since_is_named(tmp_path: Path, changed: str) -> None:
    (tmp_path / "exits.json").write_text(json.dumps({"provenance": {changed: {}}}))
    with pytest.raises(ValueError, match=rf"since its training \({changed} in its exits.json\)"):
        setup.check_not_changed(tmp_path)


@pytest.mark.filterwarnings("ignore:exit .*:UserWarning")  # the exit without weight knows nothing
def test_a_run_follows_its_config(tmp_path: Path, monkeypatch) -> None:
    """Every epoch has an order of its own, the gradient stops where asked, the mean is kept.

    The batches of an evaluation are in proportion to the rows that a device trains on at once.
    """
    plans, models, planned, made = loop.train_plan, setup.EarlyExitBert, [], []
    eval_plans, evaluated = setup.eval_plan, []
    monkeypatch.setattr(
        loop, "train_plan", lambda *a, **k: planned.append(k["epoch"]) or plans(*a, **k)
    )
    monkeypatch.setattr(
        setup, "eval_plan", lambda *a, **k: evaluated.append(k["batch_size"]) or eval_plans(*a, **k)
    )
    monkeypatch.setattr(setup, "EarlyExitBert", lambda *a: made.append(models(*a)) or made[-1])
    config = tiny_config(
        epochs=3, gradient_stop=0.5, average_decay=0.9, exit_weights=(0.0, 1.0),
        train_embeddings=True, accumulate=2, batch_size=2 * jax.device_count(),
    )  # fmt: skip
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_length=8))
    said = io.StringIO()
    folder = finetune(config, tmp_path, console=Console(file=said))
    assert planned == [0, 1, 2]
    assert set(evaluated) == {4 * config.batch_size // 2, warm.EMBEDDED_ROWS}
    cut_off = "% of train fill or pass 8 tokens, where texts are cut"
    assert cut_off in " ".join(said.getvalue().split())
    assert {model.gradient_stop for model in made} == {0.5}
    optimizer = make_optimizer(config, 36)
    params = load_bundle(folder).variables["params"]
    with Checkpoints(tmp_path) as checkpoints:
        _, best = checkpoints.restore_best(place(first_state(params, optimizer, config)))
    kept = jax.device_get(best.average)
    for tree in (params, kept):  # fitted again afterwards
        del tree["heads"]["exits"]["classifier"]
    jax.tree.map(np.testing.assert_array_equal, params, kept)
    first, second = (jax.tree.leaves(tree)[0] for tree in (best.average, best.params))
    assert np.abs(np.asarray(first) - np.asarray(second)).max() > 0
    # Exits without weight do not pick the checkpoint.
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    scores = [line for line in lines if line["kind"] == "dev_a"]
    assert scores
    for line in scores:
        assert line["mean_accuracy"] == line["accuracy/layer_3"]


def tiny_config(**changes: object) -> TrainConfig:
    data = DataConfig(path=str(tiny.data()), max_length=16, buckets=(8, 16))
    config = TrainConfig(
        model=str(tiny.model()), data=data, layers=(1, 3), epochs=3, batch_size=8,
        learning_rate=0.01, head_learning_rate=0.01, checkpoint_steps=5, evals=3, dtype="float32",
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def test_divergence_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"diverged at step \d+ .* on rows \d.* of train"):
        finetune(tiny_config(learning_rate=1e30, clip_norm=1e30), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "model must be"),
        ({"layers": (1, 4)}, "exit layers must be at most 3"),
        ({"class_weights": (1.0, 2.0, 3.0)}, "class_weights must hold 2 weights. Got 3"),
    ],
)
def test_bad_configs_leave_nothing_behind(tmp_path: Path, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        finetune(tiny_config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_bundle_does_not_hold_its_workdir(tmp_path: Path) -> None:
    """Else it could not be written at the end, and the run not be resumed."""
    for output in (tmp_path / "run", tmp_path):
        with pytest.raises(ValueError, match="must not be or hold the workdir"):
            finetune(tiny_config(), tmp_path / "run", output=output)
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny.model(), tmp_path / "model"))
    with (model / "vocab.txt").open("a") as vocabulary:
        vocabulary.write("more\n")
    with pytest.raises(ValueError, match=r"vocabulary of the tokenizer go up to 19, the model emb"):
        finetune(tiny_config(model=str(model)), tmp_path / "run")


def test_object_storage_is_refused() -> None:
    with pytest.raises(ValueError, match="s3://b/run: only folders and gs:// are known"):
        finetune(tiny_config(), "s3://b/run")


def test_a_killed_run_resumes_to_the_same_bundle(tmp_path: Path) -> None:
    """SIGKILL between two checkpoints; the rest must equal an uninterrupted run bit for bit.

    The run that is killed has a process of its own.
    """
    config, file = tiny_config(epochs=6), tmp_path / "config.py"
    file.write_text(
        "from ejax.config import TrainConfig, from_json\n"
        f"config = from_json(TrainConfig, {to_json(config)!r})\n"
    )
    workdir = tmp_path / "killed"
    killed = subprocess.Popen(
        [sys.executable, "-m", "train", "--config", str(file), "--workdir", str(workdir)],
        cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    saved = tmp_path / "killed" / "checkpoints"
    deadline = time.time() + 600  # a slow machine compiles for minutes
    while time.time() < deadline and killed.poll() is None:
        if any(path.name.isdigit() for path in saved.glob("*")):  # complete, not in the making
            break
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    said = io.StringIO()
    finetune(config, workdir, console=Console(file=said))
    assert "resuming" in said.getvalue()
    finetune(config, tmp_path / "whole", console=Console(quiet=True))
    names = ("model.safetensors", "exits.json", "rows.json")
    for name in names:
        first, second = (tmp_path / run / "bundle" / name for run in ("whole", "killed"))
        assert first.read_bytes() == second.read_bytes(), name
    logs = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("whole", "killed")]
    assert logs[0] == logs[1]


class WandbRun(list):
    """As what `wandb.init` gives: the lines that it was sent."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.ended = True

    def define_metric(self, name, *, step_metric):
        self.axis = {name: step_metric}

    def log(self, line):
        self.append(line)


def test_a_run_tells_what_it_logs(tmp_path: Path, monkeypatch) -> None:
    made: list[tuple[dict, WandbRun]] = []

    def init(**settings):
        made.append((settings, WandbRun()))
        return made[-1][1]

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    config, heard = tiny_config(epochs=1, wandb_project="films"), []
    listener = SimpleNamespace(on_log=lambda *line: heard.append(line))
    finetune(config, tmp_path / "run", callbacks=[listener])
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert heard == [(line.pop("step"), line.pop("kind"), line) for line in lines]
    (settings, run) = made[0]
    assert (settings["project"], settings["config"]["epochs"]) == ("films", 1)
    step, kind, metrics = heard[0]
    assert (step, kind) == (0, "dev_a")
    assert run[0] == {"step": 0} | {f"dev_a/{name}": value for name, value in metrics.items()}
    assert (len(run), run.axis, run.ended) == (len(heard), {"*": "step"}, True)
    # The same training goes on in the same run, whatever the project's name.
    finetune(dataclasses.replace(config, wandb_project="plays"), tmp_path / "run")
    assert made[-1][0]["project"] == "plays"
    assert made[-1][0]["id"] == settings["id"]
    assert made[-1][0]["resume"] == "allow"


def test_wandb_that_is_not_installed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = TrainConfig(wandb_project="films")
    with (
        pytest.raises(ValueError, match=r"not installed: `pip install wandb`"),
        with_wandb(config, tmp_path, []),
    ):
        pass


def test_a_run_writes_what_it_promises() -> None:
    folder = tiny.trained()[0]
    workdir = Path(f"{folder}.work")
    result = json.loads((workdir / "result.json").read_text())
    assert {"config", "command", "date", "metrics", "operating_points", "versions"} <= set(result)
    steps = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["kind"] == "dev_a"] == [0, 18, 36, 54, 72]
    assert any((workdir / "tensorboard").iterdir())
    rows = tiny.rows_of(load_bundle(folder))
    assert (len(rows["dev_a"]), len(rows["dev_b"])) == (21, 20)
    assert not any(folder.glob("*.pkl"))


def test_training_stops_when_dev_a_no_longer_improves() -> None:
    config, console = TrainConfig(patience=2), Console(quiet=True)
    unread: tuple = (None,) * 5
    hooks = loop.Hooks(config, 80, None, "accuracy", *unread, console)
    hooks.eval_steps, hooks.best_step = {10, 20, 30, 40, 50, 60, 70, 80}, 30
    assert [hooks.stopped_early(step) for step in (40, 49, 50)] == [False, False, True]
    hooks.best_step = 0  # the heads, on the encoder as it came: the rate may still rise
    assert not hooks.stopped_early(70)
    hooks.config, hooks.best_step = TrainConfig(patience=0), 10
    assert not hooks.stopped_early(80)
