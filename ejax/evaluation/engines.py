"""Full depth of a bundle in ONNX Runtime and OpenVINO, as their own tools convert and quantise it.

INT8 weights have a scale per output channel. Where its activations have fixed ranges, these come
from some texts, which must not be those of a test.
"""

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ejax.bundle import Bundle
from ejax.data.tokenizer import Encoded
from ejax.evaluation.contenders import (
    Run,
    Setting,
    batch_arrays,
    batches,
    run_batches,
    torch_model,
)

INPUTS = ("ids", "mask", "types")
RANGE_ROWS, RANGE_BATCH = 128, 8  # of the texts that fix the ranges
FLOAT = {"DefaultTensorType": 1}  # of what a fused operator returns


def onnx_full(bundle: Bundle, kind: str, ranges: Encoded | None) -> Run:
    """In ONNX Runtime: float32, int8 (ranges of each batch its own) or int8-static.

    Traced by PyTorch, then fused by ONNX Runtime's optimiser for BERT.
    """
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = _fused(bundle, Path(folder))
        if kind != "float32":
            path = _quantised(path, kind, ranges)
        content = path.read_bytes()

    @cache
    def session(threads: int) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # of initialisers that nothing uses
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def forward(batch: Any, setting: Setting) -> np.ndarray:
        return np.asarray(session(setting.threads).run(None, _feeds(batch))[0])

    return _run(forward, bundle)


def openvino_full(bundle: Bundle, kind: str, ranges: Encoded | None) -> Run:
    """In OpenVINO: bfloat16, or int8 by nncf's quantisation for transformers, the rest bfloat16."""
    import openvino

    model = openvino.convert_model(torch_model(bundle), example_input=_example())
    if kind == "int8":
        import nncf

        assert ranges is not None
        rows = [_arrays(batch) for batch in _some(ranges)]
        model = nncf.quantize(
            model, nncf.Dataset(rows), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(rows)
        )

    @cache
    def request(threads: int) -> Any:
        options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "bf16"}
        options["PERFORMANCE_HINT"] = "LATENCY"  # one request at a time on all threads
        return openvino.Core().compile_model(model, "CPU", options).create_infer_request()

    def forward(batch: Any, setting: Setting) -> np.ndarray:
        found = request(setting.threads).infer(_arrays(batch), share_inputs=True)
        return np.array(found[0])

    return _run(forward, bundle)


def _run(forward: Callable[[Any, Setting], np.ndarray], bundle: Bundle) -> Run:
    def run(encoded: Encoded, setting: Setting) -> np.ndarray:
        return run_batches(lambda batch: forward(batch, setting), encoded, setting.batch, bundle)

    return run


def _fused(bundle: Bundle, folder: Path) -> Path:
    import torch
    from onnxruntime.transformers.optimizer import optimize_model

    traced, fused = folder / "traced.onnx", folder / "fused.onnx"
    axes = {name: {0: "rows", 1: "tokens"} for name in INPUTS}
    with warnings.catch_warnings():
        # The tracing exporter is deprecated; its successor needs one more library.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            torch_model(bundle), _example(), str(traced), input_names=list(INPUTS),
            output_names=["logits"], dynamic_axes=axes, opset_version=17, dynamo=False,
        )  # fmt: skip
    heads, width = bundle.cfg.num_attention_heads, bundle.cfg.hidden_size
    # Fused for BERT alone: what else a session can do it does itself.
    optimised = optimize_model(str(traced), "bert", heads, width, opt_level=0)
    optimised.save_model_to_file(str(fused))
    return fused


def _quantised(path: Path, kind: str, ranges: Encoded | None) -> Path:
    from onnxruntime import quantization

    made = path.with_name(f"{kind}.onnx")
    options: dict[str, Any] = {
        "weight_type": quantization.QuantType.QInt8, "per_channel": True, "extra_options": FLOAT,
    }  # fmt: skip
    if kind == "int8":
        quantization.quantize_dynamic(path, made, **options)
        return made
    assert ranges is not None
    rows: Iterator[Mapping[str, Any]] = map(_feeds, _some(ranges))

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> Any:
            return next(rows, None)

    quantization.quantize_static(
        path, made, Reader(), activation_type=quantization.QuantType.QUInt8,
        op_types_to_quantize=["MatMul"], **options,
    )  # fmt: skip
    return made


def _some(ranges: Encoded) -> list[Any]:
    return [batch for _, batch in batches(ranges, RANGE_BATCH)]


def _example() -> tuple[Any, ...]:
    import torch

    return tuple(torch.ones((2, 8), dtype=torch.int64) for _ in INPUTS)


def _arrays(batch: Any) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(array, np.int64) for array in batch_arrays(batch))


def _feeds(batch: Any) -> dict[str, np.ndarray]:
    return dict(zip(INPUTS, _arrays(batch), strict=True))
