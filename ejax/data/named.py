"""The paper's five data sets by their TFDS names, as ArrayRecord data sources.

TFDS downloads and parses them; nothing here needs TensorFlow.
"""

import contextlib
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from ejax.errors import UserError

BLOCK = 4096  # rows read at once


class TfdsSet(NamedTuple):
    """How a TFDS data set is read; its label is the feature "label" in all of them."""

    module: str  # registers the builder, in tensorflow_datasets
    archive: str  # what TFDS downloads
    texts: tuple[tuple[str, ...], ...]  # text, pair; several fields are joined by a space
    classes: int
    splits: dict[str, str]


TRAIN_TEST = {"train": "train", "test": "test"}
ALL_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
MNLI_SPLITS = {"train": "train", "dev": "validation_matched", "test": "validation_mismatched"}
PAIR = (("premise",), ("hypothesis",))
TFDS = {
    "glue/sst2": TfdsSet("text.glue", "SST-2.zip", (("sentence",),), 2, ALL_SPLITS),
    "glue/mnli": TfdsSet("text.glue", "MNLI.zip", PAIR, 3, MNLI_SPLITS),
    "snli": TfdsSet("datasets.snli.snli_dataset_builder", "snli_1.0.zip", PAIR, 3, ALL_SPLITS),
    "ag_news_subset": TfdsSet(
        "datasets.ag_news_subset.ag_news_subset_dataset_builder", "ag_news_csv.tar.gz",
        (("title", "description"),), 4, TRAIN_TEST,
    ),
    "imdb_reviews": TfdsSet(
        "datasets.imdb_reviews.imdb_reviews_dataset_builder", "aclImdb_v1.tar.gz", (("text",),), 2,
        TRAIN_TEST,
    ),
}  # fmt: skip


class NamedSplit(NamedTuple):
    """Rows of a TFDS split that have a gold label."""

    source: Any  # rows {field: bytes, "label": int}
    rows: np.ndarray  # int64, ascending indices into source
    origin: str


def open_set(name: str, root: Path) -> tuple[tuple[str, ...], dict[str, NamedSplit]]:
    """(label names, splits) of a TFDS data set, downloaded and prepared on first use.

    Rows without a gold label are dropped; a test split without any is left out, and
    the origin of the other splits says so.

    Raises:
      ValueError: for an unknown name, or when the set cannot be downloaded.
    """
    from ejax.data import local

    if name not in TFDS:
        raise UserError(f"data.name must be one of {', '.join(TFDS)}. Got {name!r}.")
    found: dict[str, NamedSplit] = {}
    notes = ""
    with local.locked(root, name.replace("/", "-")), local.quiet():
        builder = _prepare(name, root)
        for split, theirs in TFDS[name].splits.items():
            source = builder.as_data_source(split=theirs)
            rows = _gold_rows(source, Path(builder.data_path) / f"gold-{theirs}.npy")
            origin = f"{name} {theirs}"
            if len(rows) == 0 and split == "test":
                notes = f"; the {theirs} split has no gold labels and is left out"
                continue
            if len(rows) == 0:
                raise UserError(f"{origin}: no row has a gold label.")
            if len(rows) < len(source):
                origin += f", {len(source) - len(rows)} rows without a gold label dropped"
            found[split] = NamedSplit(source, rows, origin)
        labels = tuple(builder.info.features["label"].names)
    return labels, {
        split: records._replace(origin=records.origin + notes) for split, records in found.items()
    }


def _prepare(name: str, root: Path) -> Any:
    """The TFDS builder, prepared."""
    import tensorflow_datasets as tfds

    archive, downloads = TFDS[name].archive, root / "downloads"
    importlib.import_module(f"tensorflow_datasets.{TFDS[name].module}")
    builder = tfds.builder(name, data_dir=root)
    try:
        with _without_tensorflow():
            builder.download_and_prepare(file_format="array_record", download_dir=downloads)
    except Exception as error:  # TFDS raises many kinds: network, checksum, archive, disk
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{name} could not be downloaded and prepared ({reason}): put {archive} into "
            f"{downloads / 'manual'} by hand, or use local files (data.path)."
        ) from error
    return builder


@contextlib.contextmanager
def _without_tensorflow() -> Iterator[None]:
    """Lets TFDS open archives, and give up soon where no server answers.

    TFDS 4.9.10 opens archives and writes their members with `tf.io.gfile.GFile`, so that
    none of its downloads can be prepared without TensorFlow (tensorflow/datasets issue
    11058); for files on a disk that is `open`. It retries 10 times, 200 seconds in all;
    here 4 times, 3 seconds.
    """
    from tensorflow_datasets.core.download import downloader, extractor

    before = extractor.tf, downloader.MAX_RETRIES
    gfile = SimpleNamespace(GFile=open)
    extractor.tf = SimpleNamespace(
        io=SimpleNamespace(gfile=gfile), compat=SimpleNamespace(as_text=str)
    )
    downloader.MAX_RETRIES = 4
    try:
        yield
    finally:
        extractor.tf, downloader.MAX_RETRIES = before


def _gold_rows(source: Any, cache: Path) -> np.ndarray:
    """Rows with a gold label (TFDS has -1 where there is none): int64, ascending."""
    if cache.exists():
        return np.load(cache)
    gold: list[int] = []
    for start in range(0, len(source), BLOCK):
        indices = list(range(start, min(start + BLOCK, len(source))))
        rows = source.__getitems__(indices)
        gold += [i for i, row in zip(indices, rows, strict=True) if row["label"] >= 0]
    part = cache.with_suffix(".part.npy")
    np.save(part, np.array(gold, np.int64))
    os.replace(part, cache)  # a killed process leaves no half a file
    return np.load(cache)
