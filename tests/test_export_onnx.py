"""A bundle as an ONNX graph: its logits, its exits, INT8, and the command.

Axes: B batch, T tokens, D width, E exits, N rows, O outputs.
"""

import dataclasses
import json
import re
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import onnx
import onnxruntime
import pytest
import tiny

from ejax.bundle import Bundle, load_bundle
from ejax.classifier import EarlyExitClassifier
from ejax.config import ExitConfig
from ejax.data.batches import pad
from ejax.data.sources import row_hash
from ejax.data.tokenizer import Encoded, load_tokenizer
from ejax.errors import UserError
from ejax.evaluation.labelled import labelled_rows, unlabelled_rows
from ejax.export.graph import early_exit_graph, every_exit_graph
from ejax.export.onnx import activation_ranges, choose_layers, export_onnx, noise_of
from ejax.inference.policy import select_exit
from ejax.models.bert import Batch
from ejax.models.early_exit import EarlyExitBert
from ejax.onnx import OnnxClassifier
from ejax.provenance import FITTED, Ledger
from ejax.saving import save_bundle

ROWS, LONGEST = 40, 12
# float32 sums in another order; relative to the largest logit, about 10 here.
CLOSE = 1e-5
SINGLE, SEVERAL, REGRESSION = (
    "single_label_classification", "multi_label_classification", "regression",
)  # fmt: skip
KINDS = {  # of all problem types, poolings, mixes and activations, with and without exit 0
    "single": ("gelu", ExitConfig((1, 3), 2)),
    "each layer": ("relu", ExitConfig((1, 2, 3), 3, "cls", "last")),
    "exit 0": ("gelu_new", ExitConfig((0, 1, 3), 5, "cls", buckets=64)),
    "several": ("gelu", ExitConfig((0, 2, 3), 4, "mean", "last", 64, SEVERAL)),
    "regression": (
        "relu",
        ExitConfig((1, 2, 3), 1, "mean", problem_type=REGRESSION, center=3.0, spread=2.0),
    ),
    "pairs": ("gelu", ExitConfig((0, 1, 3), 3, "pair", buckets=64)),
    "pairs, each layer": ("relu", ExitConfig((1, 2, 3), 3, "pair", "last", separator=(3,))),
    "one exit": ("gelu_pytorch_tanh", ExitConfig((2,), 2, "cls")),
}


class Made(NamedTuple):
    bundle: Bundle
    rows: Encoded
    zero: np.ndarray | None  # exit 0's logits, where later exits add them
    logits: np.ndarray  # [E, N, O] of the exits after layers, by the engine


@cache
def made(kind: str) -> Made:
    """A bundle of random weights, some random rows, and what the engine says of them."""
    act, exits = KINDS[kind]
    cfg = dataclasses.replace(tiny.CFG, hidden_act=act, dtype="float32")
    model, rng = EarlyExitBert(cfg, exits), np.random.default_rng(len(kind))
    shapes = jax.eval_shape(model.init, jax.random.key(0), Batch([[0, 0]]))

    def drawn(path: Any, leaf: Any) -> np.ndarray:
        names = jax.tree_util.keystr(path)
        found = rng.normal(scale=0.3, size=leaf.shape)
        if "scale" in names:
            found += 1
        if "ngrams" in names and "table" in names:
            found[:, -1] **= 2  # of the weights
        if "evidence" in names:
            found = np.array([0.0, 0.7])  # one exit adds nothing
        return found.astype(np.float32)

    count, labels = len(exits.layers), [f"label {i}" for i in range(exits.num_labels)]
    temperatures: Any = tuple(rng.uniform(0.5, 3, count).tolist())
    if exits.problem_type == SEVERAL:
        each = np.concatenate(
            [rng.uniform(0.5, 2, (count, 4)), rng.uniform(0.2, 0.8, (count, 4))], 1
        )
        temperatures = tuple(map(tuple, each.tolist()))
    bundle = Bundle(
        cfg, exits, jax.tree_util.tree_map_with_path(drawn, dict(shapes)),
        load_tokenizer(tiny.model()), tuple(labels), temperatures, (0.7,) * count,
        max_length=16, buckets=(16,),
    )  # fmt: skip
    lengths = np.concatenate([[1, 2], rng.integers(1, LONGEST + 1, ROWS - 2)])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.integers(0, len(tiny.WORDS), offsets[-1]).astype(np.int32)
    rows = Encoded(ids, rng.integers(0, 2, offsets[-1]).astype(np.int8), offsets)
    rows = dataclasses.replace(rows, whole=rows)
    logits = EarlyExitClassifier(bundle).exit_logits(rows)
    zero = logits[0] if bundle.adds_evidence else None
    return Made(bundle, rows, zero, logits[int(exits.has_zero) :])


