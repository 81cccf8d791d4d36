"""Several labels per text, and numbers: from the loss to the command line."""

import copy
import csv
import dataclasses
import io
import json
import math
import pickle
import shutil
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import random_batch, random_variables
from rich.console import Console
from scipy.special import expit
from scipy.stats import binom, spearmanr
from sklearn.metrics import f1_score

from ejax.bundle import load_bundle
from ejax.calibration.calibrate import fit_calibration
from ejax.calibration.decisions import decide, fit_decisions, label_temperatures
from ejax.calibration.drops import expected_drop
from ejax.calibration.honesty import report
from ejax.calibration.metrics import check_rows, lost_points
from ejax.calibration.risk import risk_thresholds
from ejax.calibration.temperature import HIGHEST, LOWEST
from ejax.calibration.thresholds import (
    budget_thresholds,
    drop_thresholds,
    make_table,
    operating_point,
)
from ejax.card import model_card
from ejax.classifier import EarlyExitClassifier
from ejax.cli.run import run
from ejax.config import BertConfig, DataConfig, ExitConfig, TrainConfig
from ejax.data.sources import Example
from ejax.evaluation.labelled import check_beside, labelled_rows
from ejax.evaluation.targets import Target
from ejax.inference.engine import early_exit, exit_logits, full_depth
from ejax.inference.policy import Decision, check_calibration, select_exit
from ejax.models.bert import Batch
from ejax.models.early_exit import EarlyExitBert
from ejax.saving import save_bundle
from ejax.tasks import FAR, Regression, SeveralLabels, Task, task_of
from ejax.training.finetune import finetune
from ejax.training.losses import joint_loss
from ejax.training.processes import Stopped, Terminated
from ejax.training.setup import scores_of, set_up
from ejax.training.teacher import load_teacher
from train.guarantee import app

SEVERAL, NUMBERS = "multi_label_classification", "regression"
PROBLEMS = (SEVERAL, NUMBERS)
# A single float32 operation rounds by 6e-8 of its result; these take a dozen.
NEAR = 1e-6
# Of few rows a temperature may stop at its bound, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:exit .*:UserWarning")


# Losses, scores, answers and metrics by hand


def test_loss_of_several_labels_by_hand():
    task, p = SeveralLabels(3), np.array([0.9, 0.2, 0.5])
    logits = jnp.asarray(np.log(p / (1 - p)), jnp.float32)[None, None]  # [E, N, C]
    labels = jnp.array([[1.0, 0.0, 1.0]])
    expected = -(math.log(0.9) + math.log(0.8) + math.log(0.5)) / 3
    np.testing.assert_allclose(task.losses(logits, labels), [[expected]], rtol=NEAR)
    assert task.losses(logits, -jnp.ones((1, 3))).tolist() == [[0.0]]  # a row without labels
    q = np.array([0.6, 0.2, 0.3])
    distance = np.mean(q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p)))
    found = task.distances(logits, jnp.asarray(q, jnp.float32)[None])
    np.testing.assert_allclose(found, [[distance]], rtol=1e-5)  # a difference of two sums
    assert abs(task.distances(logits, task.beliefs(logits[0]))[0, 0]) < NEAR


def test_loss_of_a_number_by_hand():
    task = Regression(1, spread=2.0)
    logits = jnp.array([[[3.0, math.log(0.5)]]])  # says 3, give or take 0.5
    off, deviation = (3 - 4) / 2, 0.5 / 2
    expected = off**2 / 2 + math.log(deviation) + off**2 / deviation**2 / 2
    np.testing.assert_allclose(task.losses(logits, jnp.array([4.0])), [[expected]], rtol=NEAR)
    assert task.losses(logits, jnp.array([jnp.nan])).tolist() == [[0.0]]
    np.testing.assert_allclose(task.distances(logits, jnp.array([7.0])), [[2.0]], rtol=NEAR)
    slope = jax.grad(lambda x: task.losses(x, jnp.array([4.0])).sum())(logits)[0, 0]
    # The mean learns as if there were no deviation; that is right where it is the error.
    np.testing.assert_allclose(slope, [off / 2, 1 - off**2 / deviation**2], rtol=NEAR)


