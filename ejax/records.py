"""JSON from outside: read strictly, and compared with a pattern."""

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from ejax.errors import UserError, clipped, shown
from ejax.storage import Held

MOST_DIGITS = 40  # of an integer in JSON; a tokenizer's settings have one of 31
MOST_NESTED = 64  # levels of JSON
HALF = re.compile(r"\\u[dD][89a-fA-F]")  # perhaps of a pair: alone it is no character
MOST_JSON = 1 << 28  # bytes: rows.json has 16 for a row
WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


def read_json(file: Path | Held, like: Any = None) -> dict[str, Any]:
    """The object in a JSON file: finite numbers, each key once.

    Args:
      file: of this machine.
      like: what it must look like, see `misfit`.

    Raises:
      ValueError: in one sentence for whatever else it is, or where it is larger, or nested more
        deeply, than any that this package reads.
    """
    path, name = file if isinstance(file, Held) else (file, file)
    try:
        if path.stat().st_size > MOST_JSON:
            raise ValueError(f"it has more than {MOST_JSON >> 20} MiB")
        text = path.read_text(encoding="utf-8")
        values = json.loads(
            text,
            parse_constant=_not_finite,
            parse_float=_finite,
            parse_int=_short,
            object_pairs_hook=_once,
        )
        _check_depth(values)
        if HALF.search(text):
            json.dumps(values, ensure_ascii=False).encode()
    except RecursionError:
        raise UserError(f"{name} is damaged: it is nested too deeply.") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{name} is damaged: it is not JSON: {clipped(error)}.") from None
    if not isinstance(values, dict):
        raise UserError(
            f"{name} is damaged: it must hold a JSON object. Got {type(values).__name__}."
        )
    problem = misfit(values, {} if like is None else like)
    if problem:
        raise UserError(f"{name} is damaged: {problem}.")
    return values


class Whole(dict[Any, Any]):
    """A pattern all of whose keys must be there."""


def misfit(value: Any, like: Any, where: str = "") -> str:
    """The first place in a value from JSON that is not like the pattern; "" where all of it is.

    A pattern is a type (float: any number), a list that holds the pattern of its items, or a dict
    with the patterns of keys that may be there, of others under `...`.

    >>> misfit({"a": [1, 2.5], "more": None}, {"a": [int]})
    'a[1] must be an integer. Got 2.5'
    """
    for kind, word in ((list, "a list"), (dict, "an object")):
        if isinstance(like, kind) and not isinstance(value, kind):
            return f"{where} must be {word}. Got {shown(value)}"
    if isinstance(like, list):
        if all(type(item) is like[0] for item in value):  # the quick way for long ones
            return ""
        parts = [(f"{where}[{i}]", item, like[0]) for i, item in enumerate(value)]
    elif isinstance(like, dict):
        if isinstance(like, Whole) and (missing := [name for name in like if name not in value]):
            return f"{where}{'.' * bool(where)}{missing[0]} is missing"
        parts = [
            (f"{where}{'.' * bool(where)}{clipped(name, 40)}", item, like.get(name, like.get(...)))
            for name, item in value.items()
        ]
    elif like is None or type(value) is like or (like is float and type(value) is int):
        return ""
    else:
        return f"{where} must be {WORDS[like]}. Got {shown(value)}"
    return next((found for at, item, of in parts if (found := misfit(item, of, at))), "")


def _not_finite(text: str) -> Any:
    raise ValueError(f"{text} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{clipped(text, 40)} is too large")
    return value


def _short(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"{clipped(text, 40)} has too many digits")
    return int(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{clipped(twice, 40)} stands twice in one object")
    return values


def _check_depth(values: Any) -> None:
    level = [values] if isinstance(values, dict | list) else []
    for _ in range(MOST_NESTED):
        if not level:
            return
        inner = (one.values() if isinstance(one, dict) else one for one in level)
        level = [item for one in inner for item in one if isinstance(item, dict | list)]
    raise RecursionError
