"""Frozen, validated configurations, to and from JSON.

Field names of `BertConfig` are those of a Hugging Face `config.json`.
"""

import ast
import dataclasses
import difflib
import inspect
import itertools
import re
import types
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any, Literal, get_args, get_origin

from ejax.errors import UserError, shown

T = typing.TypeVar("T")
Dtype = Literal["float32", "bfloat16"]
Pooling = Literal["cls", "mean", "pair"]
Mix = Literal["softmax", "last"]
Parallel = Literal["pmap", "shard_map"]
Problem = Literal["single_label_classification", "multi_label_classification", "regression"]
# From 16 to 160 each is at most a quarter longer than the one before: 8 % added to real texts.
BUCKETS = (8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 256, 384, 512)
MOST_BUCKETS = 1 << 24  # of exit 0: a table of up to 2 GiB
LOW_RANK = 32  # of exit 0's table where there are more classes
RENAMED = {"evals_per_epoch": "evals"}  # fields of before 0.2
FEWEST_EPOCHS, MOST_EPOCHS = 2, 20  # where they follow from the rows
UNIONS = (types.UnionType, typing.Union)
Weights = tuple[float, ...] | Literal["balanced"]
Activation = Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"]


def _check(ok: bool, sentence: str) -> None:
    if not ok:
        raise UserError(sentence)


# The ranges of numbers, by the words of a sentence.
RANGES: dict[str, Callable[[float], bool]] = {
    "at least 1": lambda value: value >= 1,
    "0 or above": lambda value: value >= 0,
    "above 0": lambda value: value > 0,
    "in [0, 1)": lambda value: 0 <= value < 1,
}


def _check_ranges(config: Any, names_of: Mapping[str, Sequence[str]], before: str = "") -> None:
    """Every field lies in the range that it is named under."""
    for words, names in names_of.items():
        for name in names:
            value = getattr(config, name)
            _check(RANGES[words](value), f"{before}{name} must be {words}. Got {value}.")


def _check_types(config: Any) -> None:
    """Every field holds what its annotation says; a wrong one is named."""
    for field, hint in field_types(type(config)).items():
        value = getattr(config, field)
        if not _fits(value, hint):
            raise UserError(
                f"{type(config).__name__}.{field} must be {_describe(hint)}. Got {shown(value)}."
            )


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in args
    if origin in UNIONS:
        return any(_fits(value, arg) for arg in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, args[0]) for item in value)
    if hint is float:  # finite: JSON has no other
        return isinstance(value, float | int) and not isinstance(value, bool) and abs(value) < inf
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(arg) for arg in args)
    if origin is tuple:
        return f"a tuple of {_describe(args[0])}"
    if hint is float:
        return "a finite float"
    if origin in UNIONS:
        return " or ".join(map(_describe, args)).replace("one of ", "")
    return getattr(hint, "__name__", str(hint))


def field_sentences(cls: type) -> dict[str, str]:
    """The help of each field of a dataclass: the comment behind it."""
    comment = re.compile(r"^    (\w+): .*?  # (.+)$", re.MULTILINE)
    return dict(comment.findall(inspect.getsource(cls)))


