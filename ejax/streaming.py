"""Any number of texts in flat memory: chunks of them, and the pipeline that they go through."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
Started = TypeVar("Started")
CHUNK_ROWS, CHUNK_CHARACTERS = 8192, 1 << 24  # tokenised and classified together


def chunks(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Lists of items, bounded in number and in characters, of which each has `size`."""
    chunk: list[Item] = []
    total = 0
    for item in items:
        chunk.append(item)
        total += size(item)
        if len(chunk) == CHUNK_ROWS or total >= CHUNK_CHARACTERS:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk


def pipelined(
    chunks: Iterable[Sequence[Any]],
    tokenise: Callable[..., Any],
    start: Callable[..., Started],
) -> Iterator[Started]:
    """What `start` gave for each chunk, in order and one chunk late.

    While the caller waits for one chunk, the device runs the next, and a thread tokenises the
    one after that.

    Args:
      tokenise: called with a chunk, and `first`, the number of its first item.
      start: called with what came of that and the same `first`; hands it to the device and does
        not wait.
    """
    tokenised: deque[tuple[int, Future[Any]]] = deque()
    started: deque[Started] = deque()
    read = 0

    def start_next() -> None:
        first, future = tokenised.popleft()
        started.append(start(future.result(), first=first))

    with ThreadPoolExecutor(1) as thread:
        for chunk in chunks:
            tokenised.append((read, thread.submit(tokenise, chunk, first=read)))
            read += len(chunk)
            if len(tokenised) > 1:
                start_next()
            if len(started) > 1:
                yield started.popleft()
        while tokenised:
            start_next()
        yield from started
