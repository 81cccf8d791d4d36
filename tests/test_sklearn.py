"""The estimator: by scikit-learn's own checks, with a stand-in for the training, and for real."""

import pickle
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import estimator_checks_generator
from sklearn.utils.validation import validate_data

import ejax.sklearn
from ejax.sklearn import EarlyExitTextClassifier, texts_of

MADE: list[dict] = []  # what the stand-in was trained with


class Standin:
    """A linear model on the numbers that texts spell."""

    def __init__(self, rows):
        names = [row["label"] for row in rows]
        self.model = LogisticRegression().fit(numbers([row["text"] for row in rows]), names)
        self.bundle = SimpleNamespace(labels=tuple(self.model.classes_))

    def predict_proba(self, texts, *, threshold):
        return self.model.predict_proba(numbers(texts))


def numbers(texts):
    return np.array([[float(word) for word in text.split()] for text in texts])


@pytest.fixture
def standin(monkeypatch):
    MADE.clear()

    def finetune(config, workdir, *, train, console):
        MADE.append({"config": config, "workdir": workdir, "train": train})
        return train

    monkeypatch.setattr(ejax.sklearn, "finetune", finetune)
    loaded = SimpleNamespace(from_pretrained=Standin)
    monkeypatch.setattr(ejax.sklearn, "EarlyExitClassifier", loaded)


class OfNumbers(EarlyExitTextClassifier):
    """Rows of numbers are written as texts: all those checks give numbers.

    What they ask of the numbers themselves, such as that NaN, complex and sparse ones are refused,
    has no meaning for texts, and `validate_data` answers it here.
    """

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.string, tags.input_tags.two_d_array = False, True
        return tags

    def _texts(self, X, *, reset=False):
        return [" ".join(map(repr, row)) for row in validate_data(self, X, reset=reset).tolist()]


NOT_HERE = {
    "check_array_api_input": "arrays of other libraries hold no texts",
    "check_classifier_data_not_an_array": "needs pandas, which the tests do without",
}


def test_the_checks_of_scikit_learn(standin) -> None:
    """All of them, but those that do not apply."""
    checked, failed = set(), {}
    for estimator, check in estimator_checks_generator(OfNumbers()):
        name = check.func.__name__
        if name in NOT_HERE:
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                check(estimator)
        except Exception as error:
            failed[name] = error
        checked.add(name)
    assert failed == {}
    assert {"check_estimators_pickle", "check_classifiers_train", "check_estimators_unfitted"} < (
        checked
    )


TEXTS, LABELS = [f"{i} {50 * (i % 2)}" for i in range(12)], [i % 2 for i in range(12)]


class Series:
    """As that of pandas."""

    def __init__(self, values):
        self.values = values

    def to_numpy(self):
        return np.array(self.values, object)


@pytest.mark.parametrize("form", [list, tuple, np.array, Series, lambda x: np.array(x)[:, None]])
def test_texts_in_any_form(form) -> None:
    assert texts_of(form(TEXTS)) == TEXTS


@pytest.mark.parametrize("form", [list, np.array, Series, lambda x: list(map(list, x))])
def test_pairs_in_any_form(form) -> None:
    pairs = [("a", "b"), ("c", "d"), ("e", "f")]
    assert texts_of(form(pairs)) == pairs


@pytest.mark.parametrize(
    ("X", "said"),
    [
        ("a text", "X must be a list, an array or a Series of texts. Got one str"),
        (7, "Got one int"),
        (["a", None], r"X\[1\] must be a text or a pair of texts. Got None"),
        ([("a", "b", "c")], r"X\[0\] must be a text or a pair of texts. Got \('a', 'b', 'c'\)"),
        (["a", ("a", "b")], r"X must hold texts alone, or pairs alone. X\[0\] and X\[1\] differ"),
    ],
)
def test_what_is_no_text(X, said) -> None:
    with pytest.raises(ValueError, match=said):
        texts_of(X)


@pytest.mark.parametrize(
    ("y", "said"),
    [
        (None, "the target y is None"),
        ([1] * 12, "y has one class, 1: a classifier needs two"),
        ([1, 2], "inconsistent numbers of samples"),
        ([0.5 + i for i in range(12)], "Unknown label type"),
        ([[1, 0]] * 12, "y should be a 1d array"),
    ],
)
def test_what_is_no_label(y, said) -> None:
    with pytest.raises(ValueError, match=said):
        EarlyExitTextClassifier().fit(TEXTS, y)