def test_how_sure_an_exit_was_of_a_wrong_number_pulls_no_harder_than_so():
    task = Regression(1)
    sure = jnp.array([[[3.0, math.log(s)] for s in (1e-3, 0.1, 0.5, 1.0, 10.0)]])
    wrong = jnp.full(5, 4.0)
    slopes = jax.grad(lambda x: task.losses(x, wrong).sum())(sure)[0, :, 1]
    np.testing.assert_allclose(slopes, [1 - FAR**2] * 3 + [0, 0.99], atol=1e-5)
    losses = task.losses(jnp.array([[[3.0, math.log(s)] for s in (0.499, 0.501)]]), wrong[:2])
    assert abs(float(losses[0, 0] - losses[0, 1])) < 0.02  # continuous there


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        (SeveralLabels(2), [[1.0, 0.0], [-1.0, -1.0], [0.0, 0.0]]),
        (Regression(1, spread=0.5), [2.0, math.nan, 0.0]),
    ],
)
def test_rows_without_a_label_learn_from_the_last_exit_alone(task, labels):
    """And padding from nothing, which is a third row of zeros and of weight 0."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 2)), jnp.float32)
    weights = jnp.array([1.0, 1.0, 0.0])

    def loss(logits, distillation):
        return joint_loss(
            logits, jnp.asarray(labels), weights, distillation=distillation, task=task
        )[0]

    without, taught = (jax.grad(loss)(logits, weight) for weight in (0.0, 1.0))
    assert jnp.isfinite(taught).all()
    assert (without[:, 1] == 0).all()
    assert (taught[0, 1] != 0).any()  # the first exit, by the last
    assert (taught[1, 1] == 0).all()
    assert (taught[:, 2] == 0).all()
    assert (without[:, 0] != 0).any()


CALIBRATION = np.array([2.0, 1.0, 0.5, 0.25], np.float32)  # temperatures, decision thresholds


def test_score_and_answer_of_several_labels_by_hand():
    task = SeveralLabels(2)
    p = np.array([[0.75, 0.15], [0.75, 0.1], [0.4, 0.25]])
    logits = (np.log(p / (1 - p)) * CALIBRATION[:2]).astype(np.float32)
    # A half of the way from 0.5 to 1; two fifths from 0.25 to 0, three fifths; none at all.
    score = task.score(jnp.asarray(logits), jnp.asarray(CALIBRATION))
    np.testing.assert_allclose(score, [0.4, 0.5, 0.0], atol=NEAR)
    np.testing.assert_allclose(
        task.host_score(logits, np.tile(CALIBRATION, (3, 1))), score, atol=NEAR
    )
    assert task.answers(logits[:2], CALIBRATION).tolist() == [[True, False], [True, False]]
    np.testing.assert_allclose(task.probabilities(logits, CALIBRATION), p, rtol=NEAR)


def test_score_of_a_number_by_hand():
    task, logits = Regression(1, spread=4.0), jnp.array([[7.0, math.log(2.0)]])
    np.testing.assert_allclose(task.score(logits, jnp.float32(1)), [1 / (1 + 0.5)], rtol=NEAR)
    np.testing.assert_allclose(task.score(logits, jnp.float32(2)), [0.5], rtol=NEAR)
    assert task.answers(np.asarray(logits), 1.0).tolist() == [7.0]


@pytest.mark.parametrize("task", [SeveralLabels(2), Regression(1)])
@pytest.mark.parametrize("size", [0.0, 1e6, 3e38])
def test_scores_stay_between_0_and_1(task, size):
    logits = size * jnp.array([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    score = np.asarray(task.score(logits, jnp.asarray(task.uncalibrated)))
    assert ((score >= 0) & (score <= 1)).all(), score


def test_metrics_are_those_of_the_libraries():
    rng = np.random.default_rng(3)
    task, labels, answers = SeveralLabels(4), *(rng.random((2, 50, 4)) < 0.4)
    assert task.measure(answers, labels.astype(np.float32)) == pytest.approx(
        f1_score(labels, answers, average="micro")
    )
    of_rows = [f1_score(a, b, zero_division=1) for a, b in zip(labels, answers, strict=True)]
    np.testing.assert_allclose(1 - task.row_loss(answers, labels), of_rows)
    assert task.measure(np.zeros((2, 4), bool), np.zeros((2, 4))) == 1
    (found,) = report(
        np.where(answers, 3.0, -3.0)[None], labels, task.uncalibrated[None], task
    )  # fmt: skip
    assert found["after"]["macro_f1"] == pytest.approx(f1_score(labels, answers, average="macro"))
    assert found["after"]["exact"] == (labels == answers).all(axis=1).mean()
    number = Regression(1, spread=2.0, tolerance=0.5)
    scores, said = rng.normal(size=(2, 50))
    assert number.measure(said, scores) == pytest.approx(spearmanr(said, scores).statistic)
    assert number.measure(np.ones(50), scores) == 0
    assert number.row_loss([1.0, 3.0, 99.0], [1.0, 1.0, 1.0]).tolist() == [0, 0.25, 1]
    assert number.right([1.0, 1.5, 1.6], [1.0, 1.0, 1.0]).tolist() == [True, True, False]
    logits = np.stack([said, np.zeros(50)], axis=-1)[None]
    after = report(logits, scores, [1.0], number)[0]["after"]
    assert after["rmse"] == pytest.approx(np.sqrt(np.mean((said - scores) ** 2)))
    assert after["pearson"] == pytest.approx(np.corrcoef(said, scores)[0, 1])
    constant = np.zeros((1, 50, 2))
    assert report(constant, scores, [1.0], number)[0]["after"]["pearson"] == 0


def test_the_drop_of_answers_that_differ_within_the_tolerance_has_an_interval():
    rng = np.random.default_rng(0)
    labels = rng.normal(size=60)
    full, early = labels + 0.1 * rng.normal(size=60), labels + 0.3 * rng.normal(size=60)
    drop, low, high = lost_points(Regression(1, tolerance=9.0), full, early, labels)
    assert low < drop < high
    assert lost_points(Regression(1), full, full, labels) == (0, 0, 0)


@pytest.mark.parametrize(
    ("logits", "labels", "task", "message"),
    [
        (np.zeros((2, 5, 3)), np.zeros((5, 2)), SeveralLabels(2), "must have 2 outputs for multi"),
        (np.zeros((2, 5, 1)), np.zeros(5), Regression(1), "must have 2 outputs for regression"),
        (np.zeros((2, 5, 2)), np.full((5, 2), -1.0), SeveralLabels(2), "must have a label"),
        (np.zeros((2, 5, 2)), np.full(5, np.nan), Regression(1), "must have a label"),
        (np.zeros((2, 5, 2)), np.zeros(5), SeveralLabels(2), r"must have shape \(5, 2\)"),
        (np.full((2, 5, 2), np.nan), np.zeros(5), Regression(1), "logits must be finite"),
    ],
)
def test_rows_that_do_not_fit_are_refused(logits, labels, task, message):
    with pytest.raises(ValueError, match=message):
        check_rows(logits, labels, task)


# Calibration


def simulated(task: Task, rows: int, seed: int, exits: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Logits [E, N, 2] of exits each better than the one before, and labels."""
    rng = np.random.default_rng(seed)
    noise = np.linspace(1.2, 0.3, exits)[:, None] * rng.normal(size=(exits, rows))
    if isinstance(task, Regression):
        hard = rng.uniform(0.2, 1.8, rows)
        labels = rng.normal(5, 2, rows)
        logits = np.stack([labels + hard * noise, np.log(hard * np.abs(noise) + 0.3)], axis=-1)
    else:
        truth = rng.normal(-0.3, 1, (rows, 2))
        labels = (truth > 0).astype(np.float32)
        more = np.linspace(1.2, 0.3, exits)[:, None] * rng.normal(size=(exits, rows))
        logits = 4 * (truth + np.stack([noise, more], axis=-1))
    return logits.astype(np.float32), labels.astype(np.float32)


