"""The nodes of an ONNX graph, and an encoder's layer of two sets of operators.

"onnxruntime" uses fused operators of `com.microsoft`, which ONNX Runtime has on CPUs; "standard"
those of ONNX alone, products in INT8 as QuantizeLinear and DequantizeLinear around a MatMul, which
other engines know too.

Layer norms are written out: ONNX Runtime's own operator took 4.7 times as long, for 512 tokens of
width 384 on one core.

Axes: B batch, T tokens, D width, H heads, K head size, F feed-forward.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from ejax.config import BertConfig

Operators = Literal["onnxruntime", "standard"]
OPERATORS = get_args(Operators)
OPSET, FUSED = 20, "com.microsoft"
IR_VERSION = 9  # of the first ONNX with that opset
FAR = np.float32(-1e9)  # added to the attention score of padding
PRODUCTS = ("qkv", "attention_output", "intermediate", "output")  # of a layer, in order
LEAST_SCALE = 1e-12  # of a column, or an input, that is zero everywhere
Tensor = str | np.ndarray | np.generic  # a name in the graph, or a constant


class Block:
    """Nodes of a graph, or of a branch in it, which sees the names of the graphs around it.

    >>> block = Block()
    >>> block("Add", "x", np.float32(1))
    'Add_1'
    >>> [node.op_type for node in block.nodes], len(block.constants)
    (['Add'], 1)
    """

    def __init__(self, around: "Block | None" = None) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._count: Any = around._count if around else itertools.count()

    def outputs(
        self, operator: str, *inputs: Tensor, count: int = 1, domain: str = "", **attributes: Any
    ) -> list[str]:
        """The names of a new node's outputs; arrays among its inputs become constants."""
        given = [one if isinstance(one, str) else self._constant(one) for one in inputs]
        name = f"{operator}_{next(self._count)}"
        made = [name] if count == 1 else [f"{name}_{i}" for i in range(count)]
        node = helper.make_node(operator, given, made, name=name, domain=domain, **attributes)
        self.nodes.append(node)
        return made

    def __call__(self, operator: str, *inputs: Tensor, domain: str = "", **attributes: Any) -> str:
        """The name of the one output of a new node."""
        return self.outputs(operator, *inputs, domain=domain, **attributes)[0]

    def _constant(self, value: Any) -> str:
        name = f"constant_{next(self._count)}"
        self.constants.append(
            numpy_helper.from_array(np.ascontiguousarray(value).reshape(np.shape(value)), name)
        )
        return name

    def named(self, names: Mapping[str, str]) -> None:
        """Gives tensors the names by which they leave the graph."""
        for name, tensor in names.items():
            self.nodes.append(helper.make_node("Identity", [tensor], [name]))

    def graph(self, inputs: Sequence[Any], outputs: Sequence[Any], name: str) -> Any:
        return helper.make_graph(self.nodes, name, inputs, outputs, self.constants)

    def model(self, inputs: Sequence[Any], outputs: Sequence[Any], operators: Operators) -> bytes:
        """The whole graph as a file holds it."""
        sets = [helper.make_opsetid("", OPSET)]
        sets += [helper.make_opsetid(FUSED, 1)] * (operators == "onnxruntime")
        made = helper.make_model(
            self.graph(inputs, outputs, "early_exit"),
            opset_imports=sets, ir_version=IR_VERSION, producer_name="ejax",
        )  # fmt: skip
        return bytes(made.SerializeToString())


