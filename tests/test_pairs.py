"""Pairs of texts: what the exits read of them, from the training to every program that answers."""

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import tiny

from ejax.bundle import Bundle, load_bundle
from ejax.classifier import EarlyExitClassifier
from ejax.inference.engine import early_exit
from ejax.models.bert import Batch
from ejax.saving import save_bundle


def rows(count: int, seed: int, *, wrong_too: bool = False) -> list[tuple[str, str, str]]:
    """(label, first, second): whether both texts are good, or both bad."""
    draw, made = random.Random(seed), []
    for i in range(count):
        first = draw.choice(sorted(tiny.CLASSES))
        second = first if i % 2 else next(name for name in tiny.CLASSES if name != first)
        texts = []
        for name in (first, second):
            words = draw.choices(tiny.FILLERS, k=draw.randint(0, 3))
            words.insert(draw.randint(0, len(words)), draw.choice(tiny.CLASSES[name]))
            texts.append(" ".join(words))
        wrong = wrong_too and i % 7 == 6  # without errors a temperature has no minimum
        made.append(("same" if i % 2 != wrong else "other", *texts))
    return made


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Bundle]:
    folder = tmp_path_factory.mktemp("pairs")
    for seed, (name, count) in enumerate({"train": 240, "dev": 60, "test": 80}.items()):
        lines = [
            "label\tpremise\thypothesis",
            *map("\t".join, rows(count, seed, wrong_too=name != "train")),
        ]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    args = ("--model", tiny.model(), "--output", folder / "bundle", "--layers", "1,3")
    result = tiny.ejax("train", *args, *tiny.FIELDS, f"data.path={folder}")
    assert result.code == 0, result.err
    return folder / "bundle", load_bundle(folder / "bundle")


def test_the_first_exit_compares_the_two_texts(trained) -> None:
    """One mean over both knows which words there are, not which text has them."""
    clf = EarlyExitClassifier(trained[1])
    assert clf.bundle.exits.pooling == "pair"
    made = rows(200, seed=9)
    found = clf([(first, second) for _, first, second in made], threshold=0.0)
    assert (
        np.mean([of["label"] == label for of, (label, *_) in zip(found, made, strict=True)]) > 0.9
    )


def test_one_text_and_tokens_without_types_are_refused(trained) -> None:
    clf = EarlyExitClassifier(trained[1])
    with pytest.raises(ValueError, match=r"trained on two texts a row.*Got a string"):
        clf(["one text"])
    batch = Batch([[2, 5, 3, 6, 3]])
    with pytest.raises(ValueError, match=r"batch.types must be given.*Got None"):
        early_exit(clf.model, trained[1].variables, batch, 0.9)


def test_a_separator_that_is_not_the_tokenizers_is_not_saved(trained, tmp_path: Path) -> None:
    exits = dataclasses.replace(trained[1].exits, separator=(2, 2))
    with pytest.raises(ValueError, match=r"separator must be \(\).*Got \(2, 2\)"):
        save_bundle(dataclasses.replace(trained[1], exits=exits), tmp_path / "other")


def test_a_workdir_says_what_the_heads_read(trained) -> None:
    """Of single texts "mean", as those of earlier versions, which go on."""
    for bundle, expected in ((trained[0], "pair"), (tiny.trained()[0], "mean")):
        workdir = bundle.with_name(f"{bundle.name}.work")
        assert json.loads((workdir / "config.json").read_text())["pooling"] == expected


def test_the_exported_graph_answers_as_the_bundle(trained, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    folder = tmp_path / "onnx"
    result = tiny.ejax("export", trained[0], "--format", "onnx", "--output", folder)
    assert result.code == 0, result.err
    texts = [(first, second) for _, first, second in rows(40, seed=9)]
    ours, theirs = (
        EarlyExitClassifier.from_pretrained(path, **more).decide(texts)
        for path, more in ((trained[0], {"dtype": "float32"}), (folder, {}))
    )
    np.testing.assert_array_equal(ours.exit, theirs.exit)
    np.testing.assert_allclose(ours.logits, theirs.logits, atol=1e-5)
