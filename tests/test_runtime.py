"""Exported folders in ONNX Runtime: answers like those of JAX, the commands, what is refused."""

import dataclasses
import functools
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from ejax.bundle import Bundle, load_bundle
from ejax.bundle_files import Graph
from ejax.classifier import EarlyExitClassifier
from ejax.errors import UserError
from ejax.evaluation import profile as profile_module
from ejax.evaluation.profile import compare, exits_by, leaving, random_rows
from ejax.export.onnx import export_onnx
from ejax.inference.shapes import Shapes
from ejax.onnx import OnnxClassifier
from ejax.saving import save_bundle

KINDS = ("one label", "several labels", "exit 0")
TEXTS = [text for _, text in tiny.rows(57, 5)] + ["great", "the film was " + "and " * 12 + "poor"]
# Sums of some dozens of float32 in another order: logits of about 5, scores of at most 1.
LOGITS, SCORES = 1e-5, 1e-6


@functools.cache
def bundle_of(kind: str) -> Bundle:
    plain = load_bundle(tiny.trained()[0], dtype="float32")
    if kind == "several labels":
        exits = dataclasses.replace(plain.exits, problem_type="multi_label_classification")
        calibration = ((1.5, 0.7, 0.4, 0.5), (0.9, 1.1, 0.5, 0.6))
        return dataclasses.replace(plain, exits=exits, temperatures=calibration, provenance={})
    if kind == "exit 0":
        exits = dataclasses.replace(plain.exits, layers=(0, *plain.exits.layers), buckets=64)
        draw = np.random.default_rng(0)
        table = draw.normal(size=(64, 3)).astype(np.float32)
        table[:, -1] **= 2
        grams = {"table": table, "bias": np.float32([0.1, -0.1]), "evidence": np.float32([0.3, 2])}
        return dataclasses.replace(
            plain, exits=exits, variables={"params": plain.variables["params"] | {"ngrams": grams}},
            temperatures=(0.8, *plain.temperatures), thresholds=(0.9, *plain.thresholds),
            provenance={},
        )  # fmt: skip
    return plain


@functools.cache
def folder_of(kind: str) -> Path:
    """Exported in float32, not to be changed."""
    folder = tiny.HOME / f"onnx {kind}"
    export_onnx(bundle_of(kind), folder)
    return folder


@functools.cache
def runtime(kind: str) -> OnnxClassifier:
    return OnnxClassifier.from_pretrained(folder_of(kind), threads=1)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_jax(kind: str) -> None:
    jax, onnx = EarlyExitClassifier(bundle_of(kind)), runtime(kind)
    encoded, exits = jax.encode(TEXTS), len(onnx.bundle.exits.layers)
    each = onnx.exit_logits(encoded)
    np.testing.assert_allclose(each, jax.exit_logits(encoded), atol=LOGITS)
    np.testing.assert_allclose(onnx.full_logits(encoded), each[-1], atol=LOGITS)
    middle = np.median(jax.decide(TEXTS, threshold=0.0).score) + 1e-4  # no row's own
    per_row = np.random.default_rng(1).choice([0.0, middle, 2.0], (len(TEXTS), exits))
    for threshold in (None, 0.0, 2.0, middle, [middle] * exits, per_row):
        wanted, found = (clf.decide(TEXTS, threshold=threshold) for clf in (jax, onnx))
        assert (found.exit == wanted.exit).all()
        np.testing.assert_allclose(found.logits, wanted.logits, atol=LOGITS)
        np.testing.assert_allclose(found.score, wanted.score, atol=SCORES)
    assert len(set(onnx.decide(TEXTS, threshold=per_row).exit)) == exits
    assert onnx.predict(TEXTS) == jax.predict(TEXTS)
    assert list(onnx.stream(iter(TEXTS))) == onnx(TEXTS)
    assert onnx([]) == []
    with pytest.raises(UserError, match="thresholds must have shape"):
        onnx(TEXTS, threshold=[0.5] * 7)


def test_rows_alike_in_length_share_a_tile() -> None:
    clf = OnnxClassifier(runtime("one label").bundle, threads=1, shapes=Shapes(tile_tokens=24))
    lengths = clf.encode(TEXTS).lengths
    pools = list(clf.pools(lengths))
    assert sorted(row for rows, _ in pools for row in rows) == list(range(len(TEXTS)))
    assert [shape.length for _, shape in pools] == [lengths[rows].max() for rows, _ in pools]
    assert all(len(rows) * shape.length <= 24 for rows, shape in pools)
    wide = runtime("one label").decide(TEXTS)  # one tile
    for column, other in zip(clf.decide(TEXTS), wide, strict=True):
        np.testing.assert_allclose(column, other, atol=LOGITS)


