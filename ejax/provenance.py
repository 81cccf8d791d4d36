"""Which rows had a part in a bundle, and so may not be used for what: one ledger.

A row is known by its exact text, whatever its label: `ejax.data.sources.row_hash`. The ledger, and
`rows.json`, hold salted hashes of that, so that a table of hashes made beforehand finds nothing.
The salt is derived from the rows and the salts before, not drawn: a run that was stopped and
resumed writes the same file.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ejax.errors import UserError

TRAINED = ("train",)  # the weights
PICKED = ("dev_a", "placed", "picked")  # which weights and exits are kept
# Those, temperatures, and the ranges of INT8: `ejax thresholds` leaves them out.
FITTED = (*TRAINED, *PICKED, "calibration", "ranges")
CHOSEN = (*FITTED, "thresholds")  # those, and thresholds: no report on them
UNKNOWN = (
    "Which of these rows the bundle was trained or fitted on cannot be known, as its rows.json is "
    "missing or incomplete: figures on such rows flatter it."
)
UNKNOWN_BEHIND = (
    "Which rows trained the model or the teacher cannot be known, as its rows.json is missing or "
    "incomplete: dev and test rows among them are not left out, and flatter the bundle."
)
ON_WORD = (
    "That none of these rows trained or fitted the bundle is its user's word: its rows.json is "
    "missing or incomplete."
)


@dataclasses.dataclass(frozen=True)
class Training:
    """The rows of one training, and of what was chosen for its bundle since.

    Attributes:
      salt: of these hashes, 32 hex digits.
      rows: by what they did, such as "train" or "dev_a", salted hashes, 12 hex digits each.
    """

    salt: str
    rows: Mapping[str, frozenset[str]]

    def salted(self, hashes: Iterable[str]) -> list[str]:
        """12 hex digits of the sha256 over the salt and each `row_hash`."""
        salted = (hashlib.sha256((self.salt + row).encode()) for row in hashes)
        return [one.hexdigest()[:12] for one in salted]

    def held(self, names: Iterable[str]) -> frozenset[str]:
        return frozenset().union(*(self.rows.get(name, ()) for name in names))


@dataclasses.dataclass(frozen=True)
class Ledger:
    """The rows of every training that the weights went through, the bundle's own last.

    Attributes:
      complete: whether all of them are known; False for weights that came without their rows.
    """

    trainings: tuple[Training, ...] = ()
    complete: bool = False

    def doubt(self, on_word: bool = False) -> str:
        """Put after a sentence on rows, where which of them fitted the bundle is not known."""
        return "" if self.complete else f" {ON_WORD if on_word else UNKNOWN}"

    def among(self, hashes: Iterable[str], names: Collection[str]) -> set[str]:
        """Those of the rows, by `row_hash`, that are recorded under one of the names."""
        rows, found = sorted(set(hashes)), set[str]()
        for training in self.trainings:
            held = training.held(names)
            if held:
                each = zip(rows, training.salted(rows), strict=True)
                found |= {row for row, salted in each if salted in held}
        return found

    def names(self) -> set[str]:
        """Under which rows are recorded."""
        return {name for training in self.trainings for name in training.rows}

    def behind(self, *, picked: Collection[str] = PICKED) -> "Ledger":
        """What a training that starts from these weights must know of them.

        Args:
          picked: names of rows that the new training may not report on besides those trained on.
        """
        return Ledger(
            tuple(
                Training(one.salt, {"train": one.held(TRAINED), "picked": one.held(picked)})
                for one in self.trainings
            ),
            self.complete,
        )

    def merged(self, other: "Ledger") -> "Ledger":
        """Both; a training that is in both, as of a bundle taught by itself, once."""
        found = {one.salt: one for one in self.trainings}
        for one in other.trainings:
            mine = found.get(one.salt, one)
            names = mine.rows.keys() | one.rows.keys()
            rows = {name: mine.held([name]) | one.held([name]) for name in names}
            found[one.salt] = Training(one.salt, rows)
        return Ledger(tuple(found.values()), self.complete and other.complete)

    def with_training(self, rows: Mapping[str, Collection[str]]) -> "Ledger":
        """With one more training, its rows by `row_hash` and by what they did."""
        content = {name: sorted(set(hashes)) for name, hashes in sorted(rows.items())}
        known = json.dumps([[one.salt for one in self.trainings], content])
        new = Training(hashlib.sha256(known.encode()).hexdigest()[:32], {})
        salted = {name: frozenset(new.salted(hashes)) for name, hashes in content.items()}
        return Ledger((*self.trainings, Training(new.salt, salted)), self.complete)

    def with_rows(
        self, name: str, hashes: Collection[str], *, free: Collection[str] = ()
    ) -> "Ledger":
        """With what rows were used for since the last training.

        Args:
          name: what for, such as "thresholds".
          hashes: of the rows, by `row_hash`.
          free: names whose former rows no longer have a part in the bundle.
        """
        if not self.trainings:  # weights without their rows
            return self.with_training({name: hashes})
        last = self.trainings[-1]
        rows = {kept: held for kept, held in last.rows.items() if kept not in free}
        rows[name] = rows.get(name, frozenset()).union(last.salted(hashes))
        return Ledger((*self.trainings[:-1], Training(last.salt, rows)), self.complete)

    def to_json(self) -> dict[str, Any]:
        return {
            "complete": self.complete,
            "trainings": [
                {"salt": one.salt, "rows": {n: sorted(one.rows[n]) for n in sorted(one.rows)}}
                for one in self.trainings
            ],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Ledger":
        """Reads what `to_json` gave, of its types at least.

        Raises:
          ValueError: where a salt or a hash is none.
        """
        trainings = []
        for one in values["trainings"]:
            rows = {name: frozenset(held) for name, held in one["rows"].items()}
            hashes = frozenset().union(*rows.values())
            digits = re.fullmatch("[0-9a-f]*", one["salt"] + "".join(hashes))
            if not digits or len(one["salt"]) != 32 or not all(len(row) == 12 for row in hashes):
                raise UserError("a salt has 32 hex digits, and a hash 12")
            trainings.append(Training(one["salt"], rows))
        return cls(tuple(trainings), values["complete"] is True)


def check_known(ledger: Ledger, rows_are_new: bool, what: str) -> None:
    """Raises ValueError for `what` on rows that may have trained the bundle for all one knows."""
    if not (ledger.complete or rows_are_new):
        raise UserError(
            f"{what} needs to know which rows trained this bundle, whose rows.json is missing or "
            f"incomplete: give --rows-are-new (rows_are_new=True) where none of these rows did."
        )


def promises_risk(provenance: dict[str, Any]) -> bool:
    """Whether a bundle's thresholds come with a promise: of a risk, or of a drop."""
    return bool({"risk", "delta"} & provenance.get("target", {}).get("target", {}).keys())
