"""What a caller gives to classify: its checks."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ejax.data.tokenizer import Text
from ejax.errors import UserError


def as_list(texts: Any, columns: Sequence[str]) -> list[Text]:
    """A single text or pair as a list of one; see `of_kind`."""
    if isinstance(texts, Mapping) or not isinstance(texts, Iterable):
        raise UserError(
            "texts must be a string, a pair (text, pair), or a list of either. "
            f"Got one {type(texts).__name__}."
        )
    return list(of_kind([texts] if isinstance(texts, str | tuple) else texts, columns))


def of_kind(texts: Iterable[Any], columns: Sequence[str]) -> Iterator[Any]:
    """The texts, each of the kind that was trained on.

    Args:
      columns: one for single texts, two for pairs; () where that is not known.

    Raises:
      ValueError: at a pair where single texts were trained on, or the reverse.
    """
    wrong: Any = {1: tuple, 2: str}.get(len(columns), ())
    for i, text in enumerate(texts):
        if isinstance(text, wrong):
            kind, expected, got = (
                ("one text", "a string, or a list of strings", f"a tuple of {len(text)}")
                if wrong is tuple
                else ("two texts", "a tuple (text, pair), or a list of them", "a string")
            )
            raise UserError(
                f"this bundle was trained on {kind} a row ({', '.join(columns)}): give {expected}. "
                f"Got {got} at texts[{i}]."
            )
        yield text


def check_top_k(top_k: Any) -> None:
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise UserError(f"top_k must be a positive number or None (all). Got {top_k!r}.")


def characters(text: Any) -> int:
    parts = text if isinstance(text, tuple | list) else (text,)
    return sum(len(part) for part in parts if isinstance(part, str))
