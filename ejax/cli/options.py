"""What commands share: options, and checks of what they say."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import typer
from typer.core import TyperCommand

from ejax import storage
from ejax.cli.run import note
from ejax.config import UNIONS, TrainConfig, field_sentences, field_types
from ejax.errors import UserError
from ejax.storage import path_of

FULL = 2.0  # above every score


def optional(help: str, *names: str, parser: Any = None) -> Any:
    """An option whose default the help does not show: its sentence says what is then done."""
    return typer.Option(*names, help=help, parser=parser, show_default=False)


Bundle = Annotated[
    str,
    typer.Argument(
        help="A folder that `ejax train` wrote, or a bundle's hub id, user/name.", metavar="BUNDLE"
    ),
]
ChangedBundle = Annotated[
    Path, typer.Argument(help="A folder that `ejax train` wrote.", metavar="BUNDLE", parser=path_of)
]
Data = Annotated[
    str, typer.Option(help="A file, a folder with train, dev and test files, or a TFDS name.")
]
TextColumns = Annotated[
    list[str] | None, optional("Column of the text; twice for pairs.", "--text-column")
]
Beside = Annotated[
    list[Path] | None,
    optional("Another bundle for the same labels, at full depth; repeatable.", parser=path_of),
]
Train = Annotated[
    str,
    optional(
        "Training rows: two linear models of scikit-learn are fitted to them and compared.",
        "--train",
    ),
]
Encoder = Annotated[
    str, optional("With --train: the pretrained encoder; else the one the bundle came from.")
]
RowsAreNew = Annotated[
    bool,
    typer.Option(
        "--rows-are-new",
        help="Where the bundle's rows.json is missing or incomplete: none of these rows trained "
        "or fitted it.",
    ),
]
Split = Annotated[str, typer.Option(help="train, dev or test.")]
NewSplit = Annotated[str, typer.Option(help="dev or test.")]
Repeats = Annotated[int, typer.Option(help="Timed passes; the median counts.", min=1)]
Changed = Annotated[
    Path | None, optional("A new bundle; else in place.", "--output", parser=path_of)
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="field=value …", help="Overrides.")]
LabelColumn = Annotated[
    str, optional("Column of the labels; else that of the training, or a usual name.")
]


class Field(NamedTuple):
    """A field of TrainConfig as `ejax train --help` shows it."""

    kind: str
    default: str
    sentence: str


def _fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Field]]:
    sentences = field_sentences(type(config))
    for name, hint in field_types(type(config)).items():
        value, kinds = getattr(config, name), get_args(hint)
        if get_origin(hint) in UNIONS:  # such as of numbers, or a word
            kinds = get_args(kinds[0])
        if dataclasses.is_dataclass(hint):
            yield from _fields(value, f"{prefix}{name}.")
            continue
        if get_origin(hint) is Literal:
            kind = "|".join(kinds)
        else:
            kind = f"{kinds[0].__name__},…" if kinds else hint.__name__
        default = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        sentence = sentences.get(name, "").replace("() =", "empty =").replace('"" =', "empty =")
        yield prefix + name, Field(kind, default, sentence)


FIELDS = dict(_fields(TrainConfig()))


def setting(name: str) -> Any:
    """An option that sets this field of TrainConfig; its help is that of the field."""
    kind, default, sentence = FIELDS[name]
    return typer.Option(
        f"--{name.rpartition('.')[2].replace('_', '-')}",
        help=f"{sentence[:1].upper()}{sentence[1:]}.",
        metavar=kind,
        show_default=default or False,
    )


class ListsFields(TyperCommand):
    """A command whose help ends with what may be set by field=value."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from rich.console import Console
        from rich.table import Table

        super().format_help(ctx, formatter)
        table = Table("field=default", "type", "", title="Fields", title_justify="left", box=None)
        table.columns[0].overflow = "fold"
        table.columns[0].max_width = 30
        for name, field in FIELDS.items():
            table.add_row(f"{name}={field.default}", field.kind, field.sentence)
        Console(markup=False).print(table)


def parse_threshold(text: str) -> float:
    """A number of at least 0, or "full"; above 1 is full depth."""
    try:
        value = FULL if text.strip() == "full" else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UserError(
            f"a threshold must be a number of at least 0, or full for full depth. Got {text!r}."
        )
    return value


def parse_top_k(text: str) -> int | None:
    """A positive number, or None for "all"."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--top-k must be a positive number or all. Got {text!r}.")
    return int(text)


def check_split(split: str) -> None:
    if split == "train":
        raise UserError("--split must be dev or test: confidences on trained rows are too high.")


def check_json(output: Path) -> None:
    check_output_file(output, ".json")


def check_output_file(output: Path, suffix: str) -> None:
    """Before the work: whether the result can be written."""
    path_of(output)  # not on gs://
    if output.suffix != suffix:
        raise UserError(f"--output must end in {suffix}. Got {output}.")
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise UserError(f"--output must be a file in a folder that exists. Got {output}.")
    probe = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}.") from error


def name_of(bundle: str) -> str:
    """The folder's own name, of "." too."""
    return path_of(bundle).name if storage.is_remote(bundle) else Path(bundle).resolve().name


def load_beside(paths: Sequence[Path], profile: str | None = "auto") -> dict[str, Any]:
    """Other bundles by name; of those called alike, with the folder they lie in.

    Args:
      profile: as of `EarlyExitClassifier.from_pretrained`.

    Raises:
      ValueError: where a bundle is given twice.
    """
    from ejax.classifier import EarlyExitClassifier

    found: dict[str, Any] = {}
    paths = [path if storage.is_remote(path) else path.resolve() for path in paths]
    for path in paths:
        alike = sum(path.name == other.name for other in paths) > 1
        name = f"{path.parent.name}/{path.name}" if alike else path.name
        if name in found:
            raise UserError(f"--beside {name} is given twice.")
        found[name] = EarlyExitClassifier.from_pretrained(path, profile=profile)
    return found


def rows_of(clf: Any, data: str, split: str, text: list[str] | None, label: str) -> Any:
    """Labelled rows for the classifier's bundle, by the options of a command."""
    from ejax.evaluation.labelled import labelled_rows

    return labelled_rows(clf.bundle, data, split, text_columns=text or (), label_column=label)


def train_rows_of(
    clf: Any, train: str, encoder: str, text: list[str] | None, label: str
) -> list[Any]:
    """Those that --train names, for linear models; none without it."""
    if encoder and not train:
        raise UserError("--encoder needs --train, the rows to fit a linear model to.")
    return list(rows_of(clf, train, "train", text, label)) if train else []


def count_fitted(bundles: list[Any], hashes: list[str]) -> int:
    """How many of the rows fitted one of the bundles or its thresholds; says so."""
    from ejax.provenance import CHOSEN, UNKNOWN

    ledgers = [bundle.ledger for bundle in bundles]
    if not all(ledger.complete for ledger in ledgers):
        note(UNKNOWN)
    fitted = set[str]().union(*(ledger.among(hashes, CHOSEN) for ledger in ledgers))
    seen = sum(name in fitted for name in hashes)
    if seen:
        note(
            f"{seen} of these rows also fitted {'a' if bundles[1:] else 'this'} bundle or its "
            f"thresholds: figures may flatter it."
        )
    return seen
