"""Known classes and texts of none of them, told apart by a tiny model's scores."""

import json

import numpy as np
import pytest
import tiny

from ejax.classifier import EarlyExitClassifier
from ejax.cli.run import run
from train.unknown import app, auroc


def unknown(*arguments: object) -> int:
    return run(app, "train.unknown", list(map(str, arguments)))


def test_scores_are_compared(tmp_path, capsys):
    """With texts that say nothing, or that and the opposite; and two of the known kind."""
    output, other = tmp_path / "unknown.json", tmp_path / "oos.tsv"
    none = ["great awful", "the film was great and awful", "music tonight", "a cast", "the plot"]
    none += ["a great film tonight", "the cast is poor"]
    tiny.write_tsv(other, [("oos", text) for text in none])
    folder = tiny.careful(tmp_path)
    args = (folder, "--data", tiny.file("test"), "--unknown", other)
    assert unknown(*args, "--output", output) == 0
    found = json.loads(output.read_text())
    assert (found["rows"], found["unknown_rows"]) == (30, 7)
    assert found["command"].endswith("/oos.tsv")
    assert found["mean_depth"] < found["unknown_mean_depth"]
    clf = EarlyExitClassifier.from_pretrained(folder)
    texts = [line.split("\t")[1] for line in tiny.file("test").read_text().splitlines()[1:]]
    texts += none
    scores = {
        "certainty of the answer given": clf.predict_proba(texts),
        "largest probability, layer 1": clf.predict_proba(texts, threshold=0),
        "largest probability, layer 3": clf.predict_proba(texts, threshold=2),
        "largest logit, layer 3": clf.full_logits(clf.encode(texts)),
    }
    for name, values in scores.items():
        known, others = np.split(values.max(axis=1), [30])
        pairs = np.mean(known[:, None] > others)
        # 210 pairs; a text alone differs by rounding from one in company, and a tie counts half.
        assert found["scores"][name]["auroc"] == pytest.approx(pairs, abs=0.02)
    for kind in ("energy", "energy, by temperature"):
        assert {f"{kind}, layer {layer}" for layer in (1, 3)} <= set(found["scores"])
    assert "mean over exits, of full depth's answer" in found["scores"]
    assert "energy" in capsys.readouterr().out


def test_an_auroc_and_its_interval():
    """Of 6 pairs 5 are in order; the example of Hanley and McNeil (1982): 0.893, error 0.032."""
    assert auroc(np.array([3.0, 4.0, 9.0]), np.array([1.0, 3.5]))["auroc"] == pytest.approx(5 / 6)
    normal = np.repeat([1, 2, 3, 4, 5], [33, 6, 6, 11, 2])
    abnormal = np.repeat([1, 2, 3, 4, 5], [3, 2, 2, 11, 33])
    found = auroc(-normal, -abnormal)
    assert found["auroc"] == pytest.approx(0.893, abs=5e-4)
    assert (found["high"] - found["low"]) / 3.92 == pytest.approx(0.032, abs=1e-3)


def test_a_file_without_texts(tmp_path, capsys):
    empty = tmp_path / "empty.tsv"
    empty.write_text("label\ttext\n")
    args = (tiny.trained()[0], "--data", tiny.file("test"), "--unknown", empty)
    assert unknown(*args, "--output", tmp_path / "out.json") == 2
    assert "empty.tsv holds no text" in capsys.readouterr().err
