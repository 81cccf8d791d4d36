"""Texts in, labels out."""

import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ejax.answers import abstain_level, answers, plain, probabilities
from ejax.bundle import Bundle, load_bundle, text_columns_of
from ejax.calibration.abstain import certainty
from ejax.calibration.drift import Drift, compare
from ejax.data.batches import bucket_of, pad
from ejax.data.tokenizer import Encoded, Text
from ejax.errors import UserError
from ejax.hardware import check_not_forked, fastest_dtype, local_devices
from ejax.hub import bundle_at, push_bundle
from ejax.inference.cost import profile_for
from ejax.inference.engine import early_exit, exit_logits, full_depth, replicate
from ejax.inference.policy import Decision, as_float32, broadcast_thresholds
from ejax.inference.prepared import Prepared, prepare
from ejax.inference.shapes import Pool, Running, Shapes, check_finite, nothing_decided, padded
from ejax.models.bert import Batch
from ejax.models.early_exit import EarlyExitBert
from ejax.models.ngrams import ragged_logits
from ejax.provenance import promises_risk
from ejax.saving import save_bundle
from ejax.streaming import chunks, pipelined
from ejax.tasks import SeveralLabels
from ejax.texts import as_list, characters, check_top_k, of_kind

FULL = 2.0  # above every score: nobody leaves early


