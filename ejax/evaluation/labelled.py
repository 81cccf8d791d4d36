"""Labelled rows for a trained bundle: to evaluate it, or to calibrate it again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ejax import storage
from ejax.bundle import Bundle, check_alike, check_columns, label_column_of, text_columns_of
from ejax.config import DataConfig
from ejax.data.frames import as_rows, as_splits
from ejax.data.named import TFDS
from ejax.data.sources import SPLITS, Split, load
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
