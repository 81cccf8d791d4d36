"""What is worth a loud word about the data or the result of a training: one sentence each, or "".

Axes: N rows, E exits.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from ejax.data.sources import Example
from ejax.data.tokenizer import Encoded, Tokenizer
from ejax.tasks import Task

UNKNOWN_SHARE = 0.03  # of the words; English sets have 0, emoji in chats 0.0014, Korean 0.25
SHOWN = 30  # characters of a word


class Doubt(UserWarning):
    """A training went well, and its result may be worth less than hoped."""


def warn(sentence: str) -> None:
    """Warns of what one of these checks says, if it says anything."""
    if sentence:
        warnings.warn(sentence, Doubt, stacklevel=2)


def unknown_share(tokenizer: Tokenizer, encoded: Encoded) -> float:
    """The share of the words in N rows that are not known; punctuation counts, as in BERT.

    Where a vocabulary does not mark what begins a word, the share is of the tokens.
    """
    words = tokenizer.begins_word()[encoded.ids].sum()
    return float(tokenizer.unknown()[encoded.ids].sum() / max(words, 1))


def unknown_words(tokenizer: Tokenizer, encoded: Encoded, rows: Sequence[Example]) -> str:
    """Whether the vocabulary does not fit the language of the N rows, which were `encoded`."""
    share = unknown_share(tokenizer, encoded)
    if share <= UNKNOWN_SHARE:
        return ""
    first = int(tokenizer.unknown()[encoded.ids].argmax())
    row = rows[int(np.searchsorted(encoded.offsets, first, side="right")) - 1]
    word, token = tokenizer.first_unknown(row.text)
    if not token:
        word, token = tokenizer.first_unknown(row.pair or "")
    word = word if len(word) <= SHOWN else f"{word[:SHOWN]}…"
    return (
        f"{100 * share:.0f} % of the words of train, such as {word!r}, become {token}: the "
        f"encoder's vocabulary does not fit the language of the data; choose another model."
    )


def still_rising(history: Sequence[float], rows: int, task: Task) -> str:
    """Whether the last evaluation is the best, by more than chance.

    Args:
      history: the task's metric, its mean over the exits, at each evaluation, in order.
      rows: N, on which it was measured; its standard error is at most that of one exit.
    """
    if len(history) < 2:
        return ""
    *before, last = history
    error = task.standard_error(last, rows)
    if last < max(before) or last - before[-1] <= error:
        return ""
    return (
        f"dev-A {task.metric_name} was still rising at the last evaluation, from {before[-1]:.3f} "
        f"to {last:.3f}, and the standard error is {error:.3f}: train longer (--epochs)."
    )


def no_better_than_chance(
    layers: Sequence[int], reached: Sequence[float], labels: Any, task: Task
) -> str:
    """Which of the E exits are not better than who gives every row the same, best answer.

    Args:
      layers: after which the exits are, [E].
      reached: the task's metric of each exit on these rows, [E].
      labels: of the rows, [N, ...].
    """
    chance = task.chance(labels)
    each = zip(layers, reached, strict=True)
    failed = [f"layer {layer}: {value:.3f}" for layer, value in each if value <= chance]
    if not failed:
        return ""
    return (
        f"{task.metric_name} of every exit must be above that of one answer for every text "
        f"({chance:.3f}). Got {'; '.join(failed)}: train longer (epochs=), or on more rows of "
        f"rare labels; the losses are in metrics.jsonl."
    )
