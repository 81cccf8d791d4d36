"""The files of a folder that hold train, dev and test, by their names.

Those of the Hugging Face hub too: `train-00000-of-00002.parquet`, and `validation` for dev, in the
folder itself or in its folder `data`.
"""

import re
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

from ejax import storage
from ejax.config import DataConfig
from ejax.data.frames import Shards
from ejax.errors import UserError

SPLITS = ("train", "dev", "test")
FILE_NAMES = {"train": ("train",), "dev": ("dev", "validation", "valid", "val"), "test": ("test",)}
LABELLED = ("tsv", "csv", "jsonl", "json", "parquet")  # formats that can hold labels
SHARD = re.compile(r"([a-z]+)-(\d{5})-of-(\d{5})(-[0-9a-f]{16})?\.parquet")


def find_files(config: DataConfig, splits: Sequence[str] = SPLITS) -> Mapping[str, Path | Shards]:
    """The file of each split that has one; a file named by itself wins over the folder.

    A folder as the training file is the folder of all splits.

    Args:
      splits: those wanted; of others it does not matter what the folder holds.

    Raises:
      ValueError: where the folder has none, or several for a split, or not all files of one.
    """
    paths: dict[str, Path | Shards] = {}
    single = {name: getattr(config, name) for name in SPLITS if getattr(config, name)}
    named = {name: storage.path_of(path).expanduser() for name, path in single.items()}
    folder = storage.path_of(config.path).expanduser() if config.path else None
    if folder is None and "train" in named and named["train"].is_dir():
        folder = named.pop("train")
    if folder:
        if folder.is_file():
            raise UserError(f"data.path must be a folder: set data.train={folder} for a file.")
        if not folder.is_dir():
            raise UserError(f"No such folder: {folder} (data.path).")
        paths = _splits_in(folder, {*splits} - named.keys())
        if not paths and (folder / "data").is_dir():
            paths = _splits_in(folder / "data", {*splits} - named.keys())
        if not paths:
            held = ", ".join(sorted(file.name for file in folder.iterdir())[:10]) or "nothing"
            raise UserError(
                f"{folder} has no train.tsv, train.csv or train.jsonl (each also .gz), and no "
                f"train.parquet or train-00000-of-00001.parquet. It holds: {held}."
            )
    for name, path in named.items():
        if not storage.is_remote(path) and path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(
                f"data.{name} must be a file that can be read again. Got {path}, a pipe or a "
                f"device: write its rows to a file first."
            )
    return paths | named


def _splits_in(folder: Path, wanted: Container[str]) -> dict[str, Path | Shards]:
    """Those of a folder; of a split that is not wanted any of its files, which is not read."""
    paths: dict[str, Path | Shards] = {}
    files = sorted(folder.iterdir())
    for name, stems in FILE_NAMES.items():
        matches: list[Path | Shards] = [
            file
            for file in files
            if file.name.removesuffix(".gz") in {f"{s}.{f}" for s in stems for f in LABELLED}
        ]
        shards = defaultdict(list)
        for file in files:
            if (of := SHARD.fullmatch(file.name)) and of[1] in stems:
                shards[of[1], int(of[3])].append(file)
        for key, group in sorted(shards.items()):
            matches.append(_whole(folder, *key, group) if name in wanted else group[0])
        if len(matches) > 1 and name in wanted:
            both = " and ".join(str(match).rpartition("/")[2] for match in matches[:2])
            raise UserError(f"{folder} holds {both}: set data.{name} to the one to use.")
        if matches:
            paths[name] = matches[0]
    return paths


def _whole(folder: Path, stem: str, count: int, files: Sequence[Path]) -> Path | Shards:
    """The files of one split in order, which must all be there, each once."""
    numbers = [int(file.name.split("-")[1]) for file in files]
    wanted = [f"{stem}-{number:05}-of-{count:05}.parquet" for number in range(count)]
    missing = [name for number, name in enumerate(wanted) if number not in numbers]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of the {count} files of {stem}, such as {missing[0]}: "
            f"fetch the rest."
        )
    if numbers != [*range(count)]:
        raise UserError(
            f"{folder} holds {len(files)} files of {stem}, and their names say {count}: keep those "
            f"of one version."
        )
    return files[0] if count == 1 else Shards(f"{folder}/{stem}-*-of-{count:05}.parquet", (*files,))
