"""The compiled loop against `model.apply` and `select_exit`: no row is ever left out.

Bounds on scores (promise 1 of the design): NEAR at the same T and B >= 8; F32 and BF16
across T, at B = 1 and against `model.apply`. On logits the same, times 1 + the largest.
"""

import dataclasses
import functools
import re
from contextlib import nullcontext
from typing import NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from reference import random_batch, random_variables

from ejax.config import BertConfig, ExitConfig
from ejax.inference import engine
from ejax.inference.engine import early_exit, exit_logits, full_depth
from ejax.inference.policy import (
    Decision,
    broadcast_thresholds,
    check_temperatures,
    select_exit,
)
from ejax.inference.pool import run_pool
from ejax.inference.prepared import prepare
from ejax.models.bert import FEW_ROWS, Batch, EncoderLayer
from ejax.models.early_exit import EarlyExitBert
from ejax.tasks import Task

confidence = Task(2).score
pytestmark = pytest.mark.usefixtures("strict")

NEAR, F32, BF16 = 1e-6, 1e-5, 5e-3
SLOPE = 4  # margin and entropy move by less than this when the probabilities move by 1
CFG = BertConfig(
    vocab_size=41, hidden_size=12, num_hidden_layers=6, num_attention_heads=3,
    intermediate_size=23, max_position_embeddings=17, dtype="float32",
)  # fmt: skip
NARROW = dataclasses.replace(CFG, dtype="bfloat16")
NARROWER = dataclasses.replace(NARROW, residual_dtype="bfloat16")


class Case(NamedTuple):
    cfg: BertConfig
    exits: ExitConfig
    rows: int  # N
    length: int  # T
    tile: int  # B

    @property
    def model(self):
        return EarlyExitBert(self.cfg, self.exits)

    @property
    def bound(self):
        return F32 if self.cfg.dtype == "float32" else BF16

    def run(self, variables, batch, thresholds, **settings):
        settings = {"tile": self.tile, **settings}
        return Decision(
            *map(np.asarray, early_exit(self.model, variables, batch, thresholds, **settings))
        )


CASES = {
    "ragged last tile": Case(CFG, ExitConfig((1, 2, 4, 5), 3), 23, 9, 8),
    "whole tiles, an exit after every layer": Case(
        CFG, ExitConfig((1, 2, 3, 4, 5, 6), 7), 18, 7, 9
    ),
    "one row at a time": Case(CFG, ExitConfig((1, 4, 6), 2, "cls", "last"), 7, 10, 1),
    "one exit, tile larger than the pool": Case(CFG, ExitConfig((3,), 4), 10, 8, 50),
    "small tiles for the rest": Case(CFG, ExitConfig((2, 3, 5), 3), 45, 6, 32),
    "exit 0": Case(CFG, ExitConfig((0, 1, 3, 5), 3, buckets=64), 23, 9, 8),
    "exit 0 of low rank": Case(CFG, ExitConfig((0, 2), 35, buckets=128), 19, 7, 9),
    "pairs": Case(CFG, ExitConfig((1, 2, 4, 6), 3, "pair"), 23, 9, 8),
    "pairs, their own layer": Case(
        CFG, ExitConfig((0, 2, 3), 3, "pair", "last", 64, separator=(3,)), 19, 7, 9
    ),
    "bfloat16 operands": Case(NARROW, ExitConfig((1, 3, 6), 3), 23, 9, 8),
    "bfloat16 stream": Case(NARROWER, ExitConfig((1, 3, 6), 3), 23, 9, 8),
}
FIRST = CASES["ragged last tile"]


@functools.lru_cache
def inputs(case, seed):
    """Variables, and a batch of ragged lengths."""
    variables = random_variables(case.cfg, case.exits, seed)
    return jax.tree.map(jnp.asarray, variables), Batch(
        *random_batch(case.cfg, case.rows, case.length, seed + 1)
    )


@functools.lru_cache
def program(model):
    return jax.jit(model.apply)


def applied(case, variables, batch):
    """The logits of every exit by the plain model: float32 [E, N, C]."""
    return np.asarray(program(case.model)(variables, batch))


def forced(case, variables, batch, **settings):
    """The same by the engine, every row sent to exit e by its thresholds."""
    exits = len(case.exits.layers)
    return np.stack(
        [
            case.run(variables, batch, np.where(np.arange(exits) < e, 2.0, 0.0), **settings).logits
            for e in range(exits)
        ]
    )


