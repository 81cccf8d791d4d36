"""Texts to BERT's word pieces: Hugging Face `tokenizers`, ragged numpy arrays out.

A text becomes `[CLS] text [SEP]` with token type 0, a pair `[CLS] first [SEP] second
[SEP]` with type 1 from `second` on. N rows are kept flat, without padding; rows are
padded to one of a few lengths, the buckets, only when they are batched.

Axes: N rows.
"""

import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from ejax.errors import UserError, clipped
from ejax.records import misfit, read_json

Text = str | tuple[str, str]

MIN_LENGTH = 4  # [CLS] and two [SEP]s of a pair, and one token of text
CHUNK_CHARACTERS = 1 << 20  # tokenised at a time: the library's objects are heavy
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Tokenisers that split as BERT does, so that vocab.txt alone describes them.
BERT_CLASSES = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer")

_SETTINGS = dict.fromkeys(("do_lower_case", "strip_accents", "tokenize_chinese_chars"), bool)

# Tokenising a whole megabyte to keep 128 tokens is waste, so texts are cut to so many
# characters first. English has 4 to 5 characters to a token: the cut leaves about
# twice what is needed.
CUT_PER_TOKEN = 10
CUT_EXTRA = 1000
# What the cut damages is its last word, and WordPiece gives a word at most 100 tokens
# (a longer word is one [UNK]). So where a cut text has 100 tokens more than are kept,
# the kept ones are exact; where it has fewer (long runs of spaces, or words of
# thousands of letters), the text is cut later and tokenised again.
LONGEST_WORD = 100


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
    """BERT's tokenizer; see `load_tokenizer`. Threads may share one."""

    # Truncation is done here and not by the library: there it is a setting that threads
    # would share, and what it cuts off is kept, for a pair in quadratically many parts.

    def __init__(self, backend: tokenizers.Tokenizer, source: str | Path = "the tokenizer"):
        backend.no_truncation()  # files in the wild carry their own settings for both
        backend.no_padding()
        single, pair = backend.encode(""), backend.encode("", "")
        if (
            len(single.ids) != 2
            or pair.ids != [*single.ids, single.ids[1]]
            or pair.type_ids != [0, 0, 1]
        ):
            raise UserError(
                f"{source} must frame a text as [CLS] text [SEP] and a pair as [CLS] first [SEP] "
                f"second [SEP], as BERT does. Got {single.tokens} and {pair.tokens} with token "
                f"types {pair.type_ids} around empty texts."
            )
        self._cls, self._sep = single.ids
        self._backend = backend

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: the rows a word embedding must have."""
        return max(self._backend.get_vocab().values()) + 1

    @property
    def unknown(self) -> int | None:
        """The id of [UNK], which stands for a word that the vocabulary cannot spell."""
        return self._backend.token_to_id(getattr(self._backend.model, "unk_token", None) or "[UNK]")

    def begins_word(self) -> np.ndarray:
        """Which ids begin a word, bool [vocab_size]: all but [CLS], [SEP] and ##pieces.

        A vocabulary that marks no pieces has every token for a word.
        """
        vocabulary = self._backend.get_vocab()
        begins = np.ones(self.vocab_size, bool)
        begins[[i for token, i in vocabulary.items() if token.startswith("##")]] = False
        begins[[self._cls, self._sep]] = False
        return begins

    def first_unknown(self, text: str) -> str:
        """The first word of a text that becomes [UNK]; "" where there is none."""
        found = self._backend.encode(text, add_special_tokens=False)  # the fast way has no offsets
        for token, (start, end) in zip(found.ids, found.offsets, strict=True):
            if token == self.unknown:
                return text[start:end]
        return ""

    def encode(
        self, texts: Sequence[Text], max_length: int, *, whole: int = 0, first: int = 0
    ) -> Encoded:
        """Tokenises texts and pairs, in order; one list may mix the two.

        A row longer than `max_length` is truncated on the right, a pair longest first:
        the longer text is shortened until both are equal, then both are (an odd token
        goes to the text that was longer, the second if none was), as Hugging Face's
        fast tokenizers do; of two texts that are cut before, the parts left decide
        which is longer. An empty text is [CLS] [SEP]. Characters that are not
        Unicode (lone surrogates) are dropped. `first` is the number of the first row, for errors.
        With `whole`, at least `max_length`, the rows stand in `Encoded.whole` too, cut there.

        Raises:
          ValueError: for a max_length below 4, or a row that is neither a string nor a
            pair of strings (the message names its index).
        """
        if max_length < MIN_LENGTH:
            raise UserError(f"max_length must be at least {MIN_LENGTH} tokens. Got {max_length}.")
        firsts, seconds = _split_pairs(texts, first)
        limits = (max_length, whole) if whole else (max_length,)
        chunks = [
            self._encode_chunk(firsts[chunk], seconds[chunk], limits)
            for chunk in _chunks(firsts, seconds, limits[-1])
        ]
        short, *longer = (_joined([chunk[i] for chunk in chunks]) for i in range(len(limits)))
        return dataclasses.replace(short, whole=longer[0]) if longer else short

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids [T], without [CLS] and [SEP]; of an uncased BERT in lower case."""
        return self._backend.decode(list(ids))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json, without settings for truncation and padding."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._backend.save(str(Path(folder) / "tokenizer.json"))

    def hf_settings(self) -> dict[str, Any]:
        """What tokenizer_config.json must say; without it transformers takes lower case for it."""
        normal = self._backend.normalizer
        lower = {
            "do_lower_case": normal.lowercase,
            "strip_accents": normal.strip_accents,
            "tokenize_chinese_chars": normal.handle_chinese_chars,
        } if isinstance(normal, normalizers.BertNormalizer) else {}  # fmt: skip
        names = {"cls_token": self._cls, "sep_token": self._sep}
        tokens = {name: self._backend.id_to_token(token) for name, token in names.items()}
        return {"tokenizer_class": "BertTokenizer"} | lower | tokens

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
        a_kept, b_kept = longest_first(a_count, b_count, max_length - 2 - pair)
        lengths = a_kept + 2 + (b_kept + 1) * pair
        ends = np.cumsum(lengths)
        row = ends - lengths
        ids = np.empty(lengths.sum(), np.int32)
        types = np.zeros(len(ids), np.int8)
        b_row = row + a_kept + 2  # where the second text starts
        ids[row] = self._cls
        ids[row + a_kept + 1] = self._sep
        ids[ends - 1] = self._sep
        ids[_ranges(row + 1, a_kept)] = pieces[_ranges(a_start, a_kept)]
        ids[_ranges(b_row, b_kept)] = pieces[_ranges(b_start, b_kept)]
        types[_ranges(b_row, (b_kept + 1) * pair)] = 1
        return ids, types, lengths

    def _word_pieces(self, texts: list[str], kept: int) -> tuple[np.ndarray, np.ndarray]:
        """At least the first `kept` word pieces of each text, flat, and their counts."""
        limit = _cut(kept)
        found = self._run([text[:limit] for text in texts])
        for i, text in enumerate(texts):
            cut = limit
            while len(text) > cut and len(found[i]) < kept + LONGEST_WORD:
                cut *= 4
                found[i] = self._run([text[:cut]])[0]
        counts = np.fromiter(map(len, found), np.int64, len(found))
        flat = itertools.chain.from_iterable(row.ids for row in found)
        return np.fromiter(flat, np.int32, counts.sum()), counts

    def _run(self, texts: list[str]) -> list[tokenizers.Encoding]:
        try:
            return self._backend.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:  # a lone surrogate; U+FFFD, which replaces it, is dropped by BERT
            texts = [t.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for t in texts]
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
    """The tokenizer of a Hugging Face folder or a bundle.

    Read from tokenizer.json; its settings for truncation and padding are dropped.
    Where there is none, built from vocab.txt with BERT's own normalisation:
    `do_lower_case` (by default true), `strip_accents` and `tokenize_chinese_chars` as
    tokenizer_config.json says, if it is there.

    Raises:
      ValueError: naming the file, when neither is there or one cannot be used.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if path.is_file():
        return read_tokenizer(path, path)
    path = folder / "vocab.txt"
    if path.is_file():
        return Tokenizer(_from_vocab(path, _read_settings(folder / "tokenizer_config.json")), path)
    there = "has neither" if folder.is_dir() else "is not a folder"
    raise UserError(
        f"a tokenizer needs a folder with tokenizer.json or vocab.txt: {folder} {there}."
    )


def read_tokenizer(path: Path, name: Path) -> Tokenizer:
    """That of a tokenizer.json, which errors call `name`; see `load_tokenizer`."""
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
        backend.model.tokenize("\ue000")  # of no use, and in no vocabulary: needs [UNK]
    except Exception as error:  # the library raises no narrower type
        raise UserError(
            f"{name} is not a tokenizer that the tokenizers library {tokenizers.__version__} can "
            f"read ({clipped(error)}): fetch it again."
        ) from error
    return Tokenizer(backend, name)


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


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    settings = {name: value for name, value in read_json(path).items() if value is not None}
    if problem := misfit(settings, _SETTINGS):
        raise UserError(f"{path} is damaged: {problem}.")
    kind = settings.get("tokenizer_class") or "BertTokenizer"
    if str(kind).removesuffix("Fast") not in BERT_CLASSES:
        raise UserError(
            f"{path}: tokenizer_class must be one of {', '.join(BERT_CLASSES)} to be built from "
            f"vocab.txt. Got {_shown(kind)}: add a tokenizer.json, which Hugging Face's fast "
            f"tokenizers save."
        )
    return settings


def _from_vocab(path: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        lines = path.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} must be UTF-8 text ({error}): fetch it again.") from error
    if lines[-1] == "":
        lines.pop()
    vocab = {token: i for i, token in enumerate(lines)}
    missing = [token for token in ("[UNK]", "[CLS]", "[SEP]") if token not in vocab]
    if missing:
        raise UserError(
            f"{path} must hold one token per line, [UNK], [CLS] and [SEP] among them. "
            f"Got {len(lines)} lines without {', '.join(missing)}."
        )
    backend = tokenizers.Tokenizer(
        models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=LONGEST_WORD)
    )
    backend.add_special_tokens([token for token in SPECIAL_TOKENS if token in vocab])
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(
        ("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"])
    )
    backend.decoder = decoders.WordPiece()
    return backend
