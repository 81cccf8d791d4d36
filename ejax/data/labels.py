"""What a row says of its label: a class, several labels, or a number, by `problem_type`.

A label name comes from a string, an integer or a boolean. A float that is whole, such as the 1.0
that pandas makes of 1, is the class 1.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from math import isfinite, nan
from typing import Any

from ejax.config import Problem
from ejax.errors import UserError

SINGLE: Problem = "single_label_classification"
SEVERAL: Problem = "multi_label_classification"
REGRESSION: Problem = "regression"

Label = int | tuple[int, ...] | float
NO_LABEL: dict[Problem, Label] = {SINGLE: -1, SEVERAL: (-1,), REGRESSION: nan}
SCORE = "score"  # the one name of a regression
LARGEST = 1e15  # of its numbers: float32 holds their squares
JOINT = "|"  # between the names of a cell
FLAGS = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}
WRITTEN_MARKS = ("nan", "<na>", "#n/a", "null")  # of programs, for no label: never a class
LIKELY_MARKS = ("-", "--", "?", "na", "n/a", "none", "")  # of people: may be a class
INVISIBLE = re.compile("[\ufeff\u200b-\u200f\u2060\xad]")
_FRACTION = re.compile(r"[-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?")


def short(value: Any) -> str:
    """A value in quotes, for a sentence: its beginning, where it is long."""
    shown = repr(value[:100] if isinstance(value, str | bytes) else value)
    return shown if len(shown) <= 60 else f"{shown[:60]}…"


def listed(columns: Collection[str]) -> str:
    """The names of columns; in quotes where a space, line break or the like would not be seen."""
    shown = [name[:30] for name in [*columns][:10]] + ["…"] * (len(columns) > 10)
    odd = any(name != name.strip() or not name.isprintable() for name in shown)
    return ", ".join(map(ascii, shown) if odd else shown)


def read_label(
    row: Mapping[str, Any], columns: Sequence[str], problem: Problem, path: object, line: int
) -> str | tuple[str, ...] | float:
    """A name; or the names of all that apply, in the row's order; or a finite number.

    Args:
      row: of a file or of Python.
      columns: the one with the label; for several labels also one column of 0 and 1 per label.
      path, line: where it is, for the sentence.

    Raises:
      ValueError: when there is no label, or one of another kind of problem.
    """
    for column in columns:
        if column not in row:
            raise UserError(
                f"{path}, line {line}: no column {short(column)} for the label. "
                f"Its columns: {listed(row)}. Name it with label_column (--label-column)."
            )
    where = f"{path}, line {line}: the label"
    typed = not str(path).lower().removesuffix(".gz").endswith((".tsv", ".csv"))
    if len(columns) > 1:
        return _flagged(row, columns, f"{path}, line {line}")
    label = row[columns[0]]
    if problem == REGRESSION:
        return _number(label, where)
    return _names(label, where, typed) if problem == SEVERAL else _name(label, where, typed)


def _number(label: Any, where: str) -> float:
    try:
        number = nan if isinstance(label, bool) else float(label)
    except (TypeError, ValueError, OverflowError):
        number = nan
    if not isfinite(number):
        raise UserError(f"{where} must be a finite number, such as 3.5. Got {short(label)}.")
    if abs(number) > LARGEST:
        raise UserError(f"{where} must be a number up to {LARGEST:g}. Got {short(label)}.")
    return number


def _flagged(row: Mapping[str, Any], columns: Sequence[str], where: str) -> tuple[str, ...]:
    for name in columns:
        if str(row[name]).strip().lower() not in FLAGS:
            raise UserError(
                f"{where}: column {short(name)} must hold 0 or 1, as the other labels' do. Got "
                f"{short(row[name])}. Name the columns of labels with --label-column a,b,c."
            )
    return tuple(name for name in columns if FLAGS[str(row[name]).strip().lower()])


def _names(label: Any, where: str, typed: bool) -> tuple[str, ...]:
    if label is None or (isinstance(label, float) and label != label):
        raise UserError(f"{where} is missing: expected a list of names, [] for none of them.")
    if isinstance(label, str):
        cell = label.strip()
        if cell[:1] + cell[-1:] == "[]" and not typed:
            raise UserError(
                f"{where} is a list in a cell: join the names by {JOINT}, as in a{JOINT}b. "
                f"Got {short(label)}."
            )
        label = [name.strip() for name in cell.split(JOINT)] if cell else []
    names = tuple(
        _name(one, where, typed) for one in (label if isinstance(label, list | tuple) else [label])
    )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(
            f"{where} names {short(twice)} twice: expected the names or numbers of those that "
            f"apply."
        )
    return names


def _name(label: Any, where: str, typed: bool) -> str:
    if isinstance(label, list | tuple):
        raise UserError(
            f"{where} is a list: for several labels per text set problem_type={SEVERAL} "
            f"(--problem-type). Got {short(label)}."
        )
    number = isinstance(label, float) or (
        isinstance(label, str) and not typed and _FRACTION.fullmatch(label)
    )
    if number and not isfinite(value := float(label)) and value == value:
        raise UserError(
            f"{where} {short(label)} is no name of a class: expected a name or an integer."
        )
    if number and value == value:
        if value == int(value):
            return str(int(value))
        raise UserError(
            f"{where} {str(label)[:30]} is a number with a fraction: for numbers set "
            f"problem_type={REGRESSION} (--problem-type)."
        )
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, int):
        return str(label)
    if not isinstance(label, str) or not label:
        raise UserError(
            f"{where} is missing: expected a name. Got {short(label)}. Leave the row out."
        )
    if label != label.strip():
        raise UserError(f"{where} must not begin or end with a space. Got {short(label)}.")
    check_characters(label, where)
    return label


def check_characters(text: str, where: str) -> None:
    """Raises ValueError where a text cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:  # "\ud800" in JSON
        raise UserError(f"{where} holds half a surrogate pair, which is no character.") from None