def of_rows(batch, rows):
    return jax.tree.map(lambda leaf: leaf[rows], batch)


def scores_of(logits, temperatures):
    """float32 [E, N]."""
    column = np.asarray(temperatures, np.float32)[:, None]
    return np.asarray(confidence(logits, column))


def check(decision, logits, thresholds, temperatures, bound, rows=None):
    """The first `rows` of `decision` against all exits' logits [E, N, C], within a bound on scores.

    Returns the largest differences of scores, logits and recomputed scores, and how many
    exits differ.
    """
    front = slice(rows)
    exits, total, _ = logits.shape
    temperatures = np.asarray(temperatures, np.float32)
    thresholds = np.broadcast_to(np.asarray(thresholds, np.float32), (total, exits))
    early, late, plain = (
        np.asarray(select_exit(logits, thresholds + delta, temperatures).exit)[front]
        for delta in (-np.float32(bound), np.float32(bound), np.float32(0))
    )
    exit, score = decision.exit[front], decision.score[front]
    assert (early <= exit).all()
    assert (exit <= late).all()

    row = np.arange(total)[front]
    off_logits = np.abs(decision.logits[front] - logits[exit, row]).max()
    assert off_logits <= bound * (1 + np.abs(logits).max())
    off_score = np.abs(score - scores_of(logits, temperatures)[exit, row]).max()
    assert off_score <= bound
    # The score follows from the returned logits. Not to the bit: here each step of it is
    # a program of its own, there XLA fuses them, and rounds the exponent elsewhere.
    again = np.asarray(confidence(decision.logits, temperatures[decision.exit]))[front]
    off_again = np.abs(score - again).max()
    assert off_again <= NEAR
    # And the exit from the returned score, exactly: who left was sure.
    assert ((score >= thresholds[row, exit]) | (exit == exits - 1)).all()
    return off_score, off_logits, off_again, (plain != exit).sum()


level = st.one_of(st.floats(0.25, 1.0, width=32), st.sampled_from([0.0, 1.0, 2.0]))


def draw_thresholds(data, case):
    exits, kind = len(case.exits.layers), data.draw(st.sampled_from(["one", "exit", "row"]))
    if kind == "one":
        return data.draw(level)
    if kind == "exit":
        return np.array(data.draw(st.lists(level, min_size=exits, max_size=exits)), np.float32)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    return rng.uniform(0.2, 1.1, (case.rows, exits)).astype(np.float32)


