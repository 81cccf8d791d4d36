"""What every classifier of texts does, whatever runs its layers: JAX or an exported graph.

Axes: N rows, E exits, C classes.
"""

import dataclasses
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from ejax.answers import abstain_level, answers, plain, probabilities
from ejax.bundle import Bundle, text_columns_of
from ejax.calibration.abstain import certainty
from ejax.calibration.drift import Drift, compare
from ejax.data.tokenizer import Encoded, Text
from ejax.errors import UserError
from ejax.hub import push_bundle
from ejax.inference.policy import Decision, as_float32, broadcast_thresholds
from ejax.inference.shapes import Pool, Running, Shapes, check_finite, nothing_decided
from ejax.models.ngrams import ragged_logits
from ejax.saving import save_bundle
from ejax.streaming import chunks, pipelined
from ejax.tasks import SeveralLabels
from ejax.texts import as_list, characters, check_top_k, of_kind

FULL = 2.0  # above every score: nobody leaves early


class TextClassifier(ABC):
    """Texts in, labels out: `EarlyExitClassifier` and `ejax.onnx.OnnxClassifier`.

    Exit 0 runs here, on the host, on whole texts that nobody padded; what runs the layers is told
    which rows are left, see `after_layers`.
    """

    def __init__(self, bundle: Bundle, shapes: Shapes | None) -> None:
        self.bundle = bundle
        self.one_type = True  # as far as nothing else is said
        self.shapes = shapes or Shapes()
        self._zero = int(bundle.exits.has_zero)
        self._adds = bundle.adds_evidence

    @abstractmethod
    def after_layers(
        self, encoded: Encoded, thresholds: Any, zero_logits: np.ndarray | None
    ) -> Iterator[tuple[np.ndarray, Decision]]:
        """Runs the exits after layers: numbers of rows [n], and their `Decision`.

        That may have more than n rows, those at the end of padding, and may still be running.

        Args:
          thresholds: a number, or one per exit after a layer, or per row and such an exit.
          zero_logits: float32 [N, C] of exit 0, where the others may add it.
        """

    @abstractmethod
    def every_exit(
        self, encoded: Encoded, zero_logits: np.ndarray | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Numbers of rows [n], and the logits of all exits after layers: float32 [E, n, C]."""

    @abstractmethod
    def full_logits(self, encoded: Encoded) -> np.ndarray:
        """The last exit's logits float32 [N, C] by the fastest full run: the baseline."""

    @abstractmethod
    def warmup(self, rows: int = 1, max_length: int | None = None) -> None:
        """Does ahead what the first call of so many texts would have to."""

    @abstractmethod
    def pools(self, lengths: np.ndarray) -> Iterator[Pool]:
        """The rows that run together, and in which shape.

        Args:
          lengths: int [N], tokens.
        """

    def tile(self, length: int) -> int:
        """The most rows of so many tokens that run together."""
        return self.shapes.tile(length)

    def in_one_type(self, one_type: bool) -> Self:
        """The same with another answer to whether a text alone is computed like many."""
        return self

    def on_one_device(self, shapes: Shapes | None = None) -> Self:
        """The same weights on its first device, where times are compared.

        Args:
          shapes: with compute types as in its own.
        """
        other = object.__new__(type(self))  # sharing all
        other.__dict__ |= self.__dict__
        other.shapes = shapes or self.shapes
        return other

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
        """Starts on the rows: hands them to a device and does not wait for it, where there is one.

        Args:
          threshold: as of a call.
          first: the number of the first text, in a stream.
        """
        total, exits = len(encoded), len(self.bundle.exits.layers)
        thresholds = self.bundle.thresholds if threshold is None else threshold
        broadcast_thresholds(thresholds, total, exits)  # their shape: below it is that of a pool
        per_row = np.ndim(thresholds) == 2
        running = Running(total, self.bundle.task.outputs, first)
        after: Any = np.asarray(thresholds) if per_row else thresholds
        stay, zero_logits = np.arange(total), None
        if self._zero:
            each = np.broadcast_to(np.asarray(thresholds, np.float64), (total, exits))
            if self._adds or (each[:, 0] <= 1).any():
                zero_logits = self._zero_logits(encoded)
            running.at_zero = self._at_zero(total, zero_logits)
            stay = np.flatnonzero(running.at_zero.score < as_float32(each[:, 0]))
            after = each[stay, 1:] if per_row else each[0, 1:] if total else ()
            encoded = dataclasses.replace(encoded, whole=None).subset(stay)
            zero_logits = None if zero_logits is None else zero_logits[stay]
        for rows, decision in self.after_layers(encoded, after, zero_logits):
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
        """Every exit's logits float32 [E, N, C] as the runs give them, nobody leaving early.

        Raises:
          ValueError: naming a text whose logits are not finite.
        """
        exits, classes = len(self.bundle.exits.layers), self.bundle.task.outputs
        logits = np.zeros((exits, len(encoded), classes), np.float32)
        if self._zero:
            logits[0] = self._zero_logits(encoded)
        for rows, of_rows in self.every_exit(encoded, logits[0] if self._zero else None):
            logits[self._zero :, rows] = of_rows
        for logits_of_exit in logits:
            check_finite(logits_of_exit)
        return logits