class EarlyExitClassifier:
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
        devices: Sequence[jax.Device] | None = None,
        one_type: bool = False,
    ) -> None:
        """Ready on these devices.

        Args:
          shapes: of the compiled programs; None means the defaults of `Shapes`.
          devices: they share the rows of a pool; None means all local ones.
          one_type: whether a text alone is computed in the bundle's type too, and not in the one
            that is faster for it by the profile.
        """
        check_not_forked()
        bundle.check_weights("EarlyExitClassifier")
        self.bundle = bundle
        self.shapes = shapes or Shapes()
        self.one_type = one_type
        self.devices = tuple(devices or local_devices())
        # Exit 0 runs here, on whole texts that nobody padded; the programs hold the others.
        self.model = bundle.without_zero.model
        self._zero = int(bundle.exits.has_zero)
        self._adds = bundle.adds_evidence
        self._weights = self._prepared(self.model)
        several = len(self.devices) > 1
        self._copies = replicate(self._weights, self.devices) if several else self._weights
        self._single = self.model, self._weights  # of a text alone
        profile, dtype = self.shapes.profile, bundle.cfg.dtype
        if profile and not one_type and profile.dtype == dtype != profile.single_dtype:
            cfg = dataclasses.replace(bundle.cfg, dtype=profile.single_dtype)
            model = dataclasses.replace(bundle.without_zero, cfg=cfg).model
            self._single = model, self._prepared(model)

    def _prepared(self, model: EarlyExitBert) -> Prepared:
        with jax.enable_x64(False):
            return jax.device_put(prepare(model, self.bundle.variables), self.devices[0])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and copied by its bundle; in another process on devices of the same numbers."""
        numbers = tuple(device.id for device in self.devices)
        return _made_again, (self.bundle, self.shapes, numbers, self.one_type)

    def on_one_device(self, shapes: Shapes | None = None) -> "EarlyExitClassifier":
        """The same weights on its first device, where times are compared.

        Args:
          shapes: with compute types as in its own.
        """
        other = object.__new__(type(self))  # sharing all
        other.__dict__ |= self.__dict__
        other.shapes, other.devices = shapes or self.shapes, self.devices[:1]
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
    ) -> "EarlyExitClassifier":
        """Loads a bundle; `overrides` are fields of `BertConfig`, such as dtype="float32".

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
        measured = profile_for(bundle.cfg, profile)
        if "dtype" not in overrides:
            dtype = measured.dtype if measured else fastest_dtype()
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

    def save_pretrained(self, folder: str | Path, *, rows: bool = True) -> Path:
        """Writes the bundle; with rows=False without rows.json, see `ejax.saving.save_bundle`."""
        return save_bundle(self.bundle, folder, rows=rows)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        rows: bool = False,
        token: str | None = None,
        commit_message: str = "Upload a bundle of ejax",
    ) -> str:
        """Uploads the bundle to the Hugging Face hub; `from_pretrained(repo_id)` loads it.

        Args:
          repo_id: "user/name"; made where there is none.
          private: whether a new repository is; None is the account's default.
          rows: whether to upload rows.json, by which anyone can test whether a text was trained
            on. Without, one that is there goes, but stays in older commits.
          token: None is that of `hf auth login`, or $HF_TOKEN.

        Returns:
          The URL of the repository.

        Raises:
          ValueError: where the hub does not take it.
        """
        return push_bundle(
            self.bundle, repo_id, private=private, rows=rows, token=token,
            commit_message=commit_message,
        )  # fmt: skip

    def __call__(
        self,
        texts: Text | Sequence[Text],
        *,
        threshold: Any = None,
        top_k: int | None = 1,
        abstain: float | None = None,
    ) -> list[Any]:
        """Classifies one text or a list; a pair is a tuple (text, pair).

        Args:
          texts: a string, a pair, or a list of either.
          threshold: a number, or one per exit [E] or per text and exit [N, E]; None
            means the bundle's. Above 1: full depth.
          top_k: 1 gives one dict per text; a larger number, or None for all labels,
            a list of dicts per text, likeliest first.
          abstain: a text whose certainty (its score) is below this gets no answer; None means the
            bundle's, 0 answers all.

        Returns:
          Per text {"label", "score", "exit_layer"}: the calibrated probability of the
          label and the layer the text left after. A single text also gives a list of one.
          Of several labels at once also "chosen": whether the label is part of the answer. Of a
          regression the score is the number itself.
          Without an answer the label is None; where `top_k` is not 1, that stands before the
          likeliest labels.

        Raises:
          ValueError: on something that is not a text, or a wrong threshold, top_k or abstain.
        """
        check_top_k(top_k)
        level = abstain_level(self.bundle, abstain)
        texts = as_list(texts, text_columns_of(self.bundle))
        return answers(self.bundle, self.decide(texts, threshold=threshold), top_k, level)

    def stream(
        self,
        texts: Iterable[Text],
        *,
        threshold: Any = None,
        top_k: int | None = 1,
        abstain: float | None = None,
    ) -> Iterator[Any]:
        """`clf(...)` on any number of texts: yields the answers in order, in flat memory.

        While the device runs one chunk of `CHUNK_ROWS` texts the next is tokenised, so answers
        come a chunk or two after their texts. Takes a threshold per exit but not per text. At its
        end it warns where they did not leave as deep as the texts that the bundle's thresholds are
        for, see `drift`.

        >>> for answer in clf.stream(open("lines.txt")):  # doctest: +SKIP
        ...     print(answer["label"])
        """
        check_top_k(top_k)
        if isinstance(texts, str | tuple | Mapping) or not isinstance(texts, Iterable):
            raise UserError(
                "texts must be many texts, such as a list or a file; a tuple is one pair. "
                f"Got one {type(texts).__name__}."
            )
        if np.ndim(threshold) > 1:
            raise UserError(
                "threshold must be a number or one per exit: a stream has no number of texts. "
                f"Got shape {np.shape(threshold)}."
            )
        checked = of_kind(texts, text_columns_of(self.bundle))
        yield from self.stream_chunks(chunks(checked, characters), threshold, top_k, abstain)

    def stream_chunks(
        self,
        chunks: Iterable[Sequence[Text]],
        threshold: Any,
        top_k: int | None,
        abstain: float | None = None,
    ) -> Iterator[Any]:
        """`stream` of texts that come in lists, each tokenised and classified together."""
        level = abstain_level(self.bundle, abstain)
        exit_counts = self._exit_counts(())
        for running in pipelined(chunks, self.encode, partial(self.start, threshold=threshold)):
            decision = running.finish()
            exit_counts = exit_counts + self._exit_counts(decision.exit)
            yield from answers(self.bundle, decision, top_k, level)
        if threshold is None and self.depth_record and exit_counts.any():
            sentence = compare(exit_counts, self.depth_record, self.bundle.exits.layers).sentence
            if sentence:
                warnings.warn(sentence, stacklevel=3)

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

    def drift(self, decision: Any) -> Drift:
        """Whether texts leave as deep as those that the bundle's thresholds are for.

        >>> clf.drift(clf.decide(texts)).sentence  # doctest: +SKIP
        'These texts leave later than those the thresholds are for: after 2.32 layers …'

        Args:
          decision: what `decide` said at the bundle's own thresholds; or its `exit`, of many calls
            together.

        Returns:
          The mean depths of both, a p-value, and a sentence, "" where nothing is wrong: of texts
          like those it is empty in at least 999 of 1,000 looks. See `ejax.calibration.drift`.

        Raises:
          ValueError: where the bundle does not know how deep those went, or there is no text.
        """
        if not self.depth_record:
            raise UserError(
                "this bundle does not know how deep the texts went that its thresholds are for: "
                "`ejax thresholds` or `ejax calibrate` records it."
            )
        exits = decision.exit if isinstance(decision, Decision) else decision
        if not len(exits):
            raise UserError("drift needs at least one text.")
        return compare(self._exit_counts(exits), self.depth_record, self.bundle.exits.layers)

    @property
    def depth_record(self) -> dict[str, Any]:
        """How deep the texts went that the thresholds are for; {} where that is not known."""
        record = self.bundle.provenance.get("depth", {})
        known = record and tuple(record["thresholds"]) == self.bundle.thresholds
        return record if known else {}

    def _exit_counts(self, exits: Any) -> np.ndarray:
        """How many texts left at each exit: int [E]."""
        return np.bincount(np.asarray(exits, int), minlength=len(self.bundle.exits.layers))

    def predict(self, texts: Text | Sequence[Text], *, threshold: Any = None) -> list[Any]:
        """The answers alone: a label per text; a list of labels, maybe none; or a number.

        Several labels at once are those whose probability reaches their decision threshold.
        """
        texts = as_list(texts, text_columns_of(self.bundle))
        return plain(self.bundle, self.decide(texts, threshold=threshold))

    def predict_proba(self, texts: Text | Sequence[Text], *, threshold: Any = None) -> np.ndarray:
        """Calibrated probabilities float32 [N, C], in the order of `bundle.labels`.

        Of several labels at once each has its own, and they do not sum to 1.

        Raises:
          ValueError: for a regression, which has none.
        """
        texts = as_list(texts, text_columns_of(self.bundle))
        return probabilities(self.bundle, self.decide(texts, threshold=threshold))

    def encode(self, texts: Sequence[Text], *, first: int = 0) -> Encoded:
        return self.bundle.encode(texts, first=first)

    def decide(self, texts: Sequence[Text], *, threshold: Any = None) -> Decision:
        """Logits float32 [N, C], exit int32 [N] and score float32 [N], as numpy."""
        return self.decide_encoded(self.encode(texts), threshold=threshold)

    def decide_encoded(self, encoded: Encoded, *, threshold: Any = None) -> Decision:
        """`decide` on texts that are tokenised already."""
        return self.start(encoded, threshold).finish()

    def start(self, encoded: Encoded, threshold: Any = None, *, first: int = 0) -> Running:
        """Hands the rows to the device and does not wait for it."""
        total, exits = len(encoded), len(self.bundle.exits.layers)
        thresholds = self.bundle.thresholds if threshold is None else threshold
        broadcast_thresholds(thresholds, total, exits)  # their shape: below it is that of a pool
        per_row = np.ndim(thresholds) == 2
        running = Running(total, self.bundle.task.outputs, first)
        after_layers: Any = thresholds  # those of the exits in the compiled program
        stay, zero_logits = np.arange(total), None
        if self._zero:
            each = np.broadcast_to(np.asarray(thresholds, np.float64), (total, exits))
            after_layers = each[:, 1:] if per_row else each[0, 1:] if total else ()
            if self._adds or (each[:, 0] <= 1).any():
                zero_logits = self._zero_logits(encoded)
            running.at_zero = self._at_zero(total, zero_logits)
            stay = np.flatnonzero(running.at_zero.score < as_float32(each[:, 0]))
            encoded = dataclasses.replace(encoded, whole=None).subset(stay)
            zero_logits = None if zero_logits is None else zero_logits[stay]
        for rows, given, options in self._calls(encoded, zero_logits):
            of_pool: Any = after_layers
            if per_row:
                of_pool = np.full((len(given[-1].ids), exits - self._zero), FULL)
                of_pool[: len(rows)] = after_layers[stay[rows]]
            decision = early_exit(
                *given, of_pool, temperatures=self.bundle.temperatures[self._zero :], **options
            )
            running.pools.append((stay[rows], decision))
        return running

    def _at_zero(self, total: int, logits: np.ndarray | None) -> Decision:
        """Exit 0's answers to all rows, as numpy; zeros where none of them may leave there."""
        nothing = nothing_decided(total, self.bundle.task.outputs)
        if logits is None:
            return nothing
        calibration = self.bundle.calibration[nothing.exit]
        task = self.bundle.task
        score = task.host_score if isinstance(task, SeveralLabels) else certainty
        return Decision(logits, nothing.exit, score(logits, calibration))

    def _zero_logits(self, encoded: Encoded) -> np.ndarray:
        """Exit 0's logits float32 [N, C], on the whole texts."""
        if encoded.whole is None:
            raise UserError(
                "texts must be tokenised by `encode` of this classifier or its bundle: exit 0 "
                "reads them whole."
            )
        rows = encoded.whole
        params = self.bundle.variables["params"]["ngrams"]
        return ragged_logits(params, rows.ids, rows.types, rows.offsets)

    def exit_logits(self, encoded: Encoded) -> np.ndarray:
        """Every exit's logits float32 [E, N, C] as the engine computes them, in one full run.

        Raises:
          ValueError: naming a text whose logits are not finite.
        """
        exits, classes = len(self.bundle.exits.layers), self.bundle.task.outputs
        logits = np.zeros((exits, len(encoded), classes), np.float32)
        if self._zero:
            logits[0] = self._zero_logits(encoded)
        for rows, given, options in self._calls(encoded, logits[0] if self._zero else None):
            of_pool = np.asarray(exit_logits(*given, **options))
            logits[self._zero :, rows] = of_pool[: len(rows)].swapaxes(0, 1)
        for logits_of_exit in logits:
            check_finite(logits_of_exit)
        return logits

    def _calls(
        self, encoded: Encoded, zero_logits: np.ndarray | None
    ) -> Iterator[tuple[np.ndarray, tuple[EarlyExitBert, Prepared, Batch], dict[str, Any]]]:
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
        """The last exit's logits float32 [N, C] by the fastest full run: the baseline."""
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
