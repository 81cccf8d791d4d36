"""The estimator of scikit-learn: texts and labels in, labels out."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import assert_all_finite, check_consistent_length, check_is_fitted

from ejax import storage
from ejax.classifier import EarlyExitClassifier
from ejax.config import DataConfig, TrainConfig, override, to_json
from ejax.data.frames import Table
from ejax.data.tokenizer import Text
from ejax.errors import UserError, shown
from ejax.training.finetune import finetune


class EarlyExitTextClassifier(ClassifierMixin, BaseEstimator):
    """Fine-tunes a BERT with exits, calibrates it, and labels texts.

    X is a list, an array or a Series of texts, or of pairs of texts; an array or a DataFrame may
    have one column, or two for pairs. y is what a classifier of scikit-learn takes. Part of the
    rows is held out as dev: `dev_fraction` in settings.

    >>> from sklearn.model_selection import cross_val_score
    >>> cross_val_score(EarlyExitTextClassifier(seed=1), texts, labels)  # doctest: +SKIP

    Args:
      model, layers, epochs, learning_rate, max_length, seed: as in `TrainConfig`.
      threshold: of predictions: a number, or one per exit; None means the bundle's own. It may be
        set after the training.
      settings: other fields of `TrainConfig`, such as ("batch_size=16", "data.dev_fraction=0.2").
      workdir: keeps the checkpoints and the bundle of each fit in a folder of its own, where the
        same fit resumes; None keeps none.
      verbose: whether a training shows how far it is.

    Attributes:
      classes_: the labels, sorted.
      classifier_: the `EarlyExitClassifier`, which can be saved.
      n_features_in_: 1 for texts, 2 for pairs.
    """

    def __init__(
        self,
        model: str | Path = "all-MiniLM-L6-v2",
        *,
        layers: Sequence[int] = (),
        epochs: int = TrainConfig.epochs,
        learning_rate: float = TrainConfig.learning_rate,
        max_length: int = DataConfig.max_length,
        seed: int = TrainConfig.seed,
        threshold: Any = None,
        settings: Sequence[str] = (),
        workdir: str | Path | None = None,
        verbose: bool = False,
    ) -> None:
        self.model = model
        self.layers = layers
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.max_length = max_length
        self.seed = seed
        self.threshold = threshold
        self.settings = settings
        self.workdir = workdir
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.two_d_array = False
        return tags

    def fit(self, X: Any, y: Any) -> "EarlyExitTextClassifier":
        """Trains on texts X [N] and labels y [N].

        Raises:
          ValueError: on bad data or settings.
        """
        texts = self._texts(X, reset=True)
        names, classes = _labels(texts, y)
        rows = [_row(text) | {"label": name} for text, name in zip(texts, names, strict=True)]
        config = self._config()
        with storage.temporary_folder() as scratch:
            workdir = scratch / "work"
            if self.workdir is not None:
                content = json.dumps(to_json(config)) + Table("", rows).digest()
                digest = hashlib.sha256(content.encode()).hexdigest()
                workdir = storage.path_of(self.workdir) / digest[:12]
            data = dataclasses.replace(config.data, cache_dir=str(scratch / "data"))
            folder = finetune(
                dataclasses.replace(config, data=data), workdir, train=rows,
                console=Console(stderr=True, quiet=not self.verbose),
            )  # fmt: skip
            self.classifier_ = EarlyExitClassifier.from_pretrained(folder)
        self.classes_ = classes
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The label of each text, of the type that y had: [N]."""
        likeliest = self.predict_proba(X).argmax(axis=1)
        return np.asarray(self.classes_[likeliest])

    def predict_proba(self, X: Any) -> np.ndarray:
        """Calibrated probabilities float32 [N, C], in the order of `classes_`."""
        check_is_fitted(self)
        found = self.classifier_.predict_proba(self._texts(X), threshold=self.threshold)
        names = self.classifier_.bundle.labels
        return found[:, [names.index(str(label)) for label in self.classes_.tolist()]]

    def _texts(self, X: Any, *, reset: bool = False) -> list[Text]:
        """The texts; with `reset` how many a row has is noted."""
        texts = texts_of(X)
        if reset:
            self.n_features_in_ = 2 if texts and isinstance(texts[0], tuple) else 1
        return texts

    def _config(self) -> TrainConfig:
        """Numbers may be numpy's, as a random search draws them."""
        named = {
            name: getattr(self, name) for name in ("epochs", "learning_rate", "max_length", "seed")
        }
        plain = {n: v.item() if isinstance(v, np.generic) else v for n, v in named.items()}
        data = DataConfig(max_length=plain.pop("max_length"))
        layers = tuple(np.asarray(self.layers).tolist())
        config = TrainConfig(model=str(self.model), layers=layers, data=data, **plain)
        return override(
            config, [self.settings] if isinstance(self.settings, str) else self.settings
        )


def texts_of(X: Any) -> list[Text]:
    """The texts of a list, an array, a Series or a DataFrame; of two columns pairs.

    Raises:
      ValueError: naming what is no text.
    """
    if hasattr(X, "to_numpy"):  # pandas, polars
        X = X.to_numpy()
    elif hasattr(X, "__array__"):
        X = np.asarray(X)
    one = isinstance(X, str | bytes | Mapping) or getattr(X, "ndim", 1) == 0
    if one or not isinstance(X, Iterable):
        kind = type(X).__name__
        raise UserError(f"X must be a list, an array or a Series of texts. Got one {kind}.")
    texts = [_text(item, i) for i, item in enumerate(X)]
    for i, text in enumerate(texts):
        if isinstance(text, str) != isinstance(texts[0], str):
            raise UserError(f"X must hold texts alone, or pairs alone. X[0] and X[{i}] differ.")
    return texts


def _text(item: Any, i: int) -> Text:
    parts = [item] if isinstance(item, str) else item
    if isinstance(parts, tuple | list | np.ndarray):
        texts = [str(part) for part in parts if isinstance(part, str)]
        if len(texts) == len(parts) in (1, 2):
            return texts[0] if len(texts) == 1 else (texts[0], texts[1])
    raise UserError(f"X[{i}] must be a text or a pair of texts. Got {shown(item)}.")


def _row(text: Text) -> dict[str, str]:
    if isinstance(text, str):
        return {"text": text}
    return {"text_a": text[0], "text_b": text[1]}


def _labels(texts: Sequence[Text], y: Any) -> tuple[list[str], np.ndarray]:
    """The name of each label, and the labels, sorted.

    Raises:
      ValueError: as classifiers of scikit-learn do.
    """
    if y is None:
        raise UserError("fit requires y to be passed, but the target y is None: give the labels.")
    y = column_or_1d(y, warn=True)
    check_consistent_length(texts, y)
    if not len(y):
        raise UserError("X holds no text: give texts and their labels.")
    assert_all_finite(y, input_name="y")
    check_classification_targets(y)
    classes = np.unique(y)
    if len(classes) < 2:
        raise UserError(f"y has one class, {shown(classes.tolist()[0])}: a classifier needs two.")
    return [str(label) for label in y.tolist()], classes
