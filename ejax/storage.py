"""Files and folders here and on object storage (gs://), there through etils' paths.

A rename is not atomic there: a folder is copied, and the file that makes it whole comes last.
"""

import hashlib
import importlib.util
import logging
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

from ejax.ending import partial
from ejax.errors import UserError

SCHEME = "gs://"
OPEN_FILES = Path("/proc/self/fd")  # of Linux: names for what is open, whatever became of its own


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
def temporary_folder(above: Path | None = None, name: str = "ejax") -> Iterator[Path]:
    """A new, private folder, gone at the end; what it is for is part of its name."""
    above = above or Path(tempfile.gettempdir())
    with partial(above / f".{name}-{secrets.token_hex(4)}") as folder:
        folder.mkdir(mode=0o700)
        yield folder


class Held(NamedTuple):
    """A file of a folder."""

    path: Path  # what opens it, even after another has taken its name
    name: Path  # what it is called in errors


@contextmanager
def held(folder: Path, names: Sequence[str]) -> Iterator[dict[str, Held]]:
    """Those of the names that are files of a folder here, all of the same moment.

    Whatever takes the place of the folder as a whole while they are read changes nothing. On
    systems that have no `OPEN_FILES` they are read by name.

    Raises:
      ValueError: where the folder cannot be read, or single files of it change meanwhile.
    """
    if not OPEN_FILES.is_dir():
        paths = {name: folder / name for name in names if (folder / name).is_file()}
        yield {name: Held(path, path) for name, path in paths.items()}
        return
    busy = f"{folder} is being written at this moment: try again."
    with ExitStack() as stack:
        for _ in range(100):  # 10 ms apart where nothing stands between two renames
            here, files = _opened(folder, names, stack)
            if here is None and set_aside(folder):
                time.sleep(0.01)
            elif here is None or _is_at(here, folder):
                break
            stack.close()
        else:
            if here is not None:
                raise UserError(busy)
        before = {name: _stamp(os.fstat(file)) for name, file in files.items()}
        try:
            yield {name: Held(OPEN_FILES / str(n), folder / name) for name, n in files.items()}
        except ValueError:
            if _changed(here, folder, before):
                raise UserError(busy) from None
            raise
        if _changed(here, folder, before):
            raise UserError(busy)


def _opened(
    folder: Path, names: Sequence[str], stack: ExitStack
) -> tuple[int | None, dict[str, int]]:
    """Descriptors of a folder, None where it is none, and of those of the names that are files."""

    def opened(path: str | Path, flags: int, within: int | None = None) -> int | None:
        try:
            file = os.open(path, flags, dir_fd=within)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            name = folder if within is None else folder / path
            raise UserError(f"{name} cannot be read: {error.strerror}.") from None
        stack.callback(os.close, file)
        return file

    here = opened(folder, os.O_RDONLY | os.O_DIRECTORY)
    if here is None:
        return None, {}
    files = {name: opened(name, os.O_RDONLY | os.O_NONBLOCK, here) for name in names}
    return here, {
        name: file
        for name, file in files.items()
        if file is not None and stat.S_ISREG(os.fstat(file).st_mode)
    }


def _is_at(here: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(here), folder.stat())
    except OSError:
        return False


def _stamp(one: os.stat_result) -> tuple[int, int, int]:
    """What tells whether a file is the same as before."""
    return one.st_ino, one.st_size, one.st_mtime_ns


def _changed(here: int | None, folder: Path, before: Mapping[str, tuple[int, int, int]]) -> bool:
    """Whether single files did, rather than the whole folder."""
    try:
        same = all(_stamp(os.stat(name, dir_fd=here)) == before[name] for name in before)
    except OSError:
        same = False
    return not same and here is not None and _is_at(here, folder)


def set_aside(folder: Path) -> Path | None:
    """The folder that was here before it was to be replaced, where that was cut off."""
    made = re.compile(re.escape(f".{folder.name}-") + r"[a-z0-9_]{8}-old")
    try:
        beside = [] if folder.exists() else list(folder.parent.iterdir())
    except OSError:
        beside = []
    return next((path for path in beside if made.fullmatch(path.name)), None)


def contents(path: Any) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def files_in(folder: Any) -> Iterator[Any]:
    """All of them, at any depth."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from files_in(path)
        else:
            yield path


def upload(
    source: Path, target: Any, first: str = "", last: str = "", owned: Sequence[str] = ()
) -> None:
    """Copies a folder: the file `first`, the others, and `last`, without which it is not whole.

    Before anything comes an old `last` goes, and then what is `owned` and not in the source. Other
    files of the target stay.
    """
    from etils import epath

    with reaching(target):
        for name in (last, *owned):
            if name and (name == last or not (source / name).exists()):
                (target / name).unlink(missing_ok=True)
        for path in sorted(
            files_in(source), key=lambda path: (path.name == last) - (path.name == first)
        ):
            there = target / path.relative_to(source)
            try:
                epath.Path(path).copy(there, overwrite=True)
            except BaseException:  # closing an object that is half-written ends it all the same
                there.unlink(missing_ok=True)
                raise


def sha256_of(path: str | Path) -> str:
    """Of a file of this machine."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Any, text: str) -> None:
    """All of it or nothing, as UTF-8; an object on gs:// is never half of one."""
    write_bytes(path, text.encode())


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
        if path.exists():  # it keeps its mode
            shutil.copymode(path, fresh)
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
