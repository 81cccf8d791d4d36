"""Exit 0: a linear model on hashed n-grams of the token ids, before the first layer.

Joulin, Grave, Bojanowski, Mikolov, "Bag of Tricks for Efficient Text Classification" (EACL
2017): the rows of a table, one per hashed n-gram, are added up and a linear map turns the sum
into logits. Here each n-gram carries the weight log(N / rows that hold it), as in TF-IDF, and
the sum is divided by the norm of a text's weights, so that long texts are not surer than short
ones. Both stand in the table: a row holds its weight times a vector of R numbers, and its
squared weight. N-grams that are not known are rows of zeros.

Later exits add these logits to their own, each with a weight (`ejax.calibration.evidence`).

N-grams are single tokens and pairs of neighbours within one text; of a pair of texts, those of
the second are marked as such by its token type.

Axes: B batch, T tokens, N rows, G buckets, R rank, C classes, E exits.
"""

from typing import Any

import numpy as np

from ejax.config import ExitConfig
from ejax.errors import UserError

# Odd, so that a product with them loses nothing modulo a power of two; as int32, whose products
# wrap alike in numpy, XLA, ONNX and JavaScript's Math.imul.
TOKEN, NEXT, TYPE, PAIR = (
    np.int32(value - (value >> 31 << 32))
    for value in (0x9E3779B1, 0xC2B2AE35, 0x85EBCA6B, 0x27D4EB2F)
)
TINY = 1e-12  # below every sum of squared weights


def hashed(ids: Any, following: Any, types: Any, buckets: int) -> tuple[Any, Any]:
    """The buckets of every token and of every pair with the token that follows: int32 each.

    The low bits of `TOKEN * id + TYPE * type` and `TOKEN * id + NEXT * following + TYPE * type +
    PAIR` in wrapping 32-bit arithmetic. Single tokens of a vocabulary of up to G have buckets of
    their own, whatever its size.

    Args:
      ids, following, types: int32 arrays of one shape, of numpy or JAX.
      buckets: G, a power of two.

    >>> ids, following = np.array([101, 7592], np.int32), np.array([7592, 102], np.int32)
    >>> one, two = hashed(ids, following, np.zeros(2, np.int32), 1 << 18)
    >>> one.tolist(), two.tolist()
    ([197333, 59688], [147916, 212341])
    """
    low = np.int32(buckets - 1)
    token = ids * TOKEN + types * TYPE
    return token & low, (token + following * NEXT + PAIR) & low


def ragged_grams(ids: Any, types: Any, offsets: Any, buckets: int) -> Any:
    """How often each row holds each bucket, repeats side by side: a float32 csr_array [N, G].

    Args:
      ids, types: int [all tokens], row i from `offsets[i]` to `offsets[i + 1]`.
      offsets: int [N + 1].
    """
    from scipy.sparse import csr_array

    ids, types = ids.astype(np.int32, copy=False), types.astype(np.int32)
    following, within = np.zeros_like(ids), np.zeros(len(ids), bool)
    following[:-1] = ids[1:]
    within[:-1] = types[1:] == types[:-1]  # the token that follows is of this text
    within[offsets[1:] - 1] = False
    token, pair = hashed(ids, following, types, buckets)
    held = np.stack([np.ones_like(within), within], axis=1).ravel()
    grams = np.stack([token, pair], axis=1).ravel()[held]
    starts = np.concatenate([[0], np.cumsum(held)])[2 * offsets]
    return csr_array((np.ones(len(grams), np.float32), grams, starts), (len(offsets) - 1, buckets))


def ragged_logits(params: Any, ids: Any, types: Any, offsets: Any) -> np.ndarray:
    """Logits of rows of any length that nobody padded, on the host: float32 [N, C].

    `ejax.models.heads.NGramExit` computes the same of padded ones.

    Args: see `ragged_grams`.
    """
    sums = np.asarray(ragged_grams(ids, types, offsets, len(params["table"])) @ params["table"])
    vectors = sums[:, :-1] / np.sqrt(np.maximum(sums[:, -1:], TINY))
    return np.asarray(
        (vectors @ params["kernel"] if "kernel" in params else vectors) + params["bias"]
    )


def packed_table(params: Any) -> dict[str, np.ndarray]:
    """The parameters as they are saved: of the table the rows that are not zero, `known`."""
    saved = {name: np.ascontiguousarray(leaf, np.float32) for name, leaf in params.items()}
    known = np.flatnonzero(saved["table"].any(axis=1))
    return saved | {"known": known.astype(np.int32), "table": saved["table"][known]}


def unpacked_table(saved: dict[str, np.ndarray], exits: ExitConfig) -> dict[str, np.ndarray]:
    """The inverse of `packed_table`.

    Raises:
      ValueError: naming what is missing, or of another shape or type, or not finite.
    """
    known, c, r = saved.get("known", np.zeros(0, np.int32)), exits.num_labels, exits.rank
    saved = {"evidence": np.zeros(exits_after(exits), np.float32)} | saved  # older: none
    shapes = {"known": known.shape, "table": (known.size, r + 1), "bias": (c,)}
    shapes |= {"evidence": (exits_after(exits),)}
    shapes |= {"kernel": (r, c)} if r != c else {}
    wrong = [
        name
        for name in shapes
        if getattr(saved.get(name), "shape", None) != shapes[name]
        or saved[name].dtype != (np.int32 if name == "known" else np.float32)
        or not np.isfinite(saved[name]).all()
    ]
    # As they are packed: each once, in order.
    if known.ndim != 1 or (known.size and not 0 <= known[0] <= known[-1] < exits.buckets):
        wrong.append("known")
    if not wrong and (np.diff(known) <= 0).any():
        wrong.append("known")
    if wrong:
        raise UserError(
            f"does not fit exits.json: ngrams.{wrong[0]} is missing, not finite, or of another "
            f"shape or type."
        )
    table = np.zeros((exits.buckets, r + 1), np.float32)
    table[known] = saved["table"]
    return {name: saved[name] for name in shapes if name != "known"} | {"table": table}


def exits_after(exits: ExitConfig) -> int:
    """How many exits come after layers."""
    return len(exits.encoder.layers)