# The names of a whole file


def check_names(
    lines: Mapping[str, int], counts: Mapping[str, int], problem: Problem, path: object
) -> list[str]:
    """What is worth a warning about the label names of train, a sentence each.

    Args:
      lines: the first line of each name; counts: its rows.

    Raises:
      ValueError: where they are marks for no label that a program writes, or joined names.
    """
    for name, line in lines.items():
        if name.casefold() in WRITTEN_MARKS:
            raise UserError(
                f"{path}, line {line}: label {short(name)} ({counts[name]} rows) marks a row "
                f"without a label: leave such rows out, or give the class another name."
            )
    check_joined(counts, problem, path)
    said = [
        f"{path}, line {line}: label {short(name)} ({counts[name]} rows) marks rows without one in "
        f"some data: here it is a class. Leave such rows out."
        for name, line in lines.items()
        if name.casefold() in LIKELY_MARKS
    ]
    for twins in _twins(lines):
        shown = " and ".join(f"{name} (line {line})" for name, line in zip(
            show_apart(twins), [lines[twin] for twin in twins], strict=True))  # fmt: skip
        said.append(
            f"{path}: labels {shown} differ only in case, spaces or Unicode form: here they are "
            f"classes of their own. Write them alike if they are one."
        )
    return said


def check_joined(counts: Mapping[str, int], problem: Problem, path: object) -> None:
    """Raises ValueError where most names are several names in one.

    They are where most rows have such a name, or half of such names are made of others.
    """
    mark, fix = JOINT, f"for several labels per text set problem_type={SEVERAL} (--problem-type)"
    if problem == SEVERAL:
        mark, fix = ",", f"join them by {JOINT}"
        for name in counts:
            if JOINT in name:
                raise UserError(
                    f"{path}: label {short(name)} must not hold {JOINT}, which joins the labels of "
                    f"a text: give it another name."
                )
    joined = [name for name in counts if mark in name.strip(mark)]
    made = [name for name in joined if all(p.strip() in counts for p in name.split(mark))]
    rows = sum(counts[name] for name in joined)
    if joined and (2 * rows > sum(counts.values()) or 2 * len(made) >= len(joined)):
        raise UserError(
            f"{path}: labels such as {short(joined[0])} are several names joined by "
            f"{mark!r}: {fix}."
        )


def check_known(
    lines: Mapping[str, int], known: Collection[str], path: object, whose: str = "train"
) -> None:
    """Raises ValueError where a split has a label that train has not."""
    for label, line in lines.items():
        if label in known:
            continue
        names = ", ".join(name[:30] for name in [*known][:10]) + (", …" if len(known) > 10 else "")
        alike = [name for name in known if _plain(name) == _plain(label)]
        hint = ""
        if alike:
            ours, theirs = show_apart([label, alike[0]])
            hint = f" Only case, spaces or Unicode form tell {ours} from {theirs}."
        elif label == "-1" or label.casefold() in WRITTEN_MARKS + LIKELY_MARKS:
            hint = " If it marks a row without a label, leave the row out."
        raise UserError(
            f"{path}, line {line}: label {short(label)} is not among the labels of {whose}: "
            f"{names}.{hint}"
        )


def show_apart(names: Sequence[str]) -> list[str]:
    """The names in quotes, with escapes where two would look the same."""
    shown = [repr(name) for name in names]
    alike = len({unicodedata.normalize("NFC", INVISIBLE.sub("", name)) for name in names})
    return shown if alike == len(names) else [ascii(name) for name in names]


def _twins(names: Collection[str]) -> list[list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[_plain(name)].append(name)
    return [group for group in groups.values() if len(group) > 1]


def _plain(name: str) -> str:
    """Without case, spaces, invisible characters and forms of Unicode."""
    folded = unicodedata.normalize("NFKC", INVISIBLE.sub("", name)).casefold()
    return "".join(folded.split())
