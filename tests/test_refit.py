"""The linear part of the heads is fitted to convergence."""

import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from rich.console import Console
from sklearn.linear_model import LogisticRegression

from ejax.bundle import Bundle, load_bundle
from ejax.config import DataConfig, ExitConfig, TrainConfig
from ejax.training.finetune import finetune
from ejax.training.loop import make_logits
from ejax.training.ngrams import fit_linear
from ejax.training.processes import Stopped
from ejax.training.refit import read_by_linear, refit, with_refitted_heads
from ejax.training.setup import initial_params, set_up
from ejax.training.warm import vectors_of


@pytest.mark.parametrize("classes", [2, 5])
def test_it_is_the_logistic_regression_of_scikit_learn(classes: int) -> None:
    rng = np.random.default_rng(classes)
    x = rng.normal(size=(300, 8)).astype(np.float32)
    labels = (x @ rng.normal(size=(8, classes)) + rng.gumbel(size=(300, classes))).argmax(axis=1)
    found = fit_linear(x, np.eye(classes)[labels], 10.0, rank=classes, several=False)
    # Of two classes scikit-learn has one weight vector, the difference of ours: w^2 is twice
    # ours, so its penalty is half.
    theirs = LogisticRegression(C=0.1 if classes > 2 else 0.2, tol=1e-8).fit(x, labels)
    ours = x @ found["table"] + found["bias"]
    likely = np.exp(ours - ours.max(axis=1, keepdims=True))
    # Both stop near the one minimum; 1 in 1,000 is what the objective's tolerance leaves.
    np.testing.assert_allclose(
        likely / likely.sum(axis=1, keepdims=True), theirs.predict_proba(x), atol=1e-3
    )


@pytest.mark.filterwarnings("ignore:exit . .counted from 0.. its temperature")  # untrained
def test_heads_learn_more_than_few_steps_taught(tmp_path: Path, monkeypatch) -> None:
    """At a rate so small that the steps hardly move the heads."""
    fields = ("epochs=1", "head_learning_rate=1e-6", "learning_rate=1e-6", "exit_weights=1,0,1")

    clean = tiny.write_tsv(
        tmp_path / "dev.tsv", tiny.rows(41, seed=5)
    )  # labels that can be learned

    def trained(name: str) -> Bundle:
        args = [*tiny.train_args(tmp_path / name), "--dev", clean, "layers=1,2,3", *fields]
        assert tiny.ejax(*args).code == 0
        return load_bundle(tmp_path / name)

    refitted = trained("refitted")
    monkeypatch.setattr("ejax.training.finetune.with_refitted_heads", lambda _, params, *__: params)
    plain = trained("plain")
    kernels = [
        bundle.variables["params"]["heads"]["exits"]["classifier"]["kernel"]
        for bundle in (refitted, plain)
    ]
    moved = np.abs(kernels[0] - kernels[1]).max(axis=(1, 2))
    assert moved[1] == 0  # its weight is 0: it is not trained
    for e in (0, 2):
        assert moved[e] > 0
        metrics = [bundle.provenance["metrics"]["dev_b"][e] for bundle in (refitted, plain)]
        assert metrics[0]["before"]["nll"] < metrics[1]["before"]["nll"]


def test_a_head_that_is_better_on_dev_stays() -> None:
    """Rows whose labels say the opposite of those that decide."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 4)).astype(np.float32)
    labels = (x[:, 0] > 0).astype(int)
    kernel = np.array([[0, 5], [0, 0], [0, 0], [0, 0]], np.float32)
    trained = {"kernel": kernel, "bias": np.zeros(2, np.float32)}
    exits, ones = ExitConfig(layers=(1,), num_labels=2), np.ones(2)
    worse = refit(x, np.eye(2)[1 - labels], trained, x, labels, ones, exits)
    assert worse is trained
    wrong = trained | {"kernel": -kernel}
    better = refit(x, np.eye(2)[labels], wrong, x, labels, ones, exits)
    assert ((x @ better["kernel"] + better["bias"]).argmax(axis=1) == labels).mean() > 0.95


def tiny_config() -> TrainConfig:
    data = DataConfig(path=str(tiny.data()), max_length=16, buckets=(16,))
    return TrainConfig(
        model=str(tiny.model()), data=data, layers=(1, 3), epochs=1, batch_size=16, dtype="float32"
    )


def test_they_are_those_of_the_weights_that_were_trained(tmp_path: Path) -> None:
    """A workdir from which only the checkpoints were moved away has another training's file."""
    quiet = Console(quiet=True)
    made = set_up(tiny_config(), tmp_path / "one", quiet)
    dev_a = made.held_out["dev_a"]
    params = jax.device_get(initial_params(made.model, made.bert, made.config))
    rng = np.random.default_rng(0)
    other = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), params)
    # What is fitted is what the model's linear parts read; float32, in another order of sums.
    heads = other["heads"]
    linear = heads["exits"]["classifier"]
    vectors = vectors_of(made, other, dev_a)
    for e, logits in enumerate(make_logits(made)(dev_a, other)):
        read = read_by_linear(vectors, heads, made.model.exits, e)
        again = read @ linear["kernel"][e] + linear["bias"][e]
        np.testing.assert_allclose(again, logits, atol=1e-5)
    (tmp_path / "two").mkdir()
    with_refitted_heads(made, params, tmp_path / "one", quiet)
    after = with_refitted_heads(made, other, tmp_path / "one", quiet)
    afresh = with_refitted_heads(made, other, tmp_path / "two", quiet)
    jax.tree.map(np.testing.assert_array_equal, after, afresh)


def test_sigterm_meanwhile_is_answered_and_the_run_resumes(tmp_path: Path, monkeypatch) -> None:
    def signalled(*given: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return with_refitted_heads(*given)

    with monkeypatch.context() as during:
        during.setattr("ejax.training.finetune.with_refitted_heads", signalled)
        with pytest.raises(Stopped, match="the same command resumes"):
            finetune(tiny_config(), tmp_path)
    assert not (tmp_path / "bundle").exists()
    assert load_bundle(finetune(tiny_config(), tmp_path)).exits.layers == (1, 3)