def f1_at(thresholds, probs, true):
    return SeveralLabels(true.shape[1]).measure(probs >= np.asarray(thresholds), true)


@pytest.mark.parametrize("seed", range(4))
def test_decision_thresholds_of_one_label_are_the_best_there_are(seed):
    rng = np.random.default_rng(seed)
    true = rng.random((24, 1)) < 0.4
    probs = expit(rng.normal(size=(24, 1)) + 1.5 * (true - 0.5))
    every = [f1_at(t, probs, true) for t in np.concatenate([probs[:, 0], [0.999]])]
    assert f1_at(decide(probs, true), probs, true) == max(every)


@pytest.mark.parametrize("seed", range(4))
def test_no_other_threshold_of_a_single_label_is_better(seed):
    rng = np.random.default_rng(seed)
    true = rng.random((24, 3)) < [0.5, 0.3, 0.1]
    probs = expit(rng.normal(size=(24, 3)) + 1.5 * (true - 0.5))
    chosen = decide(probs, true)
    reached = f1_at(chosen, probs, true)
    for c in range(3):
        for other in [*probs[:, c], 0.999]:
            changed = np.where(np.arange(3) == c, other, chosen)
            assert f1_at(changed, probs, true) <= reached + 1e-12  # sums of 24 rows
    common = max(f1_at([t] * 3, probs, true) for t in np.linspace(0.01, 0.99, 99))
    assert reached >= common


def test_decision_thresholds_lie_between_rows():
    """So that float32, in which answers are given, sends no row to the other side."""
    logits, labels = simulated(SeveralLabels(2), 60, 1)
    for own, calibration in zip(logits, fit_decisions(logits, labels), strict=True):
        answers = SeveralLabels(2).answers(own, calibration)
        exact = expit(own.astype(np.float64) / calibration[:2].astype(np.float64))
        np.testing.assert_array_equal(answers, exact >= calibration[2:])
        assert np.abs(exact - calibration[2:]).min() > NEAR
    # Of thresholds that are equally good, one in the middle.
    probs = np.array([[0.1], [0.1], [0.9], [0.9]])
    assert decide(probs, np.array([[0], [0], [1], [1]], bool)) == pytest.approx(0.5, abs=0.01)


def test_labels_that_no_row_or_every_row_has():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1, 30, 3)).astype(np.float32)
    labels = np.stack([np.zeros(30), np.ones(30), rng.random(30) < 0.5], axis=1)
    found = fit_decisions(logits, labels)
    check_calibration(SeveralLabels(3), found, 1)  # a bundle may hold them
    answers = SeveralLabels(3).answers(logits[0], found[0])
    assert not answers[:, 0].any()
    assert answers[:, 1].all()
    nothing = fit_decisions(logits, np.zeros((30, 3)))
    assert not SeveralLabels(3).answers(logits[0], nothing[0]).any()
    for size in (0.0, 1e6):  # the same of every text
        same = fit_decisions(np.full((1, 30, 3), size, np.float32), labels)
        check_calibration(SeveralLabels(3), same, 1)
    check_calibration(SeveralLabels(3), fit_decisions(logits[:, :1], labels[:1]), 1)  # one row


def test_temperatures_of_labels_are_of_least_nll():
    """Among 2,000 by brute force, with the targets of Platt."""
    logits, labels = simulated(SeveralLabels(2), 80, 0)
    own, true = logits[0].astype(np.float64), labels > 0
    positive = true.sum(axis=0)
    target = np.where(true, (positive + 1) / (positive + 2), 1 / (80 - positive + 2))
    ladder = np.geomspace(LOWEST, HIGHEST, 2000)
    z = own / ladder[:, None, None]
    best = ladder[(np.logaddexp(0, z) - target * z).sum(axis=1).argmin(axis=0)]
    step = np.log(HIGHEST / LOWEST) / 1999
    np.testing.assert_allclose(np.log(label_temperatures(own, true)), np.log(best), atol=step)


