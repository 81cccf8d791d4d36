"""The linear part of the heads is fitted to convergence."""

from pathlib import Path

import numpy as np
import pytest
import tiny
from sklearn.linear_model import LogisticRegression

from ejax.bundle import Bundle, load_bundle
from ejax.config import ExitConfig
from ejax.training.ngrams import fit_linear
from ejax.training.refit import refit


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