def draw(data, case):
    variables, batch = inputs(case, data.draw(st.integers(0, 19)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    temperatures = rng.uniform(0.4, 2.5, len(case.exits.layers)).astype(np.float32)
    return variables, batch, draw_thresholds(data, case), temperatures, rng


few = settings(max_examples=12, deadline=None, derandomize=True, database=None)


# Promise 1: rows are independent


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@given(data=st.data())
@few
def test_the_loop_is_select_exit_over_the_plain_model(case, data):
    variables, batch, thresholds, temperatures, _ = draw(data, case)
    decision = case.run(variables, batch, thresholds, temperatures=temperatures)
    check(decision, applied(case, variables, batch), thresholds, temperatures, case.bound)


@pytest.mark.parametrize("name", ["ragged last tile", "bfloat16 operands", "bfloat16 stream"])
@given(data=st.data())
@few
def test_order_and_companions_change_nothing(name, data):
    """Rows shuffled, and some replaced by copies of others: the rest is as alone, within NEAR."""
    case = CASES[name]
    variables, batch, thresholds, temperatures, rng = draw(data, case)
    alone = forced(case, variables, batch)
    rows = rng.permutation(case.rows)
    rows = np.where(rng.random(case.rows) < data.draw(st.sampled_from([0.0, 0.5])), rows[0], rows)
    if np.ndim(thresholds) == 2:
        thresholds = thresholds[rows]
    decision = case.run(variables, of_rows(batch, rows), thresholds, temperatures=temperatures)
    check(decision, alone[:, rows], thresholds, temperatures, NEAR)


@given(data=st.data())
@few
def test_rows_at_the_front_alone_are_run(data):
    variables, batch, thresholds, temperatures, _ = draw(data, FIRST)
    rows = data.draw(st.integers(0, FIRST.rows))
    decision = FIRST.run(variables, batch, thresholds, temperatures=temperatures, rows=rows)
    for column in decision:
        assert (column[rows:] == 0).all()
    if rows:
        check(decision, forced(FIRST, variables, batch), thresholds, temperatures, NEAR, rows)


@pytest.mark.parametrize(("rows", "tile"), [(23, 64), (16, 8)])
def test_pool_and_tile_change_nothing(rows, tile):
    other = FIRST._replace(rows=rows, tile=tile)
    for seed in range(3):
        variables, batch = inputs(FIRST, seed)
        alone = forced(FIRST, variables, batch)[:, :rows]
        for threshold in (0.45, 0.6, 0.8):
            decision = other.run(variables, of_rows(batch, np.arange(rows)), threshold)
            check(decision, alone, threshold, np.ones(4), NEAR)


def test_the_device_changes_nothing():
    variables, batch = inputs(FIRST, 0)
    here = FIRST.run(variables, batch, 0.6)
    there = early_exit(
        FIRST.model, jax.device_put(variables, jax.devices()[2]), batch, 0.6, tile=FIRST.tile
    )
    assert there.exit.devices() == {jax.devices()[2]}
    check(Decision(*map(np.asarray, there)), forced(FIRST, variables, batch), 0.6, np.ones(4), NEAR)
    np.testing.assert_array_equal(here.exit, there.exit)


@pytest.mark.parametrize(
    ("name", "length", "tile"),
    [
        ("ragged last tile", 16, 8),
        ("ragged last tile", 9, 1),
        ("bfloat16 operands", 16, 1),
    ],
)
def test_another_length_or_single_rows_stay_near(name, length, tile):
    """A longer bucket, and one row per tile."""
    case = CASES[name]
    for seed in range(3):
        variables, batch = inputs(case, seed)
        alone = forced(case, variables, batch)
        pad = ((0, 0), (0, length - case.length))
        long = jax.tree.map(lambda leaf, pad=pad: np.pad(leaf, pad), batch)
        for threshold in (0.45, 0.6, 0.8):
            decision = case.run(variables, long, threshold, tile=tile)
            check(decision, alone, threshold, np.ones(len(alone)), case.bound)


def test_rows_of_these_models_leave_at_every_exit():
    """Else the tests above would say little."""
    for name in ("ragged last tile", "whole tiles, an exit after every layer"):
        case, exits = CASES[name], set()
        for seed in range(5):
            exits |= set(case.run(*inputs(case, seed), 0.6).exit.tolist())
        assert exits == set(range(len(case.exits.layers)))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_exit_logits_of_one_run_are_those_of_a_run_to_each_exit(case):
    variables, batch = inputs(case, 4)
    logits = np.asarray(exit_logits(case.model, variables, batch, tile=case.tile))
    wanted = forced(case, variables, batch)  # by another program, which may round otherwise
    np.testing.assert_allclose(logits.swapaxes(0, 1), wanted, rtol=0, atol=1e-6)
    rows = case.rows - 2
    logits_of_front = np.asarray(
        exit_logits(case.model, variables, batch, tile=case.tile, rows=rows)
    )
    np.testing.assert_allclose(logits_of_front[:rows], logits[:rows], rtol=0, atol=case.bound)
    assert (logits_of_front[rows:] == 0).all()


# Promise 2: the limits


def test_above_one_is_the_full_model_and_zero_the_first_head():
    variables, batch = inputs(FIRST, 3)
    plain = applied(FIRST, variables, batch)
    full, first = (FIRST.run(variables, batch, threshold) for threshold in (1.0001, 0))
    assert (full.exit == 3).all()
    assert (first.exit == 0).all()
    np.testing.assert_allclose(full.logits, plain[-1], rtol=0, atol=F32)
    np.testing.assert_allclose(first.logits, plain[0], rtol=0, atol=F32)
    for decision in (full, first, FIRST.run(variables, batch, 0.6)):
        assert (decision.score >= 1 / 3 - NEAR).all()  # nobody without an answer
        assert (decision.logits != 0).all()


def test_a_saturated_score_leaves_at_one_but_not_above():
    variables, batch = jax.tree.map(np.array, inputs(FIRST, 3))
    variables["params"]["heads"]["exits"]["classifier"]["bias"][:, 0] = 300
    assert (FIRST.run(variables, batch, 1.0).exit == 0).all()
    at_one = FIRST.run(variables, batch, 1.0)
    assert (at_one.score == 1).all()
    assert (FIRST.run(variables, batch, np.nextafter(np.float32(1), np.float32(2))).exit == 3).all()


def test_a_score_equal_to_the_threshold_leaves():
    """Each row's own score at exit 1 as its threshold; then the next number above it."""
    variables, batch = inputs(FIRST, 4)
    score = FIRST.run(variables, batch, [2, 0, 0, 0]).score
    thresholds = np.full((FIRST.rows, 4), 2, np.float32)
    thresholds[:, 1] = score
    assert (FIRST.run(variables, batch, thresholds).exit == 1).all()
    thresholds[:, 1] = np.nextafter(score, np.float32(2))
    assert (FIRST.run(variables, batch, thresholds).exit == 3).all()


@pytest.mark.parametrize("place", [0, 7, 22])
@pytest.mark.parametrize("easy_rows", [1, 22])
def test_an_easy_row_leaves_whatever_the_others_do(place, easy_rows):
    """One easy row among hard ones, and one hard among easy: first, in the middle, last."""
    variables, batch = inputs(FIRST, 5)
    scores = scores_of(forced(FIRST, variables, batch), np.ones(4))
    easy, hard = int(scores[0].argmax()), int(scores[:3].max(axis=0).argmin())
    threshold = (scores[0, easy] + scores[:3, hard].max()) / 2
    rows = np.full(FIRST.rows, hard if easy_rows == 1 else easy)
    rows[place] = easy if easy_rows == 1 else hard
    decision = FIRST.run(variables, of_rows(batch, rows), threshold)
    np.testing.assert_array_equal(decision.exit, np.where(rows == easy, 0, 3))


def test_temperature_moves_exits_the_right_way():
    variables, batch = inputs(FIRST, 6)
    mean = [FIRST.run(variables, batch, 0.7, temperatures=[t] * 4).exit.mean() for t in (0.3, 1, 3)]
    assert mean[0] < mean[1] < mean[2]


# The work done


def arguments(case, variables, batch, thresholds=0.5):
    """What `run_pool` takes, and its settings."""
    exits = len(case.exits.layers)
    given = (
        case.model, prepare(case.model, variables), batch.arrays(),
        broadcast_thresholds(thresholds, case.rows, exits),
        check_temperatures(None, exits), jnp.int32(case.rows),
    )  # fmt: skip
    return given, {"tile": case.tile}


def lowered(case, variables, batch):
    given, settings = arguments(case, variables, batch)
    return run_pool.lower(*given, **settings)


def count_steps(case, variables, batch, thresholds, monkeypatch):
    """Runs the loop of the engine step by step and counts the tiles."""
    steps = []

    def counted(cond, body, state):
        body = jax.jit(body)
        while cond(state):
            state = body(state)
            steps.append((int(state.segment), int(state.start)))
        return state

    with monkeypatch.context() as patch:
        patch.setattr(lax, "while_loop", counted)
        given, settings = arguments(case, variables, batch, thresholds)
        decision = run_pool.__wrapped__(*given, **settings)
    return Decision(*map(np.asarray, decision)), len(steps)


def tiles_of(alive, tile):
    """Whole tiles; what is left goes in small tiles where they are fewer rows."""
    whole, rest = divmod(int(alive), tile)
    small = max(8, tile // 4)
    if 0 < rest <= (tile // small - 1) * small:
        return whole + -(-rest // small)
    return whole + (rest > 0)


@pytest.mark.parametrize("name", ["ragged last tile", "small tiles for the rest"])
def test_the_tiles_run_are_those_of_the_rows_alive(name, monkeypatch):
    """Rows that left cost nothing, nobody runs twice."""
    case = CASES[name]
    variables, batch = inputs(case, 7)
    exits = len(case.exits.layers)
    for thresholds in (0.0, 0.6):
        decision, steps = count_steps(case, variables, batch, thresholds, monkeypatch)
        alive = [(decision.exit >= e).sum() for e in range(exits)]
        assert steps == sum(tiles_of(rows, case.tile) for rows in alive)
        if thresholds == 0:
            assert steps == tiles_of(case.rows, case.tile) == 3
        compiled = case.run(variables, batch, thresholds)
        np.testing.assert_array_equal(decision.exit, compiled.exit)
        np.testing.assert_allclose(decision.logits, compiled.logits, rtol=0, atol=F32)
    assert tiles_of(case.rows, case.tile) < steps < exits * tiles_of(case.rows, case.tile)


def test_layers_above_an_exit_are_not_read_by_who_left():
    """NaN above layer 1 reaches the rows that stay, and no other."""
    variables, batch = jax.tree.map(np.array, inputs(FIRST, 8))
    clean = FIRST.run(variables, batch, 0.0)
    for leaf in jax.tree.leaves(variables["params"]["bert"]["layers"]):
        leaf[1:] = np.nan
    for leaf in jax.tree.leaves(variables["params"]["heads"]["exits"]):
        leaf[1:] = np.nan
    all_leave = FIRST.run(variables, batch, 0.0)
    np.testing.assert_array_equal(all_leave.logits, clean.logits)
    threshold = np.median(clean.score)
    decision = FIRST.run(variables, batch, threshold)
    left = clean.score >= threshold
    assert 0 < left.sum() < FIRST.rows
    np.testing.assert_array_equal(decision.exit, np.where(left, 0, 3))
    np.testing.assert_allclose(decision.logits[left], clean.logits[left], rtol=0, atol=F32)
    assert np.isnan(decision.logits[~left]).all()


@pytest.mark.parametrize("name", ["ragged last tile", "bfloat16 stream"])
def test_full_depth_is_the_last_exit_of_the_plain_model(name):
    case = CASES[name]
    variables, batch = inputs(case, 9)
    logits = np.asarray(full_depth(case.model, variables, batch, tile=case.tile))
    plain = applied(case, variables, batch)[-1]
    assert np.abs(logits - plain).max() <= case.bound * (1 + np.abs(plain).max())
    of_engine = case.run(variables, batch, 2.0).logits
    assert np.abs(logits - of_engine).max() <= case.bound * (1 + np.abs(plain).max())
    in_small_tiles = np.asarray(
        full_depth(case.model, variables, batch, tile=16)
    )  # 23 rows: and one of 8
    assert np.abs(in_small_tiles - plain).max() <= case.bound * (1 + np.abs(plain).max())
    logits_of_front = np.asarray(full_depth(case.model, variables, batch, tile=case.tile, rows=3))
    np.testing.assert_allclose(logits_of_front[:3], logits[:3], rtol=0, atol=case.bound)
    assert (logits_of_front[max(3, case.tile) :] == 0).all()


@pytest.mark.parametrize("tokens", [1, FEW_ROWS, FEW_ROWS + 1, 300])
def test_a_layer_with_turned_kernels_is_the_layer(tokens):
    """On CPUs float32 kernels stand turned, also those of frozen variables."""
    variables, _ = inputs(FIRST, 0)
    ready = prepare(FIRST.model, freeze(variables)).layers[0]
    plain = jax.tree.map(lambda leaf: leaf[0], variables["params"]["bert"]["layers"])
    projections = [name for name, part in plain.items() if "kernel" in part]
    assert len(projections) == 6
    assert all(set(ready[name]) == {"turned", "bias"} for name in projections)
    x = jax.random.normal(jax.random.key(tokens), (1, tokens, FIRST.cfg.hidden_size))
    layer, mask = jax.jit(EncoderLayer(FIRST.cfg).apply), jnp.ones((1, tokens), jnp.int32)
    wanted = layer({"params": plain}, x, mask)
    np.testing.assert_allclose(layer({"params": ready}, x, mask), wanted, rtol=0, atol=F32)


# Compiled programs


@pytest.fixture
def compiled():
    """The names of the programs compiled so far."""
    names = []

    def note(event, seconds, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(about.get("fun_name", ""))

    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    jax.monitoring.unregister_event_duration_listener(note)


def test_new_values_never_compile_and_a_new_shape_once(compiled):
    case = FIRST._replace(rows=21)  # a shape of its own
    variables, batch = inputs(case, 0)
    case.run(variables, batch, 0.5)
    assert compiled.count("jit(run_pool)") == 1
    others, other_batch = inputs(case, 1)
    for thresholds in (0, 1, 0.7, np.float64(0.3), [0.1, 0.2, 0.3, 0.4], np.full((21, 4), 0.5)):
        case.run(variables, batch, thresholds)
    case.run(others, other_batch, 0.5, temperatures=[1, 2, 3, 4], rows=5)
    case.run(prepare(case.model, others), other_batch, 0.5, temperatures=2.0, rows=np.int64(7))
    case.run(others, Batch(other_batch.ids.tolist()), 0.5, rows=jnp.int32(9))
    case.run(others, other_batch.arrays(), 0.5)
    # An equal module is the same module; a tile above N is N.
    assert compiled.count("jit(run_pool)") == 1
    case.run(variables, of_rows(batch, np.arange(19)), 0.5)
    assert compiled.count("jit(run_pool)") == 2


def primitives(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from primitives(inner)


def test_one_program_without_the_host():
    (model, *given), settings = arguments(FIRST, *inputs(FIRST, 0))
    jaxpr = jax.make_jaxpr(functools.partial(run_pool, model, **settings))(*given)
    (program,) = jaxpr.eqns
    inside = [eqn for eqn in program.params["jaxpr"].eqns if eqn.primitive.name == "while"]
    assert len(inside) == 1
    names = list(primitives(jaxpr.jaxpr))
    assert names.count("while") == 1
    assert not [name for name in names if "callback" in name or "feed" in name]


@pytest.mark.parametrize("name", ["ragged last tile", "bfloat16 stream"])
def test_the_pool_is_written_in_place(name):
    """A tile's step costs the tile: it does not copy or widen what all rows keep.

    That is the hidden [N', T, D] and a mix per later exit, [N', E - 1, D], however many layers.
    """
    case = CASES[name]
    text = lowered(case, *inputs(case, 0)).compile().as_text()
    for axis in (case.length, len(case.exits.layers) - 1):
        whole = rf"\[32,{axis},12\]"  # the rows, in whole tiles, and one tile more
        assert re.search(rf" = \w+{whole}\S* dynamic-update-slice\(", text)
        assert not re.findall(rf" = (?:\w+{whole}\S* copy|f32{whole}\S* convert)\(", text)


# Wrong input


def test_a_pool_that_cannot_fit_says_what_it_needs(monkeypatch):
    variables, batch = inputs(FIRST, 0)
    needed = engine.pool_bytes(FIRST.model, FIRST.rows, FIRST.length, FIRST.tile)
    # The state of the loop, as compiled, is most of it.
    compiled = lowered(FIRST, variables, batch).compile()
    assert needed > compiled.memory_analysis().temp_size_in_bytes / 2
    monkeypatch.setattr(engine, "CHECKED_BYTES", 0)
    monkeypatch.setattr(engine, "free_bytes", lambda device: needed)
    FIRST.run(variables, batch, 0.5)
    monkeypatch.setattr(engine, "free_bytes", lambda device: needed - 1)
    text = r"pool of 23 rows of 9 tokens needs 0.0 GB and .* has 0.0 GB free: lower the rows"
    with pytest.raises(ValueError, match=text):
        FIRST.run(variables, batch, 0.5)
    # Devices share the rows, and those of a CPU its memory.
    half = 2 * engine.pool_bytes(FIRST.model, 12, FIRST.length, FIRST.tile)
    for free, fits in ((half, True), (half - 1, False)):
        monkeypatch.setattr(engine, "free_bytes", lambda device, free=free: free)
        with nullcontext() if fits else pytest.raises(ValueError, match=text):
            engine.check_memory(
                FIRST.model, FIRST.rows, FIRST.length, FIRST.tile, jax.devices()[:2]
            )


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"tile": 0}, r"tile must be at least 1 row. Got 0"),
        ({"thresholds": [0.5, 0.5]}, r"thresholds must have shape \(\), \(4,\) or \(23, 4\)"),
        ({"thresholds": float("nan")}, r"thresholds must be numbers"),
        ({"temperatures": [1, 1, 0, 1]}, r"temperatures must be 4 positive numbers"),
        ({"batch": Batch(np.zeros((0, 9), np.int32))}, r"at least one row. Got none"),
        ({"batch": Batch(np.zeros((2, 18), np.int32))}, r"at most 17 tokens per row"),
        ({"batch": Batch(np.zeros((2, 9)))}, r"batch.ids must be whole numbers"),
        ({"batch": Batch([[2, 99]])}, r"batch.ids must be at least 0 and below 41. Got 99"),
        ({"batch": Batch([[2, -1]])}, r"batch.ids must be .* Got -1"),
        ({"batch": Batch([[2, 3]], types=[[0, 7]])}, r"batch.types must be .* below 2. Got 7"),
        ({"rows": -3}, r"rows must be between 0 and the 23 of the batch. Got -3"),
    ],
)
def test_wrong_input(settings, text):
    variables, batch = inputs(FIRST, 0)
    settings = {"batch": batch, "thresholds": 0.5, **settings}
    with pytest.raises(ValueError, match=text):
        FIRST.run(variables, **settings)