def field_types(cls: type) -> dict[str, Any]:
    """The resolved annotation of every field of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Shape and numerics of a BERT encoder.

    `dtype` holds the operands of matrix products, `residual_dtype` the stream
    between layers; products always accumulate in float32, and softmax and layer
    norm are computed in float32. `dtype="float32"` is the exact path.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: Activation = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    dtype: Dtype = "bfloat16"
    residual_dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        _check_types(self)
        sizes = (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
            "intermediate_size", "max_position_embeddings", "type_vocab_size",
        )  # fmt: skip
        rates = ("hidden_dropout_prob", "attention_probs_dropout_prob")
        _check_ranges(self, {"at least 1": sizes, "in [0, 1)": rates}, "BertConfig.")
        _check(
            self.hidden_size % self.num_attention_heads == 0,
            f"BertConfig.hidden_size must be a multiple of num_attention_heads "
            f"({self.num_attention_heads}). Got {self.hidden_size}.",
        )
        eps = self.layer_norm_eps
        _check(0 < eps < 1, f"BertConfig.layer_norm_eps must be in (0, 1). Got {eps}.")

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclasses.dataclass(frozen=True)
class ExitConfig:
    """Where the classifier heads sit and what they read.

    Args:
      layers: ascending; the last one is the number of layers kept. 0 is before the first layer:
        a linear model on hashed n-grams of the tokens (`ejax.models.ngrams`).
      num_labels: classes C, at least 2; several labels at once, at least 1; of a score 1.
      pooling: "cls" reads the first token (the paper), "mean" the mean of the
        real tokens (trains faster in shallow exits of encoders whose [CLS] was
        not pretrained), "pair" the mean of each of two texts apart, their
        difference and their product.
      mix: "softmax" reads a learned mix of all layers up to the exit (the
        paper), "last" the exit's own layer alone.
    """

    layers: tuple[int, ...]
    num_labels: int
    pooling: Pooling = "mean"
    mix: Mix = "softmax"
    buckets: int = 1 << 18  # of exit 0's hashed n-grams, G
    problem_type: Problem = "single_label_classification"
    center: float = 0.0  # of a regression: the mean of the scores in training
    spread: float = 1.0  # and their standard deviation, above 0
    separator: tuple[int, ...] = ()  # of "pair": the tokens between the texts, if no type tells

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "separator", tuple(self.separator))
        _check_types(self)
        check_layers(self.layers)
        _check(
            0 < self.buckets <= MOST_BUCKETS and self.buckets & (self.buckets - 1) == 0,
            f"ExitConfig.buckets must be a power of two, at most 2^24. Got {self.buckets}.",
        )
        if self.problem_type == "single_label_classification":
            _check(
                self.num_labels >= 2,
                f"ExitConfig.num_labels must be at least 2: a classifier needs two classes. "
                f"Got {self.num_labels}.",
            )
        _check_ranges(self, {"at least 1": ("num_labels",)}, "ExitConfig.")
        if self.problem_type == "regression":
            _check(
                self.num_labels == 1 and not self.has_zero,
                f"a regression has one label, and no exit before the first layer. Got "
                f"{self.num_labels} labels and exits {self.layers}.",
            )
            _check_ranges(self, {"above 0": ("spread",)}, "ExitConfig.")

    @property
    def num_layers(self) -> int:
        """Encoder layers kept, L."""
        return self.layers[-1]

    @property
    def has_zero(self) -> bool:
        """Whether the first exit is exit 0."""
        return self.layers[0] == 0

    @property
    def encoder(self) -> "ExitConfig":
        """The exits after layers, without exit 0."""
        return dataclasses.replace(self, layers=self.layers[self.has_zero :])

    @property
    def pooled(self) -> int:
        """Vectors that are pooled of a row: of a pair one per text."""
        return 2 if self.pooling == "pair" else 1

    @property
    def read(self) -> int:
        """Vectors that a head reads of a row, see `ejax.models.heads.read`."""
        return 4 if self.pooling == "pair" else 1

    @property
    def rank(self) -> int:
        """Numbers per bucket of exit 0, R: one per class, or fewer where there are many."""
        return min(self.num_labels, LOW_RANK)


def check_layers(layers: tuple[int, ...], num_hidden_layers: int | None = None) -> None:
    """Raises ValueError unless exits are ascending layers of the encoder."""
    ascending = all(a < b for a, b in itertools.pairwise(layers))
    _check(
        len(layers) > 0 and layers[0] >= 0 and layers[-1] >= 1 and ascending,
        f"exit layers must be ascending, 0 or above, the last one at least 1, such as 0,1,2,4,6. "
        f"Got {shown(layers)}.",
    )
    if num_hidden_layers is not None:
        _check(
            layers[-1] <= num_hidden_layers,
            f"exit layers must be at most {num_hidden_layers}, the layers of this encoder. "
            f"Got {shown(layers)}.",
        )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Labelled text: a TFDS name, or local files, which win over the name.

    Local files are tsv, csv, jsonl or json, each also .gz, or parquet. The comment behind a field
    is its help.
    """

    name: str = ""  # a TFDS name, such as glue/sst2
    path: str = ""  # a folder with train.*, dev.* and test.*
    train: str = ""  # to learn from: tsv, csv or jsonl, each also .gz, parquet, or a folder of all
    dev: str = ""  # the file that picks the checkpoint and thresholds; "" = a part of train
    test: str = ""  # the file to report on, never fitted on
    unlabelled: str = ""  # a file of texts without labels to learn from too: tsv, csv, jsonl, txt
    text_columns: tuple[str, ...] = ()  # one, or two for pairs; () = recognised from the header
    label_column: str = ""  # "" = the usual: label, labels, category, class, intent, target, …
    problem_type: Problem = "single_label_classification"  # or several labels a row, or a number
    dev_fraction: float = 0.1  # of train, seeded, where there is no dev split
    limit: int = 0  # at most so many rows of each split; 0 = all
    max_length: int = 128  # tokens; longer texts are truncated
    buckets: tuple[int, ...] = BUCKETS  # lengths that rows are padded to: the smallest that fits
    cache_dir: str = ""  # copies of the data lie here; "" = the user's cache folder

    def __post_init__(self) -> None:
        _check_types(self)
        _check(
            self.max_length >= 4,
            f"data.max_length must be at least 4 tokens. Got {self.max_length}.",
        )
        _check(
            0 < self.dev_fraction < 1,
            f"data.dev_fraction must be between 0 and 1. Got {self.dev_fraction}.",
        )
        _check(self.limit >= 0, f"data.limit must be 0 (all) or above. Got {self.limit}.")
        _check(
            len(self.buckets) > 0 and tuple(sorted(set(self.buckets))) == self.buckets,
            f"data.buckets must be ascending lengths. Got {self.buckets}.",
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One fine-tuning run; `finetune(config, workdir)` is a function of it alone.

    The comment behind a field is its help.
    """

    model: str = ""  # a Hugging Face folder, hub id, or known name such as all-MiniLM-L6-v2
    data: DataConfig = DataConfig()
    layers: tuple[int, ...] = ()  # exits; () = after every layer
    pooling: Literal["auto", Pooling] = "auto"  # what exits read; auto = pair of pairs, else mean
    mix: Mix = "softmax"  # exits read a learned mix of the layers so far, or the last alone
    exit_weights: tuple[float, ...] = ()  # loss weight per exit; () = 1 each
    class_weights: Weights = ()  # of the loss; () = 1 each; balanced = N / (C x rows of the class)
    teacher: str = ""  # a bundle, from whose full depth all exits learn; "" = from the last exit
    distillation: float = 1.0  # loss weight of KL(teacher, or last exit || exit); 0 = none
    gradient_stop: float = 0.0  # share of an exit's gradient held back at each exit below it
    epochs: int = 0  # passes over train; 0 = chosen by the number of its rows
    patience: int = 4  # evaluations on dev-A since the best of the steps; 0 = never stop early
    batch_size: int = 32  # rows of a step, over all devices
    learning_rate: float = 1.5e-4  # the highest rate: it rises to this, then falls to 0
    head_learning_rate: float = 2e-4  # of the exits' heads
    warmup_fraction: float = 0.2  # share of the steps in which the rate rises
    weight_decay: float = 0.01  # of AdamW, on kernels and embeddings
    clip_norm: float = 1.0  # a gradient of a larger norm is scaled down to it
    dropout: float = 0.1  # share dropped, in the encoder and before each head
    train_embeddings: bool = False  # False: the embeddings stay as they are
    train_encoder: bool = True  # False: the exits' heads learn, on the encoder as it is
    average_decay: float = 0.0  # of a running mean of the weights, which is what is kept; 0 = none
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of products; auto = the fastest here
    residual_dtype: Dtype = "float32"  # of the stream between layers
    seed: int = 0  # draws the heads, the order of rows, dropout, and a dev part of train
    parallel: Parallel = "pmap"  # how several devices run a step; the numbers are the same
    accumulate: int = 1  # micro-batches per device and step: less memory, the same numbers
    remat: bool = False  # layers run again in the backward pass: less memory, more time
    evals: int = 8  # evaluations on dev-A, evenly over the training
    checkpoint_steps: int = 500  # steps between saves for resuming
    max_drop: float = 0.5  # points of dev-A accuracy the default thresholds may lose
    wandb_project: str = ""  # of Weights & Biases, which gets the metrics too; "" = none

    def __post_init__(self) -> None:
        _check_types(self)
        if self.layers:
            check_layers(self.layers)
        names_of = {
            "at least 1": ("batch_size", "accumulate", "evals", "checkpoint_steps"),
            "0 or above": ("epochs", "patience", "weight_decay", "max_drop", "distillation"),
            "above 0": ("learning_rate", "head_learning_rate", "clip_norm"),
            "in [0, 1)": ("warmup_fraction", "dropout", "average_decay"),
        }
        _check_ranges(self, names_of)
        _check(
            0 <= self.gradient_stop <= 1,
            f"gradient_stop must be between 0 (none is held back) and 1 (all). Got "
            f"{self.gradient_stop}.",
        )
        _check(0 <= self.seed < 2**32, f"seed must be 0 or above, below 2^32. Got {self.seed}.")
        for name in ("exit_weights", "class_weights"):
            value = getattr(self, name)
            _check(
                value in ((), "balanced") or (min(value) >= 0 and sum(value) > 0),
                f"{name} must be 0 or above and not all 0. Got {value}.",
            )

    @property
    def weights_of_classes(self) -> tuple[float, ...]:
        """`class_weights`, once they are numbers (`ejax.training.setup.with_weights`)."""
        assert self.class_weights != "balanced"
        return self.class_weights


def epochs_of(config: TrainConfig, rows: int) -> int:
    """Passes over train: as asked, or so many that few rows are seen often and many at least twice.

    >>> [epochs_of(TrainConfig(), rows) for rows in (500, 3_000, 10_000, 100_000)]
    [20, 7, 2, 2]
    """
    return config.epochs or min(max(-(-20_000 // rows), FEWEST_EPOCHS), MOST_EPOCHS)


def smoke(config: TrainConfig) -> TrainConfig:
    """The same run shrunk to about a minute: one short epoch on few, short rows."""
    data = dataclasses.replace(
        config.data,
        limit=min(config.data.limit or 256, 256),
        max_length=min(config.data.max_length, 64),
    )
    return dataclasses.replace(config, data=data, epochs=1, batch_size=16, evals=1)


def to_json(config: Any) -> dict[str, Any]:
    """A config as plain JSON types; tuples become lists."""
    return dataclasses.asdict(config)


def from_json(cls: type[T], values: Mapping[str, Any]) -> T:
    """The inverse of `to_json`; an unknown key is an error with the nearest name."""
    fields = field_types(cls)
    made: dict[str, Any] = {}
    for name, value in values.items():
        _check_known(name, fields, cls.__name__)
        hint = fields[name]
        if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
            value = from_json(typing.cast(type, hint), value)
        elif isinstance(value, list):  # JSON has no tuples
            value = tuple(value)
        made[name] = value
    return cls(**made)


def _check_known(name: str, fields: Mapping[str, Any], where: str) -> None:
    if name not in fields:
        near = difflib.get_close_matches(name, fields, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(fields)}."
        raise UserError(f"{where} has no field {name!r}.{hint}")


def override(config: T, assignments: typing.Sequence[str]) -> T:
    """Applies `field=value` strings, such as "data.path=my/folder" or "layers=1,2,4".

    Raises ValueError for an unknown field (naming the nearest) or a value that
    does not fit the field's type.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        _check(bool(equals), f"an override must look like field=value. Got {assignment!r}.")
        if new := RENAMED.get(path):
            warnings.warn(f"{path} is now {new}, and counts over the whole training.", stacklevel=2)
            path = new
        config = _set(config, path.split("."), text, path)
    return config


def _set(config: Any, path: list[str], text: str, full: str) -> Any:
    fields = field_types(type(config))
    _check_known(path[0], fields, type(config).__name__)
    hint = fields[path[0]]
    if dataclasses.is_dataclass(hint):
        _check(
            len(path) > 1,
            f"{full} is a group of fields: set one of them, such as "
            f"{full}.{dataclasses.fields(hint)[0].name}=value.",
        )
        value = _set(getattr(config, path[0]), path[1:], text, full)
    else:
        _check(len(path) == 1, f"{full}: {path[0]} is a value and has no field {path[-1]!r}.")
        value = _parse(text, hint, full)
    return dataclasses.replace(config, **{path[0]: value})


def _parse(text: str, hint: Any, where: str) -> Any:
    if get_origin(hint) in UNIONS:
        of_tuple, word = get_args(hint)
        hint = word if text.isalpha() else of_tuple
    if get_origin(hint) is tuple:
        text = text.strip()
        inner = text[1:-1] if text[:1] + text[-1:] in ("()", "[]") else text
        items = [_unquoted(item.strip()) for item in inner.split(",") if item.strip()]
        return tuple(_parse(item, get_args(hint)[0], where) for item in items)
    if hint is str or get_origin(hint) is Literal:
        value: Any = text
    else:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
    _check(_fits(value, hint), f"{where} must be {_describe(hint)}. Got {text!r}.")
    return value


def _unquoted(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text
