"""Files and folders on object storage (gs://), through etils' paths.

A rename is not atomic there: a folder is copied, and the file that makes it whole comes last.
"""

import importlib.util
import logging
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from ejax.ending import partial
from ejax.errors import UserError

SCHEME = "gs://"


def is_remote(path: str | Path) -> bool:
    return str(path).startswith(SCHEME)


def path_of(path: str | Path) -> Path:
    """A path of this machine, or one of etils that reads and writes the same way.

    Raises:
      ValueError: for storage that is not known, or whose library is not installed.
    """
    if re.match(r"[a-z][a-z0-9]+:/(?!/)", str(path)):  # what pathlib makes of gs://
        raise UserError(f"{path} must be a folder here, or gs:// as a string where that can be.")
    if "://" not in str(path):
        text = str(path)
        return Path(path).expanduser() if text == "~" or text.startswith("~/") else Path(path)
    if not is_remote(path):
        raise UserError(f"{path}: only folders and gs:// are known here.")
    if not importlib.util.find_spec("gcsfs"):
        raise UserError(f"{path}: for gs:// pip install '.[gcs]' in ejax's folder.")
    import fsspec
    from etils import epath

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what it raises is told once
    # Other hosts write too: what a folder held a moment ago says little.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return cast(Path, epath.Path(path))


@contextmanager
def reaching(path: str | Path) -> Iterator[None]:
    """One sentence for whatever the storage's client raises about remote paths.

    A client has errors of its own for rights, names and networks.
    """
    try:
        yield
    except Exception as error:
        if not is_remote(path):
            raise
        raise UserError(f"{path} cannot be reached: {first_line(error)}.") from error


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def is_of_client(error: BaseException) -> bool:
    """Whether the storage's client raised it: rights, names, networks."""
    return type(error).__module__.partition(".")[0] in ("gcsfs", "google", "aiohttp")


def is_damage(error: Exception) -> bool:
    """Whether an error says that what was read is damaged, rather than out of reach or memory."""
    gone = FileNotFoundError | NotADirectoryError | IsADirectoryError
    away = isinstance(error, OSError) and not isinstance(error, gone)
    words = "RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE|PERMISSION"
    return not (
        away
        or isinstance(error, MemoryError)
        or is_of_client(error)
        or re.search(words, str(error))
    )


@contextmanager
def fetched(path: str | Path, names: Sequence[str] = ()) -> Iterator[Path]:
    """A local copy of a remote file, or of those of `names` that a remote folder holds.

    What is local comes as it is. A ValueError inside names the remote path.

    Raises:
      ValueError: where it cannot be reached, or the last of `names`, which makes the folder
        whole, is not the same after the copies as before.
    """
    if not is_remote(path):
        yield Path(path)
        return
    source: Any = path_of(path)
    with temporary_folder() as folder:
        copy = Path(folder, source.parent.name, source.name)
        with reaching(path):
            copy.parent.mkdir()
            if names:
                copy.mkdir()
                before = contents(source / names[-1])
            for part, target in [(source / n, copy / n) for n in names] or [(source, copy)]:
                if not names or part.exists():
                    part.copy(target)
            after = contents(source / names[-1]) if names else None
        if names and before != after:
            raise UserError(f"{path} is being written at this moment: try again.")
        try:
            yield copy
        except ValueError as error:
            raise UserError(str(error).replace(str(copy), str(path))) from error


@contextmanager
def temporary_folder(above: Path | None = None) -> Iterator[Path]:
    """A new, private folder, gone at the end."""
    above = above or Path(tempfile.gettempdir())
    with partial(above / f".ejax-{secrets.token_hex(8)}") as folder:
        folder.mkdir(mode=0o700)
        yield folder


def contents(path: Any) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def files_in(folder: Any) -> Iterator[Any]:
    """All of them, at any depth."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from files_in(path)
        else:
            yield path


def upload(source: Path, target: Any, first: str = "", last: str = "") -> None:
    """Copies a folder: the file `first`, the others, and `last`, without which it is not whole.

    Other files of the target stay, but for an old `last`, which goes before anything comes.
    """
    from etils import epath

    with reaching(target):
        if last and (target / last).exists():
            (target / last).unlink()
        for path in sorted(
            files_in(source), key=lambda path: (path.name == last) - (path.name == first)
        ):
            there = target / path.relative_to(source)
            try:
                epath.Path(path).copy(there, overwrite=True)
            except BaseException:  # closing an object that is half-written ends it all the same
                there.unlink(missing_ok=True)
                raise


def write_text(path: Any, text: str) -> None:
    """All of it or nothing; an object on gs:// is never half of one."""
    if is_remote(path):
        path.write_text(text, encoding="utf-8")
        return
    with becoming(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


def write_bytes(path: Any, content: bytes) -> None:
    """Likewise."""
    if is_remote(path):
        path.write_bytes(content)
        return
    with becoming(path) as fresh:
        fresh.write_bytes(content)


@contextmanager
def becoming(path: Path) -> Iterator[Path]:
    """A file of this machine to write, which takes the name of `path` if all goes well."""
    with partial(path.with_name(f".{path.name}.{os.getpid()}.part")) as fresh:
        yield fresh
        fresh.replace(path)


def move(source: Any, target: Any) -> None:
    """A folder to where nothing is, or what is there is replaced."""
    from etils import epath

    epath.Path(target).rmtree(missing_ok=True)
    if not is_remote(source):
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)
        return
    for path in files_in(source):
        path.copy(target / path.relative_to(source), overwrite=True)
    source.rmtree()
