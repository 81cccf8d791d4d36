"""Texts read from one file without their labels: for a teacher, or for the ranges of INT8.

Axes: N rows.
"""

import numpy as np

from ejax import storage
from ejax.config import DataConfig
from ejax.data.columns import Columns, check_still, find_text_columns, label_columns
from ejax.data.files import Row, format_of, read_rows, texts_of
from ejax.data.labels import NO_LABEL
from ejax.data.sources import Example, Split
from ejax.errors import UserError


def read_unlabelled(config: DataConfig, train: Split) -> tuple[list[Example], tuple[str, ...]]:
    """The N rows of `config.unlabelled`, at most `config.limit`, and the label columns not read.

    Raises:
      ValueError: one sentence; for a row it names the file and the line.
    """
    asked = Columns(
        config.text_columns, config.label_column, train.text_columns, train.label_column,
        train.problem_type, train.labels,
    )  # fmt: skip
    rows, columns, ignored = read_texts(config.unlabelled, asked)
    if len(columns) != len(train.text_columns):
        raise UserError(
            f"{storage.path_of(config.unlabelled)} has {len(columns)} text columns "
            f"({', '.join(columns)}), train has {len(train.text_columns)} "
            f"({', '.join(train.text_columns)})."
        )
    if config.limit and len(rows) > config.limit:  # drawn as those of a split
        order = np.random.default_rng(0).permutation(len(rows))
        rows = [rows[i] for i in np.sort(order[: config.limit])]
    return rows, ignored


def read_texts(
    path: object, asked: Columns
) -> tuple[list[Example], tuple[str, ...], tuple[str, ...]]:
    """The N rows of a file, the columns of their text, and those of labels, which are not read.

    The text is in the columns that are named, or preferred, or recognised; a txt has one text per
    line.

    Raises:
      ValueError: one sentence; for a row it names the file and the line.
    """
    path = str(storage.path_of(str(path)))
    plain = format_of(path) == "txt"
    given = () if plain else asked.texts
    first: Row = {}
    columns: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def find(row: Row) -> tuple[str, ...]:
        return find_text_columns(
            row, given, preferred=asked.preferred, labels=ignored[:1], path=path
        )

    rows = []
    for line, row in read_rows(
        path, text_columns=given, label_column=asked.label, labels=asked.labels
    ):
        if not first:
            first = row
            if not plain:
                ignored = tuple(
                    label_columns(row, asked.label, asked.preferred_label, asked.problem)
                )
            columns = ("text",) if plain else find(row)
        elif not plain:
            check_still(row, first, columns, find, f"{path}, line {line}")
        rows.append(Example(*texts_of(row, columns, path, line), NO_LABEL[asked.problem]))
    if not rows:
        raise UserError(f"{path} has no rows.")
    return rows, columns, ignored