@cache
def session(kind: str, precision: Any = "float32", operators: Any = "onnxruntime") -> Any:
    bundle = made(kind).bundle
    ranges = ranges_of(kind) if precision == "int8" else None
    return onnxruntime.InferenceSession(
        early_exit_graph(bundle, precision=precision, operators=operators, ranges=ranges)
    )


@cache
def ranges_of(kind: str) -> np.ndarray:
    return activation_ranges(made(kind).bundle, made(kind).rows)[1]


def run(session: Any, of: Made, rows: Any, length: int, thresholds: Any) -> list[np.ndarray]:
    """logits, exit, score of some rows, padded to a length; thresholds [B, E] or one number."""
    batch, alone = pad(of.rows, rows, length), of.bundle.without_zero
    shape = (len(rows), len(alone.exits.layers))
    given = {
        "ids": batch.ids, "types": batch.types, "mask": batch.mask,
        "thresholds": np.broadcast_to(np.float32(thresholds), shape),
        "temperatures": alone.calibration,
    }  # fmt: skip
    if of.zero is not None:
        given["zero_logits"] = of.zero[rows]
    return session.run(["logits", "exit", "score"], given)


@pytest.mark.parametrize("operators", ["onnxruntime", "standard"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_leaves_at_its_own_exit(kind: str, operators: str) -> None:
    """1,000 random batches of both operators: B, T, rows and thresholds per row."""
    of, rng = made(kind), np.random.default_rng(7)
    alone, running = of.bundle.without_zero, session(kind, "float32", operators)
    exits, cases = len(alone.exits.layers), []
    for _ in range(84):
        rows = rng.integers(0, ROWS, rng.integers(1, 10))
        length = int(of.rows.lengths[rows].max()) + int(rng.integers(0, 4))
        spread = rng.uniform(0, 1, (len(rows), exits)).astype(np.float32)
        thresholds = np.where(rng.random((len(rows), 1)) < 0.1, rng.choice([0.0, 2.0]), spread)
        cases.append((rows, thresholds, run(running, of, rows, length, thresholds)))
    rows, thresholds = (np.concatenate([case[i] for case in cases]) for i in (0, 1))
    logits, exit, score = (np.concatenate([case[2][i] for case in cases]) for i in range(3))
    expected = select_exit(of.logits[:, rows], thresholds, alone.calibration, task=of.bundle.task)
    scores = np.asarray(of.bundle.task.score(of.logits[:, rows], alone.calibration[:, None]))
    assert exit.dtype == np.int32
    for row in np.flatnonzero(exit != np.asarray(expected.exit)):
        first = min(exit[row], int(expected.exit[row]))
        assert abs(scores[first, row] - thresholds[row, first]) < CLOSE  # within that of it
    at = np.arange(len(rows))
    bound = CLOSE * max(1, np.abs(of.logits).max())
    np.testing.assert_allclose(logits, of.logits[exit, rows], rtol=0, atol=bound)
    np.testing.assert_allclose(score, scores[exit, at], rtol=0, atol=CLOSE)
    assert len(set(exit.tolist())) == exits  # the cases reach all


@pytest.mark.parametrize("kind", KINDS)
def test_above_1_none_leaves_early_and_at_0_all_leave_first(kind: str) -> None:
    of, rows = made(kind), np.arange(ROWS)
    last = len(of.logits) - 1
    assert (run(session(kind), of, rows, LONGEST, 2)[1] == last).all()
    assert (run(session(kind), of, rows, LONGEST, 0)[1] == 0).all()


def test_every_exit_is_that_of_the_engine() -> None:
    of = made("each layer")
    for operators in ("onnxruntime", "standard"):
        running = onnxruntime.InferenceSession(every_exit_graph(of.bundle, operators=operators))
        batch = pad(of.rows, np.arange(ROWS), LONGEST)
        given = {"ids": batch.ids, "types": batch.types, "mask": batch.mask}
        (logits,) = running.run(["logits"], given)
        np.testing.assert_allclose(logits, of.logits, rtol=0, atol=CLOSE * np.abs(of.logits).max())


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_the_standard_graph_has_operators_of_onnx_alone(precision: str) -> None:
    of = made("exit 0")
    ranges = ranges_of("exit 0") if precision == "int8" else None
    content = early_exit_graph(of.bundle, precision=precision, operators="standard", ranges=ranges)
    model = onnx.load_model_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    assert {one.domain for one in model.opset_import} == {""}
    assert all(node.domain == "" for node in nodes(model.graph))
    kinds = [node.op_type for node in nodes(model.graph)]
    # Inputs of four products a layer, one before each; their kernels too.
    assert kinds.count("QuantizeLinear") == (12 if precision == "int8" else 0)
    assert kinds.count("DequantizeLinear") == (24 if precision == "int8" else 0)


def graphs(graph: Any) -> list[Any]:
    """It, and those of the branches."""
    held = [one.g for node in graph.node for one in node.attribute if one.HasField("g")]
    return [graph, *(inner for one in held for inner in graphs(one))]


def nodes(graph: Any) -> list[Any]:
    return [node for one in graphs(graph) for node in one.node]


def constants(graph: Any) -> list[Any]:
    return [constant for one in graphs(graph) for constant in one.initializer]


@pytest.mark.parametrize("operators", ["onnxruntime", "standard"])
@pytest.mark.parametrize("kind", ["single", "several"])
def test_int8_is_near_float32(kind: str, operators: str) -> None:
    of, rows = made(kind), np.arange(ROWS)
    logits, exit, _ = run(session(kind, "int8", operators), of, rows, LONGEST, 2)
    # Random weights, and widths of 20, where INT8's noise averages out less than in real models.
    noise = noise_of(logits[None], of.logits[-1:])[0]
    assert 0 < noise < 0.1
    assert (exit == len(of.logits) - 1).all()


@pytest.mark.parametrize("operators", ["onnxruntime", "standard"])
def test_int8_rows_do_not_depend_on_their_company(operators: str) -> None:
    of, rng = made("single"), np.random.default_rng(3)
    running, rows = session("single", "int8", operators), np.arange(ROWS)
    thresholds = np.full((ROWS, 2), 0.6, np.float32)
    together = run(running, of, rows, LONGEST, thresholds)
    assert 0 < together[1].mean() < 1  # some leave early, some do not
    for _ in range(10):
        some = rng.permutation(ROWS)[: rng.integers(2, ROWS)]
        for whole, part in zip(
            together, run(running, of, some, LONGEST, thresholds[some]), strict=True
        ):
            np.testing.assert_array_equal(part, whole[some])  # to the bit
    # Sums over more padding end in other last bits, and may pass half a step of a range.
    longer = run(running, of, rows, LONGEST + 3, thresholds)
    np.testing.assert_array_equal(longer[1], together[1])
    assert noise_of(longer[0][None], together[0][None])[0] < 0.01
    for row in range(ROWS):
        alone = run(running, of, rows[[row]], LONGEST, thresholds[[row]])
        assert alone[1] == together[1][row]
        # One row's heads are a product of a vector, summed in another order.
        np.testing.assert_allclose(alone[0][0], together[0][row], rtol=0, atol=1e-5)


def test_a_layer_that_does_not_stand_int8_stays_float32() -> None:
    """One output of layer 2's first product grows, and what reads it shrinks: relu does not mind.

    In float32 the function is the same; in INT8 the others share what is left of the range.
    """
    of = made("each layer")
    spoilt = spoil(of.bundle, [1])
    logits, ranges = activation_ranges(spoilt, of.rows)
    np.testing.assert_allclose(logits, of.logits, rtol=0, atol=1e-3)
    chosen, quantised = choose_layers(spoilt, of.rows, logits, ranges)
    assert np.isnan(chosen).all(axis=(1, 2)).tolist() == [False, True, False]
    assert noise_of(quantised, logits).max() < 0.1
    early_exit_graph(spoilt, precision="int8", ranges=chosen)
    spoilt = spoil(of.bundle, [0, 1, 2])
    with pytest.raises(UserError, match="no layer of this encoder stands INT8"):
        choose_layers(spoilt, of.rows, *activation_ranges(spoilt, of.rows))


def test_export_says_which_layers_stay_float32(tmp_path: Path) -> None:
    """On these texts INT8's noise in so small a model may be too much for another one too."""
    spoilt = spoil(made("each layer").bundle, [1])
    save_bundle(dataclasses.replace(spoilt, ledger=Ledger(complete=True)), tmp_path / "spoilt")
    result = tiny.ejax(
        "export", tmp_path / "spoilt", "--format", "onnx", "--int8", "--data", tiny.file("test"),
        "--output", tmp_path / "int8",
    )  # fmt: skip
    assert result.code == 0, result.err
    said = re.search(r"Layers that do not stand INT8, and stay float32: (.+)\.", result.err)
    assert said, result.err
    layers = list(map(int, said[1].split(", ")))
    assert 2 in layers
    assert len(layers) < 3
    clf = OnnxClassifier.from_pretrained(tmp_path / "int8", threads=1)
    assert clf.bundle.provenance["int8"]["layers_in_float32"] == layers
    assert "2" in clf.runtime  # whose times are not those of all layers in INT8
    kinds = [node.op_type for node in nodes(onnx.load_from_string(clf.bundle.graph.content).graph)]
    assert kinds.count("Attention") == len(layers) == 3 - kinds.count("QAttention")


def spoil(bundle: Bundle, layers: list[int]) -> Bundle:
    variables = jax.tree.map(np.array, bundle.variables)
    params = variables["params"]["bert"]["layers"]
    first, second = params["intermediate"], params["output"]
    for layer in layers:
        widest = first["bias"][layer].argmax()  # most often above 0
        first["kernel"][layer, :, widest] *= 1e4
        first["bias"][layer, widest] *= 1e4
        second["kernel"][layer, widest] /= 1e4
    return dataclasses.replace(bundle, variables=variables)


def test_int8_sums_stay_within_int16() -> None:
    """Else a CPU without VNNI, which adds pairs of products as int16, would answer otherwise."""
    content = early_exit_graph(made("single").bundle, precision="int8", ranges=ranges_of("single"))
    graph = onnx.load_model_from_string(content).graph
    kernels = {
        node.input[1]
        for node in nodes(graph)
        if node.op_type in ("MatMulIntegerToFloat", "QAttention")
    }
    held = [one for one in constants(graph) if one.name in kernels]
    assert len(held) == 12
    for kernel in map(onnx.numpy_helper.to_array, held):
        assert kernel.dtype == np.int8
        assert np.abs(kernel.astype(int)).max() == 64  # 2 * 255 * 64 < 2**15


def test_ranges_go_with_int8() -> None:
    bundle = made("single").bundle
    with pytest.raises(UserError, match="ranges go with int8"):
        early_exit_graph(bundle, precision="int8")
    with pytest.raises(UserError, match="ranges must have shape"):
        early_exit_graph(bundle, precision="int8", ranges=np.zeros((2, 4, 2)))


@cache
def saved() -> Path:
    """A bundle of random weights that knows its rows: half of dev is dev-A, the other dev-B."""
    bundle = dataclasses.replace(made("single").bundle, labels=tuple(sorted(tiny.CLASSES)))
    train, dev = (hashes_of(bundle, name) for name in ("train", "dev"))
    rows = {"train": train, "dev_a": dev[:20], "dev_b": dev[20:]}
    ledger = Ledger(complete=True).with_training(rows)
    return save_bundle(dataclasses.replace(bundle, ledger=ledger), tiny.HOME / "random")


def hashes_of(bundle: Bundle, name: str) -> list[str]:
    return [row_hash(row) for row in labelled_rows(bundle, tiny.file(name))]


def test_export_writes_a_bundle_in_int8(tmp_path: Path) -> None:
    result = tiny.ejax(
        "export", saved(), "--format", "onnx", "--int8", "--data", tiny.file("test"),
        "--output", tmp_path / "int8",
    )  # fmt: skip
    assert result.code == 0, result.err
    said = re.search(r"Of 30 rows, (\d+) are answered as in float32, and (\d+) left", result.err)
    assert said, result.err
    before, after = load_bundle(saved()), load_bundle(tmp_path / "int8")
    assert after.graph is not None
    assert (after.graph.precision, after.graph.operators) == ("int8", "onnxruntime")
    assert (after.thresholds, after.temperatures) == (before.thresholds, before.temperatures)
    # What was said is what the graph in the folder does.
    encoded = before.encode([row.inputs for row in labelled_rows(before, tiny.file("test"))])
    running = onnxruntime.InferenceSession(after.graph.content)
    given = Made(before, encoded, None, np.zeros(0))
    answers = []
    for row in range(len(encoded)):
        length = int(encoded.lengths[row])
        answers.append(
            [
                run(one, given, [row], length, before.thresholds)
                for one in (session("single"), running)
            ]
        )
    same = sum(exact[0].argmax() == int8[0].argmax() for exact, int8 in answers)
    elsewhere = sum(int(exact[1][0] != int8[1][0]) for exact, int8 in answers)
    assert (same, elsewhere) == tuple(map(int, said.groups()))


def test_ranges_are_spent_and_leave_out_what_is_kept_for_reports(tmp_path: Path) -> None:
    bundle = load_bundle(saved())
    export_onnx(bundle, tmp_path / "dev", rows=labelled_rows(bundle, tiny.file("dev")))
    rows = tiny.rows_of(load_bundle(tmp_path / "dev"))
    assert rows["ranges"] == rows["dev_a"]
    export_onnx(bundle, tmp_path / "test", rows=labelled_rows(bundle, tiny.file("test")))
    ledger = load_bundle(tmp_path / "test").ledger
    test = hashes_of(bundle, "test")
    assert ledger.among(test, FITTED) == set(test)  # which choose no thresholds
    with pytest.raises(UserError, match="INT8 needs at least 20 rows for its ranges"):
        export_onnx(bundle, tmp_path / "no", rows=labelled_rows(bundle, tiny.file("train")))


def test_ranges_need_texts_alone(tmp_path: Path) -> None:
    """Files without labels, with other labels, and folders; the rows are those with labels."""
    bundle = load_bundle(saved())
    wanted = [(row.text, row.pair) for row in labelled_rows(bundle, tiny.file("test"))]
    texts = [text for text, _ in wanted]
    alone, other = tmp_path / "text.csv", tmp_path / "other.jsonl"
    alone.write_text("id,text\n" + "".join(f"{i},{text}\n" for i, text in enumerate(texts)))
    other.write_text("".join(json.dumps({"label": "new", "text": text}) + "\n" for text in texts))
    (tmp_path / "plain.txt").write_text("\n".join(texts) + "\n")
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(alone, folder / "dev.csv")
    for data in (alone, other, tmp_path / "plain.txt", folder):
        rows, origin = unlabelled_rows(bundle, str(data))
        assert [(row.text, row.pair) for row in rows] == wanted
        assert origin.endswith(data.name if data.is_file() else "folder/dev.csv")
    # A folder without a dev file: the dev rows that are drawn from train.
    carved = tmp_path / "carved"
    carved.mkdir()
    shutil.copy(tiny.file("train"), carved / "train.tsv")
    drawn = labelled_rows(bundle, str(carved), "dev")
    assert unlabelled_rows(bundle, str(carved)) == (list(drawn), "10 % of train, seed 0")

    result = tiny.ejax(
        "export", saved(), "--format", "onnx", "--int8", "--data", alone, "--output", tmp_path / "o"
    )
    assert result.code == 0, result.err
    exported = load_bundle(tmp_path / "o")
    assert exported.ledger.among(hashes_of(bundle, "test"), ("ranges",)) == set(
        hashes_of(bundle, "test")
    )
    assert exported.provenance["int8"]["data"].endswith("/text.csv")
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("premise,hypothesis\n" + "a,b\n" * 30)
    trained_on = bundle.provenance | {"text_columns": ["text"]}
    single = dataclasses.replace(bundle, provenance=trained_on)
    with pytest.raises(UserError, match="has 2 text columns"):
        unlabelled_rows(single, str(pairs))
    with pytest.raises(UserError, match="No such file or folder"):
        unlabelled_rows(bundle, str(tmp_path / "none.csv"))


def test_export_keeps_exit_0_and_no_weights(tmp_path: Path) -> None:
    of = made("exit 0")
    export_onnx(of.bundle, tmp_path / "standard", operators="standard")
    bundle = load_bundle(tmp_path / "standard")
    assert bundle.graph is not None
    assert (bundle.graph.precision, bundle.graph.operators) == ("float32", "standard")
    assert bundle.variables["params"].keys() == {"ngrams"}
    for name, tensor in of.bundle.variables["params"]["ngrams"].items():
        np.testing.assert_array_equal(bundle.variables["params"]["ngrams"][name], tensor)
    with pytest.raises(UserError, match="needs the weights of the encoder"):
        export_onnx(bundle, tmp_path / "again")


def test_export_refuses_what_does_not_fit(tmp_path: Path, monkeypatch: Any) -> None:
    never, dev = tmp_path / "never", tiny.file("dev")

    def said(*options: object) -> str:
        return tiny.refused("export", saved(), *options, "--output", never)

    assert "--format must be hf, onnx or jax" in said("--format", "tflite")
    for options in (
        ["--format", "onnx", "--int8"], ["--int8", "--data", dev],
        ["--format", "onnx", "--data", dev],
    ):  # fmt: skip
        assert "--int8 goes with" in said(*options)
    assert "--operators must be onnxruntime or standard" in said(
        "--format", "onnx", "--operators", "all"
    )
    for name in ("onnx", "onnxruntime"):
        with monkeypatch.context() as without:
            without.delitem(sys.modules, "ejax.export.onnx")
            without.setitem(sys.modules, name, None)
            sentence = said("--format", "onnx")
            assert f"need {name}, which is not installed: `pip install '.[onnx]'`" in sentence
    assert not never.exists()
    weights = (saved() / "model.safetensors").read_bytes()
    sentence = tiny.refused("export", saved(), "--format", "onnx", "--output", saved())
    assert "a graph would replace" in sentence
    assert (saved() / "model.safetensors").read_bytes() == weights


def test_the_program_of_the_guide_answers_as_the_bundle_does(tmp_path: Path, monkeypatch) -> None:
    """Plain ONNX Runtime; and the folder says that its thresholds were chosen elsewhere."""
    guide = (Path(__file__).parents[1] / "docs" / "export.md").read_text()
    code = guide[guide.index("```python\n") + 10 :]
    bundle = load_bundle(tiny.trained()[0])
    export_onnx(bundle, tmp_path / "sentiment-onnx")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(code[: code.index("\n```\n")], found)
    cfg = dataclasses.replace(bundle.cfg, dtype="float32")
    wanted = EarlyExitClassifier(dataclasses.replace(bundle, cfg=cfg)).decide(found["texts"])
    assert found["exits"].tolist() == wanted.exit.tolist()
    np.testing.assert_allclose(found["logits"], wanted.logits, atol=1e-5)
    chosen = load_bundle(tmp_path / "sentiment-onnx").provenance["thresholds_from"]
    assert chosen.endswith(f"That was in {bundle.numerics}, before the export.")
    card = (tmp_path / "sentiment-onnx/README.md").read_text()
    assert f"Tables below: measured in {bundle.numerics}, before the export" in card