def test_deviations_are_made_as_large_as_errors():
    logits, labels = simulated(Regression(1), 200, 0)
    factor = fit_calibration(Regression(1), logits, labels)
    deviation = np.exp(logits[..., 1]) * factor[:, None]
    off = (logits[..., 0] - labels) / deviation
    np.testing.assert_allclose(np.mean(off**2, axis=1), 1, rtol=1e-5)  # of 200 float32
    exact = logits.copy()
    exact[..., 0] = labels  # no error at all
    exact[1, :, 1] = 80.0
    sure = logits.copy()
    sure[..., 1] = -200.0  # an error of any number of deviations
    for one in (exact, sure):
        found = fit_calibration(Regression(1), one, labels)
        assert ((found >= 1e-3) & (found <= 1e3)).all()  # what a bundle may hold


# Thresholds and promises


def table_of(task: Task, rows: int, seed: int):
    logits, labels = simulated(task, rows, seed)
    calibration = fit_calibration(task, *simulated(task, 300, 99))
    return make_table(logits, labels, calibration, (1, 2, 4), np.full(rows, 7), task=task)


TASKS = (SeveralLabels(2), Regression(1, spread=2.0, tolerance=1.0))


@pytest.mark.parametrize("task", TASKS)
def test_a_drop_is_of_the_metric_and_a_budget_is_kept(task):
    table = table_of(task, 300, 0)
    full = operating_point(table, 2.0)
    depths = []
    for max_drop in (0.0, 1.0, 5.0):
        point = drop_thresholds(table, max_drop)
        assert 100 * (full[task.metric] - point[task.metric]) <= max_drop + 1e-9
        assert point[f"full_{task.metric}"] == full[task.metric]
        depths.append(point["mean_depth"])
    assert 4 >= depths[0] >= depths[1] > depths[2]
    point = budget_thresholds(table, 0.5)
    assert point["spent"] <= 0.5
    late = budget_thresholds(table, 0.9)
    assert late["expected_drop"] <= point["expected_drop"]


# By the metric of these rows alone 2.2 and 3.4 points would be lost.
@pytest.mark.parametrize(("task", "rows", "asked"), [(TASKS[0], 200, 1.0), (TASKS[1], 100, 3.0)])
def test_no_more_than_asked_is_lost_on_other_texts(task, rows, asked):
    """In the mean over draws of few rows, on which the fastest of many policies is flattered."""
    texts, lost = table_of(task, 4000, 1000), []
    full = task.measure(texts.answers[-1], texts.labels)
    for seed in range(10):
        exits = texts.leave(drop_thresholds(table_of(task, rows, seed), asked)["threshold"])
        lost.append(100 * (full - task.measure(texts.taken(exits), texts.labels)))
        assert texts.depth(exits) < 3.9  # else nothing would be lost
    assert 0 < np.mean(lost) <= asked


@pytest.mark.parametrize("task", TASKS)
def test_what_is_expected_to_be_lost_is_lost(task):
    """Where an exit's error is full depth's and more: of rows enough, what the labels count."""
    table = table_of(task, 4000, 3)
    expect = expected_drop(table.answers, table.labels, table.log_odds)
    full = task.measure(table.answers[-1], table.labels)
    rng = np.random.default_rng(0)
    for exits in (*np.repeat(np.arange(3)[:, None], 4000, axis=1), rng.integers(3, size=4000)):
        counted = 100 * (full - task.measure(table.taken(exits), table.labels))
        # A regression's line is that of ranks, a label's logistic: both only nearly so.
        assert expect(exits) == pytest.approx(counted, rel=0.15, abs=1e-9)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("loss", "risk"), [("disagreement", 0.3), ("error", 0.15), ("wrong", 0.4)])
def test_a_promise_holds_on_simulated_texts(task, loss, risk):
    """Broken in at most delta of the draws, as the loss of 4,000 other texts counts it."""
    draws, delta, broken, early = 15, 0.2, 0, 0
    texts = table_of(task, 4000, 1000)
    for seed in range(draws):
        chosen = risk_thresholds(table_of(task, 150, seed), risk, delta, loss=loss)
        lost = texts.lost(loss)[texts.leave(chosen["threshold"]), np.arange(4000)].mean()
        broken += lost > risk
        early += chosen["mean_depth"] < 4
    assert early > draws / 2  # else it would promise nothing
    assert broken <= binom.ppf(1 - 1e-4, draws, delta)


def test_a_target_of_a_tolerance_that_is_no_number_is_refused():
    for tolerance in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="tolerance goes with risk"):
            Target(risk=0.1, tolerance=tolerance)
    with pytest.raises(ValueError, match="tolerance goes with risk"):
        Target(max_drop=1.0, tolerance=0.1)


# The engine


CFG = BertConfig(
    vocab_size=41, hidden_size=12, num_hidden_layers=4, num_attention_heads=3,
    intermediate_size=23, max_position_embeddings=17, dtype="float32",
)  # fmt: skip
MODELS = {
    "several": EarlyExitBert(CFG, ExitConfig((1, 2, 4), 3, problem_type=SEVERAL)),
    "several, exit 0": EarlyExitBert(
        CFG, ExitConfig((0, 2, 4), 2, buckets=64, problem_type=SEVERAL)
    ),
    "a number": EarlyExitBert(
        CFG, ExitConfig((1, 2, 4), 1, problem_type=NUMBERS, center=30.0, spread=4.0)
    ),
}
ROWS = 19


@cache
def inputs(name: str, seed: int):
    model = MODELS[name]
    variables = jax.tree.map(jnp.asarray, random_variables(CFG, model.exits, seed))
    return variables, Batch(*random_batch(CFG, ROWS, 9, seed + 1))


