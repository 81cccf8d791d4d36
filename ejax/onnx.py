"""A bundle exported as one ONNX graph, run by ONNX Runtime. Nothing here imports JAX.

The graph, written by `ejax export --format onnx`, holds all exits after layers, and every row
leaves inside it at its own: at the first whose score reaches the row's threshold, else at the last.
Its inputs are `ids`, `types` and `mask` int32 [B, T], `thresholds` float32 [B, E], `temperatures`
float32 [E] or [E, K] (see `Task`) and, where exits add exit 0's evidence, `zero_logits` float32
[B, C]. Its outputs are those of a `Decision`. Exit 0 itself runs on the host.

Axes: N rows, B rows of a tile, T tokens, E exits after layers, C classes, O outputs of a head.
"""

import ctypes
import dataclasses
import os
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ejax.base import FULL, TextClassifier
from ejax.bundle import Bundle, load_bundle
from ejax.data.batches import arrays_of
from ejax.data.tokenizer import Encoded
from ejax.errors import UserError, clipped
from ejax.hardware import usable_cores
from ejax.hub import bundle_at
from ejax.inference.cost import profile_for
from ejax.inference.policy import Decision, broadcast_thresholds
from ejax.inference.shapes import Pool, Shape, Shapes, say_once
from ejax.provenance import promises_risk

OUTPUTS = ("logits", "exit", "score")
INPUTS = ("ids", "types", "mask", "thresholds", "temperatures")  # and "zero_logits"


