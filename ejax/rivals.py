"""What anyone would try first: two linear models of scikit-learn, fitted to labelled rows.

One reads TF-IDF of words and word pairs, the other the mean vectors of the pretrained encoder,
which stays as it came. Of a pair it reads the two texts, encoded apart, as `heads.compared` has
them. A fine-tuned model that is not better than these is not needed.

Axes: N rows, E exits, D width, C classes.
"""

import dataclasses
import itertools
import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit

from ejax import assets
from ejax.bundle import Bundle
from ejax.calibration.decisions import decide
from ejax.calibration.metrics import lost_points, paired_interval
from ejax.config import BertConfig, ExitConfig
from ejax.data.batches import bucket_of, pad
from ejax.data.rows import label_array
from ejax.data.sources import Example, row_hash
from ejax.data.tokenizer import Encoded, Text, Tokenizer, load_tokenizer
from ejax.errors import UserError
from ejax.inference.shapes import padded
from ejax.models.early_exit import EarlyExitBert
from ejax.models.heads import compared
from ejax.models.weights import load_bert
from ejax.tasks import Regression, Task
from ejax.timing import with_seconds

TFIDF, FROZEN = "TF-IDF, linear", "frozen encoder, linear"
MOST_ROWS = 10_000  # that a rival is fitted to
# C, scikit-learn's inverse strength of the penalty, chosen on dev rows of trec6 (500 and all
# training rows) and clinc150 (10,000). For TF-IDF one C is within 0.6 points of the best there and
# on ag_news, 1.5 on sst2 (3,000 rows each). For vectors the best one moves with rows and classes,
# so folds choose it.
TFIDF_C, VECTOR_C = (30.0,), (0.003, 0.01, 0.1)
PAIR_C = (0.0001, 0.0003, 0.001)  # of four vectors; around the best on snli, the rival's favour
FOLDS = 3
MOST_WEIGHTS = 5_000_000  # of TF-IDF, over all classes: its solver holds some twenty copies
TILE_TOKENS = 1024  # of a batch: as fast as full depth runs on a CPU, and 1.4 times as 4096
WIDE = (16, 32, 64, 128, 256)  # padded lengths where compiling costs more than padding
WORD = re.compile(r"\w+")


@dataclasses.dataclass(frozen=True)
class Rival:
    """A fitted one."""

    name: str
    features: Callable[[Any], Any]  # texts, or their tokens -> what `model` reads, [N, ...]
    model: Any  # of scikit-learn
    task: Task
    encoder: str  # whose vectors it reads, or ""
    layers: int  # of that
    c: float
    fitted_rows: int
    fit_seconds: float  # from text
    decisions: Any = 0.5  # probabilities from which on each of several labels is answered, [C]

    def scores(self, texts: Any) -> np.ndarray:
        """Log-probabilities float32 [N, C]; -inf of a label that no row it was fitted to had.

        Of several labels at once their log-odds, of a regression the numbers, [N, 1].
        """
        features = self.features(texts)
        if self.task.answer_ndim == 2:
            return np.asarray(self.model.decision_function(features), np.float32)
        if self.task.metric != "accuracy":
            return np.asarray(self.model.predict(features), np.float32)[:, None]
        found = np.full((len(texts), self.task.labels), -np.inf, np.float32)
        found[:, self.model.classes_] = self.model.predict_log_proba(features)
        return found

    def answers(self, scores: np.ndarray) -> np.ndarray:
        """As `Task.answers` has them, from `scores`."""
        if self.task.answer_ndim == 2:
            return np.asarray(expit(scores) >= self.decisions)
        return scores.argmax(axis=1) if self.task.metric == "accuracy" else scores[:, 0]

    def facts(self) -> dict[str, Any]:
        """Ready for JSON."""
        names = ("name", "encoder", "layers", "c", "fitted_rows", "fit_seconds")
        return {name: getattr(self, name) for name in names}


