"""A command line as a process: exit codes, words for errors, streams, kept programs."""

import errno
import hashlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import typer

from ejax import storage
from ejax.errors import UserError

# Of click or of typer's own copy of it, by version; not public under its name in either.
UsageError: Any = typer.BadParameter.__base__


def keep_programs() -> None:
    """Sets up jax: float32, and compiled programs kept in the user's cache, for each CPU type.

    A folder for them that is set already stays; JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    from ejax.assets import cache_dir
    from ejax.hardware import cpu_type

    kind = hashlib.sha256(cpu_type().encode()).hexdigest()[:12]
    os.environ["JAX_ENABLE_X64"] = "0"  # which widens what the programs fix as 32 bits
    folder = cache_dir() / "xla" / kind
    with suppress(OSError):  # a home that cannot be written keeps nothing
        folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK):
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))


def run(app: typer.Typer, name: str, argv: Sequence[str]) -> int:
    """Runs a command line and returns its exit code.

    0: done. 2: wrong usage, or what `explain` has words for, as one sentence on standard
    error. 75: stopped by SIGTERM, and 76: another process of the run is gone; both to be
    repeated. 130: Ctrl-C. 141: nobody reads standard output any more. Every other exception is
    a bug and passes through.
    """
    notes = Notes(logging.INFO)
    with warnings.catch_warnings(), notes.shown():
        warnings.showwarning = _say_warning
        try:
            command = typer.main.get_command(app)
            with command.make_context(name, list(argv) or ["--help"]) as context:
                command.invoke(context)
            sys.stdout.flush()
            return 0
        except typer.Exit as done:
            return done.exit_code
        except UsageError as error:
            asked = error.ctx.command_path if error.ctx else name
            return _say(name, f"{error.format_message()} See `{asked} --help`.", 2)
        except KeyboardInterrupt:
            return _say(name, "interrupted.", 130)
        except BrokenPipeError:
            return 141
        except Exception as error:
            sentence = explain(error)
            if not sentence:
                raise
            return _say(name, sentence, getattr(error, "exit_code", 2))
        finally:
            try:
                sys.stdout.flush()
            except OSError:  # what cannot be written is not tried again when Python ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def explain(error: Exception) -> str:
    """What the user can mend, as a sentence; "" for a bug."""
    if hasattr(error, "exit_code") or isinstance(error, UserError):
        return str(error)
    if storage.is_of_client(error):
        return f"object storage cannot be reached: {storage.first_line(error)}."
    if isinstance(error, OSError) and error.errno == errno.EBADF and not error.filename:
        return "standard input or standard output is closed, and is needed."
    if isinstance(error, OSError):
        return (f"{error.filename}: " if error.filename else "") + f"{error.strerror or error}."
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        if os.strerror(code) in str(error):  # array_record and tensorstore say it in words only
            return (
                f"{os.strerror(code)} ({' '.join(str(error).split())[:300]}). Make room and "
                f"repeat the command."
            )
    return ""


def _say(name: str, sentence: str, code: int) -> int:
    print(f"{name}: {sentence}", file=sys.stderr)
    return code


def _say_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


class Notes(logging.Handler):
    """Shows what the library logs, as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())

    @contextmanager
    def shown(self) -> Iterator[None]:
        logger = logging.getLogger("ejax")
        level = logger.level
        logger.addHandler(self)
        logger.setLevel(self.level)
        try:
            yield
        finally:
            logger.removeHandler(self)
            logger.setLevel(level)


def note(sentence: str) -> None:
    print(sentence, file=sys.stderr)