class OnnxClassifier(TextClassifier):
    """An exported bundle, ready to classify: the calls and answers of `EarlyExitClassifier`.

    >>> clf = OnnxClassifier.from_pretrained("sentiment-onnx")  # doctest: +SKIP
    >>> clf("a text")  # doctest: +SKIP
    [{'label': 'positive', 'score': 0.98, 'exit_layer': 2}]
    """

    def __init__(
        self, bundle: Bundle, *, threads: int | None = None, shapes: Shapes | None = None
    ) -> None:
        """Ready on the CPU.

        Args:
          threads: of the matrix products; None means one per core that this process may use.
          shapes: its `tile_tokens` are the tokens of a tile, padding counted, and at least one row.
            Below 512 the products are too small to be fast, above 1024 they leave the cache.

        Raises:
          ValueError: where the bundle holds no graph, onnxruntime is not installed, or it cannot
            run the graph.
        """
        if bundle.graph is None:
            raise UserError(
                "OnnxClassifier needs a folder that `ejax export --format onnx` wrote. Got a "
                "bundle with weights: load it with EarlyExitClassifier."
            )
        threads = usable_cores() if threads is None else threads
        if type(threads) is not int or threads < 1:
            raise UserError(f"threads must be a number of at least 1. Got {threads!r}.")
        super().__init__(bundle, shapes)
        self.threads = threads
        self._session = _Session(bundle.graph.content, threads)
        wanted = {*INPUTS, *["zero_logits"] * self._adds}
        if self._session.inputs != wanted:
            raise UserError(
                f"model.onnx must have the inputs {', '.join(sorted(wanted))}. Got "
                f"{clipped(', '.join(sorted(self._session.inputs)))}: export the bundle again."
            )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        revision: str | None = None,
        threads: int | None = None,
        profile: str | Path | None = "auto",
    ) -> "OnnxClassifier":
        """Loads an exported folder, or one of the hub by a string "user/name".

        Where its thresholds promise a risk that was shown in other numerics, it warns.

        Args:
          revision: on the hub, a branch, a tag or a commit; None is main.
          threads: see `OnnxClassifier`.
          profile: as of `EarlyExitClassifier.from_pretrained`; it says what texts cost, and changes
            nothing else.
        """
        return cls._of(load_bundle(bundle_at(folder, revision)), folder, threads, profile)

    @classmethod
    def _of(
        cls,
        bundle: Bundle,
        folder: str | Path,
        threads: int | None,
        profile: str | Path | None,
    ) -> "OnnxClassifier":
        made, used = cls(bundle, threads=threads), bundle.numerics
        made.shapes = Shapes(profile=profile_for(bundle.cfg, profile, *made.runtime))
        promised = bundle.provenance.get("target", {}).get("dtype")
        if promises_risk(bundle.provenance) and promised not in (None, used):
            warnings.warn(
                f"{folder}: the risk that its thresholds promise was shown in {promised}, and here "
                f"it computes in {used}: choose them again for this folder by `ejax thresholds`.",
                stacklevel=3,
            )
        many = f"{made.threads} thread{'s' * (made.threads > 1)}"
        say_once(f"{folder} runs in ONNX Runtime, {used}, on {many}")
        return made

    @property
    def runtime(self) -> tuple[str, ...]:
        """What a profile of it is for, besides the machine and the shape of the encoder."""
        graph = self.bundle.graph
        assert graph is not None
        return (
            "onnxruntime",
            self._session.version,
            graph.precision,
            graph.operators,
            *map(str, self.bundle.provenance.get("int8", {}).get("layers_in_float32", [])),
            str(self.threads),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and copied by its bundle, which holds the graph."""
        return _made_again, (self.bundle, self.threads, self.shapes)

    def warmup(self, rows: int = 1, max_length: int | None = None) -> None:
        """Lays out memory ahead; nothing is compiled.

        Args: see `EarlyExitClassifier.warmup`.
        """
        length = min(max_length or self.bundle.max_length, self.bundle.max_length)
        tokens = np.zeros(rows * length, np.int32)
        offsets = np.arange(rows + 1, dtype=np.int64) * length
        texts = Encoded(tokens, tokens.astype(np.int8), offsets)
        self.full_logits(dataclasses.replace(texts, whole=texts))

    def after_layers(
        self, encoded: Encoded, thresholds: Any, zero_logits: np.ndarray | None
    ) -> Iterator[tuple[np.ndarray, Decision]]:
        of_rows = broadcast_thresholds(thresholds, len(encoded), self._exits)
        for rows, inputs in self._tiles(encoded, zero_logits):
            yield rows, self._run(inputs, of_rows[rows])

    def every_exit(
        self, encoded: Encoded, zero_logits: np.ndarray | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Runs the graph once per exit, with thresholds that send all rows there."""
        for rows, inputs in self._tiles(encoded, zero_logits):
            logits = []
            for exit in range(self._exits):
                thresholds = np.full((len(rows), self._exits), FULL)
                thresholds[:, exit] = 0
                found = self._run(inputs, thresholds)
                # A score that is not a number reaches no threshold, and the row goes on.
                logits.append(np.where((found.exit == exit)[:, None], found.logits, np.nan))
            yield rows, np.stack(logits)

    def full_logits(self, encoded: Encoded) -> np.ndarray:
        zero_logits = self._zero_logits(encoded) if self._adds else None
        logits = np.zeros((len(encoded), self.bundle.task.outputs), np.float32)
        for rows, inputs in self._tiles(encoded, zero_logits):
            logits[rows] = self._run(inputs, np.full((len(rows), self._exits), FULL)).logits
        return logits

    def tile(self, length: int) -> int:
        return max(1, self.shapes.tile_tokens // length)

    def pools(self, lengths: np.ndarray) -> Iterator[Pool]:
        """Tiles of rows alike in length, the longest first, padded to the longest of each.

        Rows that left are not run on: none is padding, and in the terms of `Shape` a tile is 1.
        """
        order = np.argsort(-lengths, kind="stable")
        start = 0
        while start < len(order):
            longest = max(1, int(lengths[order[start]]))
            rows = order[start : start + self.tile(longest)]
            yield Pool(rows, Shape(len(rows), longest, 1))
            start += len(rows)

    @property
    def _exits(self) -> int:
        return len(self.bundle.exits.encoder.layers)

    def _tiles(
        self, encoded: Encoded, zero_logits: np.ndarray | None
    ) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Of every tile its rows, and the inputs that thresholds do not change."""
        for rows, shape in self.pools(encoded.lengths):
            ids, mask, types = arrays_of(encoded, rows, shape.length)
            inputs = {"ids": ids, "mask": mask, "types": types}
            if self._adds and zero_logits is not None:
                inputs["zero_logits"] = zero_logits[rows]
            yield rows, inputs

    def _run(self, inputs: dict[str, np.ndarray], thresholds: np.ndarray) -> Decision:
        calibration = self.bundle.calibration[self._zero :]
        given = {"thresholds": thresholds.astype(np.float32), "temperatures": calibration}
        return Decision(*self._session.run(inputs | given))


class _Session:
    """ONNX Runtime with the graph; in a forked process it starts anew, without its threads."""

    def __init__(self, content: bytes, threads: int) -> None:
        self.content, self.threads = content, threads
        self._start()
        _SESSIONS.add(self)

    def _start(self) -> None:
        try:
            import onnxruntime
        except ModuleNotFoundError:
            raise UserError(
                "an exported ONNX folder needs onnxruntime, which is not installed: "
                "pip install '.[onnx]' in ejax's folder."
            ) from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.log_severity_level = 3  # errors alone
        try:
            self._session: Any = onnxruntime.InferenceSession(
                self.content, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # of a library whose errors have no common base
            raise UserError(
                f"model.onnx cannot be run by onnxruntime {onnxruntime.__version__}: "
                f"{clipped(error)}. Export the bundle again, or update onnxruntime."
            ) from None
        self.version = onnxruntime.__version__
        self.inputs = {given.name for given in self._session.get_inputs()}

    def leave(self) -> None:
        """Gives up a parent's session: to end it is to wait for threads that are not here."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._session))
        self._session = None

    def run(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        if self._session is None:
            self._start()
        found: list[np.ndarray] = self._session.run(OUTPUTS, inputs)
        return found


_SESSIONS: "weakref.WeakSet[_Session]" = weakref.WeakSet()


def _leave_sessions() -> None:
    for session in _SESSIONS:
        session.leave()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_sessions)


def _made_again(bundle: Bundle, threads: int, shapes: Shapes) -> OnnxClassifier:
    """What was pickled; where there are fewer cores, on these."""
    return OnnxClassifier(bundle, threads=min(threads, usable_cores()), shapes=shapes)