def fit_rivals(
    bundle: Bundle,
    rows: Sequence[Example],
    reported: set[str],
    *,
    encoder: str = "",
    dev: Sequence[Example] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[list[Rival], list[str]]:
    """Both rivals on at most 10,000 of the rows, drawn by a fixed seed.

    Args:
      rows: of training, their labels the bundle's; where there are none, there are no rivals.
      dev: other rows, on which decision thresholds for several labels are chosen, as a bundle's
        are; without any they are 0.5.
      reported: hashes of rows that accuracy is told of; they are left out.
      encoder: of the second rival; "" means what the bundle was trained from, where that can be
        had.

    Returns:
      The rivals, and sentences on what was left out.

    Raises:
      ValueError: where the rows left have fewer than two labels, or `encoder` cannot be loaded.
    """
    if not rows:
        return [], []
    kept = [row for row in rows if row_hash(row) not in reported]
    notes = []
    if len(kept) < len(rows):
        notes.append(
            f"{len(rows) - len(kept)} training rows are also reported on: the rivals are not "
            f"fitted to them."
        )
    task = bundle.task
    if len({row.label for row in kept}) < 2:
        raise UserError(
            f"the rivals need training rows of two labels or more that are not reported on. Got "
            f"{len(kept)} rows."
        )
    drawn = draw(len(kept))
    if len(drawn) < len(kept):
        notes.append(f"The rivals are fitted to {len(drawn):,} of {len(kept):,} rows, drawn.")
    texts = [kept[i].inputs for i in drawn]
    labels = label_array([kept[i] for i in drawn], task.problem_type, task.labels)
    progress(f"fitting {TFIDF}")
    rivals = [fit_tfidf(texts, labels, task)]
    progress(f"fitting {FROZEN}")
    try:
        rivals.append(fit_frozen(texts, labels, bundle, encoder))
    except ValueError as error:
        if encoder:
            raise
        why = str(error).rstrip(".")
        notes.append(f"Left out: {FROZEN} ({why}); --encoder names one that can be loaded.")
    if task.answer_ndim == 2 and dev:
        true = label_array(dev, task.problem_type, task.labels) > 0
        rivals = [
            dataclasses.replace(
                rival, decisions=decide(expit(rival.scores([row.inputs for row in dev])), true)
            )
            for rival in rivals
        ]
    return rivals, notes


def draw(total: int) -> np.ndarray:
    """The rows that a rival is fitted to: all, or `MOST_ROWS` drawn by a fixed seed, ascending."""
    return np.sort(np.random.default_rng(0).permutation(total)[:MOST_ROWS])


def fit_tfidf(texts: Sequence[Text], labels: np.ndarray, task: Task) -> Rival:
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(
        analyzer=terms,
        sublinear_tf=True,
        min_df=2,
        max_features=MOST_WEIGHTS // task.labels,
        dtype=np.float32,
    )
    (model, c), seconds = with_seconds(
        lambda: regression(vectorizer.fit_transform(texts), labels, TFIDF_C, task, scaled=False)
    )
    return Rival(TFIDF, vectorizer.transform, model, task, "", 0, c, len(texts), seconds)


def fit_frozen(
    texts: Sequence[Text], labels: np.ndarray, bundle: Bundle, encoder: str = ""
) -> Rival:
    """The texts are cut as the bundle cuts them.

    Args:
      encoder: "" means what the bundle was trained from.

    Raises:
      ValueError: where the encoder cannot be had.
    """
    name = encoder or bundle.provenance.get("model", "")
    folder = assets.resolve(name)
    cfg, bert = load_bert(folder, dtype=bundle.cfg.dtype, residual_dtype=bundle.cfg.residual_dtype)
    for field in ("hidden_size", "vocab_size"):
        ours, its = getattr(bundle.cfg, field), getattr(cfg, field)
        if not encoder and ours != its:  # a folder's name that is also one on the hub
            raise UserError(f"{name} has {field} {its}, and this bundle {ours}.")
    tokenizer = load_tokenizer(folder)
    max_length = min(bundle.max_length, cfg.max_position_embeddings)
    pairs = not isinstance(texts[0], str)
    of_tokens = vectors_of_texts(
        mean_vectors(cfg, bert, max_length, bundle.buckets), tokenizer, pairs=pairs
    )

    def vectors(texts: Sequence[Text]) -> np.ndarray:
        return of_tokens(tokenizer.encode(texts, max_length))

    ladder = PAIR_C if pairs else VECTOR_C
    (model, c), seconds = with_seconds(
        lambda: regression(vectors(texts), labels, ladder, bundle.task)
    )
    return Rival(
        FROZEN, vectors, model, bundle.task, name, cfg.num_hidden_layers, c, len(texts),
        seconds,
    )  # fmt: skip


def terms(text: Text) -> list[str]:
    """Words and pairs of neighbouring words; those of a second text are marked.

    "" stands in every text, so that some feature is left whatever the texts are.

    >>> terms(("Was it good?", "Bad"))
    ['', 'was', 'it', 'good', 'was it', 'it good', '\\tbad']
    """
    found = [""]
    for mark, part in zip(("", "\t"), (text,) if isinstance(text, str) else text, strict=False):
        words = WORD.findall(unicodedata.normalize("NFKC", part).lower())
        pairs = map(" ".join, itertools.pairwise(words))
        found += [mark + term for term in (*words, *pairs)]
    return found


def regression(
    features: Any,
    labels: np.ndarray,
    ladder: Sequence[float],
    task: Task | None = None,
    *,
    scaled: bool = True,
    dev: tuple[Any, np.ndarray] | None = None,
) -> tuple[Any, float]:
    """Logistic regression, and its C, which is right most often on `dev`, or across folds.

    Of a regression ridge regression, whose penalty is 1 / C. Of several labels one against the
    rest, with the middle C.

    Args:
      features: [N, ...]; with `scaled` each is brought to mean 0 and variance 1.
      ladder: values of C; of few rows, or without others to try them on, the middle one is taken.
      dev: features and labels of other rows.
    """
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    several = task is not None and task.answer_ndim == 2
    single = task is None or task.metric == "accuracy"

    def fitted(c: float) -> Any:
        model: Any = LogisticRegression(C=c, max_iter=1000)
        if several:
            model = OneVsRestClassifier(LogisticRegression(C=c, solver="liblinear"))
        elif not single:
            model = Ridge(alpha=1 / c if scaled else 1.0)
        return make_pipeline(*[StandardScaler()] * scaled, model)

    choices: list[Any] = [fitted(c) for c in ladder]
    # Products this small are sooner done by one thread: two that wait for a busy core took 30
    # times as long.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a label with fewer rows than folds
        if dev is not None:
            scores = [one.fit(features, labels).score(*dev) for one in choices]
            best = int(np.argmax(scores))
            return choices[best], ladder[best]
        middle = len(ladder) // 2
        rows = np.sort(np.bincount(labels))[-2] if single else len(labels)
        if len(ladder) == 1 or several or not scaled or rows < FOLDS:
            return choices[middle].fit(features, labels), ladder[middle]
        setting = {"logisticregression__C": ladder}
        if not single:
            setting = {"ridge__alpha": tuple(1 / c for c in ladder)}
        folds = (StratifiedKFold if single else KFold)(FOLDS, shuffle=True, random_state=0)
        search = GridSearchCV(fitted(1.0), setting, cv=folds)
        search.fit(features, labels)
        (best,) = search.best_params_.values()
        return search.best_estimator_, best if single else 1 / best


def mean_vectors(
    cfg: BertConfig, bert: Any, max_length: int, buckets: Sequence[int]
) -> Callable[[Encoded], np.ndarray]:
    """The mean of the last layer's real tokens, as a function of tokens: float32 [N, D]."""
    exits = ExitConfig((cfg.num_hidden_layers,), 2, "mean", "last")
    mix = np.zeros((1, cfg.num_hidden_layers), np.float32)
    params = {"bert": bert, "heads": {"mix": mix}}
    run = make_mixes(EarlyExitBert(cfg, exits), {"params": params}, max_length, buckets)
    return lambda encoded: run(encoded)[:, 0]


def vectors_of_texts(
    mean: Callable[[Encoded], np.ndarray], tokenizer: Tokenizer, *, pairs: bool
) -> Callable[[Encoded], np.ndarray]:
    """What the linear model reads, as a function of tokens: float32 [N, D], of pairs [N, 4 D].

    Args:
      mean: the mean vectors of tokens, float32 [N, D].
    """
    if not pairs:
        return mean

    def of_pairs(encoded: Encoded) -> np.ndarray:
        return np.asarray(compared(*map(mean, tokenizer.apart(encoded))))

    return of_pairs


def make_mixes(
    model: EarlyExitBert, variables: Any, max_length: int, buckets: Sequence[int]
) -> Callable[[Encoded], np.ndarray]:
    """What the heads read, as a function of tokens: float32 [N, E, D].

    On one device, and without a word to other processes.
    """

    def ready(path: Any, leaf: Any) -> jax.Array:
        return jnp.asarray(leaf, model.cfg.dtype if path[-1].key == "kernel" else None)

    variables = jax.tree_util.tree_map_with_path(ready, variables)
    forward = jax.jit(partial(model.apply, method="mixes"))

    def run(encoded: Encoded) -> np.ndarray:
        padded_lengths = bucket_of(encoded.lengths, buckets, max_length)
        running = []
        for length in np.unique(padded_lengths).tolist():
            rows = np.flatnonzero(padded_lengths == length)
            most = max(8, TILE_TOKENS // length)
            size = next(size for size in (1, 8, most) if size >= min(len(rows), most))
            for start in range(0, len(rows), size):
                together = rows[start : start + size]
                batch = pad(encoded, padded(together, size), length)
                running.append((together, forward(variables, batch)))
        mixes = np.zeros((len(encoded), *running[0][1].shape[1:]), np.float32)
        for together, mixes_of_batch in running:
            mixes[together] = np.asarray(mixes_of_batch)[: len(together)]
        return mixes

    return run


def enough(full: np.ndarray, rivals: dict[str, np.ndarray]) -> str:
    """A sentence where a linear model does as well as full depth, of the first that does; or "".

    Args:
      full: bool [N], the rows that full depth is right on.
      rivals: the same by name.
    """
    for name, right in rivals.items():
        _, low, high = paired_interval(full, right)
        if low > 0:
            continue
        what = "a linear model" if name == TFIDF else "a linear model on the frozen encoder"
        name = {TFIDF: "TF-IDF", FROZEN: "The frozen encoder"}[name]
        said = (
            f"{name} with logistic regression is right on {right.mean():.3f} of these rows, full "
            f"depth on {full.mean():.3f}"
        )
        if right.mean() >= full.mean():
            return f"{said}: {what} is enough here."
        return (
            f"{said} (95 % interval of the difference: {low:.1f} to {high:.1f} points): {what} "
            f"may be enough here."
        )
    return ""


def below_rival(
    train: Encoded,
    labels: np.ndarray,
    held_out: Encoded,
    truth: np.ndarray,
    answers: np.ndarray,
    task: Task,
    *,
    cfg: BertConfig,
    bert: Any,
    tokenizer: Tokenizer,
    pairs: bool,
    max_length: int,
) -> str:
    """A warning where full depth does worse than a linear model on the frozen encoder.

    One forward pass over at most 10,000 training rows and the rows held out, and fits of seconds.
    Several labels are decided by thresholds fitted to the rows held out, as those of full depth.

    Args:
      train: tokens of training rows; `labels`: [their number, ...].
      held_out: tokens of other rows; `truth`: their labels, [N, ...].
      answers: of full depth to them, [N, ...].
      cfg, bert, tokenizer: the pretrained encoder, all of its layers.
      pairs: whether rows are pairs of texts.
      max_length: the most tokens of a row.

    Returns:
      A sentence, or "" where the paired 95 % interval holds 0 or full depth is better.
    """
    rows = draw(len(labels))
    labels = labels[rows]
    if len(np.unique(labels, axis=0)) < 2:
        return ""
    mean = mean_vectors(cfg, bert, max_length, WIDE)
    vectors = vectors_of_texts(mean, tokenizer, pairs=pairs)
    ladder = PAIR_C if pairs else VECTOR_C
    model, c = regression(vectors(train.subset(rows)), labels, ladder, task)
    rival = Rival(FROZEN, vectors, model, task, "", cfg.num_hidden_layers, c, len(rows), 0.0)
    scores = rival.scores(held_out)
    if task.answer_ndim == 2:
        rival = dataclasses.replace(rival, decisions=decide(expit(scores), truth > 0))
    linear = rival.answers(scores)
    gap, low, high = lost_points(task, linear, answers, truth)
    if low <= 0:
        return ""
    kind = "ridge" if isinstance(task, Regression) else "logistic"
    return (
        f"{task.metric_name} of full depth is {task.measure(answers, truth):.3f} on {len(truth)} "
        f"held-out rows, and of {kind} regression on the frozen encoder "
        f"{task.measure(linear, truth):.3f} ({gap:.1f} points more, 95 %: {low:.1f} to "
        f"{high:.1f}): train longer, or at another learning rate."
    )
