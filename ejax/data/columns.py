"""Which columns of a file hold the text and the label: those named, or those of a usual name.

One rule for every name: the column called just so, or else the only one called so but for case,
spaces around it and invisible characters.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ejax.config import Problem
from ejax.data.labels import FLAGS, INVISIBLE, REGRESSION, SCORE, SEVERAL, SINGLE, listed, short
from ejax.errors import UserError

LABEL_COLUMNS = ("label", "labels", "category", "class", "intent", "target", "gold_label")
# Recognised text columns, the first match wins.
TEXT_COLUMNS = (
    ("text",),
    ("text_a", "text_b"),
    ("text_a",),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("sentence",),
)
# Else the only one of these; not beside a heading, which may be half of the text.
ONE_TEXT = ("review", "content", "comment", "message", "utterance", "query", "tweet", "body")
HEADINGS = ("title", "headline", "subject", "summary")
USUAL_TEXTS = {*ONE_TEXT, *HEADINGS}.union(*TEXT_COLUMNS)
ROW_NUMBER_COLUMNS = ("idx", "index", "id", "")  # never the text, nor is pandas' "Unnamed: 0"


class Columns(NamedTuple):
    """Which columns are asked for, and which are read if the file has them and none are named."""

    texts: Sequence[str] = ()
    label: str = ""
    preferred: Sequence[str] = ()
    preferred_label: str = ""
    problem: Problem = SINGLE
    labels: Sequence[str] = ()  # known label names; they tell that a tsv has no header


def find_column(columns: Collection[str], name: str) -> str:
    """The column of that name by the rule above; "" where there is none, or more than one.

    >>> find_column(("Text", " Label"), "label")
    ' Label'
    """
    if name in columns:
        return name
    alike = [column for column in columns if plain(column) == plain(name)]
    return alike[0] if len(alike) == 1 else ""


def label_columns(
    columns: Collection[str], given: str = "", preferred: str = "", problem: Problem = SINGLE
) -> list[str]:
    """Those that may hold the label: the one given, or preferred, or `label`, or all usual ones."""
    given = given or (preferred and find_column(columns, preferred))
    if given or "label" in columns:
        named = find_column(columns, given or "label")
        return [named] if named else []
    usual = (*LABEL_COLUMNS, SCORE) if problem == REGRESSION else LABEL_COLUMNS
    return [column for column in columns if plain(column) in usual]


def find_label_column(
    columns: Collection[str],
    given: str = "",
    *,
    preferred: str = "",
    problem: Problem = SINGLE,
    path: str | Path = "",
) -> str:
    """The column that holds the label: the one given, or preferred, or recognised.

    Raises:
      ValueError: where it is missing, or more than one is recognised.
    """
    found = label_columns(columns, given, preferred, problem)
    if len(found) == 1:
        return found[0]
    what = f"{path}: which column holds the label? Its columns: {listed(columns)}."
    if found:
        what = f"{path}: which column holds the label, {' or '.join(found[:3])}?"
    if given:
        what = f"{path} has no column {given!r} for the label. Its columns: {listed(columns)}."
    raise UserError(
        f"{what} Name it with label_column (--label-column).{_no_header(columns, path)}"
    )


def find_label_columns(
    row: Mapping[str, Any],
    given: str = "",
    *,
    preferred: str = "",
    problem: Problem = SINGLE,
    texts: Sequence[str] = (),
    path: str | Path = "",
) -> tuple[str, ...]:
    """The column of the label; for several labels perhaps one column of 0 and 1 for each.

    Those are named as "a,b,c", or all that are neither a text nor a row number.

    Args:
      row: the first of a file.
      texts: the columns of text that are named.

    Raises:
      ValueError: as `find_label_column`.
    """
    if problem == SEVERAL:
        for names in (given, preferred):
            parts = tuple(find_column(row, name) for name in names.split(","))
            if len(parts) > 1 and not find_column(row, names) and all(parts):
                return parts
        flags = _flag_columns(row, texts)
        if not given and len(flags) > 1 and not label_columns(row, given, preferred):
            return flags
    return (find_label_column(row, given, preferred=preferred, problem=problem, path=path),)


def _flag_columns(row: Mapping[str, Any], texts: Sequence[str]) -> tuple[str, ...]:
    """The columns of 0 and 1, if there is nothing else but text and row numbers."""
    known = {find_column(row, name) for name in texts} or recognised_texts(row, alone=False)
    left = [name for name in row if name not in known and not _is_other(plain(name))]
    flags = tuple(name for name in left if str(row[name]).strip().lower() in FLAGS)
    return flags if len(left) - len(flags) == (0 if known else 1) else ()


def find_text_columns(
    columns: Collection[str],
    given: Sequence[str] = (),
    *,
    preferred: Sequence[str] = (),
    labels: Collection[str] = (),
    path: str | Path = "",
) -> tuple[str, ...]:
    """The one or two columns that hold the text: those given, or preferred, or recognised.

    Args:
      labels: the columns of the label, which hold no text.

    Raises:
      ValueError: when a given column is missing, or none is recognised; it lists the
        columns of the file.
    """
    if not given:
        names = [name for name in columns if name not in labels]
        found = tuple(find_column(names, name) for name in preferred)
        if found and all(found):
            return found
        if found := recognised_texts(names):
            if len(columns) == 1 and _is_table(path) and plain(found[0]) not in USUAL_TEXTS:
                raise UserError(
                    f"{path}: {short(found[0])}, its first line, may be a text or the name of "
                    f"its one column: for a text put a header such as text above it, a name "
                    f"give as text_columns (--text-column)."
                )
            return found
        raise UserError(
            f"{path}: which column holds the text? Its columns: {listed(columns)}. Name one or "
            f"two with text_columns (--text-column).{_no_header(columns, path)}"
        )
    if len(given) > 2:
        raise UserError(f"text_columns must be one or two columns. Got {', '.join(given)}.")
    for name in given:
        if not find_column(columns, name):
            raise UserError(f"{path} has no column {name!r}. Its columns: {listed(columns)}.")
    found = tuple(find_column(columns, name) for name in given)
    if set(found).intersection(labels) or len(set(found)) < len(found):
        raise UserError(
            f"text_columns must be one or two columns other than that of the label, "
            f"{', '.join(map(repr, labels))}. Got {', '.join(given)}."
        )
    return found


def recognised_texts(columns: Collection[str], *, alone: bool = True) -> tuple[str, ...]:
    """The columns of text by their names; `alone`: or the only one that can be. () for none."""
    for known in TEXT_COLUMNS:
        found = tuple(find_column(columns, name) for name in known)
        if all(found):
            return found
    one = [name for name in columns if plain(name) in ONE_TEXT + HEADINGS]
    if len(one) == 1 and plain(one[0]) in ONE_TEXT:
        return (one[0],)
    left = [name for name in columns if not _is_other(plain(name))]
    return (left[0],) if alone and len(left) == 1 else ()


def names_columns(cells: Collection[str]) -> bool:
    """Whether a first line is a header: `label`, a usual text, or a usual label and a text."""
    text = any(all(find_column(cells, name) for name in known) for known in TEXT_COLUMNS)
    both = bool(label_columns(cells) and recognised_texts(cells, alone=False))
    return bool(text or both or find_column(cells, "label"))


def check_still(
    row: dict[str, Any], first: Collection[str], chosen: Sequence[str],
    find: Callable[[dict[str, Any]], Sequence[str]], where: str, what: str = "text",
) -> None:  # fmt: skip
    """Raises ValueError where a later object of a jsonl tells that its text is in other columns.

    Args:
      row: it.
      first: the columns of the first object, from which those of the text were `chosen`.
      find: chooses them from a row, or raises ValueError.
      what: text, or label.
    """
    found = tuple(chosen)
    if row.keys() > set(chosen) and not row.keys() <= set(first):
        with suppress(ValueError):
            found = tuple(find(row))
    if found != tuple(chosen):
        raise UserError(
            f"{where}: the {what} is in {', '.join(found)}, and was read from {', '.join(chosen)} "
            f"before: name the columns of the {what} (--{what}-column)."
        )


def plain(name: str) -> str:
    """A name without case, spaces around it and invisible characters."""
    return INVISIBLE.sub("", name).strip().casefold()


def _is_other(plain: str) -> bool:
    """Whether it is the name of a label or of a row number."""
    return plain in LABEL_COLUMNS + ROW_NUMBER_COLUMNS or plain.startswith(
        ("unnamed: ", "__index_level_")
    )


def _is_table(path: str | Path) -> bool:
    return str(path).lower().removesuffix(".gz").endswith((".tsv", ".csv"))


def _no_header(columns: Collection[str], path: str | Path) -> str:
    """A hint where not a single name in the first line of a tsv or csv is known."""
    known = any(_is_other(plain(name)) or plain(name) in USUAL_TEXTS for name in columns)
    hint = " If its first line is a row, put a header above it, such as label and text."
    return "" if known or not _is_table(path) else hint
