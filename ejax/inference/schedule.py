"""Which tiles one segment runs for the rows still alive; the loop and the cost model share it."""

from typing import Any

SMALL_TILE = 8  # rows; below it a row's score would depend on the tile


def tile_sizes(tile: int) -> tuple[int, ...]:
    """B, and where it is large enough a smaller size for the rows that fill no whole tile."""
    small = max(SMALL_TILE, tile // 4)
    return (tile, small) if 2 * small <= tile else (tile,)


def in_small_tiles(rest: Any, tile: int) -> Any:
    """Whether rows that fill no whole tile go in small ones, where those are fewer rows."""
    small = tile_sizes(tile)[-1]
    return rest <= (tile // small - 1) * small


def tiles(rows: int, tile: int) -> list[tuple[int, int]]:
    """The (size, count) of the tiles that one segment runs for so many rows."""
    whole, rest = divmod(rows, tile)
    small = tile_sizes(tile)[-1]
    if rest and in_small_tiles(rest, tile):
        return [(tile, whole), (small, -(-rest // small))]
    return [(tile, whole + (rest > 0))]