def calibration_of(model: EarlyExitBert, rng: np.random.Generator) -> np.ndarray:
    exits, task = len(model.exits.layers), task_of(model.exits)
    if isinstance(task, Regression):
        return rng.uniform(0.4, 2.5, exits).astype(np.float32)
    parts = rng.uniform(0.4, 2.5, (exits, task.labels)), rng.uniform(0.2, 0.8, (exits, task.labels))
    return np.concatenate(parts, axis=1).astype(np.float32)


level = st.one_of(st.floats(0.0, 1.0, width=32), st.sampled_from([0.0, 1.0, 2.0]))


@pytest.mark.parametrize("name", MODELS)
@given(data=st.data())
@settings(max_examples=6, deadline=None, derandomize=True, database=None)
def test_the_loop_is_select_exit_over_the_plain_model(name, data):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        model, bound = MODELS[name], 1e-5  # of float32 across programs, as in test_engine
        variables, batch = inputs(name, data.draw(st.integers(0, 4)))
        exits, task = len(model.exits.layers), task_of(model.exits)
        thresholds = np.array(
            data.draw(st.lists(level, min_size=exits, max_size=exits)), np.float32
        )
        calibration = calibration_of(model, np.random.default_rng(data.draw(st.integers(0, 99))))
        logits = np.asarray(jax.jit(model.apply)(variables, batch))
        found = Decision(
            *map(
                np.asarray,
                early_exit(model, variables, batch, thresholds, temperatures=calibration, tile=8),
            )
        )
        early, late = (
            np.asarray(select_exit(logits, thresholds + off, calibration, task=task).exit)
            for off in (-np.float32(bound), np.float32(bound))
        )
        assert ((early <= found.exit) & (found.exit <= late)).all()
        own, row = logits[found.exit, np.arange(ROWS)], np.arange(ROWS)
        np.testing.assert_allclose(
            found.logits, own, rtol=0, atol=bound * (1 + np.abs(logits).max())
        )
        again = task.score(jnp.asarray(found.logits), jnp.asarray(calibration[found.exit]))
        np.testing.assert_allclose(found.score, again, atol=NEAR)
        at = np.broadcast_to(thresholds, (ROWS, exits))[row, found.exit]
        assert ((found.score >= at) | (found.exit == exits - 1)).all()


@pytest.mark.parametrize("name", ["several, exit 0", "a number"])
def test_in_a_callers_jit_and_on_several_devices(name):
    model = MODELS[name]
    variables, batch = inputs(name, 0)
    exits, calibration = len(model.exits.layers), calibration_of(model, np.random.default_rng(0))
    first = early_exit(model, variables, batch, 0.0, temperatures=calibration, tile=8).score
    middle = jnp.median(first)
    plain = early_exit(model, variables, batch, middle, temperatures=calibration, tile=8)
    assert len(set(np.asarray(plain.exit).tolist())) > 1  # else this says little
    jitted = jax.jit(partial(early_exit, model, tile=8))(
        variables, batch, middle, temperatures=jnp.asarray(calibration)
    )
    several = early_exit(
        model, variables, batch, middle, temperatures=calibration, tile=8, devices=jax.devices()[:3]
    )
    for other in (jitted, several):
        np.testing.assert_array_equal(other.exit, plain.exit)
        np.testing.assert_allclose(other.logits, plain.logits, rtol=1e-5, atol=1e-5)
    every = np.asarray(exit_logits(model, variables, batch, tile=8))
    assert every.shape == (ROWS, exits, task_of(model.exits).outputs)
    last = np.asarray(full_depth(model, variables, batch, tile=8))
    np.testing.assert_allclose(every[:, -1], last, rtol=1e-5, atol=1e-5)


def test_a_calibration_of_another_form_is_refused():
    task = SeveralLabels(2)
    for wrong in ([1.0, 1.0], np.ones((3, 2)), [[1.0, 1.0, 0.0, 0.5]] * 3, "x"):
        with pytest.raises(ValueError, match=r"shape \(3, 4\)"):
            check_calibration(task, wrong, 3)
    with pytest.raises(ValueError, match=r"decision thresholds must be below 1. Got 1\.0"):
        check_calibration(task, [[1.0, 1.0, 0.5, 1.0]] * 3, 3)
    assert check_calibration(task, None, 3).tolist() == [[1.0, 1.0, 0.5, 0.5]] * 3


# A bundle of each, from training to its answers


@cache
def loaded(problem: str) -> EarlyExitClassifier:
    return EarlyExitClassifier.from_pretrained(tiny.trained_on(problem)[0])


TEXTS = ["the film was great", "awful music", "poor plot and fine cast", "the", ""]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_it_learns_and_reads_back_what_it_wrote(problem, tmp_path):
    folder, result = tiny.trained_on(problem)
    bundle, name = load_bundle(folder), "micro-F1" if problem == SEVERAL else "Spearman"
    assert bundle.exits.problem_type == problem
    assert name in result.out
    point = bundle.provenance["operating_points"]["test"]
    assert point[bundle.task.metric] > 0.7, point
    assert {*bundle.provenance["metrics"]["test"][0]["after"]} >= {*bundle.task.measures}
    again = load_bundle(save_bundle(bundle, tmp_path / "again"))
    assert again.exits == bundle.exits
    assert again.temperatures == bundle.temperatures
    shown = tiny.ejax("info", folder)
    assert shown.code == 0
    assert problem in shown.out
    assert name in shown.out
    card = model_card(bundle)
    assert f"- Problem type: {problem}\n" in card
    assert f"| layer | {' | '.join(bundle.task.measures.values())} |" in card


