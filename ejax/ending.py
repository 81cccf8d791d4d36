"""How a process ends that is stopped: at once, and without half-written files.

An exception raised by a signal handler can be lost in a callback, or abort the process inside
jax; so a command leaves by `os._exit`, after it has removed what `partial` names.
"""

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

READER = "ejax-reader"  # the name of a thread that reads a pipe
GRACE = 0.3  # seconds that the main thread has to end by itself
_partial: set[Path] = set()
_held: list[int] = []  # one for each `whole` that runs
_pending: list[int] = []  # signals that came while one did
_name = ""


@contextmanager
def partial(path: Path) -> Iterator[Path]:
    """A file or folder to write, which is gone at the end, however that comes."""
    _partial.add(path)
    try:
        yield path
    finally:
        _remove(path)
        _partial.discard(path)


@contextmanager
def whole() -> Iterator[None]:
    """What is not to be stopped in the middle; a signal waits for its end."""
    _held.append(1)
    try:
        yield
    finally:
        _held.pop()
        if _pending and not _held:
            leave(_pending[0])


def leave(number: int, _: FrameType | None = None) -> None:
    """The handler of signals: ends the process with exit code 128 + the signal's number."""
    if _held:
        _pending.append(number)
        return
    for path in tuple(_partial):
        _remove(path)
    if sys.stderr and sys.stderr.isatty():
        os.write(2, b"\x1b[?25h")  # the cursor, which a progress bar hides
    if number == signal.SIGINT:
        os.write(2, f"{_name}: interrupted.\n".encode())
    os._exit(128 + number)


def end(code: int) -> NoReturn:
    """Ends the process; at once where a thread still waits for input, as Python would abort."""
    if any(thread.name == READER for thread in threading.enumerate()):
        os._exit(code)
    sys.exit(code)


def heed_signals(name: str) -> None:
    """From now on Ctrl-C, SIGTERM and a closed terminal end this process by `leave`.

    What is ignored already stays ignored. A thread ends the process where its main thread is
    busy outside of Python, such as in a compiler.
    """
    global _name
    _name = name
    read, write = os.pipe()
    os.set_blocking(write, False)
    numbers = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))
    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read,), daemon=True).start()


def _watch(read: int) -> None:
    while number := os.read(read, 1):
        time.sleep(GRACE)
        if signal.getsignal(number[0]) is leave:  # a training has its own while it runs
            leave(number[0], None)


def hold_streams() -> None:
    """A standard stream that is closed stays taken, so that no file gets its number.

    To read or write it is an error; what goes to standard error is dropped.
    """
    modes = {"stdin": os.O_WRONLY, "stdout": os.O_RDONLY, "stderr": os.O_WRONLY}
    for number, (name, mode) in enumerate(modes.items()):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # gets the lowest number that is free
        if getattr(sys, name) is None:
            # Open as long as the process is.
            stream = open(number, "w" if number else "r", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


def _remove(path: Path) -> None:
    with suppress(OSError):  # there is nothing, or no right to it
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)
