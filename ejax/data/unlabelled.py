"""Texts without labels, read from one file, for a teacher to label.

Axes: N rows.
"""

import numpy as np

from ejax import storage
from ejax.config import DataConfig
from ejax.data.columns import check_still, find_text_columns, label_columns
from ejax.data.files import Row, format_of, read_rows, texts_of
from ejax.data.labels import NO_LABEL
from ejax.data.sources import Example, Split
from ejax.errors import UserError


def read_unlabelled(config: DataConfig, train: Split) -> tuple[list[Example], tuple[str, ...]]:
    """The N rows of `config.unlabelled`, at most `config.limit`, and the label columns not read.

    Their text is in the columns that are named, or in those of train, or in recognised ones; a
    txt has one text per line.

    Raises:
      ValueError: one sentence; for a row it names the file and the line.
    """
    path = str(storage.path_of(config.unlabelled))
    plain = format_of(path) == "txt"
    given = () if plain else config.text_columns
    first: Row = {}
    columns: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def find(row: Row) -> tuple[str, ...]:
        return find_text_columns(
            row, given, preferred=train.text_columns, labels=ignored[:1], path=path
        )

    rows = []
    for line, row in read_rows(
        path, text_columns=given, label_column=config.label_column, labels=train.labels
    ):
        if not first:
            first = row
            if not plain:
                ignored = tuple(
                    label_columns(row, config.label_column, train.label_column, train.problem_type)
                )
            columns = ("text",) if plain else find(row)
            if len(columns) != len(train.text_columns):
                raise UserError(
                    f"{path} has {len(columns)} text columns ({', '.join(columns)}), train has "
                    f"{len(train.text_columns)} ({', '.join(train.text_columns)})."
                )
        elif not plain:
            check_still(row, first, columns, find, f"{path}, line {line}")
        rows.append(Example(*texts_of(row, columns, path, line), NO_LABEL[train.problem_type]))
    if not rows:
        raise UserError(f"{path} has no rows.")
    if config.limit and len(rows) > config.limit:  # drawn as those of a split
        order = np.random.default_rng(0).permutation(len(rows))
        rows = [rows[i] for i in np.sort(order[: config.limit])]
    return rows, ignored
