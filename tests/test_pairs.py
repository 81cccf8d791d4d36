"""Pairs of texts: what the exits read of them, from the training to every program that answers."""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from tokenizers import Tokenizer, processors

from ejax.bundle import Bundle, load_bundle
from ejax.classifier import EarlyExitClassifier
from ejax.data.tokenizer import load_tokenizer
from ejax.inference.engine import early_exit
from ejax.models.bert import Batch
from ejax.saving import save_bundle


def rows(count: int, seed: int, *, wrong_too: bool = False) -> list[tuple[str, str, str]]:
    """(label, first, second): which of the two texts is the good one."""
    draw, made = random.Random(seed), []
    for i in range(count):
        names = ("good", "bad") if i % 2 else ("bad", "good")
        texts = []
        for name in names:
            words = draw.choices(tiny.FILLERS, k=draw.randint(0, 3))
            words.insert(draw.randint(0, len(words)), draw.choice(tiny.CLASSES[name]))
            texts.append(" ".join(words))
        wrong = wrong_too and i % 7 == 6  # without errors a temperature has no minimum
        made.append(("first" if i % 2 != wrong else "second", *texts))
    return made


def without_types(folder: Path) -> Path:
    """The tiny model, with a tokenizer that frames pairs as XLM-R's does."""
    shutil.copytree(tiny.model(), folder)
    load_tokenizer(folder).save(folder)
    (folder / "vocab.txt").unlink()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] [SEP] $B [SEP]",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )  # fmt: skip
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module", params=["types", "separator"])
def trained(request, tmp_path_factory) -> tuple[Path, Bundle]:
    folder = tmp_path_factory.mktemp("pairs")
    for seed, (name, count) in enumerate({"train": 240, "dev": 60, "test": 80}.items()):
        made = rows(count, seed, wrong_too=name != "train")
        lines = ["label\tpremise\thypothesis", *map("\t".join, made)]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    model = tiny.model() if request.param == "types" else without_types(folder / "model")
    args = ("--model", model, "--output", folder / "bundle", "--layers", "1,3")
    result = tiny.ejax("train", *args, *tiny.FIELDS, f"data.path={folder}")
    assert result.code == 0, result.err
    bundle = load_bundle(folder / "bundle")
    assert bundle.exits.separator == (() if request.param == "types" else (3, 3))
    return folder / "bundle", bundle


def test_the_first_exit_tells_the_texts_apart(trained) -> None:
    """One mean over both knows which words there are, not which text has them: half are right."""
    clf = EarlyExitClassifier(trained[1])
    assert clf.bundle.exits.pooling == "pair"
    made = rows(200, seed=9)
    found = clf([(first, second) for _, first, second in made], threshold=0.0)
    right = [of["label"] == label for of, (label, *_) in zip(found, made, strict=True)]
    assert np.mean(right) > 0.9


def test_one_text_and_tokens_without_types_are_refused(trained) -> None:
    clf = EarlyExitClassifier(trained[1])
    with pytest.raises(ValueError, match=r"trained on two texts a row.*Got a string"):
        clf(["one text"])
    if clf.bundle.exits.separator:
        return  # which tells the texts apart
    batch = Batch([[2, 5, 3, 6, 3]])
    with pytest.raises(ValueError, match=r"batch.types must be given.*Got None"):
        early_exit(clf.model, trained[1].variables, batch, 0.9)


def test_a_separator_that_is_not_the_tokenizers_is_not_saved(trained, tmp_path: Path) -> None:
    exits = dataclasses.replace(trained[1].exits, separator=(2,))
    with pytest.raises(ValueError, match=r"separator must be \(.*Got \(2,\)"):
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
