"""A bundle's exits after layers as one ONNX graph, in which every row leaves at its own exit.

After each exit the rows that stay are gathered and run through the next segment, inside an `If`
that is not run where no row stays; what comes back is scattered over their places:

    segment 1 -> exit 1 -> If some stay: Gather -> segment 2 -> exit 2 -> If … -> Scatter

The weights are the bundle's, without another framework in between.

Axes: B batch, T tokens, D width, L layers, E exits after layers, O outputs of a head.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
from onnx import TensorProto, helper

from ejax.bundle import Bundle
from ejax.errors import UserError
from ejax.export.operators import PRODUCTS, Block, Layer, Operators, Product, Writer
from ejax.models.heads import mix_columns

Precision = Literal["float32", "int8"]


def early_exit_graph(
    bundle: Bundle,
    *,
    precision: Precision = "float32",
    operators: Operators = "onnxruntime",
    ranges: Any = None,
) -> bytes:
    """The ONNX model: B and T are free, any number of threads and rows may share it.

    Inputs: `ids`, `types`, `mask` int32 [B, T]; `thresholds` float32 [B, E]; `temperatures`, the
    bundle's calibration without exit 0's, float32 [E] or [E, 2 C]; and where later exits add exit
    0's logits to their own, `zero_logits` float32 [B, C].

    Outputs: `logits` float32 [B, O] of the exit taken, before temperature; `exit` int32 [B], from
    0 among the exits after layers; `score` float32 [B].

    Args:
      bundle: with the encoder's weights.
      precision: "int8" has int8 weights, a scale per output, and inputs of fixed ranges, so that
        no row depends on others; exit heads, attention's scores and norms stay float32.
      operators: "onnxruntime", or "standard": of ONNX alone, see `ejax.export.operators`.
      ranges: for "int8": what `ejax.export.onnx.activation_ranges` gives, float32 [L, 4, 2]; a
        layer with NaN among them stays float32.

    Raises:
      ValueError: for "int8" without ranges of the bundle's layers, or ranges without it.
    """
    model = _Model(bundle, operators, _checked(bundle, precision, ranges))
    block = Block()
    packed = _leave(model, block, model.start(block), 0)
    sizes = np.array([model.outputs, 1, 1])
    logits, score, exit = block.outputs("Split", packed, sizes, count=3, axis=1)
    flat = np.array([1])
    exit = block("Cast", block("Squeeze", exit, flat), to=TensorProto.INT32)
    block.named({"logits": logits, "exit": exit, "score": block("Squeeze", score, flat)})
    outputs = [
        _value("logits", "B", model.outputs),
        _value("exit", "B", kind=TensorProto.INT32),
        _value("score", "B"),
    ]
    shape = np.shape(bundle.without_zero.calibration)
    inputs = [_value("thresholds", "B", model.exits), _value("temperatures", *shape)]
    return block.model(model.inputs() + inputs, outputs, operators)


def every_exit_graph(
    bundle: Bundle, *, operators: Operators = "onnxruntime", ranges: Any = None
) -> bytes:
    """The same model at full depth, to be measured: all exits' logits, float32 [E, B, O].

    Without `ranges` it is float32, and has a second output: `extremes` float32 [L, 4, 2], the
    lowest and the highest input of the four products of every layer.

    Args: as of `early_exit_graph`, without `thresholds` and `temperatures` among the inputs.
    """
    observed: list[str] | None = [] if ranges is None else None
    model = _Model(bundle, operators, ranges, observed)
    block = Block()
    rows, found = model.start(block), []
    for exit in range(model.exits):
        rows, logits = model.segment(block, rows, exit)
        found.append(block("Unsqueeze", logits, np.array([0])))
    block.named({"logits": block("Concat", *found, axis=0)})
    outputs = [_value("logits", model.exits, "B", model.outputs)]
    if observed is not None:
        ends = [
            block("Reshape", block(f"Reduce{end}", x, keepdims=0), np.array([1]))
            for x in observed
            for end in ("Min", "Max")
        ]
        shape = (len(model.layers), len(PRODUCTS), 2)
        extremes = block("Reshape", block("Concat", *ends, axis=0), np.array(shape))
        block.named({"extremes": extremes})
        outputs.append(_value("extremes", *shape))
    return block.model(model.inputs(), outputs, operators)


class _Model:
    """A bundle's weights, and the segments between its exits.

    What belongs to rows is a dict of names of tensors whose first axis is B: `x` [B, T, D], what
    attention reads of the mask, `share` [B, 1, T], each token's in the mean (of a pair [B, 2, T],
    in that of its text), `seen` [B, k, P], the pooled layers so far, and those of the graph's
    inputs that are read at the exits.
    """

    def __init__(
        self,
        bundle: Bundle,
        operators: Operators,
        ranges: Any = None,
        observed: list[str] | None = None,
    ) -> None:
        self.int8 = ranges is not None
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), bundle.variables["params"])
        self.config = bundle.exits.encoder
        self.exits, self.outputs = len(self.config.layers), bundle.task.outputs
        self.embeddings = params["bert"]["embeddings"]
        stacked = params["bert"]["layers"]
        of_layer = [
            _layer(jax.tree.map(lambda leaf, i=i: leaf[i], stacked))
            for i in range(self.config.num_layers)
        ]
        self.layers = [
            layer if ranges is None else _with_ranges(layer, np.asarray(ranges[i]))
            for i, layer in enumerate(of_layer)
        ]
        self.columns = np.asarray(mix_columns(params["heads"]["mix"], self.config))  # [L, E]
        self.heads = params["heads"]["exits"]
        self.one_row = np.array([0, 1, self.config.pooled * bundle.cfg.hidden_size])
        self.evidence = params["ngrams"]["evidence"] if bundle.adds_evidence else None
        self.writer = Writer(bundle.cfg, operators, observed)

    def inputs(self) -> list[Any]:
        """Those of every graph."""
        tokens = [
            _value(name, "B", "T", kind=TensorProto.INT32) for name in ("ids", "types", "mask")
        ]
        added = [_value("zero_logits", "B", self.outputs)] if self.evidence is not None else []
        return tokens + added

    def start(self, block: Block) -> dict[str, str]:
        """The rows below the first layer."""
        x = self.writer.embed(block, self.embeddings, int8=self.int8)
        rows = {"x": x, "masked": self.writer.masked(block)}
        if self.config.pooling != "cls":
            texts = [block("Cast", "mask", to=TensorProto.FLOAT)]
            if self.config.pooling == "pair":
                second = "types"
                if self.config.separator:
                    second = self._after_separator(block)
                second = block("Mul", texts[0], block("Cast", second, to=TensorProto.FLOAT))
                texts = [block("Sub", texts[0], second), second]
            shares = []
            for real in texts:
                count = block("ReduceSum", real, np.array([1]), keepdims=1)
                share = block("Div", real, block("Max", count, np.float32(1)))
                shares.append(block("Unsqueeze", share, np.array([1])))
            rows["share"] = block("Concat", *shares, axis=1) if shares[1:] else shares[0]
        if self.evidence is not None:
            rows["zero_logits"] = "zero_logits"
        return rows

    def _after_separator(self, block: Block) -> str:
        """bool [B, T]: behind where the separator begins first."""
        ends, ids, axis = "", "ids", np.array([1])
        for token in self.config.separator:
            here = block("Equal", ids, np.array(token, np.int32))
            ends = block("And", ends, here) if ends else here
            rest = block("Slice", ids, np.array([1]), np.array([np.iinfo(np.int64).max]), axis)
            first = block("Slice", ids, np.array([0]), np.array([1]), axis)
            ids = block("Concat", rest, first, axis=1)  # turned by one
        ends = block("Cast", ends, to=TensorProto.INT32)
        return block("Greater", block("CumSum", ends, np.array(1)), ends)

    def segment(
        self, block: Block, rows: Mapping[str, str], exit: int
    ) -> tuple[dict[str, str], str]:
        """The rows after the layers up to an exit, and its logits [B, O]."""
        first = self.config.layers[exit - 1] if exit else 0
        last = self.config.layers[exit]
        rows = dict(rows)
        for i in range(first, last):
            rows["x"] = self.writer.layer(block, rows["x"], rows["masked"], self.layers[i])
            if self.config.mix == "softmax" or i + 1 == last:
                pooled = self._pooled(block, rows)
                before = [rows["seen"]] if "seen" in rows else []
                rows["seen"] = block("Concat", *before, pooled, axis=1) if before else pooled
        column = self.columns[:last, exit]
        if self.config.mix == "softmax":
            mixed = block("MatMul", column[None], rows["seen"])
        else:
            mixed = rows.pop("seen")
        mixed = block("Squeeze", mixed, np.array([1]))
        return rows, self._head(block, rows, mixed, exit)

    def _pooled(self, block: Block, rows: Mapping[str, str]) -> str:
        """[B, 1, P], of a pair [B, 2, D] in a row."""
        if self.config.pooling == "cls":
            return block("Gather", rows["x"], np.array([0]), axis=1)
        pooled = block("MatMul", rows["share"], rows["x"])
        return block("Reshape", pooled, self.one_row) if self.config.pooling == "pair" else pooled

    def _head(self, block: Block, rows: Mapping[str, str], mixed: str, exit: int) -> str:
        dense, linear = (
            {name: leaf[exit] for name, leaf in self.heads[part].items()}
            for part in ("dense", "classifier")
        )
        if self.config.problem_type == "regression":  # in the unit of the scores
            center, spread = self.config.center, self.config.spread
            linear["kernel"] = linear["kernel"] * np.array([spread, 1], np.float32)
            mean, deviation = linear["bias"]
            linear["bias"] = np.array(
                [center + spread * mean, deviation + math.log(spread)], np.float32
            )
        if self.config.pooling == "pair":
            u, v = block.outputs("Split", mixed, count=2, axis=1, num_outputs=2)
            apart, both = block("Abs", block("Sub", u, v)), block("Mul", u, v)
            mixed = block("Concat", u, v, apart, both, axis=1)
        hidden = block("Tanh", block("Gemm", mixed, dense["kernel"], dense["bias"]))
        logits = block("Gemm", hidden, linear["kernel"], linear["bias"])
        if self.evidence is not None and self.evidence[exit]:
            added = block("Mul", rows["zero_logits"], self.evidence[exit])
            logits = block("Add", logits, added)
        return logits

    def score(self, block: Block, logits: str, exit: int) -> str:
        """[B, 1], as `Task.score`."""
        calibration = block("Gather", "temperatures", np.array(exit), axis=0)
        last = np.array([1])
        if self.config.problem_type == "regression":
            deviation = block("Exp", block("Slice", logits, np.array([1]), np.array([2]), last))
            relative = block(
                "Div", block("Mul", deviation, calibration), np.float32(self.config.spread)
            )
            return block("Reciprocal", block("Add", relative, np.float32(1)))
        if self.config.problem_type == "single_label_classification":
            probs = block("Softmax", block("Div", logits, calibration), axis=1)
            return block("ReduceMax", probs, last, keepdims=1)
        temperature, decision = block.outputs("Split", calibration, count=2, axis=0, num_outputs=2)
        p = block("Sigmoid", block("Div", logits, temperature))
        way = block("Sub", p, decision)
        above = block("Div", way, block("Sub", np.float32(1), decision))
        below = block("Div", block("Neg", way), decision)
        # One of the two is negative, and the other what counts.
        return block("ReduceMin", block("Max", above, below), last, keepdims=1)


def _leave(model: _Model, block: Block, rows: Mapping[str, str], exit: int) -> str:
    """Runs rows from one exit on: float32 [B, O + 2], logits, score and exit of each."""
    given = {"thresholds": "thresholds"} | dict(rows)
    rows, logits = model.segment(block, given, exit)
    score = model.score(block, logits, exit)
    here = block(
        "ConstantOfShape", block("Shape", score),
        value=helper.make_tensor("exit", TensorProto.FLOAT, [1], [exit]),
    )  # fmt: skip
    packed = block("Concat", logits, score, here, axis=1)
    if exit == model.exits - 1:
        return packed
    threshold = block("Gather", rows["thresholds"], np.array([exit]), axis=1)
    stays = block("Squeeze", block("Not", block("GreaterOrEqual", score, threshold)), np.array([1]))
    kept = block("Squeeze", block("NonZero", stays), np.array([0]))
    some = block("Greater", block("Size", kept), np.array(0))

    deeper, nobody = Block(block), Block(block)
    taken = {name: deeper("Gather", tensor, kept, axis=0) for name, tensor in rows.items()}
    answers = _leave(model, deeper, taken, exit + 1)
    places = deeper("Unsqueeze", kept, np.array([1]))
    branches = {}
    for side, inside, answer in (
        ("then_branch", deeper, deeper("ScatterND", packed, places, answers)),
        ("else_branch", nobody, nobody("Identity", packed)),
    ):
        found = helper.make_tensor_value_info(answer, TensorProto.FLOAT, [None, model.outputs + 2])
        branches[side] = inside.graph([], [found], f"{side}_{exit}")
    return block("If", some, **branches)


def _layer(params: Mapping[str, Any]) -> Layer:
    """One layer's weights as matrices."""
    width = len(params["attention_output"]["bias"])
    parts = [params[name] for name in ("query", "key", "value")]
    qkv = Product(
        np.concatenate([part["kernel"].reshape(width, -1) for part in parts], axis=1),
        np.concatenate([part["bias"].reshape(-1) for part in parts]),
    )
    attention_output, intermediate, output = (
        Product(params[name]["kernel"].reshape(-1, len(params[name]["bias"])), params[name]["bias"])
        for name in PRODUCTS[1:]
    )
    norms = params["attention_norm"], params["output_norm"]
    return Layer(qkv, attention_output, intermediate, output, *norms)


def _with_ranges(layer: Layer, ranges: np.ndarray) -> Layer:
    """In INT8; as it is where a range is not known."""
    if np.isnan(ranges).any():
        return layer
    found = {
        name: dataclasses.replace(getattr(layer, name), extremes=(float(low), float(high)))
        for name, (low, high) in zip(PRODUCTS, ranges, strict=True)
    }
    return dataclasses.replace(layer, **found)


def _checked(bundle: Bundle, precision: Precision, ranges: Any) -> np.ndarray | None:
    if precision not in ("float32", "int8") or (ranges is None) != (precision == "float32"):
        raise UserError(f"ranges go with int8, and with it alone. Got {precision}.")
    if ranges is None:
        return None
    shape = (bundle.exits.num_layers, len(PRODUCTS), 2)
    if np.shape(ranges) != shape:
        raise UserError(f"ranges must have shape {shape}. Got {np.shape(ranges)}.")
    return np.asarray(ranges, np.float32)


def _value(name: str, *shape: int | str, kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)