@pytest.mark.parametrize("labels", [(0, 1), (10, 9), ("b", "a"), (False, True), (1.0, 2.0)])
def test_labels_come_back_as_they_were(standin, labels) -> None:
    y = [labels[i] for i in LABELS]
    fitted = EarlyExitTextClassifier().fit(TEXTS, y)
    assert fitted.classes_.tolist() == sorted(labels)
    assert fitted.predict(TEXTS).tolist() == y
    assert type(fitted.predict(TEXTS).tolist()[0]) is type(y[0])
    probabilities = fitted.predict_proba(TEXTS)
    assert (probabilities[np.arange(12), fitted.classes_.searchsorted(y)] > 0.5).all()


def test_it_is_used_as_others_are(standin, tmp_path) -> None:
    cleaned = FunctionTransformer(lambda texts: [text.replace(",", "") for text in texts])
    piped = make_pipeline(cleaned, EarlyExitTextClassifier())
    texts = [text.replace(" ", ", ") for text in TEXTS]
    assert cross_val_score(piped, texts, LABELS, cv=2).tolist() == [1.0, 1.0]
    grid = {"threshold": [0.5, 2.0], "epochs": np.array([1, 2])}
    search = GridSearchCV(EarlyExitTextClassifier(workdir=tmp_path), grid, cv=2, refit=False)
    MADE.clear()
    search.fit(TEXTS, LABELS)
    assert [made["config"].epochs for made in MADE] == [1, 1, 1, 1, 2, 2, 2, 2]
    # Those that differ in threshold alone share a workdir, where the second resumes.
    assert [made["workdir"].parent for made in MADE] == [tmp_path] * 8
    assert len({made["workdir"] for made in MADE}) == 4


def test_settings_reach_the_training(standin) -> None:
    estimator = EarlyExitTextClassifier(
        layers=[1, 3], max_length=16, seed=7, settings=("batch_size=9", "data.dev_fraction=0.2")
    )
    clone(estimator).fit(TEXTS, LABELS)
    config = MADE[-1]["config"]
    assert (config.layers, config.data.max_length, config.seed) == ((1, 3), 16, 7)
    assert (config.batch_size, config.data.dev_fraction) == (9, 0.2)
    with pytest.raises(ValueError, match="Did you mean 'batch_size'"):
        clone(estimator).set_params(settings=["batchsize=9"]).fit(TEXTS, LABELS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:exit .*:UserWarning")  # its dev is small
def test_a_training(tmp_path, monkeypatch) -> None:
    """For real: it learns, resumes, is pickled, and leaves no copy of the rows."""
    monkeypatch.setenv("EJAX_CACHE", str(tmp_path / "cache"))
    settings = [field for field in tiny.FIELDS if not field.startswith(("epochs", "learning_"))]
    settings.append("data.dev_fraction=0.3")
    labels, texts = zip(*tiny.rows(120, 3, wrong=9), strict=True)
    y = np.array([sorted(tiny.CLASSES).index(label) for label in labels])
    estimator = EarlyExitTextClassifier(
        tiny.model(),
        layers=(1, 3),
        epochs=12,
        learning_rate=0.003,
        max_length=16,
        settings=settings,
        workdir=tmp_path / "runs",
    ).fit(texts, y)
    new_labels, new_texts = zip(*tiny.rows(40, 4), strict=True)
    new = [sorted(tiny.CLASSES).index(label) for label in new_labels]
    assert estimator.score(new_texts, new) > 0.8  # by chance 0.5
    again = pickle.loads(pickle.dumps(estimator))
    np.testing.assert_array_equal(
        again.predict_proba(new_texts), estimator.predict_proba(new_texts)
    )
    deep = again.set_params(threshold=2.0).predict_proba(new_texts)
    assert not np.array_equal(deep, estimator.predict_proba(new_texts))  # others left early
    resumed = clone(estimator).fit(texts, y)
    np.testing.assert_array_equal(
        resumed.predict_proba(new_texts), estimator.predict_proba(new_texts)
    )
    assert len(list((tmp_path / "runs").iterdir())) == 1
    assert not (tmp_path / "cache" / "data").exists()
