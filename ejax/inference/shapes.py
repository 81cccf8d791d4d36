"""From the rows of a call to pools of a small, fixed set of shapes, and from their answers back.

A shape is a compiled program, so that the number of programs is bounded.

Axes: N rows, B rows of a tile, T tokens, C classes.
"""

import dataclasses
import functools
import logging
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ejax.errors import UserError
from ejax.inference.cost import Profile
from ejax.inference.policy import Decision
from ejax.inference.schedule import SMALL_TILE, tile_sizes


@functools.cache
def say_once(sentence: str) -> None:
    logging.getLogger("ejax").info(sentence)


class Shape(NamedTuple):
    """One compiled program: N rows of T tokens in tiles of B rows."""

    pool: int
    length: int
    tile: int


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The fixed, small set of program shapes: about constant tokens per pool, tiles as measured.

    Without a profile of this machine a tile holds about `tile_tokens`.
    """

    tile_tokens: int = 1024
    pool_tokens: int = 65536
    profile: Profile | None = None

    def tile(self, length: int) -> int:
        measured = self.profile.tile.get(length) if self.profile else None
        return measured or max(SMALL_TILE, self.tile_tokens // length)

    def pool(self, length: int) -> int:
        return max(self.tile(length), self.pool_tokens // length)

    def singles(self, length: int) -> int:
        """So many rows or fewer run one by one: sooner done than a tile filled with padding."""
        seconds = self.profile.seconds if self.profile else {}
        small_tile = tile_sizes(self.tile(length))[-1]
        single, small = seconds.get((1, length)), seconds.get((small_tile, length))
        return int(small.layer / single.layer) if single and small else SMALL_TILE // 2

    def say_profile(self, usual: str, one_type: bool) -> None:
        """Logs what the profile changes, once in a process.

        Args:
          usual: the compute type without a profile.
          one_type: whether a text alone is computed in the same type as tiles.
        """
        if not (profile := self.profile):
            return
        alone = profile.dtype if one_type else profile.single_dtype
        tiles = {t: rows for t, rows in profile.tile.items() if rows != Shapes().tile(t)}
        if tiles or {alone, profile.dtype} != {usual}:
            of = ", ".join(f"{rows} x {length}" for length, rows in tiles.items())
            say_once(
                f"by the profile of {profile.date} tiles compute in {profile.dtype} and a text "
                f"alone in {alone}" + (f"; tiles of {of} tokens" if of else "")
            )

    def of(self, rows: int, length: int) -> Shape:
        """The smallest shape that holds `rows`: one row, 2 or 16 tiles, a whole pool.

        Rows of padding are not run, but their memory is laid out: on a CPU about the time
        of a thirtieth of a layer.
        """
        size = next(n for n in self.sizes(length) if n >= min(rows, self.pool(length)))
        return Shape(size, length, min(size, self.tile(length)))

    def sizes(self, length: int) -> tuple[int, ...]:
        """Rows of a pool, per device, from one to a whole pool."""
        tile, pool = self.tile(length), self.pool(length)
        return 1, min(2 * tile, pool), min(16 * tile, pool), pool

    def pools(self, padded_lengths: np.ndarray, devices: int = 1) -> Iterator["Pool"]:
        """Every row in one pool, with others of its padded length.

        Args:
          padded_lengths: int [rows], the T that each row is padded to.
          devices: that share the rows of a pool.
        """
        for length in np.unique(padded_lengths).tolist():
            rows = np.flatnonzero(padded_lengths == length)
            size = self.pool(length) * devices
            for start in range(0, len(rows), size):
                together = rows[start : start + size]
                few = len(together) <= self.singles(length)
                for rows_of_pool in together[:, None] if few else [together]:
                    yield Pool(rows_of_pool, self.of(-(-len(rows_of_pool) // devices), length))


class Pool(NamedTuple):
    """Rows that run together."""

    rows: np.ndarray  # int, their numbers in the call; at most N on each device
    shape: Shape  # on each device


def padded(rows: np.ndarray, size: int) -> np.ndarray:
    """Row numbers filled up with -1 to `size`."""
    return np.pad(rows, (0, size - len(rows)), constant_values=-1)


@dataclasses.dataclass
class Running:
    """Pools that the device works on."""

    total: int  # N
    classes: int  # C
    first: int = 0  # the number of the first text, in a stream
    at_zero: Decision | None = None  # of all texts, where there is an exit 0
    pools: list[tuple[np.ndarray, Decision]] = dataclasses.field(default_factory=list)  # by rows

    def finish(self) -> Decision:
        """Waits; a `Decision` of numpy arrays, in the order of the input.

        Raises:
          ValueError: naming a text whose logits are not finite.
        """
        decision = self.at_zero or nothing_decided(self.total, self.classes)
        for rows, of_pool in self.pools:
            for column, part in zip(decision, of_pool, strict=True):
                column[rows] = np.asarray(part)[: len(rows)]
            decision.exit[rows] += self.at_zero is not None
        check_finite(decision.logits, self.first)
        return decision


def nothing_decided(rows: int, classes: int) -> Decision:
    """Zeros, to be written over."""
    logits, exit = np.zeros((rows, classes), np.float32), np.zeros(rows, np.int32)
    return Decision(logits, exit, exit.astype(np.float32))


def check_finite(logits: np.ndarray, first: int = 0) -> None:
    """Raises ValueError naming a text of [N, C] whose logits are not finite."""
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(bad):
        raise UserError(
            f"text {first + bad[0]} (counted from 0) has logits that are not finite, "
            f"{logits[bad[0]].tolist()}: the weights of this bundle are damaged, or "
            f"its training diverged."
        )
