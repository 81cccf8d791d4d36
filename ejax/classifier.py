"""Texts in, labels out."""

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ejax.base import FULL, TextClassifier
from ejax.bundle import Bundle, load_bundle
from ejax.data.batches import bucket_of, pad
from ejax.data.tokenizer import Encoded
from ejax.hardware import check_not_forked, fastest_dtype, local_devices
from ejax.hub import bundle_at
from ejax.inference.cost import profile_for
from ejax.inference.policy import Decision
from ejax.inference.shapes import Pool, Shapes, padded
from ejax.onnx import OnnxClassifier
from ejax.provenance import promises_risk

if TYPE_CHECKING:  # jax is imported when a bundle with weights is made ready
    import jax

    from ejax.inference.prepared import Prepared
    from ejax.models.bert import Batch
    from ejax.models.early_exit import EarlyExitBert


class EarlyExitClassifier(TextClassifier):
    """A bundle, ready to classify.

    >>> clf = EarlyExitClassifier.from_pretrained("bundle")  # doctest: +SKIP
    >>> clf("a text")  # doctest: +SKIP
    [{'label': 'positive', 'score': 0.98, 'exit_layer': 2}]
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        shapes: Shapes | None = None,
        devices: "Sequence[jax.Device] | None" = None,
        one_type: bool = False,
    ) -> None:
        """Ready on these devices.

        Args:
          shapes: of the compiled programs; None means the defaults of `Shapes`.
          devices: they share the rows of a pool; None means all local ones.
          one_type: whether a text alone is computed in the bundle's type too, and not in the one
            that is faster for it by the profile.
        """
        from ejax.inference.engine import replicate

        check_not_forked()
        bundle.check_weights("EarlyExitClassifier")
        super().__init__(bundle, shapes)
        self.one_type = one_type
        self.devices = tuple(devices or local_devices())
        self.model = bundle.without_zero.model  # the programs hold the exits after layers
        self._weights = self._prepared(self.model)
        several = len(self.devices) > 1
        self._copies = replicate(self._weights, self.devices) if several else self._weights
        self._single = self.model, self._weights  # of a text alone
        profile, dtype = self.shapes.profile, bundle.cfg.dtype
        if profile and not one_type and profile.dtype == dtype != profile.single_dtype:
            single: Any = profile.single_dtype
            cfg = dataclasses.replace(bundle.cfg, dtype=single)
            model = dataclasses.replace(bundle.without_zero, cfg=cfg).model
            self._single = model, self._prepared(model)

    def _prepared(self, model: "EarlyExitBert") -> "Prepared":
        import jax

        from ejax.inference.prepared import prepare

        with jax.enable_x64(False):
            return jax.device_put(prepare(model, self.bundle.variables), self.devices[0])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and copied by its bundle; in another process on devices of the same numbers."""
        numbers = tuple(device.id for device in self.devices)
        return _made_again, (self.bundle, self.shapes, numbers, self.one_type)

    def in_one_type(self, one_type: bool) -> Self:
        if one_type == self.one_type:
            return self
        return type(self)(self.bundle, shapes=self.shapes, devices=self.devices, one_type=one_type)

    def on_one_device(self, shapes: Shapes | None = None) -> Self:
        other = super().on_one_device(shapes)
        other.devices = self.devices[:1]
        other._copies = self._weights
        return other

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        revision: str | None = None,
        profile: str | Path | None = "auto",
        **overrides: Any,
    ) -> TextClassifier:
        """Loads a bundle; `overrides` are fields of `BertConfig`, such as dtype="float32".

        A folder that `ejax export --format onnx` wrote gives an `ejax.onnx.OnnxClassifier`: it runs
        as it was exported, takes no overrides, and no profile changes its numerics.

        The folder may be a string "user/name": where there is no such folder here, the bundle of
        that name on the Hugging Face hub.

        Without a dtype it computes in what is fastest here: by the profile, which also chooses
        the tiles, or else bfloat16 where the device is known to multiply it faster. Where its
        thresholds promise a risk that was shown in another type, it warns.

        Args:
          revision: on the hub, a branch, a tag or a commit; None is main.
          profile: "auto" is what `ejax profile` kept for this machine and shape of encoder, if it
            ran; else the JSON of one; None is none. The logger "ejax" says what one changes.
        """
        bundle = load_bundle(bundle_at(folder, revision), **overrides)
        if bundle.graph:
            return OnnxClassifier._of(bundle, folder, None, profile)
        measured = profile_for(bundle.cfg, profile)
        if "dtype" not in overrides:
            dtype: Any = measured.dtype if measured else fastest_dtype()
            cfg = dataclasses.replace(bundle.cfg, dtype=dtype)
            bundle = dataclasses.replace(bundle, cfg=cfg)
        used, target = bundle.cfg.dtype, bundle.provenance.get("target", {})
        promised = target.get("dtype") if promises_risk(bundle.provenance) else None
        one_type = "dtype" in overrides or promised is not None
        if measured and one_type and measured.dtype != used:
            measured = None
        if promised not in (None, used):
            warnings.warn(
                f"{folder}: the risk that its thresholds promise was shown in {promised}, and here "
                f'it computes in {used}: load it with dtype="{promised}", or choose its thresholds '
                f"on this machine.",
                stacklevel=2,
            )
        shapes = Shapes(profile=measured)
        shapes.say_profile(fastest_dtype(), one_type)
        return cls(bundle, shapes=shapes, one_type=one_type)

    def warmup(self, rows: int = 1, max_length: int | None = None) -> None:
        """Compiles ahead all that calls of up to `rows` texts can run, at most 4 programs a length.

        Args:
          rows: the most texts of one call. However few of them share a length is compiled too.
          max_length: of the texts, in tokens; None means the bundle's.
        """
        longest = min(max_length or self.bundle.max_length, self.bundle.max_length)
        reached = bucket_of(np.arange(1, longest + 1), self.bundle.buckets, self.bundle.max_length)
        for length in np.unique(reached).tolist():
            sizes = (size * len(self.devices) for size in self.shapes.sizes(length))
            # One text alone runs on one device, by a program of its own.
            for count in sorted({1, *(min(rows, size) for size in sizes)}):
                tokens = np.zeros(count * length, np.int32)
                offsets = np.arange(count + 1, dtype=np.int64) * length
                texts = Encoded(tokens, tokens.astype(np.int8), offsets)
                texts = dataclasses.replace(texts, whole=texts)
                self.decide_encoded(texts, threshold=FULL)  # beyond exit 0

    def after_layers(
        self, encoded: Encoded, thresholds: Any, zero_logits: np.ndarray | None
    ) -> Iterator[tuple[np.ndarray, Decision]]:
        from ejax.inference.engine import early_exit

        temperatures = self.bundle.temperatures[self._zero :]
        for rows, given, options in self._calls(encoded, zero_logits):
            of_pool: Any = thresholds
            if np.ndim(thresholds) == 2:
                of_pool = np.full((len(given[-1].ids), len(temperatures)), FULL)
                of_pool[: len(rows)] = thresholds[rows]
            yield rows, early_exit(*given, of_pool, temperatures=temperatures, **options)

    def every_exit(
        self, encoded: Encoded, zero_logits: np.ndarray | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        from ejax.inference.engine import exit_logits

        for rows, given, options in self._calls(encoded, zero_logits):
            yield rows, np.asarray(exit_logits(*given, **options))[: len(rows)].swapaxes(0, 1)

    def _calls(
        self, encoded: Encoded, zero_logits: np.ndarray | None
    ) -> "Iterator[tuple[np.ndarray, tuple[EarlyExitBert, Prepared, Batch], dict[str, Any]]]":
        """For every pool its rows, and what the engine takes: model, weights, batch; options."""
        for rows, shape in self.pools(encoded.lengths, len(self.devices)):
            alone = len(rows) == 1
            size = shape.pool if alone else shape.pool * len(self.devices)
            model, weights = self._single if alone else (self.model, self._copies)
            batch = pad(encoded, padded(rows, size), shape.length)
            devices = None if alone else self.devices
            options: dict[str, Any] = {"tile": shape.tile, "rows": len(rows), "devices": devices}
            options["zero_logits"] = self._added(zero_logits, rows, size)
            yield rows, (model, weights, batch), options

    def _added(self, zero_logits: Any, rows: np.ndarray, size: int) -> np.ndarray | None:
        """Exit 0's logits of the rows of a pool [size, C]; None where no exit adds them."""
        if not self._adds:
            return None
        of_pool = np.zeros((size, zero_logits.shape[1]), np.float32)
        of_pool[: len(rows)] = zero_logits[rows]
        return of_pool

    def full_logits(self, encoded: Encoded) -> np.ndarray:
        from ejax.inference.engine import full_depth

        zero_logits = self._zero_logits(encoded) if self._adds else None
        running = []  # the device works on one pool while the next is padded, as in `start`
        for rows, shape in self.pools(encoded.lengths):
            batch = pad(encoded, padded(rows, shape.pool), shape.length)
            model, weights = self._single if len(rows) == 1 else (self.model, self._weights)
            added = self._added(zero_logits, rows, shape.pool)
            of_pool = full_depth(
                model, weights, batch, tile=shape.tile, rows=len(rows), zero_logits=added
            )
            running.append((rows, of_pool))
        logits = np.zeros((len(encoded), self.bundle.task.outputs), np.float32)
        for rows, of_pool in running:
            logits[rows] = np.asarray(of_pool)[: len(rows)]
        return logits

    def pools(self, lengths: np.ndarray, devices: int = 1) -> Iterator[Pool]:
        """The rows of every pool and its shape on each device; a row's length decides its T."""
        check_not_forked()
        buckets, longest = self.bundle.buckets, self.bundle.max_length
        return self.shapes.pools(bucket_of(lengths, buckets, longest), devices)


def _made_again(
    bundle: Bundle, shapes: Shapes, numbers: Sequence[int], one_type: bool
) -> EarlyExitClassifier:
    """What was pickled; on all local devices where those numbers are not there."""
    found = [device for device in local_devices() if device.id in numbers]
    devices = found if len(found) == len(numbers) else None
    return EarlyExitClassifier(bundle, shapes=shapes, devices=devices, one_type=one_type)
