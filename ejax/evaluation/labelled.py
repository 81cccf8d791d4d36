"""Rows for a trained bundle: to evaluate it, to calibrate it again, or for the ranges of INT8."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ejax import storage
from ejax.bundle import Bundle, check_alike, check_columns, label_column_of, text_columns_of
from ejax.config import DataConfig
from ejax.data.columns import Columns
from ejax.data.folders import find_files
from ejax.data.frames import Shards, as_rows, as_splits
from ejax.data.named import TFDS
from ejax.data.sources import SPLITS, Example, Split, load
from ejax.data.unlabelled import read_texts
from ejax.errors import UserError


def labelled_rows(
    bundle: Bundle,
    data: Any,
    split: str = "test",
    *,
    text_columns: Sequence[str] = (),
    label_column: str = "",
    limit: int = 0,
) -> Split:
    """One split, its labels those of the bundle by name.

    Columns and the carving of a dev split from train follow the training of the bundle,
    so that the dev rows of the same data are the dev rows of then.

    Args:
      data: a file (`split` does not matter), a folder with train, dev and test files, a TFDS
        name, or rows as `finetune` takes them.
      text_columns: () means those of the training, or else as many recognised ones.
      label_column: "" means that of the training, or else a recognised one.
      limit: at most so many rows, drawn by a fixed seed; 0 means all.

    Raises:
      ValueError: one sentence; for a label that the bundle does not know it names the
        file and the line.
    """
    if split not in SPLITS:
        raise UserError(f"split must be one of {', '.join(SPLITS)}. Got {split!r}.")
    trained = bundle.provenance.get("config", {})
    options: dict[str, Any] = {
        "text_columns": tuple(text_columns),
        "label_column": label_column,
        "problem_type": bundle.exits.problem_type,
        "dev_fraction": trained.get("data", {}).get("dev_fraction", 0.1),
        "limit": limit,
    }
    given = None
    path = storage.path_of(data if isinstance(data, str | Path) else "")
    if not isinstance(data, str | Path):
        config, given = DataConfig(**options), as_splits(data)
        if not isinstance(data, Mapping):
            given, split = {"test": as_rows(data)}, "test"
        data = "data"
    elif path.is_file():
        config, split = DataConfig(test=str(data), **options), "test"
    elif path.is_dir():
        config = DataConfig(path=str(data), **options)
    elif data in TFDS:
        config = DataConfig(name=data, **options)
    else:
        raise UserError(
            f"No such file or folder: {data}; nor is it one of the data sets {', '.join(TFDS)}."
        )
    seed = trained.get("seed", 0)
    found = load(
        config, splits=(split,), seed=seed, labels=bundle.labels,
        preferred=text_columns_of(bundle), preferred_label=label_column_of(bundle), given=given,
    )  # fmt: skip
    if split not in found:
        raise UserError(f"{data} has no labelled {split} split: choose another one (--split).")
    if not text_columns or data in TFDS:  # of a named set none are chosen
        check_columns(bundle, found[split].text_columns, found[split].origin)
    return found[split]


def unlabelled_rows(
    bundle: Bundle,
    data: str,
    split: str = "dev",
    *,
    text_columns: Sequence[str] = (),
    label_column: str = "",
) -> tuple[list[Example], str]:
    """The rows of one split without their labels, which need not be there; and their origin.

    They are in the order of `labelled_rows`. A txt has one text per line. Where a folder has none
    or several files of the split, and of a named data set, they are those of `labelled_rows`.

    Args: as of `labelled_rows`.

    Raises:
      ValueError: one sentence; for a row it names the file and the line.
    """
    path = storage.path_of(data)
    if split not in SPLITS:
        raise UserError(f"split must be among {', '.join(SPLITS)}. Got {split!r}.")
    found_files = find_files(DataConfig(path=data), (split,)) if path.is_dir() else {split: path}
    file = found_files.get(split)
    if file is None or isinstance(file, Shards) or not file.is_file():
        rows = labelled_rows(
            bundle, data, split, text_columns=text_columns, label_column=label_column
        )
        return list(rows), rows.origin
    asked = Columns(
        text_columns, label_column, text_columns_of(bundle), label_column_of(bundle),
        bundle.exits.problem_type, bundle.labels,
    )  # fmt: skip
    found, columns, _ = read_texts(file, asked)
    origin = "/".join(file.parts[-2:])
    if not text_columns:
        check_columns(bundle, columns, origin)
    return found, origin


def check_single(bundle: Bundle, what: str) -> None:
    """Raises ValueError for what knows accuracies alone."""
    if bundle.task.metric != "accuracy":
        raise UserError(
            f"{what} must be with a bundle of one label per text. This one is of "
            f"{bundle.exits.problem_type}: `ejax evaluate` measures it."
        )


def check_beside(bundle: Bundle, beside: Mapping[str, Any]) -> None:
    """Raises ValueError unless the others have this bundle's labels, in its order, and texts."""
    for name, other in beside.items():
        check_single(other.bundle, f"--beside {name}")
        check_alike(f"--beside {name}", other.bundle, bundle.labels, text_columns_of(bundle))
