"""Any number of texts in flat memory: chunks of them, and the pipeline that they go through."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from ejax.ending import READER

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


def arriving(
    items: Iterable[Item], size: Callable[[Item], int], seconds: float = 1.0
) -> Iterator[list[Item]]:
    """`chunks` of items that may come slowly, as from a pipe.

    A thread reads them. Every so many seconds what has come is a chunk, however small, and an
    empty list says that no more is there yet.
    """
    chunk: list[Item] = []
    total, ended, failed = 0, False, None
    changed = threading.Condition()

    def is_full() -> bool:
        return len(chunk) >= CHUNK_ROWS or total >= CHUNK_CHARACTERS

    def read() -> None:
        nonlocal total, ended, failed
        try:
            for item in items:
                with changed:
                    changed.wait_for(lambda: ended or not is_full())
                    if ended:
                        return
                    chunk.append(item)
                    total += size(item)
                    if is_full():
                        changed.notify()
        except Exception as error:
            failed = error
        with changed:
            ended = True
            changed.notify()

    threading.Thread(target=read, name=READER, daemon=True).start()
    try:
        while not ended or chunk:
            with changed:
                came = changed.wait_for(lambda: ended or is_full(), seconds)
                taken, chunk, total = chunk, [], 0
                changed.notify()
            if taken:
                yield taken
            if not came:
                yield []
        if failed:
            raise failed
    finally:
        with changed:
            ended = True
            changed.notify()


def pipelined(
    chunks: Iterable[Sequence[Any]],
    tokenise: Callable[..., Any],
    start: Callable[..., Started],
) -> Iterator[Started]:
    """What `start` gave for each chunk, in order and one chunk late.

    While the caller waits for one chunk, the device runs the next, and a thread tokenises the
    one after that. At an empty chunk nothing is held back.

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
            if chunk:
                tokenised.append((read, thread.submit(tokenise, chunk, first=read)))
                read += len(chunk)
            late = 1 if chunk else 0
            while len(tokenised) > late:
                start_next()
            while len(started) > late:
                yield started.popleft()
        while tokenised:
            start_next()
        yield from started
