"""Texts to tokens: Hugging Face `tokenizers`, ragged numpy arrays out.

The tokenizer's own frame is put around them: BERT's makes `[CLS] text [SEP]` of a text, with
token type 0, and `[CLS] first [SEP] second [SEP]` of a pair, with type 1 from `second` on;
XLM-R's `<s> first </s></s> second </s>`, with type 0. N rows are kept flat, without padding; rows
are padded to one of a few lengths, the buckets, only when they are batched. What a folder says
about its tokenizer is read in `ejax.data.vocabulary`.

Axes: N rows.
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, normalizers

from ejax.data.vocabulary import (
    NORMAL,
    PADDING,
    SPLIT,
    begins_of,
    frame_of,
    from_json,
    load_backend,
    said_of,
    unknowns_of,
)
from ejax.errors import UserError

Text = str | tuple[str, str]

CHUNK_CHARACTERS = 1 << 20  # tokenised at a time: the library's objects are heavy

# Tokenising a whole megabyte to keep 128 tokens is waste, so texts are cut to so many
# characters first. English has 4 to 5 characters to a token: the cut leaves about
# twice what is needed.
CUT_PER_TOKEN = 10
CUT_EXTRA = 1000
# What the cut damages is its last word, and WordPiece gives a word at most so many tokens as its
# model says, 100 by default (a longer word is one [UNK]). So where a cut text has that many more
# than are kept, the kept ones are exact; where it has fewer (long runs of spaces, or words of
# thousands of letters), the text is cut later and tokenised again. Other models spell a word of
# any length, and all of a word's pieces depend on its end: they are cut between words only.
MARGIN = 100
GAPS = " \n\t\u3000"  # what may stand between words


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """N tokenised rows: row i is `ids[offsets[i]:offsets[i + 1]]`.

    Attributes:
      ids: int32 [total tokens], with [CLS] and [SEP].
      types: int8 [total tokens], 1 in the second text of a pair.
      offsets: int64 [N + 1].
      whole: the same rows with more of their tokens, for exit 0; None where they were not asked
        for.
    """

    ids: np.ndarray
    types: np.ndarray
    offsets: np.ndarray
    whole: "Encoded | None" = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per row, int64 [N]."""
        return np.diff(self.offsets)

    @property
    def whole_lengths(self) -> np.ndarray:
        """Tokens per row that exit 0 reads, int64 [N]."""
        return (self.whole or self).lengths

    def subset(self, rows: np.ndarray) -> "Encoded":
        """The rows with these numbers, in this order."""
        lengths = self.lengths[rows]
        tokens = _ranges(self.offsets[rows], lengths)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        whole = None if self.whole is None else self.whole.subset(rows)
        return Encoded(self.ids[tokens], self.types[tokens], offsets, whole)