def to_int8(values: np.ndarray, *, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 of the same shape, and float32 scales that share one along the axis, which stays as 1.

    >>> to_int8(np.float32([[1, -4], [2, 3]]), axis=0)[0].tolist()
    [[64, -127], [127, 95]]
    """
    largest = np.abs(values).max(axis=axis, keepdims=True)
    scale = np.maximum(largest / 127, LEAST_SCALE).astype(np.float32)
    return np.rint(values / scale).astype(np.int8), scale


@dataclasses.dataclass(frozen=True)
class Product:
    """`x @ kernel + bias`.

    Attributes:
      kernel: float32 [inputs, outputs].
      bias: float32 [outputs].
      extremes: of the inputs in INT8, (lowest, highest); None means float32.
    """

    kernel: np.ndarray
    bias: np.ndarray
    extremes: tuple[float, float] | None = None

    def quantised(self) -> tuple[np.ndarray, np.ndarray]:
        """The kernel in int8, and its scales float32 [outputs]."""
        values, scale = to_int8(self.kernel, axis=0)
        return values, scale[0]

    def input_scale(self) -> tuple[np.float32, np.uint8]:
        """Scale and zero of the inputs as uint8; 0 is among them, and exact."""
        assert self.extremes is not None
        low, high = min(self.extremes[0], 0.0), max(self.extremes[1], 0.0)
        scale = np.float32(max((high - low) / 255, LEAST_SCALE))
        return scale, np.uint8(np.clip(round(-low / float(scale)), 0, 255))


@dataclasses.dataclass(frozen=True)
class Layer:
    """The weights of one encoder layer; those of query, key and value lie side by side."""

    qkv: Product
    attention_output: Product
    intermediate: Product
    output: Product
    attention_norm: Mapping[str, np.ndarray]
    output_norm: Mapping[str, np.ndarray]


class Writer:
    """Writes an encoder's parts into a `Block`.

    Attributes:
      observed: where it is a list, the names of every product's input, in order.
    """

    def __init__(
        self, cfg: BertConfig, operators: Operators, observed: list[str] | None = None
    ) -> None:
        self.cfg, self.operators, self.observed = cfg, operators, observed

    def embed(self, block: Block, tables: Mapping[str, Any], *, int8: bool) -> str:
        """[B, T, D], of the graph's inputs `ids` and `types`; words in INT8, a scale for each."""
        length = block("Shape", "ids", start=1, end=2)
        place = block("Slice", tables["position"]["embedding"], np.zeros(1, np.int64), length)
        word: Tensor = tables["word"]["embedding"]
        if int8:
            table, scale = to_int8(word, axis=1)
            word = block("Cast", block("Gather", table, "ids"), to=TensorProto.FLOAT)
            word = block("Mul", word, block("Gather", scale, "ids"))
        else:
            word = block("Gather", word, "ids")
        kind = block("Gather", tables["token_type"]["embedding"], "types")
        summed = block("Add", block("Add", word, place), kind)
        return self.norm(block, summed, tables["norm"])

    def norm(self, block: Block, x: str, weights: Mapping[str, np.ndarray]) -> str:
        last = np.array([-1])
        centred = block("Sub", x, block("ReduceMean", x, last, keepdims=1))
        # Not Pow: ONNX Runtime knows it as a layer norm, and puts its slow operator there.
        variance = block("ReduceMean", block("Mul", centred, centred), last, keepdims=1)
        spread = block("Sqrt", block("Add", variance, np.float32(self.cfg.layer_norm_eps)))
        scaled = block("Mul", block("Div", centred, spread), weights["scale"])
        return block("Add", scaled, weights["bias"])

    def masked(self, block: Block) -> str:
        """What `attention` reads of the graph's input `mask`: a tensor whose first axis is B."""
        if self.operators == "onnxruntime":
            return "mask"
        padding = block("Sub", np.float32(1), block("Cast", "mask", to=TensorProto.FLOAT))
        return block("Unsqueeze", block("Mul", padding, FAR), np.array([1, 2]))

    def layer(self, block: Block, x: str, masked: str, layer: Layer) -> str:
        """[B, T, D]."""
        context = self.attention(block, x, masked, layer.qkv)
        out = self.product(block, context, layer.attention_output)
        x = self.norm(block, block("Add", x, out), layer.attention_norm)
        hidden = self.activation(block, self.product(block, x, layer.intermediate))
        out = self.product(block, hidden, layer.output)
        return self.norm(block, block("Add", x, out), layer.output_norm)

    def activation(self, block: Block, x: str) -> str:
        if self.cfg.hidden_act == "relu":
            return block("Relu", x)
        exact = self.cfg.hidden_act == "gelu"
        return block("Gelu", x, approximate="none" if exact else "tanh")

    def attention(self, block: Block, x: str, masked: str, qkv: Product) -> str:
        """The context of every token, [B, T, D]."""
        heads = self.cfg.num_attention_heads
        if self.operators == "standard":
            return self._attention(block, x, masked, qkv)
        if qkv.extremes is None:
            self._observe(x)
            return block(
                "Attention", x, qkv.kernel, qkv.bias, masked, domain=FUSED, num_heads=heads
            )
        kernel, scale = qkv.quantised()
        x, input_scale, input_zero = self._uint8(block, x, qkv)
        return block(
            "QAttention", x, kernel, qkv.bias, input_scale, scale, masked, input_zero,
            np.zeros(scale.shape, np.int8), domain=FUSED, num_heads=heads,
        )  # fmt: skip

    def _attention(self, block: Block, x: str, masked: str, qkv: Product) -> str:
        """`attention` in operators of ONNX alone; masked [B, 1, 1, T] is added to the scores."""
        heads, size = self.cfg.num_attention_heads, self.cfg.head_size
        split = block("Reshape", self.product(block, x, qkv), np.array([0, 0, 3, heads, size]))
        parts = block.outputs(
            "Split", block("Transpose", split, perm=[2, 0, 3, 1, 4]), count=3, axis=0, num_outputs=3
        )
        query, key, value = (block("Squeeze", part, np.array([0])) for part in parts)  # [B,H,T,K]
        query = block("Mul", query, np.float32(size**-0.5))
        scores = block("MatMul", query, block("Transpose", key, perm=[0, 1, 3, 2]))
        probs = block("Softmax", block("Add", scores, masked), axis=-1)
        context = block("Transpose", block("MatMul", probs, value), perm=[0, 2, 1, 3])
        return block("Reshape", context, np.array([0, 0, heads * size]))

    def product(self, block: Block, x: str, of: Product) -> str:
        """[..., outputs] of x [..., inputs]."""
        if of.extremes is None:
            self._observe(x)
            return block("Add", block("MatMul", x, of.kernel), of.bias)
        kernel, scale = of.quantised()
        zeros = np.zeros(scale.shape, np.int8)
        x, input_scale, input_zero = self._uint8(block, x, of)
        if self.operators == "onnxruntime":
            return block(
                "MatMulIntegerToFloat", x, kernel, input_scale, scale, input_zero, zeros, of.bias,
                domain=FUSED,
            )  # fmt: skip
        x = block("DequantizeLinear", x, input_scale, input_zero)
        kernel = block("DequantizeLinear", kernel, scale, zeros, axis=1)
        return block("Add", block("MatMul", x, kernel), of.bias)

    def _uint8(self, block: Block, x: str, of: Product) -> tuple[str, np.float32, np.uint8]:
        scale, zero = of.input_scale()
        return block("QuantizeLinear", x, scale, zero), scale, zero

    def _observe(self, x: str) -> None:
        if self.observed is not None:
            self.observed.append(x)
