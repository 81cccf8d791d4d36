"""Which columns of a file hold the text and the label: those named, or those of a usual name.

One rule for every name: the column called just so, or else the only one called so but for case
and for spaces around it.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

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
ROW_NUMBER_COLUMNS = ("idx", "index", "id", "")  # never the text, nor is pandas' "Unnamed: 0"


def find_column(columns: Collection[str], name: str) -> str:
    """The column of that name by the rule above; "" where there is none, or more than one.

    >>> find_column(("Text", " Label"), "label")
    ' Label'
    """
    if name in columns:
        return name
    alike = [column for column in columns if _plain(column) == _plain(name)]
    return alike[0] if len(alike) == 1 else ""


def label_columns(columns: Collection[str], given: str = "", preferred: str = "") -> list[str]:
    """Those that may hold the label: the one given, or preferred, or `label`, or all usual ones."""
    given = given or (preferred and find_column(columns, preferred))
    if given or "label" in columns:
        named = find_column(columns, given or "label")
        return [named] if named else []
    return [column for column in columns if _plain(column) in LABEL_COLUMNS]


def find_label_column(
    columns: Collection[str], given: str = "", *, preferred: str = "", path: str | Path = ""
) -> str:
    """The column that holds the label: the one given, or preferred, or recognised.

    Raises:
      ValueError: where it is missing, or more than one is recognised.
    """
    found = label_columns(columns, given, preferred)
    if len(found) == 1:
        return found[0]
    what = f"{path}: which column holds the label? Its columns: {', '.join(columns)}."
    if found:
        what = f"{path}: which column holds the label, {' or '.join(found)}?"
    if given:
        what = f"{path} has no column {given!r} for the label. Its columns: {', '.join(columns)}."
    raise UserError(
        f"{what} Name it with label_column (--label-column).{_no_header(columns, path)}"
    )


def find_text_columns(
    columns: Collection[str],
    given: Sequence[str] = (),
    *,
    preferred: Sequence[str] = (),
    label_column: str = "",
    path: str | Path = "",
) -> tuple[str, ...]:
    """The one or two columns that hold the text: those given, or preferred, or recognised.

    Raises:
      ValueError: when a given column is missing, or none is recognised; it lists the
        columns of the file.
    """
    if not given:
        names = [name for name in columns if name != label_column]
        found = tuple(find_column(names, name) for name in preferred)
        if found and all(found):
            return found
        if found := recognised_texts(names):
            return found
        raise UserError(
            f"{path}: which column holds the text? Its columns: {', '.join(columns)}. Name one or "
            f"two with text_columns (--text-column).{_no_header(columns, path)}"
        )
    if len(given) > 2:
        raise UserError(f"text_columns must be one or two columns. Got {', '.join(given)}.")
    for name in given:
        if not find_column(columns, name):
            raise UserError(f"{path} has no column {name!r}. Its columns: {', '.join(columns)}.")
    found = tuple(find_column(columns, name) for name in given)
    if label_column in found or len(set(found)) < len(found):
        raise UserError(
            f"text_columns must be one or two columns other than that of the label, "
            f"{label_column!r}. Got {', '.join(given)}."
        )
    return found


def recognised_texts(columns: Collection[str], *, alone: bool = True) -> tuple[str, ...]:
    """The columns of text by their names; `alone`: or the only one that can be. () for none."""
    for known in TEXT_COLUMNS:
        found = tuple(find_column(columns, name) for name in known)
        if all(found):
            return found
    one = [name for name in columns if _plain(name) in ONE_TEXT + HEADINGS]
    if len(one) == 1 and _plain(one[0]) in ONE_TEXT:
        return (one[0],)
    left = [name for name in columns if not _is_other(_plain(name))]
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


def _plain(name: str) -> str:
    return name.strip().casefold()


def _is_other(plain: str) -> bool:
    """Whether it is the name of a label or of a row number."""
    return plain in LABEL_COLUMNS + ROW_NUMBER_COLUMNS or plain.startswith("unnamed: ")


def _no_header(columns: Collection[str], path: str | Path) -> str:
    """A hint where not a single name in the first line of a tsv or csv is known."""
    usual = {name for names in TEXT_COLUMNS for name in names}.union(ONE_TEXT, HEADINGS)
    known = any(_is_other(_plain(name)) or _plain(name) in usual for name in columns)
    table = str(path).lower().removesuffix(".gz").endswith((".tsv", ".csv"))
    hint = " If its first line is a row, put a header above it, such as label and text."
    return "" if known or not table else hint