class Tokenizer:
    """A tokenizer with the frame of its encoder; see `load_tokenizer`. Threads may share one."""

    # Truncation is done here and not by the library: there it is a setting that threads
    # would share, and what it cuts off is kept, for a pair in quadratically many parts.

    def __init__(self, backend: tokenizers.Tokenizer, source: str | Path = "the tokenizer"):
        backend.no_truncation()  # files in the wild carry their own settings for both
        backend.no_padding()
        self._frame = frame_of(backend, source)
        self._backend = backend
        model = backend.model
        self._pieces = isinstance(model, models.WordPiece)
        self._margin = max(MARGIN, model.max_input_chars_per_word) if self._pieces else MARGIN
        self._gaps = "".join(gap for gap in GAPS if self._parts(gap))

    def _parts(self, gap: str) -> bool:
        """Whether this character parts words."""
        normal, words = self._backend.normalizer, self._backend.pre_tokenizer
        text = f"a{gap}a"
        text = normal.normalize_str(text) if normal else text
        return bool(words) and len(words.pre_tokenize_str(text)) > 1

    @property
    def separator(self) -> tuple[int, ...]:
        """The tokens between the texts of a pair; () where token types tell the second."""
        return () if self._frame.second_type else tuple(self._frame.middle)

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: the rows a word embedding must have."""
        return max(self._backend.get_vocab().values()) + 1

    def unknown(self) -> np.ndarray:
        """Which ids stand for what the vocabulary cannot spell, bool [vocab_size].

        [UNK] or <unk>, and, where such characters become bytes, the first byte of one.
        """
        return unknowns_of(self._backend, self.vocab_size)

    def begins_word(self) -> np.ndarray:
        """Which ids count as words, bool [vocab_size]: all but the frame and ##pieces.

        A vocabulary that marks no pieces has every token for a word, but for a space alone, and
        the bytes of one character for one.
        """
        begins = begins_of(self._backend, self.vocab_size)
        begins[self._frame.ids] = False
        return begins

    def first_unknown(self, text: str) -> tuple[str, str]:
        """The first word of a text that is not known and the token it becomes; "" for none."""
        unknown = self.unknown()
        found = self._backend.encode(text, add_special_tokens=False)  # the fast way has no offsets
        for token, (start, end) in zip(found.ids, found.offsets, strict=True):
            if unknown[token]:
                return text[start:end], str(self._backend.id_to_token(token))
        return "", ""

    def encode(
        self, texts: Sequence[Text], max_length: int, *, whole: int = 0, first: int = 0
    ) -> Encoded:
        """Tokenises texts and pairs, in order; one list may mix the two.

        A row longer than `max_length` is truncated on the right, a pair longest first:
        the longer text is shortened until both are equal, then both are (an odd token
        goes to the text that was longer, the second if none was), as Hugging Face's
        fast tokenizers do; of two texts that are cut before, the parts left decide
        which is longer. An empty text is the frame alone. Characters that are not
        Unicode (lone surrogates) are dropped. `first` is the number of the first row, for errors.
        With `whole`, at least `max_length`, the rows stand in `Encoded.whole` too, cut there.

        Raises:
          ValueError: for a max_length without room for a token in the frame of a pair, or a row
            that is neither a string nor a pair of strings (the message names its index).
        """
        least = self._frame.pair_size + 1
        if max_length < least:
            raise UserError(f"max_length must be at least {least} tokens. Got {max_length}.")
        firsts, seconds = _split_pairs(texts, first)
        limits = (max_length, whole) if whole else (max_length,)
        chunks = [
            self._encode_chunk(firsts[chunk], seconds[chunk], limits)
            for chunk in _chunks(firsts, seconds, limits[-1])
        ]
        short, *longer = (_joined([chunk[i] for chunk in chunks]) for i in range(len(limits)))
        return dataclasses.replace(short, whole=longer[0]) if longer else short

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids [T], without the frame; of an uncased BERT in lower case."""
        parts = itertools.groupby(ids, key=set(self._frame.ids).__contains__)
        return " ".join(self._backend.decode(list(part)) for framed, part in parts if not framed)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json, without settings for truncation and padding."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._backend.save(str(Path(folder) / "tokenizer.json"))

    def hf_settings(self) -> dict[str, Any]:
        """What tokenizer_config.json must say; without it transformers takes lower case for it."""
        name, words = self._backend.id_to_token, self._backend.pre_tokenizer
        padding = (token for token in PADDING if self._backend.token_to_id(token) is not None)
        after = name(self._frame.after[0])
        tokens = {"cls_token": name(self._frame.before[0]), "sep_token": after}
        tokens |= {"pad_token": next(padding, after)}
        if self._pieces and isinstance(self._backend.normalizer, normalizers.BertNormalizer):
            said = said_of(self._backend.normalizer, NORMAL)
            return {"tokenizer_class": "BertTokenizer"} | said | tokens
        return {"tokenizer_class": "PreTrainedTokenizerFast"} | said_of(words, SPLIT) | tokens

    def apart(self, pairs: Encoded) -> tuple[Encoded, Encoded]:
        """The first and the second text of each pair, from its tokens: each a row of its own.

        Raises:
          ValueError: at a row that is no pair.
        """
        before, after, middle, end = (list(tokens) for tokens in self._frame[:4])
        head, gap = len(before), len(middle)
        rows: tuple[list[Any], list[Any]] = ([], [])
        for start, stop in itertools.pairwise(pairs.offsets):
            ids = pairs.ids[start:stop].tolist()
            if self.separator:
                at = next((i for i in range(head, len(ids)) if ids[i : i + gap] == middle), -1)
            else:
                at = len(ids) - int(pairs.types[start:stop].sum()) - gap
            if ids[at : at + gap] != middle:
                raise UserError("rows must be pairs of texts. Got one text.")
            for texts, text in zip(
                rows, (ids[head:at], ids[at + gap : len(ids) - len(end)]), strict=True
            ):
                row = np.array([*before, *text, *after], np.int32)
                texts.append((row, np.zeros(len(row), np.int8), np.array([len(row)])))
        return _joined(rows[0]), _joined(rows[1])

    def _encode_chunk(
        self, firsts: list[str], seconds: list[str | None], limits: tuple[int, ...]
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each limit (ids, types, lengths [N]) of a few rows, without a loop over tokens."""
        pair = np.array([second is not None for second in seconds], bool)
        pieces, counts = self._word_pieces(
            firsts + [second for second in seconds if second is not None], limits[-1]
        )
        starts = np.cumsum(counts) - counts
        a_start, a_count = starts[: len(firsts)], counts[: len(firsts)]
        b_start, b_count = np.zeros_like(a_start), np.zeros_like(a_count)
        b_start[pair], b_count[pair] = starts[len(firsts) :], counts[len(firsts) :]
        return [
            self._framed(pieces, (a_start, a_count), (b_start, b_count), pair, limit)
            for limit in limits
        ]

    def _framed(
        self,
        pieces: np.ndarray,
        first: tuple[np.ndarray, np.ndarray],
        second: tuple[np.ndarray, np.ndarray],
        pair: np.ndarray,
        max_length: int,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids, types, lengths [N]) of texts given as (start, count) [N] among the pieces."""
        (a_start, a_count), (b_start, b_count) = first, second
        frame = self._frame
        head, gap = len(frame.before), len(frame.middle)
        rest = np.where(pair, gap + len(frame.end), len(frame.after))
        a_kept, b_kept = longest_first(a_count, b_count, max_length - head - rest)
        lengths = a_kept + b_kept + head + rest
        row = np.cumsum(lengths) - lengths
        a_row, a_end = row + head, row + head + a_kept
        b_row, b_end = a_end + gap, a_end + gap + b_kept  # of pairs
        ids = np.empty(lengths.sum(), np.int32)
        types = np.zeros(len(ids), np.int8)
        ids[_ranges(a_row, a_kept)] = pieces[_ranges(a_start, a_kept)]
        ids[_ranges(b_row, b_kept)] = pieces[_ranges(b_start, b_kept)]
        types[_ranges(b_row, b_kept)] = frame.second_type
        for starts, tokens, kinds in (
            (row, frame.before, [0] * head),
            (a_end[~pair], frame.after, [0] * len(frame.after)),
            (a_end[pair], frame.middle, frame.middle_types),
            (b_end[pair], frame.end, frame.end_types),
        ):
            for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
                ids[starts + i], types[starts + i] = token, kind
        return ids, types, lengths

    def _word_pieces(self, texts: list[str], kept: int) -> tuple[np.ndarray, np.ndarray]:
        """At least the first `kept` word pieces of each text, flat, and their counts."""
        limit = _cut(kept)
        found = self._run([self._shortened(text, limit) for text in texts])
        for i, text in enumerate(texts):
            cut = limit
            while len(text) > cut and len(found[i]) < kept + self._margin:
                cut *= 4
                found[i] = self._run([self._shortened(text, cut)])[0]
        counts = np.fromiter(map(len, found), np.int64, len(found))
        flat = itertools.chain.from_iterable(row.ids for row in found)
        return np.fromiter(flat, np.int32, counts.sum()), counts

    def _shortened(self, text: str, limit: int) -> str:
        """The text up to a limit in characters, cut where that changes no token that is kept."""
        if len(text) <= limit or self._pieces:
            return text[:limit]
        return text[: max(0, *(text.rfind(gap, 0, limit) for gap in self._gaps), 0)].rstrip()

    def _run(self, texts: list[str]) -> list[tokenizers.Encoding]:
        try:
            return self._backend.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:  # a lone surrogate
            texts = [t.encode("utf-16", "surrogatepass").decode("utf-16", "ignore") for t in texts]
            return self._backend.encode_batch_fast(texts, add_special_tokens=False)


def _joined(chunks: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Encoded:
    nothing = np.zeros(0, np.int32)
    ids, types, lengths = zip(*chunks, strict=True) if chunks else ([nothing], [nothing], [nothing])
    return Encoded(
        np.concatenate(ids, dtype=np.int32),
        np.concatenate(types, dtype=np.int8),
        np.concatenate([[0], np.cumsum(np.concatenate(lengths, dtype=np.int64))]),
    )


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a Hugging Face folder or a bundle; see `ejax.data.vocabulary.load_backend`.

    Raises:
      ValueError: naming the file, when there is none or one cannot be used.
    """
    return Tokenizer(*load_backend(Path(folder)))


def read_tokenizer(path: Path, name: Path) -> Tokenizer:
    """That of a tokenizer.json, which errors call `name`; see `load_tokenizer`."""
    return Tokenizer(from_json(path, name), name)


def longest_first(
    a: np.ndarray, b: np.ndarray, room: np.ndarray | int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens kept of pairs with a [N] and b [N] tokens that share `room` [N] tokens.

    >>> longest_first(np.array([9]), np.array([2]), 6)
    (array([4]), array([2]))
    """
    fewer = np.minimum(np.minimum(a, b), room // 2)
    more = np.minimum(np.maximum(a, b), room - fewer)
    return np.where(a <= b, fewer, more), np.where(a <= b, more, fewer)


def bucket_of(lengths: np.ndarray, buckets: Sequence[int], max_length: int) -> np.ndarray:
    """The padded length of each row, int32 [N]: the smallest bucket it fits.

    Buckets above `max_length` give way to `max_length`, which is always a bucket, so
    every row that was encoded with this `max_length` has one.

    >>> bucket_of(np.array([3, 16, 17, 100]), (16, 32, 64), 128)
    array([ 16,  16,  32, 128], dtype=int32)

    Raises:
      ValueError: for a row longer than `max_length`.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and lengths.max() > max_length:
        row = int(lengths.argmax())
        raise UserError(
            f"lengths must be at most max_length, {max_length}: encode with the same max_length. "
            f"Got {lengths[row]} tokens in row {row}."
        )
    edges = np.array([*sorted({b for b in buckets if 0 < b < max_length}), max_length], np.int32)
    return edges[np.searchsorted(edges, lengths)]


def _split_pairs(texts: Sequence[Text], first: int) -> tuple[list[str], list[str | None]]:
    """First texts, and second texts or None."""
    if isinstance(texts, str | bytes):
        raise UserError(f"texts must be a list of texts. Got one {type(texts).__name__}.")
    firsts: list[str] = []
    seconds: list[str | None] = []
    for i, text in enumerate(texts, first):
        if isinstance(text, str):
            firsts.append(text)
            seconds.append(None)
        elif (
            isinstance(text, tuple | list)
            and len(text) == 2
            and isinstance(text[0], str)
            and isinstance(text[1], str)
        ):
            firsts.append(text[0])
            seconds.append(text[1])
        else:
            raise UserError(
                f"texts[{i}] must be a string or a pair of strings. Got {_shown(text)}."
            )
    return firsts, seconds


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}… ({type(value).__name__})"


def _cut(kept: int) -> int:
    return CUT_PER_TOKEN * kept + CUT_EXTRA


def _chunks(firsts: list[str], seconds: list[str | None], max_length: int) -> Iterator[slice]:
    """Slices of rows with about CHUNK_CHARACTERS characters after the cut."""
    limit = _cut(max_length)
    sizes = np.fromiter(map(len, firsts), np.int64, len(firsts)).clip(max=limit)
    sizes += np.fromiter((len(b or "") for b in seconds), np.int64, len(seconds)).clip(max=limit)
    group = np.cumsum(sizes + 100) // CHUNK_CHARACTERS  # 100: an empty row costs as well
    edges = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(firsts)]
    return (slice(a, b) for a, b in itertools.pairwise(edges) if a < b)


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, … counts[0] of them, then starts[1], …"""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum())