def test_a_bundle_of_one_label_per_text_says_nothing_of_problem_types():
    folder = tiny.trained()[0]
    meta = json.loads((folder / "exits.json").read_text())
    assert not {"problem_type", "center", "spread"} & {*meta}
    assert "Problem type" not in (folder / "README.md").read_text()


def test_a_regression_without_its_center_or_spread_is_damaged(tmp_path):
    folder, _ = tiny.trained_on(NUMBERS)
    bundle = load_bundle(folder)
    train = [
        json.loads(line)["label"]
        for line in (tiny.problem_data(NUMBERS) / "train.jsonl").read_text().splitlines()
    ]
    assert bundle.exits.center == pytest.approx(np.mean(train))
    assert bundle.exits.spread == pytest.approx(np.std(train))
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    meta = json.loads((folder / "exits.json").read_text())
    for name, value, message in (
        ("center", None, "center is missing"),
        ("spread", None, "spread is missing"),
        ("spread", 0, "spread must be above 0"),
        ("spread", "2", "spread must be a number"),
    ):
        changed = {**meta, name: value} if value is not None else {**meta}
        if value is None:
            del changed[name]
        (copied / "exits.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            load_bundle(copied)


def test_answers_of_several_labels():
    clf = loaded(SEVERAL)
    chosen = clf.predict(TEXTS)
    assert {"good"} <= {*chosen[0]}
    assert {"bad", "music"} <= {*chosen[1]}
    probs, decision = clf.predict_proba(TEXTS), clf.decide(TEXTS)
    assert probs.shape == (5, 3)
    assert clf.bundle.labels == ("bad", "good", "music")
    decisions = clf.bundle.calibration[decision.exit][:, 3:]
    for names, of_text, least in zip(chosen, probs, decisions, strict=True):
        assert names == [clf.bundle.labels[i] for i in np.flatnonzero(of_text >= least)]
    for answer, names, of_text in zip(clf(TEXTS, top_k=None), chosen, probs, strict=True):
        assert [one["score"] for one in answer] == sorted(of_text.tolist(), reverse=True)
        assert {one["label"] for one in answer if one["chosen"]} == {*names}
    for likeliest, every in zip(clf(TEXTS), clf(TEXTS, top_k=2), strict=True):
        assert likeliest == every[0]
        assert len(every) == 2
    assert clf([]) == clf.predict([]) == []
    assert clf.predict_proba([]).shape == (0, 3)
    every = clf.exit_logits(clf.encode(TEXTS))
    for e in range(3):
        at = clf.decide(TEXTS, threshold=np.where(np.arange(3) < e, 2.0, 0.0))
        assert (at.exit == e).all()
        np.testing.assert_allclose(at.logits, every[e], rtol=1e-5, atol=1e-5)


def test_answers_of_a_number():
    clf = loaded(NUMBERS)
    scores = clf.predict(TEXTS)
    assert scores[0] > scores[2] > scores[1]  # 12, 9 and 7
    assert [answer["score"] for answer in clf(TEXTS)] == scores
    assert [[answer["score"]] for (answer,) in clf(TEXTS, top_k=None)] == [[s] for s in scores]
    assert clf.predict([]) == []
    with pytest.raises(ValueError, match="a regression has no probabilities"):
        clf.predict_proba(TEXTS)
    full = clf.predict(TEXTS, threshold=2.0)
    np.testing.assert_allclose(clf.full_logits(clf.encode(TEXTS))[:, 0], full, rtol=1e-5)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_streams_copies_and_drift(problem):
    clf = loaded(problem)
    texts = [
        json.loads(line)["text"]
        for line in (tiny.problem_data(problem) / "test.jsonl").read_text().splitlines()
    ]
    answers = clf(texts)
    streamed = list(clf.stream(iter(texts)))
    for one, other in zip(answers, streamed, strict=True):
        assert one | {"score": 0} == other | {"score": 0}
        assert one["score"] == pytest.approx(other["score"], rel=1e-5)
    for copied in (pickle.loads(pickle.dumps(clf)), copy.deepcopy(clf)):
        assert copied.bundle.task == clf.bundle.task
        assert copied.predict(texts[:3]) == clf.predict(texts[:3])
    assert clf.drift(clf.decide(texts)).sentence == ""


@pytest.mark.parametrize("problem", PROBLEMS)
def test_predict_writes_what_python_answers(problem, tmp_path):
    clf, texts = loaded(problem), TEXTS[:4]
    (tmp_path / "in.tsv").write_text("text\n" + "".join(f"{text}\n" for text in texts))
    done = tiny.ejax(
        "predict", tiny.trained_on(problem)[0], "--input", tmp_path / "in.tsv", "--output", "-",
    )  # fmt: skip
    assert done.code == 0, done.err
    rows = list(csv.DictReader(io.StringIO(done.out), delimiter="\t", quoting=csv.QUOTE_NONE))
    chosen = clf.predict(texts)
    if problem == SEVERAL:
        assert [row["label"] for row in rows] == ["|".join(names) or "" for names in [
            sorted(names, key=dict(zip(clf.bundle.labels, -p, strict=True)).get)
            for names, p in zip(chosen, clf.predict_proba(texts), strict=True)
        ]]  # fmt: skip
    else:
        assert {row["label"] for row in rows} == {"score"}
        np.testing.assert_allclose([float(row["score"]) for row in rows], chosen, rtol=1e-5)
    # Its own output is labelled data, of the same labels.
    assert [int(row["exit_layer"]) for row in rows] == [a["exit_layer"] for a in clf(texts)]


def test_numbers_of_any_size_are_written(tmp_path):
    """Six decimals would write 0 for all that are small."""
    bundle = load_bundle(tiny.trained_on(NUMBERS)[0])
    exits = dataclasses.replace(bundle.exits, center=2.5e-8, spread=1e-8)
    clf = EarlyExitClassifier(dataclasses.replace(bundle, exits=exits))
    folder = clf.save_pretrained(tmp_path / "small")
    clf = EarlyExitClassifier.from_pretrained(folder)  # in the type that the command computes in
    (tmp_path / "in.txt").write_text("the film was great\nawful music\n")
    done = tiny.ejax("predict", folder, "--input", tmp_path / "in.txt", "--output", "-")
    rows = list(map(json.loads, done.out.splitlines()))
    said = clf.predict([row["text"] for row in rows])
    np.testing.assert_allclose([row["score"] for row in rows], said, rtol=1e-5)
    assert said[0] > said[1] > 0


@pytest.mark.parametrize("problem", PROBLEMS)
def test_thresholds_calibrate_and_evaluate(problem, tmp_path):
    folder, data = tiny.trained_on(problem)[0], tiny.problem_data(problem) / "test.jsonl"
    metric = load_bundle(folder).task.metric
    output = tmp_path / "changed"
    for target in (
        ("--max-drop", 2), ("--budget", 0.5), ("--risk", 0.5), ("--risk", 0.6, "--loss", "error"),
        *([("--risk", 0.4, "--tolerance", 1.5, "--loss", "wrong")] if problem == NUMBERS else []),
    ):  # fmt: skip
        done = tiny.ejax("thresholds", folder, "--data", data, *target, "--output", output)
        assert done.code == 0, done.err
        made = load_bundle(output)
        chosen = made.provenance["target"]["chosen"]
        assert made.thresholds == tuple(chosen["threshold"])
        assert made.provenance["thresholds_from"] in " ".join(done.err.split())
    assert "are wrong by more than 1.5" in made.provenance["thresholds_from"] or problem == SEVERAL
    done = tiny.ejax("calibrate", folder, "--data", data, "--output", output)
    assert done.code == 0, done.err
    after = load_bundle(output)
    assert after.task == load_bundle(folder).task
    assert after.temperatures != load_bundle(folder).temperatures
    done = tiny.ejax(
        "evaluate", folder, "--data", data, "--thresholds", "default,full", "--repeats", 1,
        "--output", tmp_path / "e.json",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["metric"] == metric
    assert found["thresholds"][1][metric] == pytest.approx(found["full"][metric])
    assert found["full"][metric] == pytest.approx(found[f"exit_{metric}"][-1])


@pytest.mark.parametrize("problem", PROBLEMS)
def test_broken_promises_are_counted(problem, tmp_path):
    output, draws, delta = tmp_path / "guarantee.json", 60, 0.2
    args = [tiny.trained_on(problem)[0], "--data", tiny.problem_data(problem), "--loss", "wrong"]
    args += ["--case", f"0.6,{delta},90", "--draws", draws, "--output", output]
    args += ["--tolerance", 1.5] * (problem == NUMBERS)
    assert run(app, "train.guarantee", list(map(str, args))) == 0
    found = json.loads(output.read_text())
    assert found.get("tolerance") == (1.5 if problem == NUMBERS else None)
    [case] = found["cases"]
    assert case["violations"] <= binom.ppf(1 - 1e-4, draws, delta)
    assert case["refused"] < 1
    assert 0 < case["mean_loss"] < 0.6
    if problem == SEVERAL:
        assert run(app, "train.guarantee", [*map(str, args), "--tolerance", "1"]) == 2


@pytest.mark.parametrize("problem", PROBLEMS)
def test_what_is_for_one_label_per_text_is_refused(problem, tmp_path):
    folder, data = tiny.trained_on(problem)[0], tiny.problem_data(problem) / "test.jsonl"
    train = ("--train", tiny.problem_data(problem) / "train.jsonl")
    html, out = tmp_path / "r.html", tmp_path / "b.json"
    for args, said in (
        (("place", "--exits", 1, "--output", tmp_path / "placed"), "place must be with a bundle"),
        (("report", "--output", html), "report must be with a bundle of one label"),
        (("report", *train, "--output", html), "report must be with a bundle of one label"),
        (("bench", "--output", out), "bench must be with a bundle of one label"),
        (("bench", *train, "--output", out), "bench must be with a bundle of one label"),
        (("thresholds", "--abstain", 0.9), "abstain must be with a bundle of one label"),
        (("thresholds", "--max-drop", 1, "--delta", 0.1), "promise a risk"),
    ):
        verb, *rest = args
        assert said in tiny.refused(verb, folder, "--data", data, *rest)
    assert "export is for bundles of one label" in tiny.refused(
        "export", folder, "--output", tmp_path / "hf"
    )
    (tmp_path / "in.txt").write_text("the film\n")
    assert "abstain is for bundles of one label" in tiny.refused(
        "predict", folder, "--input", tmp_path / "in.txt", "--output", tmp_path / "out.tsv",
        "--abstain", 0.5,
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == [tmp_path / "in.txt"]
    clf = EarlyExitClassifier(load_bundle(tiny.trained()[0]))
    other = dataclasses.replace(loaded(problem).bundle, labels=clf.bundle.labels)
    with pytest.raises(ValueError, match="--beside x must be with a bundle of one label"):
        check_beside(
            clf.bundle, {"x": EarlyExitClassifier(other) if problem == SEVERAL else loaded(problem)}
        )
    for field in (f"teacher={folder}", "class_weights=balanced"):
        said = tiny.refused(
            "train", "--model", tiny.model(), "--output", tmp_path / "new", "--problem-type",
            problem, *tiny.FIELDS, f"data.path={tiny.problem_data(problem)}", field,
        )  # fmt: skip
        assert f"is for single labels. Got problem_type {problem}" in said
    if problem == NUMBERS:
        assert "no exit before the first layer" in tiny.refused(
            "train", "--model", tiny.model(), "--output", tmp_path / "new", "--problem-type",
            problem, f"data.path={tiny.problem_data(problem)}", "--layers", "0,1",
        )  # fmt: skip


def test_a_teacher_of_another_problem_type_is_refused():
    """Its probabilities do not sum to 1, and it may well have the same labels."""
    bundle = load_bundle(tiny.trained_on(SEVERAL)[0])
    train = FakeSplit([], "single_label_classification", bundle.labels)
    with pytest.raises(ValueError, match="must be of the problem type of train, single"):
        load_teacher(str(tiny.trained_on(SEVERAL)[0]), train, "float32")


def test_labelled_rows_are_read_as_the_bundle_answers(tmp_path):
    """Also where it does not know its training."""
    for problem in PROBLEMS:
        bundle = dataclasses.replace(loaded(problem).bundle, provenance={})
        rows = labelled_rows(bundle, tiny.problem_data(problem) / "test.jsonl")
        assert rows.problem_type == problem


class FakeSplit(list):
    """Rows of which all is known."""

    def __init__(self, rows, problem_type, labels):
        super().__init__(rows)
        self.problem_type, self.labels = problem_type, labels
        self.origin, self.text_columns = "rows", ("text",)


# Trainings


def config_of(problem: str, tmp_path: Path, **changes: object) -> TrainConfig:
    (tmp_path / "more.txt").write_text("a great cast\nthe music was poor\nfine fine film\n" * 4)
    data = DataConfig(
        path=str(tiny.problem_data(problem)), problem_type=problem, max_length=16, buckets=(16,),
        unlabelled=str(tmp_path / "more.txt"),
    )  # fmt: skip
    config = TrainConfig(
        model=str(tiny.model()), data=data, layers=(1, 3), epochs=1, batch_size=24, evals=2,
        checkpoint_steps=3, learning_rate=0.003, head_learning_rate=0.03, dtype="float32",
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def test_a_stopped_training_resumes_to_the_same_bits(tmp_path, monkeypatch):
    """With texts without a number, micro-batches and the eight devices of the tests."""
    config, quiet = config_of(NUMBERS, tmp_path, accumulate=2), Console(quiet=True)
    whole = load_bundle(finetune(config, tmp_path / "whole", console=quiet))
    monkeypatch.setattr(Terminated, "at", lambda self, step: step == 4)
    with pytest.raises(Stopped):
        finetune(config, tmp_path / "run", console=quiet)
    monkeypatch.undo()
    said = io.StringIO()
    resumed = load_bundle(finetune(config, tmp_path / "run", console=Console(file=said)))
    assert "from step 4 of 8" in " ".join(said.getvalue().split())
    jax.tree.map(np.testing.assert_array_equal, resumed.variables, whole.variables)
    assert resumed.temperatures == whole.temperatures
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert all(math.isfinite(line["loss"]) for line in lines if line["kind"] == "train")


def test_scores_that_float32_cannot_tell_apart_are_refused():
    def of(*scores: float) -> tuple[float, float]:
        rows = [Example("t", None, score) for score in scores]
        return scores_of(FakeSplit(rows, NUMBERS, ("score",)))

    assert of(1950.0, 2020.0) == (1985.0, 35.0)
    assert of(1e6, 2e6) == (1.5e6, 5e5)
    assert of(1e-9, 3e-9) == pytest.approx((2e-9, 1e-9))
    for scores in ((1.7e9, 1.7e9 + 60), (1e-20, 2e-20), (7.0, 7.0)):
        with pytest.raises(
            ValueError, match=r"rows: (all scores are 7|scores must differ by more)"
        ):
            of(*scores)


def test_balanced_class_weights(tmp_path, monkeypatch):
    """As scikit-learn has them, over rows with a label; the bundle keeps the word."""
    from sklearn.utils.class_weight import compute_class_weight

    labelled = [
        ("bad" if i % 4 == 0 else "good", text) for i, (_, text) in enumerate(tiny.rows(48, 3))
    ]
    tiny.write_tsv(tmp_path / "train.tsv", labelled)
    data = DataConfig(
        train=str(tmp_path / "train.tsv"), dev=str(tiny.file("dev")), max_length=16, buckets=(16,)
    )
    config = config_of(SEVERAL, tmp_path, data=data, layers=(0, 1, 3), epochs=1)
    numbers = compute_class_weight(
        "balanced", classes=np.array(["bad", "good"]), y=[label for label, _ in labelled]
    )
    assert numbers.tolist() == [2.0, pytest.approx(2 / 3)]
    setups = []
    monkeypatch.setattr(
        "ejax.training.finetune.set_up",
        lambda *given: setups.append(set_up(*given)) or setups[-1],
    )
    config = dataclasses.replace(config, class_weights="balanced")
    bundle = load_bundle(finetune(config, tmp_path / "run", console=Console(quiet=True)))
    assert bundle.provenance["config"]["class_weights"] == "balanced"
    (trained_on,) = setups
    assert trained_on.config.class_weights == pytest.approx(numbers.tolist())