def test_a_process_that_answers_imports_no_jax_and_may_be_forked(tmp_path: Path) -> None:
    source = tmp_path / "texts.txt"
    source.write_text("\n".join(TEXTS) + "\n")
    code = f"""
import multiprocessing, sys
from ejax.onnx import OnnxClassifier
clf = OnnxClassifier.from_pretrained({str(folder_of("exit 0"))!r})
texts = open({str(source)!r}).read().splitlines()
answers = clf(texts)
def work(found): found.put(clf(texts) == answers)
forks = multiprocessing.get_context("fork")
found = forks.Queue()
forks.Process(target=work, args=(found,)).start()
print(found.get(timeout=60))
from ejax.cli.app import app
from ejax.cli.run import run
print(run(app, "ejax", ["predict", {str(folder_of("exit 0"))!r}, "--input", {str(source)!r},
    "--output", {str(tmp_path / "out.jsonl")!r}]))
print([name for name in ("jax", "flax", "optax", "tensorflow", "sklearn", "onnx")
    if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines() == ["True", "0", "[]"], done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == runtime("exit 0").predict(TEXTS)


def test_from_pretrained_sees_what_the_folder_holds(tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO", "ejax")
    clf = EarlyExitClassifier.from_pretrained(folder_of("one label"))
    assert isinstance(clf, OnnxClassifier)
    assert isinstance(EarlyExitClassifier.from_pretrained(tiny.trained()[0]), EarlyExitClassifier)
    again = EarlyExitClassifier.from_pretrained(clf.save_pretrained(tmp_path / "again"))
    assert f"{tmp_path / 'again'} runs in ONNX Runtime, onnx-float32" in caplog.text
    assert again(TEXTS) == pickle.loads(pickle.dumps(clf))(TEXTS) == clf(TEXTS)
    assert again.bundle.graph == clf.bundle.graph
    with pytest.raises(UserError, match="exported ONNX graph, where dtype cannot be set"):
        EarlyExitClassifier.from_pretrained(folder_of("one label"), dtype="bfloat16")
    with pytest.raises(UserError, match="threads must be a number of at least 1"):
        OnnxClassifier.from_pretrained(folder_of("one label"), threads=0)


def test_what_needs_weights_refuses(tmp_path: Path) -> None:
    folder, dev, output = folder_of("one label"), tiny.file("dev"), tmp_path / "out"
    train = tiny.train_args(output)
    for args in (
        ("place", folder, "--data", dev, "--exits", 1, "--output", output),
        ("export", folder, "--output", output),
        [*train[:2], folder, *train[3:]],
        [*train, "--teacher", folder],
    ):
        assert "give the bundle that it was exported from" in tiny.refused(*args)
    with pytest.raises(UserError, match="EarlyExitClassifier needs the weights of the encoder"):
        EarlyExitClassifier(load_bundle(folder))
    with pytest.raises(UserError, match="load it with EarlyExitClassifier"):
        OnnxClassifier.from_pretrained(tiny.trained()[0])


def test_damaged_folders_are_refused(tmp_path: Path, monkeypatch) -> None:
    def copy(kind: str = "one label") -> Path:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        return Path(shutil.copytree(folder_of(kind), tmp_path / "copy"))

    for name in ("model.onnx", "ngrams.safetensors"):
        with (copy("exit 0") / name).open("ab") as file:
            file.write(b"\0")
        with pytest.raises(UserError, match=rf"{name} is damaged or of another bundle"):
            load_bundle(tmp_path / "copy")
        (copy("exit 0") / name).unlink()
        with pytest.raises(UserError, match="missing"):
            load_bundle(tmp_path / "copy")
    for runtime_of, sentence in (
        ({"name": "onnx"}, "runtime.precision is missing"),
        ({"name": "tflite", "precision": "int8", "operators": "x"}, "must be onnx. Got 'tflite'"),
        ({"name": "onnx", "precision": "int4", "operators": "standard"}, "must be float32 or int8"),
    ):
        exits = copy() / "exits.json"
        exits.write_text(json.dumps(json.loads(exits.read_text()) | {"runtime": runtime_of}))
        with pytest.raises(UserError, match=sentence):
            load_bundle(tmp_path / "copy")
    bundle = dataclasses.replace(runtime("one label").bundle, graph=Graph(b"no graph"))
    save_bundle(bundle, tmp_path / "none")
    assert "model.onnx cannot be run by onnxruntime" in tiny.refused("predict", tmp_path / "none")
    other = dataclasses.replace(bundle, graph=runtime("exit 0").bundle.graph)
    with pytest.raises(UserError, match=r"model\.onnx must have the inputs"):
        OnnxClassifier(other)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install '\.\[onnx\]'"):
        OnnxClassifier.from_pretrained(folder_of("one label"))


def test_logits_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    bundle = bundle_of("one label")
    heads = bundle.variables["params"]["heads"]
    broken = {name: np.array(leaf) for name, leaf in heads["exits"]["classifier"].items()}
    broken["bias"][0] = np.nan  # of the first exit alone
    exits = {**heads["exits"], "classifier": broken}
    params = bundle.variables["params"] | {"heads": {**heads, "exits": exits}}
    export_onnx(dataclasses.replace(bundle, variables={"params": params}), tmp_path / "nan")
    clf = OnnxClassifier.from_pretrained(tmp_path / "nan")
    assert set(clf.decide(TEXTS, threshold=0.0).exit) == {1}  # no score, so nobody leaves
    with pytest.raises(UserError, match=r"text 0 .* has logits that are not finite"):
        clf.exit_logits(clf.encode(TEXTS))


def test_promises_are_for_these_numerics(tmp_path: Path) -> None:
    folder, dev = tmp_path / "onnx", ("--data", tiny.file("dev"))
    shutil.copytree(folder_of("one label"), folder)
    done = tiny.ejax("thresholds", folder, *dev, "--risk", 0.5, "--delta", 0.5)
    assert done.code == 0, done.err
    bundle = load_bundle(folder)
    assert bundle.provenance["target"]["dtype"] == "onnx-float32"
    assert bundle.graph == runtime("one label").bundle.graph
    EarlyExitClassifier.from_pretrained(folder)  # a warning is an error here
    target = bundle.provenance["target"] | {"dtype": "float32"}
    elsewhere = dataclasses.replace(bundle, provenance=bundle.provenance | {"target": target})
    save_bundle(elsewhere, folder)
    with pytest.warns(UserWarning, match="shown in float32, and here it computes in onnx-float32"):
        EarlyExitClassifier.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_sent_to_exits(kind: str) -> None:
    """By thresholds: so early exit is timed where texts left, though random ones have no scores."""
    bundle = bundle_of(kind)
    layers = np.array(bundle.exits.layers)
    exits = exits_by(np.linspace(1, 2, len(layers)), 12)
    assert set(exits) == set(range(len(layers)))
    for clf in (EarlyExitClassifier(bundle), runtime(kind)):
        rows = random_rows(bundle, 12, 8)
        assert leaving(clf, rows, exits)().exit.tolist() == exits.tolist()


def test_runtimes_are_compared_as_their_texts_leave(monkeypatch) -> None:
    monkeypatch.setattr(profile_module, "TURNS", 1)
    monkeypatch.setattr(profile_module, "TURN_SECONDS", 0.0)
    known = runtime("one label")
    thresholds = known.bundle.thresholds
    depth = {"rows": 4, "exit_share": [0.75, 0.25], "thresholds": list(thresholds)}
    provenance = known.bundle.provenance | {"depth": depth}
    known = OnnxClassifier(dataclasses.replace(known.bundle, provenance=provenance), threads=1)
    table, sentences = compare({"a": known, "b": known})
    assert list(table.columns[4].cells) == ["1.50", "1.50"]  # layers 1 and 3
    assert all(float(cell) > 0 for column in table.columns[2:] for cell in column.cells)
    (fastest,) = sentences
    assert re.fullmatch(
        r"Fastest here with early exit: for one text [ab], for many [ab]\.", fastest
    )
    table, sentences = compare({"a": known, "b": runtime("exit 0")})
    assert list(table.columns[6].cells)[1] == ""
    assert sentences[0].startswith("b does not know where texts leave at its thresholds")
    assert sentences[1].startswith("Fastest here at full depth: for one text ")


@pytest.mark.usefixtures("quick_profile")
def test_every_command_takes_such_a_folder(tmp_path: Path) -> None:
    folder, out = tmp_path / "onnx", tmp_path / "out.json"
    shutil.copytree(folder_of("one label"), folder)
    test, dev = ("--data", tiny.file("test")), ("--data", tiny.file("dev"))
    assert "needs this machine's profile" in tiny.refused(
        "thresholds", folder, *dev, "--budget-ms", 9
    )
    profiled = tiny.ejax("profile", folder, "--onnx", folder_of("one label"))
    assert profiled.code == 0, profiled.err
    assert "Fastest here with early exit: for one text " in profiled.err
    for args in (
        ("info", folder),
        ("evaluate", folder, *test, "--repeats", 1, "--output", out, "--thresholds", "default"),
        ("report", folder, *test, "--repeats", 1, "--output", tmp_path / "page.html"),
        ("bench", folder, *test, "--repeats", 1, "--output", tmp_path / "bench.json"),
        ("thresholds", folder, *dev, "--budget-ms", 1000, "--abstain", 0.6),
        ("calibrate", folder, *dev, "--output", tmp_path / "calibrated"),
    ):
        done = tiny.ejax(*args)
        assert done.code == 0, done.err
        assert args[0] != "info" or "ONNX Runtime, float32" in done.out
    assert json.loads(out.read_text())["dtype"] == "onnx-float32"
    bench = json.loads((tmp_path / "bench.json").read_text())
    assert [one["name"] for one in bench["contenders"]] == ["ejax full depth", "ejax early exit"]
    assert "holds no weights" in bench["left_out"]["onnx-int8"]
    chosen = load_bundle(folder)
    assert chosen.provenance["target"]["ms_alone_measured"] > 0
    assert chosen.provenance["abstain"]["dtype"] == "onnx-float32"
    calibrated = EarlyExitClassifier.from_pretrained(tmp_path / "calibrated")
    assert "calibrated" in calibrated.bundle.provenance
    # Of the same rows as in the training, whose logits differ by rounding.
    np.testing.assert_allclose(
        calibrated.bundle.temperatures, bundle_of("one label").temperatures, rtol=1e-3
    )
